/* A pool of threads that nobody waits for: parts of a job are claimed, by the caller too, and the caller waits only for
 * parts that somebody works on. Where another process holds the other cores, the caller does the job alone; a barrier,
 * as OpenMP has one, would wait for the scheduler at each job instead. */
#ifndef PEQA_POOL_H
#define PEQA_POOL_H

#include <stddef.h>
#include <stdint.h>

#define POOL_SPINS 3000 /* about as long as the gap between two jobs of a decode step; then the thread sleeps */

#define POOL_WORKERS 256 /* threads beyond these stay where the scheduler puts them */
#define POOL_CPUS 1024

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
    int32_t workers;  /* threads that serve */
    int32_t thread[POOL_WORKERS]; /* their numbers to the system; 0 until known */
    int32_t barred[POOL_WORKERS]; /* 1 + the processor that each may not run on, 0 for none */
    uint64_t allowed[POOL_CPUS / 64]; /* processors that this process may run on */
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

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
#if defined(__x86_64__)
enum { POOL_GETTID = 186, POOL_SETAFFINITY = 203, POOL_GETAFFINITY = 204, POOL_GETCPU = 309 };
#else
enum { POOL_GETTID = 178, POOL_SETAFFINITY = 122, POOL_GETAFFINITY = 123, POOL_GETCPU = 168 };
#endif

static inline long pool_system(long number, long a, long b, long c)
{
#if defined(__x86_64__)
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
#else
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
    return x0;
#endif
}

/* Notes the calling thread as one of the pool's. */
static inline void pool_enlist(peqa_pool *pool)
{
    const int32_t at = __atomic_fetch_add(&pool->workers, 1, __ATOMIC_SEQ_CST);
    if (at >= POOL_WORKERS || pool_system(POOL_GETAFFINITY, 0, sizeof pool->allowed, (long)pool->allowed) <= 0)
        return;
    __atomic_store_n(&pool->thread[at], (int32_t)pool_system(POOL_GETTID, 0, 0, 0), __ATOMIC_RELEASE);
}

/* Bars the pool's threads from the caller's processor. The scheduler likes to wake a thread where its waker runs, and
 * there it would wait for the caller to finish what it was woken to share (32 rows of 4096 x 4096 after a pause: 2.9
 * ms so, 1.5 with this, two processors). */
static inline void pool_clear_way(peqa_pool *pool)
{
    uint32_t cpu = 0;
    if (pool_system(POOL_GETCPU, (long)&cpu, 0, 0) != 0 || cpu >= POOL_CPUS)
        return;
    for (int i = 0; i < POOL_WORKERS && i < __atomic_load_n(&pool->workers, __ATOMIC_ACQUIRE); i++) {
        const int32_t thread = __atomic_load_n(&pool->thread[i], __ATOMIC_ACQUIRE);
        uint64_t mask[POOL_CPUS / 64], left = 0;
        if (thread == 0 || pool->barred[i] == (int32_t)cpu + 1)
            continue;
        for (int word = 0; word < POOL_CPUS / 64; word++) {
            mask[word] = pool->allowed[word];
            if (word == (int)(cpu / 64))
                mask[word] &= ~((uint64_t)1 << cpu % 64);
            left |= mask[word];
        }
        if (left && pool_system(POOL_SETAFFINITY, thread, sizeof mask, (long)mask) == 0)
            pool->barred[i] = (int32_t)cpu + 1;
    }
}
#else
static inline void pool_enlist(peqa_pool *pool) { (void)pool; }
static inline void pool_clear_way(peqa_pool *pool) { (void)pool; }
#endif

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
    if (__atomic_load_n(&pool->asleep, __ATOMIC_SEQ_CST)) {
        pool_clear_way(pool);
        pool_futex(&pool->jobs, POOL_WAKE, parts - 1);
    }
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
    pool_enlist(pool);
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
