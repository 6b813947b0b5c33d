/* Rows of the collectives: INT8 and weighted addition, vectorised. Copies are `copy_bytes` of _native.h. */
#ifndef XDS_COLLECTIVES_ROWS_H
#define XDS_COLLECTIVES_ROWS_H

#include "_native.h"

/* Quantise one row; returns its scale. A row with a value that is not finite becomes zeros and scale NaN. */
float quantise_row(int8_t *restrict dst, const float *restrict src, Py_ssize_t width);

void dequantise_row(float *restrict dst, const int8_t *restrict src, float scale, Py_ssize_t width);

/* out = 0 + w[0] * y[0] + w[1] * y[1] ..., in this order, each step rounded: the order is part of the contract. */
void add_slots(float *restrict out, const float *const *rows, const float *weights, int num, Py_ssize_t width);

/* The same with rows of INT8: y[k] = scales[k] * rows[k], rounded. */
void add_slots_int8(float *restrict out, const int8_t *const *rows, const float *scales, const float *weights, int num,
                    Py_ssize_t width);

/* Copy a row of several that are written one next to the other. They must not overlap. */
void copy_row(char *restrict dst, const char *restrict src, Py_ssize_t size);

/* Copy what does not overlap, past the caches if a large result would only empty them. */
void copy_piece(char *restrict dst, const char *restrict src, Py_ssize_t size, int past_caches);

#endif
