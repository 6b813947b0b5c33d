/* The attention rank's end: what its life (_relay_attention.c), sending (_relay_attention_send.c) and receiving
 * (_relay_attention_recv.c) share. */
#ifndef XDS_RELAY_ATTENTION_H
#define XDS_RELAY_ATTENTION_H

#include "_relay.h"

enum { ROUTE_DIRECT = 0, ROUTE_TRAMPOLINE = 1 };

typedef struct {
    uint64_t token; /* serial number of the exchange, 0: there was none */
    uint64_t event_id;
    int open, route;
    Py_ssize_t num_rows, num_pairs, num_pending;
    int32_t *rank;     /* [rows * slots] expert rank, -1 = none */
    int32_t *position; /* [rows * slots] place among the pairs */
    int32_t *order;    /* [pairs] flat (row * slots + slot) */
    int32_t *starts;   /* [experts + 1] first pair of each expert rank */
    int32_t *pending;  /* [num_pending] expert ranks that have not answered */
    uint64_t *asked;   /* [experts] stamp of the cell that it got */
    uint64_t *life;    /* [experts] its incarnation then */
} exchange_t;

typedef struct {
    PyObject_HEAD
    geometry_t g;
    peer_t own;
    peer_t *experts;
    exchange_t *exchanges;
    uint64_t *seen; /* stamp of every own cell when it was last looked at */
    waiter_t waiter;
    uint64_t writes, tokens, dropped, bytes_staged;
    uint64_t by_route[2];
    int ready, busy;
} AttentionEnd;

static inline crowd_t
crowd_of(const AttentionEnd *self)
{
    return (crowd_t){&self->own, self->experts, self->g.num_attention, self->g.num_experts, 0};
}

static inline int
enter_attention(const AttentionEnd *self, const char *name, Py_ssize_t given, Py_ssize_t wanted)
{
    if (!self->ready || self->busy || self->own.base == NULL) {
        PyErr_Format(PyExc_RuntimeError, "%s: closed, or in use by another thread", name);
        return -1;
    }
    return check_count(name, given, wanted);
}

/* Export a C-contiguous array of one format. dims: the wanted shape, -1 = any. */
int take_array(PyObject *object, const char *name, char format, int ndim, const Py_ssize_t *dims, int flags,
               Py_buffer *view);

/* _relay_attention_send.c */
PyObject *AttentionEnd_send(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *AttentionEnd_count(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs);

/* _relay_attention_recv.c */
PyObject *AttentionEnd_recv(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *AttentionEnd_pending(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs);

#endif
