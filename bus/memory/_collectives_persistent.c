/* `PersistentSwap`: the plain all-to-all of the same two arrays, again and again.
 *
 * What every call of `swap` finds out anew stays known here: the arrays are exported once and held, so that they can
 * neither move nor shrink. An exchange is then two integers from Python. */
#include "_collectives_alltoall.h"

typedef struct {
    PyObject_HEAD
    AllToAll *side;
    Py_buffer array, out;
    Py_ssize_t row_bytes;
} PersistentSwap;

static PyTypeObject *persistent_type;

static void
PersistentSwap_dealloc(PersistentSwap *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyBuffer_Release(&self->array); /* does nothing where nothing is exported */
    PyBuffer_Release(&self->out);
    Py_XDECREF(self->side);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

/* persistent(array, out): arrays as `swap` takes them without counts; None if they are not of the common form. */
PyObject *
alltoall_persistent(AllToAll *side, PyObject *const *args, Py_ssize_t nargs)
{
    if (group_enter(&side->group, "persistent", nargs, 2, 0) < 0) {
        return NULL;
    }
    PersistentSwap *self = (PersistentSwap *)persistent_type->tp_alloc(persistent_type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->side = (AllToAll *)Py_NewRef((PyObject *)side);
    self->row_bytes = alltoall_open_rows(args[0], 0, &self->array);
    Py_ssize_t row_bytes = self->row_bytes > 0 ? alltoall_open_rows(args[1], PyBUF_WRITABLE, &self->out) : 0;
    if (row_bytes > 0 && alltoall_same_rows(&self->array, &self->out) &&
        self->array.shape[0] == side->group.num_ranks && self->out.shape[0] >= side->group.num_ranks) {
        return (PyObject *)self;
    }
    PyErr_Clear();
    Py_DECREF(self);
    Py_RETURN_NONE;
}

/* exchange(event_id, deadline_ns) -> None, or a status as of `AllToAll.exchange`. */
static PyObject *
PersistentSwap_exchange(PersistentSwap *self, PyObject *const *args, Py_ssize_t nargs)
{
    AllToAll *side = self->side;
    uint64_t event_id, deadline;
    if (group_enter(&side->group, "exchange", nargs, 2, 1) < 0 ||
        parse_unsigned(args[0], "event_id", UINT64_MAX, &event_id) < 0 ||
        parse_unsigned(args[1], "deadline", UINT64_MAX, &deadline) < 0) {
        return NULL;
    }
    alltoall_clear(side);
    side->row_bytes = self->row_bytes;
    for (Py_ssize_t r = 0; r < side->group.num_ranks; r++) {
        side->pieces[r] = (piece_t){(const char *)self->array.buf + r * self->row_bytes, self->row_bytes, 0};
    }
    if (alltoall_place(side) < 0) {
        return PyLong_FromLong(STATUS_NO_ROOM);
    }
    int64_t until = deadline > INT64_MAX / 2 ? INT64_MAX / 2 : (int64_t)deadline;
    Py_ssize_t status = alltoall_exchange(side, event_id, self->array.len, &self->out, until);
    alltoall_end(side, status);
    if (status >= 0 && alltoall_is_equal(side)) {
        Py_RETURN_NONE;
    }
    return PyLong_FromSsize_t(status);
}

static PyMethodDef persistent_methods[] = {
    {"exchange", (PyCFunction)(void (*)(void))PersistentSwap_exchange, METH_FASTCALL,
     "exchange(event_id, deadline_ns) -> None, or a status."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot persistent_slots[] = {
    {Py_tp_doc, "Made by AllToAll.persistent(array, out)."},
    {Py_tp_dealloc, PersistentSwap_dealloc},
    {Py_tp_methods, persistent_methods},
    {0, NULL},
};

static PyType_Spec persistent_spec = {
    .name = "bus.memory._collectives.PersistentSwap",
    .basicsize = sizeof(PersistentSwap),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = persistent_slots,
};

int
alltoall_init_persistent(void)
{
    return persistent_type != NULL ||
                   (persistent_type = (PyTypeObject *)PyType_FromSpec(&persistent_spec)) != NULL
               ? 0
               : -1;
}
