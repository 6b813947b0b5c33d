/* `AllToAll`: every rank gives every rank a piece of bytes; protocol in bus/README.md, "All-to-all".
 *
 * A large piece that lies in the own segment's app area is pulled from there; any other is staged first. What is staged
 * alternates between two halves: when an exchange ends, every peer has pulled the one before. A sender takes its cells
 * back before it overwrites what they point to, and a receiver looks at them again after it has pulled, so bytes that
 * changed meanwhile are never taken for the ones that were announced.
 */
#include "_collectives_alltoall.h"
#include "_collectives_rows.h"

#define LANES 3 /* pieces twice, done once */
#define LANE_DONE COUNT_LANES
#define SMALL_BYTES 512 /* up to here a copy costs less than the second meeting that it saves */
#define STREAM_TOTAL_MIN (512 * 1024) /* a result of so many bytes would push all else out of the caches */
#define STREAM_BYTES_MIN 4096         /* ... but for pieces that are shorter it takes longer */
#define ANSWER_ME (1ULL << 63) /* in w2: tell the sender when the piece has been pulled */

static void
drop_views(AllToAll *self)
{
    while (self->num_views > 0) {
        PyBuffer_Release(&self->views[--self->num_views]);
    }
}

static int
AllToAll_init(AllToAll *self, PyObject *args, PyObject *kwargs)
{
    Py_ssize_t rank, num_ranks, stage_bytes, app_at, shared_bytes;
    long long yield_ns, poll_ns;
    if (self->group.peers != NULL || (kwargs != NULL && PyDict_GET_SIZE(kwargs) > 0)) {
        PyErr_SetString(PyExc_RuntimeError, "AllToAll: already initialised, or keyword arguments");
        return -1;
    }
    if (!PyArg_ParseTuple(args, "nnnnnLL", &rank, &num_ranks, &stage_bytes, &app_at, &shared_bytes, &yield_ns,
                          &poll_ns)) {
        return -1;
    }
    if (stage_bytes < 0 || app_at / 2 < stage_bytes || shared_bytes < app_at || stage_bytes % CELL_STRIDE != 0) {
        PyErr_Format(PyExc_ValueError, "stage_bytes: two halves of %zd must fit before the app area at %zd of %zd",
                     stage_bytes, app_at, shared_bytes);
        return -1;
    }
    self->stage_bytes = stage_bytes;
    self->app_at = app_at;
    if (group_init(&self->group, rank, num_ranks, LANES, shared_bytes, yield_ns, poll_ns) < 0) {
        return -1;
    }
    self->views = PyMem_Calloc((size_t)num_ranks, sizeof *self->views);
    self->pieces = PyMem_Calloc((size_t)num_ranks, sizeof *self->pieces);
    self->found = PyMem_Calloc((size_t)num_ranks, 2 * sizeof *self->found);
    self->answers = PyMem_Calloc((size_t)num_ranks, 2 * sizeof *self->answers);
    self->state = PyMem_Calloc((size_t)num_ranks, sizeof *self->state);
    if (!self->views || !self->pieces || !self->found || !self->answers || !self->state) {
        group_clear(&self->group); /* so that every method refuses */
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static void
AllToAll_dealloc(AllToAll *self)
{
    group_clear(&self->group);
    drop_views(self);
    PyMem_Free(self->views);
    PyMem_Free(self->pieces);
    PyMem_Free(self->found);
    PyMem_Free(self->answers);
    PyMem_Free(self->state);
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

/* ---------------------------------------------------------------- sending */

static inline Py_ssize_t
lane_of(const AllToAll *self)
{
    return (Py_ssize_t)(self->num_sent & 1);
}

/* Take back the own cells of a lane at all peers: what they point to is about to change. */
static void
take_back(AllToAll *self, Py_ssize_t lane)
{
    for (Py_ssize_t i = 1; i < self->group.num_ranks; i++) {
        Py_ssize_t r = group_other(&self->group, i);
        __atomic_store_n(group_cell(&self->group, r, self->group.rank, lane), 0, __ATOMIC_RELAXED);
    }
    __atomic_thread_fence(__ATOMIC_RELEASE); /* SYNC: piece-torn (w0 = 0 is visible before any new byte) */
}

int
alltoall_cut(AllToAll *self, const char *at, Py_ssize_t left, const int64_t *num_rows)
{
    for (Py_ssize_t r = 0; r < self->group.num_ranks; r++) {
        if (num_rows[r] < 0 || num_rows[r] > left / self->row_bytes) {
            return -1;
        }
        self->pieces[r] = (piece_t){at, num_rows[r] * self->row_bytes, 0};
        at += self->pieces[r].size;
        left -= self->pieces[r].size;
    }
    return left == 0 ? 0 : -1;
}

/* The pieces lie in one buffer, cut by `counts` of rows. 0, -1 when they do not cover it, -2 with an exception. */
static int
cut(AllToAll *self, PyObject *array, PyObject *counts)
{
    Py_buffer sizes;
    if (PyObject_GetBuffer(array, &self->views[0], PyBUF_SIMPLE) < 0) {
        return -2;
    }
    self->num_views = 1;
    const int64_t *num_rows = open_buffer(counts, "counts", self->group.num_ranks * 8, PyBUF_SIMPLE, &sizes);
    if (num_rows == NULL) {
        return -2;
    }
    int outcome = alltoall_cut(self, self->views[0].buf, self->views[0].len, num_rows);
    PyBuffer_Release(&sizes);
    return outcome;
}

/* The pieces are the buffers of a list. */
static int
take_parts(AllToAll *self, PyObject *parts)
{
    if (PyList_GET_SIZE(parts) != self->group.num_ranks) {
        return -1;
    }
    for (Py_ssize_t r = 0; r < self->group.num_ranks; r++) {
        if (PyObject_GetBuffer(PyList_GET_ITEM(parts, r), &self->views[r], PyBUF_SIMPLE) < 0) {
            return -2;
        }
        self->num_views++;
        self->pieces[r] = (piece_t){self->views[r].buf, self->views[r].len, 0};
        if (self->pieces[r].size % self->row_bytes != 0) {
            return -1;
        }
    }
    return 0;
}

/* Give a piece the next place in the half, if it fits there. */
static int
stage_piece(const AllToAll *self, piece_t *piece, Py_ssize_t *staged)
{
    if (piece->size > self->stage_bytes - *staged) {
        return -1;
    }
    piece->place = (uint64_t)(lane_of(self) * self->stage_bytes + *staged);
    *staged += (piece->size + CELL_STRIDE - 1) & ~(Py_ssize_t)(CELL_STRIDE - 1);
    *staged = *staged < self->stage_bytes ? *staged : self->stage_bytes;
    return 0;
}

int
alltoall_place(AllToAll *self)
{
    const peer_t *own = &self->group.peers[self->group.rank];
    const char *managed = own->base + own->managed;
    Py_ssize_t staged = 0;
    for (Py_ssize_t r = 0; r < self->group.num_ranks; r++) {
        piece_t *piece = &self->pieces[r];
        uintptr_t at = (uintptr_t)piece->bytes - (uintptr_t)managed;
        if (r == self->group.rank || piece->size == 0) {
            piece->place = 0;
        }
        else if (at >= (uintptr_t)self->app_at && at < (uintptr_t)self->group.shared_bytes &&
                 (uintptr_t)piece->size <= (uintptr_t)self->group.shared_bytes - at) {
            piece->place = at | ANSWER_ME;
        }
        else if (stage_piece(self, piece, &staged) < 0) {
            return -1;
        }
    }
    for (Py_ssize_t r = 0; r < self->group.num_ranks; r++) { /* small ones of the app area get what room is left */
        piece_t *piece = &self->pieces[r];
        if ((piece->place & ANSWER_ME) != 0 && piece->size <= SMALL_BYTES) {
            (void)stage_piece(self, piece, &staged);
        }
    }
    return 0;
}

void
alltoall_send(AllToAll *self, uint64_t event_id)
{
    group_t *group = &self->group;
    const peer_t *own = &group->peers[group->rank];
    self->event_id = event_id;
    take_back(self, lane_of(self));
    for (Py_ssize_t i = 1; i < group->num_ranks; i++) {
        Py_ssize_t r = group_other(group, i);
        const piece_t *piece = &self->pieces[r];
        if (piece->size > 0 && (piece->place & ANSWER_ME) == 0) {
            copy_bytes(own->base + own->managed + piece->place, piece->bytes, piece->size);
            self->bytes_staged += (uint64_t)piece->size;
        }
        self->state[r] = AWAITED;
        FAULT("staged");
        group_tell(group, r, lane_of(self), self->event_id, piece->place, (uint64_t)piece->size);
    }
    group_ring(group);
    self->state[group->rank] = ARRIVED;
    self->found[2 * group->rank] = 0;
    self->found[2 * group->rank + 1] = (uint64_t)self->pieces[group->rank].size;
    self->num_sent++;
    self->phase = PHASE_ANNOUNCED;
}

/* ---------------------------------------------------------------- receiving */

/* Turn what waiting has come to into a status; 0 = all are there. */
static Py_ssize_t
status_of(AllToAll *self, Py_ssize_t awaited)
{
    if (awaited < 0) {
        self->culprit = -1 - awaited;
        return STATUS_MOVED_ON;
    }
    return awaited > 0 ? STATUS_WAITING : 0;
}

/* Check what every rank announced; 0 or a status. */
static Py_ssize_t
count_pieces(AllToAll *self)
{
    uint64_t limit = (uint64_t)self->group.shared_bytes, total = 0;
    for (Py_ssize_t r = 0; r < self->group.num_ranks; r++) {
        uint64_t place = self->found[2 * r] & ~ANSWER_ME, size = self->found[2 * r + 1];
        if (r != self->group.rank && (size > limit || place > limit - size)) {
            self->culprit = r;
            return STATUS_CORRUPT;
        }
        if (size % (uint64_t)self->row_bytes != 0) {
            self->culprit = r;
            return STATUS_CORRUPT;
        }
        total += size;
    }
    self->total = (Py_ssize_t)total;
    self->phase = PHASE_COUNTED;
    return 0;
}

/* Pull every piece to its place in `out`, sources in order of rank; 0 or STATUS_MOVED_ON. */
static Py_ssize_t
pull_pieces(AllToAll *self, char *out)
{
    group_t *group = &self->group;
    Py_ssize_t at = 0;
    for (Py_ssize_t r = 0; r < group->rank; r++) {
        at += (Py_ssize_t)self->found[2 * r + 1];
    }
    for (Py_ssize_t i = 0; i < group->num_ranks; i++) { /* staggered, so that not all read one source at once */
        Py_ssize_t r = group_other(group, i), size = (Py_ssize_t)self->found[2 * r + 1];
        const peer_t *peer = &group->peers[r];
        at = r == 0 ? 0 : at;
        const char *src = peer->base + peer->managed + (self->found[2 * r] & ~ANSWER_ME);
        if (size > 0) { /* without rows there may be no `out` */
            const char *from = r == group->rank ? self->pieces[r].bytes : src;
            copy_piece(out + at, from, size, self->total >= STREAM_TOTAL_MIN && size >= STREAM_BYTES_MIN);
        }
        at += size;
    }
    __atomic_thread_fence(__ATOMIC_ACQUIRE); /* SYNC: piece-torn */
    for (Py_ssize_t r = 0; r < group->num_ranks; r++) {
        if (r != group->rank && !group_still_says(group, r, 0, self->event_id, &self->found[2 * r])) {
            self->state[r] = MOVED_ON;
            self->culprit = r;
            return STATUS_MOVED_ON;
        }
    }
    return 0;
}

/* Tell the ranks that asked for it that their pieces were pulled, and mark whom to wait for in turn. */
static void
answer_pieces(AllToAll *self)
{
    int asked = 0;
    group_t *group = &self->group;
    for (Py_ssize_t i = 1; i < group->num_ranks; i++) {
        Py_ssize_t r = group_other(group, i);
        if (self->found[2 * r] & ANSWER_ME) {
            asked = 1;
            group_tell(group, r, COUNT_LANES, self->event_id, 0, 0);
        }
        self->state[r] = self->pieces[r].place & ANSWER_ME ? AWAITED : ARRIVED;
    }
    if (asked) {
        group_ring(group);
    }
    self->phase = PHASE_PULLED;
}

Py_ssize_t
alltoall_go_on(AllToAll *self, char *out, Py_ssize_t room, int64_t deadline)
{
    Py_ssize_t status = 0;
    if (self->phase == PHASE_ANNOUNCED) {
        status = status_of(
            self, group_await(&self->group, 0, COUNT_LANES, self->event_id, self->state, self->found, deadline));
        status = status == 0 ? count_pieces(self) : status;
    }
    if (status == 0 && self->phase == PHASE_COUNTED) {
        if (self->total > room) {
            return STATUS_NO_ROOM;
        }
        FAULT("counted");
        status = pull_pieces(self, out);
        FAULT("pulled");
        if (status == 0) {
            answer_pieces(self);
        }
    }
    if (status == 0) {
        status = status_of(
            self, group_await_answers(&self->group, 0, self->event_id, self->state, self->answers, deadline));
    }
    return status == 0 ? self->total : status;
}

void
alltoall_clear(AllToAll *self)
{
    drop_views(self);
    self->phase = PHASE_NONE;
}

void
alltoall_end(AllToAll *self, Py_ssize_t status)
{
    if (status >= 0) {
        self->num_exchanges++;
        self->bytes_received += (uint64_t)status;
        alltoall_clear(self);
    }
}

static PyObject *
run(AllToAll *self, PyObject *target, PyObject *time)
{
    Py_buffer out = {0};
    uint64_t deadline;
    if (parse_unsigned(time, "deadline", UINT64_MAX, &deadline) < 0 ||
        (target != Py_None && PyObject_GetBuffer(target, &out, PyBUF_WRITABLE) < 0)) {
        return NULL;
    }
    Py_ssize_t status;
    self->group.busy = 1;
    Py_BEGIN_ALLOW_THREADS
    status = alltoall_go_on(self, out.buf, target == Py_None ? 0 : out.len,
                   deadline > INT64_MAX / 2 ? INT64_MAX / 2 : (int64_t)deadline);
    Py_END_ALLOW_THREADS
    self->group.busy = 0;
    if (target != Py_None) {
        PyBuffer_Release(&out);
    }
    alltoall_end(self, status);
    return PyLong_FromSsize_t(status);
}

/* ---------------------------------------------------------------- methods */

static PyObject *
AllToAll_set_peer(AllToAll *self, PyObject *const *args, Py_ssize_t nargs)
{
    return group_set_peer(&self->group, args, nargs);
}

static PyObject *
AllToAll_drop_peer(AllToAll *self, PyObject *const *args, Py_ssize_t nargs)
{
    return group_drop_peer(&self->group, args, nargs);
}

static PyObject *
AllToAll_exchange(AllToAll *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t row_bytes;
    uint64_t event_id;
    if (group_enter(&self->group, "exchange", nargs, 6, 1) < 0 ||
        parse_unsigned(args[0], "event_id", UINT64_MAX, &event_id) < 0 ||
        parse_index(args[3], "row_bytes", PY_SSIZE_T_MAX / 2, &row_bytes) < 0) {
        return NULL;
    }
    alltoall_clear(self);
    self->row_bytes = row_bytes > 0 ? row_bytes : 1;
    int outcome = PyList_Check(args[1]) ? take_parts(self, args[1]) : cut(self, args[1], args[2]);
    if (outcome < 0 || alltoall_place(self) < 0) {
        drop_views(self);
        return outcome < -1 ? NULL : PyLong_FromSsize_t(outcome < 0 ? STATUS_REFUSED : STATUS_NO_ROOM);
    }
    self->group.busy = 1;
    Py_BEGIN_ALLOW_THREADS
    alltoall_send(self, event_id);
    Py_END_ALLOW_THREADS
    self->group.busy = 0;
    return run(self, args[4], args[5]);
}

static PyObject *
AllToAll_resume(AllToAll *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (group_enter(&self->group, "resume", nargs, 2, 1) < 0) {
        return NULL;
    }
    if (self->phase == PHASE_NONE) {
        PyErr_SetString(PyExc_ValueError, "resume: no exchange is open");
        return NULL;
    }
    return run(self, args[0], args[1]);
}

/* Give the exchange up: peers that have not pulled yet must not take what the caller may overwrite now. */
static PyObject *
AllToAll_abandon(AllToAll *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (group_enter(&self->group, "abandon", nargs, 0, 1) < 0) {
        return NULL;
    }
    if (self->phase != PHASE_NONE) {
        for (Py_ssize_t i = 1; i < self->group.num_ranks; i++) { /* w0 = 0 comes before the caller's next byte */
            Py_ssize_t r = group_other(&self->group, i), lane = (Py_ssize_t)((self->num_sent - 1) & 1);
            group_tell(&self->group, r, lane, self->event_id, WITHDRAWN, 0);
        }
        group_ring(&self->group);
    }
    alltoall_clear(self);
    Py_RETURN_NONE;
}

/* The rows that came from each rank, to a buffer of num_ranks int64. */
static PyObject *
AllToAll_counts(AllToAll *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    if (group_enter(&self->group, "counts", nargs, 1, 0) < 0) {
        return NULL;
    }
    int64_t *counts = open_buffer(args[0], "counts", self->group.num_ranks * 8, PyBUF_WRITABLE, &view);
    if (counts == NULL) {
        return NULL;
    }
    for (Py_ssize_t r = 0; r < self->group.num_ranks; r++) {
        counts[r] = (int64_t)self->found[2 * r + 1] / self->row_bytes;
    }
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *
AllToAll_states(AllToAll *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (group_enter(&self->group, "states", nargs, 0, 0) < 0) {
        return NULL;
    }
    return PyBytes_FromStringAndSize((const char *)self->state, self->group.num_ranks);
}

static PyObject *
AllToAll_culprit(AllToAll *self, void *closure)
{
    return PyLong_FromSsize_t(self->culprit);
}

static PyObject *
AllToAll_total(AllToAll *self, void *closure)
{
    return PyLong_FromSsize_t(self->total);
}

static PyObject *
AllToAll_is_open(AllToAll *self, void *closure)
{
    return PyBool_FromLong(self->phase != PHASE_NONE);
}

static PyObject *
AllToAll_stats(AllToAll *self, PyObject *unused)
{
    const group_t *group = &self->group;
    return Py_BuildValue("{sKsKsKsKsKsKsKsKsK}", "exchanges", (unsigned long long)self->num_exchanges, "bytes_received",
                         (unsigned long long)self->bytes_received, "bytes_staged",
                         (unsigned long long)self->bytes_staged, "cell_writes", (unsigned long long)group->writes,
                         "waits", (unsigned long long)group->waits, "relax_wins",
                         (unsigned long long)group->relax_wins, "yield_wins", (unsigned long long)group->yield_wins,
                         "sleeps", (unsigned long long)group->sleeps,
                         "moves", (unsigned long long)group->moves);
}

#define METHOD(name, doc) {#name, (PyCFunction)(void (*)(void))AllToAll_##name, METH_FASTCALL, doc}

static PyMethodDef alltoall_methods[] = {
    METHOD(set_peer, "set_peer(rank, buf, incarnation, cells_offset, managed_offset)."),
    METHOD(drop_peer, "drop_peer(rank)."),
    METHOD(exchange, "exchange(event_id, array or list, counts, row_bytes, out, deadline_ns) -> bytes, or a status."),
    {"swap", (PyCFunction)(void (*)(void))alltoall_swap, METH_FASTCALL,
     "swap(event, array, counts or None, out, came, deadline) -> rows, or a status."},
    {"persistent", (PyCFunction)(void (*)(void))alltoall_persistent, METH_FASTCALL,
     "persistent(array, out) -> PersistentSwap, None if they are not of the common form."},
    METHOD(resume, "resume(out, deadline_ns) -> bytes, or a status."),
    METHOD(abandon, "abandon(): give the open exchange up."),
    METHOD(counts, "counts(out): rows that came from each rank."),
    METHOD(states, "states() -> a byte for each rank: 0 arrived, 1 awaited, 2 moved on."),
    {"stats", (PyCFunction)AllToAll_stats, METH_NOARGS, "stats() -> counters by name."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef alltoall_getset[] = {
    {"culprit", (getter)AllToAll_culprit, NULL, "The rank that the last status is about.", NULL},
    {"is_open", (getter)AllToAll_is_open, NULL, "An exchange was begun and has not ended.", NULL},
    {"total", (getter)AllToAll_total, NULL, "Bytes that come in the open exchange.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot alltoall_slots[] = {
    {Py_tp_doc, "AllToAll(rank, num_ranks, stage_bytes, app_at, shared_bytes, yield_ns, poll_ns)."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, AllToAll_init},
    {Py_tp_dealloc, AllToAll_dealloc},
    {Py_tp_methods, alltoall_methods},
    {Py_tp_getset, alltoall_getset},
    {0, NULL},
};

PyType_Spec alltoall_spec = {
    .name = "bus.memory._collectives.AllToAll",
    .basicsize = sizeof(AllToAll),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = alltoall_slots,
};
