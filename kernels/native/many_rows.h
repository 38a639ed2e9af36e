/* Many rows: a block of a panel's codes is unpacked once, and all stripes read it from the first cache level. */
#ifndef PEQA_MANY_ROWS_H
#define PEQA_MANY_ROWS_H

#include "tile.h"

/* One block of the inputs: its chains are equally long, and its groups follow each other. */
typedef struct {
    size_t block, k0, chain, chains, units /* of a chain */, group;
} block_place;

INLINE block_place place_block(const cuts *c, size_t block)
{
    const size_t chain = block * c->block_chains;
    return (block_place){
        .block = block,
        .k0 = chain_start(c, chain),
        .chain = chain,
        .chains = smin(c->block_chains, c->chains - chain),
        .units = chain_length(c, chain) / UNIT,
        .group = chain / c->group_chains,
    };
}

/* One block of one panel: codes as pairs, [pairs][PANEL], or as quads; the scales and offsets of its chains. */
typedef struct {
    int32_t pair[CHAIN / 2][PANEL] __attribute__((aligned(64)));
    scale_lanes scale[CHAIN / UNIT];
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

INLINE void unpack_bytes(const int bits, const int32_t *from, size_t units, unpacked *to)
{
    for (size_t unit = 0; unit < units; unit++, from += bits * PANEL)
        for (int lane = 0; lane < PANEL; lane += VL) {
            int32_t(*quad)[PANEL] = to->pair + unit * QUADS;
            vi spare = iset(0), last = iset(0);
            UNROLL for (int w = 0; w < bits; w++)
            {
                vi word = iload(from + w * PANEL + lane);
                if (bits != 3) {
                    UNROLL for (int i = 0; i < QUADS / bits; i++)
                    {
                        istore(quad[w * (QUADS / bits) + i] + lane,
                               bits == 8 ? word : word & iset(((1 << bits) - 1) * 0x1010101));
                        word = bits == 8 ? word : next_pair(bits, word);
                    }
                    continue;
                }
                UNROLL for (int i = 0; i < 2; i++)
                {
                    istore(quad[w * 5 / 2 + i] + lane, quad_of(low_pair(3, word), low_pair(3, next_pair(3, word))));
                    word = ishift(word, 6);
                }
                if (w == 1)
                    istore(quad[4] + lane, quad_of(last, low_pair(3, word)));
                last = low_pair(3, word);
                spare |= spare_bit(next_pair(3, word), w);
            }
            if (bits == 3)
                istore(quad[QUADS - 1] + lane, quad_of(last, spare));
        }
}

INLINE void unpack_scales(const job *j, size_t panel, const block_place *b, unpacked *to)
{
    for (size_t i = 0; i < b->chains; i++)
        for (size_t lane = 0; lane < PANEL; lane += VL) {
            vstore(to->scale[i].scale + lane, base_load(j, j->w->scales, panel, b->group + i, lane));
            if (j->w->offsets)
                vstore(to->scale[i].offset + lane, base_load(j, j->w->offsets, panel, b->group + i, lane));
        }
}

INLINE void unpack_block(const job *j, size_t panel, const block_place *b, unpacked *to)
{
    const size_t units = b->chains * b->units;
    const int32_t *from = j->w->codes + (panel * j->c.kp + b->k0) / UNIT * (size_t)j->w->bits * PANEL;
    unpack_scales(j, panel, b, to);
    if (in_bytes(j->w))
        switch (j->w->bits) {
        case 2: unpack_bytes(2, from, units, to); return;
        case 3: unpack_bytes(3, from, units, to); return;
        case 4: unpack_bytes(4, from, units, to); return;
        default: unpack_bytes(8, from, units, to); return;
        }
    switch (j->w->bits) {
    case 2: unpack(2, from, units, to); break;
    case 3: unpack(3, from, units, to); break;
    case 4: unpack(4, from, units, to); break;
    default: unpack(8, from, units, to); break;
    }
}

/* The integer sums of one chain of unpacked codes. What lies `ahead` words further on, the next stripe's activations, is
 * asked for line by line beside the work. */
INLINE void chain_of_words(const int R, const int V, const int bytes, const int32_t *word, const int32_t *xp,
                           const size_t ahead, size_t units, vi (*part)[MAX_V])
{
    const int words = bytes ? QUADS : PAIRS;
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) part[r][v] = iset(0);
    for (; units > 0; units--, xp += (R - 1) * words)
        for (int p = 0; p < words; p += 4) {
            UNROLL for (int line = 0; line < R; line += 4)
                __builtin_prefetch(xp + ahead + line * 16 + p * 3, 0, 3);
            UNROLL for (int i = 0; i < 4; i++, word += PANEL, xp++)
            {
                vi q[MAX_V];
                UNROLL for (int v = 0; v < V; v++) q[v] = held(iload(word + v * VL));
                UNROLL for (int r = 0; r < R; r++)
                {
                    const vi x = held(iset(xp[r * words]));
                    UNROLL for (int v = 0; v < V; v++) part[r][v] =
                        bytes ? idot_bytes(part[r][v], q[v], x) : idot(part[r][v], q[v], x);
                }
            }
        }
}

/* Asks for one of `shares` of a block of a panel: of its codes' lines, and of its groups' scales and offsets. */
INLINE void fetch_share(const job *j, size_t panel, const block_place *b, size_t share, size_t shares)
{
    const size_t bits = (size_t)j->w->bits, bytes = b->chains * b->units * UNIT * PANEL * bits / 8;
    const char *codes = (const char *)j->w->codes + (panel * j->c.kp + b->k0) * PANEL * bits / 8;
    for (size_t i = share * 64; i < bytes; i += shares * 64)
        __builtin_prefetch(codes + i, 0, 2);
    for (size_t i = share; i < b->chains; i += shares)
        fetch_scales(j, panel, b->group + i);
}

/* One stripe's part of the packed activations. */
typedef struct {
    size_t row, rows;
    const int32_t *x, *counts;
    const float *steps;
    size_t ahead; /* words from x to the next stripe's */
} stripe_place;

INLINE stripe_place place_stripe(const job *j, size_t panel, size_t stripe)
{
    const size_t row = stripe_start(stripe, j->rows);
    const size_t segment = j->in.segments > 1 ? (size_t)panel_of(j, panel)[2] : 0;
    const size_t first = segment * stripe_room(stripe_count(j->rows), j->rows) + stripe_room(stripe, j->rows);
    return (stripe_place){
        .row = row,
        .rows = stripe_start(stripe + 1, j->rows) - row,
        .x = j->in.x + first * input_words(j->w, &j->c),
        .counts = j->in.counts + first * j->c.chains,
        .steps = j->in.steps + first * j->c.blocks,
        .ahead = (stripe_start(stripe + 1, j->rows) - row) * input_words(j->w, &j->c),
    };
}

/* Adds one block of a panel to the totals of one stripe's R rows, V vectors of lanes from `lane` on. */
INLINE void many_tile(const int R, const int V, const int bytes, const int ends, const job *j, const unpacked *codes,
                      size_t panel, size_t lane, const stripe_place *s, const block_place *b, totals *total)
{
    const size_t words = bytes ? QUADS : PAIRS;
    const int32_t *x = s->x + b->k0 / UNIT * words * (size_t)R, *counts = s->counts + b->chain * (size_t)R;
    const int32_t *word = codes->pair[0] + lane;
    if (ends == END_LATE) {
        vi part[ROWS_MAX][MAX_V];
        chain_of_words(R, V, bytes, word, x, s->ahead, b->units, part);
        end_plain_chain(R, V, s->steps + b->block * (size_t)R, part, total);
        return;
    }
    vf sum[ROWS_MAX][MAX_V];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) sum[r][v] = vset(0.0f);
    for (size_t i = 0; i < b->chains; i++, counts += R) {
        vi part[ROWS_MAX][MAX_V];
        chain_of_words(R, V, bytes, word, x, s->ahead, b->units, part);
        x += b->units * (size_t)R * words;
        word += b->units * words * PANEL;
        end_chain(R, V, ends, j, s->row, panel, b->group + i, lane, counts, &codes->scale[i], part, sum);
    }
    end_block(R, V, s->steps + b->block * (size_t)R, sum, total);
}

#endif
