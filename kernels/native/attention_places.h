/* The keys and values of a chunk of positions: where they lie, and in which order attention reads them. */
#ifndef PEQA_ATTENTION_PLACES_H
#define PEQA_ATTENTION_PLACES_H

#include "paged_attention.h"

typedef struct {
    const float **query; /* [rows], each [d] */
    float *keys;         /* [d][CHUNK], transposed */
    float *score;        /* [rows][CHUNK] */
    float *out;          /* [rows][d_v] */
    float *sum;          /* [rows][VL] */
    float *top;          /* [rows] */
    float *shrink;       /* [rows] */
    float *nothing;      /* [d] zeros */
} item_memory;

typedef struct {
    size_t sequence, kv_head, first, queries; /* first: index within the sequence's new tokens */
    size_t rows;                              /* queries x heads of the group; row = query x group + head */
    int64_t position;                         /* of the first query */
} item;

/* Where the keys and values of one chunk lie. Places that the chunk does not have repeat one that it has, or are zeros. */
typedef struct {
    const char *lanes[CHUNK / VL]; /* VL positions' keys each, one behind the other; `feature` bytes to the next feature */
    const char *key[CHUNK];        /* of each position, where they are not ready in lanes */
    const char *value[CHUNK];      /* value[i] belongs to offset from + i */
    size_t feature;
    int32_t from, to; /* offsets in the chunk that some row of the item sees */
} places;

INLINE size_t vectors_of(const places *p) { return ((size_t)p->to + VL - 1) / VL; }
INLINE size_t values_of(const places *p) { return (size_t)(p->to - p->from); }

/* Whether VL positions' keys lie ready in a block. */
INLINE int in_lanes(const attention *a) { return a->at.key_token == a->at.number && a->block_size % VL == 0; }

static void locate(const attention *a, const item *it, const item_memory *m, int64_t start, int64_t begin, int64_t end,
                   places *p)
{
    const int32_t *table = a->block_tables + it->sequence * a->table_stride;
    const int ready = in_lanes(a);
    const size_t from = begin > start ? (size_t)(begin - start) : 0;
    const size_t to = end < start + CHUNK ? (size_t)(end - start) : CHUNK;
    p->from = (int32_t)from;
    p->to = (int32_t)to;
    p->feature = ready ? a->at.key_feature : CHUNK * sizeof(float);
    const uint32_t slot = (uint32_t)start + (uint32_t)from, block_size = (uint32_t)a->block_size;
    size_t block = slot / block_size, offset = slot % block_size;
    for (size_t i = from, stop; i < to; i = stop, block++, offset = 0) {
        const char *keys = a->keys + (size_t)table[block] * a->at.key_block + it->kv_head * a->at.key_head;
        const char *values = a->values + (size_t)table[block] * a->at.value_block + it->kv_head * a->at.value_head;
        stop = smin(to, i + block_size - offset);
        for (size_t j = i; j < stop; j++)
            p->value[j - from] = values + (offset + j - i) * a->at.value_token;
        if (ready)
            for (size_t j = i / VL * VL; j < stop; j += VL)
                p->lanes[j / VL] = keys + (offset + j - i) * a->at.number;
        else
            for (size_t j = i; j < stop; j++)
                p->key[j] = keys + (offset + j - i) * a->at.key_token;
    }
    for (size_t i = to - from; i < CHUNK; i++)
        p->value[i] = p->value[0];
    for (size_t v = 0; v < CHUNK / VL; v++)
        if (!ready)
            p->lanes[v] = (const char *)(m->keys + v * VL);
        else if (v < from / VL || v >= vectors_of(p))
            p->lanes[v] = p->lanes[from / VL];
    if (!ready)
        for (size_t i = 0; i < CHUNK; i++)
            if (i < from || i >= to)
                p->key[i] = (const char *)m->nothing;
}

/* Asks for what lies there: keys that are ready from vector `vector` on, values from the i-th on. */
static void fetch(const attention *a, const places *p, size_t vector, size_t i)
{
    if (in_lanes(a))
        for (; vector < vectors_of(p); vector++)
            for (size_t byte = 0; byte < a->d * p->feature; byte += p->feature < LINE ? LINE : p->feature)
                __builtin_prefetch(p->lanes[vector] + byte);
    for (; i < values_of(p); i++)
        for (size_t byte = 0; byte < a->d_v * a->at.number; byte += LINE)
            __builtin_prefetch(p->value[i] + byte);
}

/* Lays the chunk's keys out in lanes, as floats, where the cache does not have them so. */
static void turn_keys(const attention *a, const item_memory *m, const places *p)
{
    if (in_lanes(a))
        return;
    for (int32_t i = 0; i < p->to; i += VL)
        if (!a->half && a->at.key_feature == sizeof(float))
            transpose_rows((const float *const *)(p->key + i), a->d, m->keys + i, CHUNK);
        else
            for (int32_t r = i; r < i + VL; r++)
                for (size_t f = 0; f < a->d; f++) {
                    const char *key = p->key[r] + f * a->at.key_feature;
                    m->keys[f * CHUNK + (size_t)r] = r < p->from || r >= p->to ? 0.0f
                                                     : a->half                  ? hscalar(*(const uint16_t *)key)
                                                                                : *(const float *)key;
                }
}

#endif
