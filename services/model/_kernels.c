/* Python bindings of the model's arithmetic. The arithmetic itself, and its law, are in _kernels_impl.h.
 *
 * Arrays come in through the buffer protocol: float32 unless said otherwise, any outer strides, contiguous rows.
 * Every function checks types, ranks and extents, raises a ValueError that names the argument, and then computes
 * without the interpreter lock. Nothing here keeps a reference to an array.
 *
 * Two instruction sets are compiled on x86 (generic, and AVX2 with FMA), one elsewhere; the best that the processor
 * has is chosen at import. All processes of one host choose the same, so their bits agree.
 */

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#include "_arguments.h"
#include "_quantise_row.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAVE_AVX2_BUILD 1
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define LANES 8
#define X_TILE_FLOATS 65536 /* rows of x per pass over w: 256 KiB stay in the second-level cache */
#define PANEL 24            /* columns: whole tiles of every height; the next panel is fetched meanwhile */
#define GROUP_ROWS 16       /* query rows times heads that attention computes together */
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 12")

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t i8x32 __attribute__((vector_size(32)));
typedef uint32_t u8x32 __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef uint8_t b8 __attribute__((vector_size(8)));

#define PAIRS_EVEN 0, 2, 8, 10, 4, 6, 12, 14
#define PAIRS_ODD 1, 3, 9, 11, 5, 7, 13, 15
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i8x32){__VA_ARGS__})
#endif


typedef struct {
    const float *q, *k, *v;
    float *out;
    ptrdiff_t q_stride_t, q_stride_h, out_stride_t, out_stride_h;
    ptrdiff_t k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h;
    const int32_t *block_tables, *seq_of_row, *positions;
    ptrdiff_t table_stride, block_tokens, num_heads, num_kv_heads, k_dim, v_dim;
    float scale;
    const char *latent; /* instead of k and v: rows of latent_row_t, written out block by block */
    ptrdiff_t latent_stride_b, latent_stride_t; /* bytes */
    float *block; /* [block_tokens, k_dim], scratch for `latent` */
} paged_attention_t;

/* A row of the INT8 cache of latent attention, in bytes: rank int8 | padding to 4 | scale | rope floats. */
#define LATENT_SCALE_AT(rank) (((rank) + 3) / 4 * 4)
#define LATENT_ROPE_AT(rank) (LATENT_SCALE_AT(rank) + (ptrdiff_t)sizeof(float))

typedef struct {
    void (*matmul_nt)(const float *, ptrdiff_t, const void *, ptrdiff_t, int, float *, ptrdiff_t, ptrdiff_t, ptrdiff_t,
                      ptrdiff_t);
    void (*matmul_nn)(const float *, ptrdiff_t, const void *, ptrdiff_t, int, float *, ptrdiff_t, ptrdiff_t, ptrdiff_t,
                      ptrdiff_t);
    void (*silu_mul)(const float *, const float *, float *, ptrdiff_t);
    void (*rms_norm)(const float *, const float *, float, float *, ptrdiff_t);
    void (*rope)(const float *, const float *, const float *, int, float *, ptrdiff_t);
    void (*combine)(const float *, ptrdiff_t, const float *, ptrdiff_t, ptrdiff_t, const float *, float *, ptrdiff_t);
    float (*softmax_terms)(float *, float, ptrdiff_t);
    void (*sigmoid_row)(float *, ptrdiff_t);
    void (*attend_group)(const paged_attention_t *, ptrdiff_t, ptrdiff_t, ptrdiff_t, float *, float *, float *);
    void (*widen_e4m3)(const uint8_t *, const float *, ptrdiff_t, float *, ptrdiff_t);
} kernel_set;

#if defined(__aarch64__)
INLINE v8 vfma_neon(v8 a, v8 b, v8 c)
{
    float32x4_t x[2], y[2], z[2];
    memcpy(x, &a, sizeof x);
    memcpy(y, &b, sizeof y);
    memcpy(z, &c, sizeof z);
    z[0] = vfmaq_f32(z[0], x[0], y[0]);
    z[1] = vfmaq_f32(z[1], x[1], y[1]);
    memcpy(&c, z, sizeof c);
    return c;
}
#define VFMA(a, b, c) vfma_neon(a, b, c)
#else
#define VFMA(a, b, c) ((a) * (b) + (c))
#endif
#define WIDEN_U16(h) __builtin_convertvector(h, u8x32)
#define WIDEN_U8(b) __builtin_convertvector(b, u8x32)
#define FN(name) name##_generic
#include "_kernels_impl.h"
#undef FN
#undef VFMA
#undef WIDEN_U16
#undef WIDEN_U8

#ifdef HAVE_AVX2_BUILD
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define VFMA(a, b, c) ((v8)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define WIDEN_U16(h) ((u8x32)_mm256_cvtepu16_epi32((__m128i)(h)))
#define WIDEN_U8(b) ((u8x32)_mm256_cvtepu8_epi32(_mm_set_epi64x(0, (long long)(b))))
#define WIDEN_F16(h) ((v8)_mm256_cvtph_ps((__m128i)(h)))
#define FN(name) name##_avx2
#include "_kernels_impl.h"
#undef WIDEN_U16
#undef WIDEN_U8
#undef WIDEN_F16
#undef FN
#undef VFMA
#pragma GCC pop_options
#endif

static const kernel_set *kernels = &kernel_set_generic;

static const float *row_f32(const array *a, Py_ssize_t i, Py_ssize_t j)
{
    return (const float *)a->data + i * a->stride[0] + j * a->stride[1];
}

/* ------------------------------------------------------------------ products */

static void *weight_at(const array *w, Py_ssize_t batch)
{
    return (char *)w->data + batch * w->stride[0] * (w->dtype == DTYPE_F32 ? 4 : 2);
}

/* Both products take a leading batch axis: x [B, M, K]; w [B, N, K] or [B, K, N]; out [B, M, N]. */
static PyObject *product(const char *function, int transposed, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = function};
    array x, w, out;
    if (!need_count(function, count, 3))
        return NULL;
    int n_axis = transposed ? 1 : 2, k_axis = transposed ? 2 : 1;
    int ok = take(&args, objects[0], "x", 'f', 3, 0, &x) && take(&args, objects[1], "w", 'w', 3, 0, &w) &&
             take(&args, objects[2], "out", 'f', 3, 1, &out) && need(&args, "w", &w, 0, x.shape[0]) &&
             need(&args, "w", &w, k_axis, x.shape[2]) && need(&args, "out", &out, 0, x.shape[0]) &&
             need(&args, "out", &out, 1, x.shape[1]) && need(&args, "out", &out, 2, w.shape[n_axis]);
    if (!ok)
        return finish(&args, 0);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t b = 0; b < x.shape[0]; b++) {
        const float *xb = row_f32(&x, b, 0);
        float *ob = (float *)out.data + b * out.stride[0];
        if (transposed) {
            kernels->matmul_nt(xb, x.stride[1], weight_at(&w, b), w.stride[1], w.dtype, ob, out.stride[1], x.shape[1],
                               w.shape[1], x.shape[2]);
            continue;
        }
        for (Py_ssize_t m = 0; m < x.shape[1]; m++)
            memset(ob + m * out.stride[1], 0, w.shape[2] * sizeof(float));
        kernels->matmul_nn(xb, x.stride[1], weight_at(&w, b), w.stride[1], w.dtype, ob, out.stride[1], x.shape[1],
                           w.shape[2], x.shape[2]);
    }
    Py_END_ALLOW_THREADS;
    return finish(&args, 1);
}

static PyObject *matmul_nt(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    return product("matmul_nt", 1, objects, count);
}

static PyObject *matmul_nn(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    return product("matmul_nn", 0, objects, count);
}

/* One row of an 8-bit matrix in float32. */
static void widen_row(const array *w, const array *scale, Py_ssize_t row, Py_ssize_t block_rows, Py_ssize_t block_columns,
                      float *out)
{
    const uint8_t *bytes = (const uint8_t *)w->data + row * w->stride[0];
    kernels->widen_e4m3(bytes, row_f32(scale, row / block_rows, 0), block_columns, out, w->shape[1]);
}

static int take_e4m3(arguments *args, PyObject *const *objects, array *w, array *scale, Py_ssize_t *block_rows,
                     Py_ssize_t *block_columns)
{
    *block_rows = PyLong_AsSsize_t(objects[2]);
    *block_columns = PyLong_AsSsize_t(objects[3]);
    if (PyErr_Occurred())
        return 0;
    if (*block_rows < 1 || *block_columns < 1) {
        PyErr_Format(PyExc_ValueError, "%s: a block must have rows and columns", args->function);
        return 0;
    }
    return take(args, objects[0], "w", 'B', 2, 0, w) && take(args, objects[1], "scale", 'f', 2, 0, scale) &&
           need(args, "scale", scale, 0, (w->shape[0] + *block_rows - 1) / *block_rows) &&
           need(args, "scale", scale, 1, (w->shape[1] + *block_columns - 1) / *block_columns);
}

/* x [M, K], w [N, K] e4m3, scale, block_rows, block_columns, out [M, N]: a panel of w is written out, then used for all
 * rows; so each element has the bits that the whole matrix written out would give. */
static PyObject *matmul_nt_e4m3(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "matmul_nt_e4m3"};
    array x, w, scale, out;
    Py_ssize_t block_rows, block_columns;
    if (!need_count(args.function, count, 6))
        return NULL;
    int ok = take(&args, objects[0], "x", 'f', 2, 0, &x) &&
             take_e4m3(&args, objects + 1, &w, &scale, &block_rows, &block_columns) &&
             take(&args, objects[5], "out", 'f', 2, 1, &out) && need(&args, "w", &w, 1, x.shape[1]) &&
             need(&args, "out", &out, 0, x.shape[0]) && need(&args, "out", &out, 1, w.shape[0]);
    float *panel = ok ? malloc((PANEL * w.shape[1] + 1) * sizeof(float)) : NULL;
    if (ok && panel == NULL) {
        PyErr_NoMemory();
        ok = 0;
    }
    if (!ok)
        return finish(&args, 0);
    Py_ssize_t N = w.shape[0], K = w.shape[1];
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t n = 0; n < N; n += PANEL) {
        Py_ssize_t rows = n + PANEL < N ? PANEL : N - n;
        for (Py_ssize_t r = 0; r < rows; r++)
            widen_row(&w, &scale, n + r, block_rows, block_columns, panel + r * K);
        kernels->matmul_nt(x.data, x.stride[0], panel, K, DTYPE_F32, (float *)out.data + n, out.stride[0], x.shape[0],
                           rows, K);
    }
    Py_END_ALLOW_THREADS;
    free(panel);
    return finish(&args, 1);
}

/* w [N, K] e4m3, scale, block_rows, block_columns, out [N, K]. */
static PyObject *dequantise_e4m3(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "dequantise_e4m3"};
    array w, scale, out;
    Py_ssize_t block_rows, block_columns;
    if (!need_count(args.function, count, 5))
        return NULL;
    int ok = take_e4m3(&args, objects, &w, &scale, &block_rows, &block_columns) &&
             take(&args, objects[4], "out", 'f', 2, 1, &out) && need(&args, "out", &out, 0, w.shape[0]) &&
             need(&args, "out", &out, 1, w.shape[1]);
    if (!ok)
        return finish(&args, 0);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t n = 0; n < w.shape[0]; n++)
        widen_row(&w, &scale, n, block_rows, block_columns, (float *)row_f32(&out, n, 0));
    Py_END_ALLOW_THREADS;
    return finish(&args, 1);
}

/* x [M, H], gate [I, H], up [I, H], down [H, I], out [M, H]: out = (silu(x gate^T) * (x up^T)) down^T. */
static PyObject *mlp(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "mlp"};
    array x, gate, up, down, out;
    if (!need_count(args.function, count, 5))
        return NULL;
    int ok = take(&args, objects[0], "x", 'f', 2, 0, &x) && take(&args, objects[1], "gate", 'w', 2, 0, &gate) &&
             take(&args, objects[2], "up", 'w', 2, 0, &up) && take(&args, objects[3], "down", 'w', 2, 0, &down) &&
             take(&args, objects[4], "out", 'f', 2, 1, &out) && need(&args, "gate", &gate, 1, x.shape[1]) &&
             need(&args, "up", &up, 1, x.shape[1]) && need(&args, "up", &up, 0, gate.shape[0]) &&
             need(&args, "down", &down, 1, gate.shape[0]) && need(&args, "out", &out, 0, x.shape[0]) &&
             need(&args, "out", &out, 1, down.shape[0]);
    if (!ok)
        return finish(&args, 0);
    Py_ssize_t M = x.shape[0], H = x.shape[1], I = gate.shape[0];
    float *g = malloc((2 * M * I + 1) * sizeof(float)), *u = g + M * I;
    if (g == NULL) {
        PyErr_NoMemory();
        return finish(&args, 0);
    }
    Py_BEGIN_ALLOW_THREADS;
    kernels->matmul_nt(x.data, x.stride[0], gate.data, gate.stride[0], gate.dtype, g, I, M, I, H);
    kernels->matmul_nt(x.data, x.stride[0], up.data, up.stride[0], up.dtype, u, I, M, I, H);
    for (Py_ssize_t m = 0; m < M; m++)
        kernels->silu_mul(g + m * I, u + m * I, g + m * I, I);
    kernels->matmul_nt(g, I, down.data, down.stride[0], down.dtype, out.data, out.stride[0], M, down.shape[0], I);
    Py_END_ALLOW_THREADS;
    free(g);
    return finish(&args, 1);
}

/* ------------------------------------------------------------------ rows */

/* x [R, H, D], weight [D], eps, out [R, H, D]. */
static PyObject *rms_norm(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "rms_norm"};
    array x, weight, out;
    if (!need_count(args.function, count, 4))
        return NULL;
    double eps = PyFloat_AsDouble(objects[2]);
    if (eps == -1.0 && PyErr_Occurred())
        return NULL;
    int ok = take(&args, objects[0], "x", 'f', 3, 0, &x) && take(&args, objects[1], "weight", 'f', 1, 0, &weight) &&
             take(&args, objects[3], "out", 'f', 3, 1, &out) && need(&args, "weight", &weight, 0, x.shape[2]) &&
             need(&args, "out", &out, 0, x.shape[0]) && need(&args, "out", &out, 1, x.shape[1]) &&
             need(&args, "out", &out, 2, x.shape[2]);
    if (!ok)
        return finish(&args, 0);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t r = 0; r < x.shape[0]; r++)
        for (Py_ssize_t h = 0; h < x.shape[1]; h++)
            kernels->rms_norm(row_f32(&x, r, h), weight.data, (float)eps, (float *)row_f32(&out, r, h), x.shape[2]);
    Py_END_ALLOW_THREADS;
    return finish(&args, 1);
}

/* gate [R, N], up [R, N], out [R, N]. */
static PyObject *silu_mul(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "silu_mul"};
    array gate, up, out;
    if (!need_count(args.function, count, 3))
        return NULL;
    int ok = take(&args, objects[0], "gate", 'f', 2, 0, &gate) && take(&args, objects[1], "up", 'f', 2, 0, &up) &&
             take(&args, objects[2], "out", 'f', 2, 1, &out) && need(&args, "up", &up, 0, gate.shape[0]) &&
             need(&args, "up", &up, 1, gate.shape[1]) && need(&args, "out", &out, 0, gate.shape[0]) &&
             need(&args, "out", &out, 1, gate.shape[1]);
    if (!ok)
        return finish(&args, 0);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t r = 0; r < gate.shape[0]; r++)
        kernels->silu_mul(row_f32(&gate, r, 0), row_f32(&up, r, 0), (float *)row_f32(&out, r, 0), gate.shape[1]);
    Py_END_ALLOW_THREADS;
    return finish(&args, 1);
}

/* x [T, H, D], cos [T, D / 2], sin [T, D / 2], interleaved, out [T, H, D] (not x). */
static PyObject *rope(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "rope"};
    array x, cos, sin, out;
    if (!need_count(args.function, count, 5))
        return NULL;
    int interleaved = PyObject_IsTrue(objects[3]);
    if (interleaved < 0)
        return NULL;
    int ok = take(&args, objects[0], "x", 'f', 3, 0, &x) && take(&args, objects[1], "cos", 'f', 2, 0, &cos) &&
             take(&args, objects[2], "sin", 'f', 2, 0, &sin) && take(&args, objects[4], "out", 'f', 3, 1, &out) &&
             need(&args, "cos", &cos, 0, x.shape[0]) && need(&args, "x", &x, 2, 2 * cos.shape[1]) &&
             need(&args, "sin", &sin, 0, x.shape[0]) && need(&args, "sin", &sin, 1, cos.shape[1]) &&
             need(&args, "out", &out, 0, x.shape[0]) && need(&args, "out", &out, 1, x.shape[1]) &&
             need(&args, "out", &out, 2, x.shape[2]);
    if (!ok)
        return finish(&args, 0);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t t = 0; t < x.shape[0]; t++)
        for (Py_ssize_t h = 0; h < x.shape[1]; h++)
            kernels->rope(row_f32(&x, t, h), row_f32(&cos, t, 0), row_f32(&sin, t, 0), interleaved,
                          (float *)row_f32(&out, t, h), cos.shape[1]);
    Py_END_ALLOW_THREADS;
    return finish(&args, 1);
}

/* y [T, S, H], weights [T, k], residual [T, H], out [T, H]; S >= k. */
static PyObject *combine(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "combine"};
    array y, weights, residual, out;
    if (!need_count(args.function, count, 4))
        return NULL;
    int ok = take(&args, objects[0], "y", 'f', 3, 0, &y) && take(&args, objects[1], "weights", 'f', 2, 0, &weights) &&
             take(&args, objects[2], "residual", 'f', 2, 0, &residual) &&
             take(&args, objects[3], "out", 'f', 2, 1, &out) && need(&args, "weights", &weights, 0, y.shape[0]) &&
             need(&args, "residual", &residual, 0, y.shape[0]) && need(&args, "residual", &residual, 1, y.shape[2]) &&
             need(&args, "out", &out, 0, y.shape[0]) && need(&args, "out", &out, 1, y.shape[2]);
    if (ok && y.shape[1] < weights.shape[1]) {
        PyErr_Format(PyExc_ValueError, "combine: y must have at least %zd slots, got %zd", weights.shape[1],
                     y.shape[1]);
        ok = 0;
    }
    if (!ok)
        return finish(&args, 0);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t t = 0; t < y.shape[0]; t++)
        kernels->combine(row_f32(&y, t, 0), y.stride[1], row_f32(&weights, t, 0), y.shape[1], weights.shape[1],
                         row_f32(&residual, t, 0), (float *)row_f32(&out, t, 0), y.shape[2]);
    Py_END_ALLOW_THREADS;
    return finish(&args, 1);
}

/* ------------------------------------------------------------------ router */

/* The `k` largest of `values` among those not `taken`, best first; the lower index wins a tie. */
static void largest(const float *values, Py_ssize_t n, Py_ssize_t k, char *taken, int32_t *idx)
{
    for (Py_ssize_t s = 0; s < k; s++) {
        Py_ssize_t best = -1;
        for (Py_ssize_t e = 0; e < n; e++)
            if (!taken[e] && (best < 0 || values[e] > values[best]))
                best = e;
        taken[best] = 1;
        idx[s] = (int32_t)best;
    }
}

/* Leave only the experts of the `keep` groups whose two best choices add up highest. */
static void mask_groups(float *choice, Py_ssize_t num_experts, Py_ssize_t groups, Py_ssize_t keep, float *group_score,
                        char *taken, int32_t *idx)
{
    Py_ssize_t members = num_experts / groups;
    for (Py_ssize_t g = 0; g < groups; g++) {
        memset(taken, 0, members);
        largest(choice + g * members, members, 2, taken, idx);
        group_score[g] = choice[g * members + idx[0]] + choice[g * members + idx[1]];
    }
    memset(taken, 0, groups);
    largest(group_score, groups, keep, taken, idx);
    for (Py_ssize_t e = 0; e < num_experts; e++)
        if (!taken[e / members])
            choice[e] = -INFINITY;
}

/* logits [T, E] (overwritten by scores), bias [E] or None (None = softmax, else sigmoid), n_group, topk_group,
 * norm_topk_prob, routed_scaling_factor, topk_idx [T, k] int32, topk_weights [T, k]. */
static PyObject *route(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "route"};
    array logits, bias = {0}, idx, weights;
    if (!need_count(args.function, count, 8))
        return NULL;
    int has_bias = objects[1] != Py_None, normalise = PyObject_IsTrue(objects[4]);
    Py_ssize_t groups = PyLong_AsSsize_t(objects[2]), keep = PyLong_AsSsize_t(objects[3]);
    double scale = PyFloat_AsDouble(objects[5]);
    if (PyErr_Occurred())
        return NULL;
    int ok = take(&args, objects[0], "logits", 'f', 2, 1, &logits) &&
             (!has_bias || take(&args, objects[1], "bias", 'f', 1, 0, &bias)) &&
             take(&args, objects[6], "topk_idx", 'i', 2, 1, &idx) &&
             take(&args, objects[7], "topk_weights", 'f', 2, 1, &weights) &&
             (!has_bias || need(&args, "bias", &bias, 0, logits.shape[1])) &&
             need(&args, "topk_idx", &idx, 0, logits.shape[0]) &&
             need(&args, "topk_weights", &weights, 0, logits.shape[0]) &&
             need(&args, "topk_weights", &weights, 1, idx.shape[1]);
    Py_ssize_t E = ok ? logits.shape[1] : 0, k = ok ? idx.shape[1] : 0;
    if (ok && (groups < 1 || keep < 1 || keep > groups || E % groups != 0 || (groups > 1 && E / groups < 2) || k < 1 ||
               k > keep * (E / groups))) {
        PyErr_Format(PyExc_ValueError, "route: %zd of %zd experts in %zd of %zd groups is impossible", k, E, keep,
                     groups);
        ok = 0;
    }
    float *choice = ok ? malloc(E * (2 * sizeof(float) + sizeof(int32_t) + 1)) : NULL;
    if (ok && choice == NULL) {
        PyErr_NoMemory();
        ok = 0;
    }
    if (!ok)
        return finish(&args, 0);
    float *group_score = choice + E;
    int32_t *scratch = (int32_t *)(group_score + E);
    char *taken = (char *)(scratch + E);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t t = 0; t < logits.shape[0]; t++) {
        float *scores = (float *)row_f32(&logits, t, 0), *w = (float *)row_f32(&weights, t, 0);
        int32_t *chosen = (int32_t *)idx.data + t * idx.stride[0];
        if (has_bias) {
            kernels->sigmoid_row(scores, E);
            for (Py_ssize_t e = 0; e < E; e++)
                choice[e] = scores[e] + ((const float *)bias.data)[e];
        } else {
            float sum = kernels->softmax_terms(scores, 1.0f, E);
            for (Py_ssize_t e = 0; e < E; e++)
                choice[e] = scores[e] = scores[e] / sum;
        }
        if (groups > 1)
            mask_groups(choice, E, groups, keep, group_score, taken, scratch);
        memset(taken, 0, E);
        largest(choice, E, k, taken, chosen);
        float sum = has_bias ? 1e-20f : 0.0f;
        for (Py_ssize_t s = 0; s < k; s++)
            sum += scores[chosen[s]];
        for (Py_ssize_t s = 0; s < k; s++)
            w[s] = (normalise ? scores[chosen[s]] / sum : scores[chosen[s]]) * (float)scale;
    }
    Py_END_ALLOW_THREADS;
    free(choice);
    return finish(&args, 1);
}

/* ------------------------------------------------------------------ paged KV */

/* Every row's sequence, position and block ids lie inside the tables and the cache (nothing is read before). */
static int check_rows(arguments *args, const array *cache, const array *tables, const array *seqs,
                      const array *positions, Py_ssize_t num_rows, int whole_prefix)
{
    if (!need(args, "seq_of_row", seqs, 0, num_rows) || !need(args, "positions", positions, 0, num_rows))
        return 0;
    for (Py_ssize_t t = 0; t < num_rows; t++) {
        int32_t seq = ((const int32_t *)seqs->data)[t], position = ((const int32_t *)positions->data)[t];
        Py_ssize_t last = position / cache->shape[1];
        if (seq < 0 || seq >= tables->shape[0] || position < 0 || last >= tables->shape[1]) {
            PyErr_Format(PyExc_ValueError, "%s: row %zd: sequence %d, position %d outside the block tables",
                         args->function, t, seq, position);
            return 0;
        }
        const int32_t *table = (const int32_t *)tables->data + seq * tables->stride[0];
        for (Py_ssize_t b = whole_prefix ? 0 : last; b <= last; b++)
            if (table[b] < 0 || table[b] >= cache->shape[0]) {
                PyErr_Format(PyExc_ValueError, "%s: sequence %d: block id %d outside 0..%zd", args->function, seq,
                             table[b], cache->shape[0] - 1);
                return 0;
            }
    }
    return 1;
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
static PyObject *kv_store(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "kv_store"};
    array x, cache, tables, seqs, positions;
    if (!need_count(args.function, count, 5))
        return NULL;
    int ok = take(&args, objects[0], "x", 'f', 3, 0, &x) && take(&args, objects[1], "cache", 'f', 4, 1, &cache) &&
             take(&args, objects[2], "block_tables", 'i', 2, 0, &tables) &&
             take(&args, objects[3], "seq_of_row", 'i', 1, 0, &seqs) &&
             take(&args, objects[4], "positions", 'i', 1, 0, &positions) &&
             need(&args, "cache", &cache, 2, x.shape[1]) && need(&args, "cache", &cache, 3, x.shape[2]) &&
             check_rows(&args, &cache, &tables, &seqs, &positions, x.shape[0], 0);
    for (Py_ssize_t t = 0; ok && t < x.shape[0]; t++) {
        int32_t seq = ((const int32_t *)seqs.data)[t], position = ((const int32_t *)positions.data)[t];
        Py_ssize_t block = ((const int32_t *)tables.data)[seq * tables.stride[0] + position / cache.shape[1]];
        float *slot = (float *)cache.data + block * cache.stride[0] + position % cache.shape[1] * cache.stride[1];
        for (Py_ssize_t h = 0; h < x.shape[1]; h++)
            memcpy(slot + h * cache.stride[2], row_f32(&x, t, h), x.shape[2] * sizeof(float));
    }
    return finish(&args, ok);
}

/* x [T, rank + rope], rank, cache [num_blocks, block_tokens, row bytes] uint8, block_tables [S, max_blocks], seq_of_row
 * [T], positions [T]: round each row's latent to INT8 and put the row into its slot. */
static PyObject *latent_store(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "latent_store"};
    array x, cache, tables, seqs, positions;
    if (!need_count(args.function, count, 6))
        return NULL;
    Py_ssize_t rank = PyLong_AsSsize_t(objects[1]);
    if (rank == -1 && PyErr_Occurred())
        return NULL;
    int ok = take(&args, objects[0], "x", 'f', 2, 0, &x) && take(&args, objects[2], "cache", 'B', 3, 1, &cache) &&
             take(&args, objects[3], "block_tables", 'i', 2, 0, &tables) &&
             take(&args, objects[4], "seq_of_row", 'i', 1, 0, &seqs) &&
             take(&args, objects[5], "positions", 'i', 1, 0, &positions) && check_latent(&args, rank, x.shape[1], &cache) &&
             check_rows(&args, &cache, &tables, &seqs, &positions, x.shape[0], 0);
    for (Py_ssize_t t = 0; ok && t < x.shape[0]; t++) {
        int32_t seq = ((const int32_t *)seqs.data)[t], position = ((const int32_t *)positions.data)[t];
        Py_ssize_t block = ((const int32_t *)tables.data)[seq * tables.stride[0] + position / cache.shape[1]];
        uint8_t *slot = (uint8_t *)cache.data + block * cache.stride[0] + position % cache.shape[1] * cache.stride[1];
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

static int attend_rows(paged_attention_t *a, Py_ssize_t num_rows)
{
    Py_ssize_t rep = a->num_heads / a->num_kv_heads, rows_max = rep < GROUP_ROWS ? GROUP_ROWS / rep : 1, longest = 1;
    for (Py_ssize_t t = 0; t < num_rows; t++)
        longest = a->positions[t] + 1 > longest ? a->positions[t] + 1 : longest;
    Py_ssize_t num_floats = rows_max * rep * (longest + a->k_dim + a->v_dim + 1);
    Py_ssize_t block_floats = a->latent != NULL ? a->block_tokens * a->k_dim : 0;
    float *scratch = malloc((num_floats + block_floats) * sizeof(float));
    if (scratch == NULL)
        return 0;
    a->block = scratch + num_floats;
    float *q = scratch, *scores = q + rows_max * rep * a->k_dim, *acc = scores + rows_max * rep * longest;
    for (Py_ssize_t t = 0, rows; t < num_rows; t += rows) {
        for (rows = 1; rows < rows_max && t + rows < num_rows && a->seq_of_row[t + rows] == a->seq_of_row[t]; rows++)
            ;
        for (Py_ssize_t h = 0; h < a->num_kv_heads; h++)
            kernels->attend_group(a, t, rows, h, q, scores, acc);
    }
    free(scratch);
    return 1;
}

/* q [T, H, Dk], k [num_blocks, block_tokens, KVH, Dk], v [num_blocks, block_tokens, KVH, Dv], block_tables
 * [S, max_blocks], seq_of_row [T], positions [T], scale, out [T, H, Dv]: causal attention over 0..position. */
static PyObject *paged_attention(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "paged_attention"};
    array q, k, v, tables, seqs, positions, out;
    if (!need_count(args.function, count, 8))
        return NULL;
    double scale = PyFloat_AsDouble(objects[6]);
    if (scale == -1.0 && PyErr_Occurred())
        return NULL;
    int ok = take(&args, objects[0], "q", 'f', 3, 0, &q) && take(&args, objects[1], "k", 'f', 4, 0, &k) &&
             take(&args, objects[2], "v", 'f', 4, 0, &v) &&
             take(&args, objects[3], "block_tables", 'i', 2, 0, &tables) &&
             take(&args, objects[4], "seq_of_row", 'i', 1, 0, &seqs) &&
             take(&args, objects[5], "positions", 'i', 1, 0, &positions) &&
             take(&args, objects[7], "out", 'f', 3, 1, &out) && need(&args, "k", &k, 3, q.shape[2]) &&
             need(&args, "v", &v, 0, k.shape[0]) && need(&args, "v", &v, 1, k.shape[1]) &&
             need(&args, "v", &v, 2, k.shape[2]) && need(&args, "out", &out, 0, q.shape[0]) &&
             need(&args, "out", &out, 1, q.shape[1]) && need(&args, "out", &out, 2, v.shape[3]) &&
             check_rows(&args, &k, &tables, &seqs, &positions, q.shape[0], 1);
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
        .block_tables = tables.data, .seq_of_row = seqs.data, .positions = positions.data,
        .table_stride = tables.stride[0], .block_tokens = k.shape[1], .num_heads = q.shape[1],
        .num_kv_heads = k.shape[2], .k_dim = q.shape[2], .v_dim = v.shape[3], .scale = (float)scale,
    };
    Py_BEGIN_ALLOW_THREADS;
    ok = attend_rows(&a, q.shape[0]);
    Py_END_ALLOW_THREADS;
    if (!ok)
        PyErr_NoMemory();
    return finish(&args, ok);
}

/* q [T, H, rank + rope], rank, cache [num_blocks, block_tokens, row bytes] uint8, block_tables [S, max_blocks],
 * seq_of_row [T], positions [T], scale, out [T, H, rank]: `paged_attention` over the rows written out in float32. */
static PyObject *latent_attention(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "latent_attention"};
    array q, cache, tables, seqs, positions, out;
    if (!need_count(args.function, count, 8))
        return NULL;
    Py_ssize_t rank = PyLong_AsSsize_t(objects[1]);
    double scale = PyFloat_AsDouble(objects[6]);
    if (PyErr_Occurred())
        return NULL;
    int ok = take(&args, objects[0], "q", 'f', 3, 0, &q) && take(&args, objects[2], "cache", 'B', 3, 0, &cache) &&
             take(&args, objects[3], "block_tables", 'i', 2, 0, &tables) &&
             take(&args, objects[4], "seq_of_row", 'i', 1, 0, &seqs) &&
             take(&args, objects[5], "positions", 'i', 1, 0, &positions) &&
             take(&args, objects[7], "out", 'f', 3, 1, &out) && check_latent(&args, rank, q.shape[2], &cache) &&
             need(&args, "out", &out, 0, q.shape[0]) && need(&args, "out", &out, 1, q.shape[1]) &&
             need(&args, "out", &out, 2, rank) && check_rows(&args, &cache, &tables, &seqs, &positions, q.shape[0], 1);
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
        .block_tables = tables.data, .seq_of_row = seqs.data, .positions = positions.data,
        .table_stride = tables.stride[0], .block_tokens = cache.shape[1], .num_heads = q.shape[1],
        .num_kv_heads = 1, .k_dim = q.shape[2], .v_dim = rank, .scale = (float)scale,
    };
    Py_BEGIN_ALLOW_THREADS;
    ok = attend_rows(&a, q.shape[0]);
    Py_END_ALLOW_THREADS;
    if (!ok)
        PyErr_NoMemory();
    return finish(&args, ok);
}

/* ------------------------------------------------------------------ module */

static PyObject *instruction_set(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return PyUnicode_FromString(kernels == &kernel_set_generic ? "generic" : "avx2");
}

#ifdef HAVE_AVX2_BUILD
static int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

/* For tests: "generic" always exists, "avx2" where it was compiled and the processor has it. */
static PyObject *select_instruction_set(PyObject *self, PyObject *name)
{
    const char *wanted = PyUnicode_AsUTF8(name);
    if (wanted == NULL)
        return NULL;
    if (strcmp(wanted, "generic") == 0) {
        kernels = &kernel_set_generic;
        Py_RETURN_NONE;
    }
#ifdef HAVE_AVX2_BUILD
    if (strcmp(wanted, "avx2") == 0 && has_avx2()) {
        kernels = &kernel_set_avx2;
        Py_RETURN_NONE;
    }
#endif
    return PyErr_Format(PyExc_ValueError, "select_instruction_set: '%s' is not available here", wanted);
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    FAST(matmul_nt),
    FAST(matmul_nn),
    FAST(matmul_nt_e4m3),
    FAST(dequantise_e4m3),
    FAST(mlp),
    FAST(rms_norm),
    FAST(silu_mul),
    FAST(rope),
    FAST(combine),
    FAST(route),
    FAST(kv_store),
    FAST(paged_attention),
    FAST(latent_store),
    FAST(latent_attention),
    {"instruction_set", instruction_set, METH_NOARGS, NULL},
    {"select_instruction_set", select_instruction_set, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static void silu_mul_row(const float *gate, const float *up, float *out, ptrdiff_t n)
{
    kernels->silu_mul(gate, up, out, n);
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void)
{
#ifdef HAVE_AVX2_BUILD
    if (has_avx2())
        kernels = &kernel_set_avx2;
#endif
    PyObject *self = PyModule_Create(&module);
    PyObject *capsule = PyCapsule_New((void *)(uintptr_t)silu_mul_row, SILU_MUL_CAPSULE, NULL);
    if (self == NULL || PyModule_AddObjectRef(self, "_silu_mul", capsule) < 0)
        Py_CLEAR(self);
    Py_XDECREF(capsule);
    return self;
}
