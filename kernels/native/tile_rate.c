/* How fast a register tile goes that reads unpacked codes, when all that it reads lies in the first cache level: no
 * product that unpacks codes to memory goes faster. With VNNI those of 16-bit activations unpack them in registers
 * (few_tile): as many multiplications, another tile. */
#include "many_rows.h"

#if !TILES

typedef struct {
    job job;
    size_t rounds;
} rate_job;

static void work_tile(void *data, int part, int parts)
{
    (void)part, (void)parts;
    const rate_job *r = data;
    const job *j = &r->job;
    int32_t x[ROWS_MAX * CHAIN / 2] __attribute__((aligned(64))) = {0}, counts[ROWS_MAX * CHAIN / UNIT] = {0};
    float steps[ROWS_MAX] = {0};
    unpacked codes = {0}; /* bytes fill half of it */
    totals buffer, *const total = in_memory(&buffer);
    const block_place b = place_block(&j->c, 0);
    const stripe_place s = {.rows = ROWS_MAX, .x = x, .counts = counts, .steps = steps};
    const int ends = ends_of(j);
    unpack_block(j, 0, &b, &codes);
    clear(ROWS_MAX, TILE_V, total);
    for (size_t i = 0; i < r->rounds; i++)
        if (ends == END_LATE)
            many_tile(ROWS_MAX, TILE_V, 0, END_LATE, j, &codes, 0, 0, &s, &b, in_memory(total));
        else if (ends == END_OFFSET)
            many_tile(ROWS_MAX, TILE_V, 0, END_OFFSET, j, &codes, 0, 0, &s, &b, in_memory(total));
        else
            many_tile(ROWS_MAX, TILE_V, 0, END_CENTRED, j, &codes, 0, 0, &s, &b, in_memory(total));
}

#endif

/* Multiplies one tile by the first block of `w`, whose activations have 16 bits, `rounds` times on each thread, and
 * returns how many products of a code and an activation that were; 0 where matrix tiles do this. */
EXPORT int64_t peqa_tile_products(const peqa_weight *w, peqa_pool *pool, int64_t threads, int64_t rounds)
{
#if TILES
    (void)w, (void)pool, (void)threads, (void)rounds;
    return 0;
#else
    rate_job r = {.job = {.w = w, .c = cut(w)}, .rounds = (size_t)rounds};
    const block_place b = place_block(&r.job.c, 0);
    pool_run(pool, (int)threads, work_tile, &r);
    return threads * rounds * ROWS_MAX * TILE_V * VL * (int64_t)(b.chains * b.units * UNIT);
#endif
}
