/* A pool of threads that nobody waits for: parts of a job are claimed, by the caller too, and the caller waits only for
 * parts that somebody works on. Where another process holds the other cores, the caller does the job alone; a barrier,
 * as OpenMP has one, would wait for the scheduler at each job instead. */
#ifndef PEQA_POOL_H
#define PEQA_POOL_H

#include <stddef.h>
#include <stdint.h>

#define POOL_SPINS 3000 /* about as long as the gap between two jobs of a decode step; then the thread sleeps */

typedef struct {
    uint64_t ticket;  /* number of the job << 32 | parts that nobody has claimed */
    void (*work)(void *data, int part, int parts);
    void *data;
    int32_t parts;
    int32_t left;     /* parts that are not done; a futex */
    int32_t jobs;     /* counts the jobs; a futex */
    int32_t asleep;   /* threads that sleep on `jobs` */
    int32_t waiting;  /* the caller sleeps on `left` */
    int32_t busy;     /* a caller's job is in work */
} peqa_pool;

static inline void pool_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline long pool_futex(int32_t *word, int operation, int32_t value)
{
#if defined(__linux__) && defined(__x86_64__)
    long result;
    register long timeout __asm__("r10") = 0;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(202L), "D"(word), "S"((long)(operation | 128)), "d"((long)value), "r"(timeout)
                     : "rcx", "r11", "memory");
    return result;
#elif defined(__linux__) && defined(__aarch64__)
    register long x8 __asm__("x8") = 98;
    register long x0 __asm__("x0") = (long)word;
    register long x1 __asm__("x1") = operation | 128;
    register long x2 __asm__("x2") = value;
    register long x3 __asm__("x3") = 0;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
    return x0;
#else
    (void)word, (void)operation, (void)value;
    pool_pause();
    return 0;
#endif
}

enum { POOL_WAIT = 0, POOL_WAKE = 1 };

/* The number of a part that is now the caller's to do, or -1. A claim belongs to the job that its ticket names, and
 * that job cannot end before the part is done: work and data may be read after it. */
static inline int pool_claim(peqa_pool *pool)
{
    uint64_t ticket = __atomic_load_n(&pool->ticket, __ATOMIC_ACQUIRE);
    while ((uint32_t)ticket != 0)
        if (__atomic_compare_exchange_n(&pool->ticket, &ticket, ticket - 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
            return (int)((uint32_t)ticket - 1);
    return -1;
}

static inline void pool_work(peqa_pool *pool)
{
    for (int part; (part = pool_claim(pool)) >= 0;) {
        pool->work(pool->data, part, pool->parts);
        if (__atomic_sub_fetch(&pool->left, 1, __ATOMIC_SEQ_CST) == 0 &&
            __atomic_load_n(&pool->waiting, __ATOMIC_SEQ_CST))
            pool_futex(&pool->left, POOL_WAKE, 1);
    }
}

/* Runs work(data, part, parts) once for each part, on whatever threads are free, and returns when all are done. Without
 * a pool, or when another caller uses it, all parts run here. */
static inline void pool_run(peqa_pool *pool, int parts, void (*work)(void *, int, int), void *data)
{
    if (parts <= 1 || pool == 0 || __atomic_exchange_n(&pool->busy, 1, __ATOMIC_ACQUIRE)) {
        for (int part = 0; part < parts; part++)
            work(data, part, parts);
        return;
    }
    const uint64_t job = (__atomic_load_n(&pool->ticket, __ATOMIC_RELAXED) >> 32) + 1;
    pool->work = work;
    pool->data = data;
    pool->parts = parts;
    __atomic_store_n(&pool->left, parts, __ATOMIC_RELAXED);
    __atomic_store_n(&pool->ticket, job << 32 | (uint32_t)parts, __ATOMIC_RELEASE);
    __atomic_add_fetch(&pool->jobs, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&pool->asleep, __ATOMIC_SEQ_CST))
        pool_futex(&pool->jobs, POOL_WAKE, parts - 1);
    pool_work(pool);
    for (int spins = 0, left; (left = __atomic_load_n(&pool->left, __ATOMIC_ACQUIRE)) > 0; spins++) {
        if (spins < POOL_SPINS) {
            pool_pause();
            continue;
        }
        __atomic_store_n(&pool->waiting, 1, __ATOMIC_SEQ_CST);
        pool_futex(&pool->left, POOL_WAIT, left);
        __atomic_store_n(&pool->waiting, 0, __ATOMIC_SEQ_CST);
    }
    __atomic_store_n(&pool->busy, 0, __ATOMIC_RELEASE);
}

/* The life of a pool's thread; it never returns. */
static inline void pool_serve(peqa_pool *pool)
{
    for (;;) {
        const int32_t seen = __atomic_load_n(&pool->jobs, __ATOMIC_SEQ_CST);
        pool_work(pool);
        for (int spins = 0; spins < POOL_SPINS && __atomic_load_n(&pool->jobs, __ATOMIC_RELAXED) == seen; spins++)
            pool_pause();
        __atomic_add_fetch(&pool->asleep, 1, __ATOMIC_SEQ_CST);
        pool_futex(&pool->jobs, POOL_WAIT, seen); /* returns at once when a job came meanwhile */
        __atomic_sub_fetch(&pool->asleep, 1, __ATOMIC_SEQ_CST);
    }
}

#endif
