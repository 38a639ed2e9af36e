/* Activations in the order in which the tiles read them, input scales applied, with the sum of each piece. */
#include "quant_matmul.h"

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
            const float *from = x + (first + r) * ldx;
            const float *scale =
                in_scale ? in_scale + ((size_t)row[first + r] * (size_t)w->segments + segment) * features : 0;
            for (size_t piece = 0; piece < c.pieces; piece++) {
                const size_t start = piece_start(&c, piece), length = piece_length(&c, piece);
                const size_t group = piece / c.per_group, within = piece % c.per_group * PIECE;
                const size_t real = smin(length, size - within), k0 = group * size + within;
                float *to = block_x + start * n + r;
                float sum[4] = {0, 0, 0, 0};
                for (size_t k = 0; k < real; k++) {
                    const float value = scale ? from[k0 + k] * scale[k0 + k] : from[k0 + k];
                    to[k * n] = value;
                    sum[k % 4] += value;
                }
                for (size_t k = real; k < length; k++)
                    to[k * n] = 0.0f;
                block_sums[piece * n + r] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            }
        }
    }
}
