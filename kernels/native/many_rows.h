/* Many rows: a block of a panel's codes is unpacked once, and all stripes read it from the first cache level. */
#ifndef PEQA_MANY_ROWS_H
#define PEQA_MANY_ROWS_H

#include "tile.h"

/* One block of one panel as pairs, [pairs][PANEL]. */
typedef struct {
    int32_t pair[CHAIN / 2][PANEL] __attribute__((aligned(64)));
} unpacked;

INLINE void unpack(const int bits, const int32_t *from, size_t units, unpacked *to)
{
    const int per_word = PAIRS_OF(bits);
    for (size_t unit = 0; unit < units; unit++, from += bits * PANEL)
        for (int lane = 0; lane < PANEL; lane += VL) {
            int32_t(*pair)[PANEL] = to->pair + unit * PAIRS;
            vi spare = iset(0);
            UNROLL for (int w = 0; w < bits; w++)
            {
                vi word = iload(from + w * PANEL + lane);
                UNROLL for (int p = 0; p < per_word; p++)
                {
                    istore(pair[w * per_word + p] + lane, low_pair(bits, word));
                    word = next_pair(bits, word);
                }
                if (bits == 3)
                    spare |= spare_bit(word, w);
            }
            if (bits == 3)
                istore(pair[PAIRS - 1] + lane, spare);
        }
}

static void unpack_block(const job *j, size_t panel, size_t k0, size_t length, unpacked *to)
{
    const size_t units = length / UNIT;
    const int32_t *from =
        j->w->codes + (panel * j->c.kp + k0) / UNIT * (size_t)j->w->bits * PANEL;
    switch (j->w->bits) {
    case 2: unpack(2, from, units, to); break;
    case 3: unpack(3, from, units, to); break;
    case 4: unpack(4, from, units, to); break;
    default: unpack(8, from, units, to); break;
    }
}

/* Keeps the compiler from moving the making of `x` elsewhere: it would gather all of a unit's in front and spill. */
INLINE vi held(vi x)
{
#if VL == 16
    __asm__ volatile("" : "+v"(x));
#endif
    return x;
}

/* The integer sums of one chain of unpacked codes. */
INLINE void chain_of_pairs(const int R, const int V, const int32_t *pair, const int32_t *xp, size_t units,
                           vi (*part)[MAX_V])
{
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) part[r][v] = iset(0);
    for (; units > 0; units--, xp += (R - 1) * PAIRS)
        for (int p = 0; p < PAIRS; p += 4)
            UNROLL for (int i = 0; i < 4; i++, pair += PANEL, xp++)
            {
                vi q[MAX_V];
                UNROLL for (int v = 0; v < V; v++) q[v] = held(iload(pair + v * VL));
                UNROLL for (int r = 0; r < R; r++)
                {
                    const vi x = held(iset(xp[r * PAIRS]));
                    UNROLL for (int v = 0; v < V; v++) part[r][v] = idot(part[r][v], q[v], x);
                }
            }
}

/* Adds one block of a panel to the totals of one stripe's R rows, V vectors of lanes from `lane` on. */
INLINE void many_tile(const int R, const int V, const job *j, const unpacked *codes, size_t panel, size_t lane,
                      size_t stripe, size_t block, totals *total)
{
    const size_t row = stripe_start(stripe, j->rows), chain = block * j->c.block_chains;
    const size_t segment = j->in.segments > 1 ? (size_t)panel_of(j, panel)[2] : 0;
    const size_t first = segment * j->rows + row, start = chain_start(&j->c, chain);
    const int32_t *x = j->in.x + first * (j->c.kp / 2) + start / 2 * (size_t)R;
    const int32_t *counts = j->in.counts + first * j->c.chains + chain * (size_t)R;
    const float *steps = j->in.steps + first * j->c.blocks + block * (size_t)R;
    const size_t last = smin(chain + j->c.block_chains, j->c.chains);
    vf sum[ROWS_MAX][MAX_V];
    const int32_t *pair = codes->pair[0] + lane;
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) sum[r][v] = vset(0.0f);
    for (size_t at = chain; at < last; at++, counts += R) {
        const size_t length = chain_length(&j->c, at);
        vi part[ROWS_MAX][MAX_V];
        chain_of_pairs(R, V, pair, x, length / UNIT, part);
        x += length / 2 * (size_t)R;
        pair += length / 2 * PANEL;
        end_chain(R, V, j, row, panel, at / j->c.group_chains, lane, counts, part, sum);
    }
    end_block(R, V, steps, sum, total);
}

#endif
