/* Many rows on matrix tiles: a block of a panel's codes is unpacked once to bytes, a stripe's activations come as their
 * low and their high bytes, and the two sums of products are put together again: the very integers that pairs give.
 * Activations of 8 bits are their low bytes, with a sign: half of the products. */
#ifndef PEQA_TILE_ROWS_H
#define PEQA_TILE_ROWS_H

#include "many_rows.h"

#if TILES

#define PASS_STRIPES_OF_TILES ((ROWS_PER_PASS + TILE_ROWS - 1) / TILE_ROWS)

/* One block of one panel, [k / 4][lane], four codes a word in the order of codes.h's pairs: 2i, 2i + 1 and the same of
 * the unit's other half. */
typedef struct {
    int32_t quad[CHAIN / 4][PANEL] __attribute__((aligned(64)));
} quads;

typedef struct {
    float lanes[TILE_ROWS][PANEL] __attribute__((aligned(64)));
} tile_totals;

INLINE void unpack_to_quads(const int bits, const int32_t *from, size_t units, quads *to)
{
    const int per_word = PAIRS_OF(bits);
    for (size_t unit = 0; unit < units; unit++, from += bits * PANEL)
        for (int lane = 0; lane < PANEL; lane += VL) {
            int32_t(*quad)[PANEL] = to->quad + unit * (PAIRS / 2);
            vi spare = iset(0), even = iset(0);
            UNROLL for (int w = 0; w < bits; w++)
            {
                vi word = iload(from + w * PANEL + lane);
                UNROLL for (int p = w * per_word; p < (w + 1) * per_word; p++)
                {
                    const vi pair = low_pair(bits, word);
                    if (p % 2)
                        istore(quad[p / 2] + lane, even | ileft(pair, 8));
                    even = pair;
                    word = next_pair(bits, word);
                }
                if (bits == 3)
                    spare |= spare_bit(word, w);
            }
            if (bits == 3)
                istore(quad[PAIRS / 2 - 1] + lane, even | ileft(spare, 8));
        }
}

static void unpack_quads(const job *j, size_t panel, size_t k0, size_t length, quads *to)
{
    const size_t units = length / UNIT;
    const int32_t *from = j->w->codes + (panel * j->c.kp + k0) / UNIT * (size_t)j->w->bits * PANEL;
    switch (j->w->bits) {
    case 2: unpack_to_quads(2, from, units, to); break;
    case 3: unpack_to_quads(3, from, units, to); break;
    case 4: unpack_to_quads(4, from, units, to); break;
    default: unpack_to_quads(8, from, units, to); break;
    }
}

/* The sums of one chain of `length` inputs of 8 bits, [row][lane]. */
INLINE void chain_of_bytes(tiles *t, const int32_t *quad, const uint8_t *x, size_t length, size_t slab,
                           size_t padded_rows, int32_t (*sums)[PANEL])
{
    (void)t;
    tile_zero(t, SUM_LOW_0);
    tile_zero(t, SUM_LOW_1);
    for (size_t k = 0; k < length; k += slab, quad += slab / 4 * PANEL, x += 2 * slab * padded_rows) {
        tile_load(t, X_LOW, x, slab);
        tile_load(t, CODES_0, quad, sizeof(int32_t[PANEL]));
        tile_products_signed(t, SUM_LOW_0, X_LOW, CODES_0);
        tile_load(t, CODES_1, quad + 16, sizeof(int32_t[PANEL]));
        tile_products_signed(t, SUM_LOW_1, X_LOW, CODES_1);
    }
    tile_store(t, SUM_LOW_0, sums, sizeof *sums);
    tile_store(t, SUM_LOW_1, sums[0] + 16, sizeof *sums);
}

/* The byte sums of one chain of `length` inputs of 16 bits. */
INLINE void chain_of_quads(tiles *t, const int32_t *quad, const uint8_t *x, size_t length, size_t slab,
                           size_t padded_rows, int32_t (*low)[PANEL], int32_t (*high)[PANEL])
{
    (void)t;
    tile_zero(t, SUM_LOW_0);
    tile_zero(t, SUM_HIGH_0);
    tile_zero(t, SUM_LOW_1);
    tile_zero(t, SUM_HIGH_1);
    for (size_t k = 0; k < length; k += slab, quad += slab / 4 * PANEL, x += 2 * slab * padded_rows) {
        tile_load(t, X_LOW, x, slab);
        tile_load(t, CODES_0, quad, sizeof(int32_t[PANEL]));
        tile_products_unsigned(t, SUM_LOW_0, X_LOW, CODES_0);
        tile_load(t, X_HIGH, x + slab * padded_rows, slab);
        tile_load(t, CODES_1, quad + 16, sizeof(int32_t[PANEL]));
        tile_products_signed(t, SUM_HIGH_0, X_HIGH, CODES_0);
        tile_products_unsigned(t, SUM_LOW_1, X_LOW, CODES_1);
        tile_products_signed(t, SUM_HIGH_1, X_HIGH, CODES_1);
    }
    tile_store(t, SUM_LOW_0, low, sizeof *low);
    tile_store(t, SUM_HIGH_0, high, sizeof *high);
    tile_store(t, SUM_LOW_1, low[0] + 16, sizeof *low);
    tile_store(t, SUM_HIGH_1, high[0] + 16, sizeof *high);
}

/* end_chain() and end_block() in one, of one vector of lanes of all rows: `alone` where the block is this chain; `high`
 * is null where `low` are the sums. */
INLINE void end_tile_chain(const int alone, const job *j, const stripe_place *s, size_t panel, size_t group, size_t lane,
                           const int32_t *counts, const float *steps, int32_t (*low)[PANEL], int32_t (*high)[PANEL],
                           float (*sum)[PANEL], tile_totals *total)
{
    const vf scale = base_load(j, j->w->scales, panel, group, lane);
    const vf offset = j->w->offsets ? base_load(j, j->w->offsets, panel, group, lane) : vset(0.0f);
    for (size_t r = 0; r < s->rows; r++) {
        const vi part = high ? iload(low[r] + lane) + ileft(iload(high[r] + lane), 8) : iload(low[r] + lane);
        if (scale_at_end(j->w)) {
            vstore(total->lanes[r] + lane, vfma(ifloat(part), vset(steps[r]), vload(total->lanes[r] + lane)));
            continue;
        }
        vf before = alone ? vset(0.0f) : vload(sum[r] + lane);
        if (j->group_row) {
            const vf factor = group_factor(j, s->row + r, group, panel, lane);
            before = add_term(j->w->offsets != 0, scale * factor, offset * factor, part, iset(counts[r]), before);
        } else
            before = add_term(j->w->offsets != 0, scale, offset, part, iset(counts[r]), before);
        if (alone)
            vstore(total->lanes[r] + lane, vfma(before, vset(steps[r]), vload(total->lanes[r] + lane)));
        else
            vstore(sum[r] + lane, before);
    }
}

/* Adds one block of a panel to the totals of one stripe. */
static void add_tile_block(tiles *t, const job *j, const quads *codes, size_t panel, const stripe_place *s,
                           const block_place *b, tile_totals *total)
{
    int32_t low[TILE_ROWS][PANEL] __attribute__((aligned(64))), high[TILE_ROWS][PANEL] __attribute__((aligned(64)));
    float sum[TILE_ROWS][PANEL] __attribute__((aligned(64)));
    const size_t length = b->units * UNIT, slab = slab_of(&j->c), padded = tile_stripe_rows(j->rows);
    const int32_t *counts = s->counts + b->chain * s->rows;
    const float *steps = s->steps + b->block * s->rows;
    const uint8_t *x = (const uint8_t *)s->x + b->k0 * 2 * padded;
    const int alone = b->chains == 1, bytes = j->w->activation_bits == 8;
    if (!alone)
        for (size_t r = 0; r < s->rows; r++)
            for (size_t lane = 0; lane < PANEL; lane += VL)
                vstore(sum[r] + lane, vset(0.0f));
    for (size_t i = 0; i < b->chains; i++, counts += s->rows, x += length * 2 * padded) {
        if (bytes)
            chain_of_bytes(t, codes->quad[i * length / 4], x, length, slab, padded, low);
        else
            chain_of_quads(t, codes->quad[i * length / 4], x, length, slab, padded, low, high);
        for (size_t lane = 0; lane < PANEL; lane += VL)
            if (alone)
                end_tile_chain(1, j, s, panel, b->group + i, lane, counts, steps, low, bytes ? 0 : high, sum, total);
            else
                end_tile_chain(0, j, s, panel, b->group + i, lane, counts, steps, low, bytes ? 0 : high, sum, total);
    }
    if (!alone)
        for (size_t r = 0; r < s->rows; r++)
            for (size_t lane = 0; lane < PANEL; lane += VL)
                vstore(total->lanes[r] + lane,
                       vfma(vload(sum[r] + lane), vset(steps[r]), vload(total->lanes[r] + lane)));
}

/* end_rows() of one stripe. */
static void end_tile_rows(const job *j, size_t panel, const stripe_place *s, tile_totals *total)
{
    const int32_t *where = panel_of(j, panel);
    const size_t N = (size_t)j->w->out_features;
    for (size_t lane = 0; lane < PANEL; lane += VL) {
        const vf bias = bias_load(j, panel, lane);
        for (size_t r = 0; r < s->rows; r++) {
            vf out = vset(1.0f);
            if (j->out_scale)
                out = out_factor(j, s->row + r, panel, lane);
            vf sum = vload(total->lanes[r] + lane);
            if (scale_at_end(j->w))
                sum = end_plain_row(j, s->row + r, panel, lane, float_of(s->counts[r]), sum);
            vstore(total->lanes[r] + lane, vfma(out, sum, bias));
        }
    }
    for (size_t r = 0; r < s->rows; r++)
        for (size_t lane = 0; lane < (size_t)where[1]; lane += VL)
            vput(j->y + (s->row + r) * N + (size_t)where[0] + lane, vload(total->lanes[r] + lane),
                 (size_t)where[1] - lane);
}

/* One panel of all rows. */
static void multiply_tiles(tiles *t, const job *j, size_t panel)
{
    tile_totals total[PASS_STRIPES_OF_TILES];
    stripe_place place[PASS_STRIPES_OF_TILES];
    quads codes;
    const size_t stripes = stripe_count(j->rows);
    for (size_t stripe = 0; stripe < stripes; stripe++) {
        place[stripe] = place_stripe(j, panel, stripe);
        for (size_t r = 0; r < place[stripe].rows; r++) {
            for (size_t lane = 0; lane < PANEL; lane += VL)
                vstore(total[stripe].lanes[r] + lane, vset(0.0f));
            if (j->out_scale)
                for (size_t lane = 0; lane < PANEL; lane += 16)
                    fetch_out_scale(1, 1, j, place[stripe].row + r, panel, lane);
        }
    }
    for (size_t block = 0; block < j->c.blocks; block++) {
        const block_place b = place_block(&j->c, block);
        const size_t length = b.chains * b.units * UNIT;
        unpack_quads(j, panel, b.k0, length, &codes);
        for (size_t stripe = 0; stripe < stripes; stripe++) {
            fetch_share(j, panel + 1, &b, stripe, stripes);
            add_tile_block(t, j, &codes, panel, &place[stripe], &b, &total[stripe]);
        }
    }
    for (size_t stripe = 0; stripe < stripes; stripe++)
        end_tile_rows(j, panel, &place[stripe], &total[stripe]);
}

#endif
#endif
