/* y[m,n] = bias[n] + out[row[m],n] * sum_g s[g,n] * group[group_row[m],g,n] * sum_{k in g} x[m,k] * in * (q - z)
 *
 * Lanes are outputs. For one row and one output the additions have one order, whatever else is in the batch: within a
 * piece of at most PIECE inputs one chain over k that starts from -zero * sum(x), then the piece's sum times its scale
 * is added to the total, piece after piece. Tiles of different heights only run several such chains side by side.
 */
#include "quant_matmul.h"

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
    float *thread_scratch; /* per thread: unpacked codes, then totals [rows][PANEL] */
    size_t thread_floats;
} job;

/* ---- codes to floats ---- */

#if VL == 16
typedef struct {
    __m512 table;
} decoder;
INLINE decoder decoder_for(const int width)
{
    /* The permutation looks at the low four bits only, so neither mask nor conversion is needed. */
    decoder d;
    d.table = width == 4 ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
                         : _mm512_setr_ps(0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1);
    return d;
}
INLINE vf decode(const decoder d, const int width, vi word, const int j)
{
    return (vf)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)word, (unsigned)(j * width)), d.table);
}
#else
typedef struct {
    int unused;
} decoder;
INLINE decoder decoder_for(const int width)
{
    decoder d = {width};
    return d;
}
INLINE vf decode(const decoder d, const int width, vi word, const int j)
{
    (void)d;
    return __builtin_convertvector((word << (32 - width * (j + 1))) >> (32 - width), vf);
}
#endif

INLINE vf decode8(const int8_t *p)
{
#if VL == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif VL == 8
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vi wide = {p[0], p[1], p[2], p[3]};
    return __builtin_convertvector(wide, vf);
#endif
}

/* Codes of piece at padded input k, of the lanes from `lane` on (lanes >= PANEL lie in the next panels). */
INLINE const int32_t *words_at(const job *j, size_t panel, size_t k, size_t lane)
{
    panel += lane / PANEL;
    return (const int32_t *)j->w->codes + ((panel * j->c.kp + k) / j->c.per_word) * PANEL + lane % PANEL;
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
    if (__builtin_expect(lane + VL <= outputs, 1))
        return vload(p + lane);
    float tmp[VL] = {0};
    for (size_t i = lane; i < outputs; i++)
        tmp[i - lane] = p[i];
    return vload(tmp);
}

/* s0 of the piece's group, times the row's own where it has one. */
INLINE vf scale_of(const job *j, vf s0, size_t row, size_t group, const int32_t *panel, size_t lane)
{
    if (!j->group_row)
        return s0;
    const size_t at = ((size_t)j->group_row[row] * (size_t)j->w->groups + group) * (size_t)j->w->out_features;
    return s0 * bank_load(j->group_scale + at + panel[0], lane, (size_t)panel[1]);
}

INLINE void store_row(const job *j, size_t row, const int32_t *panel, size_t lane, vf total)
{
    const size_t outputs = (size_t)panel[1], n = (size_t)panel[0], N = (size_t)j->w->out_features;
    if (lane >= outputs)
        return;
    if (j->out_scale || j->bias) {
        const vf bias = j->bias ? bank_load(j->bias + n, lane, outputs) : vset(0.0f);
        const vf out = j->out_scale ? bank_load(j->out_scale + (size_t)j->row[row] * N + n, lane, outputs) : vset(1.0f);
        total = vfma(out, total, bias);
    }
    float *to = j->y + row * N + n;
    if (lane + VL <= outputs) {
        vstore(to + lane, total);
        return;
    }
    for (size_t i = lane; i < outputs; i++)
        to[i] = total[i - lane];
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

/* ---- few rows: codes straight into registers ---- */

/* R rows, V vectors of lanes from `lane` of `panel` on, width bits: all compile-time constants where this is inlined. */
INLINE void direct(const int R, const int V, const int width, const job *j, size_t panel, size_t lane)
{
    const decoder d = decoder_for(width);
    const size_t segment = j->in.segments > 1 ? (size_t)j->w->panel[panel * 3 + 2] : 0;
    const float *x = j->in.x + segment * j->rows * j->c.kp;
    const float *sums = j->in.sums + segment * j->rows * j->c.pieces;
    vf total[DIRECT_MAX][16], part[DIRECT_MAX][16];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++)
            total[r][v] = vset(0.0f);
    for (size_t piece = 0; piece < j->c.pieces; piece++) {
        const size_t group = piece / j->c.per_group, start = piece_start(&j->c, piece);
        const size_t length = piece_length(&j->c, piece);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int v = 0; v < V; v++)
                part[r][v] = chain_start(j, panel, group, lane + (size_t)(v * VL), sums[piece * (size_t)R + (size_t)r]);
        const float *xk = x + start * (size_t)R;
        if (width == 8) {
            for (size_t k = 0; k < length; k++, xk += R)
#pragma GCC unroll 16
                for (int v = 0; v < V; v++) {
                    const vf q = decode8(bytes_at(j, panel, start, lane + (size_t)(v * VL)) + k * PANEL);
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++)
                        part[r][v] = vfma(vset(xk[r]), q, part[r][v]);
                }
        } else {
            for (size_t k = 0; k < length; k += (size_t)(32 / width)) {
                vi word[16];
#pragma GCC unroll 16
                for (int v = 0; v < V; v++)
                    word[v] = iload(words_at(j, panel, start + k, lane + (size_t)(v * VL)));
#pragma GCC unroll 16
                for (int i = 0; i < 32 / width; i++, xk += R)
#pragma GCC unroll 16
                    for (int v = 0; v < V; v++) {
                        const vf q = decode(d, width, word[v], i);
#pragma GCC unroll 16
                        for (int r = 0; r < R; r++)
                            part[r][v] = vfma(vset(xk[r]), q, part[r][v]);
                    }
            }
        }
#pragma GCC unroll 16
        for (int v = 0; v < V; v++) {
            const size_t at = lane + (size_t)(v * VL);
            const vf s0 = base_scale(j, panel, group, at);
            const int32_t *where = j->w->panel + (panel + at / PANEL) * 3;
#pragma GCC unroll 16
            for (int r = 0; r < R; r++)
                total[r][v] = vfma(scale_of(j, s0, (size_t)r, group, where, at % PANEL), part[r][v], total[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
        const size_t at = lane + (size_t)(v * VL);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            store_row(j, (size_t)r, j->w->panel + (panel + at / PANEL) * 3, at % PANEL, total[r][v]);
    }
}

/* Vectors per pass for R rows: as many chains as the registers hold, at least enough to hide the latency. */
#define DIRECT_V(R) (VL == 16 ? ((R) == 1 ? 8 : (R) == 2 ? 4 : 2) : (R) <= 2 ? 4 : 2)

#define DIRECT(R, WIDTH)                                                                                               \
    static void direct_##R##_##WIDTH(const job *j, size_t first, size_t last)                                          \
    {                                                                                                                  \
        size_t panel = first;                                                                                          \
        if (DIRECT_V(R) * VL > PANEL)                                                                                  \
            for (const size_t step = DIRECT_V(R) * VL / PANEL; panel + step <= last; panel += step) {                  \
                if (j->in.segments > 1 &&                                                                              \
                    j->w->panel[panel * 3 + 2] != j->w->panel[(panel + step - 1) * 3 + 2])                             \
                    break;                                                                                             \
                direct(R, DIRECT_V(R), WIDTH, j, panel, 0);                                                            \
            }                                                                                                          \
        for (; panel < last; panel++)                                                                                  \
            for (size_t lane = 0; lane < PANEL; lane += TILE_V * VL)                                                   \
                direct(R, TILE_V, WIDTH, j, panel, lane);                                                              \
    }
DIRECT(1, 2) DIRECT(2, 2) DIRECT(3, 2) DIRECT(4, 2)
DIRECT(1, 4) DIRECT(2, 4) DIRECT(3, 4) DIRECT(4, 4)
DIRECT(1, 8) DIRECT(2, 8) DIRECT(3, 8) DIRECT(4, 8)

static void few_rows(const job *j, size_t first, size_t last)
{
    typedef void (*run)(const job *, size_t, size_t);
    static const run table[3][DIRECT_MAX] = {{direct_1_2, direct_2_2, direct_3_2, direct_4_2},
                                             {direct_1_4, direct_2_4, direct_3_4, direct_4_4},
                                             {direct_1_8, direct_2_8, direct_3_8, direct_4_8}};
    table[j->w->width == 2 ? 0 : j->w->width == 4 ? 1 : 2][j->rows - 1](j, first, last);
}

/* ---- many rows: a stretch of a panel unpacked once, then multiplied by every block of rows ---- */

INLINE void unpack_words(const int width, const job *j, size_t panel, size_t start, size_t length, float *to)
{
    const decoder d = decoder_for(width);
    for (size_t k = 0; k < length; k += (size_t)(32 / width), to += PANEL * 32 / width)
        for (size_t lane = 0; lane < PANEL; lane += VL) {
            const vi word = iload(words_at(j, panel, start + k, lane));
#pragma GCC unroll 16
            for (int i = 0; i < 32 / width; i++)
                vstore(to + (size_t)i * PANEL + lane, decode(d, width, word, i));
        }
}

static void unpack(const job *j, size_t panel, size_t start, size_t length, float *to)
{
    if (j->w->width == 4) {
        unpack_words(4, j, panel, start, length, to);
    } else if (j->w->width == 2) {
        unpack_words(2, j, panel, start, length, to);
    } else {
        const int8_t *from = bytes_at(j, panel, start, 0);
        for (size_t i = 0; i < length * PANEL; i += VL)
            vstore(to + i, decode8(from + i));
    }
}

/* One piece for R rows and TILE_V vectors; `q` holds its codes as floats, [length][PANEL]. */
INLINE void tile(const int R, const job *j, size_t panel, size_t lane, size_t piece, size_t length, const float *q,
                 const float *xk, const float *sums, float *totals, size_t first_row)
{
    const size_t group = piece / j->c.per_group;
    const int32_t *where = j->w->panel + panel * 3;
    vf part[ROWS_MAX][TILE_V];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < TILE_V; v++)
            part[r][v] = chain_start(j, panel, group, lane + (size_t)(v * VL), sums[r]);
    for (size_t k = 0; k < length; k++, xk += R, q += PANEL) {
        vf w[TILE_V];
#pragma GCC unroll 16
        for (int v = 0; v < TILE_V; v++)
            w[v] = vload(q + lane + v * VL);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const vf x = vset(xk[r]);
#pragma GCC unroll 16
            for (int v = 0; v < TILE_V; v++)
                part[r][v] = vfma(x, w[v], part[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int v = 0; v < TILE_V; v++) {
        const size_t at = lane + (size_t)(v * VL);
        const vf s0 = base_scale(j, panel, group, at);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            float *total = totals + (size_t)r * PANEL + at;
            vstore(total, vfma(scale_of(j, s0, first_row + (size_t)r, group, where, at), part[r][v], vload(total)));
        }
    }
}

#define TILE(R)                                                                                                        \
    static void tile_##R(const job *j, size_t panel, size_t piece, size_t length, const float *q, const float *xk,     \
                         const float *sums, float *totals, size_t first_row)                                           \
    {                                                                                                                  \
        for (size_t lane = 0; lane < PANEL; lane += TILE_V * VL)                                                       \
            tile(R, j, panel, lane, piece, length, q, xk, sums, totals, first_row);                                    \
    }
TILE(3) TILE(4) TILE(5) TILE(6)
#if ROWS_MAX == 12
TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif

typedef void (*run_tile)(const job *, size_t, size_t, size_t, const float *, const float *, const float *, float *,
                         size_t);
static const run_tile tiles[ROWS_MAX + 1] = {0, 0, 0, tile_3, tile_4, tile_5, tile_6,
#if ROWS_MAX == 12
                                             tile_7, tile_8, tile_9, tile_10, tile_11, tile_12
#endif
};

static void many_rows(const job *j, size_t first, size_t last, float *scratch)
{
    const cuts c = j->c;
    const size_t blocks = block_count(j->rows);
    const size_t stretch = c.per_group == 1 && c.kg < PIECE ? PIECE / c.kg : 1; /* pieces unpacked at once */
    float *codes = scratch, *totals = scratch + PIECE * PANEL;
    for (size_t panel = first; panel < last; panel++) {
        const int32_t *where = j->w->panel + panel * 3;
        const size_t segment = j->in.segments > 1 ? (size_t)where[2] : 0;
        for (size_t i = 0; i < j->rows * PANEL; i += VL)
            vstore(totals + i, vset(0.0f));
        for (size_t piece = 0; piece < c.pieces; piece += stretch) {
            const size_t end = smin(piece + stretch, c.pieces), start = piece_start(&c, piece);
            const size_t length = stretch > 1 ? (end - piece) * c.kg : piece_length(&c, piece);
            unpack(j, panel, start, length, codes);
            for (size_t block = 0; block < blocks; block++) {
                const size_t row = block_start(block, j->rows), n = block_start(block + 1, j->rows) - row;
                const float *x = j->in.x + (segment * j->rows + row) * c.kp;
                const float *sums = j->in.sums + (segment * j->rows + row) * c.pieces;
                const run_tile run = tiles[n];
                for (size_t p = piece; p < end; p++) {
                    const size_t at = piece_start(&c, p);
                    run(j, panel, p, piece_length(&c, p), codes + (at - start) * PANEL, x + at * n, sums + p * n,
                        totals + row * PANEL, row);
                }
            }
        }
        for (size_t row = 0; row < j->rows; row++)
            for (size_t lane = 0; lane < PANEL; lane += VL)
                store_row(j, row, where, lane, vload(totals + row * PANEL + lane));
    }
}

/* ---- threads and entry ---- */

static void work_pack(void *data, int thread, int threads)
{
    const job *j = data;
    const size_t blocks = block_count(j->rows);
    for (size_t block = (size_t)thread; block < blocks; block += (size_t)threads)
        peqa_pack_rows(j->w, j->in, j->x, j->ldx, j->in_scale, j->row, j->rows, block);
}

static void work_multiply(void *data, int thread, int threads)
{
    const job *j = data;
    const size_t panels = (size_t)j->w->panels;
    const size_t first = panels * (size_t)thread / (size_t)threads;
    const size_t last = panels * (size_t)(thread + 1) / (size_t)threads;
    if (j->rows <= DIRECT_MAX)
        few_rows(j, first, last);
    else
        many_rows(j, first, last, j->thread_scratch + (size_t)thread * j->thread_floats);
}

/* Rows of one pass: their packed activations should stay in the second cache level. */
static size_t rows_per_pass(const cuts *c)
{
    const size_t fit = (size_t)1 << 18; /* floats: 1 MiB */
    const size_t rows = fit / c->kp / ROWS_MAX * ROWS_MAX;
    return rows < 2 * ROWS_MAX ? 2 * ROWS_MAX : rows > 192 ? 192 : rows;
}

/* Floats of scratch that a call with `rows` rows and `threads` threads needs. */
EXPORT int64_t peqa_quant_matmul_scratch(const peqa_weight *w, int64_t rows, int64_t threads)
{
    const cuts c = cut(w);
    const size_t pass = smin((size_t)rows, rows_per_pass(&c));
    return (int64_t)((size_t)w->segments * pass * (c.kp + c.pieces) +
                     (size_t)threads * (PIECE * PANEL + pass * PANEL) + 64);
}

/* x [rows, ldx >= in_features], y [rows, out_features]; out_scale [*, N], in_scale [*, segments, K] go with `row`,
 * group_scale [*, G, N] with `group_row`; any of these may be NULL. scratch: see above. */
EXPORT void peqa_quant_matmul(const peqa_weight *w, const peqa_pool *pool, int64_t threads, float *scratch, const float *x,
                       int64_t ldx, int64_t rows, float *y, const float *bias, const float *out_scale,
                       const float *in_scale, const float *group_scale, const int32_t *row, const int32_t *group_row)
{
    const cuts c = cut(w);
    const size_t pass = smin((size_t)rows, rows_per_pass(&c));
    job j = {.w = w, .c = c, .ldx = (size_t)ldx, .bias = bias, .group_scale = group_scale};
    j.out_scale = row ? out_scale : 0;
    j.in_scale = row ? in_scale : 0;
    j.in.segments = j.in_scale ? (size_t)w->segments : 1;
    j.in.x = (float *)(((uintptr_t)scratch + 63) / 64 * 64);
    j.in.sums = j.in.x + j.in.segments * pass * c.kp;
    j.thread_scratch = j.in.sums + j.in.segments * pass * c.pieces;
    j.thread_floats = PIECE * PANEL + pass * PANEL;
    for (size_t done = 0; done < (size_t)rows; done += pass) {
        j.rows = smin(pass, (size_t)rows - done);
        j.x = x + done * (size_t)ldx;
        j.y = y + done * (size_t)w->out_features;
        j.row = row ? row + done : 0;
        j.group_row = group_scale && group_row ? group_row + done : 0;
        /* A parallel region costs more than packing a few rows here. */
        pool_run(pool, j.rows * c.kp * j.in.segments < 65536 ? 1 : (int)threads, work_pack, &j);
        pool_run(pool, (int)threads, work_multiply, &j);
    }
}

EXPORT int64_t peqa_abi(void) { return 2; }
