/* What the files of the two ends of a link share.
 *
 *     _native_send.c      claims, chunks, acknowledgements; the calls of a sender
 *     _native_recv.c      records, messages; the calls of a receiver
 *     _native_header.c    what the first record of a part announces
 *     _native_content.c   where a receiver gets the bytes from
 *     _native_in_place.c  messages that are written and read where they lie, at both ends
 *     _native_ends.c      the two types
 */
#ifndef XDS_NATIVE_ENDS_H
#define XDS_NATIVE_ENDS_H

#include "_native_link.h"

enum { LACKS = 0, DONE = 1, LOST = 2 }; /* how receiving goes on, besides -1: a Python error is set */

HIDDEN int send_look_at_ack(LinkEnd *end, uint64_t event_id);
HIDDEN int send_claim_slot(LinkEnd *end, uint64_t event_id);
HIDDEN int send_commit_slot(LinkEnd *end, const Tag *tag, uint32_t num_bytes, uint32_t chunk_id, uint64_t event_id);

HIDDEN int recv_next_record(LinkEnd *end, uint64_t event_id, Record *record);
HIDDEN void recv_release_record(LinkEnd *end);
HIDDEN int recv_acknowledge(LinkEnd *end, uint64_t event_id);
HIDDEN int recv_refuse_if_active(const LinkEnd *end);

HIDDEN int header_parse(LinkEnd *end, const Record *record, Transfer *op, uint64_t *start);
HIDDEN int header_refuse(LinkEnd *end, const Record *record, const Transfer *op, PyObject *out);
HIDDEN int header_fits(const Transfer *op);
HIDDEN PyObject *header_allocate(LinkEnd *end, const Transfer *op);

HIDDEN int content_take(LinkEnd *end, const Record *record, uint64_t start);

HIDDEN PyObject *send_send(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *send_send_part(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *send_start(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *send_advance(PyObject *self, PyObject *unused);
HIDDEN PyObject *send_drops(PyObject *self, PyObject *event);
HIDDEN PyObject *send_taken(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *send_await_taken(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *send_wait(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *in_place_claim(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *in_place_publish(PyObject *self, PyObject *args);
HIDDEN PyObject *in_place_reserve(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *in_place_commit(PyObject *self, PyObject *event);

HIDDEN PyObject *recv_recv(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *recv_recv_part(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *recv_advance(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *recv_wait(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *in_place_look(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *in_place_peek(PyObject *self, PyObject *const *args, Py_ssize_t nargs);
HIDDEN PyObject *in_place_release(PyObject *self, PyObject *event);

static inline int
send_is_full(const LinkEnd *end)
{
    return end->position - end->other >= end->num_slots;
}

#endif
