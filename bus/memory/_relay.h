/* What the two ends of A2E/E2A share: the geometry of blocks and cells, mapped peers, stamped cells, waiting.
 *
 * bus/xccl/relay_layout.py draws every block and cell; the numbers come from there and are checked here once. Nothing
 * that is read from a peer is trusted: counts, starts and row numbers are copied once, then checked, then used.
 */
#ifndef XDS_RELAY_H
#define XDS_RELAY_H

#include "_collectives_rows.h"
#include "_burst.h" /* after Python.h */

#define CELL_STRIDE 64
#define DOORBELL_OFFSET 128
#define COUNTER_BITS 40
#define INCARNATION_MASK 0xFFFFFFULL
#define FAILED (1ULL << 63)
#define PLACE_AT 32 /* u32 behind a direct cell of microbatch 0: 1 + the core on which its writer last polled */
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

typedef struct {
    habit_t relax, yield;
    int64_t yield_ns;   /* burst of yielding where nothing better is known; 0 = sleep at once */
    int64_t typical_ns; /* how long waits take, a moving average */
    int was_crowded;    /* the last wait left yields out */
    int is_shared;      /* another rank was last seen on this core: a pause would hold it up */
    uint32_t place;     /* 1 + the core on which this rank last polled, as it was told to peers */
    int64_t spread_at, spread_ns; /* when to count ranks, how long after that again */
    uint64_t waits, sleeps, moves;
    uint32_t alarms_seen; /* of the own doorbell, before peers' owner locks were last looked at */
    int must_look;        /* a peer was mapped since */
} waiter_t;

/* Whether a cell was written since its w0 was `seen`. One that is being written is none yet: its writer may have died. */
static inline int
has_news(const uint64_t *cell, uint64_t seen)
{
    uint64_t word = __atomic_load_n(&cell[0], __ATOMIC_RELAXED); /* `load_cell` follows */
    return word != seen && word != 0;
}

/* What is polled: a cell whose w0 differs from `word`, or, without a cell, a doorbell whose seq differs from `seq`. */
typedef struct {
    const uint64_t *cell;
    uint64_t word;
    const uint32_t *bell;
    uint32_t seq;
} awaited_t;

/* Who shares the cores: ranks of the own kind, and those of the other kind, which are mapped. */
typedef struct {
    const peer_t *own, *peers;
    Py_ssize_t num_own, num_peers;
    int makes_up; /* the own kind evens out what the other leaves uneven */
} crowd_t;

enum { RING_ALWAYS, RING_SLEEPERS };

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
/* Write a cell at `peer` and ring: expert ranks always, attention ranks, which poll their cells, if they may sleep. */
uint64_t push_cell(const peer_t *peer, Py_ssize_t cell, uint64_t incarnation, uint64_t *writes, uint64_t event_id,
                   uint64_t w2, uint64_t w3, int how);
int parse_index(PyObject *object, const char *name, Py_ssize_t limit, Py_ssize_t *out);

/* ---------------------------------------------------------------- waiting */

/* All without the GIL. `yield_ns`: how long to yield the core at least, 0 = never poll. */
void waiter_init(waiter_t *waiter, int64_t yield_ns);

/* Poll as long as that pays; returns whether it is there. */
int poll_for(waiter_t *waiter, const crowd_t *crowd, const awaited_t *awaited, int64_t until);

/* Note how long a wait took; a long one says little more than that it was long. */
void learn_duration(waiter_t *waiter, int64_t duration);

/* Whoever looks for news between these two, finds none and sleeps is rung for when some come. */
void mark_asleep(uint32_t *bell);
void mark_awake(uint32_t *bell);

/* Sleep until `rings` rings have come after `seen`; 0 at the time limit or after a signal. Between the marks. An alarm
 * that is not among `alarms_seen` ends it, too. */
int sleep_for(waiter_t *waiter, uint32_t *bell, uint32_t seen, uint32_t rings, int64_t until);

/* _relay_spread.c: say on which core this rank polls, and now and then, when too many ranks share it, move. */
void spread(waiter_t *waiter, const crowd_t *crowd, const geometry_t *g);

/* Tell a peer that has just been mapped. */
void say_place(const crowd_t *crowd, const geometry_t *g, const peer_t *peer, uint32_t place);

extern PyType_Spec attention_end_spec, expert_end_spec;

#endif
