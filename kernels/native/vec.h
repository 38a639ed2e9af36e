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

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
/* immintrin.h wants stdlib.h for _mm_malloc; these are the names by which gcc and clang know that it was read. */
#define _MM_MALLOC_H_INCLUDED
#define __MM_MALLOC_H
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX2__) && defined(__FMA__)
#define VL 8
#elif defined(__aarch64__)
#include <arm_neon.h>
#define VL 4
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef int8_t vb __attribute__((vector_size(VL)));
/* The same types at any address. */
typedef float vf_u __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi_u __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int8_t vb_u __attribute__((vector_size(VL), aligned(1), may_alias));

INLINE vf vload(const float *p) { return *(const vf_u *)p; }
INLINE void vstore(float *p, vf v) { *(vf_u *)p = v; }
INLINE vi iload(const int32_t *p) { return *(const vi_u *)p; }

/* The first n of the floats at p, at most VL; nothing behind them is read. */
INLINE vf vpart(const float *p, size_t n)
{
    if (__builtin_expect(n >= VL, 1))
        return vload(p);
    float lane[VL] = {0};
    for (size_t i = 0; i < n; i++)
        lane[i] = p[i];
    return vload(lane);
}

INLINE void vput(float *p, vf v, size_t n)
{
    if (__builtin_expect(n >= VL, 1)) {
        vstore(p, v);
        return;
    }
    for (size_t i = 0; i < n; i++)
        p[i] = v[i];
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

INLINE float hmax(vf v)
{
    float top = v[0];
    for (int i = 1; i < VL; i++)
        top = v[i] > top ? v[i] : top;
    return top;
}

/* Sum of the lanes, always in the same order. */
INLINE float hsum(vf v)
{
    float lane[VL];
    for (int i = 0; i < VL; i++)
        lane[i] = v[i];
    for (int step = VL / 2; step; step /= 2)
        for (int i = 0; i < step; i++)
            lane[i] += lane[i + step];
    return lane[0];
}

INLINE size_t smin(size_t a, size_t b) { return a < b ? a : b; }

#endif
