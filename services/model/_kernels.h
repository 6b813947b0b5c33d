/* What the C files of _kernels share: the table of an instruction set's arithmetic, and how its rows are named.
 *
 * Arrays come in through the buffer protocol: float32 unless said otherwise, any outer strides, contiguous rows.
 * Every function of the module checks types, ranks and extents, raises a ValueError that names the argument, and then
 * computes without the interpreter lock. Nothing keeps a reference to an array.
 */
#ifndef XDS_KERNELS_H
#define XDS_KERNELS_H

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#include "_arguments.h"

#include <math.h>
#include <stdlib.h>

#define HIDDEN __attribute__((visibility("hidden")))
#define PANEL 24            /* columns: whole tiles of every height; the next panel is fetched meanwhile */
#define GROUP_ROWS 16       /* query rows times heads that attention computes together */

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

HIDDEN extern const kernel_set *kernels; /* of the instruction set in use */
HIDDEN const char *kernels_name(void);
HIDDEN int kernels_select(const char *name);
HIDDEN void kernels_select_best(void);

static inline const float *row_f32(const array *a, Py_ssize_t i, Py_ssize_t j)
{
    return (const float *)a->data + i * a->stride[0] + j * a->stride[1];
}

/* A function of the module, in one of its files. */
#define KERNEL(name) HIDDEN PyObject *name(PyObject *self, PyObject *const *objects, Py_ssize_t count)

KERNEL(matmul_nt);
KERNEL(matmul_nn);
KERNEL(matmul_nt_e4m3);
KERNEL(dequantise_e4m3);
KERNEL(mlp);
KERNEL(rms_norm);
KERNEL(silu_mul);
KERNEL(rope);
KERNEL(combine);
KERNEL(route);
KERNEL(kv_store);
KERNEL(paged_attention);
KERNEL(latent_store);
KERNEL(latent_attention);

#endif
