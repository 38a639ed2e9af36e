/* Stored codes to floats, a vector of lanes at a time. */
#ifndef PEQA_CODES_H
#define PEQA_CODES_H

#include "vec.h"

#if VL == 16
typedef struct {
    __m512 table;
} decoder;
INLINE decoder decoder_for(const int width)
{
    /* The permutation looks at the low four bits only, so neither mask nor conversion is needed. */
    decoder d;
    d.table = width == 4 ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
                         : _mm512_setr_ps(0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1);
    return d;
}
INLINE vf decode(const decoder d, const int width, vi word, const int j)
{
    return (vf)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)word, (unsigned)(j * width)), d.table);
}
INLINE vi next_code(const int width, vi word)
{
    return (vi)_mm512_srli_epi32((__m512i)word, (unsigned)width);
}
#else
typedef struct {
    int unused;
} decoder;
INLINE decoder decoder_for(const int width)
{
    decoder d = {width};
    return d;
}
INLINE vf decode(const decoder d, const int width, vi word, const int j)
{
    (void)d;
    return __builtin_convertvector((word << (32 - width * (j + 1))) >> (32 - width), vf);
}
INLINE vi next_code(const int width, vi word) { return word >> width; }
#endif

INLINE vf decode8(const int8_t *p)
{
#if VL == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif VL == 8
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vi wide = {p[0], p[1], p[2], p[3]};
    return __builtin_convertvector(wide, vf);
#endif
}

#endif
