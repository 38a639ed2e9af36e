/* A whole step of a decoder in one call: embedding, layers, final norm and head, for packed tokens of any sequences.
 *
 * Only attention reads other rows than its own. All that lies between one attention and the next is done by parts of
 * the rows. Where every thread gets rows enough, a part is one thread's from end to end: no thread waits for another,
 * and what one stage writes is in that thread's caches for the next. Otherwise all threads share each stage. A row's
 * bits are the same either way.
 */
#include "decoder_stages.h"

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

/* Rows of each thread from which it takes them through all stages alone. Each thread then reads all weights: the more
 * threads do, the more rows each must have for what that takes of the memory. */
#define APART_FROM(threads) ((threads) < 4 ? 8 : 2 * (threads))
#define SLOTS (POOL_WORKERS + 1)

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
    r->ticks[kind] += now - r->clock;
    r->clock = now;
}

/* ---- between one attention and the next ---- */

INLINE size_t whole_lines(size_t floats) { return (floats + 15) / 16 * 16; }

/* Floats of scratch that the matmuls of `rows` rows take. */
static size_t matmul_floats(const peqa_decoder *m, size_t rows)
{
    int64_t most = 0;
    for (int64_t i = 0; i < m->layer_count; i++) {
        const decoder_layer *l = m->layers + i;
        const decoder_linear *linears[4] = {&l->qkv, &l->out, &l->gate_up, &l->down};
        for (int j = 0; j < 4; j++) {
            const int64_t need = peqa_quant_matmul_scratch(linears[j]->weight, (int64_t)rows);
            most = need > most ? need : most;
        }
    }
    return whole_lines((size_t)most);
}

/* How rows are cut into parts: each one thread's (`apart`), or one after the other, each all threads'. */
typedef struct {
    int apart;
    size_t parts, rows /* of a part, at most */;
    size_t slots, floats; /* parts in work at once, and what each has for its own arrays */
} division;

/* Rows of a part, at most: few, whose gates and inputs stay in the second cache level. Where codes are unpacked to memory,
 * once for each part, more are quicker all the same, and most on matrix tiles. Each part reads all weights: with many
 * threads as many rows are allowed as make them work apart. */
static size_t part_rows(const peqa_decoder *m, size_t threads)
{
    if (TILES)
        return 128;
    const int unpacked = !BYTE_DOTS || (m->layer_count && in_bytes(m->layers[0].qkv.weight));
    const size_t least = APART_FROM(threads), most = unpacked ? 64 : 24;
    return most < least ? least : most;
}

static division divide(const peqa_decoder *m, int64_t threads, size_t rows)
{
    division d = {.slots = smin((size_t)(threads > 0 ? threads : 1), SLOTS)};
    d.apart = rows >= APART_FROM(d.slots) * d.slots;
    const size_t most = d.apart ? part_rows(m, d.slots) : ROWS_PER_PASS;
    if (!d.apart)
        d.slots = 1;
    d.parts = (rows + d.slots * most - 1) / (d.slots * most) * d.slots;
    d.rows = d.parts ? (rows + d.parts - 1) / d.parts : 0;
    d.floats = whole_lines(d.rows * (size_t)m->hidden) + whole_lines(d.rows * 2 * (size_t)m->intermediate) +
               matmul_floats(m, d.rows);
    return d;
}

static void multiply(run *r, const decoder_linear *linear, const float *x, size_t ldx, float *y)
{
    peqa_quant_matmul(linear->weight, r->pool, r->threads, r->scratch, x, (int64_t)ldx, (int64_t)r->rows, y,
                      linear->bias, linear->out_scale, linear->in_scale, linear->group_scale, linear->half_bank,
                      r->row, r->group_row);
}

static void add_and_norm(run *r, const float *norm)
{
    r->norm = norm;
    over_rows(r, (size_t)r->m->hidden, work_add_and_norm);
}

/* Rows in work from one attention (NULL: from their tokens) to the next one's inputs (NULL: to the last norm). */
static void pass_between(run *r, const decoder_layer *from, const decoder_layer *to)
{
    const size_t hidden = (size_t)r->m->hidden, intermediate = (size_t)r->m->intermediate;
    const float *norm = to ? to->attention_norm : r->m->norm;
    if (from) {
        multiply(r, &from->out, r->attended, (size_t)(r->m->heads * r->m->d), r->added);
        book(r, TICKS_MATMUL);
        add_and_norm(r, from->mlp_norm);
        book(r, TICKS_ELEMENTWISE);
        multiply(r, &from->gate_up, r->normed, hidden, r->gate_up);
        book(r, TICKS_MATMUL);
        over_rows(r, 2 * intermediate, work_silu);
        book(r, TICKS_ELEMENTWISE);
        multiply(r, &from->down, r->gate_up, 2 * intermediate, r->added);
        book(r, TICKS_MATMUL);
        add_and_norm(r, norm);
    } else {
        r->norm = norm;
        over_rows(r, hidden, work_embed);
    }
    book(r, TICKS_ELEMENTWISE);
    if (!to)
        return;
    multiply(r, &to->qkv, r->normed, hidden, r->qkv);
    book(r, TICKS_MATMUL);
    r->layer = to;
    over_rows(r, qkv_width(r->m), work_place);
    book(r, TICKS_ELEMENTWISE);
}

typedef struct {
    const run *all;
    const division *cut;
    const decoder_layer *from, *to;
    float *slots;
    int64_t ticks[TICKS_KINDS];
    int32_t taken[SLOTS];
} between;

static void pass_part(between *b, size_t part, size_t slot)
{
    run r = *b->all;
    int64_t spent[TICKS_KINDS] = {0};
    const size_t first = r.rows * part / b->cut->parts, hidden = (size_t)r.m->hidden;
    r.rows = r.rows * (part + 1) / b->cut->parts - first;
    r.first = first;
    r.hidden += first * hidden;
    r.normed += first * hidden;
    r.qkv += first * qkv_width(r.m);
    r.attended += first * (size_t)(r.m->heads * r.m->d);
    r.row = r.row ? r.row + first : 0;
    r.group_row = r.group_row ? r.group_row + first : 0;
    r.added = b->slots + slot * b->cut->floats;
    r.gate_up = r.added + whole_lines(b->cut->rows * hidden);
    r.scratch = r.gate_up + whole_lines(b->cut->rows * 2 * (size_t)r.m->intermediate);
    if (b->cut->apart) {
        r.pool = 0;
        r.threads = 1;
    }
    r.ticks = spent;
    r.clock = ticks();
    if (r.rows)
        pass_between(&r, b->from, b->to);
    for (int kind = 0; kind < TICKS_KINDS; kind++)
        __atomic_add_fetch(&b->ticks[kind], spent[kind], __ATOMIC_RELAXED);
}

/* A thread's next part mostly finds the slot that it had. */
static void work_between(void *data, int part, int parts)
{
    (void)parts;
    between *b = data;
    size_t slot = (size_t)part % b->cut->slots;
    while (__atomic_exchange_n(&b->taken[slot], 1, __ATOMIC_ACQUIRE)) {
        pool_pause();
        slot = (slot + 1) % b->cut->slots;
    }
    pass_part(b, (size_t)part, slot);
    __atomic_store_n(&b->taken[slot], 0, __ATOMIC_RELEASE);
}

static void go_between(run *r, const division *cut, const decoder_layer *from, const decoder_layer *to)
{
    between b = {.all = r, .cut = cut, .from = from, .to = to, .slots = r->scratch};
    if (cut->apart)
        pool_run(r->pool, (int)cut->parts, work_between, &b);
    else
        for (size_t part = 0; part < cut->parts; part++)
            pass_part(&b, part, 0);
    /* Threads that work at the same time share the time that has passed. */
    const int64_t now = ticks(), passed = now - r->clock;
    int64_t all = 0;
    for (int kind = 0; kind < TICKS_KINDS; kind++)
        all += b.ticks[kind];
    for (int kind = 0; kind < TICKS_KINDS; kind++)
        if (b.ticks[kind])
            r->ticks[kind] += (int64_t)((double)passed * (double)b.ticks[kind] / (double)all);
    r->clock = now;
}

/* ---- a step ---- */

static void attend(run *r, const decoder_layer *layer)
{
    const peqa_decoder *m = r->m;
    const decoder_step *s = r->s;
    peqa_paged_attention(r->pool, r->threads, r->scratch, r->attended, r->qkv, (int64_t)qkv_width(m), m->d,
                         layer->keys, layer->values, layer->key_block, layer->value_block, m->half_caches,
                         s->block_tables, s->table_stride, s->query_starts, s->seq_lens, s->sequences, m->heads,
                         m->kv_heads, m->d, m->d, m->block_size, m->layout, m->scaling, layer->window, 0.0f, 0);
    book(r, TICKS_ATTENTION);
}

/* Behind the last attention no token reads another one: those whose result nobody wants end here. `picked`: room for
 * row and group_row of the wanted ones. */
static void keep_outputs(run *r, int32_t *picked)
{
    const size_t hidden = (size_t)r->m->hidden, attended = (size_t)(r->m->heads * r->m->d);
    const size_t count = (size_t)r->s->output_count;
    for (size_t i = 0; i < count; i++) {
        const size_t token = (size_t)r->s->outputs[i];
        copy_row(r->hidden + token * hidden, hidden, r->normed + i * hidden);
        copy_row(r->attended + token * attended, attended, r->qkv + i * attended);
        if (r->row)
            picked[i] = r->row[token];
        if (r->group_row)
            picked[count + i] = r->group_row[token];
    }
    float *swap = r->hidden;
    r->hidden = r->normed;
    r->normed = swap;
    swap = r->attended;
    r->attended = r->qkv;
    r->qkv = swap;
    r->row = r->row ? picked : 0;
    r->group_row = r->group_row ? picked + count : 0;
    r->rows = count;
}

/* The first token whose id, position or slot lies outside of the tensors, or the tokens plus the
 * number of the first wanted token that is none; -1 where all is well. */
EXPORT int64_t peqa_decode_misfit(const peqa_decoder *m, const decoder_step *s)
{
    const int64_t slots = m->blocks * m->block_size;
    for (int64_t i = 0; i < s->tokens; i++)
        if (s->ids[i] < 0 || s->ids[i] >= m->vocab || s->positions[i] < 0 || s->positions[i] >= m->positions ||
            s->slots[i] < -1 || s->slots[i] >= slots)
            return i;
    for (int64_t i = 0; i < s->output_count; i++)
        if (s->outputs[i] < 0 || s->outputs[i] >= s->tokens)
            return s->tokens + i;
    return -1;
}

/* The counter that a step's ticks are counted in. */
EXPORT int64_t peqa_ticks(void) { return ticks(); }

/* Floats of the arrays that all rows of a step share, and of those of its parts or of what follows them. */
static size_t shared_floats(const peqa_decoder *m, size_t tokens, size_t outputs)
{
    return 2 * whole_lines(tokens * (size_t)m->hidden) + whole_lines(tokens * qkv_width(m)) +
           whole_lines(tokens * (size_t)(m->heads * m->d)) + 2 * whole_lines(outputs);
}

static size_t other_floats(const peqa_decoder *m, int64_t threads, size_t tokens, size_t outputs)
{
    const division all = divide(m, threads, tokens), wanted = divide(m, threads, outputs);
    const size_t head = m->head.weight ? (size_t)peqa_quant_matmul_scratch(m->head.weight, (int64_t)outputs) : 0;
    const size_t needs[4] = {
        all.slots * all.floats, wanted.slots * wanted.floats, head,
        (size_t)peqa_attention_scratch(threads, m->heads, m->kv_heads, m->d, m->d)};
    size_t most = 0;
    for (int i = 0; i < 4; i++)
        most = needs[i] > most ? needs[i] : most;
    return most;
}

/* Floats of scratch that a step needs. */
EXPORT int64_t peqa_decode_scratch(const peqa_decoder *m, int64_t threads, int64_t tokens, int64_t output_count)
{
    const size_t rows = (size_t)tokens, outputs = (size_t)output_count;
    return (int64_t)(shared_floats(m, rows, outputs) + other_floats(m, threads, rows, outputs)) + 16;
}

/* scratch: see above. Nothing is checked here: peqa_decode_misfit and peqa_attention_misfit do. */
EXPORT void peqa_decode(const peqa_decoder *m, peqa_pool *pool, int64_t threads, float *scratch, const decoder_step *s)
{
    run r = {.m = m, .s = s, .pool = pool, .threads = threads, .rows = (size_t)s->tokens, .ticks = s->ticks};
    r.clock = ticks();
    r.row = s->row;
    r.group_row = s->group_row;
    r.hidden = (float *)(((uintptr_t)scratch + 63) / 64 * 64);
    r.normed = r.hidden + whole_lines(r.rows * (size_t)m->hidden);
    r.qkv = r.normed + whole_lines(r.rows * (size_t)m->hidden);
    r.attended = r.qkv + whole_lines(r.rows * qkv_width(m));
    float *picked = r.attended + whole_lines(r.rows * (size_t)(m->heads * m->d));
    r.scratch = picked + 2 * whole_lines((size_t)s->output_count);

    const decoder_layer *layer = m->layers, *const last = m->layers + m->layer_count - 1;
    const division all = divide(m, threads, r.rows), wanted = divide(m, threads, (size_t)s->output_count);
    go_between(&r, &all, 0, layer);
    for (; layer < last; layer++) {
        attend(&r, layer);
        go_between(&r, &all, layer, layer + 1);
    }
    if (s->output_count == 0)
        return; /* the keys and values were all that was wanted */
    attend(&r, last);
    keep_outputs(&r, (int32_t *)picked);
    go_between(&r, &wanted, last, 0);
    if (m->head.weight)
        multiply(&r, &m->head, r.normed, (size_t)m->hidden, s->result);
    else
        copy_row(r.normed, r.rows * (size_t)m->hidden, s->result);
    book(&r, TICKS_HEAD);
}
