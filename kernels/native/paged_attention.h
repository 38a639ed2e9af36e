/* Arguments of one attention call, and the vector arithmetic that only attention needs. */
#ifndef PEQA_PAGED_ATTENTION_H
#define PEQA_PAGED_ATTENTION_H

#include "half_numbers.h"
#include "kv_layout.h"
#include "pool.h"
#include "vec.h"

#define CHUNK 64     /* keys taken at once: part of the order of additions; d x 64 floats stay in the first cache */
#define ITEM_ROWS 48 /* queries x heads of one work item: enough to pay for transposing the keys */
#define BLOCK_ROWS 6 /* rows of one register tile */
#define LINE 64      /* bytes of a line of the processor's caches */

typedef struct {
    float *scratch, *out;
    const float *q, *sinks;
    const char *keys, *values; /* of the caches, laid out as kv_layout says */
    int half;                  /* the caches are fp16, else fp32 */
    const int32_t *block_tables, *query_starts, *seq_lens;
    size_t q_token, q_head, table_stride, seqs, heads, kv_heads, d, d_v, block_size;
    kv_strides at;
    float scaling, softcap;
    int64_t window;
} attention;

/* A thread's work items, in a line of its own: those before `next` are taken. Where rows are taken apart (decoder.c) these
 * are mostly the sequences whose queries it has made, and what they read of this step lies in its own caches. Then it
 * goes on with what others have left. Which thread takes an item changes nothing in its result. */
typedef struct {
    size_t next, end;
    char rest[LINE - 2 * sizeof(size_t)];
} share;

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

/* VL rows of d floats at rows[0..VL-1] -> to[i * stride + row]. */
INLINE void transpose_rows(const float *const *rows, size_t d, float *to, size_t stride)
{
    size_t i = 0;
#if VL == 16
    /* Four rows per 128-bit lane, put there by the load ports, then a 4 x 4 transposition in every lane. */
    for (; i + 4 <= d; i += 4) {
        __m512 a[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            a[r] = _mm512_castps128_ps512(_mm_loadu_ps(rows[r] + i));
            a[r] = _mm512_mask_broadcast_f32x4(a[r], 0x00F0, _mm_loadu_ps(rows[4 + r] + i));
            a[r] = _mm512_mask_broadcast_f32x4(a[r], 0x0F00, _mm_loadu_ps(rows[8 + r] + i));
            a[r] = _mm512_mask_broadcast_f32x4(a[r], 0xF000, _mm_loadu_ps(rows[12 + r] + i));
        }
        const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(a[0], a[1]));
        const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(a[0], a[1]));
        const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(a[2], a[3]));
        const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(a[2], a[3]));
        _mm512_storeu_pd((double *)(to + i * stride), _mm512_unpacklo_pd(low01, low23));
        _mm512_storeu_pd((double *)(to + (i + 1) * stride), _mm512_unpackhi_pd(low01, low23));
        _mm512_storeu_pd((double *)(to + (i + 2) * stride), _mm512_unpacklo_pd(high01, high23));
        _mm512_storeu_pd((double *)(to + (i + 3) * stride), _mm512_unpackhi_pd(high01, high23));
    }
#elif VL == 8
    for (; i + 4 <= d; i += 4) {
        __m256 a[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            a[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[r] + i)),
                                        _mm_loadu_ps(rows[4 + r] + i), 1);
        const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(a[0], a[1]));
        const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(a[0], a[1]));
        const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(a[2], a[3]));
        const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(a[2], a[3]));
        _mm256_storeu_pd((double *)(to + i * stride), _mm256_unpacklo_pd(low01, low23));
        _mm256_storeu_pd((double *)(to + (i + 1) * stride), _mm256_unpackhi_pd(low01, low23));
        _mm256_storeu_pd((double *)(to + (i + 2) * stride), _mm256_unpacklo_pd(high01, high23));
        _mm256_storeu_pd((double *)(to + (i + 3) * stride), _mm256_unpackhi_pd(high01, high23));
    }
#endif
    for (; i < d; i++)
        for (size_t r = 0; r < VL; r++)
            to[i * stride + r] = rows[r][i];
}

#endif
