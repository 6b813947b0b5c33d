/* Cells, doorbells and waiting of a group. The order of every word stands in bus/README.md, "Memory order". */
#include "_collectives_group.h"

#define PROBE_MAX 4096
#define SPIN_ROUNDS 8 /* half of what it takes to switch to another process and back */
#define YIELD_NS_MAX 4000000LL /* waits that take longer gain little from being polled for */
#define POLL_GAIN_NS 60000LL   /* what a wait that yields end wins against sleeping */

int
group_init(group_t *group, Py_ssize_t rank, Py_ssize_t num_ranks, Py_ssize_t num_lanes, Py_ssize_t shared_bytes,
           int64_t yield_ns, int64_t poll_ns)
{
    if (num_ranks < 1 || num_ranks > 1 << 20 || rank < 0 || rank >= num_ranks || yield_ns < 0) {
        PyErr_Format(PyExc_ValueError, "shape: rank %zd must be below %zd ranks", rank, num_ranks);
        return -1;
    }
    group->peers = PyMem_Calloc((size_t)num_ranks, sizeof *group->peers);
    group->typical_ns = PyMem_Calloc((size_t)num_lanes, sizeof *group->typical_ns);
    if (group->peers == NULL || group->typical_ns == NULL) {
        group_clear(group);
        PyErr_NoMemory();
        return -1;
    }
    group->rank = rank;
    group->num_ranks = num_ranks;
    group->num_lanes = num_lanes;
    group->shared_bytes = shared_bytes;
    group->yield_ns = yield_ns;
    group->poll_ns = group->look_ns = poll_ns;
    group->relax = group->yield = UNTRIED;
    return 0;
}

static void
drop_peer(group_t *group, peer_t *peer)
{
    if (peer->base != NULL) {
        peer->base = NULL;
        group->num_connected--;
        PyBuffer_Release(&peer->view);
    }
}

void
group_clear(group_t *group)
{
    for (Py_ssize_t i = 0; group->peers != NULL && i < group->num_ranks; i++) {
        drop_peer(group, &group->peers[i]);
    }
    PyMem_Free(group->peers);
    PyMem_Free(group->typical_ns);
    group->peers = NULL;
    group->typical_ns = NULL;
}

int
group_enter(const group_t *group, const char *name, Py_ssize_t given, Py_ssize_t wanted, int all)
{
    if (group->peers == NULL || group->busy) {
        PyErr_Format(PyExc_RuntimeError, "%s: in use by another thread or not initialised", name);
        return -1;
    }
    if (check_count(name, given, wanted) < 0) {
        return -1;
    }
    for (Py_ssize_t r = 0; all && group->num_connected < group->num_ranks && r < group->num_ranks; r++) {
        if (group->peers[r].base == NULL) {
            PyErr_Format(PyExc_LookupError, "rank %zd is not connected", r);
            return -1;
        }
    }
    return 0;
}

PyObject *
group_set_peer(group_t *group, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t rank, cells, managed;
    uint64_t incarnation;
    if (group_enter(group, "set_peer", nargs, 5, 0) < 0 || parse_index(args[0], "rank", group->num_ranks, &rank) < 0 ||
        parse_unsigned(args[2], "incarnation", UINT64_MAX, &incarnation) < 0 ||
        parse_index(args[3], "cells", PY_SSIZE_T_MAX / 2, &cells) < 0 ||
        parse_index(args[4], "managed", PY_SSIZE_T_MAX / 2, &managed) < 0) {
        return NULL;
    }
    Py_buffer view;
    if (PyObject_GetBuffer(args[1], &view, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    Py_ssize_t cell_bytes = group->num_ranks * group->num_lanes * CELL_STRIDE;
    if (cells < DOORBELL_OFFSET + BELL_BYTES || cells % CELL_STRIDE != 0 || managed % CELL_STRIDE != 0 ||
        ((uintptr_t)view.buf & 7) != 0 || cells + cell_bytes > managed || managed > view.len ||
        group->shared_bytes > view.len - managed) {
        PyErr_Format(PyExc_ValueError, "rank %zd: its cells and blocks do not fit its segment of %zd bytes", rank,
                     view.len);
        PyBuffer_Release(&view);
        return NULL;
    }
    drop_peer(group, &group->peers[rank]);
    group->peers[rank] = (peer_t){view, view.buf, cells, managed, incarnation, 0};
    group->num_connected++;
    group->must_look |= rank != group->rank; /* nobody has looked at its lock since it is watched */
    Py_RETURN_NONE;
}

PyObject *
group_drop_peer(group_t *group, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t rank;
    if (group_enter(group, "drop_peer", nargs, 1, 0) < 0 ||
        parse_index(args[0], "rank", group->num_ranks, &rank) < 0) {
        return NULL;
    }
    drop_peer(group, &group->peers[rank]);
    Py_RETURN_NONE;
}

static inline uint32_t *
bell_of(const group_t *group, Py_ssize_t rank)
{
    return (uint32_t *)(group->peers[rank].base + DOORBELL_OFFSET);
}

/* Ring for somebody who sleeps. */
static void
ring_sleepers(uint32_t *bell)
{
    uint32_t seq = __atomic_add_fetch(&bell[BELL_SEQ], 1, __ATOMIC_SEQ_CST); /* SYNC: doorbell, SYNC: word */
    /* A waiter for several ranks need not be woken before as many rings as it lacks ranks. */
    int patient = __atomic_load_n(&bell[BELL_PATIENT], __ATOMIC_SEQ_CST) != 0;
    if (!patient || (int32_t)(seq - __atomic_load_n(&bell[BELL_WAKE_AT], __ATOMIC_SEQ_CST)) >= 0) {
        wake_sleepers(&bell[BELL_SEQ], INT_MAX);
    }
}

uint64_t
group_tell(group_t *group, Py_ssize_t rank, Py_ssize_t lane, uint64_t w1, uint64_t w2, uint64_t w3)
{
    group->writes++;
    group->peers[rank].is_told = 1;
    uint64_t incarnation = group->peers[group->rank].incarnation & 0xFFFFFF;
    const uint64_t words[CELL_WORDS] = {incarnation << COUNTER_BITS | (group->writes & COUNTER_MASK), w1, w2, w3};
    store_cell(group_cell(group, rank, group->rank, lane), words);
    FAULT("published");
    return words[0];
}

/* A waiter that polls looks at its cells, so without a sleeper nothing is written. Either we see the sleeper's mark, or
 * the sleeper, which looks once more behind its mark, sees the cell. */
void
group_ring(group_t *group)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* SYNC: bell-quiet */
    for (Py_ssize_t i = 1; i < group->num_ranks; i++) {
        Py_ssize_t r = group_other(group, i);
        if (group->peers[r].is_told) {
            uint32_t *bell = bell_of(group, r);
            group->peers[r].is_told = 0;
            if (__atomic_load_n(&bell[BELL_SLEEPERS], __ATOMIC_RELAXED) != 0) { /* SYNC: bell-quiet */
                ring_sleepers(bell);
            }
            FAULT("rung");
        }
    }
}

/* ---------------------------------------------------------------- waiting */

/* What a waiter waits for. */
typedef struct {
    Py_ssize_t lane;
    int num_lanes;
    uint64_t event_id;
    uint8_t *state;
    uint64_t *found;
} wanted_t;

/* Look at one awaited rank's cells, lane after lane. This event withdrawn means that it gave it up. A later event means that it gave this one up only if a second look
 * does not find this one: it may have published both since the lane of this one was looked at. */
static uint8_t
look(const group_t *group, const wanted_t *wanted, Py_ssize_t rank)
{
    uint8_t state = AWAITED;
    int num_lanes = wanted->num_lanes;
    for (Py_ssize_t i = 0; i < (state == AWAITED ? num_lanes : 2 * num_lanes); i++) {
        uint64_t words[CELL_WORDS];
        int is_whole = load_cell(group_cell(group, group->rank, rank, wanted->lane + i % num_lanes), words);
        FAULT("looked");
        if (!is_whole || words[0] >> COUNTER_BITS != (group->peers[rank].incarnation & 0xFFFFFF)) {
            continue;
        }
        if (words[1] == wanted->event_id && words[2] == WITHDRAWN) {
            return MOVED_ON;
        }
        if (words[1] == wanted->event_id) {
            wanted->found[2 * rank] = words[2];
            wanted->found[2 * rank + 1] = words[3];
            return ARRIVED;
        }
        if ((int64_t)(words[1] - wanted->event_id) > 0) {
            state = MOVED_ON;
        }
    }
    return state;
}

/* Look at all awaited ranks; returns how many are awaited still, or -1 - rank of the first that moved on. */
static Py_ssize_t
look_at_all(const group_t *group, const wanted_t *wanted)
{
    Py_ssize_t moved = -1, awaited = 0;
    uint8_t *state = wanted->state;
    for (Py_ssize_t r = 0; r < group->num_ranks; r++) {
        if (state[r] == AWAITED) {
            state[r] = look(group, wanted, r);
        }
        awaited += state[r] == AWAITED;
        moved = state[r] == MOVED_ON && moved < 0 ? r : moved;
    }
    return moved >= 0 ? -1 - moved : awaited;
}

/* Whether nobody is awaited any more, or one has moved on; *rank is the first that is awaited, at or behind the given. */
static inline int
is_over(const group_t *group, const wanted_t *wanted, Py_ssize_t *rank)
{
    for (; *rank < group->num_ranks; ++*rank) {
        uint8_t *state = &wanted->state[*rank];
        if (*state == AWAITED && (*state = look(group, wanted, *rank)) == AWAITED) {
            return 0;
        }
        if (*state == MOVED_ON) {
            return 1;
        }
    }
    return 1;
}

/* Whether an awaited rank, at or behind `rank`, last waited on this core: then it cannot come while we poll here. */
static int
holds_up(const group_t *group, const wanted_t *wanted, Py_ssize_t rank)
{
    for (; rank < group->num_ranks; rank++) {
        if (wanted->state[rank] == AWAITED && group_place(group, rank) == group->place) {
            return 1;
        }
    }
    return 0;
}

/* Poll without giving the core away: pays when every awaited rank has a core of its own. */
static int
poll_relaxing(const group_t *group, const wanted_t *wanted, Py_ssize_t *rank)
{
    for (int round = 0; round < RELAX_ROUNDS; round++) {
        if (is_over(group, wanted, rank)) {
            return 1;
        }
        cpu_relax();
    }
    return 0;
}

/* Poll for a moment, if all that are awaited run on other cores; whether that ended the wait. */
static int
spin_for_others(const group_t *group, const wanted_t *wanted, Py_ssize_t *rank)
{
    if (holds_up(group, wanted, *rank)) {
        return 0;
    }
    for (int round = 0; round < SPIN_ROUNDS; round++) {
        cpu_relax();
        if (is_over(group, wanted, rank)) {
            return 1;
        }
    }
    return 0;
}

/* What yields of all groups of this process have cost. */
static yield_account_t yields = NO_DEBT;

/* Ranks of the group that do not sleep. */
static long
num_awake(const group_t *group)
{
    long num = 0;
    for (Py_ssize_t r = 0; r < group->num_ranks; r++) {
        num += __atomic_load_n(&bell_of(group, r)[BELL_SLEEPERS], __ATOMIC_RELAXED) == 0;
    }
    return num;
}

/* Poll and give the core away in between; whether that ended the wait. *won = 0: it ended, or might have ended, the wait
 * too late, since others want the core. */
static int
poll_yielding(group_t *group, const wanted_t *wanted, Py_ssize_t *rank, int64_t until, int *won)
{
    int64_t begin = now_ns(), now = begin;
    int64_t burst = burst_of(group->typical_ns[wanted->lane], group->yield_ns, YIELD_NS_MAX);
    *won = 0;
    group_spread(group, begin);
    while (now - begin <= burst && now < until) {
        int64_t last = now;
        if (is_over(group, wanted, rank) || spin_for_others(group, wanted, rank)) {
            *won = 1;
            return 1;
        }
        sched_yield();
        now = now_ns();
        /* The group's own ranks may have computed as long. */
        if (now - last >= LATE_NS && has_too_many_runnable(num_awake(group))) {
            account_late_yield(&yields, now, now - last);
            return is_over(group, wanted, rank);
        }
    }
    return 0;
}

/* Whether yields are left out of this wait, beside threads that compute. */
static int
is_crowded(group_t *group)
{
    int is_crowded = account_get(&yields.until) != 0 && account_is_crowded(&yields, now_ns());
    if (group->was_crowded && !is_crowded) {
        group->relax = group->yield = UNTRIED; /* what was learned meanwhile is about sleepers */
    }
    group->was_crowded = is_crowded;
    return is_crowded;
}

/* Poll by the ways that have paid so far; whether that ended the wait. */
static int
poll_cells(group_t *group, const wanted_t *wanted, int64_t until)
{
    Py_ssize_t rank = 0;
    group->waits++;
    if (group->yield_ns == 0) {
        return 0;
    }
    int may_yield = !is_crowded(group);
    if (habit_pays(&group->relax, group->waits) && !holds_up(group, wanted, 0)) {
        int won = poll_relaxing(group, wanted, &rank);
        habit_learn(&group->relax, group->waits, won, PROBE_MAX);
        group->relax_wins += (uint64_t)won;
        if (won) {
            return 1;
        }
    }
    if (may_yield && habit_pays(&group->yield, group->waits)) {
        int won, is_over = poll_yielding(group, wanted, &rank, until, &won);
        habit_learn(&group->yield, group->waits, won, PROBE_MAX);
        group->yield_wins += (uint64_t)won;
        if (won) {
            account_won_poll(&yields, POLL_GAIN_NS);
        }
        return is_over;
    }
    return 0;
}

/* Whether this process was told of a death, or maps another rank, since owner locks were last looked at. */
static int
should_look(const group_t *group)
{
    return group->must_look || num_alarms(bell_of(group, group->rank)) != group->alarms_seen;
}

/* Sleep until `awaited` rings have come after `seen`, or an alarm; returns whether a signal came. */
static int
sleep_for(const group_t *group, uint32_t seen, Py_ssize_t awaited, int64_t until)
{
    uint32_t *bell = bell_of(group, group->rank);
    struct timespec at = {.tv_sec = until / NS_PER_S, .tv_nsec = until % NS_PER_S};
    __atomic_store_n(&bell[BELL_WAKE_AT], seen + (uint32_t)awaited, __ATOMIC_SEQ_CST);
    __atomic_store_n(&bell[BELL_PATIENT], 1, __ATOMIC_SEQ_CST);
    int error = 0;
    while (!error) {
        uint32_t seq = __atomic_load_n(&bell[BELL_SEQ], __ATOMIC_SEQ_CST); /* SYNC: doorbell */
        if ((Py_ssize_t)(seq - seen) >= awaited || should_look(group)) {
            break;
        }
        if (syscall(SYS_futex, bell, FUTEX_WAIT_BITSET, seq, &at, NULL, FUTEX_BITSET_MATCH_ANY) < 0 &&
            errno != EAGAIN) {
            error = errno;
        }
    }
    __atomic_store_n(&bell[BELL_PATIENT], 0, __ATOMIC_SEQ_CST);
    return error == EINTR;
}

/* Mark this waiter as asleep, look again, and sleep until each awaited rank has rung, which it does once it sees the
 * mark. Returns how many are awaited, or -1 - rank of one that moved on; *is_signalled = a signal came. */
static Py_ssize_t
sleep_for_cells(group_t *group, const wanted_t *wanted, int64_t until, int *is_signalled)
{
    uint32_t *bell = bell_of(group, group->rank);
    __atomic_fetch_add(&bell[BELL_SLEEPERS], 1, __ATOMIC_SEQ_CST); /* SYNC: bell-quiet */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);                       /* SYNC: bell-quiet */
    uint32_t seen = __atomic_load_n(&bell[BELL_SEQ], __ATOMIC_ACQUIRE); /* SYNC: word */
    Py_ssize_t awaited = look_at_all(group, wanted);
    if (awaited > 0) {
        group->sleeps++;
        *is_signalled = sleep_for(group, seen, awaited, until);
    }
    __atomic_fetch_sub(&bell[BELL_SLEEPERS], 1, __ATOMIC_SEQ_CST); /* only the waiter takes its own mark away */
    return awaited;
}

/* The caller looks at owner locks now, if the wait was in vain: note what that look covers, and when the next is due. */
static void
note_looks(group_t *group, int in_vain, int is_late)
{
    if (in_vain) {
        group->alarms_seen = num_alarms(bell_of(group, group->rank));
        group->must_look = 0;
        group->look_ns = is_late ? next_look(group->look_ns, group->poll_ns) : group->look_ns;
    }
    else {
        group->look_ns = group->poll_ns;
    }
}

Py_ssize_t
group_await(group_t *group, Py_ssize_t lane, int num_lanes, uint64_t event_id, uint8_t *state, uint64_t *found,
            int64_t deadline)
{
    const wanted_t wanted = {lane, num_lanes, event_id, state, found};
    int64_t begin = now_ns(), look_at = deadline_after(begin, group->look_ns);
    int64_t until = look_at < deadline ? look_at : deadline;
    int is_signalled = 0, looks = 0;
    for (;;) {
        Py_ssize_t awaited = look_at_all(group, &wanted);
        int64_t now = now_ns();
        if (awaited <= 0 || now >= until || is_signalled || looks) {
            if (awaited <= 0 || now - begin > group->typical_ns[lane]) {
                duration_learn(&group->typical_ns[lane], now - begin, 2 * YIELD_NS_MAX);
            }
            note_looks(group, awaited > 0, now >= look_at);
            return awaited; /* after a signal Python runs its handlers and calls again */
        }
        if (!poll_cells(group, &wanted, until)) {
            sleep_for_cells(group, &wanted, until, &is_signalled);
            looks = should_look(group);
        }
    }
}

/* Whether a rank has announced a later event, or withdrawn this one. */
static int
has_left(const group_t *group, Py_ssize_t rank, Py_ssize_t counts, uint64_t event_id)
{
    for (Py_ssize_t lane = counts; lane < counts + COUNT_LANES; lane++) {
        uint64_t words[CELL_WORDS];
        if (load_cell(group_cell(group, group->rank, rank, lane), words) &&
            words[0] >> COUNTER_BITS == (group->peers[rank].incarnation & 0xFFFFFF) &&
            ((int64_t)(words[1] - event_id) > 0 || (words[1] == event_id && words[2] == WITHDRAWN))) {
            return 1;
        }
    }
    return 0;
}

Py_ssize_t
group_await_answers(group_t *group, Py_ssize_t counts, uint64_t event_id, uint8_t *state, uint64_t *found,
                    int64_t deadline)
{
    const wanted_t wanted = {counts + COUNT_LANES, 1, event_id, state, found};
    Py_ssize_t awaited = group_await(group, wanted.lane, 1, event_id, state, found, deadline);
    if (awaited <= 0) {
        return awaited;
    }
    for (Py_ssize_t r = 0; r < group->num_ranks; r++) {
        /* Who has answered may be at the next event. Its answer came before that, so it is seen by a look behind. */
        if (state[r] == AWAITED && has_left(group, r, counts, event_id)) {
            state[r] = look(group, &wanted, r) == ARRIVED ? ARRIVED : MOVED_ON;
        }
    }
    return look_at_all(group, &wanted);
}

int
group_still_says(const group_t *group, Py_ssize_t rank, Py_ssize_t counts, uint64_t event_id, const uint64_t *found)
{
    for (Py_ssize_t lane = counts; lane < counts + COUNT_LANES; lane++) {
        uint64_t words[CELL_WORDS];
        if (load_cell(group_cell(group, group->rank, rank, lane), words) && words[1] == event_id &&
            words[2] == found[0] && words[3] == found[1]) {
            return 1;
        }
    }
    return 0;
}
