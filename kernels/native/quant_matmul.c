/* y[m,n] = bias[n] + out[row[m],n] * sum_g s[g,n] * group[group_row[m],g,n] * sum_{k in g} x[m,k] * in * (q - z)
 *
 * Lanes are outputs. Activations are integers times a power of two per block of at most CHAIN inputs, so that a chain's
 * sum over k is exact, in whatever order and by whatever instruction; only the chains' sums are added in floating
 * point, one after the other. So a row's bits depend neither on the rows beside it nor on the tile that computes it.
 */
#include "few_rows.h"
#include "many_rows.h"
#include "tile_rows.h"

/* Bytes of codes that all stripes of rows take before the next ones, but two panels at least: they stay in the second
 * cache level, and reading them from memory is spread over all stripes' work. */
#define CODES_AT_ONCE ((size_t)40 << 10)
#define ROWS_AT_ONCE 576 /* packed before they are multiplied: whole passes */
#define SHARES 256       /* threads, at most */
#define WIDE_PANELS 4    /* that a tile of one row takes at once */
#define PASS_STRIPES ((ROWS_PER_PASS + ROWS_MAX - 1) / ROWS_MAX)

#if ROWS_MAX == 6
#define FOR_ROWS(F, ...) F(1, ##__VA_ARGS__) F(2, ##__VA_ARGS__) F(3, ##__VA_ARGS__) F(4, ##__VA_ARGS__) F(5, ##__VA_ARGS__) F(6, ##__VA_ARGS__)
#else
#define FOR_ROWS(F, ...) F(1, ##__VA_ARGS__) F(2, ##__VA_ARGS__) F(3, ##__VA_ARGS__) F(4, ##__VA_ARGS__)
#endif

/* One stripe of R rows times the panels first..last. Few rows take several panels at once: that many sums hide the
 * latency of a multiplication. A function for each number of rows and of bits, kind of integers and way to end a chain:
 * what is not needed takes no registers. */
typedef void (*run_few)(const job *, size_t, size_t, size_t);
#define FEW_V(R) (VL == 16 ? ((R) == 1 ? 8 : (R) <= 3 ? 4 : TILE_V) : (R) <= 2 ? 4 : TILE_V)
#define FEW_OF(NAME, R, BITS, BYTES, END)                                                                              \
    static void NAME(const job *j, size_t first, size_t last, size_t stripe)                                           \
    {                                                                                                                  \
        const size_t wide = FEW_V(R) * VL / PANEL;                                                                     \
        size_t panel = first;                                                                                          \
        for (; wide > 1 && panel + wide <= last; panel += wide) {                                                      \
            if (j->in.segments > 1 && panel_of(j, panel)[2] != panel_of(j, panel + wide - 1)[2])                       \
                break; /* the panels' activations differ */                                                            \
            few_tile(R, FEW_V(R), BITS, BYTES, END, j, panel, 0, stripe);                                              \
        }                                                                                                              \
        for (; panel < last; panel++)                                                                                  \
            for (size_t lane = 0; lane < PANEL; lane += TILE_V * VL)                                                   \
                few_tile(R, TILE_V, BITS, BYTES, END, j, panel, lane, stripe);                                         \
    }
#define FEW(R, KIND, BITS, BYTES, END) FEW_OF(few_##KIND##_##BITS##_##R, R, BITS, BYTES, END)
#define FEW_NAME(R, KIND, BITS) few_##KIND##_##BITS##_##R,
#define FEW_BITS(KIND, BYTES, END)                                                                                     \
    FOR_ROWS(FEW, KIND, 2, BYTES, END)                                                                                 \
    FOR_ROWS(FEW, KIND, 3, BYTES, END)                                                                                 \
    FOR_ROWS(FEW, KIND, 4, BYTES, END)                                                                                 \
    FOR_ROWS(FEW, KIND, 8, BYTES, END)
#define FEW_NAMES(KIND)                                                                                                \
    {                                                                                                                  \
        {FOR_ROWS(FEW_NAME, KIND, 2)}, {FOR_ROWS(FEW_NAME, KIND, 3)}, {FOR_ROWS(FEW_NAME, KIND, 4)},                   \
            {FOR_ROWS(FEW_NAME, KIND, 8)},                                                                             \
    }
#if BYTE_DOTS && !TILES
#define FEW_ENDS ENDS
FEW_BITS(words_late, 0, END_LATE)
FEW_BITS(words_offset, 0, END_OFFSET)
FEW_BITS(words_centred, 0, END_CENTRED)
FEW_BITS(words_task, 0, END_TASK)
FEW_BITS(bytes_late, 1, END_LATE)
FEW_BITS(bytes_offset, 1, END_OFFSET)
FEW_BITS(bytes_centred, 1, END_CENTRED)
FEW_BITS(bytes_task, 1, END_TASK)
static const run_few few_rows[2][FEW_ENDS][4][ROWS_MAX] = {
    {FEW_NAMES(words_late), FEW_NAMES(words_offset), FEW_NAMES(words_centred), FEW_NAMES(words_task)},
    {FEW_NAMES(bytes_late), FEW_NAMES(bytes_offset), FEW_NAMES(bytes_centred), FEW_NAMES(bytes_task)},
};
#else
#define FEW_ENDS 1
FEW_BITS(words, 0, END_ANY)
static const run_few few_rows[1][FEW_ENDS][4][ROWS_MAX] = {{FEW_NAMES(words)}};
#endif

INLINE size_t stripe_rows(size_t stripe, size_t rows)
{
    return stripe_start(stripe + 1, rows) - stripe_start(stripe, rows);
}

static void multiply_few(const job *j, size_t first, size_t last)
{
    const run_few *table = few_rows[in_bytes(j->w)][FEW_ENDS > 1 ? ends_of(j) : 0][j->w->bits == 8 ? 3 : j->w->bits - 2];
    for (size_t panel = first; panel < last; panel += j->stretch)
        for (size_t stripe = 0; stripe < stripe_count(j->rows); stripe++)
            table[stripe_rows(stripe, j->rows) - 1](j, panel, smin(panel + j->stretch, last), stripe);
}

/* Panels that all stripes of few rows take before the next ones. */
INLINE size_t stretch_of(const peqa_weight *w, const cuts *c, size_t rows)
{
    const size_t bytes = c->kp * PANEL * (size_t)w->bits / 8;
    if (stripe_count(rows) == 1)
        return (size_t)w->panels;
    return 2 * bytes < CODES_AT_ONCE ? CODES_AT_ONCE / bytes : 2;
}

#if !TILES
/* A function for each number of rows, kind of integers and way to end a chain: what is not needed takes no registers. */
#define MANY_OF(NAME, R, BYTES, END)                                                                                   \
    static void NAME(const job *j, const unpacked *codes, size_t panel, size_t lane, const stripe_place *s,            \
                     const block_place *b, totals *total)                                                              \
    {                                                                                                                  \
        many_tile(R, TILE_V, BYTES, END, j, codes, panel, lane, s, b, total);                                          \
    }
#define MANY(R, KIND, BYTES, END) MANY_OF(many_##KIND##_##R, R, BYTES, END)
#define MANY_NAME(R, KIND) many_##KIND##_##R,
FOR_ROWS(MANY, words_late, 0, END_LATE)
FOR_ROWS(MANY, words_offset, 0, END_OFFSET)
FOR_ROWS(MANY, words_centred, 0, END_CENTRED)
FOR_ROWS(MANY, words_task, 0, END_TASK)
#if BYTE_DOTS
FOR_ROWS(MANY, bytes_late, 1, END_LATE)
FOR_ROWS(MANY, bytes_offset, 1, END_OFFSET)
FOR_ROWS(MANY, bytes_centred, 1, END_CENTRED)
FOR_ROWS(MANY, bytes_task, 1, END_TASK)
#endif

typedef void (*run_many)(const job *, const unpacked *, size_t, size_t, const stripe_place *, const block_place *,
                         totals *);
static const run_many many_rows[1 + BYTE_DOTS][ENDS][ROWS_MAX] = {
    {{FOR_ROWS(MANY_NAME, words_late)},
     {FOR_ROWS(MANY_NAME, words_offset)},
     {FOR_ROWS(MANY_NAME, words_centred)},
     {FOR_ROWS(MANY_NAME, words_task)}},
#if BYTE_DOTS
    {{FOR_ROWS(MANY_NAME, bytes_late)},
     {FOR_ROWS(MANY_NAME, bytes_offset)},
     {FOR_ROWS(MANY_NAME, bytes_centred)},
     {FOR_ROWS(MANY_NAME, bytes_task)}},
#endif
};

#define END(R)                                                                                                         \
    static void end_##R(const job *j, size_t panel, size_t lane, const stripe_place *s, const totals *total)           \
    {                                                                                                                  \
        end_rows(R, TILE_V, j, s->row, panel, lane, s->counts, total);                                                 \
    }
FOR_ROWS(END)

typedef void (*run_end)(const job *, size_t, size_t, const stripe_place *, const totals *);
#define END_NAME(R) end_##R,
static const run_end many_ends[ROWS_MAX] = {FOR_ROWS(END_NAME)};

/* One panel, TILE_V vectors of lanes from `lane` on, of all rows. */
static void multiply_many(const job *j, size_t panel, size_t lane)
{
    totals total[PASS_STRIPES];
    stripe_place place[PASS_STRIPES];
    unpacked codes;
    const run_many *const table = many_rows[in_bytes(j->w)][ends_of(j)];
    const size_t stripes = stripe_count(j->rows);
    for (size_t stripe = 0; stripe < stripes; stripe++) {
        clear(ROWS_MAX, TILE_V, &total[stripe]);
        place[stripe] = place_stripe(j, panel, stripe);
        if (j->out_scale)
            for (size_t r = 0; r < place[stripe].rows; r++)
                fetch_out_scale(1, TILE_V, j, place[stripe].row + r, panel, lane);
    }
    for (size_t block = 0; block < j->c.blocks; block++) {
        const block_place b = place_block(&j->c, block);
        unpack_block(j, panel, &b, &codes);
        for (size_t stripe = 0; stripe < stripes; stripe++) {
            const stripe_place *s = &place[stripe];
            fetch_share(j, panel + 1, &b, stripe, stripes);
            if (block + 1 == j->c.blocks)
                fetch_result(j, s->row, s->rows, panel, lane);
            table[s->rows - 1](j, &codes, panel, lane, s, &b, &total[stripe]);
        }
    }
    for (size_t stripe = 0; stripe < stripes; stripe++)
        many_ends[place[stripe].rows - 1](j, panel, lane, &place[stripe], &total[stripe]);
}
#endif

/* ---- threads and entry ---- */

/* Rows of a pass, at most. Where codes may go straight into registers, so many that their activations stay in the second
 * cache level. */
INLINE size_t pass_rows_of(const peqa_weight *w)
{
    return !TILES && BYTE_DOTS && !in_bytes(w) ? few_rows_of(w) : ROWS_PER_PASS;
}

INLINE size_t pass_count(const peqa_weight *w, size_t rows) { return (rows + pass_rows_of(w) - 1) / pass_rows_of(w); }

/* Rows that the packed activations of a pass take room for, of a call with so many at once. */
INLINE size_t pass_room(const peqa_weight *w, size_t rows)
{
    const size_t passes = pass_count(w, rows), most = passes ? (rows + passes - 1) / passes : 0;
    return most ? stripe_room(stripe_count(most), most) : 0;
}

/* Panels, of all passes one after the other, that nobody has taken: first | end << 32. Its thread takes them from the
 * front, so that what it asks for ahead of time is its own; who has no more takes others' from the back. */
typedef struct {
    uint64_t left __attribute__((aligned(64)));
} share;

typedef struct {
    job all; /* of all passes */
    size_t passes, room;
    size_t least, most; /* panels that are taken at once */
    share *shares;
} passes_job;

static job pass_of(const passes_job *p, size_t pass)
{
    job j = p->all;
    const size_t first = p->all.rows * pass / p->passes, before = pass * p->room * j.in.segments;
    j.rows = p->all.rows * (pass + 1) / p->passes - first;
    j.x += first * j.ldx;
    j.y += first * (size_t)j.w->out_features;
    j.row = j.row ? j.row + first : 0;
    j.group_row = j.group_row ? j.group_row + first : 0;
    j.in.x += before * input_words(j.w, &j.c);
    j.in.steps += before * j.c.blocks;
    j.in.counts += before * j.c.chains;
    return j;
}

static void work_pack(void *data, int part, int parts)
{
    const passes_job *p = data;
    size_t turn = 0;
    for (size_t pass = 0; pass < p->passes; pass++) {
        const job j = pass_of(p, pass);
        for (size_t stripe = 0; stripe < stripe_count(j.rows); stripe++, turn++)
            if (turn % (size_t)parts == (size_t)part)
                peqa_pack_rows(j.w, j.in, j.x, j.ldx, j.in_scale, j.half_bank, j.row, j.rows, stripe);
    }
}

static void multiply(const job *j, size_t first, size_t last)
{
    if (j->rows <= few_rows_of(j->w)) {
        multiply_few(j, first, last);
        return;
    }
#if TILES
    tiles state;
    const tile_shapes shapes = shapes_for(tile_stripe_rows(j->rows), slab_of(&j->c));
    tiles_begin(&state, &shapes);
    for (size_t panel = first; panel < last; panel++)
        multiply_tiles(&state, j, panel);
    tiles_end(&state); /* registers in use make every switch to another thread dearer */
#else
    for (size_t panel = first; panel < last; panel++)
        for (size_t lane = 0; lane < PANEL; lane += TILE_V * VL)
            multiply_many(j, panel, lane);
#endif
}

/* Takes first..last of one pass: fewer as fewer are left, so that all threads end at about the same time. 0: there are no
 * more. */
static int take(const passes_job *p, size_t of, int own, size_t *first, size_t *last)
{
    const size_t panels = (size_t)p->all.w->panels;
    uint64_t *left = &p->shares[of].left, now = __atomic_load_n(left, __ATOMIC_RELAXED), then;
    do {
        const size_t begin = (uint32_t)now, end = now >> 32;
        if (begin >= end)
            return 0;
        const size_t many = smin(p->most, ((end - begin) / 4 + p->least) / p->least * p->least);
        if (own) {
            *first = begin;
            *last = smin(smin(begin + many, end), begin / panels * panels + panels);
            then = *last | (uint64_t)end << 32;
        } else {
            const size_t pass = (end - 1) / panels * panels;
            *last = end;
            *first = end - smin(many, end - (begin > pass ? begin : pass));
            then = begin | (uint64_t)*first << 32;
        }
    } while (!__atomic_compare_exchange_n(left, &now, then, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return 1;
}

static void work_multiply(void *data, int part, int parts)
{
    const passes_job *p = data;
    const size_t panels = (size_t)p->all.w->panels;
    for (int i = 0; i < parts; i++)
        for (size_t first, last; take(p, (size_t)((part + i) % parts), i == 0, &first, &last);) {
            const job j = pass_of(p, first / panels);
            multiply(&j, first % panels, (last - 1) % panels + 1);
        }
}

/* Words of 32 bits of scratch that a call with `rows` rows needs. */
EXPORT int64_t peqa_quant_matmul_scratch(const peqa_weight *w, int64_t rows)
{
    const cuts c = cut(w);
    const size_t at_once = smin((size_t)rows, ROWS_AT_ONCE);
    return (int64_t)((size_t)w->segments * pass_count(w, at_once) * pass_room(w, at_once) * row_words(w, &c) + 16);
}

/* x [rows, ldx >= in_features], y [rows, out_features]; out_scale [*, N], in_scale [*, segments, K] go with `row`,
 * group_scale [*, G, N] with `group_row`; any of these may be NULL; they are fp16 with half_bank, else fp32. scratch:
 * see above. */
EXPORT void peqa_quant_matmul(const peqa_weight *w, peqa_pool *pool, int64_t threads, float *scratch,
                              const float *x, int64_t ldx, int64_t rows, float *y, const float *bias,
                              const void *out_scale, const void *in_scale, const void *group_scale, int64_t half_bank,
                              const int32_t *row, const int32_t *group_row)
{
    const cuts c = cut(w);
    share shares[SHARES];
    const size_t parts = smin(threads > 1 ? (size_t)threads : 1, SHARES);
    passes_job p = {.all = {.w = w, .c = c, .ldx = (size_t)ldx, .bias = bias, .group_scale = group_scale}};
    job *j = &p.all;
    j->half_bank = (int)half_bank;
    j->out_scale = row ? out_scale : 0;
    j->in_scale = row ? in_scale : 0;
    j->in.segments = j->in_scale ? (size_t)w->segments : 1;
    p.shares = shares;
    for (size_t done = 0; done < (size_t)rows; done += ROWS_AT_ONCE) {
        j->rows = smin(ROWS_AT_ONCE, (size_t)rows - done);
        p.passes = pass_count(w, j->rows);
        p.room = pass_room(w, j->rows);
        const size_t room = j->in.segments * p.passes * p.room, most = (j->rows + p.passes - 1) / p.passes;
        j->in.x = (int32_t *)(((uintptr_t)scratch + 63) / 64 * 64);
        j->in.steps = (float *)(j->in.x + room * input_words(w, &c));
        j->in.counts = (int32_t *)(j->in.steps + room * c.blocks);
        j->stretch = stretch_of(w, &c, most);
        j->x = x + done * (size_t)ldx;
        j->y = y + done * (size_t)w->out_features;
        j->row = row ? row + done : 0;
        j->group_row = group_scale && group_row ? group_row + done : 0;
        p.least = most <= few_rows_of(w) && stripe_count(most) == 1 ? WIDE_PANELS : 1;
        p.most = smin(j->stretch, 4 * WIDE_PANELS);
        const size_t panels = p.passes * (size_t)w->panels;
        for (size_t i = 0; i < parts; i++)
            shares[i].left = panels * i / parts | (uint64_t)(panels * (i + 1) / parts) << 32;
        /* Sharing out costs more than packing a few rows here. */
        pool_run(pool, j->rows * c.kp * j->in.segments < 65536 ? 1 : (int)parts, work_pack, &p);
        pool_run(pool, (int)parts, work_multiply, &p);
    }
}

/* The first place in row [n] whose value is outside of 0 .. limit - 1, or -1. */
EXPORT int64_t peqa_first_outside(const int32_t *row, int64_t n, int64_t limit)
{
    for (int64_t i = 0; i < n; i++)
        if (row[i] < 0 || row[i] >= limit)
            return i;
    return -1;
}

/* A pool's thread lives here. */
EXPORT void peqa_pool_serve(peqa_pool *pool) { pool_serve(pool); }

/* 0 when the processor's registers that this build needs may be used. Ask once, before anything else. */
EXPORT int64_t peqa_ask_for_registers(void) { return ask_for_tiles(); }

/* Whether this build reads fp16 scales. */
EXPORT int64_t peqa_halves(void) { return HALVES; }

EXPORT int64_t peqa_abi(void) { return 12; }
