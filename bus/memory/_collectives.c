/* The all-to-all collectives' work on rows: `Exchange` for dispatch/combine, and plain functions of the same kind on
 * buffers for A2E/E2A. */
#include "_collectives.h"
#include "_collectives_exchange.h"

static PyObject *
partition(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t num_groups;
    if (check_count("partition", nargs, 4) < 0 || parse_index(args[1], "num_groups", 1 << 20, &num_groups) < 0) {
        return NULL;
    }
    buffers_t all = {.num = 0};
    const int32_t *group = take_buffer(&all, args[0], "group", 0, PyBUF_SIMPLE);
    Py_ssize_t num = group ? all.views[0].len / 4 : 0;
    int32_t *order = group ? take_buffer(&all, args[2], "order", num * 4, PyBUF_WRITABLE) : NULL;
    int32_t *starts = order ? take_buffer(&all, args[3], "starts", (num_groups + 1) * 4, PyBUF_WRITABLE) : NULL;
    if (starts == NULL) {
        return give_back(&all, NULL);
    }
    memset(starts, 0, (size_t)(num_groups + 1) * 4);
    for (Py_ssize_t i = 0; i < num; i++) {
        if (group[i] >= num_groups) {
            PyErr_Format(PyExc_ValueError, "group: %d is outside -1..%zd", (int)group[i], num_groups - 1);
            return give_back(&all, NULL);
        }
        if (group[i] >= 0) {
            starts[group[i] + 1]++;
        }
    }
    for (Py_ssize_t g = 0; g < num_groups; g++) {
        starts[g + 1] += starts[g];
    }
    Py_ssize_t total = starts[num_groups];
    for (Py_ssize_t i = 0; i < num; i++) { /* starts[g] serves as the next place of group g ... */
        if (group[i] >= 0) {
            order[starts[group[i]]++] = (int32_t)i;
        }
    }
    memmove(starts + 1, starts, (size_t)num_groups * 4); /* ... and ends up as the start of group g + 1 */
    starts[0] = 0;
    return give_back(&all, PyLong_FromSsize_t(total));
}

/* route(topk_idx, top_k, num_experts, position, starts, pair_row): what dispatch does to a batch before it sends. */
static PyObject *
route(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t top_k, num_experts;
    if (check_count("route", nargs, 6) < 0 || parse_index(args[1], "top_k", TOP_K_MAX + 1, &top_k) < 0 ||
        parse_index(args[2], "num_experts", 1 << 20, &num_experts) < 0) {
        return NULL;
    }
    buffers_t all = {.num = 0};
    const int32_t *topk = take_buffer(&all, args[0], "topk_idx", 0, PyBUF_SIMPLE);
    Py_ssize_t num = topk ? all.views[0].len / 4 : 0;
    int32_t *position = topk ? take_buffer(&all, args[3], "position", num * 4, PyBUF_WRITABLE) : NULL;
    int32_t *starts = position ? take_buffer(&all, args[4], "starts", (num_experts + 1) * 4, PyBUF_WRITABLE) : NULL;
    int32_t *pair_row = starts ? take_buffer(&all, args[5], "pair_row", num * 4, PyBUF_WRITABLE) : NULL;
    int32_t *next = pair_row ? PyMem_Malloc((size_t)num_experts * 4 + 4) : NULL;
    if (next == NULL) {
        return give_back(&all, pair_row ? PyErr_NoMemory() : NULL);
    }
    Py_ssize_t total = -1;
    if (top_k > 0 && num % top_k == 0) {
        total = route_pairs(topk, num, top_k, num_experts, next, position, starts, pair_row);
    }
    PyMem_Free(next);
    if (total < 0) {
        PyErr_Format(PyExc_ValueError, "topk_idx: not whole rows of %zd, or an id is outside -1..%zd", top_k,
                     num_experts - 1);
        return give_back(&all, NULL);
    }
    return give_back(&all, PyLong_FromSsize_t(total));
}

/* The rows of a scatter or gather: index[i] in 0..limit-1, or an IndexError that names the first bad one. */
static int
check_rows(const int32_t *index, Py_ssize_t num, Py_ssize_t limit)
{
    for (Py_ssize_t i = 0; i < num; i++) {
        if (index[i] < 0 || index[i] >= limit) {
            PyErr_Format(PyExc_IndexError, "index: row %d is outside 0..%zd", (int)index[i], limit - 1);
            return -1;
        }
    }
    return 0;
}

/* scatter: dst[index[i]] = src[i]; gather: dst[i] = src[index[i]]. `index` must be private to the caller. */
static PyObject *
move_rows(const char *name, PyObject *const *args, Py_ssize_t nargs, int scatter)
{
    Py_ssize_t width;
    if (check_count(name, nargs, 4) < 0 || parse_index(args[3], "row_bytes", 1 << 24, &width) < 0) {
        return NULL;
    }
    if (width == 0) {
        PyErr_Format(PyExc_ValueError, "%s: row_bytes must be at least 1", name);
        return NULL;
    }
    buffers_t all = {.num = 0};
    const int32_t *index = take_buffer(&all, args[1], "index", 0, PyBUF_SIMPLE);
    Py_ssize_t num = index ? all.views[0].len / 4 : 0;
    char *dst = index ? take_buffer(&all, args[0], "dst", scatter ? 0 : num * width, PyBUF_WRITABLE) : NULL;
    const char *src = dst ? take_buffer(&all, args[2], "src", scatter ? num * width : 0, PyBUF_SIMPLE) : NULL;
    if (src == NULL || check_rows(index, num, all.views[scatter ? 1 : 2].len / width) < 0) {
        return give_back(&all, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < num; i++) {
        copy_bytes(dst + (scatter ? index[i] : i) * width, src + (scatter ? i : index[i]) * width, width);
    }
    Py_END_ALLOW_THREADS
    return give_back(&all, Py_NewRef(Py_None));
}

static PyObject *
scatter_rows(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return move_rows("scatter_rows", args, nargs, 1);
}

static PyObject *
gather_rows(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    return move_rows("gather_rows", args, nargs, 0);
}

/* out[i] = 0 + weights[i, k] * src[index[i, k]] for k = 0..top_k-1 in this order; a negative index adds nothing. */
static PyObject *
weighted_sum(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t num, top_k, width;
    if (check_count("weighted_sum", nargs, 7) < 0 || parse_index(args[4], "num_rows", 1 << 24, &num) < 0 ||
        parse_index(args[5], "top_k", TOP_K_MAX + 1, &top_k) < 0 ||
        parse_index(args[6], "hidden", 1 << 20, &width) < 0) {
        return NULL;
    }
    buffers_t all = {.num = 0};
    float *out = take_buffer(&all, args[0], "out", num * width * 4, PyBUF_WRITABLE);
    const float *src = out ? take_buffer(&all, args[1], "src", 0, PyBUF_SIMPLE) : NULL;
    const int32_t *index = src ? take_buffer(&all, args[2], "index", num * top_k * 4, PyBUF_SIMPLE) : NULL;
    const float *weights = index ? take_buffer(&all, args[3], "weights", num * top_k * 4, PyBUF_SIMPLE) : NULL;
    if (weights == NULL) {
        return give_back(&all, NULL);
    }
    Py_ssize_t limit = width > 0 ? all.views[1].len / (width * 4) : 0;
    for (Py_ssize_t i = 0; i < num * top_k; i++) {
        if (index[i] >= limit) {
            PyErr_Format(PyExc_IndexError, "index: row %d is outside 0..%zd", (int)index[i], limit - 1);
            return give_back(&all, NULL);
        }
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < num; i++) {
        const float *rows[TOP_K_MAX];
        float factors[TOP_K_MAX];
        int used = 0;
        for (Py_ssize_t k = i * top_k; k < (i + 1) * top_k; k++) {
            if (index[k] >= 0) {
                rows[used] = src + (Py_ssize_t)index[k] * width;
                factors[used++] = weights[k];
            }
        }
        add_slots(out + i * width, rows, factors, used, width);
    }
    Py_END_ALLOW_THREADS
    return give_back(&all, Py_NewRef(Py_None));
}

/* The same of rows [width int8 | scale float32], dequantised as they are added. */
static PyObject *
weighted_sum_int8(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t num, top_k, width;
    if (check_count("weighted_sum_int8", nargs, 7) < 0 || parse_index(args[4], "num_rows", 1 << 24, &num) < 0 ||
        parse_index(args[5], "top_k", TOP_K_MAX + 1, &top_k) < 0 ||
        parse_index(args[6], "hidden", 1 << 20, &width) < 0) {
        return NULL;
    }
    buffers_t all = {.num = 0};
    float *out = take_buffer(&all, args[0], "out", num * width * 4, PyBUF_WRITABLE);
    const int8_t *src = out ? take_buffer(&all, args[1], "src", 0, PyBUF_SIMPLE) : NULL;
    const int32_t *index = src ? take_buffer(&all, args[2], "index", num * top_k * 4, PyBUF_SIMPLE) : NULL;
    const float *weights = index ? take_buffer(&all, args[3], "weights", num * top_k * 4, PyBUF_SIMPLE) : NULL;
    if (weights == NULL) {
        return give_back(&all, NULL);
    }
    Py_ssize_t row_bytes = width + 4, limit = all.views[1].len / row_bytes;
    for (Py_ssize_t i = 0; i < num * top_k; i++) {
        if (index[i] >= limit) {
            PyErr_Format(PyExc_IndexError, "index: row %d is outside 0..%zd", (int)index[i], limit - 1);
            return give_back(&all, NULL);
        }
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < num; i++) {
        const int8_t *rows[TOP_K_MAX];
        float factors[TOP_K_MAX], scales[TOP_K_MAX];
        int used = 0;
        for (Py_ssize_t k = i * top_k; k < (i + 1) * top_k; k++) {
            if (index[k] >= 0) {
                rows[used] = src + (Py_ssize_t)index[k] * row_bytes;
                memcpy(&scales[used], rows[used] + width, sizeof *scales);
                factors[used++] = weights[k];
            }
        }
        add_slots_int8(out + i * width, rows, scales, factors, used, width);
    }
    Py_END_ALLOW_THREADS
    return give_back(&all, Py_NewRef(Py_None));
}

static PyObject *
quantise(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t num, width;
    if (check_count("quantise", nargs, 5) < 0 || parse_index(args[3], "num_rows", 1 << 24, &num) < 0 ||
        parse_index(args[4], "hidden", 1 << 20, &width) < 0) {
        return NULL;
    }
    buffers_t all = {.num = 0};
    int8_t *dst = take_buffer(&all, args[0], "dst", num * width, PyBUF_WRITABLE);
    float *scales = dst ? take_buffer(&all, args[1], "scale", num * 4, PyBUF_WRITABLE) : NULL;
    const float *src = scales ? take_buffer(&all, args[2], "src", num * width * 4, PyBUF_SIMPLE) : NULL;
    if (src == NULL) {
        return give_back(&all, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < num; i++) {
        scales[i] = quantise_row(dst + i * width, src + i * width, width);
    }
    Py_END_ALLOW_THREADS
    return give_back(&all, Py_NewRef(Py_None));
}

static PyObject *
dequantise(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t num, width;
    if (check_count("dequantise", nargs, 5) < 0 || parse_index(args[3], "num_rows", 1 << 24, &num) < 0 ||
        parse_index(args[4], "hidden", 1 << 20, &width) < 0) {
        return NULL;
    }
    buffers_t all = {.num = 0};
    float *dst = take_buffer(&all, args[0], "dst", num * width * 4, PyBUF_WRITABLE);
    const int8_t *src = dst ? take_buffer(&all, args[1], "src", num * width, PyBUF_SIMPLE) : NULL;
    const float *scales = src ? take_buffer(&all, args[2], "scale", num * 4, PyBUF_SIMPLE) : NULL;
    if (scales == NULL) {
        return give_back(&all, NULL);
    }
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < num; i++) {
        dequantise_row(dst + i * width, src + i * width, scales[i], width);
    }
    Py_END_ALLOW_THREADS
    return give_back(&all, Py_NewRef(Py_None));
}

/* The cells of [offset, offset + num * 64) that were written since the last scan: [(index, w0, w1, w2, w3)]. */
static PyObject *
scan_cells(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_ssize_t offset, num;
    if (check_count("scan_cells", nargs, 4) < 0 || parse_index(args[1], "offset", PY_SSIZE_T_MAX / 2, &offset) < 0 ||
        parse_index(args[2], "num_cells", 1 << 20, &num) < 0) {
        return NULL;
    }
    buffers_t all = {.num = 0};
    char *base = take_buffer(&all, args[0], "buf", offset + num * CELL_STRIDE, PyBUF_SIMPLE);
    uint64_t *seen = base ? take_buffer(&all, args[3], "seen", num * 8, PyBUF_WRITABLE) : NULL;
    if (seen == NULL) {
        return give_back(&all, NULL);
    }
    if ((((uintptr_t)base + (uintptr_t)offset) & (CELL_STRIDE - 1)) != 0 || ((uintptr_t)seen & 7) != 0) {
        PyErr_Format(PyExc_ValueError, "offset: cells at %zd are not aligned to %d bytes", offset, CELL_STRIDE);
        return give_back(&all, NULL);
    }
    PyObject *list = PyList_New(0);
    for (Py_ssize_t i = 0; list != NULL && i < num; i++) {
        const uint64_t *cell = (const uint64_t *)(base + offset + i * CELL_STRIDE);
        uint64_t words[4];
        if (__atomic_load_n(&cell[0], __ATOMIC_RELAXED) == seen[i] || !load_cell(cell, words) || words[0] == seen[i]) {
            continue;
        }
        PyObject *entry = Py_BuildValue("(nKKKK)", i, (unsigned long long)words[0], (unsigned long long)words[1],
                                        (unsigned long long)words[2], (unsigned long long)words[3]);
        if (entry == NULL || PyList_Append(list, entry) < 0) {
            Py_CLEAR(list);
        }
        else {
            seen[i] = words[0];
        }
        Py_XDECREF(entry);
    }
    return give_back(&all, list);
}

/* ---------------------------------------------------------------- module */

#define ENTRY(name, doc) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, doc}

static PyMethodDef methods[] = {
    ENTRY(partition, "partition(group, num_groups, order, starts) -> pairs placed. Stable; negative = none."),
    ENTRY(route, "route(topk_idx, top_k, num_experts, position, starts, pair_row) -> pairs: sort them by expert."),
    ENTRY(scan_cells, "scan_cells(buf, offset, num_cells, seen) -> [(index, w0, w1, w2, w3)] written since."),
    ENTRY(scatter_rows, "scatter_rows(dst, index, src, row_bytes): dst[index[i]] = src[i]."),
    ENTRY(gather_rows, "gather_rows(dst, index, src, row_bytes): dst[i] = src[index[i]]."),
    ENTRY(weighted_sum, "weighted_sum(out, src, index, weights, num_rows, top_k, hidden)."),
    ENTRY(weighted_sum_int8, "weighted_sum_int8(out, src, index, weights, num_rows, top_k, hidden)."),
    ENTRY(quantise, "quantise(dst, scale, src, num_rows, hidden)."),
    ENTRY(dequantise, "dequantise(dst, src, scale, num_rows, hidden)."),
    {NULL, NULL, 0, NULL},
};

static int
module_exec(PyObject *module)
{
    PyType_Spec *specs[] = {&exchange_spec, &alltoall_spec};
    const char *names[] = {"Exchange", "AllToAll"};
    if (alltoall_init_names() < 0 || alltoall_init_persistent() < 0) {
        return -1;
    }
    for (int i = 0; i < 2; i++) {
        PyObject *type = PyType_FromModuleAndSpec(module, specs[i], NULL);
        int outcome = type == NULL ? -1 : PyModule_AddObjectRef(module, names[i], type);
        Py_XDECREF(type);
        if (outcome < 0) {
            return -1;
        }
    }
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, module_exec}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "bus.memory._collectives",
    .m_doc = "Rows of the all-to-all collectives: routing, staging, counts, pulling, weighted addition.",
    .m_size = 0,
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__collectives(void)
{
    return PyModuleDef_Init(&definition);
}
