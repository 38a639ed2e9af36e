/* Stored codes to pairs of 16-bit numbers, a vector of lanes at a time.
 *
 * A unit is 32 inputs of PANEL outputs: `bits` words a lane. Its pair p holds the codes of inputs p (low half of a
 * lane) and p + 16 (high half), unsigned. Words hold their pairs one after the other, lowest bits first, in both halves
 * alike; of 3 bits a half takes five codes, and the bits that are left over in its three words are the code of pair 15.
 */
#ifndef PEQA_CODES_H
#define PEQA_CODES_H

#include "vec.h"

#define UNIT 32 /* inputs */
#define PAIRS 16 /* of a unit */

/* Pairs that come from one word. */
#define PAIRS_OF(bits) ((bits) == 3 ? 5 : PAIRS / (bits))

INLINE vi low_pair(const int bits, vi word) { return word & iset(((1 << bits) - 1) * 0x10001); }

INLINE vi next_pair(const int bits, vi word) { return ishift(word, bits); }

/* Quads: four codes in a lane's bytes, those of pairs a (bytes 0 and 2) and b (1 and 3), which products of bytes take.
 * Quad i of a unit is pairs quad_first(i) and quad_second(i): what one mask takes from a word, and of 3 bits two
 * neighbours, or the last pairs of two words. */
#define QUADS 8 /* of a unit */

INLINE vi quad_of(vi a, vi b) { return a | ileft(b, 8); }

INLINE size_t quad_first(const size_t bits, const size_t i)
{
    if (bits == 3)
        return i < 2 ? 2 * i : i < 4 ? 1 + 2 * i : i == 4 ? 4 : i < 7 ? 2 * i : 14;
    const size_t per_byte = 8 / bits;
    return i / per_byte * 2 * per_byte + i % per_byte;
}

INLINE size_t quad_second(const size_t bits, const size_t i)
{
    if (bits == 3)
        return i == 4 ? 9 : quad_first(bits, i) + 1;
    return quad_first(bits, i) + 8 / bits;
}

/* What a word of 3-bit codes gives to pair 15, its five pairs shifted out. */
INLINE vi spare_bit(vi word, const int index) { return ileft(word & iset(0x10001), index); }

#endif
