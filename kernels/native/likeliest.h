/* The most likely tokens of a row in falling order, without sorting the row: those within some depth below the best are
 * gathered into a heap, and taken out as far as they are wanted. */
#ifndef PEQA_LIKELIEST_H
#define PEQA_LIKELIEST_H

#include "vec_math.h"

#define BLOCK ((size_t)1024) /* weights that are summed in floats before the sum goes on in doubles */

/* Logit and token in one number: greater is likelier, and of equals the first token. */
INLINE uint64_t entry(float logit, size_t token)
{
    union {
        float f;
        uint32_t u;
    } bits = {logit + 0.0f}; /* no minus zero */
    const uint32_t ordered = bits.u ^ (bits.u >> 31 ? UINT32_MAX : (uint32_t)1 << 31);
    return (uint64_t)ordered << 32 | (uint32_t)~(uint32_t)token;
}
INLINE size_t token_of(uint64_t entry) { return (uint32_t)~(uint32_t)entry; }

static void sink(uint64_t *heap, size_t at, size_t n)
{
    const uint64_t moved = heap[at];
    for (size_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && heap[child + 1] > heap[child])
            child++;
        if (heap[child] <= moved)
            break;
        heap[at] = heap[child];
    }
    heap[at] = moved;
}

/* Takes the greatest of n entries out, to heap[n - 1]; returns its token. */
static size_t take(uint64_t *heap, size_t n)
{
    const uint64_t top = heap[0];
    heap[0] = heap[n - 1];
    heap[n - 1] = top;
    sink(heap, 0, n - 1);
    return token_of(top);
}

INLINE int any_lane(vi mask)
{
#if VL == 16
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif VL == 8
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

INLINE vi not_below(const float *x, size_t i, size_t n, vf floor)
{
    const vi hit = vpart(x + i, n - i) >= floor;
    return n - i < VL ? (vi)vwithin((vf)hit, 0, (int32_t)(n - i), vset(0.0f)) : hit;
}

/* Tokens whose logit is at least `floor`, and what they weigh together. */
static size_t count_from(const float *x, const float *weight, size_t n, float floor, double *mass)
{
    size_t count = 0;
    *mass = 0.0;
    for (size_t start = 0; start < n; start += BLOCK) {
        vf sum = vset(0.0f);
        vi hits = {0};
        for (size_t i = start; i < smin(n, start + BLOCK); i += VL) {
            const vi hit = not_below(x, i, n, vset(floor));
            hits -= hit;
            sum += vselect(hit, vload(weight + i), vset(0.0f));
        }
        for (int i = 0; i < VL; i++)
            count += (size_t)hits[i];
        *mass += (double)hsum(sum);
    }
    return count;
}

/* A heap of the tokens from `floor` on; their number. */
static size_t gather(const float *x, size_t n, float floor, uint64_t *heap)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i += VL)
        if (any_lane(not_below(x, i, n, vset(floor))))
            for (size_t l = i; l < smin(n, i + VL); l++)
                if (x[l] >= floor)
                    heap[count++] = entry(x[l], l);
    for (size_t at = count / 2; at-- > 0;)
        sink(heap, at, count);
    return count;
}

/* How far below the best one tokens are taken in, tried one after the other until they hold all that is wanted: first
 * to a sixteenth of its weight (at temperature 1), then to a quarter of that, and so on; at last all. */
#define FIRST_DEPTH 2.7725887f
INLINE float deeper(float depth)
{
    return depth < 30.0f ? depth + 1.3862944f : depth < 100.0f ? 2.0f * depth : __builtin_inff();
}

#endif
