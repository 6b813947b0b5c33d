/* Spreading the ranks of a group over the cores.
 *
 * Ranks that poll are always runnable and have always run a moment ago, so the kernel may leave three of them on one
 * core and one on another for seconds; every exchange then takes as long as the fuller core. A rank that gives its core
 * away while it waits says in its own segment where it runs. Now and then it counts; if its core holds two ranks more
 * than another that it may use, the highest rank there moves: it narrows its affinity to that core, which moves it, and
 * restores it. Nothing here is needed for correctness: a word of a peer is only ever counted. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* cpu_set_t, sched_getcpu; Python.h defines it too */
#endif
#include "_collectives_group.h"

#define SPREAD_NS 250000LL      /* between two counts */
#define SPREAD_NS_MAX 64000000LL /* ... after moves that did not last */

static void
say_place(group_t *group, uint32_t place)
{
    group->place = place;
    __atomic_store_n((uint32_t *)(group->peers[group->rank].base + PLACE_OFFSET), place, __ATOMIC_RELAXED);
}

/* The allowed core with two ranks less than ours, or -1: none, or a higher rank of our core will go. */
static int
better_core(const group_t *group, uint32_t place, const cpu_set_t *allowed)
{
    uint16_t num_ranks[CPU_SETSIZE] = {0};
    for (Py_ssize_t r = 0; r < group->num_ranks; r++) {
        uint32_t other = group_place(group, r);
        if (other - 1 < CPU_SETSIZE) {
            num_ranks[other - 1]++;
            if (other == place && r > group->rank) {
                return -1;
            }
        }
    }
    int best = -1;
    for (int core = 0; core < CPU_SETSIZE; core++) {
        if (CPU_ISSET(core, allowed) && (best < 0 || num_ranks[core] < num_ranks[best])) {
            best = core;
        }
    }
    return best >= 0 && num_ranks[best] + 2 <= num_ranks[place - 1] ? best : -1;
}

void
group_spread(group_t *group, int64_t now)
{
    int core = sched_getcpu();
    if (core < 0 || core >= CPU_SETSIZE) {
        return;
    }
    if ((uint32_t)core + 1 != group->place) {
        say_place(group, (uint32_t)core + 1);
    }
    if (now < group->spread_at) {
        return;
    }
    cpu_set_t allowed, one;
    group->spread_at = now + group->spread_ns;
    if (sched_getaffinity(0, sizeof allowed, &allowed) < 0) {
        return;
    }
    int best = better_core(group, group->place, &allowed);
    if (best < 0) {
        group->spread_ns = SPREAD_NS;
        return;
    }
    group->spread_ns = group->spread_ns < SPREAD_NS_MAX ? 2 * group->spread_ns : SPREAD_NS_MAX;
    group->spread_at = now + group->spread_ns;
    CPU_ZERO(&one);
    CPU_SET(best, &one);
    if (sched_setaffinity(0, sizeof one, &one) == 0) {
        sched_setaffinity(0, sizeof allowed, &allowed);
        say_place(group, (uint32_t)best + 1);
        group->moves++;
    }
}
