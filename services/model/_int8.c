/* Products of INT8 weights with activations that are quantised here, row by row.
 *
 * A row x becomes q = round(x / s), half to even, s = max|x| / 127; a weight row has one scale of its own. The sums over
 * k are whole numbers in 32 bits, hence exact in any order: the law of _kernels_impl.h (a row's bits depend on that row
 * alone) holds without care, and every instruction set gives the same bits. An output is
 * (float)sum * (s_row * s_column), rounded where written.
 *
 * With AVX-512 VNNI one instruction multiplies 64 pairs, of which the left ones are unsigned: rows are stored as q + 128,
 * and 128 * (sum of the weight row) is taken off again. Elsewhere plain C is left to the compiler's vectoriser.
 */

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#include "_arguments.h"
#include "_quantise_row.h"

#include <math.h>
#include <stdlib.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAVE_X86_BUILDS 1
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")
#define STEP 64          /* rows of q are padded to whole vectors */
#define DEPTH_MAX 131072 /* 127 * 127 * K must fit 31 bits; so must 255 * 127 * 64 partial sums, which are fewer */

typedef struct {
    uint8_t *q;    /* [M, padded]: q + 128; the padding is 128, a zero */
    float *scale;  /* [M] */
    ptrdiff_t padded;
} rows_t;

typedef struct {
    const int8_t *data;
    ptrdiff_t stride;
    const float *scale;
} weight_t;

typedef struct {
    void (*quantise)(const float *, uint8_t *, float *, ptrdiff_t, ptrdiff_t);
    void (*product)(const rows_t *, ptrdiff_t, weight_t, ptrdiff_t, ptrdiff_t, float *, ptrdiff_t);
} kernel_set;

/* ------------------------------------------------------------------ plain C, compiled twice */

static inline __attribute__((always_inline)) void
product_plain(const rows_t *x, ptrdiff_t M, weight_t w, ptrdiff_t N, ptrdiff_t K, float *out, ptrdiff_t os)
{
    for (ptrdiff_t n = 0; n < N; n++) {
        const int8_t *row = w.data + n * w.stride;
        for (ptrdiff_t m = 0; m < M; m++) {
            const uint8_t *q = x->q + m * x->padded;
            int32_t sum = 0;
            for (ptrdiff_t k = 0; k < K; k++)
                sum += (int32_t)(int16_t)((int16_t)q[k] - 128) * row[k];
            out[m * os + n] = (float)sum * (x->scale[m] * w.scale[n]);
        }
    }
}

static void quantise_generic(const float *x, uint8_t *q, float *scale, ptrdiff_t K, ptrdiff_t padded)
{
    quantise_row(x, q, scale, K, padded);
}

static void product_generic(const rows_t *x, ptrdiff_t M, weight_t w, ptrdiff_t N, ptrdiff_t K, float *out, ptrdiff_t os)
{
    product_plain(x, M, w, N, K, out, os);
}

static const kernel_set generic = {quantise_generic, product_generic};

/* ------------------------------------------------------------------ x86 */

#ifdef HAVE_X86_BUILDS
__attribute__((target("avx2"))) static void
quantise_avx2(const float *x, uint8_t *q, float *scale, ptrdiff_t K, ptrdiff_t padded)
{
    quantise_row(x, q, scale, K, padded);
}

/* One row by NR columns: 16 pairs are multiplied as 16-bit numbers and added two by two. Several rows at a time were not
 * faster. A tail is copied and padded. */
static inline __attribute__((always_inline, target("avx2"))) void
dots_avx2(const int NR, const uint8_t *q, const int8_t *w, ptrdiff_t ws, ptrdiff_t K, int32_t *sums)
{
    __m256i acc[4];
    const __m128i offset = _mm_set1_epi8((char)128);
    UNROLL for (int j = 0; j < NR; j++)
        acc[j] = _mm256_setzero_si256();
    for (ptrdiff_t k = 0; k < K; k += 16) {
        __m256i qv = _mm256_cvtepi8_epi16(_mm_xor_si128(_mm_loadu_si128((const __m128i *)(q + k)), offset));
        UNROLL for (int j = 0; j < NR; j++)
        {
            int8_t tail[16] = {0};
            const int8_t *from = w + j * ws + k;
            if (K - k < 16)
                from = memcpy(tail, from, (size_t)(K - k));
            __m256i wv = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from));
            acc[j] = _mm256_add_epi32(acc[j], _mm256_madd_epi16(qv, wv));
        }
    }
    UNROLL for (int j = 0; j < NR; j++)
    {
        __m128i half = _mm_add_epi32(_mm256_castsi256_si128(acc[j]), _mm256_extracti128_si256(acc[j], 1));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
        sums[j] = _mm_cvtsi128_si32(half);
    }
}

__attribute__((target("avx2"))) static void
product_avx2(const rows_t *x, ptrdiff_t M, weight_t w, ptrdiff_t N, ptrdiff_t K, float *out, ptrdiff_t os)
{
    for (ptrdiff_t n = 0; n < N;) {
        int columns = N - n >= 4 ? 4 : 1;
        const int8_t *data = w.data + n * w.stride;
        for (ptrdiff_t m = 0; m < M; m++) {
            int32_t sums[4];
            if (columns == 4)
                dots_avx2(4, x->q + m * x->padded, data, w.stride, K, sums);
            else
                dots_avx2(1, x->q + m * x->padded, data, w.stride, K, sums);
            for (int j = 0; j < columns; j++)
                out[m * os + n + j] = (float)sums[j] * (x->scale[m] * w.scale[n + j]);
        }
        n += columns;
    }
}

static const kernel_set avx2 = {quantise_avx2, product_avx2};

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define VNNI static inline __attribute__((always_inline))

/* The sums of 16 accumulators' lanes, in the accumulators' order. */
VNNI __m512i sum_lanes(const __m512i *a)
{
    __m512i pairs[8], fours[4], halves[2];
    UNROLL for (int i = 0; i < 8; i++)
        pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]),
                                    _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
    UNROLL for (int i = 0; i < 4; i++)
        fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]),
                                    _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
    UNROLL for (int i = 0; i < 2; i++)
        halves[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                                     _mm512_shuffle_i32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(halves[0], halves[1], 0x88),
                            _mm512_shuffle_i32x4(halves[0], halves[1], 0xdd));
}

/* MR rows by NR columns, MR * NR <= 16; with `weight_sums` also the sums of the NR weight rows. */
VNNI void tile(const int MR, const int NR, const uint8_t *q, ptrdiff_t qs, const int8_t *w, ptrdiff_t ws, ptrdiff_t K,
               int32_t *sums, int32_t *weight_sums)
{
    __m512i acc[16], total[16];
    const __m512i ones = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
    UNROLL for (int i = 0; i < 16; i++)
        acc[i] = total[i] = zero;
    for (ptrdiff_t k = 0; k < K; k += STEP) {
        __mmask64 mask = K - k >= STEP ? ~(__mmask64)0 : ((__mmask64)1 << (K - k)) - 1;
        __m512i qv[4];
        UNROLL for (int i = 0; i < MR; i++)
            qv[i] = _mm512_loadu_si512(q + i * qs + k);
        UNROLL for (int j = 0; j < NR; j++)
        {
            __m512i wv = _mm512_maskz_loadu_epi8(mask, w + j * ws + k);
            if (weight_sums != NULL)
                total[j] = _mm512_dpbusd_epi32(total[j], ones, wv);
            UNROLL for (int i = 0; i < MR; i++)
                acc[i * NR + j] = _mm512_dpbusd_epi32(acc[i * NR + j], qv[i], wv);
        }
    }
    _mm512_storeu_si512(sums, sum_lanes(acc));
    if (weight_sums != NULL)
        _mm512_storeu_si512(weight_sums, sum_lanes(total));
}

/* Columns n .. n + NR of all rows, NR * 4 <= 16: the first rows find the sums of the weights too. */
VNNI void panel(const int NR, const rows_t *x, ptrdiff_t M, weight_t w, ptrdiff_t n, ptrdiff_t K, float *out,
                ptrdiff_t os)
{
    const int8_t *data = w.data + n * w.stride;
    int32_t sums[16], weight_sums[16];
    ptrdiff_t m = 0;
    while (m < M) {
        int32_t *fresh = m == 0 ? weight_sums : NULL;
        int rows = M - m >= 4 ? 4 : M - m >= 2 ? 2 : 1;
        const uint8_t *q = x->q + m * x->padded;
        if (rows == 4 && fresh != NULL)
            tile(4, NR, q, x->padded, data, w.stride, K, sums, weight_sums);
        else if (rows == 4)
            tile(4, NR, q, x->padded, data, w.stride, K, sums, NULL);
        else if (rows == 2 && fresh != NULL)
            tile(2, NR, q, x->padded, data, w.stride, K, sums, weight_sums);
        else if (rows == 2)
            tile(2, NR, q, x->padded, data, w.stride, K, sums, NULL);
        else if (fresh != NULL)
            tile(1, NR, q, x->padded, data, w.stride, K, sums, weight_sums);
        else
            tile(1, NR, q, x->padded, data, w.stride, K, sums, NULL);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < NR; j++)
                out[(m + i) * os + n + j] =
                    (float)(sums[i * NR + j] - 128 * weight_sums[j]) * (x->scale[m + i] * w.scale[n + j]);
        m += rows;
    }
}

static void product_vnni(const rows_t *x, ptrdiff_t M, weight_t w, ptrdiff_t N, ptrdiff_t K, float *out, ptrdiff_t os)
{
    ptrdiff_t n = 0;
    for (; n + 4 <= N; n += 4)
        panel(4, x, M, w, n, K, out, os);
    for (; n < N; n++)
        panel(1, x, M, w, n, K, out, os);
}

static void quantise_vnni(const float *x, uint8_t *q, float *scale, ptrdiff_t K, ptrdiff_t padded)
{
    quantise_row(x, q, scale, K, padded);
}

static const kernel_set vnni = {quantise_vnni, product_vnni};
#pragma GCC pop_options

static int has(const kernel_set *set)
{
    if (set == &vnni)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
    return set == &generic || __builtin_cpu_supports("avx2");
}
#endif

static const kernel_set *kernels = &generic;
static silu_mul_t silu_mul; /* that of _kernels, so that there is one e^x */

/* ------------------------------------------------------------------ functions */

static int alloc_rows(rows_t *rows, ptrdiff_t M, ptrdiff_t K)
{
    rows->padded = (K + STEP - 1) / STEP * STEP;
    rows->q = malloc((size_t)(M * rows->padded + 1));
    rows->scale = malloc((size_t)(M + 1) * sizeof(float));
    return rows->q != NULL && rows->scale != NULL;
}

static void free_rows(rows_t *rows)
{
    free(rows->q);
    free(rows->scale);
}

static void quantise(const rows_t *rows, const float *x, ptrdiff_t stride, ptrdiff_t M, ptrdiff_t K)
{
    for (ptrdiff_t m = 0; m < M; m++)
        kernels->quantise(x + m * stride, rows->q + m * rows->padded, &rows->scale[m], K, rows->padded);
}

/* A weight [N, num_columns] and its scales [N]. */
static int take_weight(arguments *args, PyObject *const *objects, const char *name, const char *scale_name,
                       Py_ssize_t num_columns, array *w, weight_t *out)
{
    array scale;
    if (!take_shaped(args, objects[0], name, 'b', 0, w, EXTENTS(ANY, ANY)) ||
        !take_shaped(args, objects[1], scale_name, 'f', 0, &scale, EXTENTS(w->shape[0])))
        return 0;
    if (w->shape[1] > DEPTH_MAX) {
        PyErr_Format(PyExc_ValueError, "%s: %s has %zd columns, at most %d are supported", args->function, name,
                     w->shape[1], DEPTH_MAX);
        return 0;
    }
    *out = (weight_t){w->data, w->stride[0], scale.data};
    return need(args, name, w, 1, num_columns);
}

/* x [M, K], w [N, K] int8, scale [N], out [M, N]: out = x w^T. */
static PyObject *matmul_nt(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "matmul_nt"};
    array x, w, out;
    weight_t weight;
    if (!need_count(args.function, count, 4))
        return NULL;
    int ok = IN(0, x, 'f', ANY, ANY) && take_weight(&args, objects + 1, "w", "scale", x.shape[1], &w, &weight) &&
             OUT(3, out, 'f', x.shape[0], w.shape[0]);
    if (!ok)
        return finish(&args, 0);
    rows_t rows;
    ok = alloc_rows(&rows, x.shape[0], x.shape[1]);
    if (ok) {
        Py_BEGIN_ALLOW_THREADS;
        quantise(&rows, x.data, x.stride[0], x.shape[0], x.shape[1]);
        kernels->product(&rows, x.shape[0], weight, w.shape[0], x.shape[1], out.data, out.stride[0]);
        Py_END_ALLOW_THREADS;
    }
    else
        PyErr_NoMemory();
    free_rows(&rows);
    return finish(&args, ok);
}

/* x [M, H], gate [I, H], up [I, H], down [H, I], each with its scales, out [M, H]: the gated MLP; what enters `down` is
 * quantised row by row like x. */
static PyObject *mlp(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "mlp"};
    array x, gate, up, down, out;
    weight_t gate_w, up_w, down_w;
    if (!need_count(args.function, count, 8))
        return NULL;
    int ok = IN(0, x, 'f', ANY, ANY) &&
             take_weight(&args, objects + 1, "gate", "gate_scale", x.shape[1], &gate, &gate_w) &&
             take_weight(&args, objects + 3, "up", "up_scale", x.shape[1], &up, &up_w) &&
             need(&args, "up", &up, 0, gate.shape[0]) &&
             take_weight(&args, objects + 5, "down", "down_scale", gate.shape[0], &down, &down_w) &&
             OUT(7, out, 'f', x.shape[0], down.shape[0]);
    if (!ok)
        return finish(&args, 0);
    ptrdiff_t M = x.shape[0], H = x.shape[1], I = gate.shape[0];
    rows_t rows, inner = {NULL, NULL, 0};
    float *g = malloc((size_t)(2 * M * I + 1) * sizeof(float)), *u = g + M * I;
    ok = alloc_rows(&rows, M, H) && alloc_rows(&inner, M, I) && g != NULL;
    if (ok) {
        Py_BEGIN_ALLOW_THREADS;
        quantise(&rows, x.data, x.stride[0], M, H);
        kernels->product(&rows, M, gate_w, I, H, g, I);
        kernels->product(&rows, M, up_w, I, H, u, I);
        for (ptrdiff_t m = 0; m < M; m++)
            silu_mul(g + m * I, u + m * I, g + m * I, I);
        quantise(&inner, g, I, M, I);
        kernels->product(&inner, M, down_w, down.shape[0], I, out.data, out.stride[0]);
        Py_END_ALLOW_THREADS;
    }
    else
        PyErr_NoMemory();
    free(g);
    free_rows(&rows);
    free_rows(&inner);
    return finish(&args, ok);
}

/* x [M, K], q [M, K] int8, scale [M]. */
static PyObject *quantise_rows(PyObject *self, PyObject *const *objects, Py_ssize_t count)
{
    arguments args = {.function = "quantise_rows"};
    array x, q, scale;
    if (!need_count(args.function, count, 3))
        return NULL;
    int ok = IN(0, x, 'f', ANY, ANY) && OUT(1, q, 'b', x.shape[0], x.shape[1]) && OUT(2, scale, 'f', x.shape[0]);
    if (!ok)
        return finish(&args, 0);
    Py_BEGIN_ALLOW_THREADS;
    for (ptrdiff_t m = 0; m < x.shape[0]; m++) {
        uint8_t *row = (uint8_t *)q.data + m * q.stride[0];
        kernels->quantise((const float *)x.data + m * x.stride[0], row, (float *)scale.data + m, x.shape[1],
                          x.shape[1]);
        for (ptrdiff_t k = 0; k < x.shape[1]; k++)
            row[k] = (uint8_t)(row[k] - 128);
    }
    Py_END_ALLOW_THREADS;
    return finish(&args, 1);
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

static PyObject *instruction_set(PyObject *self, PyObject *Py_UNUSED(ignored))
{
#ifdef HAVE_X86_BUILDS
    if (kernels == &vnni || kernels == &avx2)
        return PyUnicode_FromString(kernels == &vnni ? "vnni" : "avx2");
#endif
    return PyUnicode_FromString("generic");
}

/* For tests: "generic" always exists, "avx2" and "vnni" where the processor has them. */
static PyObject *select_instruction_set(PyObject *self, PyObject *name)
{
    const char *wanted = PyUnicode_AsUTF8(name);
    if (wanted == NULL)
        return NULL;
    const kernel_set *set = strcmp(wanted, "generic") == 0 ? &generic : NULL;
#ifdef HAVE_X86_BUILDS
    set = strcmp(wanted, "avx2") == 0 ? &avx2 : strcmp(wanted, "vnni") == 0 ? &vnni : set;
    set = set != NULL && has(set) ? set : NULL;
#endif
    if (set == NULL)
        return PyErr_Format(PyExc_ValueError, "select_instruction_set: '%s' is not available here", wanted);
    kernels = set;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    FAST(matmul_nt),
    FAST(mlp),
    FAST(quantise_rows),
    {"instruction_set", instruction_set, METH_NOARGS, NULL},
    {"select_instruction_set", select_instruction_set, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_int8", NULL, -1, methods, NULL, NULL, NULL, NULL};

/* Not PyCapsule_Import, which asks for `services.model` as an attribute: its __init__ may be importing us. */
static int import_silu_mul(void)
{
    PyObject *kernels_module = PyImport_ImportModule("services.model._kernels");
    PyObject *capsule = kernels_module != NULL ? PyObject_GetAttrString(kernels_module, "_silu_mul") : NULL;
    if (capsule != NULL)
        silu_mul = (silu_mul_t)(uintptr_t)PyCapsule_GetPointer(capsule, SILU_MUL_CAPSULE);
    Py_XDECREF(capsule);
    Py_XDECREF(kernels_module);
    return silu_mul != NULL;
}

PyMODINIT_FUNC PyInit__int8(void)
{
    if (!import_silu_mul())
        return NULL;
#ifdef HAVE_X86_BUILDS
    kernels = has(&vnni) ? &vnni : has(&avx2) ? &avx2 : &generic;
#endif
    return PyModule_Create(&module);
}
