/* One rank's end of dispatch/combine: sizes, offsets, and what each microbatch keeps from dispatch to combine. */
#ifndef XDS_COLLECTIVES_EXCHANGE_H
#define XDS_COLLECTIVES_EXCHANGE_H

#include "_collectives_group.h"
#include "_collectives_rows.h"

#define LANES 3 /* of a microbatch: dispatch twice, combine once */
#define LANE_COMBINE COUNT_LANES
#define TOP_K_MAX 64

/* How far a microbatch's exchange has come. */
enum { PHASE_NONE, PHASE_STAGED, PHASE_COUNTED, PHASE_PULLED, PHASE_ANSWERED };

/* What a call returns instead of a count; see bus/xccl/dispatch.py. */
enum { STATUS_REFUSED = -1, STATUS_WAITING = -2, STATUS_MOVED_ON = -3, STATUS_CORRUPT = -4 };

typedef struct {
    Py_buffer rows;   /* result rows, [pairs_max, hidden] float32 or int8; rows.obj == NULL: not bound */
    Py_buffer scales; /* [pairs_max] float32, bound where INT8 rows are delivered as they come */
    uint64_t event_id;
    Py_ssize_t num_tokens, num_pairs;
    uint64_t num_sent; /* dispatches so far: their parity picks the lane */
    int phase;
    int32_t *topk, *position; /* [max_tokens, top_k] */
    int32_t *starts;          /* [num_experts + 1] first own pair of each expert */
    int32_t *counts;          /* [num_local] rows received for each local expert */
    uint64_t *found;          /* [num_ranks, 2] what each rank announced or answered */
    uint8_t *state;           /* [num_ranks] */
} batch_t;

typedef struct {
    PyObject_HEAD
    group_t group;
    batch_t *batches;
    int32_t *scratch;  /* [num_ranks, num_local + 1] */
    int32_t *row_at;   /* [num_ranks, num_local] where the next row of a source and expert goes */
    Py_ssize_t max_tokens, top_k, hidden, num_local, num_experts, num_microbatches, pairs_max, row_bytes;
    int int8, delivers_int8;
    Py_ssize_t block_bytes, x_at, x_scale_at, starts_at, pair_row_at, y_start_at, y_scale_at, y_at;
    Py_ssize_t culprit; /* the rank that a status is about */
    uint64_t dispatches, combines, rows_sent, rows_received;
} Exchange;

static inline char *
block_of(const Exchange *self, Py_ssize_t rank, Py_ssize_t microbatch)
{
    const peer_t *peer = &self->group.peers[rank];
    return peer->base + peer->managed + microbatch * self->block_bytes;
}

/* Counting sort of (token, slot) pairs by expert; see _collectives_pull.c. */
Py_ssize_t route_pairs(const int32_t *topk_idx, Py_ssize_t num_slots, Py_ssize_t top_k, Py_ssize_t num_experts,
                       int32_t *next, int32_t *position, int32_t *starts, int32_t *pair_row);

/* _collectives_pull.c: the steps that move rows. They need no GIL. */
int exchange_stage(Exchange *self, Py_ssize_t microbatch, const float *x);
void exchange_put_rows(const Exchange *self, char *rows, float *scales, const float *src, Py_ssize_t num_rows);
Py_ssize_t exchange_pull(Exchange *self, Py_ssize_t microbatch);
Py_ssize_t exchange_reduce(Exchange *self, Py_ssize_t microbatch, const float *weights, float *out);

/* _collectives_dispatch.c: methods. */
PyObject *Exchange_stage(Exchange *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *Exchange_announce(Exchange *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *Exchange_receive(Exchange *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *Exchange_dispatch(Exchange *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *Exchange_combine(Exchange *self, PyObject *const *args, Py_ssize_t nargs);

#endif
