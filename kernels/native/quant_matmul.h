/* Layouts shared by the packing of activations and the multiplication. Python mirrors peqa_weight (packed.py). */
#ifndef PEQA_QUANT_MATMUL_H
#define PEQA_QUANT_MATMUL_H

#include "pool.h"
#include "vec.h"

#define PANEL 32  /* outputs of one panel: lanes of the arithmetic */
#define PIECE 128 /* inputs summed in one chain before their scale is applied; part of the order of additions */

/* Rows and vectors of a register tile: the sums, the codes as words and as floats, and an activation. */
#if VL == 16
#define ROWS_MAX 12 /* 12 x 2 + 2 + 2 + 1 of 32 registers */
#define TILE_V 2
#elif defined(__aarch64__)
#define ROWS_MAX 4 /* 4 x 4 + 4 + 4 + 1 of 32 registers */
#define TILE_V 4
#else
#define ROWS_MAX 4 /* 4 x 2 + 2 + 2 + 1 of 16 registers; 5 and 6 rows spill and are slower */
#define TILE_V 2
#endif

/* One frozen weight in its run-time layout. Codes are stored centred, code - 2^(bits-1), as signed fields. */
typedef struct {
    const void *codes;    /* 2, 4 bit: int32 [panels][k / per word][32]; 8 bit: int8 [panels][k][32] */
    const float *scales;  /* [panels][groups][32] */
    const float *zeros;   /* [panels][groups][32], minus 2^(bits-1); NULL when all are 0 */
    const int32_t *panel; /* [panels][3]: first output, outputs (<= 32), segment */
    int64_t panels, groups, group_size, width /* bits of a stored field: 2, 4 or 8 */;
    int64_t in_features, out_features, segments;
} peqa_weight;

/* How K is cut: groups of `kg` (padded to whole words), each in pieces of PIECE, the last one shorter. */
typedef struct {
    size_t per_word, kg, kp, per_group, pieces;
} cuts;

INLINE cuts cut(const peqa_weight *w)
{
    cuts c;
    c.per_word = w->width == 8 ? 4 : 32 / (size_t)w->width;
    c.kg = ((size_t)w->group_size + c.per_word - 1) / c.per_word * c.per_word;
    c.kp = c.kg * (size_t)w->groups;
    c.per_group = (c.kg + PIECE - 1) / PIECE;
    c.pieces = c.per_group * (size_t)w->groups;
    return c;
}

INLINE size_t piece_start(const cuts *c, size_t piece)
{
    return piece / c->per_group * c->kg + piece % c->per_group * PIECE;
}

INLINE size_t piece_length(const cuts *c, size_t piece)
{
    return smin(PIECE, c->kg - piece % c->per_group * PIECE);
}

/* Rows are dealt evenly to blocks of at most ROWS_MAX. */
INLINE size_t block_count(size_t rows)
{
    return (rows + ROWS_MAX - 1) / ROWS_MAX;
}

INLINE size_t block_start(size_t block, size_t rows) { return block * rows / block_count(rows); }

/* Activations of `rows` rows, per segment: for each block [kp][rows of the block], then the sums of each piece
 * [pieces][rows of the block]. Every value of a row depends on that row alone. */
typedef struct {
    float *x, *sums;
    size_t segments; /* 1 when no row has input scales, else those of the weight */
} packed_rows;

void peqa_pack_rows(const peqa_weight *w, packed_rows out, const float *x, size_t ldx, const float *in_scale,
                    const int32_t *row, size_t rows, size_t block);

#endif
