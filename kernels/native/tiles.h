/* The matrix tiles of a processor that has them (AMX): 16 rows of 64 bytes, products of bytes summed in 32 bits.
 *
 * A build with PEQA_EMULATED_TILES does the same in plain C, for tests on other processors.
 */
#ifndef PEQA_TILES_H
#define PEQA_TILES_H

#include "vec.h"

#if defined(__AMX_INT8__) && defined(__x86_64__)
#define TILES 1
#elif defined(PEQA_EMULATED_TILES)
#define TILES 1
#define EMULATED 1
#else
#define TILES 0
#endif

#if TILES
#define TILE_ROWS 16

/* Which tile holds what: sums of low and of high bytes of two vectors of lanes, the rows' bytes, the codes. */
#define SUM_LOW_0 0
#define SUM_HIGH_0 1
#define SUM_LOW_1 2
#define SUM_HIGH_1 3
#define X_LOW 4
#define X_HIGH 5
#define CODES_0 6
#define CODES_1 7

/* How LDTILECFG reads it. */
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
} tile_shapes;

/* Tiles for `rows` rows and `slab` inputs at a time. */
INLINE tile_shapes shapes_for(size_t rows, size_t slab)
{
    tile_shapes s = {.palette = 1};
    for (int i = SUM_LOW_0; i <= CODES_1; i++) {
        s.bytes[i] = (uint16_t)(i == X_LOW || i == X_HIGH ? slab : 64);
        s.rows[i] = (uint8_t)(i >= CODES_0 ? slab / 4 : rows);
    }
    return s;
}

#if EMULATED
typedef struct {
    tile_shapes shapes;
    uint8_t byte[8][TILE_ROWS][64];
} tiles;

INLINE void tiles_begin(tiles *t, const tile_shapes *shapes) { t->shapes = *shapes; }
INLINE void tiles_end(tiles *t) { (void)t; }

INLINE void tile_zero(tiles *t, const int to) { __builtin_memset(t->byte[to], 0, sizeof t->byte[to]); }

INLINE void tile_load(tiles *t, const int to, const void *from, size_t stride)
{
    tile_zero(t, to);
    for (size_t r = 0; r < t->shapes.rows[to]; r++)
        __builtin_memcpy(t->byte[to][r], (const char *)from + r * stride, t->shapes.bytes[to]);
}

INLINE void tile_store(tiles *t, const int from, void *to, size_t stride)
{
    for (size_t r = 0; r < t->shapes.rows[from]; r++)
        __builtin_memcpy((char *)to + r * stride, t->byte[from][r], t->shapes.bytes[from]);
}

/* sum[r][n] += x[r][4 k + i] * codes[k][4 n + i] */
INLINE void tile_products(tiles *t, const int sum, const int x, const int codes, const int is_signed)
{
    for (size_t r = 0; r < t->shapes.rows[sum]; r++)
        for (size_t n = 0; n < 16; n++) {
            int32_t total;
            __builtin_memcpy(&total, &t->byte[sum][r][4 * n], 4);
            for (size_t k = 0; k < t->shapes.rows[codes]; k++)
                for (size_t i = 0; i < 4; i++) {
                    const int value = t->byte[x][r][4 * k + i], code = t->byte[codes][k][4 * n + i];
                    total += (is_signed && value > 127 ? value - 256 : value) * code;
                }
            __builtin_memcpy(&t->byte[sum][r][4 * n], &total, 4);
        }
}
#define tile_products_unsigned(t, sum, x, codes) tile_products(t, sum, x, codes, 0)
#define tile_products_signed(t, sum, x, codes) tile_products(t, sum, x, codes, 1)
#else
typedef struct {
    int unused; /* the tiles are the thread's registers */
} tiles;
/* Macros: the number of a tile is part of the instruction. gcc's own do not say that they read memory (all of the shapes,
 * rows of a tile), so that stores to it might come later, or never. */
#define tiles_read(from, array) __asm__ volatile("" : : "m"(*(const char(*) array)(from)))
#define tiles_begin(t, shapes)                                                                                         \
    do {                                                                                                               \
        (void)(t);                                                                                                     \
        tiles_read(shapes, [64]);                                                                                      \
        _tile_loadconfig(shapes);                                                                                      \
    } while (0)
#define tiles_end(t) ((void)(t), _tile_release())
#define tile_zero(t, to) _tile_zero(to)
#define tile_load(t, to, from, stride)                                                                                 \
    do {                                                                                                               \
        tiles_read(from, []);                                                                                          \
        _tile_loadd(to, from, stride);                                                                                 \
    } while (0)
#define tile_store(t, from, to, stride) _tile_stored(from, to, stride)
#define tile_products_unsigned(t, sum, x, codes) _tile_dpbuud(sum, x, codes)
#define tile_products_signed(t, sum, x, codes) _tile_dpbsud(sum, x, codes)
#endif

#endif /* TILES */

/* Asks the operating system for the tiles' registers, for all of the process's threads; 0 when they may be used, or when
 * this build has none. */
INLINE int64_t ask_for_tiles(void)
{
#if TILES && !defined(EMULATED)
    const long arch_prctl = 158, request = 0x1023 /* ARCH_REQ_XCOMP_PERM */, tile_data = 18;
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(arch_prctl), "D"(request), "S"(tile_data) : "rcx", "r11", "memory");
    return result;
#else
    return 0;
#endif
}

#endif
