/* The attention rank's end of A2E/E2A: one call stages rows and tells the experts, one waits and takes the results.
 *
 * One exchange per microbatch may be open: it owns the source block. An answer counts only if it repeats the stamp of the
 * cell that is being answered, so answers to an earlier attempt or life are never taken. */
#include "_relay.h"

enum { ROUTE_DIRECT = 0, ROUTE_TRAMPOLINE = 1 };
enum { COMPLETE = 0, PENDING = 1, DEAD_OWNER = 2, WRONG_COUNT = 3, REPLACED = 4 };

typedef struct {
    uint64_t token; /* serial number of the exchange, 0: there was none */
    uint64_t event_id;
    int open, route, has_looked;
    uint32_t bell_seen; /* when the cells were last looked at */
    Py_ssize_t num_rows, num_pairs, num_pending;
    int32_t *rank;     /* [rows * slots] expert rank, -1 = none */
    int32_t *position; /* [rows * slots] place among the pairs */
    int32_t *order;    /* [pairs] flat (row * slots + slot) */
    int32_t *starts;   /* [experts + 1] first pair of each expert rank */
    int32_t *pending;  /* [num_pending] expert ranks that have not answered */
    uint64_t *asked;   /* [experts] stamp of the cell that it got */
    uint64_t *life;    /* [experts] its incarnation then */
} exchange_t;

typedef struct {
    PyObject_HEAD
    geometry_t g;
    peer_t own;
    peer_t *experts;
    exchange_t *exchanges;
    uint64_t *seen; /* stamp of every own cell when it was last looked at */
    waiter_t waiter;
    uint64_t writes, tokens, dropped, bytes_staged;
    uint64_t by_route[2];
    int ready, busy;
} AttentionEnd;

typedef struct {
    int code;
    Py_ssize_t expert;
    uint64_t value;
} outcome_t;

/* ---------------------------------------------------------------- life */

static int
open_exchange(const geometry_t *g, exchange_t *e)
{
    size_t pairs = (size_t)pairs_max(g), experts = (size_t)g->num_experts;
    e->rank = PyMem_Calloc(3 * pairs + 2 * experts + 1, sizeof *e->rank);
    e->asked = PyMem_Calloc(2 * experts, sizeof *e->asked);
    if (e->rank == NULL || e->asked == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    e->position = e->rank + pairs;
    e->order = e->position + pairs;
    e->starts = e->order + pairs;
    e->pending = e->starts + experts + 1;
    e->life = e->asked + experts;
    return 0;
}

static int
AttentionEnd_init(AttentionEnd *self, PyObject *args, PyObject *kwargs)
{
    PyObject *geometry, *segment;
    long long spin_ns;
    if (self->ready || self->experts != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "AttentionEnd: already initialised");
        return -1;
    }
    if (!PyArg_ParseTuple(args, "O!O!L", &PyTuple_Type, &geometry, &PyTuple_Type, &segment, &spin_ns) ||
        parse_geometry(geometry, &self->g) < 0) {
        return -1;
    }
    const geometry_t *g = &self->g;
    if (g->rank < 0 || g->rank >= g->num_attention || spin_ns < 0 || PyTuple_GET_SIZE(segment) != 4) {
        PyErr_Format(PyExc_ValueError, "rank: %zd must be in 0..%zd, spin_ns at least 0", g->rank, g->num_attention - 1);
        return -1;
    }
    self->waiter.spin_ns = self->waiter.spin_ns_max = spin_ns;
    self->experts = PyMem_Calloc((size_t)g->num_experts, sizeof *self->experts);
    self->exchanges = PyMem_Calloc((size_t)g->num_microbatches, sizeof *self->exchanges);
    self->seen = PyMem_Calloc((size_t)attention_cells(g), sizeof *self->seen);
    if (self->experts == NULL || self->exchanges == NULL || self->seen == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t m = 0; m < g->num_microbatches; m++) {
        if (open_exchange(g, &self->exchanges[m]) < 0) {
            return -1;
        }
    }
    if (open_peer(&PyTuple_GET_ITEM(segment, 0), attention_cells(g), attention_bytes(g), &self->own) < 0) {
        return -1;
    }
    self->ready = 1;
    return 0;
}

static void
AttentionEnd_dealloc(AttentionEnd *self)
{
    drop_peer(&self->own);
    for (Py_ssize_t i = 0; self->experts != NULL && i < self->g.num_experts; i++) {
        drop_peer(&self->experts[i]);
    }
    for (Py_ssize_t m = 0; self->exchanges != NULL && m < self->g.num_microbatches; m++) {
        PyMem_Free(self->exchanges[m].rank);
        PyMem_Free(self->exchanges[m].asked);
    }
    PyMem_Free(self->experts);
    PyMem_Free(self->exchanges);
    PyMem_Free(self->seen);
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static int
enter(const AttentionEnd *self, const char *name, Py_ssize_t given, Py_ssize_t wanted)
{
    if (!self->ready || self->busy || self->own.base == NULL) {
        PyErr_Format(PyExc_RuntimeError, "%s: closed, or in use by another thread", name);
        return -1;
    }
    return check_count(name, given, wanted);
}

static PyObject *
AttentionEnd_set_peer(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t expert;
    if (enter(self, "set_peer", nargs, 5) < 0 ||
        parse_index(args[0], "expert", self->g.num_experts, &expert) < 0 ||
        open_peer(args + 1, expert_cells(&self->g), expert_bytes(&self->g), &self->experts[expert]) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *
AttentionEnd_drop_peer(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t expert;
    if (enter(self, "drop_peer", nargs, 1) < 0 ||
        parse_index(args[0], "expert", self->g.num_experts, &expert) < 0) {
        return NULL;
    }
    drop_peer(&self->experts[expert]);
    Py_RETURN_NONE;
}

static PyObject *
AttentionEnd_close(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (self->busy) {
        return enter(self, "close", nargs, 0) < 0 ? NULL : Py_NewRef(Py_None);
    }
    for (Py_ssize_t i = 0; self->experts != NULL && i < self->g.num_experts; i++) {
        drop_peer(&self->experts[i]);
    }
    drop_peer(&self->own);
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- arguments */

/* Export a C-contiguous array of one format. dims: the wanted shape, -1 = any. */
static int
take_array(PyObject *object, const char *name, char format, int ndim, const Py_ssize_t *dims, int flags,
           Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | flags) < 0) {
        return -1;
    }
    int fits = view->ndim == ndim && view->itemsize == 4 && view->format != NULL && view->format[0] == format &&
               view->format[1] == 0 && ((uintptr_t)view->buf & 3) == 0;
    for (int i = 0; fits && i < ndim; i++) {
        fits = dims[i] < 0 || view->shape[i] == dims[i];
    }
    if (!fits) {
        PyErr_Format(PyExc_ValueError, "%s: dtype or shape differs from what the group agreed on", name);
        PyBuffer_Release(view);
        return -1;
    }
    return 0;
}

/* (step, layer, microbatch, attempt), as bus/xccl/event.py packs it. */
static int
parse_event(PyObject *event, Py_ssize_t num_microbatches, uint64_t *event_id, Py_ssize_t *microbatch)
{
    long long parts[4];
    if (!PyTuple_Check(event) || PyTuple_GET_SIZE(event) != 4) {
        PyErr_SetString(PyExc_TypeError, "event: must be an Event");
        return -1;
    }
    for (int i = 0; i < 4; i++) {
        parts[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(event, i));
        if (parts[i] == -1 && PyErr_Occurred()) {
            return -1;
        }
    }
    if (parts[1] < 0 || parts[1] >> 12 != 0 || parts[2] < 0 || parts[2] > 15 || parts[2] >= num_microbatches ||
        parts[3] < 1 || parts[3] >> 16 != 0) {
        PyErr_SetString(PyExc_ValueError, "event: a field is outside its range");
        return -1;
    }
    *event_id = ((uint64_t)parts[0] & UINT32_MAX) << 32 | (uint64_t)parts[1] << 20 | (uint64_t)parts[2] << 16 |
                (uint64_t)parts[3];
    *microbatch = (Py_ssize_t)parts[2];
    return 0;
}

/* ---------------------------------------------------------------- sending */

/* Counting sort of the (row, slot) places by expert rank. -1: a rank is outside -1..num_experts - 1. */
static int
route_slots(const geometry_t *g, exchange_t *e, const int32_t *slot_rank, Py_ssize_t num_rows)
{
    Py_ssize_t num = num_rows * g->num_slots;
    int32_t *starts = e->starts;
    memset(starts, 0, (size_t)(g->num_experts + 1) * sizeof *starts);
    for (Py_ssize_t i = 0; i < num; i++) {
        int32_t rank = slot_rank[i];
        if (rank < -1 || rank >= g->num_experts) {
            return -1;
        }
        e->rank[i] = rank;
        starts[rank + 1]++; /* those of rank -1 are counted at 0, and taken away below */
    }
    starts[0] = 0;
    for (Py_ssize_t r = 0; r < g->num_experts; r++) {
        starts[r + 1] += starts[r];
    }
    for (Py_ssize_t i = 0; i < num; i++) {
        int32_t rank = e->rank[i];
        e->position[i] = -1;
        if (rank >= 0) {
            e->position[i] = starts[rank]++;
            e->order[e->position[i]] = (int32_t)i;
        }
    }
    memmove(starts + 1, starts, (size_t)g->num_experts * sizeof *starts); /* each had moved to the next one's start */
    starts[0] = 0;
    e->num_rows = num_rows;
    e->num_pairs = starts[g->num_experts];
    return 0;
}

static void
list_targets(const geometry_t *g, exchange_t *e)
{
    e->num_pending = 0;
    /* Each begins with another expert rank, so that not all of them write to the same one first. */
    for (Py_ssize_t i = 0; i < g->num_experts; i++) {
        Py_ssize_t r = (g->rank + i) % g->num_experts;
        if (e->starts[r + 1] > e->starts[r]) {
            e->pending[e->num_pending++] = (int32_t)r;
        }
    }
    if (e->route == ROUTE_TRAMPOLINE && e->num_pending > 0) {
        e->pending[0] = (int32_t)trampoline_of(g, g->rank);
        e->num_pending = 1;
    }
}

static void
stage(AttentionEnd *self, const exchange_t *e, Py_ssize_t microbatch, const float *x, const int32_t *slot_expert)
{
    FAULT("entered");
    const geometry_t *g = &self->g;
    char *block = managed_at(&self->own, microbatch * g->source_bytes);
    if (g->int8) {
        float *scales = (float *)(block + g->x_scale_at);
        for (Py_ssize_t i = 0; i < e->num_rows; i++) {
            scales[i] = quantise_row((int8_t *)block + i * g->hidden, x + i * g->hidden, g->hidden);
        }
    }
    else {
        copy_bytes(block, (const char *)x, e->num_rows * row_bytes(g));
    }
    memcpy(block + g->starts_at, e->starts, (size_t)(g->num_experts + 1) * 4);
    int32_t *pair_row = (int32_t *)(block + g->pair_row_at), *pair_expert = (int32_t *)(block + g->pair_expert_at);
    uint32_t slots = (uint32_t)g->num_slots;
    for (Py_ssize_t p = 0; p < e->num_pairs; p++) {
        pair_row[p] = (int32_t)((uint32_t)e->order[p] / slots);
        pair_expert[p] = slot_expert[e->order[p]];
    }
    self->bytes_staged += (uint64_t)(e->num_rows * row_bytes(g) + 8 * e->num_pairs);
}

static void
tell(AttentionEnd *self, exchange_t *e, Py_ssize_t microbatch)
{
    FAULT("staged");
    const geometry_t *g = &self->g;
    for (Py_ssize_t i = 0; i < e->num_pending; i++) {
        Py_ssize_t r = e->pending[i], group = g->rank;
        uint64_t extent = (uint64_t)e->starts[r] << 32 | (uint64_t)(e->starts[r + 1] - e->starts[r]);
        if (e->route == ROUTE_TRAMPOLINE) {
            group = 2 * g->num_attention + seat_of(g, g->rank);
            extent = (uint64_t)e->num_pairs;
        }
        const peer_t *peer = &self->experts[r];
        e->life[r] = peer->incarnation;
        e->asked[r] = push_cell(peer, group * g->num_microbatches + microbatch, self->own.incarnation, &self->writes,
                                e->event_id, extent, (uint64_t)e->num_rows);
    }
}

/* Returns the first expert rank that is needed but not connected, or -1. */
static Py_ssize_t
first_missing(const AttentionEnd *self, const exchange_t *e)
{
    for (Py_ssize_t i = 0; i < e->num_pending; i++) {
        if (self->experts[e->pending[i]].base == NULL) {
            return e->pending[i];
        }
    }
    return -1;
}

static PyObject *
send_rows(AttentionEnd *self, Py_buffer *views, uint64_t event_id, Py_ssize_t microbatch, int route)
{
    const geometry_t *g = &self->g;
    Py_ssize_t num_rows = views[0].shape[0];
    exchange_t *e = &self->exchanges[microbatch];
    e->open = 0;
    e->route = route;
    e->event_id = event_id;
    if (route_slots(g, e, views[1].buf, num_rows) < 0) {
        PyErr_Format(PyExc_ValueError, "slot_rank: a rank is outside -1..%zd", g->num_experts - 1);
        return NULL;
    }
    list_targets(g, e);
    Py_ssize_t missing = first_missing(self, e);
    if (missing >= 0) {
        return PyLong_FromSsize_t(-1 - missing);
    }
    if (num_rows * row_bytes(g) < GIL_COPY_BYTES) {
        stage(self, e, microbatch, views[0].buf, views[2].buf);
        tell(self, e, microbatch);
    }
    else {
        self->busy = 1;
        Py_BEGIN_ALLOW_THREADS
        stage(self, e, microbatch, views[0].buf, views[2].buf);
        tell(self, e, microbatch);
        Py_END_ALLOW_THREADS
        self->busy = 0;
    }
    self->by_route[route]++;
    e->has_looked = 0;
    e->open = 1;
    e->token = ++self->tokens;
    return PyLong_FromUnsignedLongLong(e->token);
}

static PyObject *
AttentionEnd_send(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    const geometry_t *g = &self->g;
    uint64_t event_id;
    Py_ssize_t microbatch, route;
    if (enter(self, "send", nargs, 5) < 0 ||
        parse_event(args[3], g->num_microbatches, &event_id, &microbatch) < 0 ||
        parse_index(args[4], "route", g->num_seats > 0 ? 2 : 1, &route) < 0) {
        return NULL;
    }
    Py_buffer views[3];
    const Py_ssize_t rows[] = {-1, g->hidden};
    if (take_array(args[0], "x", 'f', 2, rows, 0, &views[0]) < 0) {
        return NULL;
    }
    const Py_ssize_t slots[] = {views[0].shape[0], g->num_slots};
    PyObject *result = NULL;
    if (views[0].shape[0] > g->rows_max) {
        PyErr_Format(PyExc_ValueError, "x: %zd rows exceed rows_max=%zd", views[0].shape[0], g->rows_max);
    }
    else if (take_array(args[1], "slot_rank", 'i', 2, slots, 0, &views[1]) == 0) {
        if (take_array(args[2], "slot_expert", 'i', 2, slots, 0, &views[2]) == 0) {
            result = send_rows(self, views, event_id, microbatch, (int)route);
            PyBuffer_Release(&views[2]);
        }
        PyBuffer_Release(&views[1]);
    }
    PyBuffer_Release(&views[0]);
    return result;
}

/* count(slot_rank) -> (expert ranks that are needed, pairs): what the cost rule wants to know. */
static PyObject *
AttentionEnd_count(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    const geometry_t *g = &self->g;
    const Py_ssize_t slots[] = {-1, g->num_slots};
    Py_buffer view;
    if (enter(self, "count", nargs, 1) < 0 || take_array(args[0], "slot_rank", 'i', 2, slots, 0, &view) < 0) {
        return NULL;
    }
    uint8_t *needed = PyMem_Calloc((size_t)g->num_experts, 1);
    Py_ssize_t num_targets = 0, num_pairs = 0;
    const int32_t *rank = view.buf;
    for (Py_ssize_t i = 0; needed != NULL && i < view.len / 4; i++) {
        if (rank[i] >= 0 && rank[i] < g->num_experts) {
            num_pairs++;
            num_targets += !needed[rank[i]];
            needed[rank[i]] = 1;
        }
    }
    PyBuffer_Release(&view);
    if (needed == NULL) {
        return PyErr_NoMemory();
    }
    PyMem_Free(needed);
    return Py_BuildValue("nn", num_targets, num_pairs);
}

/* ---------------------------------------------------------------- receiving */

/* The rows of `expert`'s answer: pairs first..end - 1 lie one after the other from here on. */
static const char *
result_block(const AttentionEnd *self, const exchange_t *e, Py_ssize_t expert, Py_ssize_t microbatch)
{
    const geometry_t *g = &self->g;
    if (e->route == ROUTE_TRAMPOLINE) {
        Py_ssize_t seat = seat_of(g, g->rank) * g->num_microbatches + microbatch;
        return managed_at(&self->experts[expert], g->seat_results_at + seat * g->result_bytes);
    }
    return managed_at(&self->experts[expert], (g->rank * g->num_microbatches + microbatch) * g->result_bytes);
}

static void
scatter(const AttentionEnd *self, const exchange_t *e, Py_ssize_t expert, Py_ssize_t microbatch, float *out)
{
    const geometry_t *g = &self->g;
    const char *block = result_block(self, e, expert, microbatch);
    const float *scales = (const float *)(block + g->y_scale_at);
    int direct = e->route == ROUTE_DIRECT;
    Py_ssize_t first = direct ? e->starts[expert] : 0, end = direct ? e->starts[expert + 1] : e->num_pairs;
    for (Py_ssize_t p = first; p < end; p++) {
        float *dst = out + (Py_ssize_t)e->order[p] * g->hidden;
        const char *src = block + (p - first) * row_bytes(g);
        if (g->int8) {
            dequantise_row(dst, (const int8_t *)src, scales[p - first], g->hidden);
        }
        else {
            copy_bytes((char *)dst, src, row_bytes(g));
        }
    }
}

/* out[t] = 0 + weights[t, 0] * y of slot 0 + weights[t, 1] * y of slot 1 ..., in this order. */
static void
reduce(const AttentionEnd *self, const exchange_t *e, Py_ssize_t microbatch, const float *weights, float *out)
{
    const geometry_t *g = &self->g;
    Py_ssize_t trampoline = trampoline_of(g, g->rank);
    for (Py_ssize_t t = 0; t < e->num_rows; t++) {
        const char *rows[SLOTS_MAX];
        float scales[SLOTS_MAX], factors[SLOTS_MAX];
        int num = 0;
        for (Py_ssize_t i = t * g->num_slots; i < (t + 1) * g->num_slots; i++) {
            if (e->rank[i] < 0) {
                continue;
            }
            int direct = e->route == ROUTE_DIRECT;
            Py_ssize_t expert = direct ? e->rank[i] : trampoline;
            Py_ssize_t row = e->position[i] - (direct ? e->starts[expert] : 0);
            const char *block = result_block(self, e, expert, microbatch);
            rows[num] = block + row * row_bytes(g);
            scales[num] = g->int8 ? ((const float *)(block + g->y_scale_at))[row] : 1.0f;
            factors[num++] = weights[i];
        }
        if (g->int8) {
            add_slots_int8(out + t * g->hidden, (const int8_t *const *)rows, scales, factors, num, g->hidden);
        }
        else {
            add_slots(out + t * g->hidden, (const float *const *)rows, factors, num, g->hidden);
        }
    }
}

/* Look at the cell of an awaited expert rank: COMPLETE when it has answered. */
static outcome_t
look(AttentionEnd *self, const exchange_t *e, Py_ssize_t expert, Py_ssize_t microbatch)
{
    const geometry_t *g = &self->g;
    outcome_t outcome = {PENDING, expert, 0};
    int direct = e->route == ROUTE_DIRECT;
    Py_ssize_t index = (direct ? expert : g->num_experts) * g->num_microbatches + microbatch;
    const uint64_t *cell = cell_at(&self->own, index);
    uint64_t words[CELL_WORDS];
    if (__atomic_load_n(&cell[0], __ATOMIC_RELAXED) == self->seen[index] ||
        !load_cell(cell, words) || words[0] == self->seen[index]) { /* SYNC: cell-whole */
        return outcome;
    }
    self->seen[index] = words[0];
    if (words[1] != e->event_id || words[3] != e->asked[expert] || !stamped_by(words[0], e->life[expert])) {
        self->dropped++;
        return outcome;
    }
    Py_ssize_t wanted = direct ? e->starts[expert + 1] - e->starts[expert] : e->num_pairs;
    outcome.value = words[2];
    if (!direct && (words[2] & FAILED)) {
        outcome.code = DEAD_OWNER;
    }
    else if (words[2] != (uint64_t)wanted) {
        outcome.code = WRONG_COUNT;
    }
    else {
        const peer_t *peer = &self->experts[expert];
        outcome.code = peer->base == NULL || peer->incarnation != e->life[expert] ? REPLACED : COMPLETE;
    }
    return outcome;
}

/* REPLACED when a rank whose answer was taken earlier has another segment by now, else COMPLETE. */
static outcome_t
find_replaced(const AttentionEnd *self, const exchange_t *e)
{
    const geometry_t *g = &self->g;
    for (Py_ssize_t r = 0; r < g->num_experts; r++) {
        int asked = e->route == ROUTE_DIRECT ? e->starts[r + 1] > e->starts[r]
                                             : e->num_pairs > 0 && r == trampoline_of(g, g->rank);
        if (asked && (self->experts[r].base == NULL || self->experts[r].incarnation != e->life[r])) {
            return (outcome_t){REPLACED, r, 0};
        }
    }
    return (outcome_t){COMPLETE, -1, 0};
}

/* Take the answers that have come. PENDING when there are more to come. */
static outcome_t
take_answers(AttentionEnd *self, exchange_t *e, Py_ssize_t microbatch, const float *weights, float *out)
{
    for (Py_ssize_t i = e->num_pending - 1; i >= 0; i--) {
        Py_ssize_t expert = e->pending[i];
        outcome_t found = look(self, e, expert, microbatch);
        if (found.code == PENDING) {
            continue;
        }
        if (found.code != COMPLETE) {
            return found;
        }
        if (weights == NULL) {
            scatter(self, e, expert, microbatch, out);
        }
        e->pending[i] = e->pending[--e->num_pending];
    }
    outcome_t outcome = {e->num_pending > 0 ? PENDING : COMPLETE, -1, 0};
    if (outcome.code == COMPLETE && weights != NULL) {
        outcome = find_replaced(self, e);
    }
    if (outcome.code == COMPLETE && weights != NULL) {
        reduce(self, e, microbatch, weights, out);
    }
    return outcome;
}

static outcome_t
receive(AttentionEnd *self, exchange_t *e, Py_ssize_t microbatch, const float *weights, float *out, int64_t timeout)
{
    uint32_t *bell = (uint32_t *)(self->own.base + DOORBELL_OFFSET);
    int64_t until = timeout > 0 ? deadline_after(now_ns(), timeout) : 0;
    for (;;) {
        uint32_t seen = __atomic_load_n(bell, __ATOMIC_ACQUIRE); /* SYNC: word */
        outcome_t outcome = {PENDING, -1, 0};
        /* Every cell is followed by a ring, but for the last one of a rank that dies: without time, look all the same. */
        if (!e->has_looked || seen != e->bell_seen || timeout == 0) {
            e->bell_seen = seen;
            e->has_looked = 1;
            outcome = take_answers(self, e, microbatch, weights, out);
        }
        if (outcome.code != PENDING || timeout == 0 ||
            !await_ring(&self->waiter, bell, seen, (uint32_t)e->num_pending, until)) {
            return outcome;
        }
    }
}

static PyObject *
recv_rows(AttentionEnd *self, exchange_t *e, Py_ssize_t microbatch, PyObject *weights, PyObject *out, int64_t timeout)
{
    const geometry_t *g = &self->g;
    const Py_ssize_t slots[] = {e->num_rows, g->num_slots, g->hidden}, rows[] = {e->num_rows, g->hidden};
    Py_buffer out_view, weights_view = {.obj = NULL};
    int reduces = weights != Py_None;
    if (reduces ? take_array(out, "out", 'f', 2, rows, PyBUF_WRITABLE, &out_view) < 0
                : take_array(out, "out", 'f', 3, slots, PyBUF_WRITABLE, &out_view) < 0) {
        return NULL;
    }
    if (reduces && take_array(weights, "weights", 'f', 2, slots, 0, &weights_view) < 0) {
        PyBuffer_Release(&out_view);
        return NULL;
    }
    outcome_t outcome;
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    outcome = receive(self, e, microbatch, weights_view.obj == NULL ? NULL : weights_view.buf, out_view.buf, timeout);
    Py_END_ALLOW_THREADS
    self->busy = 0;
    if (weights_view.obj != NULL) {
        PyBuffer_Release(&weights_view);
    }
    PyBuffer_Release(&out_view);
    e->open = outcome.code != COMPLETE;
    if (outcome.code == COMPLETE) {
        FAULT("pulled");
        Py_RETURN_TRUE;
    }
    if (outcome.code == PENDING) {
        Py_RETURN_FALSE;
    }
    return Py_BuildValue("inK", outcome.code, outcome.expert, (unsigned long long)outcome.value);
}

static exchange_t *
find_exchange(AttentionEnd *self, PyObject *token, PyObject *microbatch, Py_ssize_t *place)
{
    uint64_t wanted;
    if (parse_index(microbatch, "microbatch", self->g.num_microbatches, place) < 0 ||
        parse_unsigned(token, "token", UINT64_MAX, &wanted) < 0) {
        return NULL;
    }
    exchange_t *e = &self->exchanges[*place];
    if (!e->open || e->token != wanted) {
        PyErr_SetString(PyExc_ValueError, "handle: not the open exchange of its microbatch");
        return NULL;
    }
    return e;
}

static PyObject *
AttentionEnd_recv(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch;
    uint64_t timeout;
    if (enter(self, "recv", nargs, 5) < 0 || parse_unsigned(args[4], "timeout_ns", INT64_MAX, &timeout) < 0) {
        return NULL;
    }
    exchange_t *e = find_exchange(self, args[0], args[1], &microbatch);
    return e == NULL ? NULL : recv_rows(self, e, microbatch, args[2], args[3], (int64_t)timeout);
}

/* [(expert, incarnation)] that the exchange still waits for. */
static PyObject *
AttentionEnd_pending(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch;
    if (enter(self, "pending", nargs, 2) < 0) {
        return NULL;
    }
    exchange_t *e = find_exchange(self, args[0], args[1], &microbatch);
    PyObject *list = e == NULL ? NULL : PyList_New(0);
    for (Py_ssize_t i = 0; list != NULL && i < e->num_pending; i++) {
        Py_ssize_t expert = e->pending[i];
        PyObject *entry = Py_BuildValue("nK", expert, (unsigned long long)e->life[expert]);
        if (entry == NULL || PyList_Append(list, entry) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(entry);
    }
    return list;
}

static PyObject *
AttentionEnd_counters(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    return Py_BuildValue("{sKsKsKsKsKsK}", "a2e_cell_writes", (unsigned long long)self->writes, "direct_exchanges",
                         (unsigned long long)self->by_route[0], "trampoline_exchanges",
                         (unsigned long long)self->by_route[1], "bytes_sent",
                         (unsigned long long)self->bytes_staged, "dropped", (unsigned long long)self->dropped,
                         "sleeps", (unsigned long long)self->waiter.sleeps);
}

#define METHOD(name, doc) {#name, (PyCFunction)(void (*)(void))AttentionEnd_##name, METH_FASTCALL, doc}

static PyMethodDef methods[] = {
    METHOD(set_peer, "set_peer(expert, buf, incarnation, cells_offset, managed_offset)."),
    METHOD(drop_peer, "drop_peer(expert)."),
    METHOD(close, "close(): let all mappings go."),
    METHOD(send, "send(x, slot_rank, slot_expert, event, route) -> token, or -1 - rank that is not connected."),
    METHOD(count, "count(slot_rank) -> (expert ranks that are needed, pairs)."),
    METHOD(recv, "recv(token, microbatch, weights, out, timeout_ns) -> whether all have answered, or (code, rank, value)."),
    METHOD(pending, "pending(token, microbatch) -> [(expert, incarnation)] still awaited."),
    METHOD(counters, "counters() -> dict."),
    {NULL, NULL, 0, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "AttentionEnd(geometry, (buf, incarnation, cells_offset, managed_offset), spin_ns_max)."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, AttentionEnd_init},
    {Py_tp_dealloc, AttentionEnd_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec attention_end_spec = {
    .name = "bus.memory._relay.AttentionEnd",
    .basicsize = sizeof(AttentionEnd),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = type_slots,
};
