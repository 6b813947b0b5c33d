/* The types of the two ends of a link, as Python sees them. See _native_ends.h. */
#include "_native_ends.h"

#include <stddef.h>
#include <structmember.h>

#define METHOD(name, function, flags, doc) {name, (PyCFunction)(void (*)(void))function, flags, doc}

#define COUNTER(name) {#name, T_ULONGLONG, offsetof(LinkEnd, name), READONLY, NULL}

/* Of both ends. */
#define COUNTERS                                                                                                        \
    COUNTER(num_messages), COUNTER(num_bytes), COUNTER(num_chunks), COUNTER(num_pulled), COUNTER(num_waits),            \
        COUNTER(num_pause_wins), COUNTER(num_yield_wins), COUNTER(num_sleeps), COUNTER(num_lane_blocks),                \
        COUNTER(num_shared_bytes), COUNTER(num_moves)

/* ---------------------------------------------------------------- the sender */

static PyObject *
send_open(PyObject *self, PyObject *args, PyObject *kwargs)
{
    if (link_open((LinkEnd *)self, args, kwargs, 1) < 0) {
        return NULL;
    }
    LinkEnd *end = (LinkEnd *)self;
    if (send_look_at_ack(end, 0) < 0) {
        link_close(end);
        return NULL;
    }
    end->num_drops_seen = end->in_w2 >> END_BITS;
    Py_RETURN_NONE;
}

static PyMethodDef send_methods[] = {
    METHOD("_open", send_open, METH_VARARGS | METH_KEYWORDS, "open(own, peer, *, ...): begin, or begin again."),
    METHOD("send", send_send, METH_FASTCALL, "send(array, event_id, deadline): send and wait until it was taken."),
    METHOD("_send_part", send_send_part, METH_FASTCALL, "send_part(array, event_id, deadline, num_more, is_first)."),
    METHOD("_start", send_start, METH_FASTCALL, "start(array, event_id, deadline): prepare a message."),
    METHOD("_advance", send_advance, METH_NOARGS, "advance() -> whether the whole message is pushed."),
    METHOD("_drops", send_drops, METH_O, "drops(event_id) -> how many messages the receiver has given up half-way."),
    METHOD("_taken", send_taken, METH_FASTCALL, "taken(tail, event_id, drops_before) -> whether it was taken."),
    METHOD("_wait", send_wait, METH_FASTCALL, "wait(event_id, deadline) -> whether the receiver wrote its cell."),
    METHOD("await_taken", send_await_taken, METH_FASTCALL, "await_taken(tail, event_id, deadline): wait until it was taken."),
    METHOD("reserve", in_place_reserve, METH_FASTCALL, "reserve(shape, dtype, event_id, deadline) -> an array in a slot."),
    METHOD("commit", in_place_commit, METH_O, "commit(event_id) -> the tail at the end of what was reserved."),
    METHOD("_claim", in_place_claim, METH_FASTCALL, "claim(event_id, deadline) -> offset of the free slot's payload, or None."),
    METHOD("_publish", in_place_publish, METH_VARARGS, "publish(tag, num_bytes, event_id): publish the claimed slot."),
    METHOD("_abandon", link_abandon_method, METH_NOARGS, "abandon() -> whether a message was under way."),
    METHOD("_close", link_close_method, METH_NOARGS, "close(): let the segments go."),
    {NULL, NULL, 0, NULL},
};

static PyMemberDef send_members[] = {
    {"tail", T_ULONGLONG, offsetof(LinkEnd, position), READONLY, "One past the last pushed slot."},
    {"slot_bytes", T_ULONGLONG, offsetof(LinkEnd, slot_bytes), READONLY, "Payload of a slot."},
    {"is_retired", T_BOOL, offsetof(LinkEnd, is_retired), 0, "Open again before the next message."},
    COUNTERS,
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot send_slots[] = {
    {Py_tp_dealloc, link_dealloc},
    {Py_tp_methods, send_methods},
    {Py_tp_members, send_members},
    {Py_tp_doc, "The sending end of a point-to-point link."},
    {0, NULL},
};

PyType_Spec send_end_spec = {
    .name = "bus.memory._native.SendEnd",
    .basicsize = sizeof(LinkEnd),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = send_slots,
};

/* ---------------------------------------------------------------- the receiver */

static PyObject *
recv_open(PyObject *self, PyObject *args, PyObject *kwargs)
{
    LinkEnd *end = (LinkEnd *)self;
    if (link_open(end, args, kwargs, 0) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef recv_methods[] = {
    METHOD("_open", recv_open, METH_VARARGS | METH_KEYWORDS, "open(own, peer, *, ...): begin, or begin again."),
    METHOD("recv", recv_recv, METH_FASTCALL, "recv(out, event_id, deadline) -> the array."),
    METHOD("_recv_part", recv_recv_part, METH_FASTCALL, "recv_part(out, event_id, deadline, is_first)."),
    METHOD("_advance", recv_advance, METH_FASTCALL, "advance(out, event_id, deadline) -> the array, or None."),
    METHOD("_wait", recv_wait, METH_FASTCALL, "wait(event_id, deadline) -> whether the sender wrote its cell."),
    METHOD("peek", in_place_peek, METH_FASTCALL, "peek(event_id, deadline) -> the next message in place, read only."),
    METHOD("release", in_place_release, METH_O, "release(event_id): consume what was peeked at."),
    METHOD("_look", in_place_look, METH_FASTCALL, "look(event_id, deadline) -> what the next message announces, or None."),
    METHOD("_abandon", link_abandon_method, METH_NOARGS, "abandon() -> whether a message was under way."),
    METHOD("_close", link_close_method, METH_NOARGS, "close(): let the segments go."),
    {NULL, NULL, 0, NULL},
};

static PyMemberDef recv_members[] = {
    {"head", T_ULONGLONG, offsetof(LinkEnd, position), READONLY, "The next slot to read."},
    {"is_retired", T_BOOL, offsetof(LinkEnd, is_retired), 0, "Open again before the next message."},
    COUNTER(num_drops),
    COUNTERS,
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot recv_slots[] = {
    {Py_tp_dealloc, link_dealloc},
    {Py_tp_methods, recv_methods},
    {Py_tp_members, recv_members},
    {Py_tp_doc, "The receiving end of a point-to-point link."},
    {0, NULL},
};

PyType_Spec recv_end_spec = {
    .name = "bus.memory._native.RecvEnd",
    .basicsize = sizeof(LinkEnd),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = recv_slots,
};
