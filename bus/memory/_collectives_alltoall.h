/* One rank's end of the plain all-to-all: what an exchange keeps, and its steps. */
#ifndef XDS_COLLECTIVES_ALLTOALL_H
#define XDS_COLLECTIVES_ALLTOALL_H

#include "_collectives_group.h"

/* How far an exchange has come. */
enum { PHASE_NONE, PHASE_ANNOUNCED, PHASE_COUNTED, PHASE_PULLED };

/* What a call returns instead of a number of bytes; see bus/xccl/alltoall.py. */
enum {
    STATUS_REFUSED = -1,
    STATUS_WAITING = -2,
    STATUS_MOVED_ON = -3,
    STATUS_CORRUPT = -4,
    STATUS_NO_ROOM = -5,
    STATUS_UNCOMMON = -6
};

typedef struct {
    const char *bytes;
    Py_ssize_t size;
    uint64_t place; /* offset from the managed area, perhaps with ANSWER_ME */
} piece_t;

typedef struct {
    PyObject_HEAD
    group_t group;
    Py_buffer *views; /* of what is being sent, held until the exchange ends */
    Py_ssize_t num_views;
    piece_t *pieces;
    uint64_t *found, *answers;
    uint8_t *state;
    Py_ssize_t stage_bytes, app_at; /* of a half; of the app area from the managed area */
    uint64_t event_id, num_sent;
    Py_ssize_t row_bytes, total, culprit;
    int phase;
    uint64_t num_exchanges, bytes_received, bytes_staged;
} AllToAll;

/* Let go of what an exchange held; none is open. */
void alltoall_clear(AllToAll *self);

/* Find the pieces in `left` bytes at `at`, cut by a number of rows for each rank; -1: they do not cover it. */
int alltoall_cut(AllToAll *self, const char *at, Py_ssize_t left, const int64_t *num_rows);

/* Give every piece its place: where it lies in the app area, or in the half of this exchange. -1: no room. */
int alltoall_place(AllToAll *self);

/* Stage and announce the pieces. The GIL is not needed. */
void alltoall_send(AllToAll *self, uint64_t event_id);

/* Do what is left of the exchange, into `room` bytes at `out`, until `deadline` or the poll interval is over; the bytes
 * received, or a status. A deadline of 0: look once, do not wait. The GIL is not needed. */
Py_ssize_t alltoall_go_on(AllToAll *self, char *out, Py_ssize_t room, int64_t deadline);

/* Note how an exchange has ended, if it has. */
void alltoall_end(AllToAll *self, Py_ssize_t status);

/* _collectives_swap.c. Export an array of rows of numbers; the bytes of a row, or 0 and perhaps an exception. */
Py_ssize_t alltoall_open_rows(PyObject *object, int flags, Py_buffer *view);

/* Whether both have the same dtype and the same shape but for the number of rows. */
int alltoall_same_rows(const Py_buffer *one, const Py_buffer *other);

/* Send `num_bytes`, whose places are known, and receive what comes; the bytes received, or a status. */
Py_ssize_t alltoall_exchange(AllToAll *self, uint64_t event_id, Py_ssize_t num_bytes, const Py_buffer *target,
                             int64_t deadline);

/* Whether every rank gave one row. */
int alltoall_is_equal(const AllToAll *self);

/* Methods `swap`, in _collectives_swap.c, and `persistent`, in _collectives_persistent.c. */
PyObject *alltoall_swap(AllToAll *self, PyObject *const *args, Py_ssize_t nargs);
PyObject *alltoall_persistent(AllToAll *self, PyObject *const *args, Py_ssize_t nargs);

#endif
