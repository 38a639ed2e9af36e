/* A panel of a quantized weight as floats, for training: ((code - zero) * scale [* into]), rounded once.
 *
 * Codes come as files hold them: per output one little-endian bit stream along the inputs (peqa_kernels.packing).
 * Everything happens element by element in one order, so neither threads nor panels can change a bit.
 */
#include "pool.h"
#include "vec.h"

#define BLOCK 1024 /* codes unpacked at a time; a multiple of 8, so that a block begins with a byte */

typedef struct {
    const uint8_t *codes;
    const float *scales, *zeros;      /* [N, groups] */
    const float *out, *into, *group;  /* [N], [K], [groups, N]; NULL means ones */
    void *panel;                      /* [rows, columns] */
    int64_t bits, row_bytes, outputs, groups, group_size;
    int64_t row, rows, column, columns;
    int64_t halves;                   /* the panel is bfloat16, else float32 */
} dequantization;

/* Eight codes of `bits` bits are `bits` whole bytes; spread them to a byte each, halving the distance thrice. */
INLINE uint64_t spread(const uint8_t *from, const int bits)
{
    uint64_t x = 0;
    for (int i = 0; i < bits; i++)
        x |= (uint64_t)from[i] << (8 * i);
    x = (x | x << (32 - 4 * bits)) & ((1ull << 4 * bits) - 1) * 0x0000000100000001ull;
    x = (x | x << (16 - 2 * bits)) & ((1ull << 2 * bits) - 1) * 0x0001000100010001ull;
    return (x | x << (8 - bits)) & ((1ull << bits) - 1) * 0x0101010101010101ull;
}

/* `count` codes from the start of a byte; up to 7 bytes behind them are written. */
INLINE void unpack_narrow(const uint8_t *from, const int bits, int64_t count, uint8_t *to)
{
    int64_t i = 0;
    for (; i + 8 <= count; i += 8, from += bits) {
        const uint64_t eight = spread(from, bits);
        __builtin_memcpy(to + i, &eight, 8);
    }
    if (i < count) { /* nothing behind the row's last byte may be read */
        uint8_t last[4] = {0};
        for (int64_t byte = 0; byte < ((count - i) * bits + 7) / 8; byte++)
            last[byte] = from[byte];
        const uint64_t eight = spread(last, bits);
        __builtin_memcpy(to + i, &eight, 8);
    }
}

static void unpack(const uint8_t *from, int64_t bits, int64_t count, uint8_t *to)
{
    if (bits == 8)
        __builtin_memcpy(to, from, (size_t)count);
    else if (bits == 4)
        unpack_narrow(from, 4, count, to);
    else if (bits == 3)
        unpack_narrow(from, 3, count, to);
    else
        unpack_narrow(from, 2, count, to);
}

/* To bfloat16, ties to even; finite values only. */
INLINE uint16_t rounded(float value)
{
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

INLINE void fill(const int halves, const float *into, const uint8_t *codes, float zero, float scale, void *to, int64_t n)
{
    float *restrict wide = to;
    uint16_t *restrict narrow = to;
    for (int64_t i = 0; i < n; i++) {
        float value = ((float)codes[i] - zero) * scale;
        if (into)
            value *= into[i];
        if (halves)
            narrow[i] = rounded(value);
        else
            wide[i] = value;
    }
}

static void fill_any(const dequantization *d, const uint8_t *codes, int64_t k, float zero, float scale, void *to,
                     int64_t n)
{
    if (d->into && d->halves)
        fill(1, d->into + k, codes, zero, scale, to, n);
    else if (d->into)
        fill(0, d->into + k, codes, zero, scale, to, n);
    else if (d->halves)
        fill(1, 0, codes, zero, scale, to, n);
    else
        fill(0, 0, codes, zero, scale, to, n);
}

static void work(void *data, int part, int parts)
{
    const dequantization *d = data;
    const int64_t from = d->rows * part / parts, to = d->rows * (part + 1) / parts;
    uint8_t codes[BLOCK];
    for (int64_t row = from; row < to; row++) {
        const int64_t n = d->row + row;
        char *line = (char *)d->panel + row * d->columns * (d->halves ? 2 : 4);
        for (int64_t first = 0; first < d->columns; first += BLOCK) {
            const int64_t start = d->column + first;
            const int64_t count = d->columns - first < BLOCK ? d->columns - first : BLOCK;
            unpack(d->codes + n * d->row_bytes + start * d->bits / 8, d->bits, count, codes);
            for (int64_t i = 0; i < count;) {
                const int64_t g = (start + i) / d->group_size, rest = (g + 1) * d->group_size - (start + i);
                const int64_t some = rest < count - i ? rest : count - i;
                float scale = d->scales[n * d->groups + g];
                if (d->group)
                    scale *= d->group[g * d->outputs + n];
                if (d->out)
                    scale *= d->out[n];
                fill_any(d, codes + i, start + i, d->zeros[n * d->groups + g], scale,
                         line + (first + i) * (d->halves ? 2 : 4), some);
                i += some;
            }
        }
    }
}

/* Fills panel [rows, columns], whose first element is weight element [row, column]; column is a multiple of 8. */
EXPORT void peqa_dequantize(peqa_pool *pool, int64_t threads, void *panel, int64_t halves, const uint8_t *codes,
                            const float *scales, const float *zeros, const float *out, const float *into,
                            const float *group, int64_t bits, int64_t row_bytes, int64_t outputs, int64_t groups,
                            int64_t group_size, int64_t row, int64_t rows, int64_t column, int64_t columns)
{
    dequantization d = {codes, scales, zeros, out, into, group, panel, bits, row_bytes, outputs, groups, group_size,
                        row, rows, column, columns, halves};
    pool_run(pool, (int)threads, work, &d);
}
