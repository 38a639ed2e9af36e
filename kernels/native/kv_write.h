/* A key and a value of one head into the caches, which are fp16 (`half`) or fp32. */
#ifndef PEQA_KV_WRITE_H
#define PEQA_KV_WRITE_H

#include "elementwise.h"
#include "half_numbers.h"

/* n numbers of a key or a value into the cache, `step` bytes from one to the next. */
INLINE void put_numbers(const int half, const float *x, size_t n, char *to, size_t step)
{
    for (size_t i = 0; i < n; i += VL) {
        const vf part = vpart(x + i, n - i);
        const size_t count = smin(VL, n - i);
        uint16_t halves[VL];
        float floats[VL];
        if (half)
            hstore(halves, part);
        else
            vstore(floats, part);
        for (size_t j = 0; j < count; j++, to += step)
            if (half)
                *(uint16_t *)to = halves[j];
            else
                *(float *)to = floats[j];
    }
}

INLINE void put_key(const int64_t half, const float *x, size_t n, char *to, size_t step)
{
    if (half)
        put_numbers(1, x, n, to, step);
    else
        put_numbers(0, x, n, to, step);
}

/* A value's features lie side by side, so they are stored as vectors. */
INLINE void put_value(const int64_t half, const float *x, size_t n, char *to)
{
    size_t i = 0;
    if (!half) {
        copy_row(x, n, (float *)to);
        return;
    }
    for (; i + VL <= n; i += VL)
        hstore((uint16_t *)to + i, vload(x + i));
    put_numbers(1, x + i, n - i, to + i * sizeof(uint16_t), sizeof(uint16_t));
}

#endif
