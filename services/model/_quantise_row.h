/* The one rounding of activations and of cached latents to INT8, shared by _int8.c and _kernels_paged.c.
 *
 * It divides, adds and compares, each rounded by itself, so every instruction set and either file gives the same bits.
 */
#ifndef XDS_QUANTISE_ROW_H
#define XDS_QUANTISE_ROW_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* One row of K floats: q + 128, padded with 128, and the scale. A row with a value that is not finite gets scale NaN, so that all its outputs are NaN. */
static inline __attribute__((always_inline)) void
quantise_row(const float *x, uint8_t *q, float *scale, ptrdiff_t K, ptrdiff_t padded)
{
    int32_t largest = 0;
    for (ptrdiff_t k = 0; k < K; k++) {
        int32_t bits;
        memcpy(&bits, &x[k], sizeof bits);
        bits &= 0x7fffffff; /* ordered like the floats, NaN above infinity */
        largest = bits > largest ? bits : largest;
    }
    float absmax;
    memcpy(&absmax, &largest, sizeof absmax);
    *scale = largest < 0x7f800000 ? absmax / 127.0f : NAN;
    memset(q + K, 128, (size_t)(padded - K));
    if (!(*scale > 0.0f)) {
        memset(q, 128, (size_t)K);
        return;
    }
    const float magic = 12582912.0f; /* 1.5 * 2**23: adding it rounds to a whole number, half to even */
    for (ptrdiff_t k = 0; k < K; k++) {
        float shifted = x[k] / *scale + magic;
        int32_t value;
        memcpy(&value, &shifted, sizeof value);
        value -= 0x4b400000;
        value = value > 127 ? 127 : value; /* a subnormal scale is too coarse to keep it in range */
        value = value < -127 ? -127 : value;
        q[k] = (uint8_t)(value + 128);
    }
}

#endif
