/* The paged KV cache: storing rows, and attention over them. */
#include "_kernels.h"
#include "_quantise_row.h"

/* Where rows lie: row t is token positions[t] of sequence seq_of_row[t], in its blocks. */
typedef struct {
    array block_tables, seq_of_row, positions; /* [S, max_blocks], [T], [T] */
} places;

static int take_places(arguments *args, PyObject *const *objects, Py_ssize_t num_rows, places *at)
{
    return take(args, objects[0], "block_tables", 'i', 2, 0, &at->block_tables) &&
           take_shaped(args, objects[1], "seq_of_row", 'i', 0, &at->seq_of_row, EXTENTS(num_rows)) &&
           take_shaped(args, objects[2], "positions", 'i', 0, &at->positions, EXTENTS(num_rows));
}

static int32_t seq_at(const places *at, Py_ssize_t row)
{
    return ((const int32_t *)at->seq_of_row.data)[row];
}

static int32_t position_at(const places *at, Py_ssize_t row)
{
    return ((const int32_t *)at->positions.data)[row];
}

static const int32_t *table_at(const places *at, Py_ssize_t row)
{
    return (const int32_t *)at->block_tables.data + seq_at(at, row) * at->block_tables.stride[0];
}

/* Every row's sequence, position and block ids lie inside the tables and the cache (nothing is read before). */
static int check_places(arguments *args, const array *cache, const places *at, int whole_prefix)
{
    if (cache->shape[1] < 1) {
        PyErr_Format(PyExc_ValueError, "%s: blocks must have tokens", args->function);
        return 0;
    }
    for (Py_ssize_t t = 0; t < at->seq_of_row.shape[0]; t++) {
        int32_t seq = seq_at(at, t), position = position_at(at, t);
        Py_ssize_t last = position / cache->shape[1];
        if (seq < 0 || seq >= at->block_tables.shape[0] || position < 0 || last >= at->block_tables.shape[1]) {
            PyErr_Format(PyExc_ValueError, "%s: row %zd: sequence %d, position %d outside the block tables",
                         args->function, t, seq, position);
            return 0;
        }
        const int32_t *table = table_at(at, t);
        for (Py_ssize_t b = whole_prefix ? 0 : last; b <= last; b++)
            if (table[b] < 0 || table[b] >= cache->shape[0]) {
                PyErr_Format(PyExc_ValueError, "%s: sequence %d: block id %d outside 0..%zd", args->function, seq,
                             table[b], cache->shape[0] - 1);
                return 0;
            }
    }
    return 1;
}

/* The index of a row's first element, in elements of the cache. */
static Py_ssize_t slot_at(const array *cache, const places *at, Py_ssize_t row)
{
    int32_t position = position_at(at, row);
    return table_at(at, row)[position / cache->shape[1]] * cache->stride[0] + position % cache->shape[1] * cache->stride[1];
}

/* Whether rows of `width` floats, `rank` of them latent, fill the rows of an INT8 cache. */
static int check_latent(arguments *args, Py_ssize_t rank, Py_ssize_t width, const array *cache)
{
    if (rank >= 1 && rank <= width)
        return need(args, "cache", cache, 2, LATENT_ROPE_AT(rank) + (width - rank) * (Py_ssize_t)sizeof(float));
    PyErr_Format(PyExc_ValueError, "%s: rank %zd must be in 1..%zd", args->function, rank, width);
    return 0;
}

/* x [T, KVH, D], cache [num_blocks, block_tokens, KVH, D], block_tables [S, max_blocks], seq_of_row [T],
 * positions [T]: copy each row to its slot. */
KERNEL(kv_store)
{
    arguments args = {.function = "kv_store"};
    array x, cache;
    places at;
    if (!need_count(args.function, count, 5))
        return NULL;
    int ok = IN(0, x, 'f', ANY, ANY, ANY) && OUT(1, cache, 'f', ANY, ANY, x.shape[1], x.shape[2]) &&
             take_places(&args, objects + 2, x.shape[0], &at) && check_places(&args, &cache, &at, 0);
    for (Py_ssize_t t = 0; ok && t < x.shape[0]; t++) {
        float *slot = (float *)cache.data + slot_at(&cache, &at, t);
        for (Py_ssize_t h = 0; h < x.shape[1]; h++)
            memcpy(slot + h * cache.stride[2], row_f32(&x, t, h), x.shape[2] * sizeof(float));
    }
    return finish(&args, ok);
}

/* x [T, rank + rope], rank, cache [num_blocks, block_tokens, row bytes] uint8, block_tables [S, max_blocks], seq_of_row
 * [T], positions [T]: round each row's latent to INT8 and put the row into its slot. */
KERNEL(latent_store)
{
    arguments args = {.function = "latent_store"};
    array x, cache;
    places at;
    if (!need_count(args.function, count, 6))
        return NULL;
    Py_ssize_t rank = PyLong_AsSsize_t(objects[1]);
    if (rank == -1 && PyErr_Occurred())
        return NULL;
    int ok = IN(0, x, 'f', ANY, ANY) && OUT(2, cache, 'B', ANY, ANY, ANY) &&
             take_places(&args, objects + 3, x.shape[0], &at) && check_latent(&args, rank, x.shape[1], &cache) &&
             check_places(&args, &cache, &at, 0);
    for (Py_ssize_t t = 0; ok && t < x.shape[0]; t++) {
        uint8_t *slot = (uint8_t *)cache.data + slot_at(&cache, &at, t);
        const float *row = (const float *)x.data + t * x.stride[0];
        float scale;
        quantise_row(row, slot, &scale, rank, LATENT_SCALE_AT(rank));
        for (Py_ssize_t i = 0; i < LATENT_SCALE_AT(rank); i++)
            slot[i] = (uint8_t)(slot[i] - 128);
        memcpy(slot + LATENT_SCALE_AT(rank), &scale, sizeof scale);
        memcpy(slot + LATENT_ROPE_AT(rank), row + rank, (x.shape[1] - rank) * sizeof(float));
    }
    return finish(&args, ok);
}

/* Compute all rows without the interpreter lock. 0: a MemoryError is set. */
static int attend_rows(paged_attention_t *a, Py_ssize_t num_rows)
{
    Py_ssize_t rep = a->num_heads / a->num_kv_heads, rows_max = rep < GROUP_ROWS ? GROUP_ROWS / rep : 1, longest = 1;
    for (Py_ssize_t t = 0; t < num_rows; t++)
        longest = a->positions[t] + 1 > longest ? a->positions[t] + 1 : longest;
    Py_ssize_t num_floats = rows_max * rep * (longest + a->k_dim + a->v_dim + 1);
    Py_ssize_t block_floats = a->latent != NULL ? a->block_tokens * a->k_dim : 0;
    float *scratch = malloc((num_floats + block_floats) * sizeof(float));
    if (scratch == NULL) {
        PyErr_NoMemory();
        return 0;
    }
    a->block = scratch + num_floats;
    float *q = scratch, *scores = q + rows_max * rep * a->k_dim, *acc = scores + rows_max * rep * longest;
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t t = 0, rows; t < num_rows; t += rows) {
        for (rows = 1; rows < rows_max && t + rows < num_rows && a->seq_of_row[t + rows] == a->seq_of_row[t]; rows++)
            ;
        for (Py_ssize_t h = 0; h < a->num_kv_heads; h++)
            kernels->attend_group(a, t, rows, h, q, scores, acc);
    }
    Py_END_ALLOW_THREADS;
    free(scratch);
    return 1;
}

/* q [T, H, Dk], k [num_blocks, block_tokens, KVH, Dk], v [num_blocks, block_tokens, KVH, Dv], block_tables
 * [S, max_blocks], seq_of_row [T], positions [T], scale, out [T, H, Dv]: causal attention over 0..position. */
KERNEL(paged_attention)
{
    arguments args = {.function = "paged_attention"};
    array q, k, v, out;
    places at;
    if (!need_count(args.function, count, 8))
        return NULL;
    double scale = PyFloat_AsDouble(objects[6]);
    if (scale == -1.0 && PyErr_Occurred())
        return NULL;
    int ok = IN(0, q, 'f', ANY, ANY, ANY) && IN(1, k, 'f', ANY, ANY, ANY, q.shape[2]) &&
             IN(2, v, 'f', k.shape[0], k.shape[1], k.shape[2], ANY) &&
             take_places(&args, objects + 3, q.shape[0], &at) &&
             OUT(7, out, 'f', q.shape[0], q.shape[1], v.shape[3]) && check_places(&args, &k, &at, 1);
    if (ok && (k.shape[2] < 1 || q.shape[1] % k.shape[2] != 0)) {
        PyErr_Format(PyExc_ValueError, "paged_attention: %zd heads do not divide into %zd KV heads", q.shape[1],
                     k.shape[2]);
        ok = 0;
    }
    if (!ok)
        return finish(&args, 0);
    paged_attention_t a = {
        .q = q.data, .k = k.data, .v = v.data, .out = out.data,
        .q_stride_t = q.stride[0], .q_stride_h = q.stride[1],
        .out_stride_t = out.stride[0], .out_stride_h = out.stride[1],
        .k_stride_b = k.stride[0], .k_stride_t = k.stride[1], .k_stride_h = k.stride[2],
        .v_stride_b = v.stride[0], .v_stride_t = v.stride[1], .v_stride_h = v.stride[2],
        .block_tables = at.block_tables.data, .seq_of_row = at.seq_of_row.data, .positions = at.positions.data,
        .table_stride = at.block_tables.stride[0], .block_tokens = k.shape[1], .num_heads = q.shape[1],
        .num_kv_heads = k.shape[2], .k_dim = q.shape[2], .v_dim = v.shape[3], .scale = (float)scale,
    };
    return finish(&args, attend_rows(&a, q.shape[0]));
}

/* q [T, H, rank + rope], rank, cache [num_blocks, block_tokens, row bytes] uint8, block_tables [S, max_blocks],
 * seq_of_row [T], positions [T], scale, out [T, H, rank]: `paged_attention` over the rows written out in float32. */
KERNEL(latent_attention)
{
    arguments args = {.function = "latent_attention"};
    array q, cache, out;
    places at;
    if (!need_count(args.function, count, 8))
        return NULL;
    Py_ssize_t rank = PyLong_AsSsize_t(objects[1]);
    double scale = PyFloat_AsDouble(objects[6]);
    if (PyErr_Occurred())
        return NULL;
    int ok = IN(0, q, 'f', ANY, ANY, ANY) && IN(2, cache, 'B', ANY, ANY, ANY) &&
             take_places(&args, objects + 3, q.shape[0], &at) && OUT(7, out, 'f', q.shape[0], q.shape[1], rank) &&
             check_latent(&args, rank, q.shape[2], &cache) && check_places(&args, &cache, &at, 1);
    if (ok && q.shape[1] < 1) {
        PyErr_Format(PyExc_ValueError, "latent_attention: q must have heads");
        ok = 0;
    }
    if (!ok)
        return finish(&args, 0);
    paged_attention_t a = {
        .q = q.data, .out = out.data, .latent = cache.data,
        .q_stride_t = q.stride[0], .q_stride_h = q.stride[1],
        .out_stride_t = out.stride[0], .out_stride_h = out.stride[1],
        .latent_stride_b = cache.stride[0], .latent_stride_t = cache.stride[1],
        .k_stride_t = q.shape[2], .v_stride_t = q.shape[2],
        .block_tables = at.block_tables.data, .seq_of_row = at.seq_of_row.data, .positions = at.positions.data,
        .table_stride = at.block_tables.stride[0], .block_tokens = cache.shape[1], .num_heads = q.shape[1],
        .num_kv_heads = 1, .k_dim = q.shape[2], .v_dim = rank, .scale = (float)scale,
    };
    return finish(&args, attend_rows(&a, q.shape[0]));
}
