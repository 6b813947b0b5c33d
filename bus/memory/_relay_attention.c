/* The attention rank's end of A2E/E2A: one call stages rows and tells the experts, one waits and takes the results.
 *
 * One exchange per microbatch may be open: it owns the source block. An answer counts only if it repeats the stamp of the
 * cell that is being answered, so answers to an earlier attempt or life are never taken. */
#include "_relay_attention.h"

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
    waiter_init(&self->waiter, spin_ns);
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

static PyObject *
AttentionEnd_set_peer(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t expert;
    if (enter_attention(self, "set_peer", nargs, 5) < 0 ||
        parse_index(args[0], "expert", self->g.num_experts, &expert) < 0 ||
        open_peer(args + 1, expert_cells(&self->g), expert_bytes(&self->g), &self->experts[expert]) < 0) {
        return NULL;
    }
    self->waiter.must_look = 1; /* nobody has looked at its owner lock since it is watched */
    crowd_t crowd = crowd_of(self);
    say_place(&crowd, &self->g, &self->experts[expert], self->waiter.place);
    Py_RETURN_NONE;
}

static PyObject *
AttentionEnd_drop_peer(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t expert;
    if (enter_attention(self, "drop_peer", nargs, 1) < 0 ||
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
        return enter_attention(self, "close", nargs, 0) < 0 ? NULL : Py_NewRef(Py_None);
    }
    for (Py_ssize_t i = 0; self->experts != NULL && i < self->g.num_experts; i++) {
        drop_peer(&self->experts[i]);
    }
    drop_peer(&self->own);
    Py_RETURN_NONE;
}

static PyObject *
AttentionEnd_counters(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    return Py_BuildValue("{sKsKsKsKsKsKsK}", "a2e_cell_writes", (unsigned long long)self->writes, "direct_exchanges",
                         (unsigned long long)self->by_route[0], "trampoline_exchanges",
                         (unsigned long long)self->by_route[1], "bytes_sent",
                         (unsigned long long)self->bytes_staged, "dropped", (unsigned long long)self->dropped,
                         "sleeps", (unsigned long long)self->waiter.sleeps, "moves",
                         (unsigned long long)self->waiter.moves);
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
    {Py_tp_doc, "AttentionEnd(geometry, (buf, incarnation, cells_offset, managed_offset), spin_ns)."},
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
