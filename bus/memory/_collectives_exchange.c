/* `Exchange`: one rank's end of dispatch/combine. It holds the mapped segments of all ranks.
 *
 * The layout of every byte is given by bus/xccl/dispatch_layout.py; nothing read from a peer is trusted: counts,
 * offsets and row numbers are copied once, then checked, then used.
 *
 * Release stores and the acquire loads that pair with them carry the same "SYNC: <label>", as in _native.c.
 */
#include "_collectives.h"
#include "_collectives_rows.h"

#define LANES 3 /* dispatch twice, combine once */
#define LANE_COMBINE 2
#define COUNTER_BITS 40
#define PROBE_EVERY 64 /* a burst that has shrunk to nothing is tried again once in so many waits */
#define TOP_K_MAX 64

#define ARRIVED 0
#define AWAITED 1
#define MOVED_ON 2

static inline int32_t
load_count(const int32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED); /* read once: a peer may change it behind our back */
}

static void
ring(char *segment)
{
    uint32_t *words = (uint32_t *)(segment + DOORBELL_OFFSET);
    uint32_t seq = __atomic_add_fetch(&words[0], 1, __ATOMIC_SEQ_CST); /* SYNC: doorbell, SYNC: word */
    if (__atomic_load_n(&words[1], __ATOMIC_SEQ_CST) == 0) {           /* SYNC: doorbell */
        return;
    }
    /* A waiter for several ranks need not be woken before as many rings as it lacks ranks. */
    int patient = __atomic_load_n(&words[2], __ATOMIC_SEQ_CST) != 0;
    if (!patient || (int32_t)(seq - __atomic_load_n(&words[3], __ATOMIC_SEQ_CST)) >= 0) {
        syscall(SYS_futex, &words[0], FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
}

typedef struct {
    Py_buffer view;
    char *base; /* NULL: not connected */
    Py_ssize_t cells, managed;
    uint64_t incarnation;
} peer_t;

typedef struct {
    PyObject_HEAD
    peer_t *peers;
    int32_t *starts;  /* [num_ranks, num_local + 1] scratch of `pull`, [num_experts] scratch of `stage` and `reduce` */
    Py_ssize_t rank, num_ranks, max_tokens, top_k, hidden, num_local, num_microbatches;
    int int8;
    Py_ssize_t block_bytes, x_at, x_scale_at, starts_at, pair_row_at, y_start_at, y_scale_at, y_at;
    uint64_t writes;
    int64_t spin_ns, spin_ns_max;
    uint64_t waits, sleeps;
    int busy; /* a call has released the GIL */
} Exchange;

static Py_ssize_t
pairs_max(const Exchange *self)
{
    return self->num_ranks * self->max_tokens * self->top_k;
}

static Py_ssize_t
row_bytes(const Exchange *self)
{
    return self->int8 ? self->hidden : 4 * self->hidden;
}

static char *
block_of(const Exchange *self, Py_ssize_t rank, Py_ssize_t microbatch)
{
    const peer_t *peer = &self->peers[rank];
    return peer->base + peer->managed + microbatch * self->block_bytes;
}

/* The cell that `writer` writes in `owner`'s metadata. */
static uint64_t *
cell_of(const Exchange *self, Py_ssize_t owner, Py_ssize_t writer, Py_ssize_t microbatch, int lane)
{
    const peer_t *peer = &self->peers[owner];
    Py_ssize_t index = (writer * self->num_microbatches + microbatch) * LANES + lane;
    return (uint64_t *)(peer->base + peer->cells + index * CELL_STRIDE);
}

static int
check_layout(const Exchange *self)
{
    Py_ssize_t rows = self->max_tokens, pairs = pairs_max(self);
    const Py_ssize_t areas[][2] = {
        {self->x_at, rows * row_bytes(self)},
        {self->x_scale_at, rows * 4},
        {self->starts_at, (self->num_ranks * self->num_local + 1) * 4},
        {self->pair_row_at, rows * self->top_k * 4},
        {self->y_start_at, self->num_ranks * self->num_local * 4},
        {self->y_scale_at, pairs * 4},
        {self->y_at, pairs * row_bytes(self)},
    };
    for (size_t i = 0; i < sizeof areas / sizeof areas[0]; i++) {
        if (areas[i][0] < 0 || areas[i][0] % CELL_STRIDE != 0 || areas[i][0] + areas[i][1] > self->block_bytes) {
            PyErr_Format(PyExc_ValueError, "offsets: part %zu leaves the block of %zd bytes", i, self->block_bytes);
            return -1;
        }
    }
    return 0;
}

static int
check_sizes(const Exchange *self)
{
    const Py_ssize_t sizes[] = {self->num_ranks, self->max_tokens, self->top_k, self->hidden, self->num_local,
                                self->num_microbatches};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        if (sizes[i] < 1 || sizes[i] > 1 << 20) {
            PyErr_Format(PyExc_ValueError, "shape: size %zu is %zd, must be in 1..%d", i, sizes[i], 1 << 20);
            return -1;
        }
    }
    if (self->top_k > TOP_K_MAX || self->rank < 0 || self->rank >= self->num_ranks || self->spin_ns_max < 0) {
        PyErr_Format(PyExc_ValueError, "shape: top_k %zd must be at most %d, rank %zd below %zd", self->top_k,
                     TOP_K_MAX, self->rank, self->num_ranks);
        return -1;
    }
    if ((double)self->num_ranks * self->max_tokens * self->top_k > INT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "shape: num_ranks * max_tokens * top_k must fit 31 bits");
        return -1;
    }
    return check_layout(self);
}

static int
Exchange_init(Exchange *self, PyObject *args, PyObject *kwargs)
{
    long long spin_ns;
    if (self->peers != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "Exchange: already initialised");
        return -1;
    }
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) > 0) {
        PyErr_SetString(PyExc_TypeError, "Exchange: takes no keyword arguments");
        return -1;
    }
    if (!PyArg_ParseTuple(args, "(nnnnnnnp)(nnnnnnnn)L", &self->rank, &self->num_ranks, &self->max_tokens,
                          &self->top_k, &self->hidden, &self->num_local, &self->num_microbatches, &self->int8,
                          &self->block_bytes, &self->x_at, &self->x_scale_at, &self->starts_at, &self->pair_row_at,
                          &self->y_start_at, &self->y_scale_at, &self->y_at, &spin_ns)) {
        return -1;
    }
    self->spin_ns = self->spin_ns_max = spin_ns;
    if (check_sizes(self) < 0) {
        return -1;
    }
    self->peers = PyMem_Calloc((size_t)self->num_ranks, sizeof *self->peers);
    self->starts = PyMem_Calloc((size_t)(self->num_ranks * (self->num_local + 1)), sizeof *self->starts);
    if (self->peers == NULL || self->starts == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static void
drop_peer(peer_t *peer)
{
    if (peer->base != NULL) {
        peer->base = NULL;
        PyBuffer_Release(&peer->view);
    }
}

static void
Exchange_dealloc(Exchange *self)
{
    if (self->peers != NULL) {
        for (Py_ssize_t i = 0; i < self->num_ranks; i++) {
            drop_peer(&self->peers[i]);
        }
    }
    PyMem_Free(self->peers);
    PyMem_Free(self->starts);
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

/* Every method begins here: the object is whole, and no other thread is inside. */
static int
enter(const Exchange *self, const char *name, Py_ssize_t given, Py_ssize_t wanted)
{
    if (self->peers == NULL || self->starts == NULL || self->busy) {
        PyErr_Format(PyExc_RuntimeError, "%s: the exchange is in use by another thread or not initialised", name);
        return -1;
    }
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "%s: takes %zd arguments, got %zd", name, wanted, given);
        return -1;
    }
    return 0;
}

static int
parse_word(PyObject *object, uint64_t *out)
{
    *out = PyLong_AsUnsignedLongLong(object);
    return *out == UINT64_MAX && PyErr_Occurred() ? -1 : 0;
}

/* All ranks must be connected before a call that addresses them. */
static int
check_connected(const Exchange *self)
{
    for (Py_ssize_t r = 0; r < self->num_ranks; r++) {
        if (self->peers[r].base == NULL) {
            PyErr_Format(PyExc_LookupError, "rank %zd is not connected", r);
            return -1;
        }
    }
    return 0;
}

static PyObject *
Exchange_set_peer(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t rank, cells, managed;
    uint64_t incarnation;
    if (enter(self, "set_peer", nargs, 5) < 0 || parse_index(args[0], "rank", self->num_ranks, &rank) < 0 ||
        parse_word(args[2], &incarnation) < 0 || parse_index(args[3], "cells", PY_SSIZE_T_MAX / 2, &cells) < 0 ||
        parse_index(args[4], "managed", PY_SSIZE_T_MAX / 2, &managed) < 0) {
        return NULL;
    }
    Py_buffer view;
    if (PyObject_GetBuffer(args[1], &view, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    Py_ssize_t cell_bytes = self->num_ranks * self->num_microbatches * LANES * CELL_STRIDE;
    Py_ssize_t managed_bytes = self->num_microbatches * self->block_bytes;
    if (cells < DOORBELL_OFFSET + 8 || cells % CELL_STRIDE != 0 || managed % CELL_STRIDE != 0 ||
        ((uintptr_t)view.buf & 7) != 0 || cells + cell_bytes > managed || managed + managed_bytes > view.len) {
        PyErr_Format(PyExc_ValueError, "rank %zd: its cells and blocks do not fit its segment of %zd bytes", rank,
                     view.len);
        PyBuffer_Release(&view);
        return NULL;
    }
    peer_t *peer = &self->peers[rank];
    drop_peer(peer);
    *peer = (peer_t){view, view.buf, cells, managed, incarnation};
    Py_RETURN_NONE;
}

static PyObject *
Exchange_drop_peer(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t rank;
    if (enter(self, "drop_peer", nargs, 1) < 0 || parse_index(args[0], "rank", self->num_ranks, &rank) < 0) {
        return NULL;
    }
    drop_peer(&self->peers[rank]);
    Py_RETURN_NONE;
}

/* Counting sort of the (token, slot) pairs by expert; source order stays within an expert.
 * Fills starts[num_experts + 1], position[num_tokens * top_k] (-1: no expert) and the block's copies. */
static int
route(Exchange *self, char *block, const int32_t *topk_idx, Py_ssize_t num_tokens, int32_t *position, int32_t *starts)
{
    Py_ssize_t num_experts = self->num_ranks * self->num_local, num_slots = num_tokens * self->top_k;
    int32_t *next = self->starts;
    memset(next, 0, (size_t)num_experts * sizeof *next);
    for (Py_ssize_t i = 0; i < num_slots; i++) {
        if (topk_idx[i] < -1 || topk_idx[i] >= num_experts) {
            return -1;
        }
        if (topk_idx[i] >= 0) {
            next[topk_idx[i]]++;
        }
    }
    int32_t running = 0;
    int32_t *shared_starts = (int32_t *)(block + self->starts_at);
    for (Py_ssize_t e = 0; e < num_experts; e++) {
        int32_t count = next[e];
        starts[e] = shared_starts[e] = next[e] = running;
        running += count;
    }
    starts[num_experts] = shared_starts[num_experts] = running;
    int32_t *pair_row = (int32_t *)(block + self->pair_row_at);
    for (Py_ssize_t i = 0; i < num_slots; i++) {
        int32_t expert = topk_idx[i];
        position[i] = expert < 0 ? -1 : next[expert]++;
        if (expert >= 0) {
            pair_row[position[i]] = (int32_t)(i / self->top_k);
        }
    }
    return 0;
}

static void
put_rows(const Exchange *self, char *rows, float *scales, const float *src, Py_ssize_t num_rows)
{
    if (self->int8) {
        for (Py_ssize_t i = 0; i < num_rows; i++) {
            scales[i] = quantise_row((int8_t *)rows + i * self->hidden, src + i * self->hidden, self->hidden);
        }
    }
    else if ((const char *)src != rows) {
        copy_bytes(rows, (const char *)src, num_rows * row_bytes(self));
    }
}

static PyObject *
Exchange_stage(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch, num_tokens;
    if (enter(self, "stage", nargs, 7) < 0 ||
        parse_index(args[0], "microbatch", self->num_microbatches, &microbatch) < 0 ||
        parse_index(args[1], "num_tokens", self->max_tokens + 1, &num_tokens) < 0 || check_connected(self) < 0) {
        return NULL;
    }
    buffers_t all = {.num = 0};
    Py_ssize_t num_slots = num_tokens * self->top_k, num_experts = self->num_ranks * self->num_local;
    const float *x = take_buffer(&all, args[2], "x", num_tokens * self->hidden * 4, PyBUF_SIMPLE);
    const int32_t *topk = x ? take_buffer(&all, args[3], "topk_idx", num_slots * 4, PyBUF_SIMPLE) : NULL;
    int32_t *position = topk ? take_buffer(&all, args[4], "position", num_slots * 4, PyBUF_WRITABLE) : NULL;
    int32_t *starts = position ? take_buffer(&all, args[5], "starts", (num_experts + 1) * 4, PyBUF_WRITABLE) : NULL;
    int32_t *kept = starts ? take_buffer(&all, args[6], "topk_kept", num_slots * 4, PyBUF_WRITABLE) : NULL;
    if (kept == NULL) {
        return give_back(&all, NULL);
    }
    char *block = block_of(self, self->rank, microbatch);
    int outcome;
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    memmove(kept, topk, (size_t)num_slots * 4);
    FAULT("entered");
    outcome = route(self, block, kept, num_tokens, position, starts);
    if (outcome == 0) {
        put_rows(self, block + self->x_at, (float *)(block + self->x_scale_at), x, num_tokens);
    }
    FAULT("staged");
    Py_END_ALLOW_THREADS
    self->busy = 0;
    if (outcome < 0) {
        PyErr_Format(PyExc_ValueError, "topk_idx: an expert id is outside -1..%zd", num_experts - 1);
        return give_back(&all, NULL);
    }
    return give_back(&all, Py_NewRef(Py_None));
}

static void
notify_rank(Exchange *self, Py_ssize_t rank, Py_ssize_t microbatch, int lane, uint64_t event_id, uint64_t extent,
            uint64_t rows)
{
    self->writes++;
    uint64_t stamp = (self->peers[self->rank].incarnation & 0xFFFFFF) << COUNTER_BITS |
                     (self->writes & ((1ULL << COUNTER_BITS) - 1));
    const uint64_t words[CELL_WORDS] = {stamp, event_id, extent, rows};
    store_cell(cell_of(self, rank, self->rank, microbatch, lane), words);
    FAULT("published");
    ring(self->peers[rank].base);
    FAULT("rung");
}

/* Tell every other rank how much there is for it, zero too: they wait for all. */
static PyObject *
Exchange_notify(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch, lane, num_tokens;
    uint64_t event_id;
    if (enter(self, "notify", nargs, 6) < 0 ||
        parse_index(args[0], "microbatch", self->num_microbatches, &microbatch) < 0 ||
        parse_index(args[1], "lane", LANE_COMBINE, &lane) < 0 || parse_word(args[2], &event_id) < 0 ||
        parse_index(args[3], "num_tokens", self->max_tokens + 1, &num_tokens) < 0 || check_connected(self) < 0) {
        return NULL;
    }
    buffers_t all = {.num = 0};
    Py_ssize_t num_experts = self->num_ranks * self->num_local;
    const int32_t *starts = take_buffer(&all, args[4], "starts", (num_experts + 1) * 4, PyBUF_SIMPLE);
    uint64_t *found = starts ? take_buffer(&all, args[5], "found", self->num_ranks * 16, PyBUF_WRITABLE) : NULL;
    if (found == NULL) {
        return give_back(&all, NULL);
    }
    /* Each begins with its right neighbour, so that not all of them write to rank 0 first. */
    for (Py_ssize_t i = 1; i <= self->num_ranks; i++) {
        Py_ssize_t r = (self->rank + i) % self->num_ranks;
        uint64_t first = (uint64_t)starts[r * self->num_local];
        uint64_t extent = first << 32 | ((uint64_t)starts[(r + 1) * self->num_local] - first);
        if (r == self->rank) {
            found[2 * r] = extent;
            found[2 * r + 1] = (uint64_t)num_tokens;
        }
        else {
            notify_rank(self, r, microbatch, (int)lane, event_id, extent, (uint64_t)num_tokens);
        }
    }
    return give_back(&all, Py_NewRef(Py_None));
}

/* Look at one awaited rank's cells. An event later than the awaited one means that it gave this one up. */
static uint8_t
look(const Exchange *self, Py_ssize_t rank, Py_ssize_t microbatch, int first_lane, int num_lanes, uint64_t event_id,
     uint64_t *found)
{
    uint8_t state = AWAITED;
    for (int lane = first_lane; lane < first_lane + num_lanes; lane++) {
        uint64_t words[4];
        if (!load_cell(cell_of(self, self->rank, rank, microbatch, lane), words) ||
            words[0] >> COUNTER_BITS != (self->peers[rank].incarnation & 0xFFFFFF)) {
            continue;
        }
        if (words[1] == event_id) {
            found[0] = words[2];
            found[1] = words[3];
            return ARRIVED;
        }
        if ((int64_t)(words[1] - event_id) > 0) {
            state = MOVED_ON;
        }
    }
    return state;
}

static void
learn(Exchange *self, int64_t spent, int slept)
{
    if (spent == 0) {
        return;
    }
    if (!slept) {
        self->spin_ns = 2 * spent < self->spin_ns_max ? 2 * spent : self->spin_ns_max;
    }
    else {
        self->spin_ns = spent / 2 > self->spin_ns_max / 16 ? spent / 2 : 0;
    }
}

/* Wait until no rank is AWAITED, one has MOVED_ON, or the time is over.
 * Returns how many are awaited, or -1 - rank for the first one that has moved on. */
static Py_ssize_t
await_ranks(Exchange *self, Py_ssize_t microbatch, int first_lane, int num_lanes, uint64_t event_id, uint8_t *state,
            uint64_t *found, int64_t timeout)
{
    uint32_t *bell = (uint32_t *)(self->peers[self->rank].base + DOORBELL_OFFSET);
    int64_t burst = self->spin_ns, start = 0;
    if (burst == 0 && ++self->waits % PROBE_EVERY == 0) {
        burst = self->spin_ns_max;
    }
    int slept = 0, waited = 0;
    Py_ssize_t awaited;
    for (;;) {
        uint32_t seen = __atomic_load_n(&bell[0], __ATOMIC_ACQUIRE); /* SYNC: word */
        Py_ssize_t moved = -1;
        awaited = 0;
        for (Py_ssize_t r = 0; r < self->num_ranks; r++) {
            if (state[r] == AWAITED) {
                state[r] = look(self, r, microbatch, first_lane, num_lanes, event_id, &found[2 * r]);
                awaited += state[r] == AWAITED;
                moved = state[r] == MOVED_ON && moved < 0 ? r : moved;
            }
        }
        if (moved >= 0) {
            awaited = -1 - moved;
        }
        if (awaited <= 0) {
            break;
        }
        int64_t now = now_ns();
        start = start == 0 ? now : start;
        if (now - start >= timeout) {
            break;
        }
        waited = 1;
        for (int round = 0; now - start < burst && now - start < timeout; round++) {
            if (__atomic_load_n(&bell[0], __ATOMIC_ACQUIRE) != seen) { /* SYNC: word */
                break;
            }
            if (round < RELAX_ROUNDS) {
                cpu_relax();
                continue;
            }
            sched_yield();
            now = now_ns();
        }
        if (now - start < burst) {
            continue;
        }
        slept = 1;
        int64_t until = timeout > INT64_MAX - start ? INT64_MAX : start + timeout;
        struct timespec at = {.tv_sec = until / NS_PER_S, .tv_nsec = until % NS_PER_S};
        int error = 0;
        /* Every awaited rank will ring after `seen`: had it rung before, its cell would have been visible above. */
        __atomic_store_n(&bell[3], seen + (uint32_t)awaited, __ATOMIC_SEQ_CST);
        __atomic_store_n(&bell[2], 1, __ATOMIC_SEQ_CST);
        __atomic_fetch_add(&bell[1], 1, __ATOMIC_SEQ_CST); /* SYNC: doorbell */
        if (__atomic_load_n(&bell[0], __ATOMIC_SEQ_CST) == seen && /* SYNC: doorbell */
            syscall(SYS_futex, bell, FUTEX_WAIT_BITSET, seen, &at, NULL, FUTEX_BITSET_MATCH_ANY) < 0) {
            error = errno;
        }
        __atomic_fetch_sub(&bell[1], 1, __ATOMIC_SEQ_CST); /* only the waiter takes its own mark away */
        __atomic_store_n(&bell[2], 0, __ATOMIC_SEQ_CST);
        if (error == EINTR) {
            break; /* back to Python, which runs signal handlers and calls again */
        }
    }
    self->sleeps += (uint64_t)slept;
    if (waited) {
        learn(self, burst, slept);
    }
    return awaited;
}

static PyObject *
Exchange_wait(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch;
    uint64_t event_id, timeout;
    if (enter(self, "wait", nargs, 6) < 0 ||
        parse_index(args[0], "microbatch", self->num_microbatches, &microbatch) < 0 ||
        parse_word(args[2], &event_id) < 0 || parse_word(args[5], &timeout) < 0 || check_connected(self) < 0) {
        return NULL;
    }
    int combine = PyObject_IsTrue(args[1]);
    if (combine < 0) {
        return NULL;
    }
    buffers_t all = {.num = 0};
    uint8_t *state = take_buffer(&all, args[3], "state", self->num_ranks, PyBUF_WRITABLE);
    uint64_t *found = state ? take_buffer(&all, args[4], "found", self->num_ranks * 16, PyBUF_WRITABLE) : NULL;
    if (found == NULL) {
        return give_back(&all, NULL);
    }
    if (timeout > INT64_MAX) {
        timeout = INT64_MAX;
    }
    Py_ssize_t awaited;
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    awaited = await_ranks(self, microbatch, combine ? LANE_COMBINE : 0, combine ? 1 : LANE_COMBINE, event_id, state,
                          found, (int64_t)timeout);
    Py_END_ALLOW_THREADS
    self->busy = 0;
    return give_back(&all, PyLong_FromSsize_t(awaited));
}

/* Copy the slice of `rank`'s expert starts that concerns this rank and check it against the counts in its cell.
 * Returns 0, or -1 when they contradict each other or the shape. */
static int
read_starts(Exchange *self, Py_ssize_t rank, Py_ssize_t microbatch, const uint64_t *extent)
{
    Py_ssize_t num_local = self->num_local;
    uint64_t first = extent[0] >> 32, count = extent[0] & UINT32_MAX;
    if (extent[1] > (uint64_t)self->max_tokens || first + count > extent[1] * (uint64_t)self->top_k) {
        return -1;
    }
    const int32_t *shared = (const int32_t *)(block_of(self, rank, microbatch) + self->starts_at);
    int32_t *starts = self->starts + rank * (num_local + 1);
    if (count == 0) { /* its block must not be read: it owes nothing and may be staging the next exchange already */
        memset(starts, 0, (size_t)(num_local + 1) * sizeof *starts);
        return 0;
    }
    for (Py_ssize_t e = 0; e <= num_local; e++) {
        starts[e] = load_count(&shared[self->rank * num_local + e]);
        if (e > 0 && starts[e] < starts[e - 1]) {
            return -1;
        }
    }
    return (uint64_t)starts[0] == first && (uint64_t)starts[num_local] == first + count ? 0 : -1;
}

/* Pull one source's rows of one expert to `out`. */
static int
pull_rows(const Exchange *self, Py_ssize_t rank, Py_ssize_t microbatch, int32_t begin, int32_t end, uint64_t rows,
          float *out)
{
    const char *block = block_of(self, rank, microbatch);
    const int32_t *pair_row = (const int32_t *)(block + self->pair_row_at);
    for (int32_t p = begin; p < end; p++, out += self->hidden) {
        int32_t row = load_count(&pair_row[p]);
        if (row < 0 || (uint64_t)row >= rows) {
            return -1;
        }
        const char *src = block + self->x_at + row * row_bytes(self);
        if (self->int8) {
            dequantise_row(out, (const int8_t *)src, ((const float *)(block + self->x_scale_at))[row], self->hidden);
        }
        else {
            copy_bytes((char *)out, src, row_bytes(self));
        }
    }
    return 0;
}

/* Returns the rank whose words are impossible, or -1. */
static Py_ssize_t
pull_all(Exchange *self, Py_ssize_t microbatch, const uint64_t *found, float *out, int32_t *expert_counts)
{
    for (Py_ssize_t r = 0; r < self->num_ranks; r++) {
        if (read_starts(self, r, microbatch, &found[2 * r]) < 0) {
            return r;
        }
    }
    int32_t *y_start = (int32_t *)(block_of(self, self->rank, microbatch) + self->y_start_at);
    Py_ssize_t done = 0;
    for (Py_ssize_t e = 0; e < self->num_local; e++) {
        Py_ssize_t before = done;
        for (Py_ssize_t r = 0; r < self->num_ranks; r++) {
            const int32_t *starts = self->starts + r * (self->num_local + 1) + e;
            y_start[r * self->num_local + e] = (int32_t)done;
            if (pull_rows(self, r, microbatch, starts[0], starts[1], found[2 * r + 1], out + done * self->hidden) < 0) {
                return r;
            }
            done += starts[1] - starts[0];
        }
        expert_counts[e] = (int32_t)(done - before);
    }
    return -1;
}

static PyObject *
Exchange_pull(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch;
    if (enter(self, "pull", nargs, 4) < 0 ||
        parse_index(args[0], "microbatch", self->num_microbatches, &microbatch) < 0 || check_connected(self) < 0) {
        return NULL;
    }
    buffers_t all = {.num = 0};
    const uint64_t *found = take_buffer(&all, args[1], "found", self->num_ranks * 16, PyBUF_SIMPLE);
    if (found == NULL) {
        return give_back(&all, NULL);
    }
    Py_ssize_t num_pairs = 0;
    for (Py_ssize_t r = 0; r < self->num_ranks; r++) {
        uint64_t count = found[2 * r] & UINT32_MAX;
        if (count > (uint64_t)(self->max_tokens * self->top_k)) {
            return give_back(&all, PyLong_FromSsize_t(-1 - r));
        }
        num_pairs += (Py_ssize_t)count;
    }
    float *out = take_buffer(&all, args[2], "x_out", num_pairs * self->hidden * 4, PyBUF_WRITABLE);
    int32_t *counts = out ? take_buffer(&all, args[3], "expert_counts", self->num_local * 4, PyBUF_WRITABLE) : NULL;
    if (counts == NULL) {
        return give_back(&all, NULL);
    }
    Py_ssize_t corrupt;
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    FAULT("counted");
    corrupt = pull_all(self, microbatch, found, out, counts);
    FAULT("pulled");
    Py_END_ALLOW_THREADS
    self->busy = 0;
    return give_back(&all, PyLong_FromSsize_t(corrupt >= 0 ? -1 - corrupt : num_pairs));
}

/* Publish y and tell every rank that has rows in it. Marks in `state` who must answer in turn. */
static PyObject *
Exchange_answer(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch, num_pairs;
    uint64_t event_id;
    if (enter(self, "answer", nargs, 7) < 0 ||
        parse_index(args[0], "microbatch", self->num_microbatches, &microbatch) < 0 ||
        parse_word(args[1], &event_id) < 0 ||
        parse_index(args[2], "num_pairs", pairs_max(self) + 1, &num_pairs) < 0 || check_connected(self) < 0) {
        return NULL;
    }
    buffers_t all = {.num = 0};
    const float *y = take_buffer(&all, args[3], "y", num_pairs * self->hidden * 4, PyBUF_SIMPLE);
    const uint64_t *found = y ? take_buffer(&all, args[4], "found", self->num_ranks * 16, PyBUF_SIMPLE) : NULL;
    Py_ssize_t starts_bytes = (self->num_ranks * self->num_local + 1) * 4;
    const int32_t *starts = found ? take_buffer(&all, args[5], "starts", starts_bytes, PyBUF_SIMPLE) : NULL;
    uint8_t *state = starts ? take_buffer(&all, args[6], "state", self->num_ranks, PyBUF_WRITABLE) : NULL;
    if (state == NULL) {
        return give_back(&all, NULL);
    }
    for (Py_ssize_t r = 0; r < self->num_ranks; r++) {
        int owes = starts[(r + 1) * self->num_local] > starts[r * self->num_local];
        state[r] = r != self->rank && owes ? AWAITED : ARRIVED;
    }
    char *block = block_of(self, self->rank, microbatch);
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    put_rows(self, block + self->y_at, (float *)(block + self->y_scale_at), y, num_pairs);
    FAULT("answering");
    Py_END_ALLOW_THREADS
    self->busy = 0;
    for (Py_ssize_t i = 1; i < self->num_ranks; i++) {
        Py_ssize_t r = (self->rank + i) % self->num_ranks;
        uint64_t count = found[2 * r] & UINT32_MAX;
        if (count > 0) {
            notify_rank(self, r, microbatch, LANE_COMBINE, event_id, count, 0);
        }
    }
    return give_back(&all, Py_NewRef(Py_None));
}

/* Where each expert's rows for this rank begin in its owner's y, into self->starts. -1, or a corrupt rank. */
static Py_ssize_t
read_y_starts(Exchange *self, Py_ssize_t microbatch, const int32_t *starts, const uint64_t *answered)
{
    for (Py_ssize_t r = 0; r < self->num_ranks; r++) {
        int64_t asked = (int64_t)starts[(r + 1) * self->num_local] - starts[r * self->num_local];
        if (r != self->rank && asked != 0 && answered[2 * r] != (uint64_t)asked) {
            return r;
        }
        const int32_t *shared = (const int32_t *)(block_of(self, r, microbatch) + self->y_start_at);
        for (Py_ssize_t e = 0; e < self->num_local; e++) {
            Py_ssize_t expert = r * self->num_local + e;
            int64_t count = (int64_t)starts[expert + 1] - starts[expert];
            int32_t begin = count > 0 ? load_count(&shared[self->rank * self->num_local + e]) : 0;
            if (count < 0 || begin < 0 || begin > pairs_max(self) - count) {
                return r;
            }
            self->starts[expert] = begin;
        }
    }
    return -1;
}

/* Add the slots of every token. -1, or the rank for which position, starts and topk_idx contradict each other. */
static Py_ssize_t
reduce_all(Exchange *self, Py_ssize_t microbatch, Py_ssize_t num_tokens, const int32_t *topk_idx,
           const int32_t *position, const int32_t *starts, const uint64_t *answered, const float *weights, float *out)
{
    Py_ssize_t corrupt = read_y_starts(self, microbatch, starts, answered);
    Py_ssize_t num_experts = self->num_ranks * self->num_local;
    for (Py_ssize_t t = 0; t < num_tokens && corrupt < 0; t++) {
        const char *rows[TOP_K_MAX];
        float scales[TOP_K_MAX], factors[TOP_K_MAX];
        int num = 0;
        for (Py_ssize_t i = t * self->top_k; i < (t + 1) * self->top_k; i++) {
            int32_t expert = topk_idx[i];
            if (expert < 0) {
                continue;
            }
            if (expert >= num_experts || position[i] < starts[expert] || position[i] >= starts[expert + 1]) {
                return self->rank;
            }
            const char *block = block_of(self, expert / self->num_local, microbatch);
            Py_ssize_t row = (Py_ssize_t)self->starts[expert] + position[i] - starts[expert];
            rows[num] = block + self->y_at + row * row_bytes(self);
            scales[num] = self->int8 ? ((const float *)(block + self->y_scale_at))[row] : 1.0f;
            factors[num++] = weights[i];
        }
        if (self->int8) {
            add_slots_int8(out + t * self->hidden, (const int8_t *const *)rows, scales, factors, num, self->hidden);
        }
        else {
            add_slots(out + t * self->hidden, (const float *const *)rows, factors, num, self->hidden);
        }
    }
    return corrupt;
}

static PyObject *
Exchange_reduce(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch, num_tokens;
    if (enter(self, "reduce", nargs, 8) < 0 ||
        parse_index(args[0], "microbatch", self->num_microbatches, &microbatch) < 0 ||
        parse_index(args[1], "num_tokens", self->max_tokens + 1, &num_tokens) < 0 || check_connected(self) < 0) {
        return NULL;
    }
    buffers_t all = {.num = 0};
    Py_ssize_t slot_bytes = num_tokens * self->top_k * 4, num_experts = self->num_ranks * self->num_local;
    const int32_t *topk = take_buffer(&all, args[2], "topk_idx", slot_bytes, PyBUF_SIMPLE);
    const int32_t *position = topk ? take_buffer(&all, args[3], "position", slot_bytes, PyBUF_SIMPLE) : NULL;
    const int32_t *starts = position ? take_buffer(&all, args[4], "starts", (num_experts + 1) * 4, PyBUF_SIMPLE) : NULL;
    const uint64_t *answered = starts ? take_buffer(&all, args[5], "answered", self->num_ranks * 16, PyBUF_SIMPLE) : NULL;
    const float *weights = answered ? take_buffer(&all, args[6], "topk_weights", slot_bytes, PyBUF_SIMPLE) : NULL;
    float *out = weights ? take_buffer(&all, args[7], "out", num_tokens * self->hidden * 4, PyBUF_WRITABLE) : NULL;
    if (out == NULL) {
        return give_back(&all, NULL);
    }
    Py_ssize_t corrupt;
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    FAULT("answered");
    corrupt = reduce_all(self, microbatch, num_tokens, topk, position, starts, answered, weights, out);
    Py_END_ALLOW_THREADS
    self->busy = 0;
    return give_back(&all, PyLong_FromSsize_t(corrupt));
}

static PyObject *
Exchange_num_sleeps(Exchange *self, void *closure)
{
    return PyLong_FromUnsignedLongLong(self->sleeps);
}

static PyObject *
Exchange_num_cell_writes(Exchange *self, void *closure)
{
    return PyLong_FromUnsignedLongLong(self->writes);
}

#define METHOD(name, doc) {#name, (PyCFunction)(void (*)(void))Exchange_##name, METH_FASTCALL, doc}

static PyMethodDef exchange_methods[] = {
    METHOD(set_peer, "set_peer(rank, buf, incarnation, cells_offset, managed_offset)."),
    METHOD(drop_peer, "drop_peer(rank)."),
    METHOD(stage, "stage(microbatch, num_tokens, x, topk_idx, position, starts, topk_kept): route and stage rows."),
    METHOD(notify, "notify(microbatch, lane, event_id, num_tokens, starts, found): counts to every other rank, own ones to found."),
    METHOD(wait, "wait(microbatch, combine, event_id, state, found, timeout_ns) -> ranks still awaited, or -1 - rank."),
    METHOD(pull, "pull(microbatch, found, x_out, expert_counts) -> number of pairs, or -1 - corrupt rank."),
    METHOD(answer, "answer(microbatch, event_id, num_pairs, y, found, starts, state): publish y, tell who has rows."),
    METHOD(reduce, "reduce(microbatch, num_tokens, topk_idx, position, starts, answered, weights, out) -> corrupt rank or -1."),
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef exchange_getset[] = {
    {"num_sleeps", (getter)Exchange_num_sleeps, NULL, "Waits that went to sleep in the kernel.", NULL},
    {"num_cell_writes", (getter)Exchange_num_cell_writes, NULL, "Metadata cells written at peers.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot exchange_slots[] = {
    {Py_tp_doc, "Exchange((rank, ranks, tokens, top_k, hidden, local experts, microbatches, int8), offsets, spin_ns)."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, Exchange_init},
    {Py_tp_dealloc, Exchange_dealloc},
    {Py_tp_methods, exchange_methods},
    {Py_tp_getset, exchange_getset},
    {0, NULL},
};

PyType_Spec exchange_spec = {
    .name = "bus.memory._collectives.Exchange",
    .basicsize = sizeof(Exchange),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = exchange_slots,
};
