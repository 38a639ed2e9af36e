/* bfloat16 numbers, the upper halves of floats. */
#ifndef PEQA_BRAIN_FLOATS_H
#define PEQA_BRAIN_FLOATS_H

#include "vec.h"
#include "vec_math.h"

typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef uint16_t vh_u __attribute__((vector_size(VL * 2), aligned(2), may_alias));

INLINE vf bload(const uint16_t *p) { return (vf)(__builtin_convertvector(*(const vh_u *)p, vu) << 16); }

/* The first n of the numbers at p, at most VL, and zeros; nothing behind them is read. */
INLINE vf bpart(const uint16_t *p, size_t n)
{
    if (__builtin_expect(n >= VL, 1))
        return bload(p);
    uint16_t lane[VL] = {0};
    for (size_t i = 0; i < n; i++)
        lane[i] = p[i];
    return bload(lane);
}

/* Writes the first n of v, at most VL, rounded to the nearest, ties to even; NaN stays NaN. */
INLINE void bput(uint16_t *p, vf v, size_t n)
{
    const vu bits = (vu)v, odd = bits >> 16 & 1;
    const vu near = (bits + odd + 0x7FFF) >> 16, none = (vu)iset(0x7FC0);
    const vh out = __builtin_convertvector((vu)vselect(v != v, (vf)none, (vf)near), vh);
    if (__builtin_expect(n >= VL, 1)) {
        *(vh_u *)p = out;
        return;
    }
    for (size_t i = 0; i < n; i++)
        p[i] = out[i];
}

#endif
