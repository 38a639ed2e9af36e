/* A decoder of the Llama family, and one step of it. Python mirrors these structs (decoder.py). */
#ifndef PEQA_DECODER_H
#define PEQA_DECODER_H

#include "kv_layout.h"
#include "quant_matmul.h"

typedef struct {
    const peqa_weight *weight;
    const float *bias; /* this and the rest as peqa_quant_matmul takes them; each pointer may be NULL */
    const void *out_scale, *in_scale, *group_scale;
    int64_t half_bank;
} decoder_linear;

typedef struct {
    decoder_linear qkv, out, gate_up, down;
    const float *attention_norm, *mlp_norm; /* [hidden] */
    const float *q_norm, *k_norm;           /* [d] or NULL */
    void *keys, *values;                    /* as the decoder's `layout` and `half_caches` say */
    int64_t key_block, value_block;         /* numbers from one block to the next */
    int64_t window;                         /* 0: none */
} decoder_layer;

/* Rows of floats (codes NULL), or of codes with scales and zeros as files hold them. */
typedef struct {
    const float *floats;  /* [vocab, hidden] */
    const uint8_t *codes; /* [vocab, bytes per row] */
    const float *scales, *zeros; /* [vocab, groups] */
    int64_t bits, groups;
} decoder_embedding;

typedef struct {
    decoder_embedding embedding;
    const decoder_layer *layers;
    const float *norm;            /* [hidden] */
    decoder_linear head;          /* weight NULL: the step's result is the normed hidden rows */
    const float *cosines, *sines; /* [positions, d / 2] */
    int64_t layer_count, hidden, intermediate, heads, kv_heads, d, block_size, layout, half_caches;
    int64_t vocab, positions, blocks; /* rows of the embedding, of the angles, blocks of the caches */
    float eps, scaling;
} peqa_decoder;

/* What a step spends on each kind of work, in ticks of the processor's counter. */
enum { TICKS_MATMUL, TICKS_ATTENTION, TICKS_ELEMENTWISE, TICKS_HEAD, TICKS_KINDS };

/* The step's packed tokens; see peqa_paged_attention for what places them. */
typedef struct {
    const int64_t *ids, *positions, *slots; /* [tokens]; slot -1: not written */
    const int64_t *outputs;                 /* [output_count]: tokens whose result is wanted */
    const int32_t *block_tables, *query_starts, *seq_lens;
    const int32_t *row, *group_row; /* [tokens] or NULL: the base */
    float *result;                  /* [output_count, outputs of the head, or hidden] */
    int64_t *ticks;                 /* [TICKS_KINDS], added to */
    int64_t tokens, sequences, output_count, table_stride;
} decoder_step;

#endif
