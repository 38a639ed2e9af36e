/* Choosing tokens from rows of logits: the best of each row, a random draw, the most likely ones with what a row's
 * probabilities sum to. Each row by itself: what a row gives depends on that row alone.
 *
 * A token's weight is exp((logit - best) / temperature), so the best one weighs 1.
 */
#include "likeliest.h"
#include "pool.h"

#define SHARE_FROM ((size_t)65536) /* logits from which threads share the rows: some 10 us on one core */

/* One row to draw from. top_k 0, top_p 1 and min_p 0 keep everything. */
typedef struct {
    const float *logits;
    double uniform, top_p, min_p; /* uniform in [0, 1) */
    float best, temperature;
    int64_t top_k;
    int64_t token; /* the result */
} draw;

typedef struct {
    const float *logits; /* [rows, stride] */
    const int64_t *picked; /* rows to work on; NULL: all in order */
    draw *draws;
    float *best;     /* [count] */
    int64_t *tokens; /* [count] or [count, top] */
    float *values;   /* [count, top] */
    double *sums;    /* [count] */
    float *scratch;
    size_t count, stride, width, top;
} job;

typedef struct {
    float *weight;     /* [width] */
    uint64_t *heap;    /* [width] */
    double *block_sum; /* [blocks] */
} memory;

INLINE size_t blocks_of(size_t width) { return (width + BLOCK - 1) / BLOCK; }
static size_t floats_per_part(size_t width) { return 3 * (width + VL) + 2 * blocks_of(width) + 64; }

static memory carve(const job *j, int part)
{
    memory m;
    float *from = j->scratch + (size_t)part * (floats_per_part(j->width) / 2 * 2);
    m.heap = (uint64_t *)(((uintptr_t)from + 63) / 64 * 64);
    m.block_sum = (double *)(m.heap + j->width);
    m.weight = (float *)(m.block_sum + blocks_of(j->width));
    return m;
}

/* ---- the best of a row ---- */

/* The highest logit, the first where several are; NaN where there is one. */
static float best_of(const float *x, size_t n, int64_t *token)
{
    vf best = vset(-__builtin_inff());
    vi where = {0}, lane, nan = {0};
    for (int i = 0; i < VL; i++)
        lane[i] = i;
    const vi step = lane - lane + VL;
    where = where - 1;
    for (size_t i = 0; i < n; i += VL, lane += step) {
        vf part = vpart(x + i, n - i);
        if (n - i < VL)
            part = vwithin(part, 0, (int32_t)(n - i), vset(-__builtin_inff()));
        const vi better = part > best;
        nan |= part != part;
        best = vselect(better, part, best);
        where = (lane & better) | (where & ~better);
    }
    float top = best[0];
    int64_t at = where[0];
    for (int i = 1; i < VL; i++)
        if (best[i] > top || (best[i] == top && where[i] >= 0 && (at < 0 || where[i] < at))) {
            top = best[i];
            at = where[i];
        }
    for (int i = 0; i < VL; i++)
        if (nan[i])
            top = __builtin_nanf("");
    *token = at < 0 ? 0 : at;
    return top;
}

static void work_best(void *data, int part, int parts)
{
    const job *j = data;
    for (size_t i = (size_t)part; i < j->count; i += (size_t)parts)
        j->best[i] = best_of(j->logits + i * j->stride, j->width, j->tokens + i);
}

/* ---- weights ---- */

INLINE vf weight_at(const float *x, size_t i, size_t n, vf best, vf factor)
{
    const vf part = vexp((vpart(x + i, n - i) - best) * factor);
    return n - i < VL ? vwithin(part, 0, (int32_t)(n - i), vset(0.0f)) : part;
}

/* The sum of all weights, block by block; `weight` may be NULL. */
static double weigh(const float *x, size_t n, float best, float temperature, float *weight, double *block_sum)
{
    const vf top = vset(best), factor = vset(1.0f / temperature);
    double total = 0.0;
    for (size_t block = 0; block * BLOCK < n; block++) {
        const size_t end = smin(n, (block + 1) * BLOCK);
        vf sum = vset(0.0f);
        for (size_t i = block * BLOCK; i < end; i += VL) {
            const vf part = weight_at(x, i, n, top, factor);
            sum += part;
            if (weight)
                vstore(weight + i, part);
        }
        block_sum[block] = (double)hsum(sum);
        total += block_sum[block];
    }
    return total;
}

/* ---- drawing from all of a row ---- */

static int64_t draw_plainly(const draw *d, size_t n, const memory *m)
{
    const double total = weigh(d->logits, n, d->best, d->temperature, m->weight, m->block_sum);
    const double target = d->uniform * total;
    double before = 0.0;
    size_t block = 0;
    while (block + 1 < blocks_of(n) && before + m->block_sum[block] <= target)
        before += m->block_sum[block++];
    /* Rounding may leave the block a little short of its sum; then its last token of any weight is meant. */
    int64_t last = -1;
    for (size_t i = block * BLOCK; i < smin(n, (block + 1) * BLOCK); i++) {
        if (m->weight[i] <= 0.0f)
            continue;
        last = (int64_t)i;
        before += (double)m->weight[i];
        if (before > target)
            return last;
    }
    for (size_t i = block * BLOCK; last < 0 && i-- > 0;)
        if (m->weight[i] > 0.0f)
            last = (int64_t)i;
    return last < 0 ? 0 : last;
}

/* ---- drawing from the likeliest ---- */

/* Draws among what top_k, then top_p of what that left, and min_p keep. */
static int64_t draw_narrowly(const draw *d, size_t n, const memory *m)
{
    const double all = weigh(d->logits, n, d->best, d->temperature, m->weight, m->block_sum);
    const size_t top_k = d->top_k > 0 ? smin((size_t)d->top_k, n) : n;
    const int share_of_top_k = d->top_k > 0 && d->top_p < 1.0;
    float depth = FIRST_DEPTH, least = 0.0625f, floor;
    for (double mass;; depth = deeper(depth), least *= 0.25f) {
        floor = d->best - depth * d->temperature;
        const size_t count = count_from(d->logits, m->weight, n, floor, &mass);
        const int top_p_done = d->top_k <= 0 && d->top_p < 1.0 && mass > d->top_p * all * (1.0 + 1e-5);
        const int min_p_done = !share_of_top_k && (double)least * 1.001 < d->min_p;
        if (count >= top_k || top_p_done || min_p_done || depth == __builtin_inff())
            break;
    }
    const size_t count = gather(d->logits, n, floor, m->heap), most = smin(top_k, count);
    const uint64_t *const end = m->heap + count; /* the i-th likeliest comes to lie at end[-1 - i] */
    double total = all, kept = 0.0;
    size_t taken = 0, keep = 0;
    if (share_of_top_k)
        for (total = 0.0; taken < most; taken++)
            total += (double)m->weight[take(m->heap, count - taken)];
    for (; keep < most; keep++) {
        if (keep == taken) {
            take(m->heap, count - taken);
            taken++;
        }
        const double weight = (double)m->weight[token_of(*(end - 1 - keep))];
        if ((d->top_p < 1.0 && kept >= d->top_p * total) || weight < d->min_p || weight == 0.0)
            break;
        kept += weight;
    }
    const double target = d->uniform * kept;
    double before = 0.0;
    size_t i = 0;
    for (; i + 1 < keep; i++) {
        before += (double)m->weight[token_of(*(end - 1 - i))];
        if (before > target)
            break;
    }
    return (int64_t)token_of(*(end - 1 - i));
}

static void work_draw(void *data, int part, int parts)
{
    const job *j = data;
    const memory m = carve(j, part);
    for (size_t i = (size_t)part; i < j->count; i += (size_t)parts) {
        draw *d = j->draws + i;
        const int narrow = d->top_k > 0 || d->top_p < 1.0 || d->min_p > 0.0;
        d->token = narrow ? draw_narrowly(d, j->width, &m) : draw_plainly(d, j->width, &m);
    }
}

/* ---- reports ---- */

static void work_top(void *data, int part, int parts)
{
    const job *j = data;
    const memory m = carve(j, part);
    for (size_t i = (size_t)part; i < j->count; i += (size_t)parts) {
        const float *x = j->logits + (size_t)j->picked[i] * j->stride;
        int64_t token;
        j->best[i] = best_of(x, j->width, &token);
        j->sums[i] = weigh(x, j->width, j->best[i], 1.0f, m.weight, m.block_sum);
        if (j->top == 0)
            continue;
        float depth = FIRST_DEPTH;
        double mass;
        while (count_from(x, m.weight, j->width, j->best[i] - depth, &mass) < j->top && depth < __builtin_inff())
            depth = deeper(depth);
        const size_t count = gather(x, j->width, j->best[i] - depth, m.heap);
        for (size_t k = 0; k < j->top; k++) {
            /* A row that holds NaN has fewer entries than it has tokens. */
            const size_t at = k < count ? take(m.heap, count - k) : k;
            j->tokens[i * j->top + k] = (int64_t)at;
            j->values[i * j->top + k] = x[at];
        }
    }
}

/* ---- entries ---- */

static int parts_for(const job *j, int64_t threads)
{
    return j->count * j->width < SHARE_FROM ? 1 : (int)smin(j->count, (size_t)threads);
}

/* Floats of scratch that peqa_draw and peqa_top need. */
EXPORT int64_t peqa_sampling_scratch(int64_t threads, int64_t width)
{
    return threads * (int64_t)floats_per_part((size_t)width) + 16;
}

/* best [rows] and token [rows] of logits [rows, stride >= width]. */
EXPORT void peqa_row_best(peqa_pool *pool, int64_t threads, const float *logits, int64_t stride, int64_t rows,
                          int64_t width, float *best, int64_t *tokens)
{
    job j = {.logits = logits, .best = best, .tokens = tokens};
    j.stride = (size_t)stride;
    j.count = (size_t)rows;
    j.width = (size_t)width;
    pool_run(pool, parts_for(&j, threads), work_best, &j);
}

/* Fills in the token of each draw from a row of `width` logits. */
EXPORT void peqa_draw(peqa_pool *pool, int64_t threads, float *scratch, draw *draws, int64_t count, int64_t width)
{
    job j = {.draws = draws, .scratch = scratch};
    j.count = (size_t)count;
    j.width = (size_t)width;
    pool_run(pool, parts_for(&j, threads), work_draw, &j);
}

/* For each picked row its best logit, the sum of exp(logit - best), and its `top` highest logits in falling order. */
EXPORT void peqa_top(peqa_pool *pool, int64_t threads, float *scratch, const float *logits, int64_t stride,
                     const int64_t *picked, int64_t count, int64_t width, int64_t top, float *best, double *sums,
                     int64_t *tokens, float *values)
{
    job j = {.logits = logits, .picked = picked, .best = best, .tokens = tokens, .values = values, .sums = sums};
    j.scratch = scratch;
    j.stride = (size_t)stride;
    j.count = (size_t)count;
    j.width = (size_t)width;
    j.top = (size_t)top;
    pool_run(pool, parts_for(&j, threads), work_top, &j);
}
