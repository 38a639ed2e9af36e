/* Causal attention of packed queries over keys and values that lie in blocks.
 *
 * A work item is a run of queries of one sequence with all query heads that share one key head. Keys are taken CHUNK
 * positions at a time, chunks starting at multiples of CHUNK. For one query and head everything happens in an order
 * that its own position fixes: a score is one chain over the features; chunk after chunk the running maximum, sum and
 * output are updated; positions it may not see count as exact zeros. So decode and prefill, alone or among others,
 * give the same bits.
 */
#include "attention_places.h"

/* Vectors of a register tile beside its 6 rows. */
#if VL == 16 || defined(__aarch64__)
#define SCORE_V 4
#define VALUE_V 4
#else
#define SCORE_V 2
#define VALUE_V 2
#endif

INLINE size_t group_of(const attention *a) { return a->heads / a->kv_heads; }

static size_t rows_per_item(const attention *a)
{
    const size_t group = group_of(a);
    return group >= ITEM_ROWS ? group : ITEM_ROWS / group * group;
}

static size_t floats_per_thread(const attention *a)
{
    const size_t rows = rows_per_item(a);
    return (a->d + 1) * CHUNK + rows * (a->d + CHUNK + a->d_v + VL + 2) + a->d + 64;
}

static item_memory carve(const attention *a, int thread)
{
    const size_t rows = rows_per_item(a);
    item_memory m;
    m.keys = a->scratch + (size_t)thread * floats_per_thread(a);
    m.query = m.keys + a->d * CHUNK;
    m.score = m.query + rows * a->d;
    m.out = m.score + rows * CHUNK;
    m.sum = m.out + rows * a->d_v;
    m.top = m.sum + rows * VL;
    m.shrink = m.top + rows;
    m.nothing = m.shrink + rows;
    for (size_t i = 0; i < a->d; i++)
        m.nothing[i] = 0.0f;
    return m;
}

/* Rows of block `block` when `rows` are dealt evenly to blocks of at most BLOCK_ROWS. */
INLINE size_t blocks_of(size_t rows) { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }
INLINE size_t start_of(size_t block, size_t rows) { return block * rows / blocks_of(rows); }

static void take_queries(const attention *a, const item *it, item_memory *m)
{
    const size_t group = group_of(a), token = (size_t)a->query_starts[it->sequence] + it->first;
    for (size_t block = 0; block < blocks_of(it->rows); block++) {
        const size_t first = start_of(block, it->rows), n = start_of(block + 1, it->rows) - first;
        for (size_t r = 0; r < n; r++) {
            const size_t row = first + r, head = it->kv_head * group + row % group;
            const float *from = a->q + (token + row / group) * a->q_token + head * a->q_head;
            float *to = m->query + first * a->d + r;
            for (size_t i = 0; i < a->d; i++)
                to[i * n] = from[i];
            m->top[row] = a->sinks ? a->sinks[head] : -__builtin_inff();
            vstore(m->sum + row * VL, vset(0.0f));
            if (a->sinks)
                m->sum[row * VL] = 1.0f;
            for (size_t i = 0; i < a->d_v; i++)
                m->out[row * a->d_v + i] = 0.0f;
        }
    }
}

/* ---- scores ---- */

/* VL numbers of a cache. */
INLINE vf cached(const int half, const char *p) { return half ? hload((const uint16_t *)p) : vload((const float *)p); }

INLINE vf cached_part(const int half, const char *p, size_t n)
{
    return half ? hpart((const uint16_t *)p, n) : vpart((const float *)p, n);
}

/* R rows against V vectors of positions; keys[v] + i * feature: feature i of the v-th. */
INLINE void score_tile(const int half, const int R, const int V, const size_t d, const char *const *keys,
                       const size_t feature, const float *q, float *score)
{
    const char *key[SCORE_V];
    vf acc[BLOCK_ROWS][SCORE_V];
    UNROLL for (int v = 0; v < V; v++) key[v] = keys[v];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) acc[r][v] = vset(0.0f);
    for (size_t i = 0; i < d; i++, q += R) {
        vf k[SCORE_V];
        UNROLL for (int v = 0; v < V; v++)
        {
            k[v] = cached(half, key[v]);
            key[v] += feature;
        }
        UNROLL for (int r = 0; r < R; r++)
        {
            const vf x = vset(q[r]);
            UNROLL for (int v = 0; v < V; v++) acc[r][v] = vfma(x, k[v], acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) vstore(score + (size_t)r * CHUNK + v * VL, acc[r][v]);
}

#define SCORES(name, half, R)                                                                                          \
    static void name##_##R(const size_t d, const char *const *keys, const size_t feature, const float *q,              \
                           float *score, size_t vectors)                                                               \
    {                                                                                                                  \
        for (; vectors >= SCORE_V; vectors -= SCORE_V, keys += SCORE_V, score += SCORE_V * VL)                         \
            score_tile(half, R, SCORE_V, d, keys, feature, q, score);                                                  \
        for (; vectors >= 2; vectors -= 2, keys += 2, score += 2 * VL)                                                 \
            score_tile(half, R, 2, d, keys, feature, q, score);                                                        \
        if (vectors)                                                                                                   \
            score_tile(half, R, 1, d, keys, feature, q, score);                                                        \
    }
#define EVERY(make, name, half)                                                                                        \
    make(name, half, 1) make(name, half, 2) make(name, half, 3) make(name, half, 4) make(name, half, 5)                \
        make(name, half, 6)
#define ALL(name) {0, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6}
EVERY(SCORES, scores, 0)
#if HALVES
EVERY(SCORES, half_scores, 1)
#endif

/* q k for the chunk's positions up to `end`, rounded up to whole vectors. */
static void scores(const attention *a, const item *it, const item_memory *m, const places *p)
{
    typedef void (*run)(size_t, const char *const *, size_t, const float *, float *, size_t);
    static const run table[1 + HALVES][BLOCK_ROWS + 1] = {
        ALL(scores),
#if HALVES
        ALL(half_scores),
#endif
    };
    const int half = a->half && in_lanes(a); /* turned keys are floats */
    for (size_t block = 0; block < blocks_of(it->rows); block++) {
        const size_t first = start_of(block, it->rows), n = start_of(block + 1, it->rows) - first;
        table[half][n](a->d, p->lanes, p->feature, m->query + first * a->d, m->score + first * CHUNK,
                       ((size_t)p->to + VL - 1) / VL);
    }
}

/* ---- softmax ---- */

/* Turns row's scores of the chunk into weights; it sees the offsets from..to of those before `end`. */
static void weigh(const attention *a, const item_memory *m, size_t row, int32_t from, int32_t to, int32_t end)
{
    const int vectors = (end + VL - 1) / VL; /* what lies behind would add exact zeros */
    float *score = m->score + row * CHUNK;
    if (from >= to) {
        for (int i = 0; i < vectors; i++)
            vstore(score + i * VL, vset(0.0f));
        m->shrink[row] = 1.0f;
        return;
    }
    const vf low = vset(-__builtin_inff());
    vf best = low, s[CHUNK / VL];
    for (int i = 0; i < vectors; i++) {
        vf x = vload(score + i * VL) * vset(a->scaling);
        if (a->softcap != 0.0f)
            x = vset(a->softcap) * vtanh(x / vset(a->softcap));
        s[i] = vwithin(x, from - i * VL, to - i * VL, low);
        best = vmax(s[i], best);
    }
    const float before = m->top[row], top = hmax(best) > before ? hmax(best) : before;
    const float shrink = vexp(vset(before - top))[0]; /* exp(-inf) = 0 in the first chunk */
    vf sum = vload(m->sum + row * VL) * vset(shrink);
    for (int i = 0; i < vectors; i++) {
        const vf weight = vexp(s[i] - vset(top));
        sum += weight;
        vstore(score + i * VL, weight);
    }
    vstore(m->sum + row * VL, sum);
    m->top[row] = top;
    m->shrink[row] = shrink;
}

/* ---- values ---- */

/* R rows of the output, V vectors of its features, over `n` positions. `features` < V x VL only where V is 1. */
INLINE void value_tile(const int half, const int R, const int V, const char *const *value, size_t feature,
                       size_t features, size_t n, const float *weight, const float *shrink, float *out, size_t d_v)
{
    const size_t number = half ? sizeof(uint16_t) : sizeof(float);
    const size_t width = V > 1 ? VL : features;
    vf acc[BLOCK_ROWS][VALUE_V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) acc[r][v] =
            vpart(out + (size_t)r * d_v + v * VL, width) * vset(shrink[r]);
    for (size_t i = 0; i < n; i++) {
        vf x[VALUE_V];
        UNROLL for (int v = 0; v < V; v++) x[v] = cached_part(half, value[i] + (feature + v * VL) * number, width);
        UNROLL for (int r = 0; r < R; r++)
        {
            const vf w = vset(weight[(size_t)r * CHUNK + i]);
            UNROLL for (int v = 0; v < V; v++) acc[r][v] = vfma(w, x[v], acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) vput(out + (size_t)r * d_v + v * VL, acc[r][v], width);
}

#define VALUES(name, half, R)                                                                                          \
    static void name##_##R(const char *const *value, size_t n, const float *weight, const float *shrink, float *out,   \
                           size_t d_v)                                                                                 \
    {                                                                                                                  \
        size_t f = 0;                                                                                                  \
        for (; f + VALUE_V * VL <= d_v; f += VALUE_V * VL)                                                             \
            value_tile(half, R, VALUE_V, value, f, VL, n, weight, shrink, out + f, d_v);                               \
        for (; f < d_v; f += VL)                                                                                       \
            value_tile(half, R, 1, value, f, smin(VL, d_v - f), n, weight, shrink, out + f, d_v);                      \
    }
EVERY(VALUES, values, 0)
#if HALVES
EVERY(VALUES, half_values, 1)
#endif

/* Adds the values at chunk offsets from..to; value[i] belongs to offset from + i. */
static void values(const attention *a, const item *it, const item_memory *m, const char *const *value, size_t from,
                   size_t to)
{
    typedef void (*run)(const char *const *, size_t, const float *, const float *, float *, size_t);
    static const run table[1 + HALVES][BLOCK_ROWS + 1] = {
        ALL(values),
#if HALVES
        ALL(half_values),
#endif
    };
    for (size_t block = 0; block < blocks_of(it->rows); block++) {
        const size_t first = start_of(block, it->rows), n = start_of(block + 1, it->rows) - first;
        table[a->half][n](value, to - from, m->score + first * CHUNK + from, m->shrink + first,
                          m->out + first * a->d_v, a->d_v);
    }
}

/* ---- one item ---- */

static void attend(const attention *a, const item *it, item_memory *m)
{
    const size_t group = group_of(a);
    const int64_t end = it->position + (int64_t)it->queries; /* behind the last key that any row sees */
    const int64_t begin = a->window && it->position + 1 > a->window ? it->position + 1 - a->window : 0;
    places two[2];
    int64_t start = begin / CHUNK * CHUNK;
    locate(a, it, m, start, begin, end, &two[0]);
    take_queries(a, it, m);
    for (int turn = 0; start < end; start += CHUNK, turn ^= 1) {
        const places *p = &two[turn];
        if (start + CHUNK < end) /* so its loads run while this chunk is computed */
            locate(a, it, m, start + CHUNK, begin, end, &two[turn ^ 1]);
        turn_keys(a, m, p);
        scores(a, it, m, p);
        for (size_t row = 0; row < it->rows; row++) {
            const int64_t behind = it->position + (int64_t)(row / group) + 1 - start; /* the last offset it sees */
            const int64_t first = a->window ? behind - a->window : p->from;
            weigh(a, m, row, first > p->from ? (int32_t)first : p->from, behind < p->to ? (int32_t)behind : p->to,
                  p->to);
        }
        values(a, it, m, p->value, (size_t)p->from, (size_t)p->to);
    }
    const size_t token = (size_t)a->query_starts[it->sequence] + it->first;
    for (size_t row = 0; row < it->rows; row++) {
        const float sum = hsum(vload(m->sum + row * VL));
        float *to = a->out + ((token + row / group) * a->heads + it->kv_head * group + row % group) * a->d_v;
        for (size_t i = 0; i < a->d_v; i++)
            to[i] = m->out[row * a->d_v + i] / sum;
    }
}

/* ---- threads and entry ---- */

static void work(void *data, int part, int parts)
{
    const attention *a = data;
    const size_t group = group_of(a), queries = rows_per_item(a) / group;
    item_memory m = carve(a, part);
    (void)parts;
    /* Items are dealt as parts ask for them: which part takes one changes nothing in its result. */
    size_t mine = __atomic_fetch_add(a->next, 1, __ATOMIC_RELAXED), index = 0;
    for (size_t s = 0; s < a->seqs; s++) {
        const size_t new = (size_t)(a->query_starts[s + 1] - a->query_starts[s]);
        for (size_t first = 0; first < new; first += queries)
            for (size_t head = 0; head < a->kv_heads; head++, index++) {
                if (index != mine)
                    continue;
                item it = {.sequence = s, .kv_head = head, .first = first, .queries = smin(queries, new - first)};
                it.rows = it.queries * group;
                it.position = (int64_t)a->seq_lens[s] - (int64_t)(new - first);
                attend(a, &it, &m);
                mine = __atomic_fetch_add(a->next, 1, __ATOMIC_RELAXED);
            }
    }
}

/* Floats of scratch that a call needs. */
EXPORT int64_t peqa_attention_scratch(int64_t threads, int64_t heads, int64_t kv_heads, int64_t d, int64_t d_v)
{
    const attention a = {
        .heads = (size_t)heads, .kv_heads = (size_t)kv_heads, .d = (size_t)d, .d_v = (size_t)d_v};
    return threads * (int64_t)floats_per_thread(&a);
}

/* q [tokens, heads, d] with strides q_token and q_head, caches as kv_layout.h has them, of fp16 where `half` (only
 * where peqa_halves), key_block and value_block numbers from block to block; out [tokens, heads, d_v]; window 0: none;
 * softcap 0: none; sinks [heads] or NULL. */
EXPORT void peqa_paged_attention(peqa_pool *pool, int64_t threads, float *scratch, float *out, const float *q,
                                 int64_t q_token, int64_t q_head, const void *keys, const void *values,
                                 int64_t key_block, int64_t value_block, int64_t half, const int32_t *block_tables, int64_t table_stride, const int32_t *query_starts,
                                 const int32_t *seq_lens, int64_t seqs, int64_t heads, int64_t kv_heads, int64_t d,
                                 int64_t d_v, int64_t block_size, int64_t layout, float scaling, int64_t window,
                                 float softcap, const float *sinks)
{
    size_t next = 0;
    attention a = {.scratch = scratch, .out = out, .q = q, .keys = keys, .values = values, .sinks = sinks};
    a.block_tables = block_tables;
    a.query_starts = query_starts;
    a.seq_lens = seq_lens;
    a.q_token = (size_t)q_token;
    a.q_head = (size_t)q_head;
    a.table_stride = (size_t)table_stride;
    a.seqs = (size_t)seqs;
    a.heads = (size_t)heads;
    a.kv_heads = (size_t)kv_heads;
    a.d = (size_t)d;
    a.d_v = (size_t)d_v;
    a.block_size = (size_t)block_size;
    a.scaling = scaling;
    a.softcap = softcap;
    a.window = window;
    a.next = &next;
    a.half = half != 0;
    a.at = strides_of(layout, half, key_block, value_block, a.block_size, a.kv_heads, a.d, a.d_v);
    pool_run(pool, (int)threads, work, &a);
}
