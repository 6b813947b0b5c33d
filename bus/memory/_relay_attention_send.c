/* The attention rank's first half of an exchange: sort the pairs, stage rows, tell the expert ranks. */
#include "_relay_attention.h"

/* ---------------------------------------------------------------- arguments */

int
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
                                e->event_id, extent, (uint64_t)e->num_rows, RING_ALWAYS);
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
    e->open = 1;
    e->token = ++self->tokens;
    return PyLong_FromUnsignedLongLong(e->token);
}

PyObject *
AttentionEnd_send(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    const geometry_t *g = &self->g;
    uint64_t event_id;
    Py_ssize_t microbatch, route;
    if (enter_attention(self, "send", nargs, 5) < 0 ||
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
PyObject *
AttentionEnd_count(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    const geometry_t *g = &self->g;
    const Py_ssize_t slots[] = {-1, g->num_slots};
    Py_buffer view;
    if (enter_attention(self, "count", nargs, 1) < 0 || take_array(args[0], "slot_rank", 'i', 2, slots, 0, &view) < 0) {
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
