/* How an end of A2E/E2A waits: poll a word by the ways that have paid so far, then sleep. As in _collectives_group.c, for
 * one word instead of a group's cells. The order of every word stands in bus/README.md, "Memory order". */
#include "_relay.h"

#define PROBE_MAX 64 /* an expert rank's idle beats are lost polls, and must not put off the first that would win */
#define SPIN_ROUNDS 8          /* half of what it takes to switch to another process and back */
#define YIELD_NS_MAX 4000000LL /* waits that take longer gain little from being polled for */
#define POLL_GAIN_NS 60000LL   /* what a wait that yields end wins against sleeping */

void
waiter_init(waiter_t *waiter, int64_t yield_ns)
{
    waiter->yield_ns = yield_ns;
    waiter->relax = waiter->yield = UNTRIED;
}

/* ---------------------------------------------------------------- polling */

static inline int
is_over(const awaited_t *awaited)
{
    if (awaited->cell != NULL) {
        return has_news(awaited->cell, awaited->word);
    }
    return __atomic_load_n(&awaited->bell[BELL_SEQ], __ATOMIC_ACQUIRE) != awaited->seq; /* SYNC: word */
}

void
learn_duration(waiter_t *waiter, int64_t duration)
{
    duration_learn(&waiter->typical_ns, duration, 2 * YIELD_NS_MAX);
}

static int
poll_relaxing(const awaited_t *awaited, int rounds)
{
    for (int round = 0; round < rounds; round++) {
        cpu_relax();
        if (is_over(awaited)) {
            return 1;
        }
    }
    return 0;
}

/* What yields of all ends of this process have cost. */
static yield_account_t yields = NO_DEBT;

/* Ranks that may want a core. Of the own kind, which are not mapped, as large a part as of the other. */
static long
num_awake(const crowd_t *crowd)
{
    long mapped = 0, awake = 0;
    for (Py_ssize_t i = 0; i < crowd->num_peers; i++) {
        const char *base = crowd->peers[i].base;
        mapped += base != NULL;
        awake += base != NULL && __atomic_load_n((uint32_t *)(base + DOORBELL_OFFSET) + BELL_SLEEPERS, __ATOMIC_RELAXED) == 0;
    }
    return awake + (mapped > 0 ? (long)crowd->num_own * awake / mapped : 0);
}

/* Poll and give the core away in between; whether that ended the wait. *won = 0: it ended, or might have ended, the wait
 * too late, since others want the core. */
static int
poll_yielding(const waiter_t *waiter, const crowd_t *crowd, const awaited_t *awaited, int64_t until, int *won)
{
    int64_t begin = now_ns(), now = begin, burst = burst_of(waiter->typical_ns, waiter->yield_ns, YIELD_NS_MAX);
    *won = 0;
    while (now - begin <= burst && now < until) {
        int64_t last = now;
        if (is_over(awaited) || (!waiter->is_shared && poll_relaxing(awaited, SPIN_ROUNDS))) {
            *won = 1;
            return 1;
        }
        sched_yield();
        now = now_ns();
        /* The other ranks may have computed as long. */
        if (now - last >= LATE_NS && has_too_many_runnable(num_awake(crowd))) {
            account_late_yield(&yields, now, now - last);
            return is_over(awaited);
        }
    }
    return 0;
}

/* Whether yields are left out of this wait, beside threads that compute. */
static int
is_crowded(waiter_t *waiter)
{
    int is_crowded = account_get(&yields.until) != 0 && account_is_crowded(&yields, now_ns());
    if (waiter->was_crowded && !is_crowded) {
        waiter->relax = waiter->yield = UNTRIED; /* what was learned meanwhile is about sleepers */
    }
    waiter->was_crowded = is_crowded;
    return is_crowded;
}

int
poll_for(waiter_t *waiter, const crowd_t *crowd, const awaited_t *awaited, int64_t until)
{
    if (is_over(awaited)) {
        return 1;
    }
    waiter->waits++;
    if (waiter->yield_ns == 0) {
        return 0;
    }
    int may_yield = !is_crowded(waiter);
    if (!waiter->is_shared && habit_pays(&waiter->relax, waiter->waits)) {
        int won = poll_relaxing(awaited, RELAX_ROUNDS);
        habit_learn(&waiter->relax, waiter->waits, won, PROBE_MAX);
        if (won) {
            return 1;
        }
    }
    if (may_yield && habit_pays(&waiter->yield, waiter->waits)) {
        int won, is_over = poll_yielding(waiter, crowd, awaited, until, &won);
        habit_learn(&waiter->yield, waiter->waits, won, PROBE_MAX);
        if (won) {
            account_won_poll(&yields, POLL_GAIN_NS);
        }
        return is_over;
    }
    return 0;
}

/* ---------------------------------------------------------------- sleeping */

void
mark_asleep(uint32_t *bell)
{
    __atomic_fetch_add(&bell[BELL_SLEEPERS], 1, __ATOMIC_SEQ_CST); /* SYNC: bell-quiet, SYNC: doorbell */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);                       /* SYNC: bell-quiet */
}

void
mark_awake(uint32_t *bell)
{
    __atomic_fetch_sub(&bell[BELL_SLEEPERS], 1, __ATOMIC_SEQ_CST); /* only the waiter takes its own mark away */
}

int
sleep_for(waiter_t *waiter, uint32_t *bell, uint32_t seen, uint32_t rings, int64_t until)
{
    struct timespec at = {.tv_sec = until / NS_PER_S, .tv_nsec = until % NS_PER_S};
    int error = 0, is_patient = rings > 1;
    waiter->sleeps++;
    if (is_patient) {
        __atomic_store_n(&bell[BELL_WAKE_AT], seen + rings, __ATOMIC_SEQ_CST);
        __atomic_store_n(&bell[BELL_PATIENT], 1, __ATOMIC_SEQ_CST);
    }
    while (!error) {
        uint32_t seq = __atomic_load_n(&bell[BELL_SEQ], __ATOMIC_SEQ_CST); /* SYNC: doorbell */
        if ((int32_t)(seq - (seen + rings)) >= 0 || num_alarms(bell) != waiter->alarms_seen) {
            break;
        }
        if (syscall(SYS_futex, bell, FUTEX_WAIT_BITSET, seq, &at, NULL, FUTEX_BITSET_MATCH_ANY) < 0 &&
            errno != EAGAIN) {
            error = errno;
        }
    }
    if (is_patient) {
        __atomic_store_n(&bell[BELL_PATIENT], 0, __ATOMIC_SEQ_CST);
    }
    return !error;
}
