/* What the C files of the collectives share: arguments, buffers, the words of a segment. */
#ifndef XDS_COLLECTIVES_H
#define XDS_COLLECTIVES_H

#include "_native.h"

#define CELL_STRIDE 64
#define DOORBELL_OFFSET 128

extern PyType_Spec exchange_spec; /* _collectives_exchange.c */
extern PyType_Spec alltoall_spec; /* _collectives_alltoall.c */
int alltoall_init_names(void);      /* _collectives_swap.c */
int alltoall_init_persistent(void); /* _collectives_persistent.c */

static inline int
parse_index(PyObject *object, const char *name, Py_ssize_t limit, Py_ssize_t *out)
{
    *out = PyNumber_AsSsize_t(object, PyExc_IndexError);
    if (*out == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (*out < 0 || *out >= limit) {
        PyErr_Format(PyExc_IndexError, "%s: %zd is outside 0..%zd", name, *out, limit - 1);
        return -1;
    }
    return 0;
}

/* Export `object` as one contiguous range of at least `size` bytes; NULL with ValueError otherwise. */
static inline void *
open_buffer(PyObject *object, const char *name, Py_ssize_t size, int flags, Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, flags) < 0) {
        return NULL;
    }
    if (view->len < size) {
        PyErr_Format(PyExc_ValueError, "%s: %zd bytes are too few, %zd are needed", name, view->len, size);
    }
    else if (((uintptr_t)view->buf & 3) != 0) {
        PyErr_Format(PyExc_ValueError, "%s: not aligned to 4 bytes", name);
    }
    else {
        return view->buf == NULL ? (void *)view : view->buf; /* an empty buffer may have no address */
    }
    PyBuffer_Release(view);
    return NULL;
}

typedef struct {
    Py_buffer views[8];
    int num;
} buffers_t;

static inline void *
take_buffer(buffers_t *all, PyObject *object, const char *name, Py_ssize_t size, int flags)
{
    void *address = open_buffer(object, name, size, flags, &all->views[all->num]);
    all->num += address != NULL;
    return address;
}

static inline PyObject *
give_back(buffers_t *all, PyObject *result)
{
    while (all->num > 0) {
        PyBuffer_Release(&all->views[--all->num]);
    }
    return result;
}

#endif
