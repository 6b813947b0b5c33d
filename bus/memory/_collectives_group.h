/* A group of ranks whose segments are mapped: cells, doorbells, and waiting for several ranks at once. */
#ifndef XDS_COLLECTIVES_GROUP_H
#define XDS_COLLECTIVES_GROUP_H

#include "_collectives.h"
#include "_burst.h" /* after Python.h */

#define COUNTER_BITS 40
#define COUNTER_MASK ((1ULL << COUNTER_BITS) - 1)

#define COUNT_LANES 2           /* a rank announces on these in turn, beginning at a lane that the caller names */
#define WITHDRAWN (1ULL << 62) /* in w2 of an announcement: its writer has given that event up */

#define PLACE_OFFSET 264 /* u32: 1 + the core on which the owner of the segment waits, 0 = not known */

/* What a rank is to a waiter. */
#define ARRIVED 0
#define AWAITED 1
#define MOVED_ON 2

typedef struct {
    Py_buffer view;
    char *base; /* NULL: not connected */
    Py_ssize_t cells, managed;
    uint64_t incarnation;
    int is_told; /* a cell was written there since the last ring */
} peer_t;

typedef struct {
    peer_t *peers;
    Py_ssize_t rank, num_ranks, num_lanes, num_connected;
    Py_ssize_t shared_bytes; /* of each segment, from `managed` on */
    uint64_t writes, waits, relax_wins, yield_wins, sleeps, moves;
    int64_t yield_ns; /* burst of yielding where nothing better is known */
    int64_t look_ns;      /* how long to wait until the next look at owner locks */
    int64_t poll_ns;      /* where that begins */
    uint32_t alarms_seen; /* alarms before the last look at owner locks */
    int must_look;        /* a rank was mapped since */
    int64_t *typical_ns; /* [num_lanes] how long waits for cells of a lane take, a moving average */
    habit_t relax, yield;
    int was_crowded;   /* the last wait left yields out */
    uint32_t place;    /* what was last stored at PLACE_OFFSET */
    int64_t spread_at, spread_ns; /* when to look at the places of all ranks, how long after that again */
    int busy; /* a call has released the GIL */
} group_t;

/* 0, or -1 with an exception. `shared_bytes` from its managed offset on must lie in every segment. */
int group_init(group_t *group, Py_ssize_t rank, Py_ssize_t num_ranks, Py_ssize_t num_lanes, Py_ssize_t shared_bytes,
               int64_t yield_ns, int64_t poll_ns);
void group_clear(group_t *group);

/* Methods `set_peer(rank, buf, incarnation, cells_offset, managed_offset)` and `drop_peer(rank)`. */
PyObject *group_set_peer(group_t *group, PyObject *const *args, Py_ssize_t nargs);
PyObject *group_drop_peer(group_t *group, PyObject *const *args, Py_ssize_t nargs);

/* Every method begins here: the object is whole, no other thread is inside, and all ranks are connected if need be. */
int group_enter(const group_t *group, const char *name, Py_ssize_t given, Py_ssize_t wanted, int all);

/* Write the own cell of `lane` at `rank`. Returns the stamp. `group_ring` must follow. */
uint64_t group_tell(group_t *group, Py_ssize_t rank, Py_ssize_t lane, uint64_t w1, uint64_t w2, uint64_t w3);

/* Ring at all ranks that were told something since the last ring. */
void group_ring(group_t *group);

/* Wait until no rank is AWAITED in `state`, one has MOVED_ON, `deadline` has come, or owner locks should be looked at:
 * after `poll_ns`, in vain twice that, ..., and at once when this process was told of a death.
 *
 * A rank has arrived when its cell on one of `num_lanes` lanes from `lane` on shows `event_id`; found[2 * rank] and
 * found[2 * rank + 1] are w2 and w3. Returns how many are still awaited, or -1 - rank of the first that moved on. The GIL
 * is not needed. */
Py_ssize_t group_await(group_t *group, Py_ssize_t lane, int num_lanes, uint64_t event_id, uint8_t *state,
                       uint64_t *found, int64_t deadline);

/* The same for answers on lane `counts` + COUNT_LANES. When it ends in vain, a rank has MOVED_ON as well if its
 * announcements, from lane `counts` on, say that no answer will come. */
Py_ssize_t group_await_answers(group_t *group, Py_ssize_t counts, uint64_t event_id, uint8_t *state, uint64_t *found,
                               int64_t deadline);

/* An announcement of `rank`, from lane `counts` on, still has these w1, w2 and w3. */
int group_still_says(const group_t *group, Py_ssize_t rank, Py_ssize_t counts, uint64_t event_id, const uint64_t *found);

/* _collectives_spread.c: say on which core this rank runs, and now and then, when too many ranks of the group share it,
 * move to one with fewer. */
void group_spread(group_t *group, int64_t now);

/* The cell that `writer` writes in `owner`'s metadata. */
static inline uint64_t *
group_cell(const group_t *group, Py_ssize_t owner, Py_ssize_t writer, Py_ssize_t lane)
{
    const peer_t *peer = &group->peers[owner];
    return (uint64_t *)(peer->base + peer->cells + (writer * group->num_lanes + lane) * CELL_STRIDE);
}

/* The i-th other rank: each begins with its right neighbour, so that not all of them turn to rank 0 first. */
static inline Py_ssize_t
group_other(const group_t *group, Py_ssize_t i)
{
    Py_ssize_t rank = group->rank + i;
    return rank < group->num_ranks ? rank : rank - group->num_ranks;
}

/* 1 + the core on which `rank` last waited, 0 = not known. */
static inline uint32_t
group_place(const group_t *group, Py_ssize_t rank)
{
    return __atomic_load_n((uint32_t *)(group->peers[rank].base + PLACE_OFFSET), __ATOMIC_RELAXED);
}

static inline int32_t
load_count(const int32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED); /* read once: a peer may change it behind our back */
}

#endif
