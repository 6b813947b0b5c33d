/* The expert rank's end: what its polling (_relay_expert.c) and its forwarding for guests (_relay_forward.c) share. */
#ifndef XDS_RELAY_EXPERT_H
#define XDS_RELAY_EXPERT_H

#include "_relay.h"

enum { DIRECT, FORWARD, ENTRY, RETURN };
enum { UNKNOWN_WRITER, MISSING_OWNER, NO_SLOT, BAD_COUNTS, BAD_ROWS, BAD_STARTS, BAD_ANSWER, NOBODY };

typedef struct {
    int kind;
    Py_ssize_t peer, seat, microbatch; /* peer: attention rank, or the expert rank of a RETURN */
} place_t;

/* Private memory of an arrival: what must not change while it is being worked on. */
typedef struct {
    Py_buffer view;
    Py_ssize_t rows, pairs;          /* that it has room for */
    int32_t *pair_row, *pair_expert; /* NULL: not there yet */
    float *pair_scale;               /* where INT8 is delivered only */
    float *x, *y;                    /* where it is widened only */
    uint64_t word;                   /* stamp of the cell that is open, 0 = none */
    uint64_t event_id;
    Py_ssize_t count;
} slot_t;

typedef struct {
    int open;
    Py_ssize_t guest, num_pending;
    uint64_t event_id, echo;
    int32_t *starts;  /* [experts + 1] */
    uint64_t *asked;  /* [experts] stamp of the cell that each owner got, 0 = has answered */
    uint64_t *life;   /* [experts] its incarnation then */
} relay_t;

typedef struct {
    PyObject_HEAD
    geometry_t g;
    peer_t own;
    peer_t *attention, *experts;
    slot_t *slots;   /* [2 * num_attention * microbatches]: of the DIRECT and FORWARD cells */
    relay_t *relays; /* [seats * microbatches] */
    uint64_t *seen;
    waiter_t waiter;
    uint32_t bell_seen;
    int must_scan, has_rivals, ready, busy;
    uint64_t writes, dropped, num_relays;
    uint64_t by_stage[3]; /* a2e_forward, e2a_forward, e2a */
} ExpertEnd;

static inline crowd_t
crowd_of(const ExpertEnd *self)
{
    return (crowd_t){&self->own, self->attention, self->g.num_experts, self->g.num_attention, 1};
}

static inline int
enter_expert(const ExpertEnd *self, const char *name, Py_ssize_t given, Py_ssize_t wanted)
{
    if (!self->ready || self->busy || self->own.base == NULL) {
        PyErr_Format(PyExc_RuntimeError, "%s: closed, or in use by another thread", name);
        return -1;
    }
    return check_count(name, given, wanted);
}

typedef struct {
    PyObject *arrivals, *problems; /* lists, NULL while empty */
} found_t;

static inline int
append(PyObject **list, PyObject *entry)
{
    if (entry == NULL || (*list == NULL && (*list = PyList_New(0)) == NULL)) {
        Py_XDECREF(entry);
        return -1;
    }
    int outcome = PyList_Append(*list, entry);
    Py_DECREF(entry);
    return outcome;
}

static inline int
report(found_t *found, int code, Py_ssize_t index, const uint64_t *words, uint64_t a, uint64_t b)
{
    return append(&found->problems,
                  Py_BuildValue("inKKKK", code, index, (unsigned long long)words[0], (unsigned long long)words[1],
                                (unsigned long long)a, (unsigned long long)b));
}

static inline int32_t
load_word(const int32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED); /* read once: a peer may change it behind our back */
}

/* num_rows and num_pairs must fit the shape, and the event the cell. */
static inline int
fits(const geometry_t *g, const place_t *place, uint64_t event_id, uint64_t num_pairs, uint64_t num_rows)
{
    return num_rows <= (uint64_t)g->rows_max && num_pairs <= (uint64_t)pairs_max(g) &&
           (event_id >> 16 & 15) == (uint64_t)place->microbatch;
}

/* _relay_forward.c */
int enter_guest(ExpertEnd *self, const place_t *place, Py_ssize_t index, const uint64_t *words, found_t *found);
int collect(ExpertEnd *self, const place_t *place, Py_ssize_t index, const uint64_t *words, found_t *found);
PyObject *ExpertEnd_awaited(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *ExpertEnd_fail(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs);

#endif
