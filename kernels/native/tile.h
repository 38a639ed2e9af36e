/* What every tile does at the ends: of a chain, of a block, of its rows.
 *
 * R (rows), V (vectors of lanes) and bits are compile-time constants wherever these are inlined.
 */
#ifndef PEQA_TILE_H
#define PEQA_TILE_H

#include "quant_matmul.h"

typedef struct {
    const peqa_weight *w;
    cuts c;
    packed_rows in;
    const float *x;
    size_t ldx;
    const float *bias;
    const void *in_scale, *out_scale, *group_scale; /* fp16 or fp32 */
    int half_bank;
    const int32_t *row, *group_row;
    float *y;
    size_t rows;
    size_t stretch; /* panels that all stripes of few rows take before the next ones */
} job;

/* Keeps the compiler from making `x` elsewhere or anew: it would gather all of a unit's activations in front and spill,
 * or read a word of codes again for each of its pairs. */
INLINE vi held(vi x)
{
#if VL == 16
    __asm__ volatile("" : "+v"(x));
#endif
    return x;
}

/* Of a panel: its first output, how many it has, its segment. */
INLINE const int32_t *panel_of(const job *j, size_t panel) { return j->w->panel + panel * 3; }

/* The first codes of the lanes from `lane` on (lanes >= PANEL lie in the next panels). */
INLINE const int32_t *words_at(const int bits, const job *j, size_t panel, size_t lane)
{
    panel += lane / PANEL;
    return j->w->codes + panel * (j->c.kp / UNIT) * (size_t)bits * PANEL + lane % PANEL;
}

/* Base scales or offsets of a group's lanes. */
INLINE vf base_load(const job *j, const void *values, size_t panel, size_t group, size_t lane)
{
    const size_t at = ((panel + lane / PANEL) * (size_t)j->w->groups + group) * PANEL + lane % PANEL;
    return __builtin_expect(j->w->half, 1) ? hload((const uint16_t *)values + at) : vload((const float *)values + at);
}

/* Lanes of row `row` of an unpadded table [rows, N] of fp16 or fp32; a panel that a segment's end cuts short reads only
 * its own outputs. */
INLINE vf table_load(const job *j, const void *table, const int half, size_t row, size_t panel, size_t lane)
{
    const int32_t *where = panel_of(j, panel + lane / PANEL);
    const size_t outputs = (size_t)where[1];
    lane %= PANEL;
    if (lane >= outputs)
        return vset(0.0f);
    const size_t at = row * (size_t)j->w->out_features + (size_t)where[0] + lane;
    return half ? hpart((const uint16_t *)table + at, outputs - lane) : vpart((const float *)table + at, outputs - lane);
}

INLINE vf bias_load(const job *j, size_t panel, size_t lane)
{
    return j->bias ? table_load(j, j->bias, 0, 0, panel, lane) : vset(0.0f);
}

/* The task's own factor on a row's outputs. */
INLINE vf out_factor(const job *j, size_t row, size_t panel, size_t lane)
{
    return table_load(j, j->out_scale, j->half_bank, (size_t)j->row[row], panel, lane);
}

/* The task's own factor on a group's scales. */
INLINE vf group_factor(const job *j, size_t row, size_t group, size_t panel, size_t lane)
{
    const size_t at = (size_t)j->group_row[row] * (size_t)j->w->groups + group;
    return table_load(j, j->group_scale, j->half_bank, at, panel, lane);
}

/* How chains end: their scale waits for the row's end; it is all rows' own, with offsets or without; or the row's task
 * has a factor on it. */
#define END_LATE 0
#define END_OFFSET 1
#define END_CENTRED 2
#define END_TASK 3
#define ENDS 4
#define END_ANY 4 /* to be found out */

INLINE int ends_of(const job *j)
{
    if (scale_at_end(j->w))
        return END_LATE;
    return j->group_row ? END_TASK : j->w->offsets ? END_OFFSET : END_CENTRED;
}

/* sum + scale * (a chain's integers, less what zero points take off them) */
INLINE vf add_term(const int offsets, vf scale, vf offset, vi part, vi count, vf sum)
{
    if (offsets)
        return vfma(offset, (vf)count, vfma(scale, ifloat(part), sum));
    return vfma(scale, ifloat(part + count), sum);
}

/* A group's scales and offsets of one panel in fp32. */
typedef struct {
    float scale[PANEL] __attribute__((aligned(64))), offset[PANEL] __attribute__((aligned(64)));
} scale_lanes;

/* Adds a chain's integers to the block's sums under their group's scales, which lie in `at_hand` or are read from the
 * weight; counts[r] is the row's own number of the chain, see packed_rows. A factor of one gives the bits that no factor
 * gives. */
INLINE void end_chain(const int R, const int V, const int ends, const job *j, size_t row, size_t panel, size_t group,
                      size_t lane, const int32_t *counts, const scale_lanes *at_hand, vi (*part)[MAX_V],
                      vf (*sum)[MAX_V])
{
    const int offsets = ends == END_TASK ? j->w->offsets != 0 : ends == END_OFFSET;
    vf scale[MAX_V], offset[MAX_V];
    UNROLL for (int v = 0; v < V; v++)
    {
        const size_t at = lane + (size_t)(v * VL);
        scale[v] = at_hand ? vload(at_hand->scale + at) : base_load(j, j->w->scales, panel, group, at);
        offset[v] = !offsets ? vset(0.0f)
                    : at_hand ? vload(at_hand->offset + at)
                              : base_load(j, j->w->offsets, panel, group, at);
    }
    UNROLL for (int r = 0; r < R; r++)
    {
        const vi count = held(iset(counts[r]));
        UNROLL for (int v = 0; v < V; v++)
        {
            vf s = scale[v], o = offset[v];
            if (ends == END_TASK) {
                const vf factor = group_factor(j, row + (size_t)r, group, panel, lane + (size_t)(v * VL));
                s *= factor;
                o *= factor;
            }
            sum[r][v] = add_term(offsets, s, o, part[r][v], count, sum[r][v]);
        }
    }
}

/* A tile's rows, summed over the blocks; in memory, since the registers are full. Left to itself the compiler would
 * keep them in registers and move them to and fro around each chain: hence the blindfold. */
typedef struct {
    float lanes[ROWS_MAX * MAX_V][VL] __attribute__((aligned(64)));
} totals;

INLINE totals *in_memory(totals *t)
{
    __asm__ volatile("" : "+r"(t) : : "memory");
    return t;
}

INLINE void clear(const int R, const int V, totals *t)
{
    UNROLL for (int i = 0; i < R * V; i++) vstore(t->lanes[i], vset(0.0f));
}

/* Adds a block's sums under its steps. */
INLINE void end_block(const int R, const int V, const float *steps, vf (*sum)[MAX_V], totals *t)
{
    UNROLL for (int r = 0; r < R; r++)
    {
        const vf step = vset(steps[r]);
        UNROLL for (int v = 0; v < V; v++)
            vstore(t->lanes[r * V + v], vfma(sum[r][v], step, vload(t->lanes[r * V + v])));
    }
}

/* Adds a chain's integers under its step where the scale waits for the row's end. */
INLINE void end_plain_chain(const int R, const int V, const float *steps, vi (*part)[MAX_V], totals *t)
{
    UNROLL for (int r = 0; r < R; r++)
    {
        const vf step = vset(steps[r]);
        UNROLL for (int v = 0; v < V; v++)
            vstore(t->lanes[r * V + v], vfma(ifloat(part[r][v]), step, vload(t->lanes[r * V + v])));
    }
}

/* The scale of a row's sum that has waited for its end; `less`: what zero points take off for each unit of theirs. */
INLINE vf end_plain_row(const job *j, size_t row, size_t panel, size_t lane, float less, vf total)
{
    vf scale = base_load(j, j->w->scales, panel, 0, lane);
    vf offset = j->w->offsets ? base_load(j, j->w->offsets, panel, 0, lane) : scale * vset((float)(1 << (j->w->bits - 1)));
    if (j->group_row) {
        const vf factor = group_factor(j, row, 0, panel, lane);
        scale *= factor;
        offset *= factor;
    }
    return vfma(offset, vset(less), scale * total);
}

/* Ends rows: the task's own factor, the bias, and out. `counts`: the rows' first ones. All factors are read before the first result is written: bank
 * and result have rows of one length, so that a row's factor often lies as far into its page as the result just
 * written, which the processor takes for the same. */
INLINE void end_rows(const int R, const int V, const job *j, size_t row, size_t panel, size_t lane,
                     const int32_t *counts, const totals *t)
{
    const size_t N = (size_t)j->w->out_features;
    vf result[ROWS_MAX][MAX_V];
    UNROLL for (int v = 0; v < V; v++)
    {
        const size_t at = lane + (size_t)(v * VL);
        const vf bias = bias_load(j, panel, at);
        UNROLL for (int r = 0; r < R; r++)
        {
            vf out = vset(1.0f);
            if (j->out_scale)
                out = out_factor(j, row + (size_t)r, panel, at);
            vf total = vload(t->lanes[r * V + v]);
            if (scale_at_end(j->w))
                total = end_plain_row(j, row + (size_t)r, panel, at, float_of(counts[r]), total);
            result[r][v] = vfma(out, total, bias);
        }
    }
    UNROLL for (int v = 0; v < V; v++)
    {
        const size_t at = (lane + (size_t)(v * VL)) % PANEL;
        const int32_t *where = panel_of(j, panel + (lane + (size_t)(v * VL)) / PANEL);
        UNROLL for (int r = 0; r < R; r++)
            if (at < (size_t)where[1])
                vput(j->y + (row + (size_t)r) * N + (size_t)where[0] + at, result[r][v], (size_t)where[1] - at);
    }
}

/* Asks for the task's factor of each row, which end_rows() multiplies by: each task's come from a place of their own,
 * and a step's weights have passed through the caches since they were last read. */
INLINE void fetch_out_scale(const int R, const int V, const job *j, size_t row, size_t panel, size_t lane)
{
    UNROLL for (int v = 0; v < V; v++)
    {
        const size_t at = lane + (size_t)(v * VL);
        const size_t n = (size_t)panel_of(j, panel + at / PANEL)[0] + at % PANEL;
        UNROLL for (int r = 0; r < R; r++)
        {
            const size_t place = (size_t)j->row[row + (size_t)r] * (size_t)j->w->out_features + n;
            __builtin_prefetch((const char *)j->out_scale + place * (j->half_bank ? 2 : 4), 0, 3);
        }
    }
}

/* Asks for where end_rows() will write: all stripes end one after the other, and would wait for line after line. */
INLINE void fetch_result(const job *j, size_t row, size_t rows, size_t panel, size_t lane)
{
    float *to = j->y + row * (size_t)j->w->out_features + (size_t)panel_of(j, panel)[0] + lane;
    for (size_t r = 0; r < rows; r++, to += j->w->out_features)
        for (size_t i = 0; i < TILE_V * VL; i += 16)
            __builtin_prefetch(to + i, 1, 3);
}

/* Asks for a group's scales and offsets of one panel. */
INLINE void fetch_scales(const job *j, size_t panel, size_t group)
{
    const size_t bytes = j->w->half ? 2 : 4, at = (panel * (size_t)j->w->groups + group) * PANEL * bytes;
    for (size_t i = 0; i < PANEL * bytes; i += 64) {
        __builtin_prefetch((const char *)j->w->scales + at + i, 0, 2);
        if (j->w->offsets)
            __builtin_prefetch((const char *)j->w->offsets + at + i, 0, 2);
    }
}

#endif
