"""The Triton kernels of attention: decode (split over the keys), its combination, and prefill.

All three share `_step`, the arithmetic of one tile of keys, and `_merge`, the one that joins two parts of the keys.
No multiply-add is left to the compiler to fuse (the launches forbid it, `tl.fma` says where one is meant), so the same
source gives the same bits in each kernel. Scores are kept in units of log2, for exp2.
"""

# A Triton kernel's arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from peqa_kernels.paged_attention import tiles

_FIRST: tl.constexpr = tl.constexpr(tiles.FIRST_SPLIT)
_PER_LEVEL: tl.constexpr = tl.constexpr(tiles.SPLITS_PER_LEVEL)
_LEVEL: tl.constexpr = tl.constexpr(tiles.FIRST_SPLIT * tiles.SPLITS_PER_LEVEL)
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_TOGETHER: tl.constexpr = tl.constexpr(8)  # partial results whose loads are in flight at a time


@triton.jit
def begin_early():
    """For a launch that begins while the one before it ends: wait for what that one writes, then let the next begin."""
    cuda.gdc_wait()
    cuda.gdc_launch_dependents()


@triton.jit
def _split_of(position):
    """`tiles.split_of` on the device; exact below 2**36 keys."""
    level = ((position // _LEVEL + 1).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    width = _FIRST << level
    return level * _PER_LEVEL + (position - (width * _PER_LEVEL - _LEVEL)) // width


@triton.jit
def _split_start(split):
    """The first position of a split."""
    level = split // _PER_LEVEL
    width = _FIRST << level
    return width * _PER_LEVEL - _LEVEL + (split - level * _PER_LEVEL) * width


@triton.jit
def _merge(best, total, acc, best_2, total_2, acc_2):
    """Join two parts of the keys: running maximum [R], denominator [R] and numerator [R, D_V] of each.

    A part in which a row saw nothing (-inf, 0, 0) changes no bit.
    """
    new = tl.maximum(best, best_2)
    shift = tl.where(new == float("-inf"), 0.0, new)
    shrink = tl.exp2(best - shift)
    shrink_2 = tl.exp2(best_2 - shift)
    total = tl.fma(total, shrink, total_2 * shrink_2)
    acc = tl.fma(acc, tl.broadcast_to(shrink[:, None], acc.shape), acc_2 * shrink_2[:, None])
    return new, total, acc


@triton.jit
def _start(sinks_ptr, head, real, HAS_SINKS: tl.constexpr, ROWS: tl.constexpr, D_V: tl.constexpr):
    """Maximum, denominator and numerator before any key: nothing, or the sink's logit."""
    if HAS_SINKS:
        best = tl.load(sinks_ptr + head, mask=real, other=0.0).to(tl.float32) * _LOG2E
        total = tl.full([ROWS], 1.0, tl.float32)
    else:
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    return best, total, tl.zeros([ROWS, D_V], tl.float32)


@triton.jit
def _query_rows(q_ptr, token, head, real, token_stride, head_stride, dtype, d: tl.constexpr, D: tl.constexpr):
    """Each row's query, [ROWS, D] in the dtype of the keys."""
    at = tl.arange(0, D)
    q = tl.load(
        q_ptr + token[:, None] * token_stride + head[:, None] * head_stride + at[None, :],
        mask=real[:, None] & (at < d)[None, :],
        other=0.0,
    )
    return q.to(dtype)


@triton.jit
def _step(
    start, best, total, acc, q, key_ptr, value_ptr, table_ptr, key_from, key_to, position, window, scale, cap,
    kv_head, kv_heads: tl.constexpr, block_size: tl.constexpr, d: tl.constexpr, d_v: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    KEYS: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
):  # fmt: skip
    """Take in the keys at start .. start + KEYS - 1; the running maximum, denominator and numerator of each row.

    MASKED False promises that every row sees every one of these keys. A key that a row may not see has weight 0, which
    changes no bit of that row.
    """
    p = start + tl.arange(0, KEYS)
    owned = (p >= key_from) & (p < key_to)
    if block_size % KEYS == 0:
        block = tl.load(table_ptr + start // block_size).to(tl.int64)
        slot = block * block_size + start % block_size + tl.arange(0, KEYS)
    else:
        if MASKED:
            block = tl.load(table_ptr + p // block_size, mask=owned, other=0).to(tl.int64)
        else:
            block = tl.load(table_ptr + p // block_size).to(tl.int64)
        slot = block * block_size + p % block_size
    at = tl.arange(0, D)
    at_v = tl.arange(0, D_V)
    key_at = key_ptr + (slot * (kv_heads * d) + kv_head * d)[None, :] + at[:, None]
    value_at = value_ptr + (slot * (kv_heads * d_v) + kv_head * d_v)[:, None] + at_v[None, :]
    # Keys of other positions may be anything, NaN too: they are masked to zero, in V as well (0 * NaN is NaN).
    if MASKED:
        k = tl.load(key_at, mask=owned[None, :] & (at < d)[:, None], other=0.0)
        v = tl.load(value_at, mask=owned[:, None] & (at_v < d_v)[None, :], other=0.0)
    else:
        if d == D:
            k = tl.load(key_at)
        else:
            k = tl.load(key_at, mask=(at < d)[:, None], other=0.0)
        if d_v == D_V:
            v = tl.load(value_at)
        else:
            v = tl.load(value_at, mask=(at_v < d_v)[None, :], other=0.0)
    score = tl.dot(q, k, input_precision="tf32x3") * scale
    if HAS_CAP:  # tanh(x) = 1 - 2 / (exp(2x) + 1), exact at both ends
        score = cap * (1.0 - 2.0 / (tl.exp2(score) + 1.0))
    if MASKED:
        seen = owned[None, :]
        if CAUSAL:
            seen = seen & (p[None, :] <= position[:, None])
            if HAS_WINDOW:
                seen = seen & (p[None, :] > position[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
    new = tl.maximum(best, tl.max(score, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    shrink = tl.exp2(best - shift)
    weight = tl.exp2(score - shift[:, None])
    total = tl.fma(total, shrink, tl.sum(weight, 1))
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
    return new, total, acc


@triton.jit
def _span(
    first, last, best, total, acc, q, key_ptr, value_ptr, table_ptr, key_from, key_to, position, window, scale, cap,
    kv_head, kv_heads: tl.constexpr, block_size: tl.constexpr, d: tl.constexpr, d_v: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    KEYS: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
):  # fmt: skip
    """Take in the keys from `first`, a multiple of KEYS, to `last`, tile after tile."""
    for start in range(first, last, KEYS):
        best, total, acc = _step(
            start, best, total, acc, q, key_ptr, value_ptr, table_ptr, key_from, key_to, position, window, scale,
            cap, kv_head, kv_heads, block_size, d, d_v, HAS_CAP, HAS_WINDOW, MASKED, CAUSAL, KEYS, D, D_V,
        )  # fmt: skip
    return best, total, acc


@triton.jit
def _store(out_ptr, token, head, real, total, acc, heads: tl.constexpr, d_v: tl.constexpr, D_V: tl.constexpr):
    """Divide and write each row."""
    at_v = tl.arange(0, D_V)
    result = acc / tl.where(real, total, 1.0)[:, None]
    tl.store(
        out_ptr + (token[:, None] * heads + head[:, None]) * d_v + at_v[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & (at_v < d_v)[None, :],
    )


@triton.jit(do_not_specialize=["window", "splits", "table_stride"])
def decode_kernel(
    q_ptr, key_ptr, value_ptr, table_ptr, starts_ptr, lens_ptr, sinks_ptr, out_ptr, part_ptr, stat_ptr,
    scale, cap, window, splits, table_stride, q_token_stride, q_head_stride,
    heads: tl.constexpr, kv_heads: tl.constexpr, block_size: tl.constexpr, d: tl.constexpr, d_v: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    PACKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Splits of the keys of a sequence with one new token; PACKED query heads of one key/value head in a tile.

    Grid: (sequences, kv_heads * tiles per kv head, programs that take the splits in turn). Writes out [tokens, heads,
    d_v] where the sequence has one split only, else part [sequences, splits, heads, d_v] and stat [sequences, splits,
    heads, 2] (maximum, denominator).
    """
    if EARLY:
        begin_early()
    repeat: tl.constexpr = heads // kv_heads
    chunks: tl.constexpr = (repeat + PACKED - 1) // PACKED
    sequence = tl.program_id(0)
    token = tl.load(starts_ptr + sequence)
    if tl.load(starts_ptr + sequence + 1) - token == 1:
        length = tl.load(lens_ptr + sequence)
        key_from = tl.maximum(0, length - window) if HAS_WINDOW else 0
        first_split = _split_of(key_from)
        last_split = _split_of(length - 1)
        if first_split + tl.program_id(2) <= last_split:
            kv_head = tl.program_id(1) // chunks
            row = tl.arange(0, ROWS)
            in_group = (tl.program_id(1) % chunks) * PACKED + row
            real = (row < PACKED) & (in_group < repeat)
            head = kv_head * repeat + in_group
            tokens = tl.full([ROWS], 0, tl.int64) + token
            position = tl.full([ROWS], 0, tl.int32) + (length - 1)
            q = _query_rows(
                q_ptr, tokens, head, real, q_token_stride, q_head_stride, key_ptr.dtype.element_ty, d, D
            )
            for split in range(first_split + tl.program_id(2), last_split + 1, tl.num_programs(2)):
                best = tl.full([ROWS], float("-inf"), tl.float32)
                total = tl.zeros([ROWS], tl.float32)
                acc = tl.zeros([ROWS, D_V], tl.float32)
                best, total, acc = _span(
                    tl.maximum(_split_start(split), key_from // KEYS * KEYS),
                    tl.minimum(_split_start(split + 1), length),
                    best, total, acc, q, key_ptr, value_ptr, table_ptr + sequence.to(tl.int64) * table_stride,
                    key_from, length, position, window, scale, cap, kv_head, kv_heads, block_size, d, d_v,
                    HAS_CAP, HAS_WINDOW, True, False, KEYS, D, D_V,
                )  # fmt: skip
                if first_split == last_split:
                    best_0, total_0, acc_0 = _start(sinks_ptr, head, real, HAS_SINKS, ROWS, D_V)
                    best, total, acc = _merge(best_0, total_0, acc_0, best, total, acc)
                    _store(out_ptr, tokens, head, real, total, acc, heads, d_v, D_V)
                else:
                    line = (sequence.to(tl.int64) * splits + split - first_split) * heads + head
                    at_v = tl.arange(0, D_V)
                    tl.store(
                        part_ptr + line[:, None] * d_v + at_v[None, :],
                        acc,
                        mask=real[:, None] & (at_v < d_v)[None, :],
                    )
                    tl.store(stat_ptr + line * 2, best, mask=real)
                    tl.store(stat_ptr + line * 2 + 1, total, mask=real)


@triton.jit(do_not_specialize=["window", "splits"])
def combine_kernel(
    part_ptr, stat_ptr, starts_ptr, lens_ptr, sinks_ptr, out_ptr, window, splits,
    heads: tl.constexpr, d_v: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_WINDOW: tl.constexpr, D_V: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Join the splits of one sequence and head, in the order of the keys. Grid: (sequences, heads)."""
    if EARLY:
        begin_early()
    sequence = tl.program_id(0)
    token = tl.load(starts_ptr + sequence)
    if tl.load(starts_ptr + sequence + 1) - token == 1:
        length = tl.load(lens_ptr + sequence)
        key_from = tl.maximum(0, length - window) if HAS_WINDOW else 0
        count = _split_of(length - 1) - _split_of(key_from) + 1
        if count > 1:
            head = tl.program_id(1) + tl.arange(0, 1)
            real = head < heads
            at_v = tl.arange(0, D_V)[None, :]
            best, total, acc = _start(sinks_ptr, head, real, HAS_SINKS, 1, D_V)
            for first in range(0, count, _TOGETHER):
                for i in tl.static_range(_TOGETHER):
                    there = first + i + tl.zeros_like(head) < count
                    line = (sequence.to(tl.int64) * splits + first + i) * heads + head
                    best_2 = tl.load(stat_ptr + line * 2, mask=there, other=float("-inf"))
                    total_2 = tl.load(stat_ptr + line * 2 + 1, mask=there, other=0.0)
                    acc_2 = tl.load(
                        part_ptr + line[:, None] * d_v + at_v, mask=there[:, None] & (at_v < d_v), other=0.0
                    )
                    best, total, acc = _merge(best, total, acc, best_2, total_2, acc_2)
            _store(out_ptr, token.to(tl.int64) + tl.zeros_like(head), head, real, total, acc, heads, d_v, D_V)


@triton.jit
def _sequence_of(tile, starts_ptr, seqs, QUERIES: tl.constexpr):
    """The sequence s whose tiles begin at query_starts[s] // QUERIES + s and hold `tile` (binary search)."""
    low = 0
    high = seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["window", "seqs", "table_stride"])
def prefill_kernel(
    q_ptr, key_ptr, value_ptr, table_ptr, starts_ptr, lens_ptr, sinks_ptr, out_ptr,
    scale, cap, window, seqs, table_stride, q_token_stride, q_head_stride,
    heads: tl.constexpr, kv_heads: tl.constexpr, block_size: tl.constexpr, d: tl.constexpr, d_v: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, SPLITS: tl.constexpr,
    PACKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
):  # fmt: skip
    """A tile of consecutive queries of a sequence with two or more new tokens, PACKED query heads each.

    Grid: (at least query_starts[s] // QUERIES + s tiles for each s, kv_heads * tiles per kv head). SPLITS: keep each
    split of the keys apart and merge them as `decode_kernel` and `combine_kernel` do, for the same bits.
    """
    repeat: tl.constexpr = heads // kv_heads
    chunks: tl.constexpr = (repeat + PACKED - 1) // PACKED
    QUERIES: tl.constexpr = ROWS // PACKED
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries see the most keys: they start first
    sequence = _sequence_of(tile, starts_ptr, seqs, QUERIES)
    first = tl.load(starts_ptr + sequence)
    new = tl.load(starts_ptr + sequence + 1) - first
    query_from = (tile - (first // QUERIES + sequence)) * QUERIES  # within the sequence's new tokens
    if (new > 1) & (query_from < new):
        length = tl.load(lens_ptr + sequence)
        kv_head = tl.program_id(1) // chunks
        row = tl.arange(0, ROWS)
        query = query_from + row // PACKED
        in_group = (tl.program_id(1) % chunks) * PACKED + row % PACKED
        real = (row < QUERIES * PACKED) & (query < new) & (in_group < repeat)
        head = kv_head * repeat + in_group
        position = length - new + query
        token = (first + query).to(tl.int64)
        q = _query_rows(
            q_ptr, token, head, real, q_token_stride, q_head_stride, key_ptr.dtype.element_ty, d, D
        )
        lowest = length - new + query_from  # position of the tile's first query
        key_to = tl.minimum(length, lowest + QUERIES)
        key_from = tl.maximum(0, lowest - window + 1) if HAS_WINDOW else 0
        begin = key_from // KEYS * KEYS
        table = table_ptr + sequence.to(tl.int64) * table_stride
        best, total, acc = _start(sinks_ptr, head, real, HAS_SINKS, ROWS, D_V)
        if SPLITS:
            for split in range(_split_of(key_from), _split_of(key_to - 1) + 1):
                best_2 = tl.full([ROWS], float("-inf"), tl.float32)
                total_2 = tl.zeros([ROWS], tl.float32)
                acc_2 = tl.zeros([ROWS, D_V], tl.float32)
                best_2, total_2, acc_2 = _span(
                    tl.maximum(_split_start(split), begin), tl.minimum(_split_start(split + 1), key_to),
                    best_2, total_2, acc_2, q, key_ptr, value_ptr, table, key_from, key_to, position, window, scale,
                    cap, kv_head, kv_heads, block_size, d, d_v, HAS_CAP, HAS_WINDOW, True, True, KEYS, D, D_V,
                )  # fmt: skip
                best, total, acc = _merge(best, total, acc, best_2, total_2, acc_2)
        else:
            # Tiles that all rows see in full, for which nothing is compared, stand between the window's edge and the
            # diagonal.
            full_from = begin
            full_to = tl.maximum(begin, (lowest + 1) // KEYS * KEYS)
            if HAS_WINDOW:
                full_from = tl.maximum(begin, (key_to - window + KEYS - 1) // KEYS * KEYS)
                full_from = tl.minimum(full_from, full_to)
                best, total, acc = _span(
                    begin, full_from, best, total, acc, q, key_ptr, value_ptr, table, key_from, key_to, position,
                    window, scale, cap, kv_head, kv_heads, block_size, d, d_v, HAS_CAP, HAS_WINDOW, True, True,
                    KEYS, D, D_V,
                )  # fmt: skip
            best, total, acc = _span(
                full_from, full_to, best, total, acc, q, key_ptr, value_ptr, table, key_from, key_to, position,
                window, scale, cap, kv_head, kv_heads, block_size, d, d_v, HAS_CAP, HAS_WINDOW, False, True,
                KEYS, D, D_V,
            )  # fmt: skip
            best, total, acc = _span(
                full_to, key_to, best, total, acc, q, key_ptr, value_ptr, table, key_from, key_to, position,
                window, scale, cap, kv_head, kv_heads, block_size, d, d_v, HAS_CAP, HAS_WINDOW, True, True,
                KEYS, D, D_V,
            )  # fmt: skip
        _store(out_ptr, token, head, real, total, acc, heads, d_v, D_V)
