/* The module `_kernels`: the model's arithmetic. Its law is in _kernels_impl.h. */
#include "_kernels.h"

static PyObject *instruction_set(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return PyUnicode_FromString(kernels_name());
}

/* For tests: "generic" always exists, "avx2" where it was compiled and the processor has it. */
static PyObject *select_instruction_set(PyObject *self, PyObject *name)
{
    const char *wanted = PyUnicode_AsUTF8(name);
    if (wanted == NULL)
        return NULL;
    if (!kernels_select(wanted))
        return PyErr_Format(PyExc_ValueError, "select_instruction_set: '%s' is not available here", wanted);
    Py_RETURN_NONE;
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

static PyMethodDef methods[] = {
    FAST(matmul_nt),
    FAST(matmul_nn),
    FAST(matmul_nt_e4m3),
    FAST(dequantise_e4m3),
    FAST(mlp),
    FAST(rms_norm),
    FAST(silu_mul),
    FAST(rope),
    FAST(combine),
    FAST(route),
    FAST(kv_store),
    FAST(paged_attention),
    FAST(latent_store),
    FAST(latent_attention),
    {"instruction_set", instruction_set, METH_NOARGS, NULL},
    {"select_instruction_set", select_instruction_set, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static void silu_mul_row(const float *gate, const float *up, float *out, ptrdiff_t n)
{
    kernels->silu_mul(gate, up, out, n);
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void)
{
    kernels_select_best();
    PyObject *self = PyModule_Create(&module);
    PyObject *capsule = PyCapsule_New((void *)(uintptr_t)silu_mul_row, SILU_MUL_CAPSULE, NULL);
    if (self == NULL || PyModule_AddObjectRef(self, "_silu_mul", capsule) < 0)
        Py_CLEAR(self);
    Py_XDECREF(capsule);
    return self;
}
