/* What the first record of a part announces: read, checked, refused. Its layout is in bus/xccl/message.py. */
#include "_native_ends.h"

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
int
header_parse(LinkEnd *end, const Record *record, Transfer *op, uint64_t *start)
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

/* Return the array that `_allocate` makes for the message. */
PyObject *
header_allocate(LinkEnd *end, const Transfer *op)
{
    PyObject *code = code_bytes(op), *shape = shape_tuple(op);
    PyObject *array = code == NULL || shape == NULL ? NULL : link_call(end, name_allocate, code, shape);
    Py_XDECREF(code);
    Py_XDECREF(shape);
    return array;
}

/* Raise what `_refuse(event_id, tag, extension, offset, out)` raises: it finds and names the fault. Always -1. */
int
header_refuse(LinkEnd *end, const Record *record, const Transfer *op, PyObject *out)
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

/* Whether the array that is held is the one that the message announces. */
int
header_fits(const Transfer *op)
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
