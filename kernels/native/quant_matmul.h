/* Layouts shared by the packing of activations and the multiplication. Python mirrors peqa_weight (packed.py). */
#ifndef PEQA_QUANT_MATMUL_H
#define PEQA_QUANT_MATMUL_H

#include "codes.h"
#include "pool.h"
#include "tiles.h"
#include "vec.h"

#define PANEL 32  /* outputs of one panel: lanes of the arithmetic */
#define CHAIN 128 /* inputs summed as integers at once: 128 * 255 * 32768 stays below 2^31; they share an exponent */

#define ROWS_PER_PASS 192 /* the totals of one panel take 24 KiB: what one stripe needs at a time is in the first cache level */

/* Rows and vectors of a register tile: the sums, the codes as words and as pairs, and an activation. */
#if VL == 16
#define ROWS_MAX 6 /* 6 x 2 integer sums, as many under their scales, codes, an activation: 29 of 32 registers */
#define TILE_V 2
#elif defined(__aarch64__)
#define ROWS_MAX 4 /* 4 x 4 integer sums, 4 codes, an activation of 32 registers */
#define TILE_V 4
#else
#define ROWS_MAX 4 /* 4 x 2 integer sums, 2 codes, an activation, a product of 16 registers */
#define TILE_V 2
#endif
#define MAX_V 8 /* vectors of a tile of one row */

/* One frozen weight in its run-time layout. Scales and offsets are fp16 where that holds them exactly, else fp32. */
typedef struct {
    const int32_t *codes; /* [panels][units][bits][32], see codes.h */
    const void *scales;   /* [panels][groups][32] */
    const void *offsets;  /* [panels][groups][32], scale times zero point; NULL when every zero point is the centre */
    const int32_t *panel; /* [panels][3]: first output, outputs (<= 32), segment */
    int64_t panels, groups, group_size, bits /* 2, 3, 4 or 8 */, half /* fp16 */;
    int64_t in_features, out_features, segments;
    int64_t activation_bits; /* 16, or 8: a quicker and coarser product */
} peqa_weight;

/* Whether activations are packed as bytes. Elsewhere the same small numbers take 16 bits, and give the same sums. */
INLINE int in_bytes(const peqa_weight *w) { return BYTE_DOTS && !TILES && w->activation_bits == 8; }

/* Whether a row's sum has one scale, which then waits for its end. */
INLINE int scale_at_end(const peqa_weight *w) { return w->groups == 1; }

/* How K is cut. Groups are padded to whole units; a chain is a group or at most CHAIN inputs of it. Chains that fit
 * into CHAIN inputs together share one exponent and are a block. */
typedef struct {
    size_t kg, kp;         /* padded inputs of a group, of all */
    size_t group_chains;   /* of one group */
    size_t block_chains;   /* of one block, but for the last; 1 where a group has several */
    size_t chains, blocks; /* of all */
} cuts;

INLINE cuts cut(const peqa_weight *w)
{
    cuts c;
    const size_t groups = (size_t)w->groups;
    c.kg = ((size_t)w->group_size + UNIT - 1) / UNIT * UNIT;
    c.kp = c.kg * groups;
    c.group_chains = (c.kg + CHAIN - 1) / CHAIN;
    c.block_chains = c.kg < CHAIN ? CHAIN / c.kg : 1;
    c.chains = c.group_chains * groups;
    c.blocks = (c.chains + c.block_chains - 1) / c.block_chains;
    return c;
}

INLINE size_t chain_start(const cuts *c, size_t chain)
{
    return chain / c->group_chains * c->kg + chain % c->group_chains * CHAIN;
}

INLINE size_t chain_length(const cuts *c, size_t chain)
{
    return smin(CHAIN, c->kg - chain % c->group_chains * CHAIN);
}

#define FEW_ON_TILES 4 /* up to so many rows are not worth a matrix tile */

/* Up to this many rows take codes as they are; more of them earn back the unpacking of codes to memory. Where products
 * of pairs are summed in one instruction, unpacking on the way costs it nothing, since other units do that: there it is
 * what a pass has at most (pass_rows_of). */
INLINE size_t few_rows_of(const peqa_weight *w)
{
    if (TILES)
        return FEW_ON_TILES;
    return BYTE_DOTS && !in_bytes(w) ? 64 : BYTE_DOTS ? 3 * ROWS_MAX : 2 * ROWS_MAX;
}

#if TILES
#define STRIPE_ROWS TILE_ROWS /* of any stripe, at most */
#else
#define STRIPE_ROWS ROWS_MAX
#endif

/* Whether so many rows are multiplied on matrix tiles. */
INLINE int on_tiles(size_t rows) { return TILES && rows > FEW_ON_TILES; }

/* Rows are dealt evenly to stripes of at most ROWS_MAX, or of a matrix tile's. */
INLINE size_t stripe_count(size_t rows)
{
#if TILES
    if (on_tiles(rows))
        return (rows + TILE_ROWS - 1) / TILE_ROWS;
#endif
    return (rows + ROWS_MAX - 1) / ROWS_MAX;
}

INLINE size_t stripe_start(size_t stripe, size_t rows) { return stripe * rows / stripe_count(rows); }

/* Rows that a stripe of matrix tiles has room for: all are as large as the largest. */
INLINE size_t tile_stripe_rows(size_t rows) { return (rows + stripe_count(rows) - 1) / stripe_count(rows); }

/* Inputs that one product of matrix tiles takes; chains are made of whole ones. */
INLINE size_t slab_of(const cuts *c) { return c->kg % 64 ? 32 : 64; }

/* Where a stripe's arrays begin, in rows; with stripes after the last one, how much room all of them take. */
INLINE size_t stripe_room(size_t stripe, size_t rows)
{
    return on_tiles(rows) ? stripe * tile_stripe_rows(rows) : stripe_start(stripe, rows);
}

/* Activations as integers times a step per block. Every value of a row depends on that row alone. A stripe of R rows is
 * [units][R][PAIRS] words, a word the inputs p (low half) and p + 16 of its unit, or with bytes [units][R][QUADS], a
 * word the inputs of a quad's codes in the same order; for matrix tiles
 * [slabs][low, high][tile_stripe_rows][slab] bytes of the same numbers, in the order of tile_rows.h's codes. */
typedef struct {
    int32_t *x;      /* per segment and row: input_words() */
    float *steps;    /* the same: [blocks][R] in a stripe */
    int32_t *counts; /* the same: [chains][R] in a stripe: what zero points take off the chains, the sum of the row's
                        integers; as a negative float where the weight has offsets, else times minus the centre. Where
                        the scale waits for the row's end, its first is the float sum of all, times their steps, < 0 */
    size_t segments; /* 1 when no row has input scales, else those of the weight */
} packed_rows;

/* Words of a row's integers. */
INLINE size_t input_words(const peqa_weight *w, const cuts *c) { return in_bytes(w) ? c->kp / 4 : c->kp / 2; }

/* Words of scratch that a row of one segment takes. */
INLINE size_t row_words(const peqa_weight *w, const cuts *c) { return input_words(w, c) + c->blocks + c->chains; }

/* in_scale: [*, segments, K] of fp16 (`half`) or fp32, or NULL. */
void peqa_pack_rows(const peqa_weight *w, packed_rows out, const float *x, size_t ldx, const void *in_scale, int half,
                    const int32_t *row, size_t rows, size_t stripe);

#endif
