/* What attention spends its time on, in register tiles: scores of queries and keys, and weighted sums of values. */
#ifndef PEQA_ATTENTION_TILES_H
#define PEQA_ATTENTION_TILES_H

#include "attention_places.h"

/* Vectors of a register tile beside its 6 rows. */
#if VL == 16 || defined(__aarch64__)
#define SCORE_V 4
#define VALUE_V 4
#else
#define SCORE_V 2
#define VALUE_V 2
#endif

/* Rows of block `block` when `rows` are dealt evenly to blocks of at most BLOCK_ROWS. */
INLINE size_t blocks_of(size_t rows) { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }
INLINE size_t start_of(size_t block, size_t rows)
{
    return block ? (uint32_t)(block * rows) / (uint32_t)blocks_of(rows) : 0;
}

/* ---- scores ---- */

/* VL numbers of a cache. */
INLINE vf cached(const int half, const char *p) { return half ? hload((const uint16_t *)p) : vload((const float *)p); }

INLINE vf cached_part(const int half, const char *p, size_t n)
{
    return half ? hpart((const uint16_t *)p, n) : vpart((const float *)p, n);
}

/* R rows against V vectors of positions; keys[v] + i * feature: feature i of the v-th. `next`, where it is not NULL,
 * has the places that are read next: a few of their lines are asked for beside every feature, because many at once
 * would wait for each other. */
INLINE void score_tile(const int half, const int R, const int V, const size_t d, const char *const *keys,
                       const char *const *next, const size_t feature, const float *const *q, float *score)
{
    const char *key[SCORE_V], *soon[SCORE_V];
    const float *query[BLOCK_ROWS];
    vf acc[BLOCK_ROWS][SCORE_V];
    UNROLL for (int v = 0; v < V; v++) key[v] = keys[v];
    if (next)
        UNROLL for (int v = 0; v < V; v++) soon[v] = next[v];
    UNROLL for (int r = 0; r < R; r++) query[r] = q[r];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) acc[r][v] = vset(0.0f);
    for (size_t i = 0, at = 0; i < d; i++, at += feature) {
        vf k[SCORE_V];
        UNROLL for (int v = 0; v < V; v++) k[v] = cached(half, key[v] + at);
        if (next && (i % 2 == 0 || feature > LINE / 2))
            UNROLL for (int v = 0; v < V; v++) __builtin_prefetch(soon[v] + at);
        UNROLL for (int r = 0; r < R; r++)
        {
            const vf x = vset(query[r][i]);
            UNROLL for (int v = 0; v < V; v++) acc[r][v] = vfma(x, k[v], acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) vstore(score + (size_t)r * CHUNK + v * VL, acc[r][v]);
}

#define SCORES(name, half, ahead, R)                                                                                   \
    static void name##_##R(const size_t d, const char *const *keys, const char *const *next, const size_t feature,     \
                           const float *const *q, float *score, size_t vectors)                                        \
    {                                                                                                                  \
        size_t v = 0;                                                                                                  \
        for (; v + SCORE_V <= vectors; v += SCORE_V)                                                                   \
            score_tile(half, R, SCORE_V, d, keys + v, ahead ? next + v : 0, feature, q, score + v * VL);               \
        for (; v + 2 <= vectors; v += 2)                                                                               \
            score_tile(half, R, 2, d, keys + v, ahead ? next + v : 0, feature, q, score + v * VL);                     \
        if (v < vectors)                                                                                               \
            score_tile(half, R, 1, d, keys + v, ahead ? next + v : 0, feature, q, score + v * VL);                     \
    }
#define EVERY(make, name, half, ahead)                                                                                 \
    make(name, half, ahead, 1) make(name, half, ahead, 2) make(name, half, ahead, 3) make(name, half, ahead, 4)        \
        make(name, half, ahead, 5) make(name, half, ahead, 6)
#define ALL(name) {0, name##_1, name##_2, name##_3, name##_4, name##_5, name##_6}
EVERY(SCORES, scores, 0, 0)
EVERY(SCORES, scores_ahead, 0, 1)
#if HALVES
EVERY(SCORES, half_scores, 1, 0)
EVERY(SCORES, half_scores_ahead, 1, 1)
#endif

/* q k for the chunk's positions up to `to`, rounded up to whole vectors. */
static void scores(const attention *a, const item *it, const item_memory *m, const places *p, const places *next)
{
    typedef void (*run)(size_t, const char *const *, const char *const *, size_t, const float *const *, float *,
                        size_t);
    static const run table[1 + HALVES][2][BLOCK_ROWS + 1] = {
        {ALL(scores), ALL(scores_ahead)},
#if HALVES
        {ALL(half_scores), ALL(half_scores_ahead)},
#endif
    };
    const int half = a->half && in_lanes(a); /* turned keys are floats */
    for (size_t block = 0; block < blocks_of(it->rows); block++) {
        const size_t first = start_of(block, it->rows), n = start_of(block + 1, it->rows) - first;
        table[half][next != 0][n](a->d, p->lanes, next ? next->lanes : 0, p->feature, m->query + first,
                                  m->score + first * CHUNK, vectors_of(p));
    }
}

/* ---- values ---- */

/* R rows of the output, V vectors of its features, over `n` positions. `features` < V x VL only where V is 1. `next`
 * as in `score_tile`, as many as `n`. */
INLINE void value_tile(const int half, const int R, const int V, const char *const *value, const char *const *next,
                       size_t feature, size_t features, size_t n, const float *weight, const float *shrink, float *out,
                       size_t d_v)
{
    const size_t number = half ? sizeof(uint16_t) : sizeof(float);
    const size_t width = V > 1 ? VL : features, at = feature * number;
    vf acc[BLOCK_ROWS][VALUE_V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) acc[r][v] =
            vpart(out + (size_t)r * d_v + v * VL, width) * vset(shrink[r]);
    for (size_t i = 0; i < n; i++) {
        vf x[VALUE_V];
        UNROLL for (int v = 0; v < V; v++) x[v] = cached_part(half, value[i] + at + v * VL * number, width);
        if (next)
            UNROLL for (size_t byte = 0; byte < V * VL * number; byte += LINE) __builtin_prefetch(next[i] + at + byte);
        UNROLL for (int r = 0; r < R; r++)
        {
            const vf w = vset(weight[(size_t)r * CHUNK + i]);
            UNROLL for (int v = 0; v < V; v++) acc[r][v] = vfma(w, x[v], acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) vput(out + (size_t)r * d_v + v * VL, acc[r][v], width);
}

#define VALUES(name, half, ahead, R)                                                                                   \
    static void name##_##R(const char *const *value, const char *const *next, size_t n, const float *weight,           \
                           const float *shrink, float *out, size_t d_v)                                                \
    {                                                                                                                  \
        size_t f = 0;                                                                                                  \
        for (; f + VALUE_V * VL <= d_v; f += VALUE_V * VL)                                                             \
            value_tile(half, R, VALUE_V, value, ahead ? next : 0, f, VL, n, weight, shrink, out + f, d_v);             \
        for (; f < d_v; f += VL)                                                                                       \
            value_tile(half, R, 1, value, ahead ? next : 0, f, smin(VL, d_v - f), n, weight, shrink, out + f, d_v);    \
    }
EVERY(VALUES, values, 0, 0)
EVERY(VALUES, values_ahead, 0, 1)
#if HALVES
EVERY(VALUES, half_values, 1, 0)
EVERY(VALUES, half_values_ahead, 1, 1)
#endif

/* Adds the values of the chunk. */
static void values(const attention *a, const item *it, const item_memory *m, const places *p, const places *next)
{
    typedef void (*run)(const char *const *, const char *const *, size_t, const float *, const float *, float *, size_t);
    static const run table[1 + HALVES][2][BLOCK_ROWS + 1] = {
        {ALL(values), ALL(values_ahead)},
#if HALVES
        {ALL(half_values), ALL(half_values_ahead)},
#endif
    };
    for (size_t block = 0; block < blocks_of(it->rows); block++) {
        const size_t first = start_of(block, it->rows), n = start_of(block + 1, it->rows) - first;
        table[a->half][next != 0][n](p->value, next ? next->value : 0, values_of(p),
                                     m->score + first * CHUNK + p->from, m->shrink + first, m->out + first * a->d_v,
                                     a->d_v);
    }
}

#endif
