/* Products with matrices of weights, and the gated MLP. */
#include "_kernels.h"

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
    int ok = IN(0, x, 'f', ANY, ANY, ANY) && IN(1, w, 'w', x.shape[0], ANY, ANY) &&
             need(&args, "w", &w, k_axis, x.shape[2]) && OUT(2, out, 'f', x.shape[0], x.shape[1], w.shape[n_axis]);
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

KERNEL(matmul_nt)
{
    return product("matmul_nt", 1, objects, count);
}

KERNEL(matmul_nn)
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
    return take(args, objects[0], "w", 'B', 2, 0, w) &&
           take_shaped(args, objects[1], "scale", 'f', 0, scale,
                       EXTENTS((w->shape[0] + *block_rows - 1) / *block_rows,
                               (w->shape[1] + *block_columns - 1) / *block_columns));
}

/* x [M, K], w [N, K] e4m3, scale, block_rows, block_columns, out [M, N]: a panel of w is written out, then used for all
 * rows; so each element has the bits that the whole matrix written out would give. */
KERNEL(matmul_nt_e4m3)
{
    arguments args = {.function = "matmul_nt_e4m3"};
    array x, w, scale, out;
    Py_ssize_t block_rows, block_columns;
    if (!need_count(args.function, count, 6))
        return NULL;
    int ok = IN(0, x, 'f', ANY, ANY) && take_e4m3(&args, objects + 1, &w, &scale, &block_rows, &block_columns) &&
             need(&args, "w", &w, 1, x.shape[1]) && OUT(5, out, 'f', x.shape[0], w.shape[0]);
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
KERNEL(dequantise_e4m3)
{
    arguments args = {.function = "dequantise_e4m3"};
    array w, scale, out;
    Py_ssize_t block_rows, block_columns;
    if (!need_count(args.function, count, 5))
        return NULL;
    int ok = take_e4m3(&args, objects, &w, &scale, &block_rows, &block_columns) &&
             OUT(4, out, 'f', w.shape[0], w.shape[1]);
    if (!ok)
        return finish(&args, 0);
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t n = 0; n < w.shape[0]; n++)
        widen_row(&w, &scale, n, block_rows, block_columns, (float *)row_f32(&out, n, 0));
    Py_END_ALLOW_THREADS;
    return finish(&args, 1);
}

/* x [M, H], gate [I, H], up [I, H], down [H, I], out [M, H]: out = (silu(x gate^T) * (x up^T)) down^T. */
KERNEL(mlp)
{
    arguments args = {.function = "mlp"};
    array x, gate, up, down, out;
    if (!need_count(args.function, count, 5))
        return NULL;
    int ok = IN(0, x, 'f', ANY, ANY) && IN(1, gate, 'w', ANY, x.shape[1]) &&
             IN(2, up, 'w', gate.shape[0], x.shape[1]) && IN(3, down, 'w', ANY, gate.shape[0]) &&
             OUT(4, out, 'f', x.shape[0], down.shape[0]);
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
