/* Whether the block tables of an attention call stay within the cache: on a CPU it costs a microsecond to look. */
#include <stdint.h>

#include "vec.h"

/* The first sequence whose queries (those of all sequences are all tokens, from the first one on), length or blocks lie outside of the tensors, or -1. Looks at the entries that
 * peqa_paged_attention reads and no others: those behind the window (0: none) may hold anything. */
EXPORT int64_t peqa_attention_misfit(const int32_t *block_tables, int64_t table_stride, const int32_t *query_starts,
                                     const int32_t *seq_lens, int64_t seqs, int64_t width, int64_t block_size,
                                     int64_t blocks, int64_t tokens, int64_t window)
{
    for (int64_t s = 0; s < seqs; s++) {
        const int64_t new = (int64_t)query_starts[s + 1] - query_starts[s], length = seq_lens[s];
        if (query_starts[s] < 0 || query_starts[0] != 0 || query_starts[s + 1] > tokens || new < 0 || new > length)
            return s;
        if (new == 0)
            continue;
        if (length > width * block_size)
            return s;
        const int64_t oldest = window > 0 && length - new - window + 1 > 0 ? length - new - window + 1 : 0;
        for (int64_t block = oldest / block_size; block * block_size < length; block++) {
            const int32_t entry = block_tables[s * table_stride + block];
            if (entry < 0 || entry >= blocks)
                return s;
        }
    }
    return seqs > 0 && query_starts[seqs] != tokens ? seqs - 1 : -1;
}
