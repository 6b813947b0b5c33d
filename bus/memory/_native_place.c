/* Bringing both ends of a link to one core when the cores are crowded.
 *
 * To wake a process on another core costs many times what it costs on the same core, and there it may have to wait until
 * somebody who computes has used up his slice, while a waker that sleeps in its turn hands the core over. So ends that
 * keep sleeping for a moment only, beside others who compute, say where they run, and one of them goes to the other's
 * core: who has stayed where both were follows who was moved, so that the kernel's balancing is not undone. To move it
 * narrows its affinity to that core and restores it. Nothing here is needed for correctness: a place is a hint. */
#include "_native_link.h"

#define SHORT_SLEEP_NS 200000LL /* longer ones are not a conversation */
#define APART_MIN 8             /* sleeps in a row, apart from the peer, before the one that has stayed follows */
#define APART_MAX 32            /* ... before one of both goes in any case */
#define MOVE_NS 1000000LL       /* between two moves, doubled up to the maximum while the ends do not stay together */
#define MOVE_NS_MAX 64000000LL

void
place_open(LinkEnd *end, char *own, const char *peer, int is_first)
{
    end->own_place = (uint32_t *)own;
    end->peer_place = (const uint32_t *)peer;
    end->is_first = is_first;
    end->place = end->joined_place = 0;
    end->num_apart = 0;
    end->move_at = 0;
    end->move_ns = MOVE_NS;
}

static void
say_place(LinkEnd *end, uint32_t place)
{
    end->place = place;
    __atomic_store_n(end->own_place, place, __ATOMIC_RELAXED);
}

/* Go to the core of `place`, if that is allowed. */
static int
move_to(uint32_t place)
{
    cpu_set_t allowed, one;
    if (place > CPU_SETSIZE || sched_getaffinity(0, sizeof allowed, &allowed) < 0 || !CPU_ISSET(place - 1, &allowed)) {
        return 0;
    }
    CPU_ZERO(&one);
    CPU_SET(place - 1, &one);
    if (sched_setaffinity(0, sizeof one, &one) < 0) {
        return 0;
    }
    sched_setaffinity(0, sizeof allowed, &allowed);
    return 1;
}

/* A wait that began at `start` has ended by a wake-up. The GIL is released. */
void
place_after_sleep(LinkEnd *end, int64_t start)
{
    int core = sched_getcpu();
    int64_t now = now_ns();
    if (core < 0) {
        return;
    }
    if ((uint32_t)core + 1 != end->place) {
        say_place(end, (uint32_t)core + 1);
    }
    uint32_t peer = __atomic_load_n(end->peer_place, __ATOMIC_RELAXED);
    if (peer == end->place) {
        end->joined_place = peer;
        end->num_apart = 0;
        end->move_ns = MOVE_NS;
        return;
    }
    if (peer == 0 || now - start > SHORT_SLEEP_NS || !link_is_crowded(now)) {
        end->num_apart = 0;
        return;
    }
    end->num_apart++;
    int has_stayed = end->place == end->joined_place;
    if (now < end->move_at || end->num_apart < APART_MIN ||
        (!has_stayed && (!end->is_first || end->num_apart < APART_MAX))) {
        return;
    }
    end->num_apart = 0;
    end->move_at = now + end->move_ns;
    end->move_ns = end->move_ns < MOVE_NS_MAX ? 2 * end->move_ns : MOVE_NS_MAX;
    if (move_to(peer)) {
        say_place(end, peer);
        end->num_moves++;
    }
}
