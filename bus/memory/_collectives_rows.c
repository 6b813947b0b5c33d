/* Row kernels. Built with -ffp-contract=off: every rounding is part of the contract. */
#include "_collectives_rows.h"

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define VECTORISED
#endif

typedef int32_t word_t __attribute__((may_alias));

VECTORISED float
quantise_row(int8_t *restrict dst, const float *restrict src, Py_ssize_t width)
{
    const word_t *bits = (const word_t *)src;
    int32_t largest = 0;
    for (Py_ssize_t i = 0; i < width; i++) {
        int32_t magnitude = bits[i] & 0x7fffffff; /* ordered like the floats, NaN above infinity */
        largest = magnitude > largest ? magnitude : largest;
    }
    float absmax, scale = __builtin_nanf("");
    memcpy(&absmax, &largest, sizeof absmax);
    if (largest < 0x7f800000) {
        scale = absmax / 127.0f;
    }
    if (!(scale > 0.0f)) {
        memset(dst, 0, (size_t)width);
        return scale;
    }
    const float magic = 12582912.0f; /* 1.5 * 2**23: adding it rounds to an integer, half to even */
    for (Py_ssize_t i = 0; i < width; i++) {
        float shifted = src[i] / scale + magic;
        int32_t value;
        memcpy(&value, &shifted, sizeof value);
        value -= 0x4b400000;
        value = value > 127 ? 127 : value; /* a subnormal scale is too coarse to keep it in range */
        dst[i] = (int8_t)(value < -127 ? -127 : value);
    }
    return scale;
}

VECTORISED void
dequantise_row(float *restrict dst, const int8_t *restrict src, float scale, Py_ssize_t width)
{
    for (Py_ssize_t i = 0; i < width; i++) {
        dst[i] = (float)src[i] * scale;
    }
}

#define LINE ((Py_ssize_t)sizeof(line_t))
typedef char line_t __attribute__((vector_size(64), aligned(1), may_alias));

VECTORISED void
copy_row(char *restrict dst, const char *restrict src, Py_ssize_t size)
{
    Py_ssize_t ahead = (Py_ssize_t)(((uintptr_t)dst - (uintptr_t)src) & 4095);
    if (ahead > 0 && ahead < 2048 && ahead < size) { /* loads would wait for stores to the same place of another page */
        copy_bytes(dst, src, size);
        return;
    }
    Py_ssize_t at = 0;
    for (; at + LINE <= size; at += LINE) {
        __builtin_prefetch(dst + size + at, 1, 2); /* for the next row, which is written next to this one */
        *(line_t *)(dst + at) = *(const line_t *)(src + at);
    }
    memcpy(dst + at, src + at, (size_t)(size - at));
}

/* Sums of 64 neighbours of a row stay in registers while its slots are added. */
typedef float lane_t __attribute__((vector_size(64), aligned(4), may_alias));
#define LANE_FLOATS 16
#define NUM_LANES 4

VECTORISED void
add_slots(float *restrict out, const float *const *rows, const float *weights, int num, Py_ssize_t width)
{
    Py_ssize_t at = 0;
    for (; at + NUM_LANES * LANE_FLOATS <= width; at += NUM_LANES * LANE_FLOATS) {
        lane_t a = {0}, b = {0}, c = {0}, d = {0};
        for (int k = 0; k < num; k++) {
            const lane_t *row = (const lane_t *)(rows[k] + at);
            a = a + row[0] * weights[k];
            b = b + row[1] * weights[k];
            c = c + row[2] * weights[k];
            d = d + row[3] * weights[k];
        }
        lane_t *sums = (lane_t *)(out + at);
        sums[0] = a;
        sums[1] = b;
        sums[2] = c;
        sums[3] = d;
    }
    for (; at < width; at++) {
        float sum = 0.0f;
        for (int k = 0; k < num; k++) {
            sum = sum + weights[k] * rows[k][at];
        }
        out[at] = sum;
    }
}

VECTORISED void
add_slots_int8(float *restrict out, const int8_t *const *rows, const float *scales, const float *weights, int num,
               Py_ssize_t width)
{
    Py_ssize_t at = 0;
    for (; at + NUM_LANES * LANE_FLOATS <= width; at += NUM_LANES * LANE_FLOATS) {
        lane_t a = {0}, b = {0}, c = {0}, d = {0};
        for (int k = 0; k < num; k++) {
            float values[NUM_LANES * LANE_FLOATS] __attribute__((aligned(64)));
            const int8_t *row = rows[k] + at;
            /* NOTE: a loop, because gcc 12 converts vectors of bytes one by one. */
            for (int i = 0; i < NUM_LANES * LANE_FLOATS; i++) {
                values[i] = (float)row[i] * scales[k];
            }
            const lane_t *lanes = (const lane_t *)values;
            a = a + lanes[0] * weights[k];
            b = b + lanes[1] * weights[k];
            c = c + lanes[2] * weights[k];
            d = d + lanes[3] * weights[k];
        }
        lane_t *sums = (lane_t *)(out + at);
        sums[0] = a;
        sums[1] = b;
        sums[2] = c;
        sums[3] = d;
    }
    for (; at < width; at++) {
        float sum = 0.0f;
        for (int k = 0; k < num; k++) {
            float value = (float)rows[k][at] * scales[k];
            sum = sum + weights[k] * value;
        }
        out[at] = sum;
    }
}

#if defined(__x86_64__)
#include <emmintrin.h>

static void
stream_bytes(char *restrict dst, const char *restrict src, Py_ssize_t size)
{
    Py_ssize_t at = (Py_ssize_t)(-(uintptr_t)dst & 63);
    memcpy(dst, src, (size_t)at);
    for (; at + 64 <= size; at += 64) {
        const __m128i *from = (const __m128i *)(src + at);
        __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
        __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
        __m128i *to = (__m128i *)(dst + at);
        _mm_stream_si128(to, a);
        _mm_stream_si128(to + 1, b);
        _mm_stream_si128(to + 2, c);
        _mm_stream_si128(to + 3, d);
    }
    _mm_sfence(); /* such stores are not ordered by a release */
    memcpy(dst + at, src + at, (size_t)(size - at));
}

void
copy_piece(char *restrict dst, const char *restrict src, Py_ssize_t size, int past_caches)
{
    if (past_caches) {
        stream_bytes(dst, src, size);
    }
    else {
        copy_bytes(dst, src, size);
    }
}
#else
void
copy_piece(char *restrict dst, const char *restrict src, Py_ssize_t size, int past_caches)
{
    copy_bytes(dst, src, size);
}
#endif
