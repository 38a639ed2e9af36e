/* The keys and values of a chunk of positions: where they lie, and in which order attention reads them. */
#ifndef PEQA_ATTENTION_PLACES_H
#define PEQA_ATTENTION_PLACES_H

#include "paged_attention.h"

typedef struct {
    float *keys;    /* [d][CHUNK], transposed */
    float *query;   /* blocks of rows: [d][rows of the block] */
    float *score;   /* [rows][CHUNK] */
    float *out;     /* [rows][d_v] */
    float *sum;     /* [rows][VL] */
    float *top;     /* [rows] */
    float *shrink;  /* [rows] */
    float *nothing; /* [d] zeros */
} item_memory;

typedef struct {
    size_t sequence, kv_head, first, queries; /* first: index within the sequence's new tokens */
    size_t rows;                              /* queries x heads of the group; row = query x group + head */
    int64_t position;                         /* of the first query */
} item;

/* Where the keys and values of one chunk lie. */
typedef struct {
    const char *lanes[CHUNK / VL]; /* VL positions' keys each, one behind the other; `feature` bytes to the next feature */
    const char *key[CHUNK];        /* of each position, where they are not ready in lanes */
    const char *value[CHUNK];      /* value[i] belongs to offset from + i */
    size_t feature;
    int32_t from, to; /* offsets in the chunk that some row of the item sees */
} places;

/* Whether VL positions' keys lie ready in a block. */
INLINE int in_lanes(const attention *a) { return a->at.key_token == a->at.number && a->block_size % VL == 0; }

static void locate(const attention *a, const item *it, const item_memory *m, int64_t start, int64_t begin, int64_t end,
                   places *p)
{
    const int32_t *table = a->block_tables + it->sequence * a->table_stride;
    const int ready = in_lanes(a);
    p->from = begin > start ? (int32_t)(begin - start) : 0;
    p->to = end < start + CHUNK ? (int32_t)(end - start) : CHUNK;
    p->feature = ready ? a->at.key_feature : CHUNK * sizeof(float);
    size_t slot = (size_t)(start + p->from), block = slot / a->block_size, offset = slot % a->block_size;
    const char *keys = 0, *values = 0;
    for (int32_t i = 0; i < p->from; i++)
        p->key[i] = (const char *)m->nothing;
    for (int32_t i = p->to; i < CHUNK; i++)
        p->key[i] = (const char *)m->nothing;
    for (int32_t i = p->from; i < p->to; i++) {
        if (!keys || offset == a->block_size) {
            if (keys) {
                offset = 0;
                block++;
            }
            keys = a->keys + (size_t)table[block] * a->at.key_block + it->kv_head * a->at.key_head;
            values = a->values + (size_t)table[block] * a->at.value_block + it->kv_head * a->at.value_head;
        }
        const char *value = values + offset * a->at.value_token;
        p->value[i - p->from] = value;
        for (size_t byte = 0; byte < a->d_v * a->at.number; byte += LINE)
            __builtin_prefetch(value + byte);
        if (!ready)
            p->key[i] = keys + offset * a->at.key_token;
        else if (i == p->from || i % VL == 0) {
            const char *lanes = keys + offset / VL * VL * a->at.number;
            p->lanes[i / VL] = lanes;
            for (size_t byte = 0; byte < a->d * p->feature; byte += p->feature < LINE ? LINE : p->feature)
                __builtin_prefetch(lanes + byte);
        }
        offset++;
    }
    for (int32_t v = 0; v < (p->to + VL - 1) / VL; v++)
        if (!ready)
            p->lanes[v] = (const char *)(m->keys + v * VL);
        else if (v < p->from / VL)
            p->lanes[v] = p->lanes[p->from / VL]; /* anything that may be read: nobody sees these */
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
