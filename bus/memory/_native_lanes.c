/* Lanes: one long copy shared by several threads, as the paper's bulk path shares it among AIV cores.
 *
 * The calling thread cuts the copy into blocks that all lanes, itself among them, claim one after another. The other
 * lanes are threads that live for this copy alone, so nothing is left behind, not even across a fork. Nobody waits
 * for a lane that the scheduler has not run yet: it finds no block left and ends. */
#include "_native_link.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>

#define LANE_STACK_BYTES (128 * 1024)
#define YIELDS_MAX 64 /* before the caller sleeps until the last block is done */

typedef struct {
    CopyJob what;
    uint32_t num_blocks, next, num_done, num_holders;
    int error; /* errno of a block that could not be copied */
} Job;

static void
drop(Job *job)
{
    if (__atomic_sub_fetch(&job->num_holders, 1, __ATOMIC_ACQ_REL) == 0) { /* SYNC: lane-job */
        free(job);
    }
}

/* Copy blocks until none is left; returns how many. Several threads at once. */
static uint32_t
copy_blocks(Job *job)
{
    uint32_t num_copied = 0, block;
    while ((block = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->num_blocks) {
        uint64_t at = (uint64_t)block * LANE_BLOCK_BYTES, left = job->what.size - at;
        if (copy_part(&job->what, at, left < LANE_BLOCK_BYTES ? left : LANE_BLOCK_BYTES) < 0) {
            __atomic_store_n(&job->error, errno, __ATOMIC_RELAXED);
        }
        FAULT("block-copied");
        num_copied++;
        if (__atomic_add_fetch(&job->num_done, 1, __ATOMIC_RELEASE) == job->num_blocks) { /* SYNC: lane-block */
            wake_sleepers(&job->num_done, 1);
        }
    }
    return num_copied;
}

static void *
lane(void *argument)
{
    copy_blocks(argument);
    drop(argument);
    return NULL;
}

/* Start up to `num` threads on `job`, with every signal blocked: those are for the threads of Python. */
static void
start_lanes(Job *job, int num)
{
    pthread_attr_t attributes;
    sigset_t all, before;
    if (pthread_attr_init(&attributes) != 0) {
        return;
    }
    sigfillset(&all);
    if (pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED) == 0 &&
        pthread_attr_setstacksize(&attributes, LANE_STACK_BYTES) == 0 &&
        pthread_sigmask(SIG_BLOCK, &all, &before) == 0) {
        for (pthread_t thread; num > 0; num--) {
            __atomic_add_fetch(&job->num_holders, 1, __ATOMIC_RELAXED);
            if (pthread_create(&thread, &attributes, lane, job) != 0) {
                drop(job);
                break; /* too many threads: the lanes that run do it all */
            }
        }
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    pthread_attr_destroy(&attributes);
}

/* Wait for the blocks that other lanes still copy. */
static void
await_blocks(Job *job)
{
    uint32_t num_done;
    for (int i = 0;; i++) {
        num_done = __atomic_load_n(&job->num_done, __ATOMIC_ACQUIRE); /* SYNC: lane-block */
        if (num_done == job->num_blocks) {
            return;
        }
        if (i < YIELDS_MAX) {
            sched_yield();
        }
        else {
            syscall(SYS_futex, &job->num_done, FUTEX_WAIT, num_done, NULL, NULL, 0);
        }
    }
}

/* Do `what` in up to `num_lanes` threads; others than the caller did *num_helped of *num_blocks. -1: errno is set.
 * Called without the GIL. The ranges must not overlap. */
int
lanes_copy(const CopyJob *what, int num_lanes, uint32_t *num_blocks, uint32_t *num_helped)
{
    Job *job = malloc(sizeof *job);
    *num_blocks = (uint32_t)((what->size + LANE_BLOCK_BYTES - 1) / LANE_BLOCK_BYTES);
    *num_helped = 0;
    if (job == NULL) {
        return copy_part(what, 0, what->size);
    }
    *job = (Job){.what = *what, .num_blocks = *num_blocks, .num_holders = 1};
    start_lanes(job, num_lanes - 1);
    *num_helped = *num_blocks - copy_blocks(job);
    await_blocks(job);
    int error = __atomic_load_n(&job->error, __ATOMIC_RELAXED);
    drop(job);
    errno = error;
    return error == 0 ? 0 : -1;
}
