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

/* In bytes. A value's features always lie side by side. */
typedef struct {
    size_t number; /* one of them: 2 of fp16, 4 of fp32 */
    size_t key_block, key_head, key_token, key_feature;
    size_t value_block, value_head, value_token;
} kv_strides;

/* key_block, value_block: numbers from one block to the next; between them may lie other layers' keys and values. */
static inline kv_strides strides_of(int64_t layout, int64_t half, int64_t key_block, int64_t value_block,
                                    size_t block_size, size_t kv_heads, size_t d, size_t d_v)
{
    const size_t number = half ? sizeof(uint16_t) : sizeof(float);
    const size_t token = number * (layout == TOKENS_FIRST ? kv_heads : 1);
    const size_t head = number * (layout == TOKENS_FIRST ? 1 : block_size);
    return (kv_strides){
        .number = number,
        .key_block = number * (size_t)key_block,
        .key_head = head * d,
        .key_token = layout == TOKENS_FIRST ? token * d : number,
        .key_feature = layout == TOKENS_FIRST ? number : head,
        .value_block = number * (size_t)value_block,
        .value_head = head * d_v,
        .value_token = token * d_v,
    };
}

#endif
