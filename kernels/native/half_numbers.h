/* Single fp16 numbers, and floats rounded to fp16. */
#ifndef PEQA_HALF_NUMBERS_H
#define PEQA_HALF_NUMBERS_H

#include "vec.h"

INLINE float hscalar(uint16_t x)
{
#if VL == 16
    return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_castsi128_si256(_mm_cvtsi32_si128(x))));
#elif VL == 8
    return _mm256_cvtss_f32(_mm256_cvtph_ps(_mm_cvtsi32_si128(x)));
#elif defined(__aarch64__)
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x))), 0);
#else
    (void)x;
    return 0.0f;
#endif
}

/* Rounds to the nearest, halves to the even one. Finite numbers beyond the range become its ends: an infinity would
 * turn a whole row into NaN where the float had only been large. Infinity and NaN stay what they are. */
INLINE void hstore(uint16_t *p, vf v)
{
#if HALVES
    const vi size = (vi)v & iset(0x7fffffff), end = iset(0x477fe000); /* 65504.0f */
    const vi beyond = (size > end) & (size < iset(0x7f800000));
    const vi bits = ((vi)v & ~beyond) | ((end | ((vi)v ^ size)) & beyond);
#if VL == 16
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)bits, _MM_FROUND_TO_NEAREST_INT));
#elif VL == 8
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)bits, _MM_FROUND_TO_NEAREST_INT));
#else
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)bits)));
#endif
#else
    (void)p, (void)v;
#endif
}

#endif
