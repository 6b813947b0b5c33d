/* `Exchange`: a whole dispatch, and a whole combine, in one call from Python each.
 *
 * The layout of every byte is given by bus/xccl/dispatch_layout.py. A call ends early with a status (STATUS_*): when an
 * argument is refused, when the poll interval is over, and when a peer moved on or wrote nonsense. Python then looks
 * at the arguments or at the peers, and raises or goes on with `resume_*`.
 *
 * Release stores and the acquire loads that pair with them carry the same "SYNC: <label>", as in _native.c.
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
    self->poll_ns = poll_ns;
    if (check_sizes(self, num_ranks) < 0) {
        return -1;
    }
    Py_ssize_t lanes = self->num_microbatches * LANES, shared = self->num_microbatches * self->block_bytes;
    if (group_init(&self->group, rank, num_ranks, lanes, shared, yield_ns) < 0) {
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

static int64_t
earlier(int64_t a, int64_t b)
{
    return a < b ? a : b;
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
    int64_t until = earlier(deadline, now_ns() + self->poll_ns);
    status = status_of(self, group_await(&self->group, microbatch * LANES, COUNT_LANES, batch->event_id,
                                         batch->state, batch->found, until));
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

static PyObject *
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

static PyObject *
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

static PyObject *
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

static PyObject *
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
    int64_t until = earlier(deadline, now_ns() + self->poll_ns);
    Py_ssize_t status = status_of(self, group_await_answers(&self->group, microbatch * LANES, batch->event_id,
                                                            batch->state, batch->found, until));
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
static PyObject *
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
