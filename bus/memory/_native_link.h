/* The two ends of a point-to-point link; what they share. The protocol is in bus/README.md, "Point-to-point".
 *
 * An end holds exports of both segments, so neither mapping can go while it lives. Everything that a peer can
 * write is copied once, checked, and used from the copy; addresses come from bounds fixed at `open`.
 */
#ifndef XDS_NATIVE_LINK_H
#define XDS_NATIVE_LINK_H

#include "_native.h"
#include "_burst.h" /* after Python.h */

#include <stddef.h>

#define RECORD_BYTES 64
#define SLOTS_OFFSET 256
#define NUM_SLOTS_MAX (1u << 20)
#define SLOT_BYTES_MIN 128
#define SLOT_BYTES_MAX (1u << 30)
#define COUNTER_BITS 40
#define COUNTER_MASK ((1ULL << COUNTER_BITS) - 1)
#define END_BITS 48
#define END_MASK ((1ULL << END_BITS) - 1)
#define TAG_DIMS 4
#define NUM_DIMS_MAX 8
#define EXTENSION_BYTES 64
#define PULL_BYTES 8
#define NUM_PARTS_MAX 65535
#define NUM_LANES_MAX 64
#define LANE_BLOCK_BYTES (256 * 1024)

#define READ_BYTES 16 /* the first two words of an Offer: all that is needed to read */
#define SHARE_UNIT 4096
#define SHARE_STUCK (-2)

enum { KIND_INLINE = 1, KIND_PULL = 2, KIND_PUT = 3, KIND_READ = 4 };
enum { OFFERED = 0, TAKEN = 1, WITHDRAWN = 2 }; /* states of what is offered for reading */
enum { NOT_HELPED = 0, HELPED = 1, HELP_FAILED = 2 };
enum { STALLED = 0, CORRUPT = 1, MISMATCH = 2 }; /* kinds of error, see `_error` of bus/xccl/channel.py */

typedef struct {
    char dtype[4];
    uint8_t num_dims;
    uint8_t kind;
    uint16_t num_more; /* parts of this message that follow */
    uint64_t shape[TAG_DIMS];
} Tag;

typedef struct {
    uint64_t position;
    uint32_t num_bytes;
    uint32_t chunk_id;
    uint64_t event_id;
    Tag tag;
} Record;

_Static_assert(sizeof(Tag) == 40 && sizeof(Record) == RECORD_BYTES, "a record fills its line");

/* The payload of a record of KIND_READ, or of KIND_PULL with an offset for the address and no state. From `is_invited` on it
 * serves to share the copy, see _native_share.c. */
typedef struct {
    uint64_t address; /* sender: of the array */
    uint32_t state;   /* both, once: OFFERED, then TAKEN or WITHDRAWN */
    uint32_t is_invited; /* receiver: 1 once `target` and `shares` are there */
    uint64_t target;  /* receiver: where the array goes in its memory */
    uint64_t shares;  /* both: what nobody has claimed, front u32 | back u32 << 32, in units of SHARE_UNIT bytes */
    uint32_t helped;  /* sender, if it has claimed something and will claim no more: HELPED or HELP_FAILED */
    uint32_t unused;
} Offer;

_Static_assert(sizeof(Offer) == 40 && offsetof(Offer, is_invited) == 12, "an offer to be read may end after its state");

/* The message, or part of one, that an end is working on. */
typedef struct {
    int is_active;   /* a message is under way */
    int has_view;    /* `view` is held; a receiver takes it before it waits */
    char code[4];    /* receiver: dtype of `view` */
    int is_begun;    /* receiver: the first record was accepted */
    Py_buffer view;
    PyObject *array; /* receiver: what to return */
    Tag tag;
    uint64_t rest[NUM_DIMS_MAX]; /* dimensions 4..7, then zeros: the extension */
    uint64_t event_id;
    uint64_t num_bytes;
    uint64_t num_done;
    uint64_t offset; /* KIND_PULL, KIND_PUT: where the bytes lie in a segment; KIND_READ: their address */
    int is_sharable; /* the record has room to share the copy */
    uint32_t chunk_id;
} Transfer;

#define PROBE_MAX 4096u /* waits, or long copies, between two probes at most */

/* A long copy. With a `pid`, `src` is an address in that process, which must hold `nonce` at `nonce_at`. */
typedef struct {
    char *dst;
    const char *src;
    uint64_t size;
    int pid;
    uint64_t nonce, nonce_at;
} CopyJob;

/* How an array that is made in place travels. */
typedef struct {
    PyObject *shape, *dtype; /* as the caller gave them; NULL = there is no plan */
    Tag tag;
    uint64_t rest[NUM_DIMS_MAX];
    uint64_t start, num_bytes; /* of the content in the payload */
} Plan;

typedef struct {
    PyObject_HEAD
    Py_buffer own, peer;
    int is_open, is_busy;
    char is_retired; /* a newer incarnation of the peer is known: open again before the next message */
    char *slots;
    char *slot; /* that of `position` */
    uint64_t num_slots, slot_bytes, stride;
    uint64_t ring_offset;
    uint64_t *out_cell;
    const uint64_t *in_cell;
    uint32_t *own_bell, *peer_bell;
    uint64_t own_low, own_high, peer_low, peer_high; /* app areas: offsets in `own` and `peer` */
    uint64_t out_stamp, in_stamp;                    /* incarnation tags, shifted */
    uint64_t num_writes;
    uint64_t in_word, in_w1, in_w2;
    unsigned long long position; /* sender: tail; receiver: head */
    unsigned long long other;    /* the last seen position of the other side */
    unsigned long long last_end; /* receiver: tail at the end of the last message taken */
    unsigned long long last_event;
    unsigned long long num_drops, num_drops_seen;
    uint64_t num_unpublished;
    uint64_t pull_bytes_min, read_bytes_min, shared_bytes_min, message_bytes_max;
    uint32_t next_chunk;
    Transfer op;
    uint64_t nonce;        /* sender: drawn when the link opens; receiver: what it read in the sender's memory */
    int is_readable;       /* sender: the receiver has shown that it reads this process's memory */
    Offer *offer;          /* sender: the message that is offered for reading */
    CopyJob offered;       /* sender: its array; `dst` is an address in the receiver */
    uint64_t offer_word;   /* receiver: the offer cell that was answered last; sender: the proof that was read last */
    int peer_pid;          /* the process that holds the nonce at `nonce_at`, 0 = its memory is out of reach */
    uint64_t nonce_at;
    int64_t reached_ns;    /* sender: when it last saw the nonce in the receiver's memory */
    Py_buffer limbo;       /* receiver: an array that a sender which stalled may still write to */
    int has_limbo;
    const Offer *limbo_offer;
    uint64_t limbo_position;
    int64_t deadline;      /* receiver: of the call, 0 = it must not wait */
    const uint32_t *watch; /* a word that is news too once it is not 0 */
    int watches_only;      /* then the cell is not looked at */
    /* waiting */
    int64_t poll_ns, yield_ns;
    uint32_t alarms_seen; /* alarms before the last look at the peer's lock */
    int64_t typical_ns; /* what waits take that outlast the pauses, a moving average */
    int64_t patience_ns; /* sender: what the receiver's copy of this message may take, to poll for besides */
    int pause_rounds, may_sleep, was_crowded;
    habit_t pause, yield;
    /* places, see _native_place.c */
    uint32_t *own_place;
    const uint32_t *peer_place;
    uint32_t place, joined_place; /* of this end now; of both when they were last together */
    int is_first, num_apart;
    int64_t move_at, move_ns;
    int num_lanes; /* threads that share a long copy */
    uint64_t num_long_copies;
    habit_t lanes;
    uint64_t num_shareable; /* receiver: copies that the sender was or could have been invited to share */
    habit_t share;
    /* zero-copy, see _native_in_place.c */
    struct CachedView *views;
    size_t num_views;
    Plan plan;            /* sender: of the array that was reserved last */
    uint64_t reserved_at; /* sender: 1 + the position that is reserved, 0 = none */
    uint64_t reserved_bytes;
    Tag reserved_tag;
    PyObject *dtype; /* the last one seen, and its code */
    char dtype_code[4];
    /* counters */
    unsigned long long num_messages, num_bytes, num_chunks, num_pulled;
    unsigned long long num_waits, num_pause_wins, num_yield_wins, num_sleeps, num_lane_blocks, num_shared_bytes, num_moves;
} LinkEnd;

#define HIDDEN __attribute__((visibility("hidden")))

HIDDEN int link_init_names(void);
HIDDEN void link_dealloc(PyObject *self);
HIDDEN int link_open(LinkEnd *end, PyObject *args, PyObject *kwargs, int is_sender);
HIDDEN void link_close(LinkEnd *end);
HIDDEN int link_enter(LinkEnd *end, uint64_t event_id, PyObject *deadline);
HIDDEN int link_refresh(LinkEnd *end);
HIDDEN void link_refuse(LinkEnd *end, uint64_t before);
HIDDEN int link_publish(LinkEnd *end, uint64_t w1, uint64_t w2, uint64_t w3);
HIDDEN int link_await_news(LinkEnd *end, uint64_t event_id, int64_t deadline);
HIDDEN int link_arguments(const char *name, PyObject *const *args, Py_ssize_t nargs, Py_ssize_t wanted, Py_ssize_t at,
                          uint64_t *event_id, int64_t *deadline);
HIDDEN int link_dtype_code(LinkEnd *end, PyObject *array, char *code);
HIDDEN void link_copy(char *dst, const char *src, uint64_t size);
HIDDEN int link_copy_job(LinkEnd *end, const CopyJob *job);
HIDDEN int lanes_copy(const CopyJob *what, int num_lanes, uint32_t *num_blocks, uint32_t *num_helped);
HIDDEN int copy_part(const CopyJob *what, uint64_t at, uint64_t size);
HIDDEN int read_process(const CopyJob *what, uint64_t at, uint64_t size);
HIDDEN int write_process(const CopyJob *what, uint64_t at, uint64_t size);
HIDDEN int link_reaches_peer(LinkEnd *end);
HIDDEN int share_copy(LinkEnd *end, const CopyJob *job, Offer *offer);
HIDDEN int share_is_possible(LinkEnd *end, const CopyJob *job, const Offer *offer);
HIDDEN void share_help(LinkEnd *end);
HIDDEN void share_end_limbo(LinkEnd *end, int is_dead);
HIDDEN void link_forget_habits(LinkEnd *end);
HIDDEN int link_is_crowded(int64_t now);
HIDDEN void place_open(LinkEnd *end, char *own, const char *peer, int is_first);
HIDDEN void place_after_sleep(LinkEnd *end, int64_t start);
HIDDEN void link_offer(LinkEnd *end);
HIDDEN void link_answer(LinkEnd *end);
HIDDEN int link_is_readable(LinkEnd *end);
HIDDEN void in_place_forget(LinkEnd *end);
HIDDEN void in_place_clear(LinkEnd *end);
HIDDEN int link_check_peer(LinkEnd *end, uint64_t event_id);
HIDDEN void link_reset(Transfer *op);
HIDDEN int link_error(LinkEnd *end, int kind, uint64_t event_id, const char *format, ...);
HIDDEN PyObject *link_abandon_method(PyObject *self, PyObject *unused);
HIDDEN PyObject *link_close_method(PyObject *self, PyObject *unused);
HIDDEN PyObject *link_call(LinkEnd *end, PyObject *name, PyObject *argument, PyObject *second);

extern HIDDEN PyObject *name_poll, *name_renew, *name_error, *name_refuse, *name_allocate, *name_plan;
extern HIDDEN PyType_Spec send_end_spec, recv_end_spec;
HIDDEN PyObject *read_memory(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *bench_compute(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *bench_meet(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *bench_pingpong(PyObject *module, PyObject *const *args, Py_ssize_t nargs);

static inline void
next_position(LinkEnd *end)
{
    end->position++;
    end->slot += end->stride;
    if (end->slot == end->slots + end->num_slots * end->stride) {
        end->slot = end->slots;
    }
}

/* Turn OFFERED into `to`; returns what was there. Whoever is second finds the other's word. */
static inline uint32_t
end_offer(uint32_t *state, uint32_t to)
{
    uint32_t found = OFFERED;
    __atomic_compare_exchange_n(state, &found, to, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE); /* SYNC: read-state */
    return found;
}

/* The other side has written its cell since it was last read. */
static inline int
has_cell_news(const LinkEnd *end)
{
    uint64_t word = __atomic_load_n(&end->in_cell[0], __ATOMIC_ACQUIRE); /* SYNC: cell-whole */
    return word != end->in_word && word != 0 && (word & ~COUNTER_MASK) == end->in_stamp;
}

/* What a wait of this end waits for is there. */
static inline int
has_news(const LinkEnd *end)
{
    if (end->watch != NULL && __atomic_load_n(end->watch, __ATOMIC_ACQUIRE) != 0) { /* SYNC: share-invite, SYNC: share-done */
        return 1;
    }
    return !end->watches_only && has_cell_news(end);
}

#endif
