/* Arithmetic on one row of activations. Each result depends on its row alone, in an order that its width fixes. */
#ifndef PEQA_ELEMENTWISE_H
#define PEQA_ELEMENTWISE_H

#include "vec.h"
#include "vec_math.h"

/* to = weight * x / sqrt(mean(x^2) + eps); `to` may be x. */
INLINE void norm_row(const float *x, const float *weight, float eps, size_t n, float *to)
{
    vf sum[4];
    UNROLL for (int v = 0; v < 4; v++) sum[v] = vset(0.0f);
    size_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL)
        UNROLL for (int v = 0; v < 4; v++)
        {
            const vf part = vload(x + i + v * VL);
            sum[v] = vfma(part, part, sum[v]);
        }
    for (; i < n; i += VL) {
        const vf part = vpart(x + i, n - i);
        sum[0] = vfma(part, part, sum[0]);
    }
    const float mean = hsum((sum[0] + sum[1]) + (sum[2] + sum[3])) / (float)n;
    const vf factor = vset(1.0f / __builtin_sqrtf(mean + eps));
    for (i = 0; i < n; i += VL)
        vput(to + i, vpart(weight + i, n - i) * (vpart(x + i, n - i) * factor), n - i);
}

/* x += y */
INLINE void add_row(float *x, const float *y, size_t n)
{
    for (size_t i = 0; i < n; i += VL)
        vput(x + i, vpart(x + i, n - i) + vpart(y + i, n - i), n - i);
}

INLINE void copy_row(const float *x, size_t n, float *to)
{
    for (size_t i = 0; i < n; i += VL)
        vput(to + i, vpart(x + i, n - i), n - i);
}

/* to = gate / (1 + exp(-gate)) * up; NaN and infinity of either stay what is not finite. */
INLINE void silu_row(const float *gate, const float *up, size_t n, float *to)
{
    const vf top = vset(88.0f), one = vset(1.0f);
    for (size_t i = 0; i < n; i += VL) {
        const vf x = vpart(gate + i, n - i), minus = -x;
        const vf below = vexp(vselect(minus > top, top, minus));
        vput(to + i, x / (one + below) * vpart(up + i, n - i), n - i);
    }
}

/* Turns the pairs (x[i], x[i + d / 2]) by the angles whose cosines and sines are given; `to` may be x. */
INLINE void rotate_row(const float *x, const float *cosine, const float *sine, size_t d, float *to)
{
    const size_t half = d / 2;
    for (size_t i = 0; i < half; i += VL) {
        const size_t left = half - i;
        const vf a = vpart(x + i, left), b = vpart(x + half + i, left);
        const vf c = vpart(cosine + i, left), s = vpart(sine + i, left);
        vput(to + i, a * c - b * s, left);
        vput(to + half + i, b * c + a * s, left);
    }
}

#endif
