/* Zero-copy: `reserve` and `commit`, `peek` and `release`; arrays that lie in a slot, or in an app area.
 *
 * Making an array over a mapping takes several calls of NumPy, by far the most of a message's time. So each end keeps
 * one for every place and shape that it has seen since the link was opened, made by the method `_view`, and hands out
 * views of it, which is one call. The one that is kept never leaves this file: whoever changes shape or flags of what
 * was handed out changes that alone. Each view holds the mapping by itself, so it outlives what is kept here, which goes
 * when the link is closed or opened again; a place is an address, so a view of an earlier mapping is never found. */
#include "_native_ends.h"

#define NUM_VIEWS_MAX 64

typedef struct CachedView {
    const char *at;
    Tag tag;
    uint64_t rest[NUM_DIMS_MAX];
    PyObject *array; /* NULL = nothing is kept */
} CachedView;

/* ---------------------------------------------------------------- views */

/* Let go of all views; the mappings of this end can be closed afterwards. */
void
in_place_forget(LinkEnd *end)
{
    CachedView *views = end->views;
    size_t num_views = end->num_views;
    end->views = NULL;
    end->num_views = 0;
    end->reserved_at = 0;
    for (size_t i = 0; i < num_views; i++) {
        Py_XDECREF(views[i].array);
    }
    PyMem_Free(views);
}

void
in_place_clear(LinkEnd *end)
{
    in_place_forget(end);
    Py_CLEAR(end->plan.shape);
    Py_CLEAR(end->plan.dtype);
}

static CachedView *
cached_view(LinkEnd *end)
{
    if (end->views == NULL) {
        size_t num_views = end->num_slots < NUM_VIEWS_MAX ? end->num_slots : NUM_VIEWS_MAX;
        end->views = PyMem_Calloc(num_views, sizeof *end->views);
        if (end->views == NULL) {
            PyErr_NoMemory();
            return NULL;
        }
        end->num_views = num_views;
    }
    return &end->views[end->position % end->num_slots % end->num_views];
}

/* Return a view of the array at `at` in the own mapping, or the peer's, as `tag` and `rest` describe it. It must lie in it. */
static PyObject *
view(LinkEnd *end, int is_peers, const char *at, const Tag *tag, const uint64_t *rest)
{
    CachedView *cached = cached_view(end);
    if (cached == NULL) {
        return NULL;
    }
    if (cached->array == NULL || cached->at != at || memcmp(&cached->tag, tag, sizeof *tag) != 0 ||
        (tag->num_dims > TAG_DIMS && memcmp(cached->rest, rest, sizeof cached->rest) != 0)) {
        const char *base = is_peers ? end->peer.buf : end->own.buf;
        PyObject *made = PyObject_CallMethod((PyObject *)end, "_view", "iKy#y#", is_peers, (unsigned long long)(at - base),
                                             (const char *)tag, (Py_ssize_t)sizeof *tag, (const char *)rest,
                                             (Py_ssize_t)EXTENSION_BYTES);
        if (made == NULL) {
            return NULL;
        }
        cached->at = at;
        cached->tag = *tag;
        memcpy(cached->rest, rest, sizeof cached->rest);
        Py_XSETREF(cached->array, made);
    }
    return PyObject_GetItem(cached->array, Py_Ellipsis);
}

/* ---------------------------------------------------------------- the sender */

static int
is_shape(const Plan *plan, PyObject *shape)
{
    if (shape == plan->shape) {
        return 1;
    }
    if (!PyTuple_CheckExact(shape) || PyTuple_GET_SIZE(shape) != plan->tag.num_dims) {
        return 0;
    }
    for (int i = 0; i < plan->tag.num_dims; i++) {
        PyObject *length = PyTuple_GET_ITEM(shape, i);
        if (!PyLong_CheckExact(length)) {
            return 0;
        }
        unsigned long long value = PyLong_AsUnsignedLongLong(length);
        if (value == (unsigned long long)-1 && PyErr_Occurred()) {
            PyErr_Clear();
            return 0;
        }
        if (value != (i < TAG_DIMS ? plan->tag.shape[i] : plan->rest[i - TAG_DIMS])) {
            return 0;
        }
    }
    return 1;
}

/* `plan` is that of an array of `shape` and `dtype`. */
static inline int
is_plan(const Plan *plan, PyObject *shape, PyObject *dtype)
{
    return plan->dtype == dtype && plan->shape != NULL && is_shape(plan, shape);
}

static void
drop_plan(Plan *plan)
{
    Py_CLEAR(plan->shape);
    Py_CLEAR(plan->dtype);
}

/* Ask `_plan(shape, dtype)` how such an array travels. */
static int
make_plan(LinkEnd *end, PyObject *shape, PyObject *dtype, Plan *plan)
{
    PyObject *answer = link_call(end, name_plan, shape, dtype);
    const char *tag, *rest;
    Py_ssize_t tag_size, rest_size;
    unsigned long long num_bytes;
    if (answer == NULL) {
        return -1;
    }
    int is_good = PyArg_ParseTuple(answer, "y#y#K", &tag, &tag_size, &rest, &rest_size, &num_bytes);
    if (is_good && (tag_size != sizeof plan->tag || (rest_size != 0 && rest_size != EXTENSION_BYTES))) {
        PyErr_Format(PyExc_ValueError, "plan: tag of %zd bytes, extension of %zd", tag_size, rest_size);
        is_good = 0;
    }
    if (is_good) {
        memcpy(&plan->tag, tag, sizeof plan->tag);
        memset(plan->rest, 0, sizeof plan->rest);
        memcpy(plan->rest, rest, (size_t)rest_size);
        plan->start = (uint64_t)rest_size;
        plan->num_bytes = num_bytes;
        plan->shape = Py_NewRef(shape);
        plan->dtype = Py_NewRef(dtype);
    }
    Py_DECREF(answer);
    return is_good ? 0 : -1;
}

/* Wait for a free slot, and return the array in it. */
static PyObject *
reserve_slot(LinkEnd *end, const Plan *plan, uint64_t event_id, int64_t deadline)
{
    int is_free;
    while ((is_free = send_claim_slot(end, event_id)) == 0) {
        int news = link_await_news(end, event_id, deadline);
        if (news == 0) {
            link_error(end, STALLED, event_id, "its ring stayed full");
        }
        if (news <= 0) {
            return NULL;
        }
    }
    if (is_free < 0) {
        return NULL;
    }
    char *payload = end->slot + RECORD_BYTES;
    memcpy(payload, plan->rest, plan->start);
    PyObject *array = view(end, 1, payload + plan->start, &plan->tag, plan->rest);
    if (array != NULL) {
        end->reserved_at = end->position + 1;
        end->reserved_tag = plan->tag;
        end->reserved_bytes = plan->start + plan->num_bytes;
    }
    return array;
}

/* reserve(shape, dtype, event_id, deadline) -> an array in the next free slot. */
PyObject *
in_place_reserve(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    int64_t deadline;
    Plan fresh = {.shape = NULL};
    if (link_arguments("reserve", args, nargs, 4, 2, &event_id, &deadline) < 0) {
        return NULL;
    }
    if (!is_plan(&end->plan, args[0], args[1]) && make_plan(end, args[0], args[1], &fresh) < 0) {
        return NULL;
    }
    PyObject *array = NULL;
    if (end->op.is_active && !end->is_busy) {
        PyErr_SetString(PyExc_RuntimeError, "link: a message is under way, finish or cancel it first");
    }
    else if (link_enter(end, event_id, args[3]) == 0) {
        const Plan *plan = fresh.shape != NULL ? &fresh : &end->plan;
        if (!is_plan(plan, args[0], args[1])) {
            PyErr_SetString(PyExc_RuntimeError, "link: another thread uses it");
        }
        else if (plan->num_bytes > end->slot_bytes - plan->start) {
            PyErr_Format(PyExc_ValueError, "shape: %llu bytes do not fit a slot of %llu",
                         (unsigned long long)plan->num_bytes, (unsigned long long)(end->slot_bytes - plan->start));
        }
        else {
            if (fresh.shape != NULL) {
                Plan old = end->plan;
                end->plan = fresh;
                fresh = old;
            }
            array = reserve_slot(end, &end->plan, event_id, deadline);
        }
        end->is_busy = 0;
    }
    drop_plan(&fresh);
    return array;
}

/* commit(event_id) -> the tail at the end of the message, which is the reserved slot. Does not wait. */
PyObject *
in_place_commit(PyObject *self, PyObject *event)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    if (parse_unsigned(event, "event_id", UINT64_MAX, &event_id) < 0) {
        return NULL;
    }
    if (end->reserved_at == 0 || end->reserved_at != end->position + 1) {
        PyErr_SetString(PyExc_RuntimeError, "link: nothing is reserved");
        return NULL;
    }
    if (end->is_busy || !end->is_open || end->op.is_active) {
        PyErr_SetString(PyExc_RuntimeError, "link: no slot is claimed, or another thread uses it");
        return NULL;
    }
    end->reserved_at = 0;
    if (send_commit_slot(end, &end->reserved_tag, (uint32_t)end->reserved_bytes, 0, event_id) < 0) {
        return NULL;
    }
    end->num_messages++;
    end->num_bytes += end->reserved_bytes;
    return PyLong_FromUnsignedLongLong(end->position);
}

/* claim(event_id, deadline) -> the offset of the free slot's payload in the peer's segment, or None while the ring is full. */
PyObject *
in_place_claim(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    int64_t deadline;
    if (link_arguments("claim", args, nargs, 2, 0, &event_id, &deadline) < 0) {
        return NULL;
    }
    if (end->op.is_active && !end->is_busy) {
        PyErr_SetString(PyExc_RuntimeError, "link: a message is under way, finish or cancel it first");
        return NULL;
    }
    if (link_enter(end, event_id, args[1]) < 0) {
        return NULL;
    }
    int is_free = send_claim_slot(end, event_id);
    end->is_busy = 0;
    if (is_free < 0) {
        return NULL;
    }
    if (is_free == 0) {
        Py_RETURN_NONE;
    }
    return PyLong_FromSize_t((size_t)(end->slot + RECORD_BYTES - (char *)end->peer.buf));
}

/* Publish the claimed slot as a whole message: publish(tag, num_bytes, event_id). What was reserved in it is lost. */
PyObject *
in_place_publish(PyObject *self, PyObject *args)
{
    LinkEnd *end = (LinkEnd *)self;
    Py_buffer tag;
    unsigned long long num_bytes, event_id;
    if (!PyArg_ParseTuple(args, "y*KK", &tag, &num_bytes, &event_id)) {
        return NULL;
    }
    int outcome = -1;
    if (tag.len != sizeof(Tag) || num_bytes > end->slot_bytes) {
        PyErr_Format(PyExc_ValueError, "commit: %llu bytes in a slot of %llu, tag of %zd bytes", num_bytes,
                     (unsigned long long)end->slot_bytes, tag.len);
    }
    else if (end->is_busy || !end->is_open || end->op.is_active || send_is_full(end)) {
        PyErr_SetString(PyExc_RuntimeError, "link: no slot is claimed, or another thread uses it");
    }
    else {
        Tag copy;
        memcpy(&copy, tag.buf, sizeof copy);
        outcome = send_commit_slot(end, &copy, (uint32_t)num_bytes, 0, event_id);
        end->num_messages += outcome == 0;
        end->num_bytes += num_bytes;
    }
    PyBuffer_Release(&tag);
    if (outcome < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- the receiver */

typedef struct {
    Record record;
    int is_peers;    /* the content lies in the peer's segment, else in the own one */
    const char *at;  /* there */
    int is_whole;    /* that is all of the message, and it can be looked at */
} Found;

/* Look at the first record of the next message; left-overs are skipped. 1: it is there; 0: nothing is; -1: error. */
static int
look_ahead(LinkEnd *end, uint64_t event_id, Found *found)
{
    Transfer *op = &end->op;
    Record *record = &found->record;
    uint64_t start;
    int outcome;
    while ((outcome = recv_next_record(end, event_id, record)) == 1 && record->chunk_id != 0) {
        end->num_drops++;
        recv_release_record(end);
    }
    if (outcome <= 0) {
        return outcome;
    }
    link_answer(end);
    if (!header_parse(end, record, op, &start)) {
        return header_refuse(end, record, op, Py_None);
    }
    found->is_whole = op->tag.num_more == 0;
    found->is_peers = op->tag.kind == KIND_PULL;
    if (op->tag.kind == KIND_INLINE) {
        found->at = end->slot + RECORD_BYTES + start;
        found->is_whole &= op->num_bytes == record->num_bytes - start;
    }
    else if (op->tag.kind == KIND_READ) {
        found->at = end->own.buf;
        found->is_whole = 0; /* it is nowhere that this process could look at */
    }
    else {
        found->at = (const char *)(found->is_peers ? end->peer.buf : end->own.buf) + op->offset;
    }
    return 1;
}

/* Wait for the next message, which must be `event_id` and lie in one place. 1 or -1. */
static int
await_whole(LinkEnd *end, uint64_t event_id, int64_t deadline, Found *found)
{
    int outcome;
    while ((outcome = look_ahead(end, event_id, found)) == 0) {
        int news = link_await_news(end, event_id, deadline);
        if (news <= 0) {
            return news < 0 ? -1 : link_error(end, STALLED, event_id, "nothing arrived");
        }
    }
    if (outcome == 1 && found->record.event_id != event_id) {
        char text[24]; /* PyUnicode_FromFormat has no %llx before Python 3.12 */
        snprintf(text, sizeof text, "%#llx", (unsigned long long)found->record.event_id);
        return link_error(end, MISMATCH, event_id, "the next message is event %s", text);
    }
    if (outcome == 1 && !found->is_whole) {
        PyErr_SetString(PyExc_ValueError, "message: it has several records or parts, or lies in the sender's memory: it "
                                          "cannot be read in place");
        return -1;
    }
    return outcome;
}

/* peek(event_id, deadline) -> the next message in place, read only. */
PyObject *
in_place_peek(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    int64_t deadline;
    Found found;
    if (link_arguments("peek", args, nargs, 2, 0, &event_id, &deadline) < 0 || recv_refuse_if_active(end) < 0 ||
        link_enter(end, event_id, args[1]) < 0) {
        return NULL;
    }
    PyObject *array = NULL;
    if (await_whole(end, event_id, deadline, &found) == 1) {
        array = view(end, found.is_peers, found.at, &end->op.tag, end->op.rest);
        if (array == NULL && PyErr_ExceptionMatches(PyExc_ValueError)) {
            PyErr_Clear(); /* a dtype that NumPy does not have: the header is at fault, not the caller */
            header_refuse(end, &found.record, &end->op, Py_None);
        }
    }
    end->is_busy = 0;
    return array;
}

/* look(event_id, deadline) -> (event_id, tag, extension) of the next message, or None. Nothing waits. */
PyObject *
in_place_look(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    LinkEnd *end = (LinkEnd *)self;
    uint64_t event_id;
    int64_t deadline;
    Found found;
    if (link_arguments("look", args, nargs, 2, 0, &event_id, &deadline) < 0 || recv_refuse_if_active(end) < 0 ||
        link_enter(end, event_id, args[1]) < 0) {
        return NULL;
    }
    int outcome = look_ahead(end, event_id, &found);
    end->is_busy = 0;
    if (outcome < 0) {
        return NULL;
    }
    if (outcome == 0) {
        Py_RETURN_NONE;
    }
    return Py_BuildValue("(Ky#y#)", (unsigned long long)found.record.event_id, (const char *)&found.record.tag,
                         (Py_ssize_t)sizeof(Tag), (const char *)end->op.rest, (Py_ssize_t)EXTENSION_BYTES);
}

/* release(event_id): consume the record at the head, which was peeked at, as a whole message. */
PyObject *
in_place_release(PyObject *self, PyObject *event)
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
    recv_release_record(end);
    end->num_messages++;
    if (recv_acknowledge(end, event_id) < 0) {
        return NULL;
    }
    Py_RETURN_NONE;
}
