/* The receiving end of a link: steps 5-7 of the paper. See _native_link.h. */
#include "_native_link.h"

#include <stddef.h>
#include <structmember.h>

enum { LACKS = 0, DONE = 1, LOST = 2 }; /* besides -1: a Python error is set */

/* ---------------------------------------------------------------- records */

static int
publish_head(LinkEnd *end)
{
    if (end->num_unpublished == 0) {
        return 0;
    }
    end->num_unpublished = 0;
    return link_publish(end, end->last_event, end->last_end | end->num_drops << END_BITS,
                        end->position); /* SYNC: ring-free */
}

static void
release(LinkEnd *end)
{
    next_position(end);
    end->num_unpublished++;
    end->num_chunks++;
}

/* The message that ends at the head was taken. */
static int
acknowledge(LinkEnd *end, uint64_t event_id)
{
    end->last_event = event_id;
    end->last_end = end->position;
    end->num_unpublished = 1;
    FAULT("acknowledging");
    int outcome = publish_head(end);
    FAULT("acknowledged");
    return outcome;
}

/* Copy the record at the head. 1: it is there; 0: nothing is; -1: error. The copy's sizes are within bounds.
 *
 * NOTE: the head is never published right after a message's last record, only together with the
 * acknowledgement: a head at the tail without one tells the sender that its message was dropped. */
static int
next_record(LinkEnd *end, uint64_t event_id, Record *record)
{
    if (end->position == end->other) {
        uint64_t before = end->other;
        if (link_refresh(end) && (end->other < before || end->other - end->position > end->num_slots)) {
            uint64_t tail = end->other;
            link_refuse(end, before);
            return link_error(end, CORRUPT, event_id, "ring: tail %llu and head %llu do not fit %llu slots",
                              (unsigned long long)tail, end->position, (unsigned long long)end->num_slots);
        }
        if (end->position == end->other) {
            return publish_head(end);
        }
    }
    uint64_t half = end->num_slots / 2 > 0 ? end->num_slots / 2 : 1;
    if (end->num_unpublished >= half && publish_head(end) < 0) {
        return -1;
    }
    memcpy(record, end->slot, sizeof *record);
    if (record->position != end->position) {
        return link_error(end, CORRUPT, event_id, "ring: the slot of position %llu says %llu", end->position,
                          (unsigned long long)record->position);
    }
    if (record->num_bytes > end->slot_bytes) {
        return link_error(end, CORRUPT, event_id, "ring: record of %u bytes in a slot of %llu", record->num_bytes,
                          (unsigned long long)end->slot_bytes);
    }
    FAULT("peeked");
    return 1;
}

/* ---------------------------------------------------------------- headers */

static uint64_t
item_bytes(const char *dtype)
{
    if (dtype[0] == 0 || !strchr("<>|=", dtype[0]) || dtype[1] == 0 || !strchr("biufc", dtype[1])) {
        return 0;
    }
    uint64_t size = 0;
    for (int i = 2; i < 4 && dtype[i] != 0; i++) {
        if (dtype[i] < '0' || dtype[i] > '9') {
            return 0;
        }
        size = size * 10 + (uint64_t)(dtype[i] - '0');
    }
    return size;
}

/* Read what the first record of a part announces into `op`. 1: it is possible; 0: it is not.
 * *start is where the content begins in the payload. */
static int
parse_first(LinkEnd *end, const Record *record, Transfer *op, uint64_t *start)
{
    const Tag *tag = &record->tag;
    const char *payload = end->slot + RECORD_BYTES;
    uint64_t num_bytes = item_bytes(tag->dtype);
    memset(op->rest, 0, sizeof op->rest);
    *start = 0;
    if (num_bytes == 0 || tag->num_dims > NUM_DIMS_MAX || tag->kind < KIND_INLINE || tag->kind > KIND_READ) {
        return 0;
    }
    if (tag->num_dims > TAG_DIMS) {
        if (record->num_bytes < EXTENSION_BYTES) {
            return 0;
        }
        memcpy(op->rest, payload, EXTENSION_BYTES);
        *start = EXTENSION_BYTES;
    }
    int is_empty = 0;
    for (int i = 0; i < NUM_DIMS_MAX; i++) {
        uint64_t length = i < TAG_DIMS ? tag->shape[i] : op->rest[i - TAG_DIMS];
        if (i >= tag->num_dims) {
            if (length != 0) {
                return 0;
            }
            continue;
        }
        is_empty |= length == 0;
        if (length > PY_SSIZE_T_MAX || (length != 0 && __builtin_mul_overflow(num_bytes, length, &num_bytes))) {
            return 0;
        }
    }
    num_bytes = is_empty ? 0 : num_bytes;
    if (num_bytes > end->message_bytes_max) {
        return 0;
    }
    uint64_t size = record->num_bytes - *start;
    op->is_sharable = tag->kind != KIND_PUT && size == sizeof(Offer);
    if (tag->kind == KIND_READ) {
        if ((size != READ_BYTES && size != sizeof(Offer)) || end->peer_pid == 0) {
            return 0;
        }
        memcpy(&op->offset, payload + *start, PULL_BYTES);
    }
    else if (tag->kind != KIND_INLINE) {
        uint64_t low = tag->kind == KIND_PULL ? end->peer_low : end->own_low;
        uint64_t high = tag->kind == KIND_PULL ? end->peer_high : end->own_high;
        if (size != PULL_BYTES && !op->is_sharable) {
            return 0;
        }
        memcpy(&op->offset, payload + *start, PULL_BYTES);
        if (op->offset < low || op->offset > high || num_bytes > high - op->offset) {
            return 0;
        }
    }
    op->tag = *tag;
    op->num_bytes = num_bytes;
    return 1;
}

static PyObject *
shape_tuple(const Transfer *op)
{
    PyObject *shape = PyTuple_New(op->tag.num_dims);
    for (int i = 0; shape != NULL && i < op->tag.num_dims; i++) {
        PyObject *length = PyLong_FromUnsignedLongLong(i < TAG_DIMS ? op->tag.shape[i] : op->rest[i - TAG_DIMS]);
        if (length == NULL) {
            Py_CLEAR(shape);
            break;
        }
        PyTuple_SET_ITEM(shape, i, length);
    }
    return shape;
}

static PyObject *
code_bytes(const Transfer *op)
{
    return PyBytes_FromStringAndSize(op->tag.dtype, (Py_ssize_t)strnlen(op->tag.dtype, 4));
}

/* Raise what `_refuse(event_id, tag, extension, offset, out)` raises: it finds and names the fault. Always -1. */
static int
refuse(LinkEnd *end, const Record *record, const Transfer *op, PyObject *out)
{
    PyObject *result = PyObject_CallMethod((PyObject *)end, "_refuse", "Ky#y#O", (unsigned long long)record->event_id,
                                           (const char *)&record->tag, (Py_ssize_t)sizeof(Tag), (const char *)op->rest,
                                           (Py_ssize_t)EXTENSION_BYTES, out);
    if (result != NULL) {
        Py_DECREF(result);
        link_error(end, CORRUPT, record->event_id, "message header: its offset, size or content is impossible");
    }
    return -1;
}

/* Take hold of the bytes of `array`, which is to be filled. */
static int
hold(LinkEnd *end, PyObject *array)
{
    Transfer *op = &end->op;
    if (link_dtype_code(end, array, op->code) < 0 ||
        PyObject_GetBuffer(array, &op->view, PyBUF_ND | PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE) < 0) {
        return -1;
    }
    op->has_view = 1;
    return 0;
}

static int
fits(const Transfer *op)
{
    if (memcmp(op->code, op->tag.dtype, 4) != 0 || op->view.ndim != op->tag.num_dims ||
        (uint64_t)op->view.len != op->num_bytes) {
        return 0;
    }
    for (int i = 0; i < op->tag.num_dims; i++) {
        uint64_t length = i < TAG_DIMS ? op->tag.shape[i] : op->rest[i - TAG_DIMS];
        if ((uint64_t)op->view.shape[i] != length) {
            return 0;
        }
    }
    return 1;
}

/* Accept the message (or part) that begins with `record`: find the array to fill. 1 or -1. */
static int
accept(LinkEnd *end, const Record *record, PyObject *out, uint64_t *start)
{
    Transfer *op = &end->op;
    link_answer(end);
    if (!parse_first(end, record, op, start)) {
        return refuse(end, record, op, Py_None);
    }
    PyObject *array = out;
    if (out == Py_None) {
        PyObject *code = code_bytes(op), *shape = shape_tuple(op);
        array = code == NULL || shape == NULL ? NULL : link_call(end, name_allocate, code, shape);
        Py_XDECREF(code);
        Py_XDECREF(shape);
        if (array == NULL) {
            return -1;
        }
    }
    else {
        Py_INCREF(array);
    }
    if (!op->has_view && hold(end, array) < 0) {
        Py_DECREF(array);
        return -1;
    }
    if (!fits(op)) {
        refuse(end, record, op, array);
        link_reset(op);
        Py_DECREF(array);
        return -1;
    }
    Py_XSETREF(op->array, array);
    op->is_active = op->is_begun = 1;
    op->event_id = record->event_id;
    op->num_done = 0;
    return 1;
}

/* ---------------------------------------------------------------- messages */

static int
take_inline(LinkEnd *end, const Record *record, uint64_t start)
{
    Transfer *op = &end->op;
    uint64_t num_bytes = record->num_bytes - start;
    if (record->num_bytes < start || num_bytes > op->num_bytes - op->num_done ||
        (num_bytes == 0 && op->num_bytes > op->num_done && record->num_bytes != end->slot_bytes)) {
        return link_error(end, CORRUPT, op->event_id, "chunk %u has %llu bytes of %llu", record->chunk_id,
                          (unsigned long long)num_bytes, (unsigned long long)op->num_bytes);
    }
    link_copy((char *)op->view.buf + op->num_done, end->slot + RECORD_BYTES + start, num_bytes);
    op->num_done += num_bytes;
    return DONE;
}

/* Copy `job`, with the sender if that pays. As `share_copy`. */
static int
copy_whole(LinkEnd *end, const CopyJob *job, Offer *offer)
{
    int is_shared = end->op.is_sharable && share_is_possible(end, job, offer);
    return is_shared ? share_copy(end, job, offer) : link_copy_job(end, job);
}

#define GONE_TRIES 1000 /* a millisecond apart */

/* Raise what is known against the sender's life: -1. Otherwise 0. A process that ends loses its memory a moment before
 * its lock, so with ESRCH the lock is looked at until it is free. */
static int
check_sender(LinkEnd *end, uint64_t event_id, int error)
{
    const struct timespec nap = {.tv_nsec = 1000000};
    int outcome = link_check_peer(end, event_id);
    for (int tries = 1; outcome == 0 && error == ESRCH && tries < GONE_TRIES; tries++) {
        Py_BEGIN_ALLOW_THREADS
        nanosleep(&nap, NULL);
        Py_END_ALLOW_THREADS
        outcome = link_check_peer(end, event_id);
    }
    return outcome;
}

/* Copy an array out of the sender's memory. DONE, -1, or LOST: the sender has withdrawn it. */
static int
take_offered(LinkEnd *end, Offer *offer)
{
    Transfer *op = &end->op;
    CopyJob job = {.dst = op->view.buf,
                   .src = (const char *)(uintptr_t)op->offset,
                   .size = op->num_bytes,
                   .pid = end->peer_pid,
                   .nonce = end->nonce,
                   .nonce_at = end->nonce_at};
    int outcome = copy_whole(end, &job, offer);
    if (outcome == SHARE_STUCK) {
        return -1;
    }
    int error = outcome < 0 ? errno : 0;
    uint32_t found = OFFERED;
    if (error != 0) {
        found = __atomic_load_n(&offer->state, __ATOMIC_ACQUIRE); /* SYNC: read-state */
    }
    else {
        /* Still offered after the last byte was read: the sender has not let go of the array meanwhile. */
        found = end_offer(&offer->state, TAKEN);
    }
    if (found == WITHDRAWN) {
        return LOST;
    }
    if (error != 0) {
        return check_sender(end, op->event_id, error) < 0
                   ? -1
                   : link_error(end, CORRUPT, op->event_id, "%llu bytes of the sender's memory: %s",
                                (unsigned long long)op->num_bytes, strerror(error));
    }
    return DONE;
}

/* Copy a whole array out of a segment, or out of the sender's memory. DONE, -1, or LOST. */
static int
take_whole(LinkEnd *end, uint64_t start)
{
    Transfer *op = &end->op;
    Offer *offer = (Offer *)(end->slot + RECORD_BYTES + start);
    if (op->tag.kind == KIND_READ) {
        int outcome = take_offered(end, offer);
        if (outcome != DONE) {
            return outcome;
        }
    }
    else {
        const Py_buffer *segment = op->tag.kind == KIND_PULL ? &end->peer : &end->own;
        CopyJob job = {.dst = op->view.buf, .src = (const char *)segment->buf + op->offset, .size = op->num_bytes};
        int outcome = copy_whole(end, &job, offer);
        if (outcome < 0) {
            return outcome == SHARE_STUCK ? -1
                                          : link_error(end, CORRUPT, op->event_id, "the shares of a copy are impossible");
        }
    }
    op->num_done = op->num_bytes;
    end->num_pulled++;
    return DONE;
}

/* Take the record at the head. DONE, -1, or LOST: its sender has withdrawn the message. */
static int
take_chunk(LinkEnd *end, const Record *record, uint64_t start)
{
    int outcome = end->op.tag.kind == KIND_INLINE ? take_inline(end, record, start) : take_whole(end, start);
    if (outcome >= 0) {
        FAULT("copied-out");
        release(end);
        end->op.chunk_id++;
    }
    return outcome;
}

/* Take what has arrived, without waiting. DONE: the part is whole; LACKS: more must come; LOST: a later part of
 * a message whose sender gave up. Records that do not continue the message at hand are left over from a `send`
 * that gave up, and are skipped. */
static int
advance(LinkEnd *end, PyObject *out, uint64_t event_id, int is_first, int parts_are_welcome)
{
    Transfer *op = &end->op;
    for (;;) {
        Record record;
        uint64_t start = 0;
        int outcome = next_record(end, event_id, &record);
        if (outcome <= 0) {
            return outcome;
        }
        if (!op->is_begun) {
            if (record.chunk_id != (is_first ? 0 : end->next_chunk) || (!is_first && record.event_id != event_id)) {
                end->num_drops++;
                if (!is_first) {
                    return LOST;
                }
                release(end);
                continue;
            }
            if (record.event_id != event_id) {
                char found[24]; /* PyUnicode_FromFormat has no %llx before Python 3.12 */
                snprintf(found, sizeof found, "%#llx", (unsigned long long)record.event_id);
                return link_error(end, MISMATCH, event_id, "the next message is event %s", found);
            }
            if (is_first && record.tag.num_more != 0 && !parts_are_welcome) {
                PyErr_Format(PyExc_ValueError, "message: it has %u parts, receive them with recv_parts",
                             record.tag.num_more + 1u);
                return -1;
            }
            op->chunk_id = record.chunk_id;
            if (accept(end, &record, out, &start) < 0) {
                return -1;
            }
        }
        else if (record.event_id != op->event_id || record.chunk_id != op->chunk_id) {
            end->num_drops++;
            link_reset(op);
            if (!is_first) {
                return LOST;
            }
            continue;
        }
        outcome = take_chunk(end, &record, start);
        if (outcome < 0) {
            return -1;
        }
        if (outcome == LOST) {
            end->num_drops++;
            link_reset(op);
            if (!is_first) {
                return LOST;
            }
            continue;
        }
        if (op->num_done == op->num_bytes) {
            end->next_chunk = op->chunk_id;
            end->num_messages++;
            end->num_bytes += op->num_bytes;
            return DONE;
        }
    }
}

/* Hand the finished array over; acknowledges unless more parts follow. */
static PyObject *
deliver(LinkEnd *end, uint64_t event_id)
{
    PyObject *array = Py_NewRef(end->op.array);
    int num_more = end->op.tag.num_more;
    link_reset(&end->op);
    if (num_more == 0 && acknowledge(end, event_id) < 0) {
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

/* Receive one part. Returns DONE, LOST or -1; a message that came half is forgotten. */
static int
recv_whole(LinkEnd *end, PyObject *out, uint64_t event_id, int64_t deadline, int is_first, int parts_are_welcome)
{
    int outcome;
    if (out != Py_None && hold(end, out) < 0) {
        PyErr_Clear(); /* said again once a message has come: its own faults are named first */
    }
    end->deadline = deadline;
    while ((outcome = advance(end, out, event_id, is_first, parts_are_welcome)) == LACKS) {
        int news = link_await_news(end, event_id, deadline);
        if (news == 0) {
            news = link_error(end, STALLED, event_id, "nothing arrived");
        }
        if (news < 0) {
            outcome = -1;
            break;
        }
    }
    end->deadline = 0;
    if (outcome != DONE) {
        link_reset(&end->op);
    }
    return outcome;
}

static int
refuse_if_active(const LinkEnd *end)
{
    if (end->op.is_active) {
        PyErr_SetString(PyExc_RuntimeError, "link: a message is under way, finish or cancel it first");
        return -1;
    }
    return 0;
}

/* ---------------------------------------------------------------- methods */

static PyObject *
recv_recv(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    int64_t deadline;
    if (link_arguments("recv", args, nargs, 3, 1, &event_id, &deadline) < 0 ||
        refuse_if_active(end) < 0 || link_enter(end, event_id, args[2]) < 0) {
        return NULL;
    }
    int outcome = recv_whole(end, args[0], event_id, deadline, 1, 0);
    PyObject *array = outcome == DONE ? deliver(end, event_id) : NULL;
    end->is_busy = 0;
    return array;
}

/* recv_part(out, event_id, deadline, is_first) -> (array, num_more), or None when the sender gave up. */
static PyObject *
recv_recv_part(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    int64_t deadline;
    if (link_arguments("recv_part", args, nargs, 4, 1, &event_id, &deadline) < 0) {
        return NULL;
    }
    int is_first = PyObject_IsTrue(args[3]);
    if (is_first < 0 || refuse_if_active(end) < 0 || link_enter(end, event_id, args[2]) < 0) {
        return NULL;
    }
    int outcome = recv_whole(end, args[0], event_id, deadline, is_first, 1);
    PyObject *result = NULL;
    if (outcome == DONE) {
        int num_more = end->op.tag.num_more;
        PyObject *array = deliver(end, event_id);
        result = array == NULL ? NULL : Py_BuildValue("(Ni)", array, num_more);
    }
    end->is_busy = 0;
    if (outcome == LOST) {
        Py_RETURN_NONE;
    }
    return result;
}

/* advance(out, event_id, deadline) -> the array once it is whole, else None; nothing waits. */
static PyObject *
recv_advance(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    int64_t deadline;
    if (link_arguments("advance", args, nargs, 3, 1, &event_id, &deadline) < 0 ||
        link_enter(end, event_id, args[2]) < 0) {
        return NULL;
    }
    int outcome = advance(end, args[0], event_id, 1, 0);
    PyObject *array = outcome == DONE ? deliver(end, event_id) : NULL;
    if (outcome < 0) {
        link_reset(&end->op);
    }
    if (!end->op.is_begun) {
        link_reset(&end->op);
    }
    end->is_busy = 0;
    if (outcome == LACKS) {
        Py_RETURN_NONE;
    }
    return array;
}

static PyObject *
recv_wait(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    int64_t deadline;
    if (link_arguments("wait", args, nargs, 2, 0, &event_id, &deadline) < 0 || link_enter(end, event_id, args[1]) < 0) {
        return NULL;
    }
    int news = end->position != end->other ? 1 : link_await_news(end, event_id, deadline);
    end->is_busy = 0;
    return news < 0 ? NULL : PyBool_FromLong(news);
}

/* peek(event_id, deadline) -> (event_id, tag, extension, kind, offset, num_bytes, is_whole), or None: the first
 * record of the next message, where its content lies (in the own segment, or in the peer's for KIND_PULL), and
 * whether that is all of it. Left-overs are skipped. */
static PyObject *
recv_peek(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id, start;
    int64_t deadline;
    Record record;
    if (link_arguments("peek", args, nargs, 2, 0, &event_id, &deadline) < 0 ||
        refuse_if_active(end) < 0 || link_enter(end, event_id, args[1]) < 0) {
        return NULL;
    }
    int outcome;
    while ((outcome = next_record(end, event_id, &record)) == 1 && record.chunk_id != 0) {
        end->num_drops++;
        release(end);
    }
    if (outcome == 1) {
        link_answer(end);
        outcome = parse_first(end, &record, &end->op, &start) ? 1 : refuse(end, &record, &end->op, Py_None);
    }
    end->is_busy = 0;
    if (outcome < 0) {
        return NULL;
    }
    if (outcome == 0) {
        Py_RETURN_NONE;
    }
    const Transfer *op = &end->op;
    uint64_t offset = op->offset, length = op->num_bytes;
    int is_whole = op->tag.num_more == 0;
    if (op->tag.kind == KIND_INLINE) {
        offset = (uint64_t)(end->slot + RECORD_BYTES + start - (char *)end->own.buf);
        is_whole = is_whole && length == record.num_bytes - start;
    }
    else if (op->tag.kind == KIND_READ) {
        is_whole = 0; /* it is nowhere that this process could look at */
    }
    return Py_BuildValue("(Ky#y#iKKO)", (unsigned long long)record.event_id, (const char *)&record.tag,
                         (Py_ssize_t)sizeof(Tag), (const char *)op->rest, (Py_ssize_t)EXTENSION_BYTES, op->tag.kind,
                         (unsigned long long)offset, (unsigned long long)length, is_whole ? Py_True : Py_False);
}

/* Consume the record at the head, which was peeked at, as a whole message. */
static PyObject *
recv_take(PyObject *self, PyObject *event)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    if (parse_unsigned(event, "event_id", UINT64_MAX, &event_id) < 0) {
        return NULL;
    }
    if (end->is_busy || !end->is_open || end->op.is_active || end->position == end->other) {
        PyErr_SetString(PyExc_RuntimeError, "link: there is no record to take, or another thread uses it");
        return NULL;
    }
    release(end);
    end->num_messages++;
    if (acknowledge(end, event_id) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *
recv_open(PyObject *self, PyObject *args, PyObject *kwargs)
{
    LinkEnd *end = (LinkEnd *)self;
    if (link_open(end, args, kwargs, 0) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

#define METHOD(name, function, flags, doc) {name, (PyCFunction)(void (*)(void))function, flags, doc}

static PyMethodDef methods[] = {
    METHOD("_open", recv_open, METH_VARARGS | METH_KEYWORDS, "open(own, peer, *, ...): begin, or begin again."),
    METHOD("recv", recv_recv, METH_FASTCALL, "recv(out, event_id, deadline) -> the array."),
    METHOD("_recv_part", recv_recv_part, METH_FASTCALL, "recv_part(out, event_id, deadline, is_first)."),
    METHOD("_advance", recv_advance, METH_FASTCALL, "advance(out, event_id, deadline) -> the array, or None."),
    METHOD("_wait", recv_wait, METH_FASTCALL, "wait(event_id, deadline) -> whether the sender wrote its cell."),
    METHOD("_peek", recv_peek, METH_FASTCALL, "peek(event_id, deadline) -> the next message's first record, or None."),
    METHOD("_take", recv_take, METH_O, "take(event_id): consume the record at the head as a whole message."),
    METHOD("_abandon", link_abandon_method, METH_NOARGS, "abandon() -> whether a message was under way."),
    METHOD("_close", link_close_method, METH_NOARGS, "close(): let the segments go."),
    {NULL, NULL, 0, NULL},
};

#define COUNTER(name) {#name, T_ULONGLONG, offsetof(LinkEnd, name), READONLY, NULL}

static PyMemberDef members[] = {
    {"head", T_ULONGLONG, offsetof(LinkEnd, position), READONLY, "The next slot to read."},
    {"is_retired", T_BOOL, offsetof(LinkEnd, is_retired), 0, "Open again before the next message."},
    COUNTER(num_messages),
    COUNTER(num_bytes),
    COUNTER(num_chunks),
    COUNTER(num_pulled),
    COUNTER(num_drops),
    COUNTER(num_waits),
    COUNTER(num_pause_wins),
    COUNTER(num_yield_wins),
    COUNTER(num_sleeps),
    COUNTER(num_lane_blocks),
    COUNTER(num_shared_bytes),
    COUNTER(num_moves),
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_dealloc, link_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_doc, "The receiving end of a point-to-point link."},
    {0, NULL},
};

PyType_Spec recv_end_spec = {
    .name = "bus.memory._native.RecvEnd",
    .basicsize = sizeof(LinkEnd),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = slots,
};
