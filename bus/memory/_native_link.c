/* Ends of links: opening, cells, errors, and what both directions need. See _native_link.h. */
#include "_native_link.h"

#include <stdarg.h>

PyObject *name_poll, *name_renew, *name_error, *name_refuse, *name_allocate, *name_plan;
static PyObject *name_dtype, *name_str, *name_at_ns;

int
link_init_names(void)
{
    const struct {
        PyObject **where;
        const char *text;
    } names[] = {
        {&name_poll, "_poll"},         {&name_renew, "_renew"}, {&name_error, "_error"}, {&name_refuse, "_refuse"},
        {&name_allocate, "_allocate"}, {&name_dtype, "dtype"},  {&name_str, "str"},      {&name_at_ns, "at_ns"},
        {&name_plan, "_plan"},
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (*names[i].where == NULL && (*names[i].where = PyUnicode_InternFromString(names[i].text)) == NULL) {
            return -1;
        }
    }
    return 0;
}

/* ---------------------------------------------------------------- life cycle */

void
link_reset(Transfer *op)
{
    if (op->has_view) {
        op->has_view = 0;
        PyBuffer_Release(&op->view);
    }
    op->is_active = op->is_begun = 0;
    Py_CLEAR(op->array);
}

void
link_close(LinkEnd *end)
{
    link_reset(&end->op);
    share_end_limbo(end, 0);
    in_place_forget(end);
    if (end->is_open) {
        end->is_open = 0;
        PyBuffer_Release(&end->own);
        PyBuffer_Release(&end->peer);
    }
}

void
link_dealloc(PyObject *self)
{
    LinkEnd *end = (LinkEnd *)self;
    PyTypeObject *type = Py_TYPE(self);
    link_close(end);
    in_place_clear(end);
    Py_CLEAR(end->dtype);
    type->tp_free(self);
    Py_DECREF(type);
}

static int
check_range(const char *name, unsigned long long offset, unsigned long long size, Py_ssize_t length, unsigned align)
{
    if (offset > (unsigned long long)length || size > (unsigned long long)length - offset || offset % align != 0) {
        PyErr_Format(PyExc_ValueError, "%s: %llu + %llu is outside %zd bytes or not aligned to %u", name, offset, size,
                     length, align);
        return -1;
    }
    return 0;
}

/* Continue where this incarnation's own last write to the other side left off; at 0 on a fresh link. */
static void
resume(LinkEnd *end, int is_sender)
{
    uint64_t words[CELL_WORDS];
    end->position = end->other = end->last_end = end->last_event = 0;
    end->num_drops = end->num_drops_seen = end->num_writes = end->num_unpublished = 0;
    end->in_word = end->in_w1 = end->in_w2 = 0;
    if (load_cell(end->out_cell, words) && (words[0] & ~COUNTER_MASK) == end->out_stamp) {
        end->num_writes = words[0] & COUNTER_MASK;
        end->position = words[3];
        if (!is_sender) {
            end->last_event = words[1];
            end->last_end = words[2] & END_MASK;
            end->num_drops = words[2] >> END_BITS;
        }
    }
    end->other = is_sender ? 0 : end->position;
    end->slot = end->slots + end->position % end->num_slots * end->stride;
}

int
link_open(LinkEnd *end, PyObject *args, PyObject *kwargs, int is_sender)
{
    static char *names[] = {"own",       "peer",          "ring_offset", "num_slots",   "slot_bytes",
                            "out_cell",  "in_cell",       "own_bell",    "peer_bell",   "incarnation",
                            "peer_incarnation", "own_app", "peer_app",   "pull_bytes_min", "message_bytes_max", "read_bytes_min",
                            "shared_bytes_min",
                            "poll_ns",   "pause_rounds",  "yield_ns",    "may_sleep",   "copy_lanes",
                            "own_place", "peer_place",    "is_first",    NULL};
    PyObject *own, *peer;
    unsigned long long ring, num_slots, slot_bytes, out_cell, in_cell, own_bell, peer_bell, mine, theirs;
    unsigned long long own_low, own_high, peer_low, peer_high, pull_min, message_max, read_min, shared_min;
    long long poll_ns, yield_ns;
    unsigned long long own_place, peer_place;
    int pause_rounds, may_sleep, num_lanes, is_first;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO$KKKKKKKKK(KK)(KK)KKKKLiLpiKKp", names, &own, &peer, &ring, &num_slots,
                                     &slot_bytes, &out_cell, &in_cell, &own_bell, &peer_bell, &mine, &theirs, &own_low,
                                     &own_high, &peer_low, &peer_high, &pull_min, &message_max, &read_min, &shared_min, &poll_ns, &pause_rounds,
                                     &yield_ns, &may_sleep, &num_lanes, &own_place, &peer_place, &is_first)) {
        return -1;
    }
    if (end->is_busy) {
        PyErr_SetString(PyExc_RuntimeError, "link: it is in use");
        return -1;
    }
    if (num_slots < 1 || num_slots > NUM_SLOTS_MAX || slot_bytes < SLOT_BYTES_MIN || slot_bytes > SLOT_BYTES_MAX ||
        poll_ns < 1 || yield_ns < 0 || pause_rounds < 0 || message_max > PY_SSIZE_T_MAX || num_lanes < 1 ||
        num_lanes > NUM_LANES_MAX) {
        PyErr_Format(PyExc_ValueError, "link: %llu slots of %llu bytes, poll %lld, yield %lld, pause %d, %d lanes",
                     num_slots, slot_bytes, poll_ns, yield_ns, pause_rounds, num_lanes);
        return -1;
    }
    Py_buffer own_view, peer_view;
    if (PyObject_GetBuffer(own, &own_view, PyBUF_WRITABLE) < 0) {
        return -1;
    }
    if (PyObject_GetBuffer(peer, &peer_view, PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&own_view);
        return -1;
    }
    Py_buffer *ring_view = is_sender ? &peer_view : &own_view;
    uint64_t stride = RECORD_BYTES + (slot_bytes + 63) / 64 * 64;
    if (check_range("ring", ring, SLOTS_OFFSET + num_slots * stride, ring_view->len, 8) < 0 ||
        check_range("out_cell", out_cell, 2 * CELL_BYTES, peer_view.len, CELL_BYTES) < 0 ||
        check_range("in_cell", in_cell, 2 * CELL_BYTES, own_view.len, CELL_BYTES) < 0 ||
        check_range("own_bell", own_bell, BELL_BYTES, own_view.len, 8) < 0 ||
        check_range("peer_bell", peer_bell, 8, peer_view.len, 8) < 0 ||
        check_range("own_place", own_place, 4, own_view.len, 4) < 0 ||
        check_range("peer_place", peer_place, 4, peer_view.len, 4) < 0 || own_low > own_high || peer_low > peer_high ||
        check_range("own_app", own_low, own_high - own_low, own_view.len, 1) < 0 ||
        check_range("peer_app", peer_low, peer_high - peer_low, peer_view.len, 1) < 0) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_ValueError, "link: an app area ends before it begins");
        }
        PyBuffer_Release(&peer_view);
        PyBuffer_Release(&own_view);
        return -1;
    }
    share_end_limbo(end, 1); /* the incarnation before has ended */
    link_close(end);
    end->own = own_view;
    end->peer = peer_view;
    end->ring_offset = ring;
    end->slots = (char *)ring_view->buf + ring + SLOTS_OFFSET;
    end->num_slots = num_slots;
    end->slot_bytes = slot_bytes;
    end->stride = stride;
    end->out_cell = (uint64_t *)((char *)peer_view.buf + out_cell);
    end->in_cell = (const uint64_t *)((char *)own_view.buf + in_cell);
    end->own_bell = (uint32_t *)((char *)own_view.buf + own_bell);
    end->peer_bell = (uint32_t *)((char *)peer_view.buf + peer_bell);
    end->out_stamp = (uint64_t)mine << COUNTER_BITS;
    end->in_stamp = (uint64_t)theirs << COUNTER_BITS;
    end->own_low = own_low;
    end->own_high = own_high;
    end->peer_low = peer_low;
    end->peer_high = peer_high;
    end->pull_bytes_min = pull_min;
    end->read_bytes_min = read_min;
    end->shared_bytes_min = shared_min;
    end->message_bytes_max = message_max;
    end->poll_ns = poll_ns;
    end->alarms_seen = num_alarms(end->own_bell) - 1; /* the peer's lock has not been looked at yet */
    end->pause_rounds = pause_rounds;
    end->yield_ns = yield_ns;
    end->may_sleep = may_sleep;
    end->num_lanes = num_lanes;
    link_forget_habits(end);
    place_open(end, (char *)own_view.buf + own_place, (char *)peer_view.buf + peer_place, is_first);
    end->watch = NULL;
    end->watches_only = 0;
    end->deadline = 0;
    end->is_open = 1;
    resume(end, is_sender);
    end->offer_word = 0;
    end->peer_pid = 0;
    if (is_sender) {
        link_offer(end);
    }
    return 0;
}

/* ---------------------------------------------------------------- hooks */

PyObject *
link_call(LinkEnd *end, PyObject *name, PyObject *argument, PyObject *second)
{
    if (argument == NULL) {
        return NULL;
    }
    return PyObject_CallMethodObjArgs((PyObject *)end, name, argument, second, NULL);
}

/* Raise what `_error(kind, text, event_id)` returns. Always -1. */
int
link_error(LinkEnd *end, int kind, uint64_t event_id, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    PyObject *text = PyUnicode_FromFormatV(format, arguments);
    va_end(arguments);
    if (text == NULL) {
        return -1;
    }
    PyObject *number = PyLong_FromLong(kind), *event = PyLong_FromUnsignedLongLong(event_id), *error = NULL;
    if (number != NULL && event != NULL) {
        error = PyObject_CallMethodObjArgs((PyObject *)end, name_error, number, text, event, NULL);
    }
    Py_XDECREF(number);
    Py_XDECREF(event);
    Py_DECREF(text);
    if (error != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    return -1;
}

#define RENEW_TRIES 8 /* a newer incarnation may become known while the link is being opened */

/* Begin a call: one thread at a time, on the newest incarnation. On 0 the caller must clear `is_busy`. */
int
link_enter(LinkEnd *end, uint64_t event_id, PyObject *deadline)
{
    if (end->is_busy) {
        PyErr_SetString(PyExc_RuntimeError, "link: another thread uses it");
        return -1;
    }
    for (int tries = 0; (end->is_retired || !end->is_open) && tries < RENEW_TRIES; tries++) {
        PyObject *event = PyLong_FromUnsignedLongLong(event_id);
        PyObject *done = link_call(end, name_renew, event, deadline);
        Py_XDECREF(event);
        if (done == NULL) {
            return -1;
        }
        Py_DECREF(done);
    }
    if (end->is_busy || !end->is_open) {
        PyErr_SetString(PyExc_RuntimeError, "link: it was not opened");
        return -1;
    }
    end->is_busy = 1;
    return 0;
}

static int
parse_deadline(PyObject *object, int64_t *out)
{
    PyObject *value = PyObject_GetAttr(object, name_at_ns);
    if (value == NULL) {
        return -1;
    }
    long long at = PyLong_AsLongLong(value);
    Py_DECREF(value);
    if (at == -1 && PyErr_Occurred()) {
        return -1;
    }
    *out = at < 0 ? 0 : at;
    return 0;
}

/* Check the number of arguments and read the event id and the deadline, which stand at `at` and after it. */
int
link_arguments(const char *name, PyObject *const *args, Py_ssize_t nargs, Py_ssize_t wanted, Py_ssize_t at,
               uint64_t *event_id, int64_t *deadline)
{
    if (check_count(name, nargs, wanted) < 0 || parse_unsigned(args[at], "event_id", UINT64_MAX, event_id) < 0) {
        return -1;
    }
    return parse_deadline(args[at + 1], deadline);
}

/* The array's dtype as NumPy writes it ("<f4"), NUL-padded to 4 characters; remembered by identity. */
int
link_dtype_code(LinkEnd *end, PyObject *array, char *code)
{
    PyObject *dtype = PyObject_GetAttr(array, name_dtype);
    if (dtype == NULL) {
        return -1;
    }
    if (dtype == end->dtype) {
        Py_DECREF(dtype);
        memcpy(code, end->dtype_code, 4);
        return 0;
    }
    PyObject *name = PyObject_GetAttr(dtype, name_str);
    Py_ssize_t length = 0;
    const char *text = name == NULL ? NULL : PyUnicode_AsUTF8AndSize(name, &length);
    if (text == NULL) {
        Py_XDECREF(name);
        Py_DECREF(dtype);
        return -1;
    }
    int is_plain = length >= 3 && length <= 4 && strchr("<>|=", text[0]) && strchr("biufc", text[1]);
    for (Py_ssize_t i = 2; i < length; i++) {
        is_plain = is_plain && text[i] >= '0' && text[i] <= '9';
    }
    if (!is_plain) {
        PyErr_Format(PyExc_ValueError, "array: dtype %S must match [<>|=][biufc][0-9]{1,2}", dtype);
    }
    else {
        memset(code, 0, 4);
        memcpy(code, text, (size_t)length);
        memcpy(end->dtype_code, code, 4);
        Py_XSETREF(end->dtype, Py_NewRef(dtype));
    }
    Py_DECREF(name);
    Py_DECREF(dtype);
    return is_plain ? 0 : -1;
}

/* ---------------------------------------------------------------- copies */

/* Copy between a private buffer and a segment; long copies release the GIL. */
void
link_copy(char *dst, const char *src, uint64_t size)
{
    if (size < GIL_COPY_BYTES) {
        copy_bytes(dst, src, (Py_ssize_t)size);
        return;
    }
    Py_BEGIN_ALLOW_THREADS
    copy_bytes(dst, src, (Py_ssize_t)size);
    Py_END_ALLOW_THREADS
}

/* Copy a whole array, in several lanes while those get to run. -1: errno is set. */
int
link_copy_job(LinkEnd *end, const CopyJob *job)
{
    uintptr_t distance = (uintptr_t)job->dst - (uintptr_t)job->src;
    int may_overlap = job->pid == 0 && (distance < job->size || -distance < job->size); /* a put, within an app area */
    int is_shared = end->num_lanes > 1 && !may_overlap && job->size >= 2 * LANE_BLOCK_BYTES &&
                    habit_pays(&end->lanes, ++end->num_long_copies);
    uint32_t num_blocks = 0, num_helped = 0;
    int outcome, error;
    Py_BEGIN_ALLOW_THREADS
    outcome = is_shared ? lanes_copy(job, end->num_lanes, &num_blocks, &num_helped) : copy_part(job, 0, job->size);
    error = errno;
    Py_END_ALLOW_THREADS
    end->num_lane_blocks += num_helped;
    if (is_shared) {
        habit_learn(&end->lanes, end->num_long_copies, num_helped * 8 >= num_blocks, PROBE_MAX);
    }
    errno = error;
    return outcome;
}

/* ---------------------------------------------------------------- methods of both */

PyObject *
link_abandon_method(PyObject *self, PyObject *unused)
{
    LinkEnd *end = (LinkEnd *)self;
    if (end->is_busy) {
        PyErr_SetString(PyExc_RuntimeError, "link: another thread uses it");
        return NULL;
    }
    int was_active = end->op.is_active;
    link_reset(&end->op);
    return PyBool_FromLong(was_active);
}

PyObject *
link_close_method(PyObject *self, PyObject *unused)
{
    LinkEnd *end = (LinkEnd *)self;
    if (end->is_busy) {
        PyErr_SetString(PyExc_RuntimeError, "link: another thread uses it");
        return NULL;
    }
    link_close(end);
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- cells */

/* Read the cell that the other side writes. 1: it is newer than the last one read; 0: it is not. */
int
link_refresh(LinkEnd *end)
{
    uint64_t words[CELL_WORDS];
    if (!has_cell_news(end) || !load_cell(end->in_cell, words) || (words[0] & ~COUNTER_MASK) != end->in_stamp) {
        return 0;
    }
    end->in_word = words[0];
    end->in_w1 = words[1];
    end->in_w2 = words[2];
    end->other = words[3];
    return 1;
}

/* Forget what the cell said, since it is impossible; it will be read, and refused, again. */
void
link_refuse(LinkEnd *end, uint64_t before)
{
    end->other = before;
    end->in_word = end->in_w1 = end->in_w2 = 0;
}

/* Write the own cell in the peer's segment, then ring the peer. */
int
link_publish(LinkEnd *end, uint64_t w1, uint64_t w2, uint64_t w3)
{
    end->num_writes++;
    uint64_t words[CELL_WORDS] = {end->out_stamp | (end->num_writes & COUNTER_MASK), w1, w2, w3};
    store_cell(end->out_cell, words);
    FAULT("published");
    int failed;
    ring_bell(end->peer_bell, &failed);
    FAULT("rung");
    if (failed) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    return 0;
}
