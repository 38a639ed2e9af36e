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

/* What a word of 3-bit codes gives to pair 15, its five pairs shifted out. */
INLINE vi spare_bit(vi word, const int index) { return ileft(word & iset(0x10001), index); }

#endif
