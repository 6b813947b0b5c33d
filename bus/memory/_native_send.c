/* The sending end of a link: steps 1-4 and 8 of the paper. See _native_ends.h. */
#include "_native_ends.h"

#define COPY_BYTES_PER_NS 8
#define PATIENCE_NS_MAX 1000000

/* ---------------------------------------------------------------- slots */

/* Take over what the receiver has written. -1: a Python error is set. */
int
send_look_at_ack(LinkEnd *end, uint64_t event_id)
{
    uint64_t before = end->other;
    if (!link_refresh(end)) {
        return 0;
    }
    uint64_t head = end->other, taken = end->in_w2 & END_MASK;
    if (head > end->position || taken > end->position) {
        link_refuse(end, before);
        return link_error(end, CORRUPT, event_id, "ack: head %llu is beyond tail %llu", (unsigned long long)head,
                          end->position);
    }
    if (head < before || end->position - head > end->num_slots) {
        link_refuse(end, before);
        return link_error(end, CORRUPT, event_id, "ack: head %llu after %llu does not fit tail %llu and %llu slots",
                          (unsigned long long)head, (unsigned long long)before, end->position,
                          (unsigned long long)end->num_slots);
    }
    return 0;
}

/* 1: the slot at the tail is free; 0: the ring is full; -1: a Python error is set. */
int
send_claim_slot(LinkEnd *end, uint64_t event_id)
{
    if (send_is_full(end) && send_look_at_ack(end, event_id) < 0) {
        return -1;
    }
    return !send_is_full(end);
}

/* Publish the slot at the tail. */
int
send_commit_slot(LinkEnd *end, const Tag *tag, uint32_t num_bytes, uint32_t chunk_id, uint64_t event_id)
{
    static const Tag no_tag;
    Record record = {end->position, num_bytes, chunk_id, event_id, tag == NULL ? no_tag : *tag};
    FAULT("copied");
    memcpy(end->slot, &record, sizeof record);
    FAULT("recorded");
    next_position(end);
    end->num_chunks++;
    return link_publish(end, event_id, chunk_id, end->position); /* SYNC: ring-data */
}

/* ---------------------------------------------------------------- messages */

/* Prepare `op` for `array`; nothing is written yet. With `may_read` the caller keeps the array as it is until the
 * message was taken or withdrawn. */
static int
begin(LinkEnd *end, PyObject *array, uint64_t event_id, uint64_t num_more, uint32_t chunk_id, int may_read)
{
    Transfer *op = &end->op;
    if (op->is_active) {
        PyErr_SetString(PyExc_RuntimeError, "link: a message is under way, finish or cancel it first");
        return -1;
    }
    memset(&op->tag, 0, sizeof op->tag);
    memset(op->rest, 0, sizeof op->rest);
    if (link_dtype_code(end, array, op->tag.dtype) < 0 ||
        PyObject_GetBuffer(array, &op->view, PyBUF_ND | PyBUF_C_CONTIGUOUS) < 0) {
        return -1;
    }
    if (op->view.ndim > NUM_DIMS_MAX) {
        PyErr_Format(PyExc_ValueError, "array: %d dimensions are more than %d", op->view.ndim, NUM_DIMS_MAX);
        PyBuffer_Release(&op->view);
        return -1;
    }
    op->tag.num_dims = (uint8_t)op->view.ndim;
    op->tag.kind = KIND_INLINE;
    op->is_sharable = 0;
    op->tag.num_more = (uint16_t)num_more;
    for (int i = 0; i < op->view.ndim; i++) {
        *(i < TAG_DIMS ? &op->tag.shape[i] : &op->rest[i - TAG_DIMS]) = (uint64_t)op->view.shape[i];
    }
    op->event_id = event_id;
    op->num_bytes = (uint64_t)op->view.len;
    op->num_done = 0;
    op->chunk_id = chunk_id;
    uint64_t at = (uint64_t)((uintptr_t)op->view.buf - (uintptr_t)end->own.buf);
    if (op->num_bytes >= end->pull_bytes_min && at >= end->own_low && at <= end->own_high &&
        op->num_bytes <= end->own_high - at) {
        op->tag.kind = KIND_PULL;
        op->offset = at;
        op->is_sharable = may_read && link_is_readable(end);
    }
    else if (may_read && op->num_bytes >= end->read_bytes_min && link_is_readable(end)) {
        op->tag.kind = KIND_READ;
        op->is_sharable = 1;
        op->offset = (uint64_t)(uintptr_t)op->view.buf;
    }
    op->is_active = op->has_view = 1;
    op->is_begun = 0;
    return 0;
}

/* As link_enter, but an array that cannot travel is refused before the link is opened, which may wait. */
static int
enter_with(LinkEnd *end, PyObject *array, uint64_t event_id, PyObject *deadline)
{
    if (end->op.is_active && !end->is_busy) {
        PyErr_SetString(PyExc_RuntimeError, "link: a message is under way, finish or cancel it first");
        return -1;
    }
    if ((end->is_retired || !end->is_open) && !end->is_busy) {
        if (begin(end, array, event_id, 0, 0, 0) < 0) {
            return -1;
        }
        link_reset(&end->op);
    }
    return link_enter(end, event_id, deadline);
}

/* Fill the claimed slot with the next chunk and publish it. */
static int
push_chunk(LinkEnd *end)
{
    Transfer *op = &end->op;
    int is_first = !op->is_begun;
    char *payload = end->slot + RECORD_BYTES;
    uint64_t start = 0, num_bytes = 0;
    FAULT("claimed");
    if (is_first && op->tag.num_dims > TAG_DIMS) {
        memcpy(payload, op->rest, EXTENSION_BYTES);
        start = EXTENSION_BYTES;
    }
    if (op->tag.kind == KIND_INLINE) {
        uint64_t left = op->num_bytes - op->num_done;
        num_bytes = end->slot_bytes - start < left ? end->slot_bytes - start : left;
        link_copy(payload + start, (const char *)op->view.buf + op->num_done, num_bytes);
        op->num_done += num_bytes;
    }
    else {
        memcpy(payload + start, &op->offset, PULL_BYTES);
        num_bytes = PULL_BYTES;
        if (op->is_sharable) {
            end->offer = (Offer *)(payload + start);
            memset(payload + start + PULL_BYTES, 0, sizeof(Offer) - PULL_BYTES); /* OFFERED, nobody invited */
            num_bytes = sizeof(Offer);
            end->offered.src = op->view.buf;
            end->offered.size = op->num_bytes;
        }
        op->num_done = op->num_bytes;
        end->num_pulled++;
    }
    op->is_begun = 1;
    return send_commit_slot(end, is_first ? &op->tag : NULL, (uint32_t)(start + num_bytes), op->chunk_id++, op->event_id);
}

/* Push what fits without waiting. 1: the whole message is pushed; 0: the ring is full; -1: error. */
static int
advance(LinkEnd *end)
{
    Transfer *op = &end->op;
    while (!op->is_begun || op->num_done < op->num_bytes) {
        int is_free = send_claim_slot(end, op->event_id);
        if (is_free <= 0) {
            return is_free;
        }
        if (push_chunk(end) < 0) {
            return -1;
        }
    }
    end->num_messages++;
    end->num_bytes += op->num_bytes;
    end->next_chunk = op->chunk_id;
    link_reset(op);
    return 1;
}

static int
push_all(LinkEnd *end, uint64_t event_id, int64_t deadline)
{
    int outcome;
    while ((outcome = advance(end)) == 0) {
        int news = link_await_news(end, event_id, deadline);
        if (news == 0) {
            news = link_error(end, STALLED, event_id, "its ring stayed full");
        }
        if (news < 0) {
            outcome = -1;
            break;
        }
    }
    link_reset(&end->op);
    return outcome;
}

/* 1: the message that ended at `tail` was taken; 0: not yet; -1: it was given up (a Python error is set). `drops_before`:
 * what the receiver had given up when the message began. */
static int
is_taken(LinkEnd *end, uint64_t tail, uint64_t event_id, uint64_t drops_before)
{
    if (send_look_at_ack(end, event_id) < 0) {
        return -1;
    }
    uint64_t end_taken = end->in_w2 & END_MASK, num_drops = end->in_w2 >> END_BITS;
    if (end->other < tail) {
        return 0;
    }
    if (end_taken == tail || (end_taken > tail && num_drops == drops_before)) {
        return 1;
    }
    return link_error(end, STALLED, event_id, "it gave the message up half-way");
}

static int
await_taken(LinkEnd *end, uint64_t tail, uint64_t event_id, int64_t deadline)
{
    int outcome;
    if (end->offer != NULL && end->offered.size >= end->shared_bytes_min && link_reaches_peer(end)) {
        end->watch = &end->offer->is_invited;
    }
    while ((outcome = is_taken(end, tail, event_id, end->num_drops_seen)) == 0) {
        if (end->watch != NULL && __atomic_load_n(end->watch, __ATOMIC_ACQUIRE) != 0) { /* SYNC: share-invite */
            end->watch = NULL;
            share_help(end);
            continue;
        }
        int news = link_await_news(end, event_id, deadline);
        if (news <= 0) {
            outcome = news < 0 ? -1 : link_error(end, STALLED, event_id, "it has not acknowledged");
            break;
        }
    }
    end->watch = NULL;
    return outcome;
}

/* The call ends, and the caller may change the array: what was offered for reading and not taken is void. */
static void
withdraw(LinkEnd *end, int outcome)
{
    if (end->offer != NULL && outcome < 0) {
        end_offer(&end->offer->state, WITHDRAWN);
    }
    end->offer = NULL;
}

/* ---------------------------------------------------------------- methods */

static PyObject *
finish(LinkEnd *end, int outcome)
{
    if (end->other == end->position) {
        end->num_drops_seen = end->in_w2 >> END_BITS; /* nothing is in flight: old drops concern nobody */
    }
    end->is_busy = 0;
    if (outcome < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyObject *
send_send(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    int64_t deadline;
    if (link_arguments("send", args, nargs, 3, 1, &event_id, &deadline) < 0 ||
        enter_with(end, args[0], event_id, args[2]) < 0) {
        return NULL;
    }
    int outcome = begin(end, args[0], event_id, 0, 0, 1);
    uint64_t copy_ns = outcome == 0 && end->op.tag.kind != KIND_INLINE ? end->op.num_bytes / COPY_BYTES_PER_NS : 0;
    if (outcome == 0 && (outcome = push_all(end, event_id, deadline)) == 1) {
        end->patience_ns = (int64_t)(copy_ns < PATIENCE_NS_MAX ? copy_ns : PATIENCE_NS_MAX);
        outcome = await_taken(end, end->position, event_id, deadline);
        end->patience_ns = 0;
    }
    withdraw(end, outcome);
    return finish(end, outcome);
}

PyObject *
send_send_part(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id, num_more;
    int64_t deadline;
    if (link_arguments("send_part", args, nargs, 5, 1, &event_id, &deadline) < 0 ||
        parse_unsigned(args[3], "num_more", NUM_PARTS_MAX, &num_more) < 0) {
        return NULL;
    }
    int is_first = PyObject_IsTrue(args[4]);
    if (is_first < 0 || enter_with(end, args[0], event_id, args[2]) < 0) {
        return NULL;
    }
    int outcome = begin(end, args[0], event_id, num_more, is_first ? 0 : end->next_chunk, 0);
    if (outcome == 0 && (outcome = push_all(end, event_id, deadline)) == 1 && num_more == 0) {
        outcome = await_taken(end, end->position, event_id, deadline);
    }
    return finish(end, outcome);
}

PyObject *
send_start(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    int64_t deadline;
    if (link_arguments("start", args, nargs, 3, 1, &event_id, &deadline) < 0 ||
        enter_with(end, args[0], event_id, args[2]) < 0) {
        return NULL;
    }
    return finish(end, begin(end, args[0], event_id, 0, 0, 0));
}

PyObject *
send_advance(PyObject *self, PyObject *unused)
{
    LinkEnd *end = (LinkEnd *)self;
    if (end->is_busy || !end->is_open || !end->op.is_active) {
        PyErr_SetString(PyExc_RuntimeError, "link: no message is under way, or another thread uses it");
        return NULL;
    }
    end->is_busy = 1;
    int outcome = advance(end);
    end->is_busy = 0;
    return outcome < 0 ? NULL : PyBool_FromLong(outcome);
}

/* drops(event_id) -> how many messages the receiver has given up half-way. */
PyObject *
send_drops(PyObject *self, PyObject *event)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    if (parse_unsigned(event, "event_id", UINT64_MAX, &event_id) < 0) {
        return NULL;
    }
    if (!end->is_open) {
        PyErr_SetString(PyExc_RuntimeError, "link: it is closed");
        return NULL;
    }
    return send_look_at_ack(end, event_id) < 0 ? NULL : PyLong_FromUnsignedLongLong(end->in_w2 >> END_BITS);
}

PyObject *
send_taken(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t tail, event_id, drops_before;
    if (check_count("taken", nargs, 3) < 0 || parse_unsigned(args[0], "tail", END_MASK, &tail) < 0 ||
        parse_unsigned(args[1], "event_id", UINT64_MAX, &event_id) < 0 ||
        parse_unsigned(args[2], "drops_before", UINT64_MAX, &drops_before) < 0) {
        return NULL;
    }
    if (!end->is_open) {
        PyErr_SetString(PyExc_RuntimeError, "link: it is closed");
        return NULL;
    }
    int outcome = is_taken(end, tail, event_id, drops_before);
    return outcome < 0 ? NULL : PyBool_FromLong(outcome);
}

/* await_taken(tail, event_id, deadline): wait until the message that ended at `tail` was taken. */
PyObject *
send_await_taken(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t tail, event_id;
    int64_t deadline;
    if (link_arguments("await_taken", args, nargs, 3, 1, &event_id, &deadline) < 0 ||
        parse_unsigned(args[0], "tail", END_MASK, &tail) < 0) {
        return NULL;
    }
    if (end->is_busy || !end->is_open) {
        PyErr_SetString(PyExc_RuntimeError, "link: it is closed, or another thread uses it");
        return NULL;
    }
    end->is_busy = 1;
    int outcome = await_taken(end, tail, event_id, deadline);
    end->is_busy = 0;
    if (outcome < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

PyObject *
send_wait(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    int64_t deadline;
    if (link_arguments("wait", args, nargs, 2, 0, &event_id, &deadline) < 0) {
        return NULL;
    }
    if (end->is_busy || !end->is_open) {
        PyErr_SetString(PyExc_RuntimeError, "link: it is closed, or another thread uses it");
        return NULL;
    }
    end->is_busy = 1;
    int news = link_await_news(end, event_id, deadline);
    end->is_busy = 0;
    return news < 0 ? NULL : PyBool_FromLong(news);
}
