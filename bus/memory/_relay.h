/* What the two ends of A2E/E2A share: the geometry of blocks and cells, mapped peers, stamped cells, waiting.
 *
 * bus/xccl/relay_layout.py draws every block and cell; the numbers come from there and are checked here once. Nothing
 * that is read from a peer is trusted: counts, starts and row numbers are copied once, then checked, then used.
 */
#ifndef XDS_RELAY_H
#define XDS_RELAY_H

#include "_collectives_rows.h"

#define CELL_STRIDE 64
#define DOORBELL_OFFSET 128
#define COUNTER_BITS 40
#define INCARNATION_MASK 0xFFFFFFULL
#define FAILED (1ULL << 63)
#define PROBE_EVERY 64 /* a burst that has shrunk to nothing is tried again once in so many waits */
#define SLOTS_MAX 64

typedef struct {
    Py_ssize_t rank, num_attention, num_experts, rows_max, num_slots, hidden, num_microbatches;
    int int8;
    Py_ssize_t domain_ranks, domain_seats, num_seats;
    Py_ssize_t source_bytes, x_scale_at, starts_at, pair_row_at, pair_expert_at;
    Py_ssize_t result_bytes, y_scale_at, seat_sources_at, seat_results_at;
    int delivers_int8; /* to the experts, as it travels */
} geometry_t;

typedef struct {
    Py_buffer view;
    char *base; /* NULL: not connected */
    Py_ssize_t cells, managed;
    uint64_t incarnation;
    int absent; /* it is known not to live: nothing is sent there until the address table says otherwise */
} peer_t;

/* How long to poll before sleeping; learned as in memory/wait.py. */
typedef struct {
    int64_t spin_ns, spin_ns_max;
    uint64_t waits, sleeps;
} waiter_t;

/* ---------------------------------------------------------------- geometry */

static inline Py_ssize_t
pairs_max(const geometry_t *g)
{
    return g->rows_max * g->num_slots;
}

static inline Py_ssize_t
row_bytes(const geometry_t *g)
{
    return g->int8 ? g->hidden : 4 * g->hidden;
}

/* Whether rows are INT8 on their way and float32 at the experts. */
static inline int
widens(const geometry_t *g)
{
    return g->int8 && !g->delivers_int8;
}

static inline Py_ssize_t
trampoline_of(const geometry_t *g, Py_ssize_t attention)
{
    return attention % g->domain_ranks % g->num_experts;
}

static inline Py_ssize_t
seat_of(const geometry_t *g, Py_ssize_t attention)
{
    return attention / g->domain_ranks * g->domain_seats + attention % g->domain_ranks / g->num_experts;
}

/* The attention rank at a seat of trampoline `expert`, or >= num_attention: nobody. */
static inline Py_ssize_t
guest_at(const geometry_t *g, Py_ssize_t expert, Py_ssize_t seat)
{
    Py_ssize_t place = seat % g->domain_seats * g->num_experts + expert;
    return place < g->domain_ranks ? seat / g->domain_seats * g->domain_ranks + place : g->num_attention;
}

static inline Py_ssize_t
attention_cells(const geometry_t *g)
{
    return (g->num_experts + 1) * g->num_microbatches;
}

static inline Py_ssize_t
expert_cells(const geometry_t *g)
{
    return (2 * g->num_attention + g->num_seats + g->num_experts * g->num_seats) * g->num_microbatches;
}

static inline Py_ssize_t
attention_bytes(const geometry_t *g)
{
    return g->num_microbatches * g->source_bytes;
}

static inline Py_ssize_t
expert_bytes(const geometry_t *g)
{
    return g->seat_results_at + g->num_seats * g->num_microbatches * g->result_bytes;
}

int parse_geometry(PyObject *tuple, geometry_t *g);

/* ---------------------------------------------------------------- peers */

static inline char *
managed_at(const peer_t *peer, Py_ssize_t offset)
{
    return peer->base + peer->managed + offset;
}

static inline uint64_t *
cell_at(const peer_t *peer, Py_ssize_t index)
{
    return (uint64_t *)(peer->base + peer->cells + index * CELL_STRIDE);
}

static inline int
stamped_by(uint64_t word, uint64_t incarnation)
{
    return word >> COUNTER_BITS == (incarnation & INCARNATION_MASK);
}

/* args: buf, incarnation, cells_offset, managed_offset of a segment that must hold so many cells and bytes. */
int open_peer(PyObject *const *args, Py_ssize_t num_cells, Py_ssize_t num_bytes, peer_t *peer);
void drop_peer(peer_t *peer);
uint64_t push_cell(const peer_t *peer, Py_ssize_t cell, uint64_t incarnation, uint64_t *writes, uint64_t event_id,
                   uint64_t w2, uint64_t w3);
int parse_index(PyObject *object, const char *name, Py_ssize_t limit, Py_ssize_t *out);

/* ---------------------------------------------------------------- waiting */

/* Poll, then sleep, until the doorbell differs from `seen` or until `until`. `rings` is how many rings the waiter lacks: it
 * need not be woken before. Returns 1 when it differs, 0 at the time limit or after a signal. Call without the GIL. */
int await_ring(waiter_t *waiter, uint32_t *bell, uint32_t seen, uint32_t rings, int64_t until);

extern PyType_Spec attention_end_spec, expert_end_spec;

#endif
