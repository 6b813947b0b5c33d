/* `Exchange`: a whole dispatch, and a whole combine, in one call from Python each.
 *
 * The layout of every byte is given by bus/xccl/dispatch_layout.py. Here the object is made and asked; what the calls do
 * stands in _collectives_dispatch.c, and how rows are moved in _collectives_pull.c.
 */
#include "_collectives_exchange.h"

/* ---------------------------------------------------------------- life */

static int
check_layout(const Exchange *self)
{
    Py_ssize_t rows = self->max_tokens;
    const Py_ssize_t areas[][2] = {
        {self->x_at, rows * self->row_bytes},
        {self->x_scale_at, rows * 4},
        {self->starts_at, (self->num_experts + 1) * 4},
        {self->pair_row_at, rows * self->top_k * 4},
        {self->y_start_at, self->num_experts * 4},
        {self->y_scale_at, self->pairs_max * 4},
        {self->y_at, self->pairs_max * self->row_bytes},
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
check_sizes(Exchange *self, Py_ssize_t num_ranks)
{
    const Py_ssize_t sizes[] = {num_ranks, self->max_tokens, self->top_k, self->hidden, self->num_local,
                                self->num_microbatches};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        if (sizes[i] < 1 || sizes[i] > 1 << 20) {
            PyErr_Format(PyExc_ValueError, "shape: size %zu is %zd, must be in 1..%d", i, sizes[i], 1 << 20);
            return -1;
        }
    }
    if (self->top_k > TOP_K_MAX) {
        PyErr_Format(PyExc_ValueError, "shape: top_k %zd must be at most %d", self->top_k, TOP_K_MAX);
        return -1;
    }
    if ((double)num_ranks * self->max_tokens * self->top_k > INT32_MAX ||
        (double)num_ranks * self->num_local > INT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "shape: pairs and experts must fit 31 bits");
        return -1;
    }
    self->num_experts = num_ranks * self->num_local;
    self->pairs_max = num_ranks * self->max_tokens * self->top_k;
    self->row_bytes = self->int8 ? self->hidden : 4 * self->hidden;
    if (self->delivers_int8 && !self->int8) {
        PyErr_SetString(PyExc_ValueError, "shape: only INT8 transport can deliver INT8 rows");
        return -1;
    }
    return check_layout(self);
}

static int
make_batch(Exchange *self, batch_t *batch)
{
    size_t slots = (size_t)(self->max_tokens * self->top_k), ranks = (size_t)self->group.num_ranks;
    batch->topk = PyMem_Calloc(slots, sizeof *batch->topk);
    batch->position = PyMem_Calloc(slots, sizeof *batch->position);
    batch->starts = PyMem_Calloc((size_t)self->num_experts + 1, sizeof *batch->starts);
    batch->counts = PyMem_Calloc((size_t)self->num_local, sizeof *batch->counts);
    batch->found = PyMem_Calloc(2 * ranks, sizeof *batch->found);
    batch->state = PyMem_Calloc(ranks, sizeof *batch->state);
    return batch->topk && batch->position && batch->starts && batch->counts && batch->found && batch->state ? 0 : -1;
}

static int
make_memory(Exchange *self)
{
    self->batches = PyMem_Calloc((size_t)self->num_microbatches, sizeof *self->batches);
    self->scratch = PyMem_Calloc((size_t)(self->group.num_ranks * (self->num_local + 1)), sizeof *self->scratch);
    self->row_at = PyMem_Calloc((size_t)self->num_experts, sizeof *self->row_at);
    int outcome = self->batches && self->scratch && self->row_at ? 0 : -1;
    for (Py_ssize_t m = 0; outcome == 0 && m < self->num_microbatches; m++) {
        outcome = make_batch(self, &self->batches[m]);
    }
    return outcome;
}

static int
Exchange_init(Exchange *self, PyObject *args, PyObject *kwargs)
{
    long long yield_ns, poll_ns;
    Py_ssize_t rank, num_ranks;
    if (self->group.peers != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "Exchange: already initialised");
        return -1;
    }
    if (kwargs != NULL && PyDict_GET_SIZE(kwargs) > 0) {
        PyErr_SetString(PyExc_TypeError, "Exchange: takes no keyword arguments");
        return -1;
    }
    if (!PyArg_ParseTuple(args, "(nnnnnnnpp)(nnnnnnnn)LL", &rank, &num_ranks, &self->max_tokens, &self->top_k,
                          &self->hidden, &self->num_local, &self->num_microbatches, &self->int8, &self->delivers_int8,
                          &self->block_bytes, &self->x_at, &self->x_scale_at, &self->starts_at, &self->pair_row_at,
                          &self->y_start_at, &self->y_scale_at, &self->y_at, &yield_ns, &poll_ns)) {
        return -1;
    }
    if (check_sizes(self, num_ranks) < 0) {
        return -1;
    }
    Py_ssize_t lanes = self->num_microbatches * LANES, shared = self->num_microbatches * self->block_bytes;
    if (group_init(&self->group, rank, num_ranks, lanes, shared, yield_ns, poll_ns) < 0) {
        return -1;
    }
    if (make_memory(self) < 0) {
        group_clear(&self->group); /* so that every method refuses */
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static void
unbind(batch_t *batch)
{
    if (batch->rows.obj != NULL) {
        PyBuffer_Release(&batch->rows);
    }
    if (batch->scales.obj != NULL) {
        PyBuffer_Release(&batch->scales);
    }
}

static void
drop_batch(batch_t *batch)
{
    unbind(batch);
    PyMem_Free(batch->topk);
    PyMem_Free(batch->position);
    PyMem_Free(batch->starts);
    PyMem_Free(batch->counts);
    PyMem_Free(batch->found);
    PyMem_Free(batch->state);
}

static void
Exchange_dealloc(Exchange *self)
{
    group_clear(&self->group);
    for (Py_ssize_t m = 0; self->batches != NULL && m < self->num_microbatches; m++) {
        drop_batch(&self->batches[m]);
    }
    PyMem_Free(self->batches);
    PyMem_Free(self->scratch);
    PyMem_Free(self->row_at);
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyObject *
Exchange_set_peer(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    return group_set_peer(&self->group, args, nargs);
}

static PyObject *
Exchange_drop_peer(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    return group_drop_peer(&self->group, args, nargs);
}

/* bind(microbatch, rows, scales): where dispatch puts what it receives; scales is None unless INT8 is delivered. */
static PyObject *
Exchange_bind(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch;
    if (group_enter(&self->group, "bind", nargs, 3, 0) < 0 ||
        parse_index(args[0], "microbatch", self->num_microbatches, &microbatch) < 0) {
        return NULL;
    }
    Py_ssize_t num_values = self->pairs_max * self->hidden;
    Py_buffer rows, scales = {0};
    if (open_buffer(args[1], "rows", self->delivers_int8 ? num_values : 4 * num_values, PyBUF_WRITABLE, &rows) == NULL) {
        return NULL;
    }
    if (self->delivers_int8 && open_buffer(args[2], "scales", 4 * self->pairs_max, PyBUF_WRITABLE, &scales) == NULL) {
        PyBuffer_Release(&rows);
        return NULL;
    }
    batch_t *batch = &self->batches[microbatch];
    unbind(batch);
    batch->rows = rows;
    batch->scales = scales;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- the rest */

/* The states of the ranks in the microbatch's last wait, one byte each. */
static PyObject *
Exchange_states(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch;
    if (group_enter(&self->group, "states", nargs, 1, 0) < 0 ||
        parse_index(args[0], "microbatch", self->num_microbatches, &microbatch) < 0) {
        return NULL;
    }
    return PyBytes_FromStringAndSize((const char *)self->batches[microbatch].state, self->group.num_ranks);
}

/* Copy the rows received per local expert to a buffer of num_local int32. */
static PyObject *
Exchange_expert_counts(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch;
    Py_buffer view;
    if (group_enter(&self->group, "expert_counts", nargs, 2, 0) < 0 ||
        parse_index(args[0], "microbatch", self->num_microbatches, &microbatch) < 0) {
        return NULL;
    }
    int32_t *counts = open_buffer(args[1], "counts", self->num_local * 4, PyBUF_WRITABLE, &view);
    if (counts == NULL) {
        return NULL;
    }
    memcpy(counts, self->batches[microbatch].counts, (size_t)self->num_local * 4);
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *
Exchange_event_id(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch;
    if (group_enter(&self->group, "event_id", nargs, 1, 0) < 0 ||
        parse_index(args[0], "microbatch", self->num_microbatches, &microbatch) < 0) {
        return NULL;
    }
    return PyLong_FromUnsignedLongLong(self->batches[microbatch].event_id);
}

static PyObject *
Exchange_culprit(Exchange *self, void *closure)
{
    return PyLong_FromSsize_t(self->culprit);
}

static PyObject *
Exchange_stats(Exchange *self, PyObject *unused)
{
    const group_t *group = &self->group;
    return Py_BuildValue("{sKsKsKsKsKsKsKsKsKsK}", "dispatches", (unsigned long long)self->dispatches, "combines",
                         (unsigned long long)self->combines, "rows_sent", (unsigned long long)self->rows_sent,
                         "rows_received", (unsigned long long)self->rows_received, "cell_writes",
                         (unsigned long long)group->writes, "waits", (unsigned long long)group->waits, "relax_wins",
                         (unsigned long long)group->relax_wins, "yield_wins", (unsigned long long)group->yield_wins,
                         "sleeps", (unsigned long long)group->sleeps, "moves", (unsigned long long)group->moves);
}

#define METHOD(name, doc) {#name, (PyCFunction)(void (*)(void))Exchange_##name, METH_FASTCALL, doc}

static PyMethodDef exchange_methods[] = {
    METHOD(set_peer, "set_peer(rank, buf, incarnation, cells_offset, managed_offset)."),
    METHOD(drop_peer, "drop_peer(rank)."),
    METHOD(bind, "bind(microbatch, rows, scales): where dispatch puts what it receives."),
    METHOD(dispatch, "dispatch(event, x, topk_idx, deadline_ns) -> rows received, or a status."),
    METHOD(stage, "stage(event, x, topk_idx) -> 0 or a status: the first step of dispatch."),
    METHOD(announce, "announce(microbatch): the second step: counts to every other rank."),
    METHOD(receive, "receive(microbatch, deadline_ns) -> rows received, or a status: the other steps; may be repeated."),
    METHOD(combine, "combine(microbatch, event_id, y, weights, out, deadline_ns) -> 0 or a status. y=None: go on."),
    METHOD(states, "states(microbatch) -> a byte for each rank: 0 arrived, 1 awaited, 2 moved on."),
    METHOD(expert_counts, "expert_counts(microbatch, out): rows received per local expert."),
    METHOD(event_id, "event_id(microbatch) -> that of its last dispatch."),
    {"stats", (PyCFunction)Exchange_stats, METH_NOARGS, "stats() -> counters by name."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef exchange_getset[] = {
    {"culprit", (getter)Exchange_culprit, NULL, "The rank that the last status is about.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot exchange_slots[] = {
    {Py_tp_doc, "Exchange((rank, ranks, tokens, top_k, hidden, local experts, microbatches, int8, delivers_int8), offsets, "
                "yield_ns, poll_ns)."},
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
