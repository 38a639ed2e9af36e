/* y[m,n] = bias[n] + out[row[m],n] * sum_g s[g,n] * group[group_row[m],g,n] * sum_{k in g} x[m,k] * in * (q - z)
 *
 * Lanes are outputs. Activations are integers times a power of two per block of at most CHAIN inputs, so that a chain's
 * sum over k is exact, in whatever order and by whatever instruction; only the chains' sums are added in floating
 * point, one after the other. So a row's bits depend neither on the rows beside it nor on the tile that computes it.
 */
#include "few_rows.h"
#include "many_rows.h"
#include "tile_rows.h"

#define CODES_AT_ONCE ((size_t)1 << 18) /* bytes of codes that stay in the second cache level for all stripes of rows */
#define PASS_STRIPES ((ROWS_PER_PASS + ROWS_MAX - 1) / ROWS_MAX)

/* One stripe of R rows times the panels first..last. Few rows take several panels at once: that many sums hide the
 * latency of a multiplication. */
#define FEW_V(R) (VL == 16 ? ((R) == 1 ? 8 : (R) <= 3 ? 4 : TILE_V) : (R) <= 2 ? 4 : TILE_V)
#define FEW_OF(NAME, R, BITS, BYTES)                                                                                   \
    static void NAME(const job *j, size_t first, size_t last, size_t stripe)                                           \
    {                                                                                                                  \
        const size_t wide = FEW_V(R) * VL / PANEL;                                                                     \
        size_t panel = first;                                                                                          \
        for (; wide > 1 && panel + wide <= last; panel += wide) {                                                      \
            if (j->in.segments > 1 && panel_of(j, panel)[2] != panel_of(j, panel + wide - 1)[2])                       \
                break; /* the panels' activations differ */                                                            \
            few_tile(R, FEW_V(R), BITS, BYTES, j, panel, 0, stripe);                                                   \
        }                                                                                                              \
        for (; panel < last; panel++)                                                                                  \
            for (size_t lane = 0; lane < PANEL; lane += TILE_V * VL)                                                   \
                few_tile(R, TILE_V, BITS, BYTES, j, panel, lane, stripe);                                              \
    }
#define FEW(R, BITS) FEW_OF(few_##R##_##BITS, R, BITS, 0)
#if ROWS_MAX == 6
#define FOR_ROWS(F, ...) F(1, ##__VA_ARGS__) F(2, ##__VA_ARGS__) F(3, ##__VA_ARGS__) F(4, ##__VA_ARGS__) F(5, ##__VA_ARGS__) F(6, ##__VA_ARGS__)
#else
#define FOR_ROWS(F, ...) F(1, ##__VA_ARGS__) F(2, ##__VA_ARGS__) F(3, ##__VA_ARGS__) F(4, ##__VA_ARGS__)
#endif
FOR_ROWS(FEW, 2)
FOR_ROWS(FEW, 3)
FOR_ROWS(FEW, 4)
FOR_ROWS(FEW, 8)

typedef void (*run_few)(const job *, size_t, size_t, size_t);
#define FEW_NAME(R, BITS) few_##R##_##BITS,
static const run_few few_rows[4][ROWS_MAX] = {
    {FOR_ROWS(FEW_NAME, 2)}, {FOR_ROWS(FEW_NAME, 3)}, {FOR_ROWS(FEW_NAME, 4)}, {FOR_ROWS(FEW_NAME, 8)}};

#if BYTE_DOTS && !TILES
#define FEW_BYTES(R, BITS) FEW_OF(few_bytes_##R##_##BITS, R, BITS, 1)
#define FEW_BYTES_NAME(R, BITS) few_bytes_##R##_##BITS,
FOR_ROWS(FEW_BYTES, 2)
FOR_ROWS(FEW_BYTES, 3)
FOR_ROWS(FEW_BYTES, 4)
FOR_ROWS(FEW_BYTES, 8)
static const run_few few_rows_of_bytes[4][ROWS_MAX] = {{FOR_ROWS(FEW_BYTES_NAME, 2)},
                                                       {FOR_ROWS(FEW_BYTES_NAME, 3)},
                                                       {FOR_ROWS(FEW_BYTES_NAME, 4)},
                                                       {FOR_ROWS(FEW_BYTES_NAME, 8)}};
#else
#define few_rows_of_bytes few_rows
#endif

INLINE size_t stripe_rows(size_t stripe, size_t rows)
{
    return stripe_start(stripe + 1, rows) - stripe_start(stripe, rows);
}

static void multiply_few(const job *j, size_t first, size_t last)
{
    const run_few *table = (in_bytes(j->w) ? few_rows_of_bytes : few_rows)[j->w->bits == 8 ? 3 : j->w->bits - 2];
    const size_t bytes = j->c.kp * PANEL * (size_t)j->w->bits / 8;
    const size_t stretch = bytes < CODES_AT_ONCE ? CODES_AT_ONCE / bytes : 1;
    for (size_t panel = first; panel < last; panel += stretch)
        for (size_t stripe = 0; stripe < stripe_count(j->rows); stripe++)
            table[stripe_rows(stripe, j->rows) - 1](j, panel, smin(panel + stretch, last), stripe);
}

#if !TILES
#define MANY(R)                                                                                                        \
    static void many_##R(const job *j, const unpacked *codes, size_t panel, size_t lane, const stripe_place *s,        \
                         const block_place *b, totals *total)                                                          \
    {                                                                                                                  \
        if (in_bytes(j->w))                                                                                            \
            many_tile(R, TILE_V, 1, j, codes, panel, lane, s, b, total);                                               \
        else                                                                                                           \
            many_tile(R, TILE_V, 0, j, codes, panel, lane, s, b, total);                                               \
    }                                                                                                                  \
    static void end_##R(const job *j, size_t panel, size_t lane, const stripe_place *s, const totals *total)           \
    {                                                                                                                  \
        end_rows(R, TILE_V, j, s->row, panel, lane, s->counts, total);                                                 \
    }
FOR_ROWS(MANY)

typedef void (*run_many)(const job *, const unpacked *, size_t, size_t, const stripe_place *, const block_place *,
                         totals *);
typedef void (*run_end)(const job *, size_t, size_t, const stripe_place *, const totals *);
#define MANY_NAME(R) many_##R,
#define END_NAME(R) end_##R,
static const run_many many_rows[ROWS_MAX] = {FOR_ROWS(MANY_NAME)};
static const run_end many_ends[ROWS_MAX] = {FOR_ROWS(END_NAME)};

/* One panel, TILE_V vectors of lanes from `lane` on, of all rows. */
static void multiply_many(const job *j, size_t panel, size_t lane)
{
    totals total[PASS_STRIPES];
    stripe_place place[PASS_STRIPES];
    unpacked codes;
    const size_t stripes = stripe_count(j->rows), words = in_bytes(j->w) ? QUADS : PAIRS;
    for (size_t stripe = 0; stripe < stripes; stripe++) {
        clear(ROWS_MAX, TILE_V, &total[stripe]);
        place[stripe] = place_stripe(j, panel, stripe);
        if (j->out_scale)
            for (size_t r = 0; r < place[stripe].rows; r++)
                fetch_out_scale(1, TILE_V, j, place[stripe].row + r, panel, lane);
    }
    for (size_t block = 0; block < j->c.blocks; block++) {
        const block_place b = place_block(&j->c, block);
        const size_t length = b.chains * b.units * UNIT;
        unpack_block(j, panel, b.k0, length, &codes);
        fetch_panel(j, panel + 1, b.group, b.k0, length);
        for (size_t stripe = 0; stripe < stripes; stripe++) {
            const stripe_place *s = &place[stripe];
            /* The next stripe's activations lie far from this one's. */
            if (stripe + 1 < stripes)
                for (size_t i = 0; i < length / UNIT * words * s[1].rows; i += 16)
                    __builtin_prefetch(s[1].x + b.k0 / UNIT * words * s[1].rows + i, 0, 3);
            if (block + 1 == j->c.blocks)
                fetch_result(j, s->row, s->rows, panel, lane);
            many_rows[s->rows - 1](j, &codes, panel, lane, s, &b, &total[stripe]);
        }
    }
    for (size_t stripe = 0; stripe < stripes; stripe++)
        many_ends[place[stripe].rows - 1](j, panel, lane, &place[stripe], &total[stripe]);
}
#endif

/* ---- threads and entry ---- */

static void work_pack(void *data, int part, int parts)
{
    const job *j = data;
    const size_t stripes = stripe_count(j->rows);
    for (size_t stripe = (size_t)part; stripe < stripes; stripe += (size_t)parts)
        peqa_pack_rows(j->w, j->in, j->x, j->ldx, j->in_scale, j->half_bank, j->row, j->rows, stripe);
}

static void work_multiply(void *data, int part, int parts)
{
    const job *j = data;
    const size_t panels = (size_t)j->w->panels;
    const size_t first = panels * (size_t)part / (size_t)parts;
    const size_t last = panels * (size_t)(part + 1) / (size_t)parts;
    if (j->rows <= FEW_ROWS) {
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

/* Parts of a multiplication: more than threads, so that one that comes late takes less, but each with panels enough to
 * take several at once. */
static int parts_for(const peqa_weight *w, int64_t threads)
{
    const int64_t most = w->panels / 8, parts = most < 8 * threads ? most : 8 * threads;
    return (int)(threads <= 1 ? 1 : parts < threads ? threads : parts);
}

/* Rows that the packed activations of a pass take room for; a call's first pass is its largest. */
INLINE size_t pass_room(size_t rows) { return rows ? stripe_room(stripe_count(rows), rows) : 0; }

/* Words of 32 bits of scratch that a call with `rows` rows needs. */
EXPORT int64_t peqa_quant_matmul_scratch(const peqa_weight *w, int64_t rows)
{
    const cuts c = cut(w);
    const size_t pass = smin((size_t)rows, ROWS_PER_PASS);
    return (int64_t)((size_t)w->segments * pass_room(pass) * row_words(w, &c) + 16);
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
    const size_t pass = smin((size_t)rows, ROWS_PER_PASS);
    job j = {.w = w, .c = c, .ldx = (size_t)ldx, .bias = bias, .group_scale = group_scale};
    j.half_bank = (int)half_bank;
    j.out_scale = row ? out_scale : 0;
    j.in_scale = row ? in_scale : 0;
    j.in.segments = j.in_scale ? (size_t)w->segments : 1;
    j.in.x = (int32_t *)(((uintptr_t)scratch + 63) / 64 * 64);
    j.in.steps = (float *)(j.in.x + j.in.segments * pass_room(pass) * input_words(w, &c));
    j.in.counts = (int32_t *)(j.in.steps + j.in.segments * pass_room(pass) * c.blocks);
    for (size_t done = 0; done < (size_t)rows; done += pass) {
        j.rows = smin(pass, (size_t)rows - done);
        j.x = x + done * (size_t)ldx;
        j.y = y + done * (size_t)w->out_features;
        j.row = row ? row + done : 0;
        j.group_row = group_scale && group_row ? group_row + done : 0;
        /* Sharing out costs more than packing a few rows here. */
        pool_run(pool, j.rows * c.kp * j.in.segments < 65536 ? 1 : (int)threads, work_pack, &j);
        pool_run(pool, parts_for(w, threads), work_multiply, &j);
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

EXPORT int64_t peqa_abi(void) { return 9; }
