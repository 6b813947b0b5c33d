/* Atomics, futexes, doorbells, seqlock cells and a copy loop over any writable buffer.
 *
 * Python gives no memory ordering, so every word that two processes share is read and written here.
 * Each release store and the acquire load that pairs with it carry the same "SYNC: <label>" comment;
 * bus/memory/layout.py lists which word uses which pair. Every call checks its own bounds: a bad
 * offset raises IndexError, an unaligned one ValueError, and neither touches memory.
 *
 * Futexes are shared (not FUTEX_PRIVATE_FLAG): waiter and waker are different processes.
 */
#include "_native_link.h"

/* ---------------------------------------------------------------- arguments */

/* A delta may be negative; it wraps modulo 2**64 like the word it is added to. */
static int
parse_delta(PyObject *object, uint64_t *out)
{
    int overflow = 0;
    long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (value == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (overflow == 0) {
        *out = (uint64_t)value;
        return 0;
    }
    if (overflow < 0) {
        PyErr_Format(PyExc_ValueError, "delta: %R does not fit 64 bits", object);
        return -1;
    }
    return parse_unsigned(object, "delta", UINT64_MAX, out);
}

static int
parse_duration(PyObject *object, const char *name, int64_t *out)
{
    uint64_t value;
    if (parse_unsigned(object, name, INT64_MAX, &value) < 0) {
        return -1;
    }
    *out = (int64_t)value;
    return 0;
}

static int
parse_size(PyObject *object, const char *name, Py_ssize_t *out)
{
    Py_ssize_t value = PyNumber_AsSsize_t(object, PyExc_IndexError);
    if (value == -1 && PyErr_Occurred()) {
        return -1;
    }
    if (value < 0) {
        PyErr_Format(PyExc_IndexError, "%s: %zd is negative", name, value);
        return -1;
    }
    *out = value;
    return 0;
}

/* Export `object`'s bytes and return the address of [offset, offset + size) in them, NULL on error.
 * On success the caller must PyBuffer_Release(view). `align` is a power of two, checked on the address. */
static char *
open_range(PyObject *object, Py_ssize_t offset, Py_ssize_t size, size_t align, int flags, Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, flags) < 0) {
        return NULL;
    }
    if (size > view->len || offset > view->len - size) {
        PyErr_Format(PyExc_IndexError, "offset: %zd + %zd bytes is outside a buffer of %zd bytes", offset,
                     size, view->len);
        PyBuffer_Release(view);
        return NULL;
    }
    char *address = (char *)view->buf + offset;
    if (((uintptr_t)address & (align - 1)) != 0) {
        PyErr_Format(PyExc_ValueError, "offset: %zd is not aligned to %zu bytes", offset, align);
        PyBuffer_Release(view);
        return NULL;
    }
    return address;
}

static char *
open_word(PyObject *object, PyObject *offset_object, Py_ssize_t width, int flags, Py_buffer *view)
{
    Py_ssize_t offset;
    if (parse_size(offset_object, "offset", &offset) < 0) {
        return NULL;
    }
    return open_range(object, offset, width, (size_t)width, flags, view);
}

/* ---------------------------------------------------------------- words */

static PyObject *
load_u32(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    if (check_count("load_u32", nargs, 2) < 0) {
        return NULL;
    }
    char *address = open_word(args[0], args[1], 4, PyBUF_SIMPLE, &view);
    if (address == NULL) {
        return NULL;
    }
    uint32_t value = __atomic_load_n((uint32_t *)address, __ATOMIC_ACQUIRE); /* SYNC: word */
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLong(value);
}

static PyObject *
load_u64(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    if (check_count("load_u64", nargs, 2) < 0) {
        return NULL;
    }
    char *address = open_word(args[0], args[1], 8, PyBUF_SIMPLE, &view);
    if (address == NULL) {
        return NULL;
    }
    uint64_t value = __atomic_load_n((uint64_t *)address, __ATOMIC_ACQUIRE); /* SYNC: word */
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLongLong(value);
}

static PyObject *
store_u32(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    uint64_t value;
    if (check_count("store_u32", nargs, 3) < 0 || parse_unsigned(args[2], "value", UINT32_MAX, &value) < 0) {
        return NULL;
    }
    char *address = open_word(args[0], args[1], 4, PyBUF_WRITABLE, &view);
    if (address == NULL) {
        return NULL;
    }
    __atomic_store_n((uint32_t *)address, (uint32_t)value, __ATOMIC_RELEASE); /* SYNC: word */
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *
store_u64(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    uint64_t value;
    if (check_count("store_u64", nargs, 3) < 0 || parse_unsigned(args[2], "value", UINT64_MAX, &value) < 0) {
        return NULL;
    }
    char *address = open_word(args[0], args[1], 8, PyBUF_WRITABLE, &view);
    if (address == NULL) {
        return NULL;
    }
    __atomic_store_n((uint64_t *)address, value, __ATOMIC_RELEASE); /* SYNC: word */
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *
fetch_add_u32(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    uint64_t delta;
    if (check_count("fetch_add_u32", nargs, 3) < 0 || parse_delta(args[2], &delta) < 0) {
        return NULL;
    }
    char *address = open_word(args[0], args[1], 4, PyBUF_WRITABLE, &view);
    if (address == NULL) {
        return NULL;
    }
    uint32_t old = __atomic_fetch_add((uint32_t *)address, (uint32_t)delta, __ATOMIC_SEQ_CST); /* SYNC: word */
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLong(old);
}

static PyObject *
fetch_add_u64(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    uint64_t delta;
    if (check_count("fetch_add_u64", nargs, 3) < 0 || parse_delta(args[2], &delta) < 0) {
        return NULL;
    }
    char *address = open_word(args[0], args[1], 8, PyBUF_WRITABLE, &view);
    if (address == NULL) {
        return NULL;
    }
    uint64_t old = __atomic_fetch_add((uint64_t *)address, delta, __ATOMIC_SEQ_CST); /* SYNC: word */
    PyBuffer_Release(&view);
    return PyLong_FromUnsignedLongLong(old);
}

static PyObject *
cas_u32(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    uint64_t expected, desired;
    if (check_count("cas_u32", nargs, 4) < 0 || parse_unsigned(args[2], "expected", UINT32_MAX, &expected) < 0 ||
        parse_unsigned(args[3], "desired", UINT32_MAX, &desired) < 0) {
        return NULL;
    }
    char *address = open_word(args[0], args[1], 4, PyBUF_WRITABLE, &view);
    if (address == NULL) {
        return NULL;
    }
    uint32_t wanted = (uint32_t)expected;
    int done = __atomic_compare_exchange_n((uint32_t *)address, &wanted, (uint32_t)desired, 0, __ATOMIC_SEQ_CST,
                                           __ATOMIC_SEQ_CST); /* SYNC: word */
    PyBuffer_Release(&view);
    return PyBool_FromLong(done);
}

/* ---------------------------------------------------------------- waiting */

/* Sleep while *word == expected, until the absolute monotonic `deadline`. Called with the GIL held.
 * 1: woken, or the value differs (may be spurious); 0: deadline passed; -1: a Python error is set. */
static int
sleep_on(uint32_t *word, uint32_t expected, int64_t deadline)
{
    struct timespec until = {.tv_sec = deadline / NS_PER_S, .tv_nsec = deadline % NS_PER_S};
    for (;;) {
        int error = 0;
        Py_BEGIN_ALLOW_THREADS
        if (syscall(SYS_futex, word, FUTEX_WAIT_BITSET, expected, &until, NULL, FUTEX_BITSET_MATCH_ANY) < 0) {
            error = errno;
        }
        Py_END_ALLOW_THREADS
        if (error == 0 || error == EAGAIN) {
            return 1;
        }
        if (error == ETIMEDOUT) {
            return 0;
        }
        if (error != EINTR) {
            errno = error;
            PyErr_SetFromErrno(PyExc_OSError);
            return -1;
        }
        if (PyErr_CheckSignals() < 0) {
            return -1;
        }
    }
}

/* Poll *word until it differs from `expected` or `until` passes; the GIL is released.
 * A few polls relax the CPU only; then each gives the core away, since the writer may need this very core. */
static uint32_t
spin_on(uint32_t *word, uint32_t expected, int64_t until)
{
    uint32_t value = expected;
    Py_BEGIN_ALLOW_THREADS
    for (int round = 0;; round++) {
        value = __atomic_load_n(word, __ATOMIC_ACQUIRE); /* SYNC: word */
        if (value != expected) {
            break;
        }
        if (round < RELAX_ROUNDS) {
            cpu_relax();
            continue;
        }
        if (now_ns() >= until) {
            break;
        }
        sched_yield();
    }
    Py_END_ALLOW_THREADS
    return value;
}

static PyObject *
futex_wait(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    uint64_t expected;
    int64_t timeout;
    if (check_count("futex_wait", nargs, 4) < 0 || parse_unsigned(args[2], "expected", UINT32_MAX, &expected) < 0 ||
        parse_duration(args[3], "timeout_ns", &timeout) < 0) {
        return NULL;
    }
    char *address = open_word(args[0], args[1], 4, PyBUF_SIMPLE, &view);
    if (address == NULL) {
        return NULL;
    }
    int outcome = sleep_on((uint32_t *)address, (uint32_t)expected, deadline_after(now_ns(), timeout));
    PyBuffer_Release(&view);
    return outcome < 0 ? NULL : PyBool_FromLong(outcome);
}

static PyObject *
futex_wake(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    uint64_t count;
    if (check_count("futex_wake", nargs, 3) < 0 || parse_unsigned(args[2], "count", INT_MAX, &count) < 0) {
        return NULL;
    }
    char *address = open_word(args[0], args[1], 4, PyBUF_SIMPLE, &view);
    if (address == NULL) {
        return NULL;
    }
    long woken = wake_sleepers((uint32_t *)address, (int)count);
    PyBuffer_Release(&view);
    return woken < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(woken);
}

/* Spin, then sleep, until *word differs from `expected`. Returns -1 with a Python error set, else 0. */
static int
await_change(uint32_t *word, uint32_t expected, int64_t spin, int64_t deadline, uint32_t *sleepers, uint32_t *value)
{
    *value = __atomic_load_n(word, __ATOMIC_ACQUIRE); /* SYNC: word */
    if (*value != expected) {
        return 0;
    }
    int64_t spin_until = deadline_after(now_ns(), spin);
    if (spin > 0) {
        *value = spin_on(word, expected, spin_until < deadline ? spin_until : deadline);
        if (*value != expected) {
            return 0;
        }
    }
    if (sleepers != NULL) {
        __atomic_fetch_add(sleepers, 1, __ATOMIC_SEQ_CST); /* SYNC: doorbell */
    }
    int outcome = 1;
    for (;;) {
        *value = __atomic_load_n(word, __ATOMIC_SEQ_CST); /* SYNC: doorbell */
        if (*value != expected || outcome <= 0) {
            break;
        }
        outcome = sleep_on(word, expected, deadline);
    }
    if (sleepers != NULL) {
        __atomic_fetch_sub(sleepers, 1, __ATOMIC_SEQ_CST); /* only the waiter takes its own mark away */
    }
    return outcome < 0 ? -1 : 0;
}

static PyObject *
wait_u32(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    uint64_t expected;
    int64_t spin, timeout;
    if (check_count("wait_u32", nargs, 5) < 0 || parse_unsigned(args[2], "expected", UINT32_MAX, &expected) < 0 ||
        parse_duration(args[3], "spin_ns", &spin) < 0 || parse_duration(args[4], "timeout_ns", &timeout) < 0) {
        return NULL;
    }
    char *address = open_word(args[0], args[1], 4, PyBUF_SIMPLE, &view);
    if (address == NULL) {
        return NULL;
    }
    uint32_t value;
    int outcome = await_change((uint32_t *)address, (uint32_t)expected, spin, deadline_after(now_ns(), timeout), NULL,
                               &value);
    PyBuffer_Release(&view);
    return outcome < 0 ? NULL : PyLong_FromUnsignedLong(value);
}

/* ---------------------------------------------------------------- doorbell {seq u32, sleepers u32} */

static char *
open_doorbell(PyObject *object, PyObject *offset_object, Py_buffer *view)
{
    Py_ssize_t offset;
    if (parse_size(offset_object, "offset", &offset) < 0) {
        return NULL;
    }
    return open_range(object, offset, 8, 4, PyBUF_WRITABLE, view);
}

static PyObject *
ring_doorbell(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    if (check_count("ring_doorbell", nargs, 2) < 0) {
        return NULL;
    }
    char *address = open_doorbell(args[0], args[1], &view);
    if (address == NULL) {
        return NULL;
    }
    uint32_t *words = (uint32_t *)address;
    int failed;
    uint32_t seq = ring_bell(words, &failed);
    PyBuffer_Release(&view);
    return failed ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromUnsignedLong(seq);
}

static PyObject *
sound_alarm(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    Py_ssize_t offset;
    if (check_count("sound_alarm", nargs, 2) < 0 || parse_size(args[1], "offset", &offset) < 0) {
        return NULL;
    }
    char *address = open_range(args[0], offset, BELL_BYTES, 4, PyBUF_WRITABLE, &view);
    if (address == NULL) {
        return NULL;
    }
    uint32_t *words = (uint32_t *)address;
    int failed;
    __atomic_fetch_add(&words[BELL_ALARM], 1, __ATOMIC_SEQ_CST); /* SYNC: alarm */
    ring_bell(words, &failed); /* wakes whoever is patient, too */
    PyBuffer_Release(&view);
    return failed ? PyErr_SetFromErrno(PyExc_OSError) : Py_NewRef(Py_None);
}

static PyObject *
wait_doorbell(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    uint64_t seen;
    int64_t spin, timeout;
    if (check_count("wait_doorbell", nargs, 5) < 0 || parse_unsigned(args[2], "seen", UINT32_MAX, &seen) < 0 ||
        parse_duration(args[3], "spin_ns", &spin) < 0 || parse_duration(args[4], "timeout_ns", &timeout) < 0) {
        return NULL;
    }
    char *address = open_doorbell(args[0], args[1], &view);
    if (address == NULL) {
        return NULL;
    }
    uint32_t *words = (uint32_t *)address;
    uint32_t value;
    int outcome =
        await_change(&words[0], (uint32_t)seen, spin, deadline_after(now_ns(), timeout), &words[1], &value);
    PyBuffer_Release(&view);
    return outcome < 0 ? NULL : PyLong_FromUnsignedLong(value);
}

/* ---------------------------------------------------------------- cells */

static uint64_t *
open_cell(PyObject *object, PyObject *offset_object, int flags, Py_buffer *view)
{
    Py_ssize_t offset;
    if (parse_size(offset_object, "offset", &offset) < 0) {
        return NULL;
    }
    if (offset % CELL_BYTES != 0) {
        PyErr_Format(PyExc_ValueError, "offset: %zd is not aligned to %d bytes", offset, CELL_BYTES);
        return NULL;
    }
    return (uint64_t *)open_range(object, offset, CELL_BYTES, 8, flags, view);
}

static PyObject *
write_cell(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const names[CELL_WORDS] = {"w0", "w1", "w2", "w3"};
    Py_buffer view;
    uint64_t words[CELL_WORDS];
    if (check_count("write_cell", nargs, 2 + CELL_WORDS) < 0) {
        return NULL;
    }
    for (int i = 0; i < CELL_WORDS; i++) {
        if (parse_unsigned(args[2 + i], names[i], UINT64_MAX, &words[i]) < 0) {
            return NULL;
        }
    }
    uint64_t *cell = open_cell(args[0], args[1], PyBUF_WRITABLE, &view);
    if (cell == NULL) {
        return NULL;
    }
    store_cell(cell, words);
    PyBuffer_Release(&view);
    Py_RETURN_NONE;
}

static PyObject *
read_cell(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer view;
    if (check_count("read_cell", nargs, 2) < 0) {
        return NULL;
    }
    uint64_t *cell = open_cell(args[0], args[1], PyBUF_SIMPLE, &view);
    if (cell == NULL) {
        return NULL;
    }
    uint64_t words[CELL_WORDS];
    int is_whole = load_cell(cell, words);
    PyBuffer_Release(&view);
    if (!is_whole) {
        Py_RETURN_NONE;
    }
    return Py_BuildValue("(KKKK)", (unsigned long long)words[0], (unsigned long long)words[1],
                         (unsigned long long)words[2], (unsigned long long)words[3]);
}

/* ---------------------------------------------------------------- copying */

static PyObject *
copy(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer dst_view, src_view;
    Py_ssize_t dst_offset, src_offset, size;
    if (check_count("copy", nargs, 5) < 0 || parse_size(args[1], "dst_offset", &dst_offset) < 0 ||
        parse_size(args[3], "src_offset", &src_offset) < 0 || parse_size(args[4], "num_bytes", &size) < 0) {
        return NULL;
    }
    char *dst = open_range(args[0], dst_offset, size, 1, PyBUF_WRITABLE, &dst_view);
    if (dst == NULL) {
        return NULL;
    }
    char *src = open_range(args[2], src_offset, size, 1, PyBUF_SIMPLE, &src_view);
    if (src == NULL) {
        PyBuffer_Release(&dst_view);
        return NULL;
    }
    if (size >= GIL_COPY_BYTES) {
        Py_BEGIN_ALLOW_THREADS
        copy_bytes(dst, src, size);
        Py_END_ALLOW_THREADS
    }
    else {
        copy_bytes(dst, src, size);
    }
    PyBuffer_Release(&src_view);
    PyBuffer_Release(&dst_view);
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- module */

#define ENTRY(name, doc) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, doc}

static PyMethodDef methods[] = {
    ENTRY(load_u32, "load_u32(buf, offset) -> int. Acquire load."),
    ENTRY(load_u64, "load_u64(buf, offset) -> int. Acquire load."),
    ENTRY(store_u32, "store_u32(buf, offset, value). Release store."),
    ENTRY(store_u64, "store_u64(buf, offset, value). Release store."),
    ENTRY(fetch_add_u32, "fetch_add_u32(buf, offset, delta) -> old value. Sequentially consistent; wraps."),
    ENTRY(fetch_add_u64, "fetch_add_u64(buf, offset, delta) -> old value. Sequentially consistent; wraps."),
    ENTRY(cas_u32, "cas_u32(buf, offset, expected, desired) -> bool. Sequentially consistent."),
    ENTRY(futex_wait, "futex_wait(buf, offset, expected, timeout_ns) -> bool. False = timed out."),
    ENTRY(futex_wake, "futex_wake(buf, offset, count) -> how many were woken."),
    ENTRY(wait_u32, "wait_u32(buf, offset, expected, spin_ns, timeout_ns) -> the current value."),
    ENTRY(ring_doorbell, "ring_doorbell(buf, offset) -> the new seq."),
    ENTRY(sound_alarm, "sound_alarm(buf, offset): count one more death, and wake all that wait at the doorbell."),
    ENTRY(wait_doorbell, "wait_doorbell(buf, offset, seen, spin_ns, timeout_ns) -> the current seq."),
    ENTRY(write_cell, "write_cell(buf, offset, w0, w1, w2, w3). w0 is the sequence word."),
    ENTRY(read_cell, "read_cell(buf, offset) -> (w0, w1, w2, w3), or None if empty or torn."),
    ENTRY(bench_compute, "bench_compute(num_steps) -> ns that so many steps take."),
    ENTRY(bench_meet, "bench_meet(buf, offset, side, num_steps, first, durations, timeout_ns) -> bool."),
    ENTRY(bench_pingpong, "bench_pingpong(buf, offset, side, private, first_round, durations, timeout_ns, is_rewritten) -> bool."),
    ENTRY(read_memory, "read_memory(pid, address, out). Copies from another process. OSError if it may not."),
    ENTRY(copy, "copy(dst, dst_offset, src, src_offset, num_bytes). Releases the GIL when long."),
    {NULL, NULL, 0, NULL},
};

static int
add_types(PyObject *module)
{
    PyType_Spec *const specs[] = {&send_end_spec, &recv_end_spec};
    if (link_init_names() < 0) {
        return -1;
    }
    for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        PyObject *type = PyType_FromModuleAndSpec(module, specs[i], NULL);
        if (type == NULL || PyModule_AddType(module, (PyTypeObject *)type) < 0) {
            Py_XDECREF(type);
            return -1;
        }
        Py_DECREF(type);
    }
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)add_types}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "bus.memory._native",
    .m_doc = "Atomics, futexes, doorbells, cells and copies over shared memory.",
    .m_size = 0,
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
