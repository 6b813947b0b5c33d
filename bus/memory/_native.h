/* What the C files of this extension share: argument checks, time, wake-ups, cells, doorbells, and the copy loop. */
#ifndef XDS_NATIVE_H
#define XDS_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "_fault.h"

#define NS_PER_S 1000000000LL
#define GIL_COPY_BYTES 16384   /* copies at least this long release the GIL */
#define RELAX_ROUNDS 64        /* polls with a CPU relax before the spin begins to yield the core */
#define CELL_WORDS 4
#define CELL_BYTES 32

_Static_assert(sizeof(unsigned long long) == 8, "u64 is parsed as unsigned long long");
_Static_assert(__atomic_always_lock_free(8, 0), "shared words need lock-free 64-bit atomics");

static inline int
check_count(const char *name, Py_ssize_t given, Py_ssize_t wanted)
{
    if (given == wanted) {
        return 0;
    }
    PyErr_Format(PyExc_TypeError, "%s: takes %zd arguments, got %zd", name, wanted, given);
    return -1;
}

static inline int
parse_unsigned(PyObject *object, const char *name, uint64_t max, uint64_t *out)
{
    unsigned long long value = PyLong_AsUnsignedLongLong(object);
    if (value == (unsigned long long)-1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) {
            return -1;
        }
        PyErr_Clear();
    }
    else if (value <= max) {
        *out = value;
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s: %R is outside 0..%llu", name, object, (unsigned long long)max);
    return -1;
}

static inline int64_t
now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * NS_PER_S + now.tv_nsec;
}

static inline int64_t
deadline_after(int64_t start, int64_t duration)
{
    return duration > INT64_MAX - start ? INT64_MAX : start + duration;
}

static inline void
cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
    __asm__ __volatile__("yield" ::: "memory");
#else
    __asm__ __volatile__("" ::: "memory");
#endif
}

/* Wake up to `count` sleepers of `word`; returns how many, or -1 with errno set. */
static inline long
wake_sleepers(uint32_t *word, int count)
{
    return syscall(SYS_futex, word, FUTEX_WAKE, count, NULL, NULL, 0);
}

/* Ring a doorbell {seq, sleepers} and return the new seq; *failed = the wake-up failed, see errno.
 *
 * Both sides write one word, then read the other's, in one total order (seq_cst): either the ringer sees the
 * sleeper's mark, or the sleeper sees the new seq. The kernel's own check covers the rest. */
static inline uint32_t
ring_bell(uint32_t *words, int *failed)
{
    uint32_t seq = __atomic_add_fetch(&words[0], 1, __ATOMIC_SEQ_CST); /* SYNC: doorbell, SYNC: word */
    *failed = 0;
    if (__atomic_load_n(&words[1], __ATOMIC_SEQ_CST) != 0) { /* SYNC: doorbell */
        *failed = wake_sleepers(&words[0], INT_MAX) < 0;
    }
    return seq;
}

/* Words of a doorbell: see bus/memory/layout.py. */
#define BELL_SEQ 0
#define BELL_SLEEPERS 1
#define BELL_PATIENT 2
#define BELL_WAKE_AT 3
#define BELL_ALARM 4 /* deaths that the owner's process was told of; only that process writes it, and only it reads it */
#define BELL_BYTES 20
#define LOOK_TIMES_MAX 32 /* a waiter looks at owner locks after the poll interval, twice that, ... so many times that */

/* How often the owner of this doorbell was told of a death. Read behind `seq`: then a later alarm changes `seq` too. */
static inline uint32_t
num_alarms(const uint32_t *bell)
{
    return __atomic_load_n(&bell[BELL_ALARM], __ATOMIC_ACQUIRE); /* SYNC: alarm */
}

/* How long to wait until the next look at owner locks, when `interval` was over without news. */
static inline int64_t
next_look(int64_t interval, int64_t poll_ns)
{
    return interval < LOOK_TIMES_MAX / 2 * poll_ns ? 2 * interval : LOOK_TIMES_MAX * poll_ns;
}

static inline void
store_cell(uint64_t *cell, const uint64_t *words)
{
    __atomic_store_n(&cell[0], 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE); /* SYNC: cell-torn (w0 = 0 is visible before any new word) */
    for (int i = 1; i < CELL_WORDS; i++) {
        __atomic_store_n(&cell[i], words[i], __ATOMIC_RELAXED);
    }
    FAULT("cell-begun");
    __atomic_store_n(&cell[0], words[0], __ATOMIC_RELEASE); /* SYNC: cell-whole */
}

/* 1: `words` is a consistent copy; 0: the cell is empty or being written. */
static inline int
load_cell(const uint64_t *cell, uint64_t *words)
{
    words[0] = __atomic_load_n(&cell[0], __ATOMIC_ACQUIRE); /* SYNC: cell-whole */
    for (int i = 1; i < CELL_WORDS; i++) {
        words[i] = __atomic_load_n(&cell[i], __ATOMIC_RELAXED);
    }
    __atomic_thread_fence(__ATOMIC_ACQUIRE); /* SYNC: cell-torn */
    uint64_t again = __atomic_load_n(&cell[0], __ATOMIC_RELAXED);
    return words[0] != 0 && again == words[0];
}

typedef uint64_t block_t __attribute__((vector_size(16), aligned(1), may_alias));
#define BLOCKS 8
#define STRIDE ((Py_ssize_t)(BLOCKS * sizeof(block_t)))

/* NOTE: this must not become a call of memcpy: glibc's falls by an order of magnitude between a page-aligned
 * slot and page + 16, which is where malloc puts large arrays. All loads of a stride come before its stores,
 * and the order of the strides is chosen so that no load waits for a store to the same offset of another page. */
__attribute__((optimize("no-tree-loop-distribute-patterns"), unused)) static void
copy_forward(char *restrict dst, const char *restrict src, Py_ssize_t size)
{
    Py_ssize_t at = 0;
    for (; at + STRIDE <= size; at += STRIDE) {
        block_t blocks[BLOCKS];
        for (int i = 0; i < BLOCKS; i++) {
            blocks[i] = ((const block_t *)(src + at))[i];
        }
        for (int i = 0; i < BLOCKS; i++) {
            ((block_t *)(dst + at))[i] = blocks[i];
        }
    }
    memcpy(dst + at, src + at, (size_t)(size - at));
}

__attribute__((optimize("no-tree-loop-distribute-patterns"), unused)) static void
copy_backward(char *restrict dst, const char *restrict src, Py_ssize_t size)
{
    Py_ssize_t at = size;
    for (; at >= STRIDE; at -= STRIDE) {
        block_t blocks[BLOCKS];
        for (int i = 0; i < BLOCKS; i++) {
            blocks[i] = ((const block_t *)(src + at - STRIDE))[i];
        }
        for (int i = 0; i < BLOCKS; i++) {
            ((block_t *)(dst + at - STRIDE))[i] = blocks[i];
        }
    }
    memcpy(dst, src, (size_t)at);
}

static inline void
copy_bytes(char *dst, const char *src, Py_ssize_t size)
{
    uintptr_t distance = (uintptr_t)dst - (uintptr_t)src;
    if (distance < (uintptr_t)size || -distance < (uintptr_t)size) {
        memmove(dst, src, (size_t)size);
        return;
    }
    uintptr_t ahead = distance & 4095; /* how far dst leads src within the page */
    if (ahead > 0 && ahead < 2048) {
        copy_backward(dst, src, size);
    }
    else {
        copy_forward(dst, src, size);
    }
}

#endif
