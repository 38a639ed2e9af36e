/* Where keys and values lie in their caches.
 *
 * Tokens first: both [blocks, block_size, kv_heads, d]. Heads first: values [blocks, kv_heads, block_size, d_v], and keys
 * [blocks, kv_heads, d, block_size]. There, what attention reads for one head of a block is one run of memory, and
 * the same feature of neighbouring positions is a vector, which is what scores are computed from.
 */
#ifndef PEQA_KV_LAYOUT_H
#define PEQA_KV_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

enum { TOKENS_FIRST, HEADS_FIRST };

/* In floats. A value's features always lie side by side. */
typedef struct {
    size_t key_block, key_head, key_token, key_feature;
    size_t value_block, value_head, value_token;
} kv_strides;

static inline kv_strides strides_of(int64_t layout, size_t block_size, size_t kv_heads, size_t d, size_t d_v)
{
    const size_t token = layout == TOKENS_FIRST ? kv_heads : 1, head = layout == TOKENS_FIRST ? 1 : block_size;
    return (kv_strides){
        .key_block = block_size * kv_heads * d,
        .key_head = head * d,
        .key_token = layout == TOKENS_FIRST ? kv_heads * d : 1,
        .key_feature = layout == TOKENS_FIRST ? 1 : block_size,
        .value_block = block_size * kv_heads * d_v,
        .value_head = head * d_v,
        .value_token = token * d_v,
    };
}

#endif
