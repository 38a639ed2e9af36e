/* One vector type per instruction set, and only what the kernels need of it.
 *
 * Additions are never contracted by the compiler (-ffp-contract=off): where a fused multiply-add is wanted it is
 * written as vfma, so that every code path of one library rounds alike and a row's bits cannot depend on which
 * path computed it. No libc header is included: the library builds and links without one.
 */
#ifndef PEQA_VEC_H
#define PEQA_VEC_H

#include <stddef.h>
#include <stdint.h>

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

#if defined(__SSE2__)
/* immintrin.h wants stdlib.h for _mm_malloc; these are the names by which gcc and clang know that it was read. */
#define _MM_MALLOC_H_INCLUDED
#define __MM_MALLOC_H
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VL 8
#elif defined(__aarch64__)
#include <arm_neon.h>
#define VL 4
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
/* The same types at any address. */
typedef float vf_u __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi_u __attribute__((vector_size(VL * 4), aligned(4), may_alias));

INLINE float float_of(int32_t bits)
{
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

INLINE int32_t bits_of(float value)
{
    int32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return bits;
}

INLINE vf vload(const float *p) { return *(const vf_u *)p; }
#if VL == 16 || VL == 8 || defined(__aarch64__)
#define HALVES 1 /* fp16 can be read */
INLINE vf hload(const uint16_t *p)
{
#if VL == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif VL == 8
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#endif
}
#else
#define HALVES 0
INLINE vf hload(const uint16_t *p)
{
    (void)p;
    return (vf){0.0f, 0.0f, 0.0f, 0.0f};
}
#endif
INLINE void vstore(float *p, vf v) { *(vf_u *)p = v; }
INLINE vi iload(const int32_t *p) { return *(const vi_u *)p; }
INLINE void istore(int32_t *p, vi v) { *(vi_u *)p = v; }

/* The first n of the floats at p, at most VL, and zeros; nothing behind them is read. */
INLINE vf vpart(const float *p, size_t n)
{
    if (__builtin_expect(n >= VL, 1))
        return vload(p);
#if VL == 16
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    float lane[VL] = {0};
    for (size_t i = 0; i < n; i++)
        lane[i] = p[i];
    return vload(lane);
#endif
}

/* The same of fp16. */
INLINE vf hpart(const uint16_t *p, size_t n)
{
    if (__builtin_expect(n >= VL, 1))
        return hload(p);
#if VL == 16
    return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p));
#else
    uint16_t lane[VL] = {0};
    for (size_t i = 0; i < n; i++)
        lane[i] = p[i];
    return hload(lane);
#endif
}

INLINE void vput(float *p, vf v, size_t n)
{
    if (__builtin_expect(n >= VL, 1)) {
        vstore(p, v);
        return;
    }
#if VL == 16
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    for (size_t i = 0; i < n; i++)
        p[i] = v[i];
#endif
}

INLINE vf vset(float x)
{
#if VL == 16
    return (vf)_mm512_set1_ps(x);
#elif VL == 8
    return (vf)_mm256_set1_ps(x);
#else
    return (vf){x, x, x, x};
#endif
}

/* a * b + c */
INLINE vf vfma(vf a, vf b, vf c)
{
#if VL == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VL == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* Scalar form that rounds as a lane of vfma does. */
INLINE float sfma(float a, float b, float c)
{
#if VL >= 8 || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE vi iset(int32_t x)
{
#if VL == 16
    return (vi)_mm512_set1_epi32(x);
#elif VL == 8
    return (vi)_mm256_set1_epi32(x);
#else
    return (vi){x, x, x, x};
#endif
}

/* Logical shifts of 32-bit lanes. */
INLINE vi ishift(vi a, const int by) { return (vi)((vu)a >> by); }
INLINE vi ileft(vi a, const int by) { return a << by; }

INLINE vf ifloat(vi a) { return __builtin_convertvector(a, vf); }

/* sum + a.low * b.low + a.high * b.high, in each lane, of signed 16-bit halves. */
INLINE vi idot(vi sum, vi a, vi b)
{
#if VL == 16 && defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif VL == 16
    return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif VL == 8
    return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

#if VL == 16 && defined(__AVX512VNNI__)
#define BYTE_DOTS 1 /* products of bytes are summed in one instruction */
/* sum + the four products of the bytes of a (unsigned) and b (signed), in each lane. */
INLINE vi idot_bytes(vi sum, vi a, vi b)
{
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#else
#define BYTE_DOTS 0
INLINE vi idot_bytes(vi sum, vi a, vi b)
{
    (void)a, (void)b;
    return sum;
}
#endif

INLINE vf vmax(vf a, vf b)
{
#if VL == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif VL == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    vi greater = a > b;
    return (vf)((greater & (vi)a) | (~greater & (vi)b));
#endif
}

INLINE vf vmin(vf a, vf b)
{
#if VL == 16
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif VL == 8
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    vi less = a < b;
    return (vf)((less & (vi)a) | (~less & (vi)b));
#endif
}

/* To the nearest integers, halves to the even one; |a| < 2^22. */
INLINE vi vround(vf a)
{
#if VL == 16
    return (vi)_mm512_cvtps_epi32((__m512)a);
#elif VL == 8
    return (vi)_mm256_cvtps_epi32((__m256)a);
#else
    return (vi)(a + vset(12582912.0f)) - iset(0x4b400000); /* 1.5 * 2^23: the sum's last bits are the integer */
#endif
}

INLINE vi imax(vi a, vi b)
{
#if VL == 16
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif VL == 8
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    vi greater = a > b;
    return (greater & a) | (~greater & b);
#endif
}

INLINE vi imin(vi a, vi b)
{
#if VL == 16
    return (vi)_mm512_min_epi32((__m512i)a, (__m512i)b);
#elif VL == 8
    return (vi)_mm256_min_epi32((__m256i)a, (__m256i)b);
#else
    vi less = a < b;
    return (less & a) | (~less & b);
#endif
}

INLINE int32_t ihmax(vi v)
{
#if VL == 16
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t top = v[0];
    for (int i = 1; i < VL; i++)
        top = v[i] > top ? v[i] : top;
    return top;
#endif
}

INLINE int32_t ihsum(vi v)
{
#if VL == 16
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t sum = v[0];
    for (int i = 1; i < VL; i++)
        sum += v[i];
    return sum;
#endif
}

/* The sums of the lanes of four vectors. */
INLINE void ihsums(const vi v[4], int32_t to[4])
{
#if VL == 16
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32((__m512i)v[0], (__m512i)v[1]),
                                       _mm512_unpackhi_epi32((__m512i)v[0], (__m512i)v[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32((__m512i)v[2], (__m512i)v[3]),
                                       _mm512_unpackhi_epi32((__m512i)v[2], (__m512i)v[3]));
    const __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m256i d = _mm256_add_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
    const __m128i e = _mm_add_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1));
    _mm_storeu_si128((__m128i *)to, e);
#else
    for (int i = 0; i < 4; i++)
        to[i] = ihsum(v[i]);
#endif
}

INLINE float hmax(vf v)
{
#if VL == 16
    return _mm512_reduce_max_ps((__m512)v);
#else
    float top = v[0];
    for (int i = 1; i < VL; i++)
        top = v[i] > top ? v[i] : top;
    return top;
#endif
}

/* Sum of the lanes, always in the same order. */
INLINE float hsum(vf v)
{
#if VL == 16
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float lane[VL];
    for (int i = 0; i < VL; i++)
        lane[i] = v[i];
    for (int step = VL / 2; step; step /= 2)
        for (int i = 0; i < step; i++)
            lane[i] += lane[i + step];
    return lane[0];
#endif
}

INLINE size_t smin(size_t a, size_t b) { return a < b ? a : b; }

#endif
