/* How an end of a link waits: polls, yields, sleep, and what it learns of them. See bus/README.md, "Doorbells". */
#include "_native_link.h"

#define POLL_GAIN_NS 3000LL   /* what a wait that polls end in time wins against sleeping */
#define BURST_NS_MAX 200000LL /* several times what it takes to wake somebody on an idle core */
#define PAUSES_PER_YIELD 8    /* polls before each yield: a yield takes longer than a line to arrive */

/* ---------------------------------------------------------------- habits */

void
link_forget_habits(LinkEnd *end)
{
    end->pause = end->yield = end->lanes = end->share = UNTRIED;
    end->was_crowded = 0;
}

/* ---------------------------------------------------------------- crowded cores */

/* What yields of all ends of this process have cost. */
static yield_account_t yields = NO_DEBT;

/* Whether yields are left out at `now`. */
int
link_is_crowded(int64_t now)
{
    return account_is_crowded(&yields, now);
}

/* ---------------------------------------------------------------- waiting */

/* Poll without giving the core away: wins when the peer runs on another core and is quick. */
static int
pause_for_news(LinkEnd *end)
{
    if (end->pause_rounds == 0 || !habit_pays(&end->pause, end->num_waits)) {
        return 0;
    }
    for (int round = 0; round < end->pause_rounds; round++) {
        if (has_news(end)) {
            end->num_pause_wins++;
            habit_learn(&end->pause, end->num_waits, 1, PROBE_MAX);
            account_won_poll(&yields, POLL_GAIN_NS);
            return 1;
        }
        cpu_relax();
    }
    habit_learn(&end->pause, end->num_waits, 0, PROBE_MAX);
    return 0;
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
    if (end->yield_ns == 0 || is_crowded || (end->may_sleep && !habit_pays(&end->yield, end->num_waits))) {
        return 0;
    }
    int64_t burst = burst_of(end->typical_ns, end->yield_ns, BURST_NS_MAX), last = start;
    int64_t until = deadline_after(start, burst + end->patience_ns);
    int num_pauses = end->pause_rounds == 0 ? 0 : PAUSES_PER_YIELD;
    until = until < deadline ? until : deadline;
    for (;;) {
        int found = has_news(end);
        int64_t now = now_ns();
        if (end->may_sleep && now - last >= LATE_NS + end->patience_ns) {
            if (has_too_many_runnable(0)) {
                account_late_yield(&yields, now, now - last);
            }
            habit_learn(&end->yield, end->num_waits, 0, PROBE_MAX);
            return found;
        }
        if (found || now >= until) {
            int won = found && now <= until;
            if (won) {
                account_won_poll(&yields, POLL_GAIN_NS);
            }
            end->num_yield_wins += (unsigned)won;
            habit_learn(&end->yield, end->num_waits, won, PROBE_MAX);
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
        duration_learn(&end->typical_ns, now_ns() - start, BURST_NS_MAX);
        if (end->num_sleeps != num_sleeps) {
            place_after_sleep(end, start);
        }
    }
    PyEval_RestoreThread(state);
    return outcome;
}
