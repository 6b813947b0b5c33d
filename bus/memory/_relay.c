/* A2E/E2A: geometry, peers, stamped cells, waiting, and the module. The two ends are in _relay_attention*.c and
 * _relay_expert.c. Release stores and the acquire loads that pair with them carry the same "SYNC: <label>", as in
 * _native.h. */
#include "_relay.h"

/* ---------------------------------------------------------------- geometry */

static int
check_sizes(const geometry_t *g)
{
    const Py_ssize_t sizes[] = {g->num_attention,    g->num_experts,  g->rows_max,     g->num_slots,    g->hidden,
                                g->num_microbatches, g->domain_ranks, g->domain_seats, g->num_seats + 1};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        if (sizes[i] < 1 || sizes[i] > 1 << 20) {
            PyErr_Format(PyExc_ValueError, "shape: size %zu is %zd, must be in 1..%d", i, sizes[i], 1 << 20);
            return -1;
        }
    }
    if ((double)g->rows_max * g->num_slots * g->hidden > (double)(1LL << 40) || pairs_max(g) > INT32_MAX ||
        g->num_slots > SLOTS_MAX) {
        PyErr_Format(PyExc_ValueError, "shape: %zd rows of %zd slots are too many (at most %d slots)", g->rows_max,
                     g->num_slots, SLOTS_MAX);
        return -1;
    }
    return 0;
}

static int
check_parts(const geometry_t *g)
{
    Py_ssize_t scale = g->int8 ? 4 : 0, pairs = pairs_max(g);
    const Py_ssize_t parts[][3] = {
        {g->x_scale_at, g->rows_max * scale, g->source_bytes},
        {g->starts_at, 4 * (g->num_experts + 1), g->source_bytes},
        {g->pair_row_at, 4 * pairs, g->source_bytes},
        {g->pair_expert_at, 4 * pairs, g->source_bytes},
        {0, g->rows_max * row_bytes(g), g->x_scale_at},
        {g->y_scale_at, pairs * scale, g->result_bytes},
        {0, pairs * row_bytes(g), g->y_scale_at},
        {0, g->num_attention * g->num_microbatches * g->result_bytes, g->seat_sources_at},
        {g->seat_sources_at, g->num_seats * g->num_microbatches * g->source_bytes, g->seat_results_at},
    };
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        if (parts[i][0] < 0 || parts[i][0] % CELL_STRIDE != 0 || parts[i][0] + parts[i][1] > parts[i][2]) {
            PyErr_Format(PyExc_ValueError, "offsets: part %zu leaves its block of %zd bytes", i, parts[i][2]);
            return -1;
        }
    }
    if (g->source_bytes % CELL_STRIDE != 0 || g->result_bytes % CELL_STRIDE != 0) {
        PyErr_SetString(PyExc_ValueError, "offsets: blocks must be whole cache lines");
        return -1;
    }
    return 0;
}

int
parse_geometry(PyObject *tuple, geometry_t *g)
{
    if (!PyArg_ParseTuple(tuple, "nnnnnnnpnnnnnnnnnnnnp", &g->rank, &g->num_attention, &g->num_experts, &g->rows_max,
                          &g->num_slots, &g->hidden, &g->num_microbatches, &g->int8, &g->domain_ranks,
                          &g->domain_seats, &g->num_seats, &g->source_bytes, &g->x_scale_at, &g->starts_at,
                          &g->pair_row_at, &g->pair_expert_at, &g->result_bytes, &g->y_scale_at, &g->seat_sources_at,
                          &g->seat_results_at, &g->delivers_int8)) {
        return -1;
    }
    if (g->delivers_int8 && !g->int8) {
        PyErr_SetString(PyExc_ValueError, "shape: only INT8 transport can deliver INT8 rows");
        return -1;
    }
    return check_sizes(g) < 0 || check_parts(g) < 0 ? -1 : 0;
}

int
parse_index(PyObject *object, const char *name, Py_ssize_t limit, Py_ssize_t *out)
{
    *out = PyNumber_AsSsize_t(object, PyExc_IndexError);
    if (*out == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (*out < 0 || *out >= limit) {
        PyErr_Format(PyExc_IndexError, "%s: %zd is outside 0..%zd", name, *out, limit - 1);
        return -1;
    }
    return 0;
}

/* ---------------------------------------------------------------- peers */

int
open_peer(PyObject *const *args, Py_ssize_t num_cells, Py_ssize_t num_bytes, peer_t *peer)
{
    Py_ssize_t cells, managed;
    uint64_t incarnation;
    if (parse_unsigned(args[1], "incarnation", UINT64_MAX, &incarnation) < 0 ||
        parse_index(args[2], "cells_offset", PY_SSIZE_T_MAX / 4, &cells) < 0 ||
        parse_index(args[3], "managed_offset", PY_SSIZE_T_MAX / 4, &managed) < 0) {
        return -1;
    }
    Py_buffer view;
    if (PyObject_GetBuffer(args[0], &view, PyBUF_WRITABLE) < 0) {
        return -1;
    }
    if (cells < DOORBELL_OFFSET + BELL_BYTES || cells % CELL_STRIDE != 0 || managed % CELL_STRIDE != 0 ||
        ((uintptr_t)view.buf & 7) != 0 || num_cells * CELL_STRIDE > managed - cells || managed > view.len ||
        num_bytes > view.len - managed) {
        PyErr_Format(PyExc_ValueError, "segment: %zd cells and %zd bytes do not fit its %zd bytes", num_cells,
                     num_bytes, view.len);
        PyBuffer_Release(&view);
        return -1;
    }
    drop_peer(peer);
    *peer = (peer_t){view, view.buf, cells, managed, incarnation, 0};
    return 0;
}

void
drop_peer(peer_t *peer)
{
    if (peer->base != NULL) {
        peer->base = NULL;
        PyBuffer_Release(&peer->view);
    }
    peer->absent = 0;
}

/* Ring for a waiter. One that lacks several rings need not be woken before as many have come. */
static void
ring_peer(uint32_t *bell, int how)
{
    if (how == RING_SLEEPERS) {
        /* Either we see the sleeper's mark, or the sleeper, which looks once more behind its mark, sees the cell. */
        __atomic_thread_fence(__ATOMIC_SEQ_CST);                   /* SYNC: bell-quiet */
        if (__atomic_load_n(&bell[1], __ATOMIC_RELAXED) == 0) {    /* SYNC: bell-quiet */
            return;
        }
    }
    uint32_t seq = __atomic_add_fetch(&bell[0], 1, __ATOMIC_SEQ_CST); /* SYNC: doorbell, SYNC: word */
    if (__atomic_load_n(&bell[1], __ATOMIC_SEQ_CST) == 0) {           /* SYNC: doorbell */
        return;
    }
    int is_patient = __atomic_load_n(&bell[2], __ATOMIC_SEQ_CST) != 0;
    if (!is_patient || (int32_t)(seq - __atomic_load_n(&bell[3], __ATOMIC_SEQ_CST)) >= 0) {
        wake_sleepers(&bell[0], INT_MAX);
    }
}

uint64_t
push_cell(const peer_t *peer, Py_ssize_t cell, uint64_t incarnation, uint64_t *writes, uint64_t event_id, uint64_t w2,
          uint64_t w3, int how)
{
    uint64_t stamp = (incarnation & INCARNATION_MASK) << COUNTER_BITS | (++*writes & ((1ULL << COUNTER_BITS) - 1));
    const uint64_t words[CELL_WORDS] = {stamp, event_id, w2, w3};
    store_cell(cell_at(peer, cell), words); /* SYNC: cell-whole (blocks written before are visible to its reader) */
    FAULT("published");
    ring_peer((uint32_t *)(peer->base + DOORBELL_OFFSET), how);
    FAULT("rung");
    return stamp;
}

/* ---------------------------------------------------------------- module */

static int
add_type(PyObject *module, const char *name, PyType_Spec *spec)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (type == NULL) {
        return -1;
    }
    int outcome = PyModule_AddObjectRef(module, name, type);
    Py_DECREF(type);
    return outcome;
}

static int
module_exec(PyObject *module)
{
    return add_type(module, "AttentionEnd", &attention_end_spec) < 0 ||
                   add_type(module, "ExpertEnd", &expert_end_spec) < 0
               ? -1
               : 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "bus.memory._relay",
    .m_doc = "The two ends of A2E/E2A over mapped segments.",
    .m_size = 0,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__relay(void)
{
    return PyModuleDef_Init(&definition);
}
