/* `swap`: a whole exchange of the plain all-to-all in one call from Python, in its common form.
 *
 * The common form: an event and a deadline as bus.xccl makes them, C-contiguous arrays of numbers, and room for the
 * result. What is not so, and every argument that is wrong, is answered with STATUS_UNCOMMON before anything is sent;
 * Python then goes the longer way, which has the errors. */
#include "_collectives_alltoall.h"

static PyObject *name_at_ns;

int
alltoall_init_names(void)
{
    return name_at_ns != NULL || (name_at_ns = PyUnicode_InternFromString("at_ns")) != NULL ? 0 : -1;
}

/* ---------------------------------------------------------------- arguments */

/* bus.xccl.event.Event.pack: step u32 << 32 | layer u12 << 20 | microbatch u4 << 16 | attempt u16. */
static int
read_event(PyObject *event, uint64_t *out)
{
    static const int bits[] = {12, 4, 16};
    if (!PyTuple_Check(event) || PyTuple_GET_SIZE(event) != 4 || !PyLong_Check(PyTuple_GET_ITEM(event, 0))) {
        return -1;
    }
    *out = PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(event, 0)) & UINT32_MAX;
    for (int i = 0; i < 3; i++) {
        PyObject *field = PyTuple_GET_ITEM(event, i + 1);
        long value = PyLong_Check(field) ? PyLong_AsLong(field) : -1;
        if (value < (i == 2) || value >= 1L << bits[i]) { /* attempts begin at 1 */
            return -1;
        }
        *out = *out << bits[i] | (uint64_t)value;
    }
    return 0;
}

static int
read_deadline(PyObject *deadline, int64_t *out)
{
    PyObject *value = PyObject_GetAttr(deadline, name_at_ns);
    if (value == NULL) {
        return -1;
    }
    long long at = PyLong_AsLongLong(value);
    Py_DECREF(value);
    if (at == -1 && PyErr_Occurred()) {
        return -1;
    }
    *out = at < 0 ? 0 : at > INT64_MAX / 2 ? INT64_MAX / 2 : at;
    return 0;
}

/* NumPy's letter of a bool, integer, float or complex number, perhaps with a byte order. */
static int
is_number(const char *format)
{
    format += *format != 0 && strchr("<>=!@^", *format) != NULL;
    format += *format == 'Z';
    return *format != 0 && strchr("?bBhHiIlLqQefdg", *format) != NULL && format[1] == 0;
}

/* The bytes of a row, 0 if the buffer is no array of rows of numbers. */
static Py_ssize_t
row_bytes_of(const Py_buffer *view)
{
    if (view->ndim < 1 || view->format == NULL || !is_number(view->format)) {
        return 0;
    }
    Py_ssize_t size = view->itemsize;
    for (int i = 1; i < view->ndim; i++) {
        size *= view->shape[i];
    }
    return size;
}

Py_ssize_t
alltoall_open_rows(PyObject *object, int flags, Py_buffer *view)
{
    return PyObject_GetBuffer(object, view, flags | PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) < 0 ? 0 : row_bytes_of(view);
}

int
alltoall_same_rows(const Py_buffer *one, const Py_buffer *other)
{
    if (one->ndim != other->ndim || one->itemsize != other->itemsize || strcmp(one->format, other->format) != 0) {
        return 0;
    }
    for (int i = 1; i < one->ndim; i++) {
        if (one->shape[i] != other->shape[i]) {
            return 0;
        }
    }
    return 1;
}

/* Export int64[num] and return its address, NULL if it is something else. */
static int64_t *
open_counts(PyObject *object, Py_ssize_t num, int flags, Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, flags | PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) < 0) {
        return NULL;
    }
    if (view->ndim == 1 && view->shape[0] == num && view->itemsize == 8 &&
        (strcmp(view->format, "l") == 0 || strcmp(view->format, "q") == 0)) {
        return view->buf;
    }
    PyBuffer_Release(view);
    return NULL;
}

/* ---------------------------------------------------------------- the exchange */

/* Cut the array, whose buffer is views[0], by `counts`; by equal parts without. -1: not the common form. */
static int
cut_rows(AllToAll *self, PyObject *counts)
{
    Py_ssize_t num_ranks = self->group.num_ranks;
    if (counts == Py_None) {
        for (Py_ssize_t r = 0; r < num_ranks; r++) {
            self->pieces[r] = (piece_t){(const char *)self->views[0].buf + r * self->row_bytes, self->row_bytes, 0};
        }
        return self->views[0].shape[0] == num_ranks ? 0 : -1;
    }
    Py_buffer view;
    const int64_t *num_rows = open_counts(counts, num_ranks, 0, &view);
    if (num_rows == NULL) {
        return -1;
    }
    int outcome = alltoall_cut(self, self->views[0].buf, self->views[0].len, num_rows);
    PyBuffer_Release(&view);
    return outcome;
}

/* Everything that can be wrong before something is sent. On 0 the array and `out` are exported. */
static int
begin(AllToAll *self, PyObject *array, PyObject *counts, PyObject *out, Py_buffer *target)
{
    alltoall_clear(self);
    if (PyObject_GetBuffer(array, &self->views[0], PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) < 0) {
        return -1;
    }
    self->num_views = 1;
    self->row_bytes = row_bytes_of(&self->views[0]);
    if (self->row_bytes == 0 ||
        PyObject_GetBuffer(out, target, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0) {
        return -1;
    }
    if (alltoall_same_rows(&self->views[0], target) && cut_rows(self, counts) == 0 && alltoall_place(self) == 0) {
        return 0;
    }
    PyBuffer_Release(target);
    return -1;
}

/* Only what takes long lets other threads run: a wait, a long copy. */
Py_ssize_t
alltoall_exchange(AllToAll *self, uint64_t event_id, Py_ssize_t num_bytes, const Py_buffer *target, int64_t deadline)
{
    Py_ssize_t status = STATUS_WAITING;
    int is_short = num_bytes < GIL_COPY_BYTES && target->len < GIL_COPY_BYTES;
    if (is_short) {
        alltoall_send(self, event_id);
        status = alltoall_go_on(self, target->buf, target->len, 0);
    }
    if (status == STATUS_WAITING) {
        self->group.busy = 1;
        Py_BEGIN_ALLOW_THREADS
        if (!is_short) {
            alltoall_send(self, event_id);
        }
        status = alltoall_go_on(self, target->buf, target->len, deadline);
        Py_END_ALLOW_THREADS
        self->group.busy = 0;
    }
    return status;
}

/* Store how many rows came from each rank. -1: `came` is no int64[num_ranks]. */
static int
store_counts(const AllToAll *self, PyObject *came)
{
    Py_buffer view;
    int64_t *counts = open_counts(came, self->group.num_ranks, PyBUF_WRITABLE, &view);
    if (counts == NULL) {
        return -1;
    }
    for (Py_ssize_t r = 0; r < self->group.num_ranks; r++) {
        counts[r] = (int64_t)self->found[2 * r + 1] / self->row_bytes;
    }
    PyBuffer_Release(&view);
    return 0;
}

int
alltoall_is_equal(const AllToAll *self)
{
    for (Py_ssize_t r = 0; r < self->group.num_ranks; r++) {
        if (self->found[2 * r + 1] != (uint64_t)self->row_bytes) {
            return 0;
        }
    }
    return 1;
}

static PyObject *
uncommon(AllToAll *self)
{
    alltoall_clear(self);
    PyErr_Clear();
    return PyLong_FromLong(STATUS_UNCOMMON);
}

PyObject *
alltoall_swap(AllToAll *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t event_id;
    int64_t deadline;
    Py_buffer target;
    if (group_enter(&self->group, "swap", nargs, 6, 1) < 0) {
        return NULL;
    }
    if (read_event(args[0], &event_id) < 0 || read_deadline(args[5], &deadline) < 0 ||
        begin(self, args[1], args[2], args[3], &target) < 0) {
        return uncommon(self);
    }
    Py_ssize_t rows = target.shape[0];
    Py_ssize_t status = alltoall_exchange(self, event_id, self->views[0].len, &target, deadline);
    PyBuffer_Release(&target);
    alltoall_end(self, status);
    int is_whole = status >= 0 && (args[2] == Py_None ? alltoall_is_equal(self) : store_counts(self, args[4]) == 0);
    if (!is_whole) {
        PyErr_Clear();
        return PyLong_FromSsize_t(status);
    }
    if (status == rows * self->row_bytes) {
        return Py_NewRef(args[3]);
    }
    return PySequence_GetSlice(args[3], 0, status / self->row_bytes);
}
