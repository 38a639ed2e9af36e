/* Choosing lanes, exp and tanh. */
#ifndef PEQA_VEC_MATH_H
#define PEQA_VEC_MATH_H

#include "vec.h"

INLINE vf vselect(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

/* Lanes from..to of x, elsewhere `other`; both bounds may lie outside the vector. */
INLINE vf vwithin(vf x, int32_t from, int32_t to, vf other)
{
    vi lane;
    for (int i = 0; i < VL; i++)
        lane[i] = i;
    return vselect((lane >= from) & (lane < to), x, other);
}

/* exp(x) within 2 units in the last place for x <= 88; 0 below -87.3 (where floats end) and for -inf; NaN stays NaN. */
INLINE vf vexp(vf x)
{
    const vf magic = vset(12582912.0f); /* 1.5 x 2^23: adding it rounds to a whole number */
    const vf low = vset(-87.3f);
    const vi under = x < low;
    const vf safe = vselect(under, low, x);
    const vf n = vfma(safe, vset(1.44269504088896341f), magic) - magic;
    vf r = vfma(n, vset(-0.693359375f), safe); /* ln 2 in two parts (Cephes) */
    r = vfma(n, vset(2.12194440e-4f), r);
    vf p = vset(1.9875691500e-4f);
    p = vfma(p, r, vset(1.3981999507e-3f));
    p = vfma(p, r, vset(8.3334519073e-3f));
    p = vfma(p, r, vset(4.1665795894e-2f));
    p = vfma(p, r, vset(1.6666665459e-1f));
    p = vfma(p, r, vset(5.0000001201e-1f));
    p = vfma(p, r * r, r + vset(1.0f));
    const vi exponent = __builtin_convertvector(n, vi) << 23;
    return vselect(under, vset(0.0f), (vf)((vi)p + exponent));
}

/* tanh(x) = 1 - 2 / (exp(2x) + 1), within 1e-7 absolute */
INLINE vf vtanh(vf x)
{
    const vf top = vset(20.0f), twice = x + x;
    const vf bounded = vselect(twice > top, top, twice);
    return vset(1.0f) - vset(2.0f) / (vexp(bounded) + vset(1.0f));
}

#endif
