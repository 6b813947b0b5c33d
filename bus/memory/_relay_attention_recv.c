/* The attention rank's second half of an exchange: wait for the answers, take or add their rows. */
#include "_relay_attention.h"

enum { COMPLETE = 0, PENDING = 1, DEAD_OWNER = 2, WRONG_COUNT = 3, REPLACED = 4 };

typedef struct {
    int code;
    Py_ssize_t expert;
    uint64_t value;
} outcome_t;

/* The rows of `expert`'s answer: pairs first..end - 1 lie one after the other from here on. */
static const char *
result_block(const AttentionEnd *self, const exchange_t *e, Py_ssize_t expert, Py_ssize_t microbatch)
{
    const geometry_t *g = &self->g;
    if (e->route == ROUTE_TRAMPOLINE) {
        Py_ssize_t seat = seat_of(g, g->rank) * g->num_microbatches + microbatch;
        return managed_at(&self->experts[expert], g->seat_results_at + seat * g->result_bytes);
    }
    return managed_at(&self->experts[expert], (g->rank * g->num_microbatches + microbatch) * g->result_bytes);
}

static void
scatter(const AttentionEnd *self, const exchange_t *e, Py_ssize_t expert, Py_ssize_t microbatch, float *out)
{
    const geometry_t *g = &self->g;
    const char *block = result_block(self, e, expert, microbatch);
    const float *scales = (const float *)(block + g->y_scale_at);
    int direct = e->route == ROUTE_DIRECT;
    Py_ssize_t first = direct ? e->starts[expert] : 0, end = direct ? e->starts[expert + 1] : e->num_pairs;
    for (Py_ssize_t p = first; p < end; p++) {
        float *dst = out + (Py_ssize_t)e->order[p] * g->hidden;
        const char *src = block + (p - first) * row_bytes(g);
        if (g->int8) {
            dequantise_row(dst, (const int8_t *)src, scales[p - first], g->hidden);
        }
        else {
            copy_bytes((char *)dst, src, row_bytes(g));
        }
    }
}

/* out[t] = 0 + weights[t, 0] * y of slot 0 + weights[t, 1] * y of slot 1 ..., in this order. */
static void
reduce(const AttentionEnd *self, const exchange_t *e, Py_ssize_t microbatch, const float *weights, float *out)
{
    const geometry_t *g = &self->g;
    Py_ssize_t trampoline = trampoline_of(g, g->rank);
    for (Py_ssize_t t = 0; t < e->num_rows; t++) {
        const char *rows[SLOTS_MAX];
        float scales[SLOTS_MAX], factors[SLOTS_MAX];
        int num = 0;
        for (Py_ssize_t i = t * g->num_slots; i < (t + 1) * g->num_slots; i++) {
            if (e->rank[i] < 0) {
                continue;
            }
            int direct = e->route == ROUTE_DIRECT;
            Py_ssize_t expert = direct ? e->rank[i] : trampoline;
            Py_ssize_t row = e->position[i] - (direct ? e->starts[expert] : 0);
            const char *block = result_block(self, e, expert, microbatch);
            rows[num] = block + row * row_bytes(g);
            scales[num] = g->int8 ? ((const float *)(block + g->y_scale_at))[row] : 1.0f;
            factors[num++] = weights[i];
        }
        if (g->int8) {
            add_slots_int8(out + t * g->hidden, (const int8_t *const *)rows, scales, factors, num, g->hidden);
        }
        else {
            add_slots(out + t * g->hidden, (const float *const *)rows, factors, num, g->hidden);
        }
    }
}

static inline Py_ssize_t
answer_cell(const AttentionEnd *self, const exchange_t *e, Py_ssize_t expert, Py_ssize_t microbatch)
{
    const geometry_t *g = &self->g;
    return (e->route == ROUTE_DIRECT ? expert : g->num_experts) * g->num_microbatches + microbatch;
}

/* Look at the cell of an awaited expert rank: COMPLETE when it has answered. */
static outcome_t
look(AttentionEnd *self, const exchange_t *e, Py_ssize_t expert, Py_ssize_t microbatch)
{
    outcome_t outcome = {PENDING, expert, 0};
    int direct = e->route == ROUTE_DIRECT;
    Py_ssize_t index = answer_cell(self, e, expert, microbatch);
    const uint64_t *cell = cell_at(&self->own, index);
    uint64_t words[CELL_WORDS];
    if (!has_news(cell, self->seen[index]) || !load_cell(cell, words)) { /* SYNC: cell-whole */
        return outcome;
    }
    self->seen[index] = words[0];
    if (words[1] != e->event_id || words[3] != e->asked[expert] || !stamped_by(words[0], e->life[expert])) {
        self->dropped++;
        return outcome;
    }
    Py_ssize_t wanted = direct ? e->starts[expert + 1] - e->starts[expert] : e->num_pairs;
    outcome.value = words[2];
    if (!direct && (words[2] & FAILED)) {
        outcome.code = DEAD_OWNER;
    }
    else if (words[2] != (uint64_t)wanted) {
        outcome.code = WRONG_COUNT;
    }
    else {
        const peer_t *peer = &self->experts[expert];
        outcome.code = peer->base == NULL || peer->incarnation != e->life[expert] ? REPLACED : COMPLETE;
    }
    return outcome;
}

/* REPLACED when a rank whose answer was taken earlier has another segment by now, else COMPLETE. */
static outcome_t
find_replaced(const AttentionEnd *self, const exchange_t *e)
{
    const geometry_t *g = &self->g;
    for (Py_ssize_t r = 0; r < g->num_experts; r++) {
        int asked = e->route == ROUTE_DIRECT ? e->starts[r + 1] > e->starts[r]
                                             : e->num_pairs > 0 && r == trampoline_of(g, g->rank);
        if (asked && (self->experts[r].base == NULL || self->experts[r].incarnation != e->life[r])) {
            return (outcome_t){REPLACED, r, 0};
        }
    }
    return (outcome_t){COMPLETE, -1, 0};
}

/* Take the answers that have come. PENDING when there are more to come. */
static outcome_t
take_answers(AttentionEnd *self, exchange_t *e, Py_ssize_t microbatch, const float *weights, float *out)
{
    for (Py_ssize_t i = e->num_pending - 1; i >= 0; i--) {
        Py_ssize_t expert = e->pending[i];
        outcome_t found = look(self, e, expert, microbatch);
        if (found.code == PENDING) {
            continue;
        }
        if (found.code != COMPLETE) {
            return found;
        }
        if (weights == NULL) {
            scatter(self, e, expert, microbatch, out);
        }
        e->pending[i] = e->pending[--e->num_pending];
    }
    outcome_t outcome = {e->num_pending > 0 ? PENDING : COMPLETE, -1, 0};
    if (outcome.code == COMPLETE && weights != NULL) {
        outcome = find_replaced(self, e);
    }
    if (outcome.code == COMPLETE && weights != NULL) {
        reduce(self, e, microbatch, weights, out);
    }
    return outcome;
}

/* How many of the awaited expert ranks have written nothing since their cells were last looked at. */
static Py_ssize_t
count_silent(const AttentionEnd *self, const exchange_t *e, Py_ssize_t microbatch)
{
    Py_ssize_t num = 0;
    for (Py_ssize_t i = 0; i < e->num_pending; i++) {
        Py_ssize_t index = answer_cell(self, e, e->pending[i], microbatch);
        num += !has_news(cell_at(&self->own, index), self->seen[index]);
    }
    return num;
}

/* Whether this process was told of a death, or has mapped a peer, since Python last looked at owner locks. It does now. */
static int
must_look(waiter_t *waiter, const uint32_t *bell)
{
    uint32_t alarms = num_alarms(bell);
    int must = waiter->must_look || alarms != waiter->alarms_seen;
    waiter->alarms_seen = alarms;
    waiter->must_look = 0;
    return must;
}

/* Poll for one of the answers that are awaited, since all are needed, then sleep until all of them have come. Returns
 * whether to look again: 0 at the time limit, after a signal, for Python to run its handlers, and after an alarm. */
static int
await_answers(AttentionEnd *self, const exchange_t *e, Py_ssize_t microbatch, int64_t until)
{
    Py_ssize_t index = answer_cell(self, e, e->pending[e->num_pending - 1], microbatch);
    const awaited_t awaited = {.cell = cell_at(&self->own, index), .word = self->seen[index]};
    crowd_t crowd = crowd_of(self);
    spread(&self->waiter, &crowd, &self->g);
    if (poll_for(&self->waiter, &crowd, &awaited, until)) {
        return 1;
    }
    uint32_t *bell = (uint32_t *)(self->own.base + DOORBELL_OFFSET);
    int goes_on = 1;
    mark_asleep(bell);
    uint32_t seen = __atomic_load_n(bell, __ATOMIC_ACQUIRE); /* SYNC: word */
    int is_alarmed = must_look(&self->waiter, bell);
    if (!is_alarmed && count_silent(self, e, microbatch) == e->num_pending) {
        goes_on = sleep_for(&self->waiter, bell, seen, (uint32_t)e->num_pending, until);
        is_alarmed = must_look(&self->waiter, bell);
    }
    mark_awake(bell);
    return goes_on && !is_alarmed;
}

static outcome_t
receive(AttentionEnd *self, exchange_t *e, Py_ssize_t microbatch, const float *weights, float *out, int64_t timeout)
{
    outcome_t outcome = take_answers(self, e, microbatch, weights, out);
    if (outcome.code != PENDING || timeout == 0) {
        return outcome;
    }
    int64_t begin = now_ns(), until = deadline_after(begin, timeout);
    for (int goes_on = 1; goes_on && outcome.code == PENDING && now_ns() < until;) {
        goes_on = await_answers(self, e, microbatch, until);
        outcome = take_answers(self, e, microbatch, weights, out); /* also when Python is to look at owner locks */
    }
    learn_duration(&self->waiter, now_ns() - begin);
    return outcome;
}

static PyObject *
recv_rows(AttentionEnd *self, exchange_t *e, Py_ssize_t microbatch, PyObject *weights, PyObject *out, int64_t timeout)
{
    const geometry_t *g = &self->g;
    const Py_ssize_t slots[] = {e->num_rows, g->num_slots, g->hidden}, rows[] = {e->num_rows, g->hidden};
    Py_buffer out_view, weights_view = {.obj = NULL};
    int reduces = weights != Py_None;
    if (reduces ? take_array(out, "out", 'f', 2, rows, PyBUF_WRITABLE, &out_view) < 0
                : take_array(out, "out", 'f', 3, slots, PyBUF_WRITABLE, &out_view) < 0) {
        return NULL;
    }
    if (reduces && take_array(weights, "weights", 'f', 2, slots, 0, &weights_view) < 0) {
        PyBuffer_Release(&out_view);
        return NULL;
    }
    outcome_t outcome;
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    outcome = receive(self, e, microbatch, weights_view.obj == NULL ? NULL : weights_view.buf, out_view.buf, timeout);
    Py_END_ALLOW_THREADS
    self->busy = 0;
    if (weights_view.obj != NULL) {
        PyBuffer_Release(&weights_view);
    }
    PyBuffer_Release(&out_view);
    e->open = outcome.code != COMPLETE;
    if (outcome.code == COMPLETE) {
        FAULT("pulled");
        Py_RETURN_TRUE;
    }
    if (outcome.code == PENDING) {
        Py_RETURN_FALSE;
    }
    return Py_BuildValue("inK", outcome.code, outcome.expert, (unsigned long long)outcome.value);
}

static exchange_t *
find_exchange(AttentionEnd *self, PyObject *token, PyObject *microbatch, Py_ssize_t *place)
{
    uint64_t wanted;
    if (parse_index(microbatch, "microbatch", self->g.num_microbatches, place) < 0 ||
        parse_unsigned(token, "token", UINT64_MAX, &wanted) < 0) {
        return NULL;
    }
    exchange_t *e = &self->exchanges[*place];
    if (!e->open || e->token != wanted) {
        PyErr_SetString(PyExc_ValueError, "handle: not the open exchange of its microbatch");
        return NULL;
    }
    return e;
}

PyObject *
AttentionEnd_recv(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch;
    uint64_t timeout;
    if (enter_attention(self, "recv", nargs, 5) < 0 || parse_unsigned(args[4], "timeout_ns", INT64_MAX, &timeout) < 0) {
        return NULL;
    }
    exchange_t *e = find_exchange(self, args[0], args[1], &microbatch);
    return e == NULL ? NULL : recv_rows(self, e, microbatch, args[2], args[3], (int64_t)timeout);
}

/* [(expert, incarnation)] that the exchange still waits for. */
PyObject *
AttentionEnd_pending(AttentionEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t microbatch;
    if (enter_attention(self, "pending", nargs, 2) < 0) {
        return NULL;
    }
    exchange_t *e = find_exchange(self, args[0], args[1], &microbatch);
    PyObject *list = e == NULL ? NULL : PyList_New(0);
    for (Py_ssize_t i = 0; list != NULL && i < e->num_pending; i++) {
        Py_ssize_t expert = e->pending[i];
        PyObject *entry = Py_BuildValue("nK", expert, (unsigned long long)e->life[expert]);
        if (entry == NULL || PyList_Append(list, entry) < 0) {
            Py_CLEAR(list);
        }
        Py_XDECREF(entry);
    }
    return list;
}
