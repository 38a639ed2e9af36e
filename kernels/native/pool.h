/* Torch's own OpenMP pool, reached through addresses that the loader found; no runtime is linked or started here. */
#ifndef PEQA_POOL_H
#define PEQA_POOL_H

#include <stddef.h>

typedef struct {
    void (*parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags); /* GOMP_parallel */
    int (*thread_num)(void);                                                              /* omp_get_thread_num */
    int (*num_threads)(void);                                                             /* omp_get_num_threads */
} peqa_pool;

typedef struct {
    const peqa_pool *pool;
    void (*work)(void *data, int thread, int threads);
    void *data;
} pool_call;

static void pool_entry(void *arg)
{
    const pool_call *call = arg;
    call->work(call->data, call->pool->thread_num(), call->pool->num_threads());
}

/* Runs work(data, thread, threads) on at most `threads` threads; without a pool, here and once. */
static inline void pool_run(const peqa_pool *pool, int threads, void (*work)(void *, int, int), void *data)
{
    if (threads <= 1 || pool == 0 || pool->parallel == 0) {
        work(data, 0, 1);
        return;
    }
    pool_call call = {pool, work, data};
    pool->parallel(pool_entry, &call, (unsigned)threads, 0);
}

#endif
