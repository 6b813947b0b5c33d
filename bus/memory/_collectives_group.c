/* Cells, doorbells and waiting of a group. The order of every word stands in bus/README.md, "Memory order". */
#include "_collectives_group.h"

#define BELL_SEQ 0
#define BELL_SLEEPERS 1
#define BELL_PATIENT 2
#define BELL_WAKE_AT 3
#define SCORE_MAX 256
#define SCORE_LOW (SCORE_MAX / 8)
#define PROBE_MIN 32
#define PROBE_MAX 4096

int
group_init(group_t *group, Py_ssize_t rank, Py_ssize_t num_ranks, Py_ssize_t num_lanes, Py_ssize_t shared_bytes,
           int64_t yield_ns)
{
    if (num_ranks < 1 || num_ranks > 1 << 20 || rank < 0 || rank >= num_ranks || yield_ns < 0) {
        PyErr_Format(PyExc_ValueError, "shape: rank %zd must be below %zd ranks", rank, num_ranks);
        return -1;
    }
    group->peers = PyMem_Calloc((size_t)num_ranks, sizeof *group->peers);
    if (group->peers == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    group->rank = rank;
    group->num_ranks = num_ranks;
    group->num_lanes = num_lanes;
    group->shared_bytes = shared_bytes;
    group->yield_ns = yield_ns;
    group->relax = group->yield = (habit_t){SCORE_MAX, PROBE_MIN, 0};
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
    group->peers = NULL;
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
    if (cells < DOORBELL_OFFSET + 16 || cells % CELL_STRIDE != 0 || managed % CELL_STRIDE != 0 ||
        ((uintptr_t)view.buf & 7) != 0 || cells + cell_bytes > managed || managed > view.len ||
        group->shared_bytes > view.len - managed) {
        PyErr_Format(PyExc_ValueError, "rank %zd: its cells and blocks do not fit its segment of %zd bytes", rank,
                     view.len);
        PyBuffer_Release(&view);
        return NULL;
    }
    drop_peer(group, &group->peers[rank]);
    group->peers[rank] = (peer_t){view, view.buf, cells, managed, incarnation};
    group->num_connected++;
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

static void
ring_patiently(uint32_t *bell)
{
    uint32_t seq = __atomic_add_fetch(&bell[BELL_SEQ], 1, __ATOMIC_SEQ_CST); /* SYNC: doorbell, SYNC: word */
    if (__atomic_load_n(&bell[BELL_SLEEPERS], __ATOMIC_SEQ_CST) == 0) {      /* SYNC: doorbell */
        return;
    }
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
    uint64_t incarnation = group->peers[group->rank].incarnation & 0xFFFFFF;
    const uint64_t words[CELL_WORDS] = {incarnation << COUNTER_BITS | (group->writes & COUNTER_MASK), w1, w2, w3};
    store_cell(group_cell(group, rank, group->rank, lane), words);
    FAULT("published");
    ring_patiently(bell_of(group, rank));
    FAULT("rung");
    return words[0];
}

/* ---------------------------------------------------------------- waiting */

/* Look at one awaited rank's cells, lane after lane. A later event means that it gave this one up only if a second look
 * does not find this one: it may have published both since the lane of this one was looked at. */
static uint8_t
look(const group_t *group, Py_ssize_t rank, Py_ssize_t lane, int num_lanes, uint64_t event_id, uint64_t *found)
{
    uint8_t state = AWAITED;
    for (Py_ssize_t i = 0; i < (state == AWAITED ? num_lanes : 2 * num_lanes); i++) {
        uint64_t words[CELL_WORDS];
        int is_whole = load_cell(group_cell(group, group->rank, rank, lane + i % num_lanes), words);
        FAULT("looked");
        if (!is_whole || words[0] >> COUNTER_BITS != (group->peers[rank].incarnation & 0xFFFFFF)) {
            continue;
        }
        if (words[1] == event_id) {
            found[0] = words[2];
            found[1] = words[3];
            return ARRIVED;
        }
        if ((int64_t)(words[1] - event_id) > 0) {
            state = MOVED_ON;
        }
    }
    return state;
}

static Py_ssize_t
look_at_all(const group_t *group, Py_ssize_t lane, int num_lanes, uint64_t event_id, uint8_t *state, uint64_t *found)
{
    Py_ssize_t moved = -1, awaited = 0;
    for (Py_ssize_t r = 0; r < group->num_ranks; r++) {
        if (state[r] == AWAITED) {
            state[r] = look(group, r, lane, num_lanes, event_id, &found[2 * r]);
            awaited += state[r] == AWAITED;
            moved = state[r] == MOVED_ON && moved < 0 ? r : moved;
        }
    }
    return moved >= 0 ? -1 - moved : awaited;
}

static int
is_worth_it(habit_t *habit, uint64_t wait)
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

/* All awaited ranks may have rung: each of them rings once after `seen` was read, or its cell had been visible. */
static inline int
has_rung(const uint32_t *bell, uint32_t seen, Py_ssize_t awaited)
{
    uint32_t seq = __atomic_load_n(&bell[BELL_SEQ], __ATOMIC_ACQUIRE); /* SYNC: word */
    return (Py_ssize_t)(seq - seen) >= awaited;
}

/* Poll without giving the core away: pays when every awaited rank has a core of its own. */
static int
poll_relaxing(const uint32_t *bell, uint32_t seen, Py_ssize_t awaited)
{
    for (int round = 0; round < RELAX_ROUNDS; round++) {
        if (has_rung(bell, seen, awaited)) {
            return 1;
        }
        cpu_relax();
    }
    return 0;
}

/* Poll and give the core away in between. A yield that was answered too late counts as lost: others want the core. */
static int
poll_yielding(const uint32_t *bell, uint32_t seen, Py_ssize_t awaited, int64_t limit, int64_t until)
{
    int64_t begin = now_ns(), now = begin;
    while (now - begin <= limit && now < until) {
        if (has_rung(bell, seen, awaited)) {
            return 1;
        }
        sched_yield();
        now = now_ns();
    }
    return 0;
}

/* Sleep until `awaited` more rings; returns whether a signal came. */
static int
sleep_for(group_t *group, uint32_t *bell, uint32_t seen, Py_ssize_t awaited, int64_t until)
{
    struct timespec at = {.tv_sec = until / NS_PER_S, .tv_nsec = until % NS_PER_S};
    int error = 0;
    group->sleeps++;
    __atomic_store_n(&bell[BELL_WAKE_AT], seen + (uint32_t)awaited, __ATOMIC_SEQ_CST);
    __atomic_store_n(&bell[BELL_PATIENT], 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&bell[BELL_SLEEPERS], 1, __ATOMIC_SEQ_CST); /* SYNC: doorbell */
    uint32_t seq = __atomic_load_n(&bell[BELL_SEQ], __ATOMIC_SEQ_CST); /* SYNC: doorbell */
    while ((Py_ssize_t)(seq - seen) < awaited) {
        if (syscall(SYS_futex, bell, FUTEX_WAIT_BITSET, seq, &at, NULL, FUTEX_BITSET_MATCH_ANY) < 0 &&
            errno != EAGAIN) {
            error = errno;
            break;
        }
        seq = __atomic_load_n(&bell[BELL_SEQ], __ATOMIC_SEQ_CST); /* SYNC: doorbell */
    }
    __atomic_fetch_sub(&bell[BELL_SLEEPERS], 1, __ATOMIC_SEQ_CST); /* only the waiter takes its own mark away */
    __atomic_store_n(&bell[BELL_PATIENT], 0, __ATOMIC_SEQ_CST);
    return error == EINTR;
}

/* One wait for rings, by the ways that have paid so far; returns whether a signal came. */
static int
await_rings(group_t *group, uint32_t *bell, uint32_t seen, Py_ssize_t awaited, int64_t until)
{
    group->waits++;
    if (group->yield_ns > 0 && is_worth_it(&group->relax, group->waits)) {
        int won = poll_relaxing(bell, seen, awaited);
        learn(&group->relax, group->waits, won);
        group->relax_wins += (uint64_t)won;
        if (won) {
            return 0;
        }
    }
    if (group->yield_ns > 0 && is_worth_it(&group->yield, group->waits)) {
        int won = poll_yielding(bell, seen, awaited, group->yield_ns, until);
        learn(&group->yield, group->waits, won);
        group->yield_wins += (uint64_t)won;
        if (won) {
            return 0;
        }
    }
    return sleep_for(group, bell, seen, awaited, until);
}

Py_ssize_t
group_await(group_t *group, Py_ssize_t lane, int num_lanes, uint64_t event_id, uint8_t *state, uint64_t *found,
            int64_t until)
{
    uint32_t *bell = bell_of(group, group->rank);
    for (;;) {
        uint32_t seen = __atomic_load_n(&bell[BELL_SEQ], __ATOMIC_ACQUIRE); /* SYNC: word */
        Py_ssize_t awaited = look_at_all(group, lane, num_lanes, event_id, state, found);
        if (awaited <= 0 || now_ns() >= until || await_rings(group, bell, seen, awaited, until)) {
            return awaited; /* after a signal Python runs its handlers and calls again */
        }
    }
}
