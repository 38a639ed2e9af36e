/* What a decoder does with rows between its matmuls and attention: embedding, norms, rotary angles, caches, silu. */
#ifndef PEQA_DECODER_STAGES_H
#define PEQA_DECODER_STAGES_H

#include "decoder.h"
#include "elementwise.h"
#include "kv_write.h"

#define SHARE_FROM ((size_t)16384) /* floats of a stage from which threads share its rows: some 4 us on one core */

typedef struct {
    const peqa_decoder *m;
    const decoder_step *s;
    const decoder_layer *layer;
    const float *norm; /* of the stage in work */
    peqa_pool *pool;
    int64_t threads, clock, *ticks;
    size_t first, rows;             /* in work: of all tokens, and behind the last attention of those that are wanted */
    const int32_t *row, *group_row; /* of the rows in work */
    float *hidden, *normed;         /* [rows, hidden] */
    float *qkv, *attended;          /* [rows, qkv_width()], [rows, heads * d] */
    float *added, *gate_up;         /* [rows of a part, hidden], [.., 2 * intermediate] */
    float *scratch;                 /* of the matmul in work */
} run;

typedef void (*stage)(void *, int, int);

INLINE size_t qkv_width(const peqa_decoder *m) { return (size_t)((m->heads + 2 * m->kv_heads) * m->d); }

static void over_rows(run *r, size_t width, stage work)
{
    pool_run(r->pool, r->rows * width < SHARE_FROM ? 1 : (int)r->threads, work, r);
}

#define ROWS_OF_PART(r)                                                                                                \
    size_t i = (r)->rows * (size_t)part / (size_t)parts;                                                               \
    i < (r)->rows * (size_t)(part + 1) / (size_t)parts;                                                                \
    i++

static void embed(const decoder_embedding *e, size_t id, size_t width, float *to)
{
    if (!e->codes) {
        copy_row(e->floats + id * width, width, to);
        return;
    }
    const size_t bits = (size_t)e->bits, groups = (size_t)e->groups, size = width / groups;
    const uint8_t *codes = e->codes + id * ((width * bits + 7) / 8);
    for (size_t g = 0; g < groups; g++) {
        const float scale = e->scales[id * groups + g], zero = e->zeros[id * groups + g];
        if (bits == 8) {
            for (size_t k = g * size; k < (g + 1) * size; k++)
                to[k] = ((float)codes[k] - zero) * scale;
            continue;
        }
        for (size_t k = g * size; k < (g + 1) * size; k++) {
            const size_t at = k * bits;
            unsigned window = codes[at / 8];
            if (at % 8 + bits > 8)
                window |= (unsigned)codes[at / 8 + 1] << 8;
            to[k] = ((float)(window >> at % 8 & ((1u << bits) - 1)) - zero) * scale;
        }
    }
}

static void work_embed(void *data, int part, int parts)
{
    const run *r = data;
    const size_t width = (size_t)r->m->hidden;
    for (ROWS_OF_PART(r)) {
        embed(&r->m->embedding, (size_t)r->s->ids[r->first + i], width, r->hidden + i * width);
        norm_row(r->hidden + i * width, r->norm, r->m->eps, width, r->normed + i * width);
    }
}

/* Queries are turned in place, keys on their way into the cache. */
static void work_place(void *data, int part, int parts)
{
    const run *r = data;
    const peqa_decoder *m = r->m;
    const size_t d = (size_t)m->d, heads = (size_t)m->heads, kv_heads = (size_t)m->kv_heads;
    const size_t size = (size_t)m->block_size;
    const decoder_layer *layer = r->layer;
    const kv_strides at =
        strides_of(m->layout, m->half_caches, layer->key_block, layer->value_block, size, kv_heads, d, d);
    for (ROWS_OF_PART(r)) {
        float *q = r->qkv + i * qkv_width(m), *k = q + heads * d, *v = k + kv_heads * d;
        const size_t angle = (size_t)r->s->positions[r->first + i] * (d / 2);
        const int64_t slot = r->s->slots[r->first + i];
        for (size_t head = 0; head < heads; head++, q += d) {
            if (layer->q_norm)
                norm_row(q, layer->q_norm, m->eps, d, q);
            rotate_row(q, m->cosines + angle, m->sines + angle, d, q);
        }
        if (slot < 0)
            continue;
        const size_t block = (size_t)slot / size, offset = (size_t)slot % size;
        for (size_t head = 0; head < kv_heads; head++, k += d) {
            if (layer->k_norm)
                norm_row(k, layer->k_norm, m->eps, d, k);
            rotate_row(k, m->cosines + angle, m->sines + angle, d, k);
            put_key(m->half_caches, k, d,
                    (char *)layer->keys + block * at.key_block + head * at.key_head + offset * at.key_token,
                    at.key_feature);
            put_value(m->half_caches, v + head * d, d,
                      (char *)layer->values + block * at.value_block + head * at.value_head + offset * at.value_token);
        }
    }
}

static void work_add_and_norm(void *data, int part, int parts)
{
    const run *r = data;
    const size_t width = (size_t)r->m->hidden;
    for (ROWS_OF_PART(r)) {
        add_row(r->hidden + i * width, r->added + i * width, width);
        norm_row(r->hidden + i * width, r->norm, r->m->eps, width, r->normed + i * width);
    }
}

static void work_silu(void *data, int part, int parts)
{
    const run *r = data;
    const size_t width = (size_t)r->m->intermediate;
    for (ROWS_OF_PART(r)) {
        float *gate = r->gate_up + i * 2 * width;
        silu_row(gate, gate + width, width, gate);
    }
}

#endif
