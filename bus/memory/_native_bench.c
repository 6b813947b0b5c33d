/* What others are measured against.
 *
 * The limit of point-to-point: a ping-pong in C over shared memory, two copies, pure spin. Layout: [flag u64 of side 0, line pair] [flag u64 of side 1, line pair] [num_bytes of side 0] [num_bytes of side 1],
 * each block rounded up to a page. A round: side 0 copies its message in and stores its flag; side 1 spins on that
 * flag, copies the message out, and answers the same way.
 *
 * The limit of evenness: two sides that compute, then meet; only the flags are used. */
#include "_native_link.h"

#define FLAG_STRIDE 128
#define BLOCK_OFFSET 4096

static int
await_flag(const uint64_t *flag, uint64_t round, int64_t deadline)
{
    for (uint64_t polls = 1; __atomic_load_n(flag, __ATOMIC_ACQUIRE) < round; polls++) { /* SYNC: bench-flag */
        cpu_relax();
        if (polls % 4096 == 0 && now_ns() >= deadline) {
            return 0;
        }
    }
    return 1;
}

/* bench_pingpong(buf, offset, side, private, first, durations, timeout_ns, is_rewritten): `durations` (u64, writable)
 * gets the nanoseconds of each round at side 0; its length is the number of rounds. With `is_rewritten` both sides write
 * `private` anew before each round and meet, out of the time. Flags take two values per round, from `first` on. */
PyObject *
bench_pingpong(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer shared, private, durations;
    uint64_t offset, side, first, timeout, is_rewritten;
    if (check_count("bench_pingpong", nargs, 8) < 0 || parse_unsigned(args[1], "offset", INT64_MAX, &offset) < 0 ||
        parse_unsigned(args[2], "side", 1, &side) < 0 || parse_unsigned(args[4], "first_round", END_MASK, &first) < 0 ||
        parse_unsigned(args[6], "timeout_ns", INT64_MAX, &timeout) < 0 ||
        parse_unsigned(args[7], "is_rewritten", 1, &is_rewritten) < 0 ||
        PyObject_GetBuffer(args[0], &shared, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    if (PyObject_GetBuffer(args[3], &private, PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&shared);
        return NULL;
    }
    if (PyObject_GetBuffer(args[5], &durations, PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&private);
        PyBuffer_Release(&shared);
        return NULL;
    }
    uint64_t num_bytes = (uint64_t)private.len, block = (num_bytes + BLOCK_OFFSET - 1) / BLOCK_OFFSET * BLOCK_OFFSET;
    uint64_t num_rounds = (uint64_t)durations.len / 8, length = (uint64_t)shared.len;
    int is_fit = offset % FLAG_STRIDE == 0 && offset <= length && BLOCK_OFFSET + 2 * block <= length - offset &&
                 (uintptr_t)durations.buf % 8 == 0 && (uintptr_t)shared.buf % FLAG_STRIDE == 0;
    int is_done = is_fit;
    if (is_fit) {
        char *base = (char *)shared.buf + offset;
        uint64_t *mine = (uint64_t *)(base + side * FLAG_STRIDE);
        const uint64_t *theirs = (const uint64_t *)(base + (1 - side) * FLAG_STRIDE);
        char *out = base + BLOCK_OFFSET + side * block;
        const char *in = base + BLOCK_OFFSET + (1 - side) * block;
        int64_t deadline = deadline_after(now_ns(), (int64_t)timeout);
        Py_BEGIN_ALLOW_THREADS
        for (uint64_t i = 0; i < num_rounds && is_done; i++) {
            uint64_t flag = first + 2 * i + 1;
            if (is_rewritten) {
                memset(private.buf, 7, num_bytes);
                __atomic_store_n(mine, flag - 1, __ATOMIC_RELEASE); /* SYNC: bench-flag */
                is_done = await_flag(theirs, flag - 1, deadline);
            }
            int64_t start = now_ns();
            if (side == 1) {
                is_done = await_flag(theirs, flag, deadline);
                copy_bytes(private.buf, in, (Py_ssize_t)num_bytes);
            }
            copy_bytes(out, private.buf, (Py_ssize_t)num_bytes);
            __atomic_store_n(mine, flag, __ATOMIC_RELEASE); /* SYNC: bench-flag */
            if (side == 0) {
                is_done = await_flag(theirs, flag, deadline);
                copy_bytes(private.buf, in, (Py_ssize_t)num_bytes);
            }
            ((uint64_t *)durations.buf)[i] = (uint64_t)(now_ns() - start);
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&durations);
    PyBuffer_Release(&private);
    PyBuffer_Release(&shared);
    if (!is_fit) {
        PyErr_SetString(PyExc_ValueError, "bench_pingpong: a buffer is too small or unaligned");
        return NULL;
    }
    return PyBool_FromLong(is_done);
}

static volatile uint64_t sink; /* so that the work is done */

/* A chain of multiplications: takes the same time whatever else is in the caches. */
static void
compute(uint64_t num_steps)
{
    uint64_t x = sink | 1;
    for (uint64_t i = 0; i < num_steps; i++) {
        x = x * 6364136223846793005ULL + 1442695040888963407ULL;
    }
    sink = x;
}

/* bench_compute(num_steps) -> nanoseconds that so many steps take. */
PyObject *
bench_compute(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t num_steps;
    if (check_count("bench_compute", nargs, 1) < 0 || parse_unsigned(args[0], "num_steps", INT64_MAX, &num_steps) < 0) {
        return NULL;
    }
    int64_t start = now_ns();
    Py_BEGIN_ALLOW_THREADS
    compute(num_steps);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(now_ns() - start);
}

/* bench_meet(buf, offset, side, num_steps, first, durations, timeout_ns): both sides compute, then await each other, for
 * each element of `durations` (u64, writable). Flags take one value per round, from `first` + 1 on. */
PyObject *
bench_meet(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer shared, durations;
    uint64_t offset, side, num_steps, first, timeout;
    if (check_count("bench_meet", nargs, 7) < 0 || parse_unsigned(args[1], "offset", INT64_MAX, &offset) < 0 ||
        parse_unsigned(args[2], "side", 1, &side) < 0 || parse_unsigned(args[3], "num_steps", INT64_MAX, &num_steps) < 0 ||
        parse_unsigned(args[4], "first", END_MASK, &first) < 0 ||
        parse_unsigned(args[6], "timeout_ns", INT64_MAX, &timeout) < 0 ||
        PyObject_GetBuffer(args[0], &shared, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    if (PyObject_GetBuffer(args[5], &durations, PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&shared);
        return NULL;
    }
    uint64_t num_rounds = (uint64_t)durations.len / 8, length = (uint64_t)shared.len;
    int is_fit = offset % FLAG_STRIDE == 0 && offset <= length && 2 * FLAG_STRIDE <= length - offset &&
                 (uintptr_t)durations.buf % 8 == 0 && (uintptr_t)shared.buf % FLAG_STRIDE == 0;
    int is_done = is_fit;
    if (is_fit) {
        char *base = (char *)shared.buf + offset;
        uint64_t *mine = (uint64_t *)(base + side * FLAG_STRIDE);
        const uint64_t *theirs = (const uint64_t *)(base + (1 - side) * FLAG_STRIDE);
        int64_t deadline = deadline_after(now_ns(), (int64_t)timeout);
        Py_BEGIN_ALLOW_THREADS
        for (uint64_t i = 0; i < num_rounds && is_done; i++) {
            int64_t start = now_ns();
            compute(num_steps);
            __atomic_store_n(mine, first + i + 1, __ATOMIC_RELEASE); /* SYNC: bench-flag */
            is_done = await_flag(theirs, first + i + 1, deadline);
            ((uint64_t *)durations.buf)[i] = (uint64_t)(now_ns() - start);
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&durations);
    PyBuffer_Release(&shared);
    if (!is_fit) {
        PyErr_SetString(PyExc_ValueError, "bench_meet: a buffer is too small or unaligned");
        return NULL;
    }
    return PyBool_FromLong(is_done);
}
