/* How the C files of this folder take arrays: through the buffer protocol, each one checked by name.
 *
 * `take` and `need` set a ValueError that names function and argument, and return 0.
 */
#ifndef XDS_ARGUMENTS_H
#define XDS_ARGUMENTS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* The gated activation of _kernels, for its siblings: out = silu(gate) * up, n floats each. */
typedef void (*silu_mul_t)(const float *gate, const float *up, float *out, ptrdiff_t n);
#define SILU_MUL_CAPSULE "services.model._kernels._silu_mul"

enum { DTYPE_F32, DTYPE_BF16, DTYPE_F16 };

#define ARRAYS_MAX 8

typedef struct {
    void *data;
    Py_ssize_t shape[4], stride[4]; /* strides in elements */
    int dtype;
} array;

typedef struct {
    const char *function;
    Py_buffer views[ARRAYS_MAX];
    int count;
} arguments;

static inline void release(arguments *args)
{
    while (args->count > 0)
        PyBuffer_Release(&args->views[--args->count]);
}

/* "f" float32, "i" int32, "b" int8, "B" uint8, "w" a weight: float32, bfloat16 as uint16, or float16. */
static inline int dtype_matches(const char *format, Py_ssize_t itemsize, char wanted, int *dtype)
{
    char code = 'B';
    if (format != NULL)
        code = strchr("@=<", format[0]) != NULL ? format[1] : format[0];
    *dtype = code == 'f' ? DTYPE_F32 : code == 'H' ? DTYPE_BF16 : DTYPE_F16;
    if (wanted == 'i')
        return (code == 'i' || code == 'l') && itemsize == 4;
    if (wanted == 'b' || wanted == 'B')
        return code == wanted;
    return code == 'f' || (wanted == 'w' && (code == 'H' || code == 'e'));
}

static inline int take(arguments *args, PyObject *object, const char *name, char wanted, int rank, int writable, array *out)
{
    Py_buffer *view = &args->views[args->count];
    if (PyObject_GetBuffer(object, view, PyBUF_STRIDES | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) != 0) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s: %s must be %s array", args->function, name,
                     writable ? "a writable" : "an");
        return 0;
    }
    args->count++;
    if (!dtype_matches(view->format, view->itemsize, wanted, &out->dtype)) {
        PyErr_Format(PyExc_ValueError, "%s: %s must be %s, got format '%s'", args->function, name,
                     wanted == 'i'   ? "int32"
                     : wanted == 'b' ? "int8"
                     : wanted == 'B' ? "uint8"
                     : wanted == 'w' ? "float32, bfloat16 (as uint16) or float16"
                                     : "float32",
                     view->format != NULL ? view->format : "B");
        return 0;
    }
    if (view->ndim != rank) {
        PyErr_Format(PyExc_ValueError, "%s: %s must have rank %d, got %d", args->function, name, rank, view->ndim);
        return 0;
    }
    for (int i = 0; i < rank; i++) {
        out->shape[i] = view->shape[i];
        out->stride[i] = view->strides[i] / view->itemsize;
        if (view->strides[i] % view->itemsize != 0 ||
            (i == rank - 1 && view->shape[i] > 1 && out->stride[i] != 1)) {
            PyErr_Format(PyExc_ValueError, "%s: %s must have contiguous rows", args->function, name);
            return 0;
        }
    }
    out->data = view->buf;
    return 1;
}

static inline int need(arguments *args, const char *name, const array *a, int axis, Py_ssize_t extent)
{
    if (a->shape[axis] == extent)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s: %s must have extent %zd on axis %d, got %zd", args->function, name, extent,
                 axis, a->shape[axis]);
    return 0;
}

#define ANY (-1) /* an extent that may be any */

/* `take` an array that must have these extents. */
static inline int take_shaped(arguments *args, PyObject *object, const char *name, char wanted, int writable, array *out,
                              int rank, const Py_ssize_t *extents)
{
    if (!take(args, object, name, wanted, rank, writable, out))
        return 0;
    for (int i = 0; i < rank; i++)
        if (extents[i] != ANY && !need(args, name, out, i, extents[i]))
            return 0;
    return 1;
}

#define EXTENTS(...) (int)(sizeof((Py_ssize_t[]){__VA_ARGS__}) / sizeof(Py_ssize_t)), (Py_ssize_t[]){__VA_ARGS__}

/* Argument number `i`, named like the variable `a`, with the extents that follow; one that is written has an OUT. */
#define IN(i, a, wanted, ...) take_shaped(&args, objects[i], #a, wanted, 0, &a, EXTENTS(__VA_ARGS__))
#define OUT(i, a, wanted, ...) take_shaped(&args, objects[i], #a, wanted, 1, &a, EXTENTS(__VA_ARGS__))

static inline int need_count(const char *function, Py_ssize_t got, Py_ssize_t wanted)
{
    if (got == wanted)
        return 1;
    PyErr_Format(PyExc_TypeError, "%s: takes %zd arguments, got %zd", function, wanted, got);
    return 0;
}

static inline PyObject *finish(arguments *args, int ok)
{
    release(args);
    if (!ok)
        return NULL;
    Py_RETURN_NONE;
}

#endif
