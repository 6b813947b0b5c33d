/* Dispatch and combine, step by step; the object that they work on is made in _collectives_exchange.c.
 *
 * A call ends early with a status (STATUS_*): when an argument is refused, when the poll interval is over, and when a
 * peer moved on or wrote nonsense. Python then looks at the arguments or at the peers, and raises or goes on: `receive`
 * and `combine` without y continue where the call before ended.
 */
#include "_collectives_exchange.h"

/* ---------------------------------------------------------------- arguments */

/* Export a C-contiguous matrix of `format` ('f', 'i' or 'b') with `width` columns; 0, or -1 without an exception. */
static int
open_rows(PyObject *object, char format, Py_ssize_t width, int flags, Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, flags | PyBUF_ND | PyBUF_FORMAT) < 0) {
        PyErr_Clear();
        return -1;
    }
    Py_ssize_t itemsize = format == 'b' ? 1 : 4;
    if (view->ndim == 2 && view->shape[1] == width && view->itemsize == itemsize &&
        ((uintptr_t)view->buf & (uintptr_t)(itemsize - 1)) == 0 && view->format != NULL &&
        view->format[0] == format && view->format[1] == '\0') {
        return 0;
    }
    PyBuffer_Release(view);
    return -1;
}

/* Pack an `Event` (bus/xccl/event.py); 0, or -1 when a field is out of range, without an exception. */
static int
pack_event(const Exchange *self, PyObject *event, uint64_t *event_id, Py_ssize_t *microbatch)
{
    static const long limits[] = {0, 1 << 12, 1 << 4, 1 << 16};
    long fields[4] = {0};
    if (!PyTuple_Check(event) || PyTuple_GET_SIZE(event) != 4) {
        return -1;
    }
    unsigned long step = PyLong_AsUnsignedLongMask(PyTuple_GET_ITEM(event, 0));
    for (int i = 1; i < 4; i++) {
        fields[i] = PyLong_AsLong(PyTuple_GET_ITEM(event, i));
        if (fields[i] < 0 || fields[i] >= limits[i]) {
            break;
        }
    }
    if (PyErr_Occurred()) {
        PyErr_Clear();
        return -1;
    }
    for (int i = 1; i < 4; i++) {
        if (fields[i] < 0 || fields[i] >= limits[i]) {
            return -1;
        }
    }
    *microbatch = fields[2];
    *event_id = (uint64_t)(step & UINT32_MAX) << 32 | (uint64_t)fields[1] << 20 | (uint64_t)fields[2] << 16 |
                (uint64_t)fields[3];
    return fields[3] == 0 || fields[2] >= self->num_microbatches ? -1 : 0;
}

/* ---------------------------------------------------------------- dispatch */

/* Take the announcement of an exchange back that has not ended, before what it points to is staged anew: whoever has not
 * pulled must not take the next exchange's rows for it, and whoever waits for an answer learns that none will come. */
static void
withdraw(Exchange *self, Py_ssize_t microbatch)
{
    batch_t *batch = &self->batches[microbatch];
    group_t *group = &self->group;
    if (batch->phase >= PHASE_COUNTED) {
        Py_ssize_t lane = microbatch * LANES + (Py_ssize_t)((batch->num_sent - 1) & 1);
        for (Py_ssize_t i = 1; i < group->num_ranks; i++) { /* SYNC: piece-torn (w0 = 0 comes before the next row) */
            group_tell(group, group_other(group, i), lane, batch->event_id, WITHDRAWN, 0);
        }
        group_ring(group);
    }
    batch->phase = PHASE_NONE;
}

/* Route and stage x; 0 or STATUS_REFUSED. */
static Py_ssize_t
stage(Exchange *self, PyObject *event, PyObject *x, PyObject *topk_idx, Py_ssize_t *microbatch)
{
    uint64_t event_id;
    Py_buffer rows, topk;
    if (pack_event(self, event, &event_id, microbatch) < 0 || open_rows(x, 'f', self->hidden, 0, &rows) < 0) {
        return STATUS_REFUSED;
    }
    if (open_rows(topk_idx, 'i', self->top_k, 0, &topk) < 0) {
        PyBuffer_Release(&rows);
        return STATUS_REFUSED;
    }
    batch_t *batch = &self->batches[*microbatch];
    Py_ssize_t num_tokens = rows.shape[0], status = STATUS_REFUSED;
    if (num_tokens <= self->max_tokens && topk.shape[0] == num_tokens && batch->rows.obj != NULL) {
        batch->num_tokens = num_tokens;
        memcpy(batch->topk, topk.buf, (size_t)topk.len);
        self->group.busy = 1;
        Py_BEGIN_ALLOW_THREADS
        withdraw(self, *microbatch);
        FAULT("entered");
        status = exchange_stage(self, *microbatch, rows.buf) < 0 ? STATUS_REFUSED : 0;
        FAULT("staged");
        Py_END_ALLOW_THREADS
        self->group.busy = 0;
    }
    if (status == 0) {
        batch->event_id = event_id;
        batch->phase = PHASE_STAGED;
    }
    PyBuffer_Release(&topk);
    PyBuffer_Release(&rows);
    return status;
}

/* Tell every other rank how much there is for it, zero too: they wait for all. */
static void
announce(Exchange *self, Py_ssize_t microbatch)
{
    batch_t *batch = &self->batches[microbatch];
    group_t *group = &self->group;
    Py_ssize_t lane = microbatch * LANES + (Py_ssize_t)(batch->num_sent++ & 1);
    for (Py_ssize_t i = 1; i <= group->num_ranks; i++) {
        Py_ssize_t r = group_other(group, i);
        uint64_t first = (uint64_t)batch->starts[r * self->num_local];
        uint64_t extent = first << 32 | ((uint64_t)batch->starts[(r + 1) * self->num_local] - first);
        batch->state[r] = r == group->rank ? ARRIVED : AWAITED;
        if (r == group->rank) {
            batch->found[2 * r] = extent;
            batch->found[2 * r + 1] = (uint64_t)batch->num_tokens;
        }
        else {
            group_tell(group, r, lane, batch->event_id, extent, (uint64_t)batch->num_tokens);
        }
    }
    group_ring(group);
    batch->phase = PHASE_COUNTED;
}

/* Turn what `group_await` says into a status; 0 = all are there. */
static Py_ssize_t
status_of(Exchange *self, Py_ssize_t awaited)
{
    if (awaited < 0) {
        self->culprit = -1 - awaited;
        return STATUS_MOVED_ON;
    }
    return awaited > 0 ? STATUS_WAITING : 0;
}

/* Whether a source whose rows were pulled has withdrawn them meanwhile; -1, or its rank. */
static Py_ssize_t
find_withdrawn(const Exchange *self, Py_ssize_t microbatch)
{
    const batch_t *batch = &self->batches[microbatch];
    __atomic_thread_fence(__ATOMIC_ACQUIRE); /* SYNC: piece-torn */
    for (Py_ssize_t r = 0; r < self->group.num_ranks; r++) {
        const uint64_t *found = &batch->found[2 * r];
        if (r != self->group.rank && (found[0] & UINT32_MAX) > 0 &&
            !group_still_says(&self->group, r, microbatch * LANES, batch->event_id, found)) {
            return r;
        }
    }
    return -1;
}

/* Wait for the counts and pull; the number of rows, or a status. */
static Py_ssize_t
receive(Exchange *self, Py_ssize_t microbatch, int64_t deadline)
{
    batch_t *batch = &self->batches[microbatch];
    Py_ssize_t status;
    self->group.busy = 1;
    Py_BEGIN_ALLOW_THREADS
    status = status_of(self, group_await(&self->group, microbatch * LANES, COUNT_LANES, batch->event_id,
                                         batch->state, batch->found, deadline));
    if (status == 0) {
        FAULT("counted");
        status = exchange_pull(self, microbatch);
        FAULT("pulled");
        Py_ssize_t withdrawn = find_withdrawn(self, microbatch); /* then its words mean nothing */
        if (withdrawn >= 0) {
            batch->state[withdrawn] = MOVED_ON;
            self->culprit = withdrawn;
            status = STATUS_MOVED_ON;
        }
        else if (status < 0) {
            self->culprit = -1 - status;
            status = STATUS_CORRUPT;
        }
    }
    Py_END_ALLOW_THREADS
    self->group.busy = 0;
    if (status >= 0) {
        batch->phase = PHASE_PULLED;
        self->dispatches++;
        self->rows_sent += (uint64_t)batch->starts[self->num_experts];
        self->rows_received += (uint64_t)status;
    }
    return status;
}

static int
parse_time(PyObject *object, int64_t *out)
{
    uint64_t value;
    if (parse_unsigned(object, "deadline", UINT64_MAX, &value) < 0) {
        return -1;
    }
    *out = value > INT64_MAX / 2 ? INT64_MAX / 2 : (int64_t)value;
    return 0;
}

PyObject *
Exchange_stage(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch;
    if (group_enter(&self->group, "stage", nargs, 3, 1) < 0) {
        return NULL;
    }
    return PyLong_FromSsize_t(stage(self, args[0], args[1], args[2], &microbatch));
}

/* The microbatch args[0], whose exchange must have come to `phase`. */
static int
parse_batch(const Exchange *self, const char *name, PyObject *object, int phase, Py_ssize_t *microbatch)
{
    if (parse_index(object, "microbatch", self->num_microbatches, microbatch) < 0) {
        return -1;
    }
    if (self->batches[*microbatch].phase != phase) {
        PyErr_Format(PyExc_ValueError, "%s: the exchange of microbatch %zd is in phase %d, not %d", name, *microbatch,
                     self->batches[*microbatch].phase, phase);
        return -1;
    }
    return 0;
}

PyObject *
Exchange_announce(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch;
    if (group_enter(&self->group, "announce", nargs, 1, 1) < 0 ||
        parse_batch(self, "announce", args[0], PHASE_STAGED, &microbatch) < 0) {
        return NULL;
    }
    announce(self, microbatch);
    Py_RETURN_NONE;
}

PyObject *
Exchange_receive(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch;
    int64_t deadline;
    if (group_enter(&self->group, "receive", nargs, 2, 1) < 0 ||
        parse_batch(self, "receive", args[0], PHASE_COUNTED, &microbatch) < 0 || parse_time(args[1], &deadline) < 0) {
        return NULL;
    }
    return PyLong_FromSsize_t(receive(self, microbatch, deadline));
}

PyObject *
Exchange_dispatch(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch;
    int64_t deadline;
    if (group_enter(&self->group, "dispatch", nargs, 4, 1) < 0 || parse_time(args[3], &deadline) < 0) {
        return NULL;
    }
    Py_ssize_t status = stage(self, args[0], args[1], args[2], &microbatch);
    if (status == 0) {
        announce(self, microbatch);
        status = receive(self, microbatch, deadline);
    }
    return PyLong_FromSsize_t(status);
}

/* ---------------------------------------------------------------- combine */

/* Publish y and tell every rank that has rows in it. Marks in `state` who must answer in turn. */
static void
answer(Exchange *self, Py_ssize_t microbatch, const float *y)
{
    batch_t *batch = &self->batches[microbatch];
    group_t *group = &self->group;
    char *block = block_of(self, group->rank, microbatch);
    if (!self->delivers_int8) { /* else the caller has filled rows and scales in place */
        exchange_put_rows(self, block + self->y_at, (float *)(block + self->y_scale_at), y, batch->num_pairs);
    }
    FAULT("answering");
    for (Py_ssize_t i = 1; i < group->num_ranks; i++) {
        Py_ssize_t r = group_other(group, i);
        uint64_t count = batch->found[2 * r] & UINT32_MAX;
        if (count > 0) {
            group_tell(group, r, microbatch * LANES + LANE_COMBINE, batch->event_id, count, 0);
        }
    }
    group_ring(group);
    for (Py_ssize_t r = 0; r < group->num_ranks; r++) {
        int owes = batch->starts[(r + 1) * self->num_local] > batch->starts[r * self->num_local];
        batch->state[r] = r != group->rank && owes ? AWAITED : ARRIVED;
    }
    batch->phase = PHASE_ANSWERED;
}

/* Wait for the answers and add; 0 or a status. */
static Py_ssize_t
reduce(Exchange *self, Py_ssize_t microbatch, const float *weights, float *out, int64_t deadline)
{
    batch_t *batch = &self->batches[microbatch];
    Py_ssize_t status = status_of(self, group_await_answers(&self->group, microbatch * LANES, batch->event_id,
                                                            batch->state, batch->found, deadline));
    if (status == 0) {
        FAULT("answered");
        self->culprit = exchange_reduce(self, microbatch, weights, out);
        status = self->culprit >= 0 ? STATUS_CORRUPT : 0;
    }
    return status;
}

/* Export y: float32 rows from anywhere, or, where INT8 is delivered, the block's own rows. 0, or -1 without an exception. */
static int
open_answer(const Exchange *self, Py_ssize_t microbatch, PyObject *object, Py_buffer *y)
{
    if (open_rows(object, self->delivers_int8 ? 'b' : 'f', self->hidden, 0, y) < 0) {
        return -1;
    }
    /* An empty array may have any address. */
    if (self->delivers_int8 && y->shape[0] > 0 && y->buf != block_of(self, self->group.rank, microbatch) + self->y_at) {
        PyBuffer_Release(y);
        return -1;
    }
    return 0;
}

/* combine(microbatch, event_id, y, weights, out, deadline); y is None to resume. */
PyObject *
Exchange_combine(Exchange *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch, status = STATUS_REFUSED;
    uint64_t event_id;
    int64_t deadline;
    if (group_enter(&self->group, "combine", nargs, 6, 1) < 0 ||
        parse_index(args[0], "microbatch", self->num_microbatches, &microbatch) < 0 ||
        parse_unsigned(args[1], "event_id", UINT64_MAX, &event_id) < 0 || parse_time(args[5], &deadline) < 0) {
        return NULL;
    }
    batch_t *batch = &self->batches[microbatch];
    int resumes = args[2] == Py_None;
    Py_buffer y = {0}, weights, out;
    if (batch->event_id != event_id || batch->phase != (resumes ? PHASE_ANSWERED : PHASE_PULLED) ||
        (!resumes && open_answer(self, microbatch, args[2], &y) < 0)) {
        return PyLong_FromSsize_t(STATUS_REFUSED);
    }
    if ((resumes || y.shape[0] == batch->num_pairs) && open_rows(args[3], 'f', self->top_k, 0, &weights) == 0) {
        if (weights.shape[0] == batch->num_tokens &&
            open_rows(args[4], 'f', self->hidden, PyBUF_WRITABLE, &out) == 0) {
            if (out.shape[0] == batch->num_tokens) {
                self->group.busy = 1;
                Py_BEGIN_ALLOW_THREADS
                if (!resumes) {
                    answer(self, microbatch, y.buf);
                }
                status = reduce(self, microbatch, weights.buf, out.buf, deadline);
                Py_END_ALLOW_THREADS
                self->group.busy = 0;
            }
            PyBuffer_Release(&out);
        }
        PyBuffer_Release(&weights);
    }
    if (y.obj != NULL) {
        PyBuffer_Release(&y);
    }
    if (status == 0) {
        batch->phase = PHASE_NONE;
        self->combines++;
    }
    return PyLong_FromSsize_t(status);
}
