/* How an end of a link waits: polls, yields, sleep, and what it learns of them. See bus/README.md, "Doorbells". */
#include "_native_link.h"

#include <fcntl.h>
#include <stdio.h>

#define SCORE_MAX 1024u
#define SCORE_LOW 128u /* below it a way of polling is only probed */
#define PROBE_MIN 32u  /* waits until the first probe; each lost one doubles it, up to the maximum */
#define PROBE_MAX 4096u
#define LATE_NS 700000LL        /* a yield answered so late was answered after somebody who computes */
#define POLL_GAIN_NS 3000LL     /* what a wait that polls end in time wins against sleeping */
#define DEBT_NS_MAX 24000000LL  /* the loss that is borne */
#define NO_YIELDS_NS_MIN 8000000LL
#define NO_YIELDS_NS_MAX 256000000LL
#define UNTRIED ((Habit){SCORE_MAX, PROBE_MIN, 0})
#define BURST_NS_MAX 200000LL /* several times what it takes to wake somebody on an idle core */
#define PAUSES_PER_YIELD 8 /* polls before each yield: a yield takes longer than a line to arrive */

/* ---------------------------------------------------------------- habits */

/* Note that a way was tried at the count `now`, and whether it won. */
void
link_learn(Habit *habit, uint64_t now, int won)
{
    if (won) {
        habit->score += (SCORE_MAX - habit->score) / 8;
        habit->interval = PROBE_MIN;
        return;
    }
    habit->score -= habit->score / 8;
    if (habit->score < SCORE_LOW) {
        habit->probe_at = now + habit->interval;
        habit->interval = habit->interval < PROBE_MAX ? 2 * habit->interval : PROBE_MAX;
    }
}

void
link_forget_habits(LinkEnd *end)
{
    end->pause = end->yield = end->lanes = end->share = UNTRIED;
    end->was_crowded = 0;
}

int
link_pays(const Habit *habit, uint64_t now)
{
    return habit->score >= SCORE_LOW || now >= habit->probe_at;
}

/* ---------------------------------------------------------------- crowded cores */

/* What yields have cost this process of late: the time of those that were answered late, less what polling has won
 * against sleeping. When that is too much, all ends leave yields out for a while, twice as long each time until they pay
 * again: it is about the machine. A process that yields beside others that compute loses a whole slice to them, now and
 * then; one that sleeps is preferred to them when it is woken. */
static struct {
    int64_t debt_ns, until, pause_ns;
} yields = {0, 0, NO_YIELDS_NS_MIN};

static int64_t
get(const int64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static void
set(int64_t *word, int64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}

/* Whether more threads of the machine can run than it has cores; if it does not say so, they might. A yield is answered
 * late too because a hypervisor has taken the core away, and then sleeping would be no better. */
static int
has_too_many_runnable(void)
{
    char text[64] = "";
    int fd = open("/proc/loadavg", O_RDONLY | O_CLOEXEC), num_running;
    if (fd < 0) {
        return 1;
    }
    ssize_t size = read(fd, text, sizeof text - 1);
    close(fd);
    return size <= 0 || sscanf(text, "%*s %*s %*s %d/", &num_running) != 1 ||
           num_running > sysconf(_SC_NPROCESSORS_ONLN);
}

static void
note_late_yield(int64_t now, int64_t lost)
{
    if (!has_too_many_runnable()) {
        return;
    }
    int64_t debt = get(&yields.debt_ns) + lost, pause = get(&yields.pause_ns);
    if (debt >= DEBT_NS_MAX) {
        debt = DEBT_NS_MAX / 2;
        set(&yields.until, now + pause);
        set(&yields.pause_ns, pause < NO_YIELDS_NS_MAX ? 2 * pause : pause);
    }
    set(&yields.debt_ns, debt);
}

static void
note_won_polls(void)
{
    int64_t debt = get(&yields.debt_ns);
    if (debt == 0) {
        return;
    }
    set(&yields.debt_ns, debt > POLL_GAIN_NS ? debt - POLL_GAIN_NS : 0);
    if (debt <= POLL_GAIN_NS) {
        set(&yields.pause_ns, NO_YIELDS_NS_MIN);
    }
}

/* Whether yields are left out at `now`. */
int
link_is_crowded(int64_t now)
{
    return now < get(&yields.until);
}

/* ---------------------------------------------------------------- waiting */

/* Poll without giving the core away: wins when the peer runs on another core and is quick. */
static int
pause_for_news(LinkEnd *end)
{
    if (end->pause_rounds == 0 || !link_pays(&end->pause, end->num_waits)) {
        return 0;
    }
    for (int round = 0; round < end->pause_rounds; round++) {
        if (has_news(end)) {
            end->num_pause_wins++;
            link_learn(&end->pause, end->num_waits, 1);
            note_won_polls();
            return 1;
        }
        cpu_relax();
    }
    link_learn(&end->pause, end->num_waits, 0);
    return 0;
}

/* How long to poll: several times as long as waits take in general, if that is short enough. Two ends that both sleep
 * take as long as two wake-ups; an end that gave up before the other one can have woken would never find out that
 * polling pays as soon as both do. */
static int64_t
burst_ns(const LinkEnd *end)
{
    int64_t burst = 4 * end->typical_ns < BURST_NS_MAX ? 4 * end->typical_ns : BURST_NS_MAX;
    return end->typical_ns > BURST_NS_MAX / 2 || burst < end->yield_ns ? end->yield_ns : burst;
}

/* Note how long a wait took; a long one says little more than that it was long. */
static void
learn_duration(LinkEnd *end, int64_t duration)
{
    end->typical_ns += ((duration < BURST_NS_MAX ? duration : BURST_NS_MAX) - end->typical_ns) / 8;
}

/* Poll and give the core away between polls. A yield that was answered late means that others want the core:
 * that counts as lost, even if news came meanwhile. The GIL is released. */
static int
yield_for_news(LinkEnd *end, int64_t start, int64_t deadline)
{
    int is_crowded = end->may_sleep && link_is_crowded(start);
    if (end->was_crowded && !is_crowded) {
        end->pause = end->yield = UNTRIED; /* what was learned meanwhile is about sleepers */
    }
    end->was_crowded = is_crowded;
    if (end->yield_ns == 0 || is_crowded || (end->may_sleep && !link_pays(&end->yield, end->num_waits))) {
        return 0;
    }
    int64_t until = deadline_after(start, burst_ns(end) + end->patience_ns), last = start;
    int num_pauses = end->pause_rounds == 0 ? 0 : PAUSES_PER_YIELD;
    until = until < deadline ? until : deadline;
    for (;;) {
        int found = has_news(end);
        int64_t now = now_ns();
        if (end->may_sleep && now - last >= LATE_NS + end->patience_ns) {
            note_late_yield(now, now - last);
            link_learn(&end->yield, end->num_waits, 0);
            return found;
        }
        if (found || now >= until) {
            int won = found && now <= until;
            if (won) {
                note_won_polls();
            }
            end->num_yield_wins += (unsigned)won;
            link_learn(&end->yield, end->num_waits, won);
            return found;
        }
        last = now;
        for (int i = 0; i < num_pauses && !has_news(end); i++) {
            cpu_relax();
        }
        if (has_news(end)) {
            continue;
        }
        if (end->may_sleep || end->pause_rounds == 0) {
            sched_yield();
        }
        else {
            cpu_relax();
        }
    }
}

/* Whether this process was told of a death, of the peer or another one, since the peer's lock was last looked at. */
static int
is_alarmed(const LinkEnd *end)
{
    return num_alarms(end->own_bell) != end->alarms_seen;
}

/* Sleep on the own doorbell until news, an alarm, `until`, or a signal. 1 news; 0 none yet; -1 errno. The GIL is
 * released. */
static int
sleep_for_news(LinkEnd *end, int64_t until)
{
    struct timespec time = {.tv_sec = until / NS_PER_S, .tv_nsec = until % NS_PER_S};
    uint32_t *bell = end->own_bell;
    int outcome = 0;
    uint32_t seen = __atomic_load_n(&bell[0], __ATOMIC_ACQUIRE); /* SYNC: word */
    if (has_news(end)) {
        return 1;
    }
    if (is_alarmed(end)) { /* behind `seen`: an alarm after this look has rung after it, too */
        return 0;
    }
    end->num_sleeps++;
    __atomic_fetch_add(&bell[1], 1, __ATOMIC_SEQ_CST); /* SYNC: doorbell */
    if (__atomic_load_n(&bell[0], __ATOMIC_SEQ_CST) == seen && /* SYNC: doorbell */
        syscall(SYS_futex, bell, FUTEX_WAIT_BITSET, seen, &time, NULL, FUTEX_BITSET_MATCH_ANY) < 0 &&
        errno != EAGAIN && errno != ETIMEDOUT) {
        outcome = -1;
    }
    int error = errno;
    __atomic_fetch_sub(&bell[1], 1, __ATOMIC_SEQ_CST); /* only the waiter takes its own mark away */
    errno = error;
    return outcome < 0 ? outcome : has_news(end);
}

/* Look whether the peer lives. 0: it does; 1: it does not, but there is news; -1: a Python error is set. */
static int
poll_peer(LinkEnd *end, uint64_t event_id)
{
    end->alarms_seen = num_alarms(end->own_bell); /* before the look */
    PyObject *event = PyLong_FromUnsignedLongLong(event_id);
    PyObject *error = link_call(end, name_poll, event, NULL);
    Py_XDECREF(event);
    if (error == NULL) {
        return -1;
    }
    int outcome = 0;
    if (error != Py_None) {
        outcome = has_news(end) ? 1 : -1; /* what it published before it died is still found */
        if (outcome < 0) {
            PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        }
    }
    Py_DECREF(error);
    return outcome;
}

/* Raise what is known against the peer's life: -1. Otherwise 0. */
int
link_check_peer(LinkEnd *end, uint64_t event_id)
{
    PyObject *event = PyLong_FromUnsignedLongLong(event_id);
    PyObject *error = link_call(end, name_poll, event, NULL);
    Py_XDECREF(event);
    if (error == NULL) {
        return -1;
    }
    int is_dead = error != Py_None;
    if (is_dead) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    }
    Py_DECREF(error);
    return is_dead ? -1 : 0;
}

/* Wait until the other side writes its cell. 1: it has; 0: `deadline` passed; -1: a Python error is set. */
int
link_await_news(LinkEnd *end, uint64_t event_id, int64_t deadline)
{
    end->num_waits++;
    if (pause_for_news(end)) {
        return 1; /* so short that the GIL was kept */
    }
    PyThreadState *state = PyEval_SaveThread();
    unsigned long long num_sleeps = end->num_sleeps;
    int64_t start = now_ns(), interval = end->poll_ns, poll_at = deadline_after(start, interval);
    int outcome = yield_for_news(end, start, end->may_sleep ? deadline : poll_at);
    while (outcome == 0) {
        int64_t now = now_ns();
        if (now >= deadline) {
            outcome = has_news(end);
            break;
        }
        if (now >= poll_at || is_alarmed(end)) {
            PyEval_RestoreThread(state);
            outcome = poll_peer(end, event_id);
            if (outcome != 0) {
                return outcome;
            }
            interval = now >= poll_at ? next_look(interval, end->poll_ns) : interval;
            poll_at = deadline_after(now_ns(), interval);
            state = PyEval_SaveThread();
            continue;
        }
        int64_t until = deadline < poll_at ? deadline : poll_at;
        outcome = end->may_sleep ? sleep_for_news(end, until) : yield_for_news(end, now, until);
        if (outcome < 0) {
            int error = errno;
            PyEval_RestoreThread(state);
            errno = error;
            if (error != EINTR) {
                PyErr_SetFromErrno(PyExc_OSError);
                return -1;
            }
            if (PyErr_CheckSignals() < 0) {
                return -1;
            }
            state = PyEval_SaveThread();
            outcome = 0;
        }
    }
    if (outcome == 1) {
        learn_duration(end, now_ns() - start);
        if (end->num_sleeps != num_sleeps) {
            place_after_sleep(end, start);
        }
    }
    PyEval_RestoreThread(state);
    return outcome;
}
