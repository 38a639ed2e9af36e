/* Activations in the order in which the tiles read them, input scales applied, with the sum of each piece. */
#include "quant_matmul.h"

/* One row's piece: `real` values and zeros up to `length`, to[k * n]; returns their sum. The order of additions depends
 * on `real` alone. */
static float pack_piece(const float *from, const float *scale, size_t real, size_t length, float *to, size_t n)
{
    vf sum = vset(0.0f);
    size_t k = 0;
    for (; k < real; k += VL) {
        vf value = vpart(from + k, real - k);
        if (scale)
            value *= vpart(scale + k, real - k);
        sum += value;
        const size_t count = smin(VL, length - k);
        if (n == 1 && count == VL) {
            vstore(to + k, value);
        } else {
            float lane[VL];
            vstore(lane, value);
            for (size_t i = 0; i < count; i++)
                to[(k + i) * n] = lane[i];
        }
    }
    for (; k < length; k++)
        to[k * n] = 0.0f;
    return hsum(sum);
}

void peqa_pack_rows(const peqa_weight *w, packed_rows out, const float *x, size_t ldx, const float *in_scale,
                    const int32_t *row, size_t rows, size_t block)
{
    const cuts c = cut(w);
    const size_t first = block_start(block, rows), n = block_start(block + 1, rows) - first;
    const size_t features = (size_t)w->in_features, size = (size_t)w->group_size;

    for (size_t segment = 0; segment < out.segments; segment++) {
        float *block_x = out.x + (segment * rows + first) * c.kp;
        float *block_sums = out.sums + (segment * rows + first) * c.pieces;
        for (size_t r = 0; r < n; r++) {
            const float *from = x + (first + r) * ldx, *scale = 0;
            if (in_scale)
                scale = in_scale + ((size_t)row[first + r] * (size_t)w->segments + segment) * features;
            for (size_t piece = 0; piece < c.pieces; piece++) {
                const size_t group = piece / c.per_group, within = piece % c.per_group * PIECE;
                const size_t k = group * size + within, length = piece_length(&c, piece);
                block_sums[piece * n + r] =
                    pack_piece(from + k, scale ? scale + k : 0, smin(length, size - within), length,
                               block_x + piece_start(&c, piece) * n + r, n);
            }
        }
    }
}
