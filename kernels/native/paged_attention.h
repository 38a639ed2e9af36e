/* Arguments of one attention call, and what only attention needs. */
#ifndef PEQA_PAGED_ATTENTION_H
#define PEQA_PAGED_ATTENTION_H

#include "half_numbers.h"
#include "kv_layout.h"
#include "pool.h"
#include "vec.h"
#include "vec_math.h"

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
