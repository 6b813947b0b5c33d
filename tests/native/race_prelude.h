/* Included first when the extensions are built with ThreadSanitizer (see race.py).
 *
 * The interpreter is not instrumented and its lock is hidden from the sanitizer, so whatever the interpreter's headers
 * inline into the extension, such as reference counts, would be reported. Here they are calls into the interpreter. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <sys/uio.h>

#undef Py_INCREF
#undef Py_DECREF
#undef Py_XINCREF
#undef Py_XDECREF
#undef Py_NewRef
#undef Py_XNewRef
#undef PyTuple_SET_ITEM
#undef PyList_SET_ITEM
#define Py_INCREF(object) Py_IncRef((PyObject *)(object))
#define Py_DECREF(object) Py_DecRef((PyObject *)(object))
#define Py_XINCREF(object) Py_IncRef((PyObject *)(object))
#define Py_XDECREF(object) Py_DecRef((PyObject *)(object))
#define Py_NewRef(object) (Py_NewRef)((PyObject *)(object))
#define Py_XNewRef(object) (Py_XNewRef)((PyObject *)(object))
#define PyTuple_SET_ITEM(tuple, index, item) ((void)PyTuple_SetItem((PyObject *)(tuple), index, item))
#define PyList_SET_ITEM(list, index, item) ((void)PyList_SetItem((PyObject *)(list), index, item))

/* Both ends are threads of this process, so what they copy between processes is copied here, where the sanitizer sees it.
 * Each part of `local` fits the part of `remote` at its place. */
static inline ssize_t
race_vm_copy(const struct iovec *to, const struct iovec *from, unsigned long num)
{
    ssize_t size = 0;
    for (unsigned long i = 0; i < num; i++) {
        memcpy(to[i].iov_base, from[i].iov_base, from[i].iov_len);
        size += (ssize_t)from[i].iov_len;
    }
    return size;
}
#define process_vm_readv(pid, local, num, remote, num_remote, flags) race_vm_copy(local, remote, num)
#define process_vm_writev(pid, local, num, remote, num_remote, flags) race_vm_copy(remote, local, num)
