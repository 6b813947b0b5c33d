/* Where the receiver gets the bytes of an array from: the slot, a segment, or the sender's memory. */
#include "_native_ends.h"

static int
take_inline(LinkEnd *end, const Record *record, uint64_t start)
{
    Transfer *op = &end->op;
    uint64_t num_bytes = record->num_bytes - start;
    if (record->num_bytes < start || num_bytes > op->num_bytes - op->num_done ||
        (num_bytes == 0 && op->num_bytes > op->num_done && record->num_bytes != end->slot_bytes)) {
        return link_error(end, CORRUPT, op->event_id, "chunk %u has %llu bytes of %llu", record->chunk_id,
                          (unsigned long long)num_bytes, (unsigned long long)op->num_bytes);
    }
    link_copy((char *)op->view.buf + op->num_done, end->slot + RECORD_BYTES + start, num_bytes);
    op->num_done += num_bytes;
    return DONE;
}

/* Copy `job`, with the sender if that pays. As `share_copy`. */
static int
copy_whole(LinkEnd *end, const CopyJob *job, Offer *offer)
{
    int is_shared = end->op.is_sharable && share_is_possible(end, job, offer);
    return is_shared ? share_copy(end, job, offer) : link_copy_job(end, job);
}

#define GONE_TRIES 1000 /* a millisecond apart */

/* Raise what is known against the sender's life: -1. Otherwise 0. A process that ends loses its memory a moment before
 * its lock, so with ESRCH the lock is looked at until it is free. */
static int
check_sender(LinkEnd *end, uint64_t event_id, int error)
{
    const struct timespec nap = {.tv_nsec = 1000000};
    int outcome = link_check_peer(end, event_id);
    for (int tries = 1; outcome == 0 && error == ESRCH && tries < GONE_TRIES; tries++) {
        Py_BEGIN_ALLOW_THREADS
        nanosleep(&nap, NULL);
        Py_END_ALLOW_THREADS
        outcome = link_check_peer(end, event_id);
    }
    return outcome;
}

/* Copy an array out of the sender's memory. DONE, -1, or LOST: the sender has withdrawn it. */
static int
take_offered(LinkEnd *end, Offer *offer)
{
    Transfer *op = &end->op;
    CopyJob job = {.dst = op->view.buf,
                   .src = (const char *)(uintptr_t)op->offset,
                   .size = op->num_bytes,
                   .pid = end->peer_pid,
                   .nonce = end->nonce,
                   .nonce_at = end->nonce_at};
    int outcome = copy_whole(end, &job, offer);
    if (outcome == SHARE_STUCK) {
        return -1;
    }
    int error = outcome < 0 ? errno : 0;
    uint32_t found = OFFERED;
    if (error != 0) {
        found = __atomic_load_n(&offer->state, __ATOMIC_ACQUIRE); /* SYNC: read-state */
    }
    else {
        /* Still offered after the last byte was read: the sender has not let go of the array meanwhile. */
        found = end_offer(&offer->state, TAKEN);
    }
    if (found == WITHDRAWN) {
        return LOST;
    }
    if (error != 0) {
        return check_sender(end, op->event_id, error) < 0
                   ? -1
                   : link_error(end, CORRUPT, op->event_id, "%llu bytes of the sender's memory: %s",
                                (unsigned long long)op->num_bytes, strerror(error));
    }
    return DONE;
}

/* Copy a whole array out of a segment, or out of the sender's memory. DONE, -1, or LOST. */
static int
take_whole(LinkEnd *end, uint64_t start)
{
    Transfer *op = &end->op;
    Offer *offer = (Offer *)(end->slot + RECORD_BYTES + start);
    if (op->tag.kind == KIND_READ) {
        int outcome = take_offered(end, offer);
        if (outcome != DONE) {
            return outcome;
        }
    }
    else {
        const Py_buffer *segment = op->tag.kind == KIND_PULL ? &end->peer : &end->own;
        CopyJob job = {.dst = op->view.buf, .src = (const char *)segment->buf + op->offset, .size = op->num_bytes};
        int outcome = copy_whole(end, &job, offer);
        if (outcome < 0) {
            return outcome == SHARE_STUCK ? -1
                                          : link_error(end, CORRUPT, op->event_id, "the shares of a copy are impossible");
        }
    }
    op->num_done = op->num_bytes;
    end->num_pulled++;
    return DONE;
}

/* Get the bytes that the record at the head brings. DONE, -1, or LOST: its sender has withdrawn the message. */
int
content_take(LinkEnd *end, const Record *record, uint64_t start)
{
    return end->op.tag.kind == KIND_INLINE ? take_inline(end, record, start) : take_whole(end, start);
}
