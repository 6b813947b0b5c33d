/* The receiving end of a link: steps 5-7 of the paper. See _native_ends.h. */
#include "_native_ends.h"

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

void
recv_release_record(LinkEnd *end)
{
    next_position(end);
    end->num_unpublished++;
    end->num_chunks++;
}

/* The message that ends at the head was taken. */
int
recv_acknowledge(LinkEnd *end, uint64_t event_id)
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
int
recv_next_record(LinkEnd *end, uint64_t event_id, Record *record)
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

/* Accept the message (or part) that begins with `record`: find the array to fill. 1 or -1. */
static int
accept(LinkEnd *end, const Record *record, PyObject *out, uint64_t *start)
{
    Transfer *op = &end->op;
    link_answer(end);
    if (!header_parse(end, record, op, start)) {
        return header_refuse(end, record, op, Py_None);
    }
    PyObject *array = out;
    if (out == Py_None) {
        array = header_allocate(end, op);
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
    if (!header_fits(op)) {
        header_refuse(end, record, op, array);
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

/* Take the record at the head. DONE, -1, or LOST: its sender has withdrawn the message. */
static int
take_chunk(LinkEnd *end, const Record *record, uint64_t start)
{
    int outcome = content_take(end, record, start);
    if (outcome >= 0) {
        FAULT("copied-out");
        recv_release_record(end);
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
        int outcome = recv_next_record(end, event_id, &record);
        if (outcome <= 0) {
            return outcome;
        }
        if (!op->is_begun) {
            if (record.chunk_id != (is_first ? 0 : end->next_chunk) || (!is_first && record.event_id != event_id)) {
                end->num_drops++;
                if (!is_first) {
                    return LOST;
                }
                recv_release_record(end);
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
    if (num_more == 0 && recv_acknowledge(end, event_id) < 0) {
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

int
recv_refuse_if_active(const LinkEnd *end)
{
    if (end->op.is_active) {
        PyErr_SetString(PyExc_RuntimeError, "link: a message is under way, finish or cancel it first");
        return -1;
    }
    return 0;
}

/* ---------------------------------------------------------------- methods */

PyObject *
recv_recv(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    int64_t deadline;
    if (link_arguments("recv", args, nargs, 3, 1, &event_id, &deadline) < 0 ||
        recv_refuse_if_active(end) < 0 || link_enter(end, event_id, args[2]) < 0) {
        return NULL;
    }
    int outcome = recv_whole(end, args[0], event_id, deadline, 1, 0);
    PyObject *array = outcome == DONE ? deliver(end, event_id) : NULL;
    end->is_busy = 0;
    return array;
}

/* recv_part(out, event_id, deadline, is_first) -> (array, num_more), or None when the sender gave up. */
PyObject *
recv_recv_part(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    int64_t deadline;
    if (link_arguments("recv_part", args, nargs, 4, 1, &event_id, &deadline) < 0) {
        return NULL;
    }
    int is_first = PyObject_IsTrue(args[3]);
    if (is_first < 0 || recv_refuse_if_active(end) < 0 || link_enter(end, event_id, args[2]) < 0) {
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
PyObject *
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

PyObject *
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
