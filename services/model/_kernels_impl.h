/* The arithmetic of the model, written once and compiled once per instruction set.
 *
 * Law: the bits of an output element depend on its own inputs and on nothing else. Not on how many rows share the
 * call, not on the element's place among them, not on which tile size computed it. Three habits give this:
 *
 *   - a dot product over K owns 8 lanes; lane l adds the products of k = l, l+8, l+16, ... in that order, K is
 *     padded with zeros to whole vectors, and the lanes are added as ((0+1)+(2+3)) + ((4+5)+(6+7));
 *   - a sum over k "in order" (matmul_nn, weighted values, combine) is one chain of multiply-adds per element;
 *   - tails go through the same vector code on zero-padded copies, never through a scalar variant.
 *
 * Tiles of several rows and columns only interleave such chains, they do not change one of them. Fused
 * multiply-add is always explicit (VFMA); the compiler may not contract anything else (see _kernels.h).
 *
 * The including file defines FN(name), which adds the suffix of the instruction set, VFMA(a, b, c) = a * b + c,
 * WIDEN_U16(h), WIDEN_U8(b), and WIDEN_F16(h) where one instruction does it.
 * Strides count elements. Row data is contiguous; rows may lie anywhere.
 */

/* ------------------------------------------------------------------ loads */

INLINE v8 FN(load)(const float *p)
{
    v8 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void FN(store)(float *p, v8 v)
{
    memcpy(p, &v, sizeof v);
}

INLINE v8 FN(splat)(float a)
{
    return (v8){a, a, a, a, a, a, a, a};
}

INLINE v8 FN(load_partial)(const float *p, ptrdiff_t count)
{
    if (count == LANES)
        return FN(load)(p);
    float padded[LANES] = {0};
    for (ptrdiff_t i = 0; i < count; i++)
        padded[i] = p[i];
    return FN(load)(padded);
}

INLINE void FN(store_partial)(float *p, v8 v, ptrdiff_t count)
{
    if (count == LANES) {
        FN(store)(p, v);
        return;
    }
    float whole[LANES];
    FN(store)(whole, v);
    for (ptrdiff_t i = 0; i < count; i++)
        p[i] = whole[i];
}

/* Exact for every finite, subnormal, infinite and NaN half: shift into place, rescale by 2^112, patch the exponent. */
INLINE v8 FN(widen_f16)(h8 h)
{
#ifdef WIDEN_F16
    return WIDEN_F16(h);
#else
    u8x32 u = WIDEN_U16(h);
    u8x32 magnitude = (u & 0x7fffu) << 13;
    v8 scaled = (v8)magnitude * FN(splat)(0x1p112f);
    u8x32 special = (u8x32)((u & 0x7fffu) >= 0x7c00u);
    u8x32 bits = (u8x32)scaled | (special & 0x7f800000u) | ((u & 0x8000u) << 16);
    return (v8)bits;
#endif
}

INLINE v8 FN(widen)(h8 h, int dtype)
{
    if (dtype == DTYPE_BF16)
        return (v8)(WIDEN_U16(h) << 16);
    return FN(widen_f16)(h);
}

/* `w` points at weights of `dtype`; element index `i`. */
INLINE v8 FN(load_w)(const void *w, ptrdiff_t i, int dtype)
{
    if (dtype == DTYPE_F32)
        return FN(load)((const float *)w + i);
    h8 h;
    memcpy(&h, (const uint16_t *)w + i, sizeof h);
    return FN(widen)(h, dtype);
}

INLINE v8 FN(load_w_partial)(const void *w, ptrdiff_t i, ptrdiff_t count, int dtype)
{
    if (dtype == DTYPE_F32)
        return FN(load_partial)((const float *)w + i, count);
    uint16_t padded[LANES] = {0};
    for (ptrdiff_t j = 0; j < count; j++)
        padded[j] = ((const uint16_t *)w)[i + j];
    return FN(load_w)(padded, 0, dtype);
}

/* Eight e4m3 to float32, exactly: the exponent's bias goes from 7 to 127; a subnormal m / 8 * 2^-6 is (1 + m / 8) * 2^-6
 * less 2^-6 (a float32 subnormal on the way would cost a hundred cycles); 0x7f is NaN. */
INLINE v8 FN(widen_e4m3_8)(const uint8_t *w)
{
    b8 bytes;
    memcpy(&bytes, w, sizeof bytes);
    u8x32 u = WIDEN_U8(bytes), magnitude = u & 0x7fu, shifted = magnitude << 20;
    u8x32 is_subnormal = (u8x32)(magnitude < 8u), nan = (u8x32)(magnitude == 0x7fu) & 0x7fc00000u;
    v8 subnormal = (v8)(shifted + (121u << 23)) - FN(splat)(0x1p-6f);
    u8x32 bits = (is_subnormal & (u8x32)subnormal) | (~is_subnormal & (shifted + (120u << 23)));
    return (v8)(bits | nan | (u & 0x80u) << 24);
}

/* n weights in e4m3, a factor for each `block` of them, to float32; the product is rounded once. */
static void FN(widen_e4m3)(const uint8_t *w, const float *scale, ptrdiff_t block, float *out, ptrdiff_t n)
{
    for (ptrdiff_t begin = 0; begin < n; begin += block) {
        ptrdiff_t end = begin + block < n ? begin + block : n, i = begin;
        v8 factor = FN(splat)(scale[begin / block]);
        for (; i + LANES <= end; i += LANES)
            FN(store)(out + i, FN(widen_e4m3_8)(w + i) * factor);
        if (i < end) {
            uint8_t padded[LANES] = {0};
            memcpy(padded, w + i, end - i);
            FN(store_partial)(out + i, FN(widen_e4m3_8)(padded) * factor, end - i);
        }
    }
}

/* ------------------------------------------------------------------ reductions */

/* Lane sums of four vectors at once, each as ((0+1)+(2+3)) + ((4+5)+(6+7)). */
INLINE void FN(sum_lanes4)(const v8 *a, float *out)
{
    v8 p = SHUFFLE(a[0], a[1], PAIRS_EVEN) + SHUFFLE(a[0], a[1], PAIRS_ODD);
    v8 q = SHUFFLE(a[2], a[3], PAIRS_EVEN) + SHUFFLE(a[2], a[3], PAIRS_ODD);
    v8 r = SHUFFLE(p, q, PAIRS_EVEN) + SHUFFLE(p, q, PAIRS_ODD);
    float lanes[LANES];
    FN(store)(lanes, r);
    for (int i = 0; i < 4; i++)
        out[i] = lanes[i] + lanes[i + 4];
}

INLINE float FN(sum_lanes)(v8 v)
{
    float a[LANES];
    FN(store)(a, v);
    return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7]));
}

/* ------------------------------------------------------------------ out[m, n] = x[m, :] . w[n, :] */

INLINE void FN(nt_tile)(const int MR, const int NR, const int dtype, const float *x, ptrdiff_t xs, const void *w,
                        ptrdiff_t ws, ptrdiff_t K, float *out, ptrdiff_t os)
{
    const ptrdiff_t width = dtype == DTYPE_F32 ? 4 : 2;
    v8 acc[12], wv[8];
    UNROLL for (int a = 0; a < 12; a++) acc[a] = FN(splat)(0.0f);
    ptrdiff_t k = 0;
    for (; k + LANES <= K; k += LANES) {
        UNROLL for (int j = 0; j < NR; j++)
        {
            wv[j] = FN(load_w)(w, j * ws + k, dtype);
            if ((k & (64 / width - 1)) == 0)
                __builtin_prefetch((const char *)w + ((j + PANEL) * ws + k) * width);
        }
        UNROLL for (int i = 0; i < MR; i++)
        {
            v8 xv = FN(load)(x + i * xs + k);
            UNROLL for (int j = 0; j < NR; j++) acc[i * NR + j] = VFMA(xv, wv[j], acc[i * NR + j]);
        }
    }
    if (k < K) {
        UNROLL for (int j = 0; j < NR; j++) wv[j] = FN(load_w_partial)(w, j * ws + k, K - k, dtype);
        UNROLL for (int i = 0; i < MR; i++)
        {
            v8 xv = FN(load_partial)(x + i * xs + k, K - k);
            UNROLL for (int j = 0; j < NR; j++) acc[i * NR + j] = VFMA(xv, wv[j], acc[i * NR + j]);
        }
    }
    float sums[12];
    UNROLL for (int a = 0; a < MR * NR; a += 4) FN(sum_lanes4)(acc + a, sums + a);
    UNROLL for (int i = 0; i < MR; i++)
    {
        UNROLL for (int j = 0; j < NR; j++) out[i * os + j] = sums[i * NR + j];
    }
}

/* `MR` rows against columns n .. n_end; NR columns at a time while they last. */
INLINE void FN(nt_rows)(const int MR, const int NR, const int dtype, const float *x, ptrdiff_t xs, const void *w,
                        ptrdiff_t ws, ptrdiff_t n, ptrdiff_t n_end, ptrdiff_t K, float *out, ptrdiff_t os)
{
    const ptrdiff_t width = dtype == DTYPE_F32 ? 4 : 2;
    for (; n + NR <= n_end; n += NR)
        FN(nt_tile)(MR, NR, dtype, x, xs, (const char *)w + n * ws * width, ws, K, out + n, os);
    for (; n < n_end; n++)
        FN(nt_tile)(MR, 1, dtype, x, xs, (const char *)w + n * ws * width, ws, K, out + n, os);
}

/* Columns in panels of 24 (whole tiles of every height), so that a panel of w is still cached for the next rows. */
INLINE void FN(nt_typed)(const int dtype, const float *x, ptrdiff_t xs, const void *w, ptrdiff_t ws, float *out,
                         ptrdiff_t os, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K)
{
    ptrdiff_t tile_rows = X_TILE_FLOATS / (K > 0 ? K : 1) & ~(ptrdiff_t)3;
    if (tile_rows < 32)
        tile_rows = 32;
    for (ptrdiff_t m0 = 0; m0 < M; m0 += tile_rows) {
        ptrdiff_t m_end = m0 + tile_rows < M ? m0 + tile_rows : M;
        for (ptrdiff_t n = 0; n < N; n += PANEL) {
            ptrdiff_t n_end = n + PANEL < N ? n + PANEL : N, m = m0;
            for (; m + 4 <= m_end; m += 4)
                FN(nt_rows)(4, 3, dtype, x + m * xs, xs, w, ws, n, n_end, K, out + m * os, os);
            if (m_end - m == 3)
                FN(nt_rows)(3, 4, dtype, x + m * xs, xs, w, ws, n, n_end, K, out + m * os, os);
            else if (m_end - m == 2)
                FN(nt_rows)(2, 4, dtype, x + m * xs, xs, w, ws, n, n_end, K, out + m * os, os);
            else if (m_end - m == 1)
                FN(nt_rows)(1, 8, dtype, x + m * xs, xs, w, ws, n, n_end, K, out + m * os, os);
        }
    }
}

static void FN(matmul_nt)(const float *x, ptrdiff_t xs, const void *w, ptrdiff_t ws, int dtype, float *out,
                          ptrdiff_t os, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K)
{
    if (dtype == DTYPE_F32)
        FN(nt_typed)(DTYPE_F32, x, xs, w, ws, out, os, M, N, K);
    else if (dtype == DTYPE_BF16)
        FN(nt_typed)(DTYPE_BF16, x, xs, w, ws, out, os, M, N, K);
    else
        FN(nt_typed)(DTYPE_F16, x, xs, w, ws, out, os, M, N, K);
}

/* ------------------------------------------------------------------ out[m, n] += sum over k in order, x[m, k] w[k, n] */

/* MR rows, NV vectors of columns; `count` < 8 valid columns only when NV is 1. */
INLINE void FN(nn_tile)(const int MR, const int NV, const int dtype, const float *x, ptrdiff_t xs, const void *w,
                        ptrdiff_t ws, ptrdiff_t K, float *out, ptrdiff_t os, const int partial, ptrdiff_t count)
{
    v8 acc[12];
    UNROLL for (int i = 0; i < MR; i++)
    {
        UNROLL for (int j = 0; j < NV; j++) acc[i * NV + j] =
            partial ? FN(load_partial)(out + i * os, count) : FN(load)(out + i * os + j * LANES);
    }
    for (ptrdiff_t k = 0; k < K; k++) {
        v8 wv[8];
        UNROLL for (int j = 0; j < NV; j++) wv[j] = partial ? FN(load_w_partial)(w, k * ws, count, dtype)
                                                            : FN(load_w)(w, k * ws + j * LANES, dtype);
        UNROLL for (int i = 0; i < MR; i++)
        {
            v8 xv = FN(splat)(x[i * xs + k]);
            UNROLL for (int j = 0; j < NV; j++) acc[i * NV + j] = VFMA(xv, wv[j], acc[i * NV + j]);
        }
    }
    UNROLL for (int i = 0; i < MR; i++)
    {
        UNROLL for (int j = 0; j < NV; j++)
        {
            if (partial)
                FN(store_partial)(out + i * os, acc[i * NV + j], count);
            else
                FN(store)(out + i * os + j * LANES, acc[i * NV + j]);
        }
    }
}

INLINE void FN(nn_rows)(const int MR, const int NV, const int dtype, const float *x, ptrdiff_t xs, const void *w,
                        ptrdiff_t ws, ptrdiff_t N, ptrdiff_t K, float *out, ptrdiff_t os)
{
    const ptrdiff_t width = dtype == DTYPE_F32 ? 4 : 2;
    const char *wb = w;
    ptrdiff_t n = 0;
    for (; n + NV * LANES <= N; n += NV * LANES)
        FN(nn_tile)(MR, NV, dtype, x, xs, wb + n * width, ws, K, out + n, os, 0, LANES);
    for (; n + LANES <= N; n += LANES)
        FN(nn_tile)(MR, 1, dtype, x, xs, wb + n * width, ws, K, out + n, os, 0, LANES);
    if (n < N)
        FN(nn_tile)(MR, 1, dtype, x, xs, wb + n * width, ws, K, out + n, os, 1, N - n);
}

INLINE void FN(nn_typed)(const int dtype, const float *x, ptrdiff_t xs, const void *w, ptrdiff_t ws, float *out,
                         ptrdiff_t os, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K)
{
    ptrdiff_t m = 0;
    for (; m + 4 <= M; m += 4)
        FN(nn_rows)(4, 2, dtype, x + m * xs, xs, w, ws, N, K, out + m * os, os);
    if (M - m == 3)
        FN(nn_rows)(3, 4, dtype, x + m * xs, xs, w, ws, N, K, out + m * os, os);
    else if (M - m == 2)
        FN(nn_rows)(2, 4, dtype, x + m * xs, xs, w, ws, N, K, out + m * os, os);
    else if (M - m == 1)
        FN(nn_rows)(1, 8, dtype, x + m * xs, xs, w, ws, N, K, out + m * os, os);
}

/* Adds to `out`; the caller zeroes it first. */
static void FN(matmul_nn)(const float *x, ptrdiff_t xs, const void *w, ptrdiff_t ws, int dtype, float *out,
                          ptrdiff_t os, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K)
{
    if (dtype == DTYPE_F32)
        FN(nn_typed)(DTYPE_F32, x, xs, w, ws, out, os, M, N, K);
    else if (dtype == DTYPE_BF16)
        FN(nn_typed)(DTYPE_BF16, x, xs, w, ws, out, os, M, N, K);
    else
        FN(nn_typed)(DTYPE_F16, x, xs, w, ws, out, os, M, N, K);
}

/* ------------------------------------------------------------------ element-wise */

/* e^x to about 1 ulp; 0 below -87.3, e^88 above 88. Range reduction by ln 2, then a polynomial of degree 7. */
INLINE v8 FN(exp)(v8 x)
{
    i8x32 underflow = x < FN(splat)(-87.3f);
    v8 high = FN(splat)(88.0f), low = FN(splat)(-87.3f), round = FN(splat)(12582912.0f);
    i8x32 above = x > high;
    x = (v8)(((i8x32)high & above) | ((i8x32)x & ~above));
    x = (v8)(((i8x32)low & underflow) | ((i8x32)x & ~underflow));
    v8 n = VFMA(x, FN(splat)(1.44269504f), round) - round;
    v8 r = VFMA(n, FN(splat)(-0.693359375f), x);
    r = VFMA(n, FN(splat)(2.12194440e-4f), r);
    v8 p = VFMA(FN(splat)(1.9875691500e-4f), r, FN(splat)(1.3981999507e-3f));
    p = VFMA(p, r, FN(splat)(8.3334519073e-3f));
    p = VFMA(p, r, FN(splat)(4.1665795894e-2f));
    p = VFMA(p, r, FN(splat)(1.6666665459e-1f));
    p = VFMA(p, r, FN(splat)(5.0000001201e-1f));
    p = VFMA(p, r * r, r) + FN(splat)(1.0f);
    i8x32 power = (__builtin_convertvector(n, i8x32) + 127) << 23;
    return (v8)((i8x32)(p * (v8)power) & ~underflow);
}

/* out = silu(gate) * up; `out` may be `gate`. */
static void FN(silu_mul)(const float *gate, const float *up, float *out, ptrdiff_t n)
{
    v8 one = FN(splat)(1.0f);
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        ptrdiff_t count = n - i < LANES ? n - i : LANES;
        v8 g = FN(load_partial)(gate + i, count), u = FN(load_partial)(up + i, count);
        v8 y = (g / (one + FN(exp)(-g))) * u;
        FN(store_partial)(out + i, y, count);
    }
}

static void FN(rms_norm)(const float *x, const float *weight, float eps, float *out, ptrdiff_t n)
{
    v8 acc = FN(splat)(0.0f);
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        v8 v = FN(load_partial)(x + i, n - i < LANES ? n - i : LANES);
        acc = VFMA(v, v, acc);
    }
    float inverse = 1.0f / sqrtf(FN(sum_lanes)(acc) / (float)n + eps);
    for (ptrdiff_t i = 0; i < n; i++)
        out[i] = weight[i] * (x[i] * inverse);
}

/* Rotate one head. Pairs are (i, i + D/2), or (2i, 2i + 1) when interleaved; the result is always in halves. */
static void FN(rope)(const float *x, const float *cos_row, const float *sin_row, int interleaved, float *out,
                     ptrdiff_t half)
{
    ptrdiff_t step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
    for (ptrdiff_t i = 0; i < half; i++) {
        float a = x[i * step], b = x[i * step + other];
        out[i] = a * cos_row[i] - b * sin_row[i];
        out[i + half] = b * cos_row[i] + a * sin_row[i];
    }
}

/* out = residual + sum over slots in order; slots at and above `num_weights` (the shared expert) weigh 1. */
static void FN(combine)(const float *y, ptrdiff_t slot_stride, const float *weights, ptrdiff_t num_slots,
                        ptrdiff_t num_weights, const float *residual, float *out, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        ptrdiff_t count = n - i < LANES ? n - i : LANES;
        v8 acc = FN(splat)(0.0f);
        for (ptrdiff_t s = 0; s < num_slots; s++) {
            const float *row = y + s * slot_stride + i;
            v8 v = FN(load_partial)(row, count);
            acc = VFMA(FN(splat)(s < num_weights ? weights[s] : 1.0f), v, acc);
        }
        FN(store_partial)(out + i, FN(load_partial)(residual + i, count) + acc, count);
    }
}

/* In place: s = e^(s * scale - max), and return the sum; `n` >= 1. Padding lanes are -inf and add zero. */
static float FN(softmax_terms)(float *s, float scale, ptrdiff_t n)
{
    v8 maxima = FN(splat)(-INFINITY), factor = FN(splat)(scale);
    ptrdiff_t whole = n / LANES * LANES;
    for (ptrdiff_t i = 0; i < whole; i += LANES) {
        v8 v = FN(load)(s + i) * factor;
        i8x32 greater = v > maxima;
        maxima = (v8)(((i8x32)v & greater) | ((i8x32)maxima & ~greater));
        FN(store)(s + i, v);
    }
    float max = maxima[0];
    for (int j = 1; j < LANES; j++)
        max = maxima[j] > max ? maxima[j] : max;
    for (ptrdiff_t i = whole; i < n; i++) {
        s[i] *= scale;
        max = s[i] > max ? s[i] : max;
    }
    v8 acc = FN(splat)(0.0f), shift = FN(splat)(max);
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        ptrdiff_t count = n - i < LANES ? n - i : LANES;
        float padded[LANES];
        for (int j = 0; count < LANES && j < LANES; j++)
            padded[j] = j < count ? s[i + j] : -INFINITY;
        v8 e = FN(exp)(FN(load)(count < LANES ? padded : s + i) - shift);
        FN(store_partial)(s + i, e, count);
        acc += e;
    }
    return FN(sum_lanes)(acc);
}

static void FN(sigmoid_row)(float *s, ptrdiff_t n)
{
    v8 one = FN(splat)(1.0f);
    for (ptrdiff_t i = 0; i < n; i += LANES) {
        ptrdiff_t count = n - i < LANES ? n - i : LANES;
        FN(store_partial)(s + i, one / (one + FN(exp)(-FN(load_partial)(s + i, count))), count);
    }
}

/* ------------------------------------------------------------------ paged attention */

/* The first `n` rows of an INT8 block in float32, [n, k_dim]: float(q) * scale, and the rope part as it is. */
static const float *FN(write_out)(const paged_attention_t *a, int32_t block, ptrdiff_t n)
{
    const char *row = a->latent + block * a->latent_stride_b;
    float *out = a->block;
    for (ptrdiff_t t = 0; t < n; t++, row += a->latent_stride_t, out += a->k_dim) {
        ptrdiff_t rank = a->v_dim, i = 0;
        float scale;
        memcpy(&scale, row + LATENT_SCALE_AT(rank), sizeof scale);
        for (; i + LANES <= rank; i += LANES) {
            b8 bytes;
            memcpy(&bytes, row + i, sizeof bytes);
            bytes ^= 128; /* q + 128, which has no sign to extend */
            i8x32 q = (i8x32)WIDEN_U8(bytes) - 128;
            FN(store)(out + i, __builtin_convertvector(q, v8) * FN(splat)(scale));
        }
        for (; i < rank; i++)
            out[i] = (float)((const int8_t *)row)[i] * scale;
        memcpy(out + rank, row + LATENT_ROPE_AT(rank), (a->k_dim - rank) * sizeof(float));
    }
    return a->block;
}

/* `rows` query rows of one sequence against one KV head; see paged_attention_t. Scores of the blocks that every row
 * sees whole are computed together, the rest row by row: the chains per element are the same either way. */
static void FN(attend_group)(const paged_attention_t *a, ptrdiff_t row, ptrdiff_t rows, ptrdiff_t kv_head, float *q,
                             float *scores, float *acc)
{
    ptrdiff_t rep = a->num_heads / a->num_kv_heads, bt = a->block_tokens, first = kv_head * rep;
    const int32_t *table = a->block_tables + a->seq_of_row[row] * a->table_stride;
    ptrdiff_t longest = 0, shortest = PTRDIFF_MAX;
    for (ptrdiff_t r = 0; r < rows; r++) {
        ptrdiff_t length = a->positions[row + r] + 1;
        longest = length > longest ? length : longest;
        shortest = length < shortest ? length : shortest;
        for (ptrdiff_t h = 0; h < rep; h++)
            memcpy(q + (r * rep + h) * a->k_dim, a->q + (row + r) * a->q_stride_t + (first + h) * a->q_stride_h,
                   a->k_dim * sizeof(float));
    }
    ptrdiff_t shared_blocks = shortest / bt;
    for (ptrdiff_t b = 0; b * bt < longest; b++) {
        ptrdiff_t held = longest - b * bt < bt ? longest - b * bt : bt;
        const float *k = a->latent != NULL ? FN(write_out)(a, table[b], held)
                                         : a->k + table[b] * a->k_stride_b + kv_head * a->k_stride_h;
        for (ptrdiff_t r = 0; r < rows; r += b < shared_blocks ? rows : 1) {
            ptrdiff_t n = a->positions[row + r] + 1 - b * bt, many = b < shared_blocks ? rows : 1;
            if (n <= 0)
                continue;
            FN(matmul_nt)(q + r * rep * a->k_dim, a->k_dim, k, a->k_stride_t, DTYPE_F32,
                          scores + r * rep * longest + b * bt, longest, many * rep, n < bt ? n : bt, a->k_dim);
        }
    }
    float *sums = acc + rows * rep * a->v_dim;
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t h = 0; h < rep; h++)
            sums[r * rep + h] =
                FN(softmax_terms)(scores + (r * rep + h) * longest, a->scale, a->positions[row + r] + 1);
    memset(acc, 0, rows * rep * a->v_dim * sizeof(float));
    for (ptrdiff_t b = 0; b * bt < longest; b++) {
        ptrdiff_t held = longest - b * bt < bt ? longest - b * bt : bt;
        const float *v = a->latent != NULL ? FN(write_out)(a, table[b], held)
                                         : a->v + table[b] * a->v_stride_b + kv_head * a->v_stride_h;
        for (ptrdiff_t r = 0; r < rows; r += b < shared_blocks ? rows : 1) {
            ptrdiff_t n = a->positions[row + r] + 1 - b * bt, many = b < shared_blocks ? rows : 1;
            if (n <= 0)
                continue;
            FN(matmul_nn)(scores + r * rep * longest + b * bt, longest, v, a->v_stride_t, DTYPE_F32,
                          acc + r * rep * a->v_dim, a->v_dim, many * rep, a->v_dim, n < bt ? n : bt);
        }
    }
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t h = 0; h < rep; h++) {
            float inverse = 1.0f / sums[r * rep + h];
            const float *from = acc + (r * rep + h) * a->v_dim;
            float *to = a->out + (row + r) * a->out_stride_t + (first + h) * a->out_stride_h;
            for (ptrdiff_t i = 0; i < a->v_dim; i++)
                to[i] = from[i] * inverse;
        }
}

static const kernel_set FN(kernel_set) = {
    FN(matmul_nt), FN(matmul_nn),     FN(silu_mul),    FN(rms_norm),     FN(rope),
    FN(combine),   FN(softmax_terms), FN(sigmoid_row), FN(attend_group), FN(widen_e4m3),
};
