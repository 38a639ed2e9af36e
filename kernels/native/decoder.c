/* A whole step of a decoder in one call: embedding, layers, final norm and head, for packed tokens of any sequences.
 *
 * Matmuls and attention are the library's own, so their rows keep their bits whatever else is in the step; what lies
 * between is done row by row. Elementwise work is shared among threads only where it is long enough to pay for that.
 */
#include "decoder.h"
#include "elementwise.h"
#include "kv_write.h"

#define SHARE_FROM ((size_t)16384) /* floats of a stage from which threads share its rows: some 4 us on one core */

int64_t peqa_quant_matmul_scratch(const peqa_weight *w, int64_t rows);
void peqa_quant_matmul(const peqa_weight *w, peqa_pool *pool, int64_t threads, float *scratch, const float *x,
                       int64_t ldx, int64_t rows, float *y, const float *bias, const void *out_scale,
                       const void *in_scale, const void *group_scale, int64_t half_bank, const int32_t *row,
                       const int32_t *group_row);
int64_t peqa_attention_scratch(int64_t threads, int64_t heads, int64_t kv_heads, int64_t d, int64_t d_v);
void peqa_paged_attention(peqa_pool *pool, int64_t threads, float *scratch, float *out, const float *q,
                          int64_t q_token, int64_t q_head, const void *keys, const void *values,
                          int64_t key_block, int64_t value_block, int64_t half, const int32_t *block_tables, int64_t table_stride, const int32_t *query_starts,
                          const int32_t *seq_lens, int64_t seqs, int64_t heads, int64_t kv_heads, int64_t d,
                          int64_t d_v, int64_t block_size, int64_t layout, float scaling, int64_t window,
                          float softcap, const float *sinks);

typedef struct {
    const peqa_decoder *m;
    const decoder_step *s;
    const decoder_layer *layer;
    const float *norm; /* of the stage in work */
    peqa_pool *pool;
    int64_t threads, clock;
    size_t rows;                    /* in work: all tokens, and behind the last attention those that are wanted */
    const int32_t *row, *group_row; /* of the rows in work */
    float *hidden, *normed, *added; /* [rows, hidden] each, the last of a pass */
    float *wide, *narrow;           /* wide_floats() each */
    float *scratch;
    int32_t *picked; /* [2, output_count]: row and group_row of the wanted tokens */
} run;

typedef void (*stage)(void *, int, int);

INLINE int64_t ticks(void)
{
#if defined(__x86_64__)
    return (int64_t)__builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    int64_t now;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(now));
    return now;
#else
    return 0;
#endif
}

static void book(run *r, int kind)
{
    const int64_t now = ticks();
    r->s->ticks[kind] += now - r->clock;
    r->clock = now;
}

INLINE size_t qkv_width(const peqa_decoder *m) { return (size_t)((m->heads + 2 * m->kv_heads) * m->d); }

/* Floats of the two larger arrays of a step: queries, keys and values of all rows, or gates of the rows of one pass. */
static size_t wide_floats(const peqa_decoder *m, size_t rows)
{
    const size_t gate_up = 2 * (size_t)m->intermediate * smin(rows, ROWS_PER_PASS), qkv = qkv_width(m) * rows;
    return gate_up > qkv ? gate_up : qkv;
}

static void over_rows(run *r, size_t width, stage work)
{
    pool_run(r->pool, r->rows * width < SHARE_FROM ? 1 : (int)r->threads, work, r);
}

#define ROWS_OF_PART(r)                                                                                                \
    size_t i = (r)->rows * (size_t)part / (size_t)parts;                                                               \
    i < (r)->rows * (size_t)(part + 1) / (size_t)parts;                                                                \
    i++

/* ---- stages ---- */

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
        embed(&r->m->embedding, (size_t)r->s->ids[i], width, r->hidden + i * width);
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
        float *q = r->wide + i * qkv_width(m), *k = q + heads * d, *v = k + kv_heads * d;
        const size_t angle = (size_t)r->s->positions[i] * (d / 2);
        const int64_t slot = r->s->slots[i];
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
        float *gate = r->wide + i * 2 * width;
        silu_row(gate, gate + width, width, gate);
    }
}

/* ---- a step ---- */

static void multiply(run *r, const decoder_linear *linear, const float *x, int64_t ldx, float *y)
{
    peqa_quant_matmul(linear->weight, r->pool, r->threads, r->scratch, x, ldx, (int64_t)r->rows, y, linear->bias, linear->out_scale, linear->in_scale, linear->group_scale,
                      linear->half_bank, r->row, r->group_row);
}

static void add_and_norm(run *r, const float *norm)
{
    r->norm = norm;
    over_rows(r, (size_t)r->m->hidden, work_add_and_norm);
}

static void attend(run *r)
{
    const peqa_decoder *m = r->m;
    const decoder_step *s = r->s;
    multiply(r, &r->layer->qkv, r->normed, r->m->hidden, r->wide);
    book(r, TICKS_MATMUL);
    over_rows(r, qkv_width(m), work_place);
    book(r, TICKS_ELEMENTWISE);
    if (s->output_count == 0 && r->layer + 1 == m->layers + m->layer_count)
        return; /* the keys and values were all that was wanted */
    peqa_paged_attention(r->pool, r->threads, r->scratch, r->narrow, r->wide, (int64_t)qkv_width(m), m->d,
                         r->layer->keys, r->layer->values, r->layer->key_block, r->layer->value_block,
                         m->half_caches, s->block_tables, s->table_stride, s->query_starts,
                         s->seq_lens, s->sequences, m->heads, m->kv_heads, m->d, m->d, m->block_size, m->layout, m->scaling,
                         r->layer->window, 0.0f, 0);
    book(r, TICKS_ATTENTION);
}

/* Behind the last attention no token reads another one: those whose result nobody wants end here. */
static void keep_outputs(run *r)
{
    const size_t hidden = (size_t)r->m->hidden, attended = (size_t)(r->m->heads * r->m->d);
    const size_t count = (size_t)r->s->output_count;
    for (size_t i = 0; i < count; i++) {
        const size_t token = (size_t)r->s->outputs[i];
        copy_row(r->hidden + token * hidden, hidden, r->normed + i * hidden);
        copy_row(r->narrow + token * attended, attended, r->wide + i * attended);
        if (r->row)
            r->picked[i] = r->row[token];
        if (r->group_row)
            r->picked[count + i] = r->group_row[token];
    }
    float *swap = r->hidden;
    r->hidden = r->normed;
    r->normed = swap;
    swap = r->narrow;
    r->narrow = r->wide;
    r->wide = swap;
    r->row = r->row ? r->picked : 0;
    r->group_row = r->group_row ? r->picked + count : 0;
    r->rows = count;
}

/* Rows from `first` on, `count` of them, become those in work. */
static void take_rows(run *r, const run *all, size_t first, size_t count)
{
    r->rows = count;
    r->hidden = all->hidden + first * (size_t)r->m->hidden;
    r->normed = all->normed + first * (size_t)r->m->hidden;
    r->narrow = all->narrow + first * (size_t)(r->m->heads * r->m->d);
    r->row = all->row ? all->row + first : 0;
    r->group_row = all->group_row ? all->group_row + first : 0;
}

/* What follows attention, a pass of rows after the other: what one stage writes is in the caches for the next. */
static void feed_forward(run *all, const float *next_norm)
{
    const int64_t hidden = all->m->hidden, intermediate = all->m->intermediate;
    run pass = *all, *const r = &pass;
    for (size_t first = 0; first < all->rows; first += ROWS_PER_PASS) {
        take_rows(r, all, first, smin(ROWS_PER_PASS, all->rows - first));
        multiply(r, &r->layer->out, r->narrow, r->m->heads * r->m->d, r->added);
        book(r, TICKS_MATMUL);
        add_and_norm(r, r->layer->mlp_norm);
        book(r, TICKS_ELEMENTWISE);
        multiply(r, &r->layer->gate_up, r->normed, hidden, r->wide);
        book(r, TICKS_MATMUL);
        over_rows(r, 2 * (size_t)intermediate, work_silu);
        book(r, TICKS_ELEMENTWISE);
        multiply(r, &r->layer->down, r->wide, 2 * intermediate, r->added);
        book(r, TICKS_MATMUL);
        add_and_norm(r, next_norm);
        book(r, TICKS_ELEMENTWISE);
    }
    all->clock = r->clock;
}

INLINE size_t whole_lines(size_t floats) { return (floats + 15) / 16 * 16; }

static int64_t scratch_of_ops(const peqa_decoder *m, int64_t threads, int64_t tokens, int64_t output_count)
{
    int64_t most = peqa_attention_scratch(threads, m->heads, m->kv_heads, m->d, m->d);
    for (int64_t i = 0; i < m->layer_count; i++) {
        const decoder_layer *l = m->layers + i;
        const decoder_linear *linears[4] = {&l->qkv, &l->out, &l->gate_up, &l->down};
        for (int j = 0; j < 4; j++) {
            const int64_t need = peqa_quant_matmul_scratch(linears[j]->weight, tokens);
            most = need > most ? need : most;
        }
    }
    const int64_t head = m->head.weight ? peqa_quant_matmul_scratch(m->head.weight, output_count) : 0;
    return head > most ? head : most;
}

/* The first token whose id, position or slot lies outside of the tensors, or the first wanted token that is none; -1. */
EXPORT int64_t peqa_decode_misfit(const peqa_decoder *m, const decoder_step *s)
{
    const int64_t slots = m->blocks * m->block_size;
    for (int64_t i = 0; i < s->tokens; i++)
        if (s->ids[i] < 0 || s->ids[i] >= m->vocab || s->positions[i] < 0 || s->positions[i] >= m->positions ||
            s->slots[i] < -1 || s->slots[i] >= slots)
            return i;
    for (int64_t i = 0; i < s->output_count; i++)
        if (s->outputs[i] < 0 || s->outputs[i] >= s->tokens)
            return s->outputs[i];
    return -1;
}

/* The counter that a step's ticks are counted in. */
EXPORT int64_t peqa_ticks(void) { return ticks(); }

/* Floats of scratch that a step needs. */
EXPORT int64_t peqa_decode_scratch(const peqa_decoder *m, int64_t threads, int64_t tokens, int64_t output_count)
{
    const size_t rows = (size_t)tokens, width = (size_t)m->hidden;
    const size_t hidden = 2 * whole_lines(rows * width) + whole_lines(smin(rows, ROWS_PER_PASS) * width);
    return (int64_t)(hidden + 2 * whole_lines(wide_floats(m, rows)) + 2 * whole_lines((size_t)output_count)) + 16 +
           scratch_of_ops(m, threads, tokens, output_count);
}

/* scratch: see above. Nothing is checked here: peqa_decode_misfit and peqa_attention_misfit do. */
EXPORT void peqa_decode(const peqa_decoder *m, peqa_pool *pool, int64_t threads, float *scratch, const decoder_step *s)
{
    const size_t hidden = whole_lines((size_t)(s->tokens * m->hidden));
    const size_t wide = whole_lines(wide_floats(m, (size_t)s->tokens));
    run r = {.m = m, .s = s, .pool = pool, .threads = threads, .rows = (size_t)s->tokens, .clock = ticks()};
    r.row = s->row;
    r.group_row = s->group_row;
    r.hidden = (float *)(((uintptr_t)scratch + 63) / 64 * 64);
    r.normed = r.hidden + hidden;
    r.added = r.normed + hidden;
    r.wide = r.added + whole_lines(smin(r.rows, ROWS_PER_PASS) * (size_t)m->hidden);
    r.narrow = r.wide + wide;
    r.picked = (int32_t *)(r.narrow + wide);
    r.scratch = r.narrow + wide + 2 * whole_lines((size_t)s->output_count);

    r.norm = m->layers[0].attention_norm;
    over_rows(&r, (size_t)m->hidden, work_embed);
    book(&r, TICKS_ELEMENTWISE);
    for (int64_t i = 0; i < m->layer_count; i++) {
        const int last = i + 1 == m->layer_count;
        r.layer = m->layers + i;
        attend(&r);
        if (last && s->output_count == 0)
            return;
        if (last)
            keep_outputs(&r);
        feed_forward(&r, last ? m->norm : m->layers[i + 1].attention_norm);
    }
    if (m->head.weight)
        multiply(&r, &m->head, r.normed, m->hidden, s->result);
    else
        copy_row(r.normed, r.rows * (size_t)m->hidden, s->result);
    book(&r, TICKS_HEAD);
}
