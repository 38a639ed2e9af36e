/* Causal attention of packed queries over keys and values that lie in blocks.
 *
 * A work item is a run of queries of one sequence with all query heads that share one key head. Keys are taken CHUNK
 * positions at a time, chunks starting at multiples of CHUNK. For one query and head everything happens in an order
 * that its own position fixes: a score is one chain over the features; chunk after chunk the running maximum, sum and
 * output are updated; positions it may not see count as exact zeros. So decode and prefill, alone or among others,
 * give the same bits.
 */
#include "attention_tiles.h"

INLINE size_t group_of(const attention *a) { return a->heads / a->kv_heads; }

static size_t rows_per_item(const attention *a)
{
    const size_t group = group_of(a);
    return group >= ITEM_ROWS ? group : ITEM_ROWS / group * group;
}

static size_t floats_per_thread(const attention *a)
{
    const size_t rows = rows_per_item(a), pointer = sizeof(uintptr_t) / sizeof(float);
    const size_t floats = (a->d + 1) * CHUNK + rows * (CHUNK + a->d_v + VL + 2 + pointer) + a->d + 64;
    return (sizeof(share) / sizeof(float) + floats + 15) / 16 * 16;
}

static share *share_of(const attention *a, int thread)
{
    return (share *)(a->scratch + (size_t)thread * floats_per_thread(a));
}

static item_memory carve(const attention *a, int thread)
{
    const size_t rows = rows_per_item(a);
    item_memory m;
    m.query = (const float **)(share_of(a, thread) + 1);
    m.keys = (float *)(m.query + rows);
    m.score = m.keys + a->d * CHUNK;
    m.out = m.score + rows * CHUNK;
    m.sum = m.out + rows * a->d_v;
    m.top = m.sum + rows * VL;
    m.shrink = m.top + rows;
    m.nothing = m.shrink + rows;
    for (size_t i = 0; i < a->d; i++)
        m.nothing[i] = 0.0f;
    return m;
}

/* The queries as they lie, and nothing summed up yet. */
static void start_rows(const attention *a, const item *it, item_memory *m)
{
    const size_t group = group_of(a), token = (size_t)a->query_starts[it->sequence] + it->first;
    for (size_t query = 0, row = 0; query < it->queries; query++)
        for (size_t head = it->kv_head * group; head < (it->kv_head + 1) * group; head++, row++) {
            m->query[row] = a->q + (token + query) * a->q_token + head * a->q_head;
            m->top[row] = a->sinks ? a->sinks[head] : -__builtin_inff();
            vstore(m->sum + row * VL, vset(0.0f));
            if (a->sinks)
                m->sum[row * VL] = 1.0f;
            for (size_t i = 0; i < a->d_v; i += VL)
                vput(m->out + row * a->d_v + i, vset(0.0f), a->d_v - i);
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

/* ---- one item ---- */

/* Behind the last key that any row of the item sees, and the first one that one does. */
INLINE int64_t end_of(const item *it) { return it->position + (int64_t)it->queries; }

INLINE int64_t begin_of(const attention *a, const item *it)
{
    return a->window && it->position + 1 > a->window ? it->position + 1 - a->window : 0;
}

static void locate_first(const attention *a, const item *it, const item_memory *m, places *p)
{
    const int64_t begin = begin_of(a, it);
    locate(a, it, m, begin / CHUNK * CHUNK, begin, end_of(it), p);
}

/* two[turn] has the item's first chunk. Returns which of the two has that of the next one (NULL: none). */
static int attend(const attention *a, const item *it, const item *next, item_memory *m, places *two, int turn)
{
    const size_t group = group_of(a);
    const int64_t end = end_of(it), begin = begin_of(a, it);
    const int few = it->rows <= BLOCK_ROWS && in_lanes(a); /* keys and values are read once: memory is what takes time */
    start_rows(a, it, m);
    for (int64_t start = begin / CHUNK * CHUNK; start < end; start += CHUNK, turn ^= 1) {
        const places *p = &two[turn], *soon = few ? p : 0;
        places *after = &two[turn ^ 1];
        if (start + CHUNK < end)
            locate(a, it, m, start + CHUNK, begin, end, after);
        else if (next)
            locate_first(a, next, m, after);
        else
            after = 0;
        if (few && after)
            soon = after;
        else if (after)
            fetch(a, after, 0, 0);
        turn_keys(a, m, p);
        scores(a, it, m, p, soon);
        for (size_t query = 0; query < it->queries; query++) {
            const int64_t behind = it->position + (int64_t)query + 1 - start; /* the last offset it sees */
            const int64_t first = a->window ? behind - a->window : p->from;
            for (size_t row = query * group; row < (query + 1) * group; row++)
                weigh(a, m, row, first > p->from ? (int32_t)first : p->from, behind < p->to ? (int32_t)behind : p->to,
                      p->to);
        }
        values(a, it, m, p, soon);
        if (few && after)
            fetch(a, after, vectors_of(p), values_of(p));
    }
    const size_t token = (size_t)a->query_starts[it->sequence] + it->first;
    for (size_t query = 0, row = 0; query < it->queries; query++)
        for (size_t head = it->kv_head * group; head < (it->kv_head + 1) * group; head++, row++) {
            const vf sum = vset(hsum(vload(m->sum + row * VL)));
            float *to = a->out + ((token + query) * a->heads + head) * a->d_v;
            for (size_t i = 0; i < a->d_v; i += VL)
                vput(to + i, vpart(m->out + row * a->d_v + i, a->d_v - i) / sum, a->d_v - i);
        }
    return turn;
}

/* ---- threads and entry ---- */

INLINE size_t items_of(const attention *a, size_t sequence)
{
    const size_t new = (size_t)(a->query_starts[sequence + 1] - a->query_starts[sequence]);
    const size_t queries = rows_per_item(a) / group_of(a);
    return new <= queries ? (new > 0) * a->kv_heads : (new + queries - 1) / queries * a->kv_heads;
}

/* Where a thread is among the items: `before` of them belong to earlier sequences. */
typedef struct {
    size_t sequence, before;
} walk;

static void find(const attention *a, walk *w, size_t index, item *it)
{
    const size_t group = group_of(a), queries = rows_per_item(a) / group;
    if (index < w->before)
        *w = (walk){0};
    for (size_t items; index >= w->before + (items = items_of(a, w->sequence)); w->sequence++)
        w->before += items;
    const uint32_t own = (uint32_t)(index - w->before), heads = (uint32_t)a->kv_heads;
    const size_t new = (size_t)(a->query_starts[w->sequence + 1] - a->query_starts[w->sequence]);
    *it = (item){.sequence = w->sequence, .kv_head = own % heads, .first = own / heads * queries};
    it->queries = smin(queries, new - it->first);
    it->rows = it->queries * group;
    it->position = (int64_t)a->seq_lens[w->sequence] - (int64_t)(new - it->first);
}

/* Takes an item of thread `of` that nobody has; 0 when there is none. */
static int take(const attention *a, int of, walk *w, item *it)
{
    share *items = share_of(a, of);
    const size_t index = __atomic_fetch_add(&items->next, 1, __ATOMIC_RELAXED);
    if (index >= items->end)
        return 0;
    find(a, w, index, it);
    return 1;
}

static void work(void *data, int part, int parts)
{
    const attention *a = data;
    item_memory m = carve(a, part);
    item items[2];
    places two[2];
    walk w = {0};
    for (int i = 0, turn = 0; i < parts; i++) {
        const int of = (part + i) % parts, own = i == 0;
        int more = take(a, of, &w, &items[0]);
        for (int at = 0, ready = 0; more; at ^= 1) {
            if (!ready) {
                locate_first(a, &items[at], &m, &two[turn]);
                fetch(a, &two[turn], 0, 0);
            }
            /* Its own it takes early, so that what they read is on its way; of others' only what it begins now. */
            ready = own && take(a, of, &w, &items[at ^ 1]);
            turn = attend(a, &items[at], ready ? &items[at ^ 1] : 0, &m, two, turn);
            more = own ? ready : take(a, of, &w, &items[at ^ 1]);
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
                                 int64_t key_block, int64_t value_block, int64_t half, const int32_t *block_tables,
                                 int64_t table_stride, const int32_t *query_starts, const int32_t *seq_lens,
                                 int64_t seqs, int64_t heads, int64_t kv_heads, int64_t d, int64_t d_v,
                                 int64_t block_size, int64_t layout, float scaling, int64_t window, float softcap,
                                 const float *sinks)
{
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
    a.half = half != 0;
    a.at = strides_of(layout, half, key_block, value_block, a.block_size, a.kv_heads, a.d, a.d_v);
    size_t items = 0;
    for (size_t i = 0; i < a.seqs; i++)
        items += items_of(&a, i);
    for (int64_t i = 0; i < threads; i++)
        *share_of(&a, (int)i) = (share){.next = items * (size_t)i / (size_t)threads,
                                       .end = items * (size_t)(i + 1) / (size_t)threads};
    pool_run(pool, (int)threads, work, &a);
}
