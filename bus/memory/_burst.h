/* How long a waiter polls before it sleeps, learned from its own waits: shared by links, groups and the ends of A2E/E2A.
 *
 * A waiter keeps a habit for each way of polling (does it win?), how long its waits take (how long a burst of yields
 * pays), and the process an account of what yields have cost beside threads that compute. See bus/README.md, "Doorbells". */
#ifndef XDS_BURST_H
#define XDS_BURST_H

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

/* ---------------------------------------------------------------- habits */

#define SCORE_MAX 1024u
#define SCORE_LOW (SCORE_MAX / 8) /* below it a way of polling is only probed */
#define PROBE_MIN 32u             /* waits until the first probe; each lost one doubles it, up to a maximum */

/* What a waiter has learned about one way of polling. */
typedef struct {
    uint32_t score;    /* moving average of how often it won, of SCORE_MAX */
    uint32_t interval; /* waits until the probe after next */
    uint64_t probe_at; /* the wait that probes next, while the score is low */
} habit_t;

#define UNTRIED ((habit_t){SCORE_MAX, PROBE_MIN, 0})

/* Whether the wait number `wait` shall poll this way. */
static inline int
habit_pays(const habit_t *habit, uint64_t wait)
{
    return habit->score >= SCORE_LOW || wait >= habit->probe_at;
}

/* Note that it did, and whether it won. */
static inline void
habit_learn(habit_t *habit, uint64_t wait, int won, uint32_t probe_max)
{
    if (won) {
        habit->score += (SCORE_MAX - habit->score) / 8;
        habit->interval = PROBE_MIN;
        return;
    }
    habit->score -= habit->score / 8;
    if (habit->score < SCORE_LOW) {
        habit->probe_at = wait + habit->interval;
        habit->interval = habit->interval < probe_max ? 2 * habit->interval : probe_max;
    }
}

/* ---------------------------------------------------------------- durations */

/* How long to yield where waits typically take `typical`: several times that if it is short enough, else `least`. Whose
 * peers sleep too needs the time of two wake-ups; who gave up before that would never find out that polling pays. */
static inline int64_t
burst_of(int64_t typical, int64_t least, int64_t most)
{
    int64_t burst = 4 * typical < most ? 4 * typical : most;
    return typical > most / 2 || burst < least ? least : burst;
}

/* Note how long a wait took; one longer than `most` says little more than that it was long. */
static inline void
duration_learn(int64_t *typical, int64_t duration, int64_t most)
{
    *typical += ((duration < most ? duration : most) - *typical) / 8;
}

/* ---------------------------------------------------------------- crowded cores */

#define LATE_NS 700000LL       /* a yield answered so late was answered after somebody who computes */
#define DEBT_NS_MAX 24000000LL /* the loss that is borne */
#define NO_YIELDS_NS_MIN 8000000LL
#define NO_YIELDS_NS_MAX 256000000LL

/* What yields have cost this process of late: the time of those that were answered late, less what polling has won
 * against sleeping. When that is too much, yields are left out for a while, twice as long each time until they pay again:
 * it is about the machine. Who yields beside threads that compute loses a whole slice to them, now and then; who sleeps
 * is preferred to them when it is woken. Threads may race for it: what is lost is an estimate's part. */
typedef struct {
    int64_t debt_ns, until, pause_ns;
} yield_account_t;

#define NO_DEBT {0, 0, NO_YIELDS_NS_MIN}

static inline int64_t
account_get(const int64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static inline void
account_set(int64_t *word, int64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

/* Whether more than `num_known` threads of the machine, and more than it has cores, can run; if it does not say so, they
 * might. A yield is answered late too because a hypervisor has taken the core away, and then sleeping would be no better. */
static inline int
has_too_many_runnable(long num_known)
{
    char text[64] = "";
    int fd = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
    long num_running, num_cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (fd < 0) {
        return 1;
    }
    ssize_t size = read(fd, text, sizeof text - 1);
    close(fd);
    return size <= 0 || sscanf(text, "%*s %*s %*s %ld/", &num_running) != 1 ||
           num_running > (num_known > num_cores ? num_known : num_cores);
}

/* A yield was answered `lost` late, at `now`. */
static inline void
account_late_yield(yield_account_t *account, int64_t now, int64_t lost)
{
    int64_t debt = account_get(&account->debt_ns) + lost, pause = account_get(&account->pause_ns);
    if (debt >= DEBT_NS_MAX) {
        debt = DEBT_NS_MAX / 2;
        account_set(&account->until, now + pause);
        account_set(&account->pause_ns, pause < NO_YIELDS_NS_MAX ? 2 * pause : pause);
    }
    account_set(&account->debt_ns, debt);
}

/* Polling ended a wait, and won `gain` against sleeping. */
static inline void
account_won_poll(yield_account_t *account, int64_t gain)
{
    int64_t debt = account_get(&account->debt_ns);
    if (debt == 0) {
        return;
    }
    account_set(&account->debt_ns, debt > gain ? debt - gain : 0);
    if (debt <= gain) {
        account_set(&account->pause_ns, NO_YIELDS_NS_MIN);
    }
}

/* Whether yields are left out at `now`. */
static inline int
account_is_crowded(const yield_account_t *account, int64_t now)
{
    return now < account_get(&account->until);
}

#endif
