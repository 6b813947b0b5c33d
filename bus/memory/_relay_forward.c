/* The expert rank as a trampoline: it copies what a guest has staged, tells the owners, collects what they answer, and tells
 * the guest. A relay is an exchange of a guest that is under way; one per seat and microbatch. */
#include "_relay_expert.h"

static void
finish(ExpertEnd *self, Py_ssize_t seat, Py_ssize_t microbatch, uint64_t w2)
{
    const geometry_t *g = &self->g;
    relay_t *relay = &self->relays[seat * g->num_microbatches + microbatch];
    const peer_t *guest = &self->attention[relay->guest];
    relay->open = 0;
    self->num_relays--;
    if (guest->base == NULL) {
        self->dropped++;
        return;
    }
    self->by_stage[2]++;
    push_cell(guest, g->num_experts * g->num_microbatches + microbatch, self->own.incarnation, &self->writes,
              relay->event_id, w2, relay->echo, RING_SLEEPERS);
}

/* Take the starts of a guest's pairs. -1: they do not lead from 0 to `count`. */
static int
read_starts(const geometry_t *g, const char *source, int32_t *starts, Py_ssize_t count)
{
    const int32_t *shared = (const int32_t *)(source + g->starts_at);
    for (Py_ssize_t r = 0; r <= g->num_experts; r++) {
        starts[r] = load_word(&shared[r]);
        if (starts[r] < (r == 0 ? 0 : starts[r - 1])) {
            return -1;
        }
    }
    return starts[0] == 0 && starts[g->num_experts] == count ? 0 : -1;
}

static void
copy_source(const geometry_t *g, char *own, const char *source, Py_ssize_t num_rows, Py_ssize_t count)
{
    copy_bytes(own, source, num_rows * row_bytes(g));
    if (g->int8) {
        copy_bytes(own + g->x_scale_at, source + g->x_scale_at, num_rows * 4);
    }
    copy_bytes(own + g->pair_row_at, source + g->pair_row_at, count * 4);
    copy_bytes(own + g->pair_expert_at, source + g->pair_expert_at, count * 4);
}

static void
forward(ExpertEnd *self, relay_t *relay, const place_t *place, uint64_t num_rows)
{
    const geometry_t *g = &self->g;
    Py_ssize_t cell = (g->num_attention + relay->guest) * g->num_microbatches + place->microbatch;
    for (Py_ssize_t i = 0; i < g->num_experts; i++) {
        Py_ssize_t r = (g->rank + i) % g->num_experts;
        uint64_t first = (uint64_t)relay->starts[r], count = (uint64_t)relay->starts[r + 1] - first;
        relay->asked[r] = 0;
        if (count > 0) {
            self->by_stage[0]++;
            relay->life[r] = self->experts[r].incarnation;
            relay->num_pending++;
            relay->asked[r] = push_cell(&self->experts[r], cell, self->own.incarnation, &self->writes,
                                        relay->event_id, first << 32 | count, num_rows, RING_ALWAYS);
        }
    }
}

/* An attention rank hands over its rows: copy them, tell the owners. */
int
enter_guest(ExpertEnd *self, const place_t *place, Py_ssize_t index, const uint64_t *words, found_t *found)
{
    const geometry_t *g = &self->g;
    uint64_t count = words[2] & UINT32_MAX, num_rows = words[3];
    if (words[2] >> 32 != 0 || !fits(g, place, words[1], count, num_rows)) {
        return report(found, BAD_COUNTS, index, words, words[2], num_rows);
    }
    relay_t *relay = &self->relays[place->seat * g->num_microbatches + place->microbatch];
    const char *source = managed_at(&self->attention[place->peer], place->microbatch * g->source_bytes);
    self->num_relays -= (uint64_t)relay->open; /* an attempt that was given up */
    relay->open = 0;
    if (read_starts(g, source, relay->starts, (Py_ssize_t)count) < 0) {
        return report(found, BAD_STARTS, index, words, count, 0);
    }
    Py_ssize_t dead = -1;
    for (Py_ssize_t r = 0; r < g->num_experts; r++) {
        if (relay->starts[r + 1] == relay->starts[r] || self->experts[r].base != NULL) {
            continue;
        }
        if (!self->experts[r].absent) {
            return report(found, MISSING_OWNER, index, words, (uint64_t)r, 0);
        }
        dead = r;
    }
    Py_ssize_t seat = place->seat * g->num_microbatches + place->microbatch;
    *relay = (relay_t){1, place->peer, 0, words[1], words[0], relay->starts, relay->asked, relay->life};
    self->num_relays++;
    if (dead >= 0) {
        finish(self, place->seat, place->microbatch, FAILED | (uint64_t)dead);
        return 0;
    }
    char *own = managed_at(&self->own, g->seat_sources_at + seat * g->source_bytes);
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    FAULT("entered");
    copy_source(g, own, source, (Py_ssize_t)num_rows, (Py_ssize_t)count);
    FAULT("copied");
    forward(self, relay, place, num_rows);
    Py_END_ALLOW_THREADS
    self->busy = 0;
    if (relay->num_pending == 0) {
        finish(self, place->seat, place->microbatch, 0);
    }
    return 0;
}

/* An owner has answered: collect its rows; tell the guest after the last one. */
int
collect(ExpertEnd *self, const place_t *place, Py_ssize_t index, const uint64_t *words, found_t *found)
{
    const geometry_t *g = &self->g;
    Py_ssize_t owner = place->peer, seat = place->seat * g->num_microbatches + place->microbatch;
    relay_t *relay = &self->relays[seat];
    const peer_t *peer = &self->experts[owner];
    if (!relay->open || words[1] != relay->event_id || words[3] == 0 || relay->asked[owner] != words[3] ||
        peer->incarnation != relay->life[owner]) {
        self->dropped++;
        return 0;
    }
    Py_ssize_t first = relay->starts[owner], count = relay->starts[owner + 1] - first;
    if (words[2] != (uint64_t)count) {
        return report(found, BAD_ANSWER, index, words, words[2], (uint64_t)count);
    }
    Py_ssize_t theirs = (relay->guest * g->num_microbatches + place->microbatch) * g->result_bytes;
    const char *src = managed_at(peer, theirs);
    char *dst = managed_at(&self->own, g->seat_results_at + seat * g->result_bytes);
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    copy_bytes(dst + first * row_bytes(g), src, count * row_bytes(g));
    if (g->int8) {
        copy_bytes(dst + g->y_scale_at + 4 * first, src + g->y_scale_at, 4 * count);
    }
    Py_END_ALLOW_THREADS
    self->busy = 0;
    FAULT("collected");
    relay->asked[owner] = 0;
    if (--relay->num_pending == 0) {
        finish(self, place->seat, place->microbatch, (uint64_t)relay->starts[g->num_experts]);
    }
    return 0;
}

/* [(seat, microbatch, owner, incarnation)] of all owners that guests wait for. */
PyObject *
ExpertEnd_awaited(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    const geometry_t *g = &self->g;
    PyObject *list = enter_expert(self, "awaited", nargs, 0) < 0 ? NULL : PyList_New(0);
    for (Py_ssize_t i = 0; list != NULL && i < g->num_seats * g->num_microbatches; i++) {
        for (Py_ssize_t r = 0; list != NULL && self->relays[i].open && r < g->num_experts; r++) {
            if (self->relays[i].asked[r] != 0 &&
                append(&list, Py_BuildValue("nnnK", i / g->num_microbatches, i % g->num_microbatches, r,
                                            (unsigned long long)self->relays[i].life[r])) < 0) {
                Py_CLEAR(list);
            }
        }
    }
    return list;
}

/* fail(seat, microbatch, owner): tell the guest that `owner` is dead. */
PyObject *
ExpertEnd_fail(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    const geometry_t *g = &self->g;
    Py_ssize_t seat, microbatch, owner;
    if (enter_expert(self, "fail", nargs, 3) < 0 || parse_index(args[0], "seat", g->num_seats, &seat) < 0 ||
        parse_index(args[1], "microbatch", g->num_microbatches, &microbatch) < 0 ||
        parse_index(args[2], "owner", g->num_experts, &owner) < 0) {
        return NULL;
    }
    if (self->relays[seat * g->num_microbatches + microbatch].open) {
        finish(self, seat, microbatch, FAILED | (uint64_t)owner);
    }
    Py_RETURN_NONE;
}
