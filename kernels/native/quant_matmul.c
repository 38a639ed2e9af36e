/* y[m,n] = bias[n] + out[row[m],n] * sum_g s[g,n] * group[group_row[m],g,n] * sum_{k in g} x[m,k] * in * (q - z)
 *
 * Lanes are outputs. For one row and one output the additions have one order, whatever else is in the batch: within a
 * piece of at most PIECE inputs one chain over k that starts from -zero * sum(x), then the piece's sum times its scale
 * is added to the total, piece after piece. Tiles of different heights only run several such chains side by side.
 */
#include "quant_matmul.h"
#include "codes.h"

#define NO_UNROLL _Pragma("GCC unroll 1")
#define MAX_V 8
#ifndef ROLL
#define ROLL 5 /* rows from which a word's codes are taken in a loop */
#endif
#define SHORT_PANELS ((size_t)1 << 16)  /* bytes of codes up to which several panels are fetched ahead */
#define CODES_AT_ONCE ((size_t)1 << 18) /* bytes of codes that stay in the second cache level for all blocks of rows */

typedef struct {
    const peqa_weight *w;
    cuts c;
    packed_rows in;
    const float *x;
    size_t ldx;
    const float *in_scale, *bias, *out_scale, *group_scale;
    const int32_t *row, *group_row;
    float *y;
    size_t rows;
} job;

INLINE size_t panel_bytes(const job *j) { return j->c.kp * PANEL * (size_t)j->w->width / 8; }

/* Codes at padded input k, of the lanes from `lane` on (lanes >= PANEL lie in the next panels). */
INLINE const int32_t *words_at(const int width, const job *j, size_t panel, size_t k, size_t lane)
{
    panel += lane / PANEL;
    return (const int32_t *)j->w->codes + (panel * j->c.kp + k) / (size_t)(32 / width) * PANEL + lane % PANEL;
}

INLINE const int8_t *bytes_at(const job *j, size_t panel, size_t k, size_t lane)
{
    panel += lane / PANEL;
    return (const int8_t *)j->w->codes + (panel * j->c.kp + k) * PANEL + lane % PANEL;
}

/* ---- scales, totals, results ---- */

/* Lanes of an unpadded bank row; a panel that a segment's end cuts short reads only its own outputs. */
INLINE vf bank_load(const float *p, size_t lane, size_t outputs)
{
    return lane < outputs ? vpart(p + lane, outputs - lane) : vset(0.0f);
}

/* s0 of the piece's group, times the row's own where it has one. */
INLINE vf scale_of(const job *j, vf s0, size_t row, size_t group, const int32_t *panel, size_t lane)
{
    if (!j->group_row)
        return s0;
    const size_t at = ((size_t)j->group_row[row] * (size_t)j->w->groups + group) * (size_t)j->w->out_features;
    return s0 * bank_load(j->group_scale + at + panel[0], lane, (size_t)panel[1]);
}

/* The row's own factor and the bias, as both end a row. */
INLINE vf finish(const job *j, size_t row, const int32_t *panel, size_t lane, vf total)
{
    const size_t outputs = (size_t)panel[1], n = (size_t)panel[0], N = (size_t)j->w->out_features;
    const vf bias = j->bias ? bank_load(j->bias + n, lane, outputs) : vset(0.0f);
    const vf out = j->out_scale ? bank_load(j->out_scale + (size_t)j->row[row] * N + n, lane, outputs) : vset(1.0f);
    return vfma(out, total, bias);
}

INLINE void store(const job *j, size_t row, const int32_t *panel, size_t lane, vf total)
{
    const size_t outputs = (size_t)panel[1], n = (size_t)panel[0], N = (size_t)j->w->out_features;
    if (lane < outputs)
        vput(j->y + row * N + n + lane, total, outputs - lane);
}

/* Start of a piece's chain. */
INLINE vf chain_start(const job *j, size_t panel, size_t group, size_t lane, float sum)
{
    if (!j->w->zeros)
        return vset(0.0f);
    return vload(j->w->zeros + ((panel + lane / PANEL) * (size_t)j->w->groups + group) * PANEL + lane % PANEL) *
           vset(-sum);
}

INLINE vf base_scale(const job *j, size_t panel, size_t group, size_t lane)
{
    return vload(j->w->scales + ((panel + lane / PANEL) * (size_t)j->w->groups + group) * PANEL + lane % PANEL);
}

/* ---- tiles: codes go straight into registers ---- */

INLINE void multiply(const int R, const int V, const float *xk, const vf *q, vf (*part)[MAX_V])
{
    UNROLL for (int r = 0; r < R; r++)
    {
        const vf x = vset(xk[r]);
        UNROLL for (int v = 0; v < V; v++) part[r][v] = vfma(x, q[v], part[r][v]);
    }
}

/* The chains of one piece of bytes: `from` is its first code, `xk` its first activation. */
INLINE void piece_of_bytes(const int R, const int V, const job *j, size_t panel, size_t lane, size_t k0, size_t length,
                           const float *xk, vf (*part)[MAX_V])
{
    const int8_t *from[MAX_V];
    UNROLL for (int v = 0; v < V; v++) from[v] = bytes_at(j, panel, k0, lane + (size_t)(v * VL));
    for (size_t at = 0; at < length * PANEL; at += PANEL, xk += R) {
        vf q[MAX_V];
        UNROLL for (int v = 0; v < V; v++) q[v] = decode8(from[v] + at);
        multiply(R, V, xk, q, part);
    }
}

/* The same for words of several codes. */
INLINE void piece_of_words(const int R, const int V, const int width, const job *j, size_t panel, size_t lane,
                           size_t k0, size_t length, const float *xk, vf (*part)[MAX_V])
{
    const decoder d = decoder_for(width);
    const int32_t *from[MAX_V];
    UNROLL for (int v = 0; v < V; v++) from[v] = words_at(width, j, panel, k0, lane + (size_t)(v * VL));
    for (size_t at = 0; at < length / (size_t)(32 / width) * PANEL; at += PANEL) {
        vi word[MAX_V];
        UNROLL for (int v = 0; v < V; v++) word[v] = iload(from[v] + at);
        if (R >= ROLL) {
            /* Not unrolled: gcc would move all decoding to the front and spill. */
            NO_UNROLL for (int i = 0; i < 32 / width; i++, xk += R)
            {
                vf q[MAX_V];
                UNROLL for (int v = 0; v < V; v++)
                {
                    q[v] = decode(d, width, word[v], 0);
                    word[v] = next_code(width, word[v]);
                }
                multiply(R, V, xk, q, part);
            }
        } else {
            UNROLL for (int i = 0; i < 32 / width; i++, xk += R)
                UNROLL for (int v = 0; v < V; v++)
                {
                    const vf q = decode(d, width, word[v], i);
                    UNROLL for (int r = 0; r < R; r++) part[r][v] = vfma(vset(xk[r]), q, part[r][v]);
                }
        }
    }
}

/* Asks for what the next pass over `panels` panels reads of this piece. Short panels end before the hardware's own
 * prefetch has settled (8 rows of a cold 4096 x 4096: 1.45 ms without, 1.24 with); several long ones would leave the
 * cache again before they are read (1 row: 0.39 ms without, 0.57 with). */
INLINE void fetch_ahead(const int width, const job *j, size_t panel, size_t panels, size_t group, size_t k0,
                        size_t length)
{
    for (size_t next = panel + panels; next < panel + 2 * panels; next++) {
        const char *codes = (const char *)j->w->codes + (next * j->c.kp + k0) * PANEL * (size_t)width / 8;
        const size_t at = (next * (size_t)j->w->groups + group) * PANEL;
        for (size_t i = 0; i < length * PANEL * (size_t)width / 8; i += 64)
            __builtin_prefetch(codes + i, 0, 2);
        for (size_t i = 0; i < PANEL; i += 16) {
            __builtin_prefetch(j->w->scales + at + i, 0, 2);
            if (j->w->zeros)
                __builtin_prefetch(j->w->zeros + at + i, 0, 2);
        }
    }
}

/* Asks for the task's factor of each row, which finish() multiplies by: each task's come from a place of their own, and
 * a step's weights have passed through the caches since they were last read. */
INLINE void fetch_out_scale(const int R, const int V, const job *j, size_t panel, size_t lane, size_t row)
{
    UNROLL for (int v = 0; v < V; v++)
    {
        const size_t at = lane + (size_t)(v * VL);
        const size_t n = (size_t)j->w->panel[(panel + at / PANEL) * 3] + at % PANEL;
        UNROLL for (int r = 0; r < R; r++)
            __builtin_prefetch(j->out_scale + (size_t)j->row[row + (size_t)r] * (size_t)j->w->out_features + n, 0, 3);
    }
}

/* R rows of one block times V vectors of lanes, from `lane` of `panel` on; R, V and width are compile-time constants
 * wherever this is inlined. */
INLINE void tile(const int R, const int V, const int width, const job *j, size_t panel, size_t lane, size_t block)
{
    const size_t row = block_start(block, j->rows), panels = V * VL > PANEL ? V * VL / PANEL : 1;
    const int ahead = block == 0 && lane == 0 && (panels == 1 || panels * panel_bytes(j) <= SHORT_PANELS);
    const size_t segment = j->in.segments > 1 ? (size_t)j->w->panel[panel * 3 + 2] : 0;
    const float *x = j->in.x + (segment * j->rows + row) * j->c.kp;
    const float *sums = j->in.sums + (segment * j->rows + row) * j->c.pieces;
    vf total[ROWS_MAX][MAX_V], part[ROWS_MAX][MAX_V];
    if (j->out_scale)
        fetch_out_scale(R, V, j, panel, lane, row);
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) total[r][v] = vset(0.0f);
    for (size_t piece = 0; piece < j->c.pieces; piece++, sums += R) {
        const size_t group = piece / j->c.per_group, k0 = piece_start(&j->c, piece);
        const size_t length = piece_length(&j->c, piece);
        if (ahead)
            fetch_ahead(width, j, panel, panels, group, k0, length);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < V; v++) part[r][v] =
                chain_start(j, panel, group, lane + (size_t)(v * VL), sums[r]);
        if (width == 8)
            piece_of_bytes(R, V, j, panel, lane, k0, length, x + k0 * (size_t)R, part);
        else
            piece_of_words(R, V, width, j, panel, lane, k0, length, x + k0 * (size_t)R, part);
        UNROLL for (int v = 0; v < V; v++)
        {
            const size_t at = lane + (size_t)(v * VL);
            const vf s0 = base_scale(j, panel, group, at);
            const int32_t *where = j->w->panel + (panel + at / PANEL) * 3;
            UNROLL for (int r = 0; r < R; r++) total[r][v] =
                vfma(scale_of(j, s0, row + (size_t)r, group, where, at % PANEL), part[r][v], total[r][v]);
        }
    }
    /* All factors are read before the first result is written: bank and result have rows of one length, so that a
     * row's factor often lies as far into its page as the result just written, which the processor takes for the same. */
    if (j->out_scale || j->bias)
        UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++)
        {
            const size_t at = lane + (size_t)(v * VL);
            const int32_t *where = j->w->panel + (panel + at / PANEL) * 3;
            total[r][v] = finish(j, row + (size_t)r, where, at % PANEL, total[r][v]);
        }
    UNROLL for (int v = 0; v < V; v++) UNROLL for (int r = 0; r < R; r++)
    {
        const size_t at = lane + (size_t)(v * VL);
        store(j, row + (size_t)r, j->w->panel + (panel + at / PANEL) * 3, at % PANEL, total[r][v]);
    }
}

/* One block of R rows times the panels first..last. Few rows take several panels at once: that many chains hide the
 * latency of an addition. */
#define FEW_V(R) (VL == 16 ? ((R) == 1 ? 8 : (R) == 2 ? 4 : TILE_V) : (R) <= 2 ? 4 : TILE_V)
#define TILE(R, WIDTH)                                                                                                 \
    static void tile_##R##_##WIDTH(const job *j, size_t first, size_t last, size_t block)                              \
    {                                                                                                                  \
        const size_t wide = FEW_V(R) * VL / PANEL;                                                                     \
        size_t panel = first;                                                                                          \
        for (; wide > 1 && panel + wide <= last; panel += wide) {                                                      \
            if (j->in.segments > 1 && j->w->panel[panel * 3 + 2] != j->w->panel[(panel + wide - 1) * 3 + 2])           \
                break; /* the panels' activations differ */                                                            \
            tile(R, FEW_V(R), WIDTH, j, panel, 0, block);                                                              \
        }                                                                                                              \
        for (; panel < last; panel++)                                                                                  \
            for (size_t lane = 0; lane < PANEL; lane += TILE_V * VL)                                                   \
                tile(R, TILE_V, WIDTH, j, panel, lane, block);                                                         \
    }
#define TILES_4(W) TILE(1, W) TILE(2, W) TILE(3, W) TILE(4, W)
#define NAMES_4(W) tile_1_##W, tile_2_##W, tile_3_##W, tile_4_##W
#if ROWS_MAX == 12
#define TILES_8(W) TILES_4(W) TILE(5, W) TILE(6, W) TILE(7, W) TILE(8, W)
#define NAMES_8(W) NAMES_4(W), tile_5_##W, tile_6_##W, tile_7_##W, tile_8_##W
#define TILES(W) TILES_8(W) TILE(9, W) TILE(10, W) TILE(11, W) TILE(12, W)
#define NAMES(W) NAMES_8(W), tile_9_##W, tile_10_##W, tile_11_##W, tile_12_##W
#else
#define TILES(W) TILES_4(W)
#define NAMES(W) NAMES_4(W)
#endif
TILES(2)
TILES(4)
TILES(8)

typedef void (*run_tile)(const job *, size_t, size_t, size_t);
static const run_tile tiles[3][ROWS_MAX] = {{NAMES(2)}, {NAMES(4)}, {NAMES(8)}};

/* ---- threads and entry ---- */

static void work_pack(void *data, int part, int parts)
{
    const job *j = data;
    const size_t blocks = block_count(j->rows);
    for (size_t block = (size_t)part; block < blocks; block += (size_t)parts)
        peqa_pack_rows(j->w, j->in, j->x, j->ldx, j->in_scale, j->row, j->rows, block);
}

static void work_multiply(void *data, int part, int parts)
{
    const job *j = data;
    const size_t panels = (size_t)j->w->panels;
    const size_t first = panels * (size_t)part / (size_t)parts;
    const size_t last = panels * (size_t)(part + 1) / (size_t)parts;
    const run_tile *table = tiles[j->w->width == 2 ? 0 : j->w->width == 4 ? 1 : 2];
    const size_t bytes = panel_bytes(j), stretch = bytes < CODES_AT_ONCE ? CODES_AT_ONCE / bytes : 1;
    for (size_t panel = first; panel < last; panel += stretch)
        for (size_t block = 0; block < block_count(j->rows); block++) {
            const size_t rows = block_start(block + 1, j->rows) - block_start(block, j->rows);
            table[rows - 1](j, panel, smin(panel + stretch, last), block);
        }
}

/* Parts of a multiplication: more than threads, so that one that comes late takes less, but each with panels enough to
 * take several at once. */
static int parts_for(const peqa_weight *w, int64_t threads)
{
    const int64_t most = w->panels / 16, parts = most < 4 * threads ? most : 4 * threads;
    return (int)(threads <= 1 ? 1 : parts < threads ? threads : parts);
}

/* Rows of one pass: their packed activations should stay in the second cache level. */
static size_t rows_per_pass(const cuts *c)
{
    const size_t fit = (size_t)1 << 18; /* floats: 1 MiB */
    const size_t rows = fit / c->kp / ROWS_MAX * ROWS_MAX;
    return rows < 2 * ROWS_MAX ? 2 * ROWS_MAX : rows > 192 ? 192 : rows;
}

/* Floats of scratch that a call with `rows` rows needs. */
EXPORT int64_t peqa_quant_matmul_scratch(const peqa_weight *w, int64_t rows)
{
    const cuts c = cut(w);
    const size_t pass = smin((size_t)rows, rows_per_pass(&c));
    return (int64_t)((size_t)w->segments * pass * (c.kp + c.pieces) + 16);
}

/* x [rows, ldx >= in_features], y [rows, out_features]; out_scale [*, N], in_scale [*, segments, K] go with `row`,
 * group_scale [*, G, N] with `group_row`; any of these may be NULL. scratch: see above. */
EXPORT void peqa_quant_matmul(const peqa_weight *w, peqa_pool *pool, int64_t threads, float *scratch,
                              const float *x, int64_t ldx, int64_t rows, float *y, const float *bias,
                              const float *out_scale, const float *in_scale, const float *group_scale,
                              const int32_t *row, const int32_t *group_row)
{
    const cuts c = cut(w);
    const size_t pass = smin((size_t)rows, rows_per_pass(&c));
    job j = {.w = w, .c = c, .ldx = (size_t)ldx, .bias = bias, .group_scale = group_scale};
    j.out_scale = row ? out_scale : 0;
    j.in_scale = row ? in_scale : 0;
    j.in.segments = j.in_scale ? (size_t)w->segments : 1;
    j.in.x = (float *)(((uintptr_t)scratch + 63) / 64 * 64);
    j.in.sums = j.in.x + j.in.segments * pass * c.kp;
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

/* A pool's thread lives here. */
EXPORT void peqa_pool_serve(peqa_pool *pool) { pool_serve(pool); }

EXPORT int64_t peqa_abi(void) { return 4; }
