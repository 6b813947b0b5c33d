/* Spreading the ranks of A2E/E2A over the cores, for the reasons that _collectives_spread.c names.
 *
 * Attention ranks map expert ranks only and the other way round, so each says where it polls beside its direct cell at
 * all peers that it has mapped: there everyone else who maps that peer can read it. The ranks of a kind are spread by
 * themselves, since attention and expert ranks work in turn; expert ranks also make up for an odd attention rank.
 * Nothing here is needed for correctness: a word of a peer is only ever counted. */
#define _GNU_SOURCE
#include "_relay.h"

#define SPREAD_NS 250000LL       /* between two counts */
#define SPREAD_NS_MAX 64000000LL /* ... after moves that did not last */
#define SPREAD_RANKS_MAX 64      /* with more, counting takes longer than it saves */

typedef struct {
    uint16_t own[CPU_SETSIZE], all[CPU_SETSIZE]; /* ranks of the own kind, of both kinds, by core */
    int is_highest;                              /* none of the own kind on this core has a higher number */
} census_t;

static inline uint32_t *
place_at(const peer_t *owner, const geometry_t *g, Py_ssize_t writer)
{
    return (uint32_t *)(owner->base + owner->cells + writer * g->num_microbatches * CELL_STRIDE + PLACE_AT);
}

void
say_place(const crowd_t *crowd, const geometry_t *g, const peer_t *peer, uint32_t place)
{
    if (crowd->num_own <= SPREAD_RANKS_MAX && peer->base != NULL) {
        __atomic_store_n(place_at(peer, g, g->rank), place, __ATOMIC_RELAXED);
    }
}

static void
say_place_to_all(waiter_t *waiter, const crowd_t *crowd, const geometry_t *g, uint32_t place)
{
    waiter->place = place;
    for (Py_ssize_t i = 0; i < crowd->num_peers; i++) {
        say_place(crowd, g, &crowd->peers[i], place);
    }
}

static void
count_ranks(const crowd_t *crowd, const geometry_t *g, uint32_t place, census_t *census)
{
    const peer_t *meeting = NULL; /* the first peer that is mapped: there the own kind says its places */
    for (Py_ssize_t i = 0; meeting == NULL && i < crowd->num_peers; i++) {
        meeting = crowd->peers[i].base != NULL ? &crowd->peers[i] : NULL;
    }
    census->is_highest = 1;
    census->own[place - 1] = census->all[place - 1] = 1;
    for (Py_ssize_t r = 0; meeting != NULL && r < crowd->num_own; r++) {
        uint32_t other = __atomic_load_n(place_at(meeting, g, r), __ATOMIC_RELAXED);
        if (r != g->rank && other - 1 < CPU_SETSIZE) {
            census->own[other - 1]++;
            census->all[other - 1]++;
            census->is_highest &= other != place || r < g->rank;
        }
    }
    for (Py_ssize_t r = 0; r < crowd->num_peers; r++) {
        uint32_t other = __atomic_load_n(place_at(crowd->own, g, r), __ATOMIC_RELAXED);
        if (other - 1 < CPU_SETSIZE) {
            census->all[other - 1]++;
        }
    }
}

/* The allowed core to which this rank should go, or -1. */
static int
better_core(const census_t *census, int here, const cpu_set_t *allowed, int makes_up)
{
    int own = -1, all = -1;
    for (int core = 0; census->is_highest && core < CPU_SETSIZE; core++) {
        if (!CPU_ISSET(core, allowed)) {
            continue;
        }
        own = own < 0 || census->own[core] < census->own[own] ? core : own;
        all = all < 0 || census->all[core] < census->all[all] ? core : all;
    }
    if (own >= 0 && census->own[own] + 2 <= census->own[here]) {
        return own;
    }
    int evens = all >= 0 && census->own[all] < census->own[here] && census->all[all] + 2 <= census->all[here];
    return makes_up && evens ? all : -1;
}

static int
move_to(int core, const cpu_set_t *allowed)
{
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    if (sched_setaffinity(0, sizeof one, &one) < 0) {
        return 0;
    }
    sched_setaffinity(0, sizeof *allowed, allowed);
    return 1;
}

void
spread(waiter_t *waiter, const crowd_t *crowd, const geometry_t *g)
{
    int core = waiter->yield_ns > 0 && crowd->num_own <= SPREAD_RANKS_MAX && crowd->num_peers <= SPREAD_RANKS_MAX
                   ? sched_getcpu()
                   : -1;
    if (core < 0 || core >= CPU_SETSIZE) {
        waiter->is_shared = 1;
        return;
    }
    if ((uint32_t)core + 1 != waiter->place) {
        say_place_to_all(waiter, crowd, g, (uint32_t)core + 1);
    }
    int64_t now = now_ns();
    if (now < waiter->spread_at) {
        return;
    }
    cpu_set_t allowed;
    census_t census = {0};
    count_ranks(crowd, g, waiter->place, &census);
    waiter->is_shared = census.all[core] > 1;
    int best = sched_getaffinity(0, sizeof allowed, &allowed) < 0
                   ? -1
                   : better_core(&census, core, &allowed, crowd->makes_up);
    if (best < 0) {
        waiter->spread_ns = SPREAD_NS;
    }
    else {
        waiter->spread_ns = waiter->spread_ns < SPREAD_NS_MAX ? 2 * waiter->spread_ns : SPREAD_NS_MAX;
        if (move_to(best, &allowed)) {
            say_place_to_all(waiter, crowd, g, (uint32_t)best + 1);
            waiter->moves++;
        }
    }
    waiter->spread_at = now + waiter->spread_ns;
}
