/* Activations as integers in the order in which the tiles read them, input scales applied.
 *
 * Of 16 bits: the inputs of a block share a power of two, the least that keeps them below 2^15: rounding errs by at most
 * 2^-16 of the block's largest magnitude (bf16 errs by 2^-9 of it there), and small integers come through exactly.
 * Of 8 bits: the block's largest magnitude becomes 127; rounding errs by at most 2^-8 of it.
 */
#include "quant_matmul.h"

#define INFINITE 0x7f800000

typedef struct {
    const float *from;   /* the row's inputs */
    const void *scale;   /* its input scales or NULL */
    int half;            /* fp16 */
    int32_t *x, *counts;       /* the row's own first word of each array, a stripe's rows apart from the next */
    float *steps;
    size_t rows; /* of the stripe */
    size_t padded_rows; /* of a stripe of matrix tiles, where these are what it is for; else 0 */
    int32_t most;       /* the largest integer */
} row_target;

/* One row's chain of `real` values, copied with zeros up to `length` and scaled; returns its largest magnitude's bits. */
INLINE int32_t load_chain(const row_target *t, size_t first, size_t real, size_t length, float *to)
{
    const float *from = t->from + first, *scale = t->scale && !t->half ? (const float *)t->scale + first : 0;
    const uint16_t *half = t->scale && t->half ? (const uint16_t *)t->scale + first : 0;
    vi top = iset(0);
    for (size_t k = 0; k < length; k += VL) {
        vf x = k < real ? vpart(from + k, real - k) : vset(0.0f);
        if (scale && k < real)
            x *= vpart(scale + k, real - k);
        if (half && k < real)
            x *= hpart(half + k, real - k);
        vstore(to + k, x);
        top = imax(top, (vi)x & iset(0x7fffffff));
    }
    return ihmax(top);
}

/* Rounds one unit to pairs; returns `total` with the integers added. */
INLINE vi round_unit(const float *from, float by, vi most, int32_t *to, vi total)
{
    const vi ones = iset(0x10001);
    for (size_t i = 0; i < PAIRS; i += VL) {
        const vi low = imin(vround(vload(from + i) * vset(by)), most);
        const vi high = imin(vround(vload(from + PAIRS + i) * vset(by)), most);
        const vi pair = (low & iset(0xffff)) | ileft(high, 16);
        istore(to + i, pair);
        total = idot(total, pair, ones);
    }
    return total;
}

/* Rounds a chain to units `stride` words apart; returns the sum of the integers. */
INLINE int32_t round_chain(const float *from, float by, vi most, size_t length, int32_t *to, size_t stride)
{
    vi total = iset(0);
    for (size_t k = 0; k < length; k += UNIT, to += stride)
        total = round_unit(from + k, by, most, to, total);
    return ihsum(total);
}

#if BYTE_DOTS
/* The same to quads, in the order of codes of so many bits. */
INLINE int32_t round_bytes(const float *from, float by, size_t length, size_t bits, int32_t *to, size_t stride)
{
    int32_t pair[PAIRS] __attribute__((aligned(64)));
    vi total = iset(0), first, second;
    for (int i = 0; i < VL; i++) {
        first[i] = (int32_t)quad_first(bits, (size_t)i % QUADS);
        second[i] = (int32_t)quad_second(bits, (size_t)i % QUADS);
    }
    for (size_t k = 0; k < length; k += UNIT, to += stride) {
        total = round_unit(from + k, by, iset(127), pair, total);
        const vi bytes = iload(pair) & iset(0xff00ff);
        const __m512i a = _mm512_permutexvar_epi32((__m512i)first, (__m512i)bytes);
        const __m512i b = _mm512_permutexvar_epi32((__m512i)second, (__m512i)bytes);
        _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256((__m512i)quad_of((vi)a, (vi)b)));
    }
    return ihsum(total);
}
#endif

#if TILES
/* The same to the bytes of slabs, see packed_rows: `to` is the row's in the stripe's first slab; the chain begins with
 * input k0. */
INLINE int32_t split_chain(const float *from, float by, vi most, size_t length, uint8_t *to, size_t k0, size_t slab,
                           size_t padded_rows)
{
    int32_t pair[PAIRS] __attribute__((aligned(64)));
    vi total = iset(0);
    for (size_t k = 0; k < length; k += UNIT) {
        total = round_unit(from + k, by, most, pair, total);
        uint8_t *low = to + (k0 + k) / slab * slab * 2 * padded_rows + (k0 + k) % slab;
        uint8_t *high = low + slab * padded_rows;
        for (size_t i = 0; i < PAIRS / 2; i++) {
            const uint32_t a = (uint32_t)pair[2 * i], b = (uint32_t)pair[2 * i + 1], even = 0x00ff00ff;
            const uint32_t low_bytes = (a & even) | (b & even) << 8, high_bytes = (a >> 8 & even) | (b & ~even);
            __builtin_memcpy(low + 4 * i, &low_bytes, 4);
            __builtin_memcpy(high + 4 * i, &high_bytes, 4);
        }
    }
    return ihsum(total);
}
#endif

/* Returns the sum of the block's integers times their step. */
static float pack_block(const peqa_weight *w, const cuts *c, const row_target *t, size_t block)
{
    float value[CHAIN] __attribute__((aligned(64)));
    const size_t first = block * c->block_chains, last = smin(first + c->block_chains, c->chains);
    const size_t size = (size_t)w->group_size, start = chain_start(c, first);
    int32_t top = 0;
    for (size_t chain = first; chain < last; chain++) {
        const size_t within = chain % c->group_chains * CHAIN, k = chain / c->group_chains * size + within;
        const size_t length = chain_length(c, chain);
        const int32_t found = load_chain(t, k, smin(length, size - within), length, value + (chain_start(c, chain) - start));
        top = found > top ? found : top;
    }
    /* Largest magnitude < 2^(exponent - 126): that over 2^15 is the step. Far below any activation it stays normal. A row
     * with an infinity or a NaN has no finite result. */
    const int finite = (top & INFINITE) != INFINITE;
    int32_t exponent = top & INFINITE;
    exponent = exponent < 15 << 23 ? 15 << 23 : exponent;
    float step = float_of(finite ? exponent - (14 << 23) : INFINITE | 1 << 22);
    float by = finite ? float_of((268 << 23) - exponent) : 0.0f;
    if (t->most == 127 && finite) {
        const float largest = float_of(top > 1 << 29 ? top : 1 << 29); /* 2^-63: zeros have a step, too */
        step = largest / 127.0f;
        by = 127.0f / largest;
    }
    const vi most = iset(t->most);
    t->steps[block * t->rows] = step;
    int32_t total = 0;
    for (size_t chain = first; chain < last; chain++) {
        const size_t at = chain_start(c, chain);
        const size_t length = chain_length(c, chain);
        int32_t count;
#if TILES
        if (t->padded_rows)
            count = split_chain(value + (at - start), by, most, length, (uint8_t *)t->x, at, slab_of(c), t->padded_rows);
        else
#elif BYTE_DOTS
        if (in_bytes(w))
            count = round_bytes(value + (at - start), by, length, (size_t)w->bits, t->x + at / 4 * t->rows,
                                t->rows * QUADS);
        else
#endif
            count = round_chain(value + (at - start), by, most, length, t->x + at / 2 * t->rows, t->rows * PAIRS);
        total += count;
        /* Codes are stored unsigned; with offsets the zero points are all in those. */
        t->counts[chain * t->rows] = w->offsets ? bits_of(-(float)count) : -count * (1 << (w->bits - 1));
    }
    return (float)total * step;
}

void peqa_pack_rows(const peqa_weight *w, packed_rows out, const float *x, size_t ldx, const void *in_scale, int half,
                    const int32_t *row, size_t rows, size_t stripe)
{
    const cuts c = cut(w);
    const size_t first = stripe_start(stripe, rows), n = stripe_start(stripe + 1, rows) - first;
    const size_t padded = on_tiles(rows) ? tile_stripe_rows(rows) : 0, words = input_words(w, &c);

    for (size_t segment = 0; segment < out.segments; segment++)
        for (size_t r = 0; r < n; r++) {
            const size_t at = segment * stripe_room(stripe_count(rows), rows) + stripe_room(stripe, rows);
            const char *scale = 0;
            if (in_scale)
                scale = (const char *)in_scale + ((size_t)row[first + r] * (size_t)w->segments + segment) *
                                                     (size_t)w->in_features * (half ? 2 : 4);
            const row_target target = {
                .from = x + (first + r) * ldx,
                .scale = scale,
                .half = half,
                .x = out.x + at * words + (padded ? r * slab_of(&c) / 4 : in_bytes(w) ? r * QUADS : r * PAIRS),
                .counts = out.counts + at * c.chains + r,
                .steps = out.steps + at * c.blocks + r,
                .rows = n,
                .padded_rows = padded,
                .most = w->activation_bits == 8 ? 127 : 32767,
            };
            float total = 0.0f;
            for (size_t block = 0; block < c.blocks; block++)
                total += pack_block(w, &c, &target, block);
            if (scale_at_end(w))
                target.counts[0] = bits_of(-total);
        }
}
