/* A NumPy allocator that keeps nothing back, for runs under ThreadSanitizer (see race.py).
 *
 * NumPy hands small freed blocks to the next asker, whatever its thread; Python's lock orders that, but is hidden there.
 * The handler belongs to a context: every thread calls `install`. */
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#include <Python.h>
#include <numpy/arrayobject.h>

static void *
take(void *context, size_t size)
{
    return malloc(size);
}

static void *
take_zeroed(void *context, size_t count, size_t size)
{
    return calloc(count, size);
}

static void *
resize(void *context, void *block, size_t size)
{
    return realloc(block, size);
}

static void
give(void *context, void *block, size_t size)
{
    free(block);
}

static PyDataMem_Handler handler = {"race", 1, {NULL, take, take_zeroed, resize, give}};

static PyObject *
install(PyObject *module, PyObject *unused)
{
    PyObject *capsule = PyCapsule_New(&handler, "mem_handler", NULL);
    PyObject *old = capsule == NULL ? NULL : PyDataMem_SetHandler(capsule);
    Py_XDECREF(capsule);
    if (old == NULL) {
        return NULL;
    }
    Py_DECREF(old);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"install", install, METH_NOARGS, "install(): for this thread."}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "race_memory", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC
PyInit_race_memory(void)
{
    import_array();
    return PyModule_Create(&definition);
}
