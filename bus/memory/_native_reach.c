/* Reading the sender's memory: one copy for any array, where the system allows it (process_vm_readv).
 *
 * Nothing is assumed. The sender offers its process id and the address of a nonce; the receiver reads the nonce and shows
 * it; only then does the sender send pointers. Both words lie in the second half of the lines of the data and ack cells.
 * Every later read fetches the nonce too, in the same system call, so that another process that has got the id
 * meanwhile is not mistaken for the sender. */
#include "_native_link.h"

#include <sys/random.h>
#include <sys/uio.h>

/* Read [at, at + size) of a copy in process `pid`, and the nonce with the last of it. -1: errno is set. */
int
read_process(const CopyJob *what, uint64_t at, uint64_t size)
{
    char *dst = what->dst + at;
    uint64_t src = (uint64_t)(uintptr_t)what->src + at, found = 0;
    for (;;) {
        struct iovec local[2] = {{dst, size}, {&found, sizeof found}};
        struct iovec remote[2] = {{(void *)(uintptr_t)src, size},
                                  {(void *)(uintptr_t)what->nonce_at, sizeof found}};
        ssize_t got = process_vm_readv(what->pid, local, 2, remote, 2, 0);
        if (got < 0) {
            return -1;
        }
        if ((uint64_t)got == size + sizeof found && found == what->nonce) {
            return 0;
        }
        if (got == 0 || (uint64_t)got >= size) {
            errno = ESRCH;
            return -1;
        }
        dst += got;
        src += (uint64_t)got;
        size -= (uint64_t)got;
    }
}

/* Sender: write [at, at + size) of `what` to `dst` in process `pid`. -1: errno is set. */
int
write_process(const CopyJob *what, uint64_t at, uint64_t size)
{
    const char *src = what->src + at;
    uint64_t dst = (uint64_t)(uintptr_t)what->dst + at;
    while (size > 0) {
        struct iovec local = {(void *)(uintptr_t)src, size}, remote = {(void *)(uintptr_t)dst, size};
        ssize_t done = process_vm_writev(what->pid, &local, 1, &remote, 1, 0);
        if (done <= 0) {
            errno = done == 0 ? EFAULT : errno;
            return -1;
        }
        src += done;
        dst += (uint64_t)done;
        size -= (uint64_t)done;
    }
    return 0;
}

/* Do [at, at + size) of a long copy. -1: errno is set. */
int
copy_part(const CopyJob *what, uint64_t at, uint64_t size)
{
    if (what->pid != 0) {
        return read_process(what, at, size);
    }
    copy_bytes(what->dst + at, what->src + at, (Py_ssize_t)size);
    return 0;
}

/* The sequence word that follows the one in `cell`. */
static uint64_t
next_word(const uint64_t *cell, uint64_t stamp)
{
    uint64_t last = __atomic_load_n(&cell[0], __ATOMIC_RELAXED);
    uint64_t count = (last & ~COUNTER_MASK) == stamp ? last & COUNTER_MASK : 0;
    return stamp | ((count + 1) & COUNTER_MASK);
}

/* Sender: say where this process's nonce lies. Without randomness nothing is offered. */
void
link_offer(LinkEnd *end)
{
    end->is_readable = 0;
    end->offer = NULL;
    if (end->read_bytes_min == UINT64_MAX || getrandom(&end->nonce, sizeof end->nonce, 0) != sizeof end->nonce) {
        return;
    }
    uint64_t *cell = end->out_cell + CELL_WORDS;
    uint64_t words[CELL_WORDS] = {next_word(cell, end->out_stamp), (uint64_t)getpid(),
                                  (uint64_t)(uintptr_t)&end->nonce, 0};
    store_cell(cell, words);
}

/* Receiver: answer a new offer by showing the nonce, if it can be read. */
void
link_answer(LinkEnd *end)
{
    const uint64_t *offer = end->in_cell + CELL_WORDS;
    uint64_t words[CELL_WORDS];
    if (__atomic_load_n(&offer[0], __ATOMIC_RELAXED) == end->offer_word || !load_cell(offer, words) ||
        (words[0] & ~COUNTER_MASK) != end->in_stamp) {
        return;
    }
    end->offer_word = words[0];
    end->peer_pid = 0;
    struct iovec local = {&end->nonce, sizeof end->nonce};
    struct iovec remote = {(void *)(uintptr_t)words[2], sizeof end->nonce};
    if (words[1] == 0 || words[1] > INT_MAX ||
        process_vm_readv((pid_t)words[1], &local, 1, &remote, 1, 0) != sizeof end->nonce) {
        return;
    }
    end->peer_pid = (int)words[1];
    end->nonce_at = words[2];
    uint64_t *cell = end->out_cell + CELL_WORDS;
    uint64_t proof[CELL_WORDS] = {next_word(cell, end->out_stamp), end->nonce, (uint64_t)getpid(),
                                  (uint64_t)(uintptr_t)&end->nonce};
    store_cell(cell, proof);
}

/* Sender: whether the receiver has shown the nonce of this link. It says too where it keeps it: another place when it has
 * opened the link again. */
int
link_is_readable(LinkEnd *end)
{
    const uint64_t *proof = end->in_cell + CELL_WORDS;
    uint64_t words[CELL_WORDS];
    if (__atomic_load_n(&proof[0], __ATOMIC_RELAXED) != end->offer_word && load_cell(proof, words)) {
        end->offer_word = words[0];
        end->is_readable = (words[0] & ~COUNTER_MASK) == end->in_stamp && words[1] == end->nonce;
        end->peer_pid = end->is_readable && words[2] <= INT_MAX ? (int)words[2] : 0;
        end->nonce_at = words[3];
        end->reached_ns = 0;
    }
    return end->is_readable;
}

#define REACHED_NS 1000000 /* a process id is not given to another process so soon after it was seen in use */

/* Sender: whether the process that it would write to is the receiver: it holds this link's nonce, which nobody else knows. */
int
link_reaches_peer(LinkEnd *end)
{
    int64_t now = now_ns();
    if (end->peer_pid == 0 || (end->reached_ns != 0 && now - end->reached_ns < REACHED_NS)) {
        return end->peer_pid != 0;
    }
    uint64_t found = 0;
    struct iovec local = {&found, sizeof found}, remote = {(void *)(uintptr_t)end->nonce_at, sizeof found};
    if (process_vm_readv(end->peer_pid, &local, 1, &remote, 1, 0) != sizeof found || found != end->nonce) {
        end->peer_pid = 0;
    }
    end->reached_ns = now;
    return end->peer_pid != 0;
}

/* read_memory(pid, address, out): for the slow twin. */
PyObject *
read_memory(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t pid, address;
    Py_buffer out;
    if (check_count("read_memory", nargs, 3) < 0 || parse_unsigned(args[0], "pid", INT_MAX, &pid) < 0 ||
        parse_unsigned(args[1], "address", UINT64_MAX, &address) < 0 ||
        PyObject_GetBuffer(args[2], &out, PyBUF_WRITABLE) < 0) {
        return NULL;
    }
    struct iovec local = {out.buf, (size_t)out.len}, remote = {(void *)(uintptr_t)address, (size_t)out.len};
    ssize_t got;
    Py_BEGIN_ALLOW_THREADS
    got = process_vm_readv((pid_t)pid, &local, 1, &remote, 1, 0);
    Py_END_ALLOW_THREADS
    Py_ssize_t wanted = out.len;
    PyBuffer_Release(&out);
    if (got < 0) {
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    if (got != wanted) {
        PyErr_Format(PyExc_OSError, "read_memory: %zd of %zd bytes at %llu", got, wanted, (unsigned long long)address);
        return NULL;
    }
    Py_RETURN_NONE;
}
