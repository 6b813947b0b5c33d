/* Row kernels. Built with -ffp-contract=off: every rounding is part of the contract. */
#include "_collectives_rows.h"

#define LANE_FLOATS 64 /* floats of a row that stay in registers or L1 while its slots are added */

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define VECTORISED __attribute__((target_clones("avx2", "default")))
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

VECTORISED void
add_slots(float *restrict out, const float *const *rows, const float *weights, int num, Py_ssize_t width)
{
    Py_ssize_t at = 0;
    for (; at + LANE_FLOATS <= width; at += LANE_FLOATS) {
        float sums[LANE_FLOATS] = {0};
        for (int k = 0; k < num; k++) {
            const float *row = rows[k] + at;
            for (int i = 0; i < LANE_FLOATS; i++) {
                sums[i] = sums[i] + weights[k] * row[i];
            }
        }
        memcpy(out + at, sums, sizeof sums);
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
    for (; at + LANE_FLOATS <= width; at += LANE_FLOATS) {
        float sums[LANE_FLOATS] = {0};
        for (int k = 0; k < num; k++) {
            const int8_t *row = rows[k] + at;
            for (int i = 0; i < LANE_FLOATS; i++) {
                float value = (float)row[i] * scales[k];
                sums[i] = sums[i] + weights[k] * value;
            }
        }
        memcpy(out + at, sums, sizeof sums);
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
