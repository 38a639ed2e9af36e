/* Activations as integers in the order in which the tiles read them, input scales applied.
 *
 * Of 16 bits: the inputs of a block share a power of two, the least that keeps them below 2^15: rounding errs by at most
 * 2^-16 of the block's largest magnitude (bf16 errs by 2^-9 of it there), and small integers come through exactly.
 * Of 8 bits: the block's largest magnitude becomes 127; rounding errs by at most 2^-8 of it.
 */
#include "quant_matmul.h"

#define INFINITE 0x7f800000

/* Where one row's inputs come from and its integers go. */
typedef struct {
    const float *from;
    const void *scale;   /* its input scales or NULL */
    int half;            /* fp16 */
    int32_t *x, *counts; /* the row's own first word of each array, a stripe's rows apart from the next */
    float *steps;
    size_t rows;        /* of the stripe */
    size_t padded_rows; /* of a stripe of matrix tiles, where these are what it is for; else 0 */
} row_target;

/* One block's inputs, the same of every row: `chains` of `real` values each, padded with zeros to `length`. */
typedef struct {
    size_t block, chain, chains, length, real;
    size_t k, at; /* the first one's place among the inputs, and among the padded ones */
} block_span;

#define CHAINS_MAX (CHAIN / UNIT) /* of one block */

INLINE block_span span_of(const peqa_weight *w, const cuts *c, size_t block)
{
    const size_t chain = block * c->block_chains, within = chain % c->group_chains * CHAIN;
    const size_t length = chain_length(c, chain);
    return (block_span){
        .block = block,
        .chain = chain,
        .chains = smin(c->block_chains, c->chains - chain),
        .length = length,
        .real = smin(length, (size_t)w->group_size - within),
        .k = chain / c->group_chains * (size_t)w->group_size + within,
        .at = chain_start(c, chain),
    };
}

/* A block's values, scaled and padded, in `to`. */
INLINE void scaled_values(const row_target *t, const block_span *b, float *to)
{
    for (size_t chain = 0; chain < b->chains; chain++, to += b->length) {
        const size_t first = b->k + chain * b->real;
        for (size_t k = 0; k < b->length; k += VL) {
            vf x = vset(0.0f);
            if (k < b->real) {
                const size_t left = b->real - k, at = first + k;
                x = vpart(t->from + at, left);
                if (t->scale)
                    x *= t->half ? hpart((const uint16_t *)t->scale + at, left) : vpart((const float *)t->scale + at, left);
            }
            vstore(to + k, x);
        }
    }
}

/* The bits of the largest magnitude. */
INLINE int32_t top_of(const float *value, size_t n)
{
    vi top = iset(0);
    for (size_t k = 0; k < n; k += VL)
        top = imax(top, (vi)vload(value + k) & iset(0x7fffffff));
    return ihmax(top);
}

/* Rounds one unit to pairs; returns `total` with the integers added. */
INLINE vi round_unit(const float *from, float by, int32_t most, int32_t *to, vi total)
{
    for (size_t i = 0; i < PAIRS; i += VL) {
        const vi low = imin(vround(vload(from + i) * vset(by)), iset(most));
        const vi high = imin(vround(vload(from + PAIRS + i) * vset(by)), iset(most));
        const vi pair = (low & iset(0xffff)) | ileft(high, 16);
        istore(to + i, pair);
        total = idot(total, pair, iset(0x10001));
    }
    return total;
}

/* Rounds a chain to units `stride` words apart; returns the lanes' sums of the integers. */
INLINE vi round_chain(const float *from, float by, int32_t most, size_t length, int32_t *to, size_t stride)
{
    vi total = iset(0);
    for (size_t k = 0; k < length; k += UNIT, to += stride)
        total = round_unit(from + k, by, most, to, total);
    return total;
}

#if BYTE_DOTS
/* The same to quads, in the order of codes of so many bits. */
INLINE vi round_bytes(const int bits, const float *from, float by, size_t length, int32_t *to, size_t stride)
{
    int32_t pair[PAIRS] __attribute__((aligned(64)));
    vi total = iset(0), first, second;
    UNROLL for (int i = 0; i < VL; i++)
    {
        first[i] = (int32_t)quad_first((size_t)bits, (size_t)i % QUADS);
        second[i] = (int32_t)quad_second((size_t)bits, (size_t)i % QUADS);
    }
    for (size_t k = 0; k < length; k += UNIT, to += stride) {
        total = round_unit(from + k, by, 127, pair, total);
        const vi bytes = iload(pair) & iset(0xff00ff);
        const __m512i a = _mm512_permutexvar_epi32((__m512i)first, (__m512i)bytes);
        const __m512i b = _mm512_permutexvar_epi32((__m512i)second, (__m512i)bytes);
        _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256((__m512i)quad_of((vi)a, (vi)b)));
    }
    return total;
}
#endif

#if TILES
/* The same to the bytes of slabs, see packed_rows: `to` is the row's in the stripe's first slab; the chain begins with
 * input k0. */
INLINE vi split_chain(const float *from, float by, int32_t most, size_t length, uint8_t *to, size_t k0, size_t slab,
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
    return total;
}
#endif

/* One chain's integers, `at` their place among the padded inputs. */
INLINE vi place_chain(const peqa_weight *w, const cuts *c, const row_target *t, const float *from, float by,
                      int32_t most, size_t length, size_t at)
{
    (void)c, (void)w;
#if TILES
    if (t->padded_rows)
        return split_chain(from, by, most, length, (uint8_t *)t->x, at, slab_of(c), t->padded_rows);
#elif BYTE_DOTS
    int32_t *bytes = t->x + at / 4 * t->rows;
    if (in_bytes(w))
        switch (w->bits) {
        case 2: return round_bytes(2, from, by, length, bytes, t->rows * QUADS);
        case 3: return round_bytes(3, from, by, length, bytes, t->rows * QUADS);
        case 4: return round_bytes(4, from, by, length, bytes, t->rows * QUADS);
        default: return round_bytes(8, from, by, length, bytes, t->rows * QUADS);
        }
#endif
    return round_chain(from, by, most, length, t->x + at / 2 * t->rows, t->rows * PAIRS);
}

/* Returns the sum of the block's integers times their step. */
INLINE float pack_block(const peqa_weight *w, const cuts *c, const row_target *t, const block_span *b)
{
    float room[CHAIN] __attribute__((aligned(64)));
    const float *value = t->from + b->k;
    if (t->scale || b->real != b->length) {
        scaled_values(t, b, room);
        value = room;
    }
    const int32_t top = top_of(value, b->chains * b->length);
    /* Largest magnitude < 2^(exponent - 126): that over 2^15 is the step. Far below any activation it stays normal. A row
     * with an infinity or a NaN has no finite result. */
    const int finite = (top & INFINITE) != INFINITE;
    int32_t exponent = top & INFINITE, most = 32767;
    exponent = exponent < 15 << 23 ? 15 << 23 : exponent;
    float step = float_of(finite ? exponent - (14 << 23) : INFINITE | 1 << 22);
    float by = finite ? float_of((int32_t)((268u << 23) - (uint32_t)exponent)) : 0.0f;
    if (w->activation_bits == 8) {
        most = 127;
        if (finite) {
            const float largest = float_of(top > 1 << 29 ? top : 1 << 29); /* 2^-63: zeros have a step, too */
            step = largest / 127.0f;
            by = 127.0f / largest;
        }
    }
    t->steps[b->block * t->rows] = step;
    vi lanes[CHAINS_MAX];
    int32_t count[CHAINS_MAX], total = 0;
    UNROLL for (size_t chain = 0; chain < CHAINS_MAX; chain++)
    {
        const size_t at = chain * b->length;
        lanes[chain] = chain < b->chains ? place_chain(w, c, t, value + at, by, most, b->length, b->at + at) : iset(0);
    }
    ihsums(lanes, count);
    for (size_t chain = 0; chain < b->chains; chain++) {
        total += count[chain];
        /* Codes are stored unsigned; with offsets the zero points are all in those. */
        t->counts[(b->chain + chain) * t->rows] =
            w->offsets ? bits_of(-(float)count[chain]) : -count[chain] * (1 << (w->bits - 1));
    }
    return (float)total * step;
}

void peqa_pack_rows(const peqa_weight *w, packed_rows out, const float *x, size_t ldx, const void *in_scale, int half,
                    const int32_t *row, size_t rows, size_t stripe)
{
    const cuts c = cut(w);
    const size_t first = stripe_start(stripe, rows), n = stripe_start(stripe + 1, rows) - first;
    const size_t padded = on_tiles(rows) ? tile_stripe_rows(rows) : 0, words = input_words(w, &c);
    const size_t apart = padded ? slab_of(&c) / 4 : in_bytes(w) ? QUADS : PAIRS;

    for (size_t segment = 0; segment < out.segments; segment++) {
        const size_t at = segment * stripe_room(stripe_count(rows), rows) + stripe_room(stripe, rows);
        row_target target[STRIPE_ROWS];
        float total[STRIPE_ROWS];
        for (size_t r = 0; r < n; r++) {
            const char *scale = 0;
            if (in_scale)
                scale = (const char *)in_scale + ((size_t)row[first + r] * (size_t)w->segments + segment) *
                                                     (size_t)w->in_features * (half ? 2 : 4);
            total[r] = 0.0f;
            target[r] = (row_target){
                .from = x + (first + r) * ldx,
                .scale = scale,
                .half = half,
                .x = out.x + at * words + r * apart,
                .counts = out.counts + at * c.chains + r,
                .steps = out.steps + at * c.blocks + r,
                .rows = n,
                .padded_rows = padded,
            };
        }
        for (size_t block = 0; block < c.blocks; block++) {
            const block_span span = span_of(w, &c, block);
            for (size_t r = 0; r < n; r++)
                total[r] += pack_block(w, &c, &target[r], &span);
        }
        if (scale_at_end(w))
            for (size_t r = 0; r < n; r++)
                target[r].counts[0] = bits_of(-total[r]);
    }
}
