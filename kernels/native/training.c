/* What training does beside products of matrices, in one pass over memory where torch makes several.
 *
 * A result depends on its own row or column alone, added up in an order that the shapes fix: no number of threads
 * changes a bit.
 */
#include "brain_floats.h"
#include "elementwise.h"
#include "pool.h"
#include "vec_math.h"

/* ---- sums over the rows ---- */

#define SLICE 64    /* columns that go to a thread together */
#define COLUMNS 512 /* whose sums are in work at a time */
#define ROWS 64     /* that are added up by themselves first, so that an error does not grow with their number */

typedef struct {
    const void *a, *b; /* [rows, columns] */
    float *sums;       /* [columns] */
    size_t rows, columns;
    int64_t halves; /* a and b are bfloat16, else float32 */
} products;

INLINE vf number(const void *from, size_t at, size_t n, const int halves)
{
    return halves ? bpart((const uint16_t *)from + at, n) : vpart((const float *)from + at, n);
}

INLINE void put_number(void *to, size_t at, vf v, size_t n, const int halves)
{
    if (halves)
        bput((uint16_t *)to + at, v, n);
    else
        vput((float *)to + at, v, n);
}

INLINE void sum_columns(const products *p, size_t first, size_t count, const int halves)
{
    float some[COLUMNS], total[COLUMNS];
    for (size_t i = 0; i < count; i += VL)
        vstore(total + i, vset(0.0f));
    for (size_t row = 0; row < p->rows; row += ROWS) {
        const size_t end = smin(p->rows, row + ROWS);
        for (size_t i = 0; i < count; i += VL)
            vstore(some + i, vset(0.0f));
        size_t r = row;
        for (; r + 4 <= end; r += 4)
            for (size_t i = 0; i < count; i += VL) {
                const size_t n = count - i;
                vf sum = vload(some + i);
                UNROLL for (size_t k = 0; k < 4; k++)
                {
                    const size_t at = (r + k) * p->columns + first + i;
                    sum = vfma(number(p->a, at, n, halves), number(p->b, at, n, halves), sum);
                }
                vstore(some + i, sum);
            }
        for (; r < end; r++)
            for (size_t i = 0; i < count; i += VL) {
                const size_t n = count - i, at = r * p->columns + first + i;
                const vf a = number(p->a, at, n, halves), b = number(p->b, at, n, halves);
                vstore(some + i, vfma(a, b, vload(some + i)));
            }
        for (size_t i = 0; i < count; i += VL)
            vstore(total + i, vload(total + i) + vload(some + i));
    }
    for (size_t i = 0; i < count; i += VL)
        vput(p->sums + first + i, vload(total + i), count - i);
}

static void work_columns(void *data, int part, int parts)
{
    const products *p = data;
    const size_t slices = (p->columns + SLICE - 1) / SLICE;
    const size_t end = smin(p->columns, slices * (size_t)(part + 1) / (size_t)parts * SLICE);
    for (size_t first = slices * (size_t)part / (size_t)parts * SLICE; first < end; first += COLUMNS)
        if (p->halves)
            sum_columns(p, first, smin(COLUMNS, end - first), 1);
        else
            sum_columns(p, first, smin(COLUMNS, end - first), 0);
}

/* sums[n] = sum over m of a[m, n] * b[m, n] */
EXPORT void peqa_column_dot(peqa_pool *pool, int64_t threads, const void *a, const void *b, int64_t rows,
                            int64_t columns, int64_t halves, float *sums)
{
    products p = {a, b, sums, (size_t)rows, (size_t)columns, halves};
    pool_run(pool, (int)threads, work_columns, &p);
}

/* ---- attention ---- */

#define UNSEEN -1e30f /* not infinite: a query that sees nothing takes the mean of all */

typedef struct {
    float *scores;       /* [heads, queries of a head, keys]; becomes their exponentials */
    const uint8_t *seen; /* [masks, tokens, keys], 1 or 0; NULL: a token sees itself and those before it */
    uint16_t *weights;   /* bfloat16 [heads, queries, keys] */
    uint16_t *slopes;    /* the same, the gradient by the weights; becomes that by the products; NULL: not wanted */
    int64_t heads, queries, tokens, keys; /* of a head: the tokens of its first query head, of its second, ... */
    int64_t masks, first, heads_each;     /* head h has mask (first + h) / heads_each, or the only one */
    float scale;
} attention;

/* The keys from..to that one query sees, and whether all of them. */
typedef struct {
    size_t from, to;
    int all;
} view;

static view view_of(const uint8_t *seen, size_t keys)
{
    size_t from = 0, to = keys, count = 0;
    while (from < to && !seen[from])
        from++;
    while (to > from && !seen[to - 1])
        to--;
    for (size_t i = from; i < to; i++)
        count += seen[i];
    return (view){from, to, count == to - from};
}

/* x = exp(scale * x - the largest of them); their sum. `seen`: others count as UNSEEN; NULL: all are seen. */
INLINE float exponentials(float *x, size_t n, float scale, const uint8_t *seen)
{
    const vf factor = vset(scale);
    vf top = vset(-__builtin_inff()), sum = vset(0.0f);
    if (seen)
        for (size_t i = 0; i < n; i++)
            x[i] = seen[i] ? x[i] : UNSEEN / scale;
    for (size_t i = 0; i < n; i += VL) {
        const vf part = vpart(x + i, n - i) * factor;
        top = vmax(top, n - i < VL ? vwithin(part, 0, (int32_t)(n - i), top) : part);
    }
    const vf best = vset(hmax(top));
    for (size_t i = 0; i < n; i += VL) {
        const vf part = vexp(vpart(x + i, n - i) * factor - best);
        vput(x + i, part, n - i);
        sum += n - i < VL ? vwithin(part, 0, (int32_t)(n - i), vset(0.0f)) : part;
    }
    return hsum(sum);
}

INLINE void clear(uint16_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++)
        p[i] = 0;
}

static void attend(const attention *a, size_t row)
{
    const size_t keys = (size_t)a->keys, token = row % (size_t)a->queries % (size_t)a->tokens;
    float *x = a->scores + row * keys;
    uint16_t *weights = a->weights + row * keys, *slopes = a->slopes ? a->slopes + row * keys : 0;
    view see = {0, smin(token + 1, keys), 1};
    const uint8_t *seen = 0;
    if (a->seen) {
        const size_t head = row / (size_t)a->queries;
        const size_t mask = a->masks > 1 ? ((size_t)a->first + head) / (size_t)a->heads_each : 0;
        seen = a->seen + (mask * (size_t)a->tokens + token) * keys;
        see = view_of(seen, keys);
        if (see.from == see.to) {
            see = (view){0, keys, 1};
            for (size_t i = 0; i < keys; i++)
                x[i] = 0.0f;
        }
    }
    const size_t n = see.to - see.from;
    x += see.from;
    const vf share = vset(1.0f / exponentials(x, n, a->scale, see.all ? 0 : seen + see.from));
    clear(weights, see.from);
    clear(weights + see.to, keys - see.to);
    vf sum = vset(0.0f);
    for (size_t i = 0; i < n; i += VL) {
        const vf part = vpart(x + i, n - i) * share;
        bput(weights + see.from + i, part, n - i);
        if (slopes)
            sum = vfma(part, bpart(slopes + see.from + i, n - i), sum);
    }
    if (!slopes)
        return;
    const vf mean = vset(hsum(sum)), factor = share * vset(a->scale);
    clear(slopes, see.from);
    clear(slopes + see.to, keys - see.to);
    for (size_t i = 0; i < n; i += VL) {
        uint16_t *slope = slopes + see.from + i;
        bput(slope, vpart(x + i, n - i) * factor * (bpart(slope, n - i) - mean), n - i);
    }
}

static void work_attend(void *data, int part, int parts)
{
    const attention *a = data;
    const size_t rows = (size_t)(a->heads * a->queries);
    for (size_t row = rows * (size_t)part / (size_t)parts; row < rows * (size_t)(part + 1) / (size_t)parts; row++)
        attend(a, row);
}

/* The weights of scaled, masked scores, and with `slopes` their softmax's way back. */
EXPORT void peqa_attention_weights(peqa_pool *pool, int64_t threads, float *scores, const uint8_t *seen,
                                   uint16_t *weights, uint16_t *slopes, int64_t heads, int64_t queries,
                                   int64_t tokens, int64_t keys, int64_t masks, int64_t first, int64_t heads_each,
                                   float scale)
{
    attention a = {scores, seen, weights, slopes, heads, queries, tokens, keys, masks, first, heads_each, scale};
    pool_run(pool, (int)(threads > 1 ? 4 * threads : 1), work_attend, &a); /* rows are of unlike length */
}

/* ---- the loss ---- */

#define LOGITS 256 /* whose sum is a float's: beside one that is likely, the others' exponentials are beyond its digits */

typedef struct {
    const void *logits; /* [rows, width] */
    const int64_t *targets;
    void *slopes;       /* like the logits: probabilities, less one at the target; may be the logits; NULL: not wanted */
    float *best;        /* [rows]: the largest logit */
    double *sums;       /* [rows]: what the exponentials of all distances to it add up to */
    float *scratch;     /* [parts, width] */
    size_t rows, width;
    int64_t halves; /* logits and slopes are bfloat16, else float32 */
} losses;

INLINE void row_loss(const losses *l, size_t row, float *some, const int halves)
{
    const size_t width = l->width, from = row * width;
    vf top = vset(-__builtin_inff());
    for (size_t i = 0; i < width; i += VL) {
        const size_t n = width - i;
        const vf part = number(l->logits, from + i, n, halves);
        top = vmax(top, n < VL ? vwithin(part, 0, (int32_t)n, top) : part);
    }
    const vf best = vset(hmax(top));
    double total = 0.0;
    for (size_t block = 0; block < width; block += LOGITS) {
        vf sum = vset(0.0f);
        for (size_t i = block; i < smin(width, block + LOGITS); i += VL) {
            const size_t n = width - i;
            const vf part = vexp(number(l->logits, from + i, n, halves) - best);
            vput(some + i, part, n);
            sum += n < VL ? vwithin(part, 0, (int32_t)n, vset(0.0f)) : part;
        }
        total += (double)hsum(sum);
    }
    l->best[row] = best[0];
    l->sums[row] = total;
    if (!l->slopes)
        return;
    const vf share = vset((float)(1.0 / total));
    some[l->targets[row]] -= (float)total;
    for (size_t i = 0; i < width; i += VL) {
        const vf part = vpart(some + i, width - i) * share;
        put_number(l->slopes, from + i, part, width - i, halves);
    }
}

static void work_losses(void *data, int part, int parts)
{
    const losses *l = data;
    float *some = l->scratch + (size_t)part * l->width;
    for (size_t row = l->rows * (size_t)part / (size_t)parts; row < l->rows * (size_t)(part + 1) / (size_t)parts; row++)
        if (l->halves)
            row_loss(l, row, some, 1);
        else
            row_loss(l, row, some, 0);
}

/* What the cross-entropy of each row is made of, and its gradient. Targets are within the width; scratch has `threads`
 * rows of it. */
EXPORT void peqa_losses(peqa_pool *pool, int64_t threads, float *scratch, const void *logits, const int64_t *targets,
                        void *slopes, int64_t rows, int64_t width, int64_t halves, float *best,
                        double *sums)
{
    losses l = {logits, targets, slopes, best, sums, scratch, (size_t)rows, (size_t)width, halves};
    pool_run(pool, (int)threads, work_losses, &l);
}

/* ---- the gate of a feed-forward block ---- */

#define NUMBERS 4096 /* that go to a thread together */

typedef struct {
    const void *gate, *up;
    const void *slope;         /* the gradient by the product; NULL: the way there */
    void *out, *back_up;       /* the product; on the way back the gradients by gate and up */
    size_t count;
    int64_t halves; /* all are bfloat16, else float32 */
} gates;

INLINE void gate_numbers(const gates *g, size_t from, size_t to, const int halves)
{
    const vf one = vset(1.0f), top = vset(88.0f);
    for (size_t i = from; i < to; i += VL) {
        const size_t n = to - i;
        const vf x = number(g->gate, i, n, halves), up = number(g->up, i, n, halves), minus = -x;
        const vi gone = minus > top; /* NaN is not */
        const vf sigmoid = vselect(gone, vset(0.0f), one / (one + vexp(vselect(gone, top, minus)))), silu = x * sigmoid;
        if (!g->slope) {
            put_number(g->out, i, silu * up, n, halves);
            continue;
        }
        const vf slope = number(g->slope, i, n, halves);
        put_number(g->out, i, slope * up * vfma(silu, one - sigmoid, sigmoid), n, halves);
        put_number(g->back_up, i, slope * silu, n, halves);
    }
}

static void work_gates(void *data, int part, int parts)
{
    const gates *g = data;
    const size_t blocks = (g->count + NUMBERS - 1) / NUMBERS;
    const size_t from = blocks * (size_t)part / (size_t)parts * NUMBERS;
    const size_t to = smin(g->count, blocks * (size_t)(part + 1) / (size_t)parts * NUMBERS);
    if (g->halves)
        gate_numbers(g, from, to, 1);
    else
        gate_numbers(g, from, to, 0);
}

/* out = silu(gate) * up; with `slope` the gradients by gate (out) and by up (back_up). */
EXPORT void peqa_gate(peqa_pool *pool, int64_t threads, const void *gate, const void *up, const void *slope, void *out,
                      void *back_up, int64_t count, int64_t halves)
{
    gates g = {gate, up, slope, out, back_up, (size_t)count, halves};
    pool_run(pool, (int)threads, work_gates, &g);
}

/* ---- norms ---- */

typedef struct {
    const float *x;      /* [rows, width] */
    const float *weight; /* [width] */
    const float *slope;  /* [rows, width], the gradient by the result; NULL: the way there */
    float *out;          /* the result, or the gradient by x */
    size_t rows, width;
    float eps;
} norms;

/* With y = weight * x * r, r = 1 / sqrt(mean(x^2) + eps): r * weight * slope - x * r^3 * mean(weight * slope * x) */
INLINE void norm_row_back(const float *x, const float *weight, const float *slope, float eps, size_t n, float *to)
{
    vf power = vset(0.0f), sum = vset(0.0f);
    for (size_t i = 0; i < n; i += VL) {
        const vf part = vpart(x + i, n - i);
        power = vfma(part, part, power);
        sum = vfma(vpart(weight + i, n - i) * vpart(slope + i, n - i), part, sum);
    }
    const float r = 1.0f / __builtin_sqrtf(hsum(power) / (float)n + eps);
    const vf factor = vset(r), less = vset(-r * r * r * (hsum(sum) / (float)n));
    for (size_t i = 0; i < n; i += VL) {
        const vf own = vpart(weight + i, n - i) * vpart(slope + i, n - i) * factor;
        vput(to + i, vfma(vpart(x + i, n - i), less, own), n - i);
    }
}

static void work_norms(void *data, int part, int parts)
{
    const norms *m = data;
    for (size_t row = m->rows * (size_t)part / (size_t)parts; row < m->rows * (size_t)(part + 1) / (size_t)parts; row++) {
        const size_t at = row * m->width;
        if (m->slope)
            norm_row_back(m->x + at, m->weight, m->slope + at, m->eps, m->width, m->out + at);
        else
            norm_row(m->x + at, m->weight, m->eps, m->width, m->out + at);
    }
}

/* weight * x / sqrt(mean(x^2) + eps) of each row; with `slope` its gradient by x. */
EXPORT void peqa_norm(peqa_pool *pool, int64_t threads, const float *x, const float *weight, const float *slope,
                      float *out, int64_t rows, int64_t width, float eps)
{
    norms m = {x, weight, slope, out, (size_t)rows, (size_t)width, eps};
    pool_run(pool, (int)threads, work_norms, &m);
}
