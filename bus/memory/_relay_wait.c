/* How an end of A2E/E2A waits: poll a word by the ways that have paid so far, then sleep. As in _collectives_group.c, for
 * one word instead of a group's cells. The order of every word stands in bus/README.md, "Memory order". */
#include "_relay.h"

#define SCORE_MAX 256
#define SCORE_LOW (SCORE_MAX / 8)
#define PROBE_MIN 32
#define PROBE_MAX 64 /* an expert rank's idle beats are lost polls, and must not put off the first that would win */
#define SPIN_ROUNDS 8          /* half of what it takes to switch to another process and back */
#define YIELD_NS_MAX 4000000LL /* waits that take longer gain little from being polled for */

void
waiter_init(waiter_t *waiter, int64_t yield_ns)
{
    waiter->yield_ns = yield_ns;
    waiter->relax = waiter->yield = (habit_t){SCORE_MAX, PROBE_MIN, 0};
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

static int
is_worth_it(const habit_t *habit, uint64_t wait)
{
    return habit->score >= SCORE_LOW || wait >= habit->probe_at;
}

static void
learn(habit_t *habit, uint64_t wait, int won)
{
    int was_low = habit->score < SCORE_LOW;
    habit->score += (won ? SCORE_MAX / 8 : 0) - habit->score / 8;
    if (habit->score >= SCORE_LOW) {
        habit->interval = PROBE_MIN;
    }
    else if (was_low && habit->interval < PROBE_MAX) {
        habit->interval *= 2;
    }
    habit->probe_at = wait + habit->interval;
}

/* How long to yield: several times as long as waits take in general, if that is short enough. A core whose processes all
 * sleep takes tens of microseconds to come back. */
static int64_t
burst_ns(const waiter_t *waiter)
{
    int64_t typical = waiter->typical_ns, burst = 4 * typical < YIELD_NS_MAX ? 4 * typical : YIELD_NS_MAX;
    return typical > YIELD_NS_MAX / 2 || burst < waiter->yield_ns ? waiter->yield_ns : burst;
}

void
learn_duration(waiter_t *waiter, int64_t duration)
{
    waiter->typical_ns += ((duration < 2 * YIELD_NS_MAX ? duration : 2 * YIELD_NS_MAX) - waiter->typical_ns) / 8;
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

/* A yield that was answered too late counts as lost: others want the core. */
static int
poll_yielding(const waiter_t *waiter, const awaited_t *awaited, int64_t until)
{
    int64_t begin = now_ns(), now = begin, burst = burst_ns(waiter);
    while (now - begin <= burst && now < until) {
        if (is_over(awaited) || (!waiter->is_shared && poll_relaxing(awaited, SPIN_ROUNDS))) {
            return 1;
        }
        sched_yield();
        now = now_ns();
    }
    return 0;
}

int
poll_for(waiter_t *waiter, const awaited_t *awaited, int64_t until)
{
    if (is_over(awaited)) {
        return 1;
    }
    waiter->waits++;
    if (waiter->yield_ns > 0 && !waiter->is_shared && is_worth_it(&waiter->relax, waiter->waits)) {
        int won = poll_relaxing(awaited, RELAX_ROUNDS);
        learn(&waiter->relax, waiter->waits, won);
        if (won) {
            return 1;
        }
    }
    if (waiter->yield_ns > 0 && is_worth_it(&waiter->yield, waiter->waits)) {
        int won = poll_yielding(waiter, awaited, until);
        learn(&waiter->yield, waiter->waits, won);
        return won;
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
