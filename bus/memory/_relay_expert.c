/* The expert rank's end of A2E/E2A: one call finds what has arrived and forwards what is for others, one answers.
 *
 * Nothing here blocks but `wait`. What needs Python (mapping a segment, private memory, an error) is handed back as a
 * *problem*; once it is solved, `look_again` makes the next poll see the cell anew. */
#include "_relay_expert.h"

/* ---------------------------------------------------------------- life */

static Py_ssize_t
num_arrival_slots(const geometry_t *g)
{
    return 2 * g->num_attention * g->num_microbatches;
}

static int
open_relays(ExpertEnd *self)
{
    const geometry_t *g = &self->g;
    Py_ssize_t num = g->num_seats * g->num_microbatches;
    self->relays = PyMem_Calloc((size_t)num, sizeof *self->relays);
    for (Py_ssize_t i = 0; self->relays != NULL && i < num; i++) {
        relay_t *relay = &self->relays[i];
        relay->starts = PyMem_Calloc((size_t)g->num_experts + 1, sizeof *relay->starts);
        relay->asked = PyMem_Calloc(2 * (size_t)g->num_experts, sizeof *relay->asked);
        if (relay->starts == NULL || relay->asked == NULL) {
            return -1;
        }
        relay->life = relay->asked + g->num_experts;
    }
    return self->relays == NULL ? -1 : 0;
}

static int
ExpertEnd_init(ExpertEnd *self, PyObject *args, PyObject *kwargs)
{
    PyObject *geometry, *segment;
    long long spin_ns;
    if (self->ready || self->attention != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "ExpertEnd: already initialised");
        return -1;
    }
    if (!PyArg_ParseTuple(args, "O!O!L", &PyTuple_Type, &geometry, &PyTuple_Type, &segment, &spin_ns) ||
        parse_geometry(geometry, &self->g) < 0) {
        return -1;
    }
    const geometry_t *g = &self->g;
    if (g->rank < 0 || g->rank >= g->num_experts || spin_ns < 0 || PyTuple_GET_SIZE(segment) != 4) {
        PyErr_Format(PyExc_ValueError, "rank: %zd must be in 0..%zd, spin_ns at least 0", g->rank, g->num_experts - 1);
        return -1;
    }
    waiter_init(&self->waiter, spin_ns);
    self->must_scan = 1;
    self->attention = PyMem_Calloc((size_t)g->num_attention, sizeof *self->attention);
    self->experts = PyMem_Calloc((size_t)g->num_experts, sizeof *self->experts);
    self->slots = PyMem_Calloc((size_t)num_arrival_slots(g), sizeof *self->slots);
    self->seen = PyMem_Calloc((size_t)expert_cells(g), sizeof *self->seen);
    if (self->attention == NULL || self->experts == NULL || self->slots == NULL || self->seen == NULL ||
        open_relays(self) < 0) {
        PyErr_NoMemory();
        return -1;
    }
    PyObject *const *words = &PyTuple_GET_ITEM(segment, 0);
    if (open_peer(words, expert_cells(g), expert_bytes(g), &self->own) < 0 ||
        open_peer(words, expert_cells(g), expert_bytes(g), &self->experts[g->rank]) < 0) {
        return -1;
    }
    self->ready = 1;
    return 0;
}

static void
drop_slot(slot_t *slot)
{
    if (slot->pair_row != NULL) {
        PyBuffer_Release(&slot->view);
    }
    memset(slot, 0, sizeof *slot);
}

static void
release_all(ExpertEnd *self)
{
    const geometry_t *g = &self->g;
    for (Py_ssize_t i = 0; self->slots != NULL && i < num_arrival_slots(g); i++) {
        drop_slot(&self->slots[i]);
    }
    for (Py_ssize_t i = 0; self->attention != NULL && i < g->num_attention; i++) {
        drop_peer(&self->attention[i]);
    }
    for (Py_ssize_t i = 0; self->experts != NULL && i < g->num_experts; i++) {
        drop_peer(&self->experts[i]);
    }
    drop_peer(&self->own);
}

static void
ExpertEnd_dealloc(ExpertEnd *self)
{
    release_all(self);
    for (Py_ssize_t i = 0; self->relays != NULL && i < self->g.num_seats * self->g.num_microbatches; i++) {
        PyMem_Free(self->relays[i].starts);
        PyMem_Free(self->relays[i].asked);
    }
    PyMem_Free(self->relays);
    PyMem_Free(self->attention);
    PyMem_Free(self->experts);
    PyMem_Free(self->slots);
    PyMem_Free(self->seen);
    PyTypeObject *type = Py_TYPE(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyObject *
ExpertEnd_close(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (self->busy) {
        return enter_expert(self, "close", nargs, 0) < 0 ? NULL : Py_NewRef(Py_None);
    }
    release_all(self);
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- places and peers */

static place_t
locate(const geometry_t *g, Py_ssize_t index)
{
    Py_ssize_t group = index / g->num_microbatches, microbatch = index % g->num_microbatches;
    Py_ssize_t ranks = g->num_attention;
    if (group < 2 * ranks) {
        return (place_t){group < ranks ? DIRECT : FORWARD, group % ranks, 0, microbatch};
    }
    group -= 2 * ranks;
    if (group < g->num_seats) {
        return (place_t){ENTRY, guest_at(g, g->rank, group), group, microbatch};
    }
    group -= g->num_seats;
    return (place_t){RETURN, group / g->num_seats, group % g->num_seats, microbatch};
}

/* Who wrote the cell; NULL for the seat of nobody. */
static peer_t *
writer_of(ExpertEnd *self, const place_t *place)
{
    const geometry_t *g = &self->g;
    if (place->kind == RETURN || place->kind == FORWARD) {
        return &self->experts[place->kind == RETURN ? place->peer : trampoline_of(g, place->peer)];
    }
    return place->peer < g->num_attention ? &self->attention[place->peer] : NULL;
}

static PyObject *
set_peer(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs, int of_attention)
{
    Py_ssize_t rank;
    const geometry_t *g = &self->g;
    if (enter_expert(self, "set_peer", nargs, 5) < 0 ||
        parse_index(args[0], "rank", of_attention ? g->num_attention : g->num_experts, &rank) < 0) {
        return NULL;
    }
    if (!of_attention && rank == g->rank) {
        PyErr_SetString(PyExc_ValueError, "rank: the own segment is connected from the start");
        return NULL;
    }
    peer_t *peer = of_attention ? &self->attention[rank] : &self->experts[rank];
    Py_ssize_t cells = of_attention ? attention_cells(g) : expert_cells(g);
    if (open_peer(args + 1, cells, of_attention ? attention_bytes(g) : expert_bytes(g), peer) < 0) {
        return NULL;
    }
    if (of_attention) {
        crowd_t crowd = crowd_of(self);
        say_place(&crowd, g, peer, self->waiter.place);
    }
    Py_RETURN_NONE;
}

static PyObject *
ExpertEnd_set_attention(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    return set_peer(self, args, nargs, 1);
}

static PyObject *
ExpertEnd_set_expert(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    return set_peer(self, args, nargs, 0);
}

/* drop_peer(is_attention, rank, absent): let the mapping go; `absent` = it does not live. */
static PyObject *
ExpertEnd_drop_peer(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t rank;
    const geometry_t *g = &self->g;
    if (enter_expert(self, "drop_peer", nargs, 3) < 0) {
        return NULL;
    }
    int of_attention = PyObject_IsTrue(args[0]), absent = PyObject_IsTrue(args[2]);
    if (of_attention < 0 || absent < 0 ||
        parse_index(args[1], "rank", of_attention ? g->num_attention : g->num_experts, &rank) < 0) {
        return NULL;
    }
    if (!of_attention && rank == g->rank) {
        PyErr_SetString(PyExc_ValueError, "rank: the own segment stays connected");
        return NULL;
    }
    peer_t *peer = of_attention ? &self->attention[rank] : &self->experts[rank];
    drop_peer(peer);
    peer->absent = absent;
    Py_RETURN_NONE;
}

/* set_slot(index, memory, rows, pairs): [pair_row | pair_expert], then where INT8 is delivered [pair_scale], where it is
 * widened [x [rows, hidden] | y [pairs, hidden]]. */
static PyObject *
ExpertEnd_set_slot(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t index, rows, pairs;
    const geometry_t *g = &self->g;
    if (enter_expert(self, "set_slot", nargs, 4) < 0 || parse_index(args[0], "index", num_arrival_slots(g), &index) < 0 ||
        parse_index(args[2], "rows", g->rows_max + 1, &rows) < 0 ||
        parse_index(args[3], "pairs", pairs_max(g) + 1, &pairs) < 0) {
        return NULL;
    }
    Py_ssize_t size = 8 * pairs + (widens(g) ? 4 * (rows + pairs) * g->hidden : g->delivers_int8 ? 4 * pairs : 0);
    Py_buffer view;
    if (PyObject_GetBuffer(args[1], &view, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    if (view.len < size || ((uintptr_t)view.buf & 3) != 0) {
        PyErr_Format(PyExc_ValueError, "memory: %zd bytes, must be at least %zd and aligned", view.len, size);
        PyBuffer_Release(&view);
        return NULL;
    }
    slot_t *slot = &self->slots[index];
    drop_slot(slot);
    int32_t *words = view.buf;
    slot->view = view;
    slot->rows = rows;
    slot->pairs = pairs;
    slot->pair_row = words;
    slot->pair_expert = words + pairs;
    slot->pair_scale = slot->x = (float *)(words + 2 * pairs);
    slot->y = slot->x + rows * g->hidden;
    Py_RETURN_NONE;
}

static PyObject *
ExpertEnd_look_again(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t index;
    if (enter_expert(self, "look_again", nargs, 1) < 0 ||
        parse_index(args[0], "index", expert_cells(&self->g), &index) < 0) {
        return NULL;
    }
    self->seen[index] = 0;
    self->must_scan = 1;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- arrivals */

static void
dequantise_rows(const geometry_t *g, const char *source, slot_t *slot, Py_ssize_t num_rows)
{
    const float *scales = (const float *)(source + g->x_scale_at);
    const int8_t *rows = (const int8_t *)source;
    if (slot->count < num_rows) { /* fewer pairs than rows: only those that are wanted */
        for (Py_ssize_t p = 0; p < slot->count; p++) {
            Py_ssize_t row = slot->pair_row[p];
            if (p == 0 || row != slot->pair_row[p - 1]) {
                dequantise_row(slot->x + row * g->hidden, rows + row * g->hidden, scales[row], g->hidden);
            }
        }
        return;
    }
    for (Py_ssize_t row = 0; row < num_rows; row++) {
        dequantise_row(slot->x + row * g->hidden, rows + row * g->hidden, scales[row], g->hidden);
    }
}

/* Copy the pairs and check them; -1: a row number outside 0..num_rows - 1. */
static int
copy_pairs(const geometry_t *g, const char *source, slot_t *slot, Py_ssize_t first, Py_ssize_t num_rows)
{
    const int32_t *rows = (const int32_t *)(source + g->pair_row_at) + first;
    const int32_t *experts = (const int32_t *)(source + g->pair_expert_at) + first;
    const float *scales = (const float *)(source + g->x_scale_at);
    for (Py_ssize_t p = 0; p < slot->count; p++) {
        int32_t row = load_word(&rows[p]);
        if (row < 0 || row >= num_rows) {
            return -1;
        }
        slot->pair_row[p] = row;
        slot->pair_expert[p] = load_word(&experts[p]);
        if (g->delivers_int8) {
            slot->pair_scale[p] = scales[row];
        }
    }
    return 0;
}

/* The other kind of cell that the same attention rank's exchange may come by uses the same result block. */
static slot_t *
rival_of(ExpertEnd *self, Py_ssize_t index)
{
    Py_ssize_t half = self->g.num_attention * self->g.num_microbatches;
    return &self->slots[index < half ? index + half : index - half];
}

static int
open_arrival(ExpertEnd *self, const place_t *place, Py_ssize_t index, const uint64_t *words, found_t *found)
{
    const geometry_t *g = &self->g;
    uint64_t first = words[2] >> 32, count = words[2] & UINT32_MAX, num_rows = words[3];
    if (!fits(g, place, words[1], first + count, num_rows)) {
        return report(found, BAD_COUNTS, index, words, first + count, num_rows);
    }
    slot_t *slot = &self->slots[index], *rival = rival_of(self, index);
    if (slot->pair_row == NULL || slot->rows < (Py_ssize_t)num_rows || slot->pairs < (Py_ssize_t)count) {
        return report(found, NO_SLOT, index, words, num_rows, count);
    }
    if (rival->word != 0) {
        if ((int64_t)(words[1] - rival->event_id) < 0) { /* it came by the other way, and later */
            self->dropped++;
            return 0;
        }
        rival->word = 0;
        self->has_rivals = 1;
    }
    Py_ssize_t block = place->microbatch * g->source_bytes;
    if (place->kind == FORWARD) {
        block = g->seat_sources_at + seat_of(g, place->peer) * g->num_microbatches * g->source_bytes + block;
    }
    const char *source = managed_at(writer_of(self, place), block);
    slot->count = (Py_ssize_t)count;
    slot->word = 0;
    if (copy_pairs(g, source, slot, (Py_ssize_t)first, (Py_ssize_t)num_rows) < 0) {
        return report(found, BAD_ROWS, index, words, num_rows, 0);
    }
    if (widens(g)) {
        self->busy = 1;
        Py_BEGIN_ALLOW_THREADS
        dequantise_rows(g, source, slot, (Py_ssize_t)num_rows);
        Py_END_ALLOW_THREADS
        self->busy = 0;
    }
    slot->word = words[0];
    slot->event_id = words[1];
    FAULT("arrived");
    return append(&found->arrivals,
                  Py_BuildValue("nKKnn", index, (unsigned long long)words[0], (unsigned long long)words[1],
                                (Py_ssize_t)num_rows, (Py_ssize_t)count));
}

/* ---------------------------------------------------------------- polling */

static int
take_cell(ExpertEnd *self, Py_ssize_t index, const uint64_t *words, found_t *found)
{
    place_t place = locate(&self->g, index);
    const peer_t *writer = writer_of(self, &place);
    if (writer == NULL) {
        return report(found, NOBODY, index, words, (uint64_t)place.seat, 0);
    }
    if (writer->base == NULL || !stamped_by(words[0], writer->incarnation)) {
        return report(found, UNKNOWN_WRITER, index, words, 0, 0);
    }
    switch (place.kind) {
    case ENTRY:
        return enter_guest(self, &place, index, words, found);
    case RETURN:
        return collect(self, &place, index, words, found);
    default:
        return open_arrival(self, &place, index, words, found);
    }
}

static int
look_at(ExpertEnd *self, Py_ssize_t index, found_t *found)
{
    const uint64_t *cell = cell_at(&self->own, index);
    uint64_t words[CELL_WORDS];
    if (!has_news(cell, self->seen[index]) || !load_cell(cell, words)) { /* SYNC: cell-whole */
        return 0;
    }
    self->seen[index] = words[0];
    return take_cell(self, index, words, found);
}

/* Look at the cells of the owners that guests wait for; there is no news in the others. */
static int
scan_returns(ExpertEnd *self, Py_ssize_t first, found_t *found)
{
    const geometry_t *g = &self->g;
    Py_ssize_t num_places = g->num_seats * g->num_microbatches;
    for (Py_ssize_t i = 0; i < num_places; i++) {
        const relay_t *relay = &self->relays[i];
        for (Py_ssize_t r = 0; relay->open && r < g->num_experts; r++) {
            if (relay->asked[r] != 0 && look_at(self, first + r * num_places + i, found) < 0) {
                return -1;
            }
        }
    }
    return 0;
}

static int
scan(ExpertEnd *self, found_t *found)
{
    const geometry_t *g = &self->g;
    Py_ssize_t num = (2 * g->num_attention + g->num_seats) * g->num_microbatches;
    for (Py_ssize_t i = 0; i < num; i++) {
        if (look_at(self, i, found) < 0) {
            return -1;
        }
    }
    return scan_returns(self, num, found);
}

/* Take out of `arrivals` what a later arrival of the same poll has replaced: both would fill the same result block. */
static int
drop_replaced(ExpertEnd *self, PyObject *arrivals)
{
    self->has_rivals = 0;
    for (Py_ssize_t i = arrivals == NULL ? -1 : PyList_GET_SIZE(arrivals) - 1; i >= 0; i--) {
        PyObject *entry = PyList_GET_ITEM(arrivals, i);
        Py_ssize_t index = PyLong_AsSsize_t(PyTuple_GET_ITEM(entry, 0));
        uint64_t word = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(entry, 1));
        if (self->slots[index].word != word) {
            self->dropped++;
            if (PySequence_DelItem(arrivals, i) < 0) {
                return -1;
            }
        }
    }
    return 0;
}

static PyObject *
ExpertEnd_poll(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (enter_expert(self, "poll", nargs, 0) < 0) {
        return NULL;
    }
    uint32_t *bell = (uint32_t *)(self->own.base + DOORBELL_OFFSET);
    uint32_t seen = __atomic_load_n(bell, __ATOMIC_ACQUIRE); /* SYNC: word */
    if (seen == self->bell_seen && !self->must_scan) {
        Py_RETURN_NONE; /* every cell is followed by a ring */
    }
    self->bell_seen = seen;
    self->must_scan = 0;
    found_t found = {NULL, NULL};
    if (scan(self, &found) < 0 || (self->has_rivals && drop_replaced(self, found.arrivals) < 0)) {
        Py_XDECREF(found.arrivals);
        Py_XDECREF(found.problems);
        return NULL;
    }
    if (found.arrivals == NULL && found.problems == NULL) {
        Py_RETURN_NONE;
    }
    PyObject *result = PyTuple_Pack(2, found.arrivals ? found.arrivals : Py_None,
                                    found.problems ? found.problems : Py_None);
    Py_XDECREF(found.arrivals);
    Py_XDECREF(found.problems);
    return result;
}

/* ---------------------------------------------------------------- answering */

static void
store_results(const ExpertEnd *self, const place_t *place, const slot_t *slot)
{
    const geometry_t *g = &self->g;
    char *block = managed_at(&self->own, (place->peer * g->num_microbatches + place->microbatch) * g->result_bytes);
    float *scales = (float *)(block + g->y_scale_at);
    for (Py_ssize_t p = 0; p < slot->count; p++) {
        scales[p] = quantise_row((int8_t *)block + p * g->hidden, slot->y + p * g->hidden, g->hidden);
    }
}

static PyObject *
ExpertEnd_commit(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    const geometry_t *g = &self->g;
    Py_ssize_t index;
    uint64_t word;
    if (enter_expert(self, "commit", nargs, 2) < 0 || parse_index(args[0], "index", num_arrival_slots(g), &index) < 0 ||
        parse_unsigned(args[1], "word", UINT64_MAX, &word) < 0) {
        return NULL;
    }
    place_t place = locate(g, index);
    slot_t *slot = &self->slots[index];
    const peer_t *writer = writer_of(self, &place);
    if (word == 0 || slot->word != word || writer->base == NULL || !stamped_by(word, writer->incarnation)) {
        self->dropped++; /* given up by its sender, or answered already */
        Py_RETURN_FALSE;
    }
    if (widens(g)) {
        self->busy = 1;
        Py_BEGIN_ALLOW_THREADS
        store_results(self, &place, slot);
        Py_END_ALLOW_THREADS
        self->busy = 0;
    }
    Py_ssize_t group = g->rank;
    if (place.kind == FORWARD) {
        group = 2 * g->num_attention + g->num_seats + g->rank * g->num_seats + seat_of(g, place.peer);
    }
    slot->word = 0;
    FAULT("answering");
    self->by_stage[place.kind == FORWARD ? 1 : 2]++;
    push_cell(writer, group * g->num_microbatches + place.microbatch, self->own.incarnation, &self->writes,
              slot->event_id, (uint64_t)slot->count, word, place.kind == FORWARD ? RING_ALWAYS : RING_SLEEPERS);
    Py_RETURN_TRUE;
}

/* Poll, then sleep, until the doorbell has rung since the last poll began; 0 at the time limit or after a signal. */
static int
await_ring(ExpertEnd *self, int64_t timeout)
{
    uint32_t *bell = (uint32_t *)(self->own.base + DOORBELL_OFFSET);
    const awaited_t awaited = {.bell = bell, .seq = self->bell_seen};
    if (__atomic_load_n(bell, __ATOMIC_ACQUIRE) != self->bell_seen) { /* SYNC: word */
        return 1;
    }
    int64_t begin = now_ns(), until = deadline_after(begin, timeout);
    crowd_t crowd = crowd_of(self);
    spread(&self->waiter, &crowd, &self->g);
    int rung = poll_for(&self->waiter, &crowd, &awaited, until);
    if (!rung && now_ns() < until) {
        self->waiter.alarms_seen = num_alarms(bell); /* a later one rings, and Python looks for it itself */
        mark_asleep(bell);
        rung = sleep_for(&self->waiter, bell, self->bell_seen, 1, until);
        mark_awake(bell);
    }
    learn_duration(&self->waiter, now_ns() - begin);
    return rung;
}

/* wait(timeout_ns) -> whether someone has rung since the last poll began. */
static PyObject *
ExpertEnd_wait(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t timeout;
    if (enter_expert(self, "wait", nargs, 1) < 0 || parse_unsigned(args[0], "timeout_ns", INT64_MAX, &timeout) < 0) {
        return NULL;
    }
    int rung;
    self->busy = 1;
    Py_BEGIN_ALLOW_THREADS
    rung = await_ring(self, (int64_t)timeout);
    Py_END_ALLOW_THREADS
    self->busy = 0;
    return PyBool_FromLong(rung);
}

static PyObject *
ExpertEnd_counters(ExpertEnd *self, PyObject *const *args, Py_ssize_t nargs)
{
    return Py_BuildValue("{sKsKsKsKsKsKsK}", "a2e_forward_cell_writes", (unsigned long long)self->by_stage[0],
                         "e2a_forward_cell_writes", (unsigned long long)self->by_stage[1], "e2a_cell_writes",
                         (unsigned long long)self->by_stage[2], "relays_open", (unsigned long long)self->num_relays,
                         "dropped", (unsigned long long)self->dropped, "sleeps",
                         (unsigned long long)self->waiter.sleeps, "moves", (unsigned long long)self->waiter.moves);
}

static PyObject *
ExpertEnd_num_relays(ExpertEnd *self, void *closure)
{
    return PyLong_FromUnsignedLongLong(self->num_relays);
}

#define METHOD(name, doc) {#name, (PyCFunction)(void (*)(void))ExpertEnd_##name, METH_FASTCALL, doc}

static PyMethodDef methods[] = {
    METHOD(set_attention, "set_attention(rank, buf, incarnation, cells_offset, managed_offset)."),
    METHOD(set_expert, "set_expert(rank, buf, incarnation, cells_offset, managed_offset)."),
    METHOD(drop_peer, "drop_peer(is_attention, rank, absent)."),
    METHOD(set_slot, "set_slot(index, memory, rows, pairs): private memory of the arrivals of a cell."),
    METHOD(look_again, "look_again(index): the next poll sees this cell as news."),
    METHOD(poll, "poll() -> None or (arrivals or None, problems or None)."),
    METHOD(commit, "commit(index, word) -> whether the arrival was still open and is answered now."),
    METHOD(wait, "wait(timeout_ns) -> whether someone has rung since the last poll began."),
    METHOD(awaited, "awaited() -> [(seat, microbatch, owner, incarnation)] that guests wait for."),
    METHOD(fail, "fail(seat, microbatch, owner): tell the guest that the owner is dead."),
    METHOD(counters, "counters() -> dict."),
    METHOD(close, "close(): let all mappings go."),
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getset[] = {
    {"num_relays", (getter)ExpertEnd_num_relays, NULL, "Exchanges of guests that are under way.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "ExpertEnd(geometry, (buf, incarnation, cells_offset, managed_offset), spin_ns)."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_init, ExpertEnd_init},
    {Py_tp_dealloc, ExpertEnd_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {0, NULL},
};

PyType_Spec expert_end_spec = {
    .name = "bus.memory._relay.ExpertEnd",
    .basicsize = sizeof(ExpertEnd),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = type_slots,
};
