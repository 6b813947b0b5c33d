/* Sharing a copy: the receiver reads an array in the sender's memory, or app area, from its front on, while the sender, which would
 * otherwise only wait, writes the same array into the receiver's memory from its back on.
 *
 * The receiver invites, for every message anew, and only while it waits for that message itself. Both claim what is left
 * share by share, so neither waits for a process that does not run, but for one share at the end. The receiver does not
 * return before the sender has finished what it claimed. If the receiver's deadline passes meanwhile (the sender is
 * stopped in the middle of its share), it raises, and keeps the array in limbo, so that a late write meets memory which
 * is still there. */
#include "_native_link.h"

#define SHARE_BYTES_MIN 16384u         /* a system call costs as much as 4 KiB of copying */
#define SHARE_BYTES_MAX (512u * 1024u)
#define SHARE_OF_LEFT 3                /* each share is that part of what is left */
#define POLLS_MAX 64                   /* for the sender's last share, before the wait becomes a patient one */

typedef struct {
    uint64_t front, back; /* in units: what nobody has claimed */
} Left;

static inline Left
unpack(uint64_t word)
{
    return (Left){word & UINT32_MAX, word >> 32};
}

static inline uint64_t
pack(uint64_t front, uint64_t back)
{
    return back << 32 | front;
}

static uint64_t
num_units(uint64_t size)
{
    return (size + SHARE_UNIT - 1) / SHARE_UNIT;
}

/* How many of the units that are left make the next share. */
static uint64_t
next_share(uint64_t left)
{
    uint64_t share = left / SHARE_OF_LEFT, low = SHARE_BYTES_MIN / SHARE_UNIT, high = SHARE_BYTES_MAX / SHARE_UNIT;
    share = share < low ? low : share > high ? high : share;
    return share < left ? share : left;
}

/* Bytes of the units [first, last) of an array of `size` bytes. */
static uint64_t
bytes_between(uint64_t first, uint64_t last, uint64_t size)
{
    uint64_t end = last * SHARE_UNIT;
    return (end < size ? end : size) - first * SHARE_UNIT;
}

/* ---------------------------------------------------------------- the receiver */

static inline int
is_helped(const Offer *offer)
{
    return __atomic_load_n(&offer->helped, __ATOMIC_ACQUIRE) != NOT_HELPED; /* SYNC: share-done */
}

/* Claim the next share at the front, or with `all` whatever is left. *left is what the receiver knew, and knows
 * afterwards; returns the units claimed. -1: the sender has written what is impossible. */
static int64_t
claim_front(Offer *offer, Left *left, int all)
{
    uint64_t word = __atomic_load_n(&offer->shares, __ATOMIC_RELAXED);
    for (;;) {
        Left found = unpack(word);
        if (found.front != left->front || found.back < found.front || found.back > left->back) {
            return -1;
        }
        uint64_t num = found.back - found.front, share = all ? num : next_share(num);
        if (__atomic_compare_exchange_n(&offer->shares, &word, pack(found.front + share, found.back), 0,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
            *left = (Left){found.front + share, found.back};
            return (int64_t)share;
        }
    }
}

/* Copy the units before the front, which are claimed already, then from the front until nothing is left. 0, or errno;
 * then nobody can claim any more either. Without the GIL. */
static int
copy_front(const CopyJob *job, Offer *offer, Left *left)
{
    for (uint64_t first = 0;;) {
        if (copy_part(job, first * SHARE_UNIT, bytes_between(first, left->front, job->size)) < 0) {
            int error = errno;
            return claim_front(offer, left, 1) < 0 ? EPROTO : error;
        }
        FAULT("share-read");
        first = left->front;
        int64_t share = claim_front(offer, left, 0);
        if (share <= 0) {
            return share < 0 ? EPROTO : 0;
        }
    }
}

/* Wait until the sender has finished its shares. What it said, or -1: a Python error is set. With the GIL. */
static int
await_help(LinkEnd *end, const Offer *offer, int64_t patience_ns)
{
    int news = 1;
    end->watch = &offer->helped;
    end->watches_only = 1;
    end->patience_ns = patience_ns;
    if (!has_news(end)) {
        news = link_await_news(end, end->op.event_id, end->deadline);
    }
    if (news == 0) {
        news = link_error(end, STALLED, end->op.event_id, "it stopped while it wrote to the array, and may go on");
    }
    end->patience_ns = 0;
    end->watches_only = 0;
    end->watch = NULL;
    return news < 0 ? -1 : (int)__atomic_load_n(&offer->helped, __ATOMIC_ACQUIRE); /* SYNC: share-done */
}

/* Keep the array until the sender cannot write to it any more. A Python error is set, and stays. */
static void
leave_in_limbo(LinkEnd *end, const Offer *offer)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    int is_dead = link_check_peer(end, end->op.event_id) < 0;
    PyErr_Restore(type, value, traceback); /* instead of what was found now */
    if (is_dead) {
        return;
    }
    end->limbo = end->op.view;
    end->op.has_view = 0;
    end->has_limbo = 1;
    end->limbo_offer = offer;
    end->limbo_position = end->position;
}

/* Let the array in limbo go, if its sender has finished or `is_dead`. When the link is closed before, the memory is
 * never freed: that is the price of a peer that was stopped within one copy and outlives the link. */
void
share_end_limbo(LinkEnd *end, int is_dead)
{
    /* A later record of the sender is as good as its word: it sends after it has helped. */
    if (end->has_limbo && (is_dead || is_helped(end->limbo_offer) ||
                           end->other > end->limbo_position + 1)) {
        end->has_limbo = 0;
        PyBuffer_Release(&end->limbo);
    }
}

/* Whether the copy that `offer` asks for should be shared. */
int
share_is_possible(LinkEnd *end, const CopyJob *job, const Offer *offer)
{
    uint64_t size = job->size;
    uintptr_t distance = (uintptr_t)job->dst - (uintptr_t)job->src;
    int may_overlap = job->pid == 0 && (distance < size || -distance < size); /* both in the sender's app area */
    share_end_limbo(end, 0);
    uint64_t weight = job->pid == 0 ? size / 3 * 2 : size; /* pulling costs no system call, so sharing pays later */
    return weight >= end->shared_bytes_min && !may_overlap && end->deadline > 0 && !end->has_limbo && num_units(size) <= UINT32_MAX &&
           __atomic_load_n(&offer->is_invited, __ATOMIC_RELAXED) == 0 && habit_pays(&end->share, ++end->num_shareable);
}

/* Copy `job` together with the sender. 0; -1: errno is set; SHARE_STUCK: a Python error is set. */
int
share_copy(LinkEnd *end, const CopyJob *job, Offer *offer)
{
    uint64_t total = num_units(job->size);
    uint64_t half = (total + 1) / 2, first = next_share(total);
    Left left = {first < half ? first : half, total}; /* the first share is the receiver's in any case */
    int64_t start, copied_at = 0;
    int error;
    Py_BEGIN_ALLOW_THREADS
    start = now_ns();
    __atomic_store_n(&offer->target, (uint64_t)(uintptr_t)job->dst, __ATOMIC_RELAXED);
    __atomic_store_n(&offer->shares, pack(left.front, total), __ATOMIC_RELAXED);
    __atomic_store_n(&offer->is_invited, 1, __ATOMIC_RELEASE); /* SYNC: share-invite */
    FAULT("invited");
    error = copy_front(job, offer, &left);
    copied_at = now_ns();
    for (int i = 0; i < POLLS_MAX && left.back < total && !is_helped(offer); i++) {
        cpu_relax();
    }
    Py_END_ALLOW_THREADS
    if (error == EPROTO || left.back == total) {
        errno = error;
        return error == 0 ? 0 : -1;
    }
    int64_t own_ns = copied_at - start;
    int said = await_help(end, offer, own_ns);
    if (said < 0) {
        leave_in_limbo(end, offer);
        return SHARE_STUCK;
    }
    uint64_t behind = left.back * SHARE_UNIT, num_own = behind;
    if (said == HELPED) {
        end->num_shared_bytes += job->size - behind;
        /* Won unless the wait took longer than copying those shares would have. */
        int64_t alone_ns = (int64_t)((double)own_ns * (double)(job->size - behind) / (double)(num_own + 1));
        habit_learn(&end->share, end->num_shareable, now_ns() - copied_at <= alone_ns, PROBE_MAX);
    }
    else if (error == 0) {
        habit_learn(&end->share, end->num_shareable, 0, PROBE_MAX);
        Py_BEGIN_ALLOW_THREADS
        error = copy_part(job, behind, job->size - behind) < 0 ? errno : 0;
        Py_END_ALLOW_THREADS
    }
    errno = error;
    return error == 0 ? 0 : -1;
}

/* ---------------------------------------------------------------- the sender */

/* Write shares from the back until nothing is left. Returns what to tell, NOT_HELPED if nothing was claimed. */
static uint32_t
write_back(LinkEnd *end, Offer *offer, const CopyJob *job)
{
    uint64_t back = num_units(job->size), word = __atomic_load_n(&offer->shares, __ATOMIC_RELAXED);
    uint32_t said = NOT_HELPED;
    for (;;) {
        Left found = unpack(word);
        if (found.front >= found.back || found.back > back || !link_reaches_peer(end)) {
            return said; /* nothing is left, or the receiver has written what is impossible, or is not who it was */
        }
        uint64_t first = found.back - next_share(found.back - found.front);
        if (!__atomic_compare_exchange_n(&offer->shares, &word, pack(found.front, first), 0, __ATOMIC_RELAXED,
                                         __ATOMIC_RELAXED)) {
            continue;
        }
        FAULT("share-claimed");
        uint64_t size = bytes_between(first, found.back, job->size);
        if (write_process(job, first * SHARE_UNIT, size) < 0) {
            return HELP_FAILED;
        }
        said = HELPED;
        end->num_shared_bytes += size;
        FAULT("share-written");
        back = first;
        word = __atomic_load_n(&offer->shares, __ATOMIC_RELAXED);
    }
}

/* Sender: do shares of the copy that the receiver has invited to. */
void
share_help(LinkEnd *end)
{
    Offer *offer = end->offer;
    end->offered.pid = end->peer_pid;
    end->offered.dst = (char *)(uintptr_t)__atomic_load_n(&offer->target, __ATOMIC_RELAXED);
    Py_BEGIN_ALLOW_THREADS
    uint32_t said = write_back(end, offer, &end->offered);
    if (said != NOT_HELPED) {
        int failed;
        __atomic_store_n(&offer->helped, said, __ATOMIC_RELEASE); /* SYNC: share-done */
        ring_bell(end->peer_bell, &failed);
    }
    Py_END_ALLOW_THREADS
}
