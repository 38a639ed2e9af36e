"""Paged attention in Triton: one kernel for decode steps and prefill chunks in the same launch.

A program takes one tile of consecutive queries of one sequence and one key/value head, and packs the query heads that
share it into the rows of the tile, so the keys are read once for all of them (as vLLM's unified attention does). Tiles
are found from `query_starts` on the device: the grid depends on shapes only, so a CUDA graph can hold the launch.
"""

# A Triton kernel's arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peqa_kernels.device import launching_on

KEY_TILE = 64  # keys of one step of the loop
DECODE_ROWS = 16  # least M of tl.dot; a decode step has heads / kv_heads real rows
LEAST_WIDTH = 16  # least K and N of tl.dot; narrower heads (toy models) are filled up
PREFILL_ROWS = 64  # rows of a tile when sequences bring many tokens each


class TileShape(NamedTuple):
    """One step of the kernel's loop: `rows` (queries × heads) against `keys`, by `warps`."""

    rows: int
    keys: int
    warps: int


def tile_shape(tokens: int, seqs: int, repeat: int, d: int, dtype: torch.dtype) -> TileShape:
    """The tile for a call; a test compiles each for sm_80 and sm_90 and finds no register spill."""
    least = triton.next_power_of_2(repeat)
    if dtype == torch.float32:  # tf32x3 holds each operand twice
        return TileShape(max(DECODE_ROWS, least), 32, 8)
    rows = DECODE_ROWS if tokens <= 2 * seqs else PREFILL_ROWS if d <= 128 else PREFILL_ROWS // 2
    rows = max(rows, least)
    return TileShape(rows, KEY_TILE, 8 if rows * d > 64 * 64 else 4)


def paged_attention_gpu(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from packed queries to each sequence's own blocks; arguments and result as `paged_attention`.

    Takes fp16, bf16 and fp32 (multiplied as tf32x3); accumulates in fp32. Queries of another dtype than the cache's
    are rounded to it: the keys beside them were.
    """
    tokens, heads, d = q.shape
    seqs = seq_lens.shape[0]
    kv_heads, d_v = value_cache.shape[2:]
    q = _rows(q)
    assert key_cache.stride(3) == value_cache.stride(3) == block_tables.stride(1) == 1
    out = torch.empty(tokens, heads, d_v, dtype=q.dtype, device=q.device)
    repeat = heads // kv_heads
    tile = tile_shape(tokens, seqs, repeat, max(d, d_v), key_cache.dtype)
    queries = tile.rows // repeat  # queries of a tile; what is left of its rows stays empty
    grid = (
        tokens // queries + seqs,
        kv_heads,
    )  # at most this many tiles: each sequence ends with one partly filled
    with launching_on(q.device):
        _attend[grid](
            q,
            key_cache,
            value_cache,
            block_tables,
            query_starts,
            seq_lens,
            sinks if sinks is not None else q,
            out,
            scaling,
            softcap if softcap is not None else 0.0,
            sliding_window if sliding_window is not None else 0,
            seqs,
            q.stride(0),
            q.stride(1),
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            block_tables.stride(0),
            heads=heads,
            repeat=repeat,
            block_size=key_cache.shape[1],
            d=d,
            d_v=d_v,
            has_sinks=sinks is not None,
            has_softcap=softcap is not None,
            has_window=sliding_window is not None,
            QUERIES=queries,
            ROWS=tile.rows,
            KEYS=tile.keys,
            D=max(LEAST_WIDTH, triton.next_power_of_2(d)),
            D_V=max(LEAST_WIDTH, triton.next_power_of_2(d_v)),
            num_warps=tile.warps,
            num_stages=2,
        )
    return out


def write_kv_gpu(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Copy each token's key and value to its slot; in place; arguments as `write_kv`."""
    tokens, kv_heads, d = key.shape
    d_v = value.shape[2]
    key, value = _rows(key), _rows(value)
    assert key_cache.is_contiguous()
    assert value_cache.is_contiguous()
    if tokens == 0:
        return
    with launching_on(key.device):
        _write[(tokens, kv_heads)](
            key,
            value,
            key_cache,
            value_cache,
            slot_mapping,
            *key.stride()[:2],
            *value.stride()[:2],
            kv_heads=kv_heads,
            d=d,
            d_v=d_v,
            D=triton.next_power_of_2(d),
            D_V=triton.next_power_of_2(d_v),
            num_warps=1,  # one head of one token: a few hundred bytes
        )


def _rows(x: Tensor) -> Tensor:
    """x [tokens, heads, d] with each head's features side by side, as the kernels read them."""
    return x if x.stride(2) == 1 else x.contiguous()


@triton.jit
def _write(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_ptr,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    kv_heads: tl.constexpr,
    d: tl.constexpr,
    d_v: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slot_ptr + token)
    if slot >= 0:
        at = tl.arange(0, D)
        key = tl.load(key_ptr + token * key_token_stride + head * key_head_stride + at, mask=at < d)
        tl.store(key_cache_ptr + (slot * kv_heads + head) * d + at, key, mask=at < d)
        at_v = tl.arange(0, D_V)
        value = tl.load(
            value_ptr + token * value_token_stride + head * value_head_stride + at_v, mask=at_v < d_v
        )
        tl.store(value_cache_ptr + (slot * kv_heads + head) * d_v + at_v, value, mask=at_v < d_v)


@triton.jit
def _sequence_of(tile, query_starts_ptr, seqs, QUERIES: tl.constexpr):
    """The sequence s whose tiles begin at query_starts[s] // QUERIES + s and hold `tile` (binary search)."""
    low = 0
    high = seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_starts_ptr + middle) // QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _attend(
    q_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    query_starts_ptr,
    seq_lens_ptr,
    sinks_ptr,
    out_ptr,
    scaling,
    softcap,
    window,
    seqs,
    q_token_stride,
    q_head_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    table_stride,
    heads: tl.constexpr,
    repeat: tl.constexpr,
    block_size: tl.constexpr,
    d: tl.constexpr,
    d_v: tl.constexpr,
    has_sinks: tl.constexpr,
    has_softcap: tl.constexpr,
    has_window: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    D_V: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = _sequence_of(tile, query_starts_ptr, seqs, QUERIES)
    first = tl.load(query_starts_ptr + sequence)
    new = tl.load(query_starts_ptr + sequence + 1) - first
    query_from = (tile - (first // QUERIES + sequence)) * QUERIES  # within the sequence's new tokens
    if query_from < new:
        length = tl.load(seq_lens_ptr + sequence)
        row = tl.arange(0, ROWS)
        query = query_from + row // repeat
        real = (row < QUERIES * repeat) & (query < new)
        head = kv_head * repeat + row % repeat
        position = length - new + query
        at = tl.arange(0, D)
        at_v = tl.arange(0, D_V)
        token = (first + query).to(tl.int64)
        q = tl.load(
            q_ptr + token[:, None] * q_token_stride + head[:, None] * q_head_stride + at[None, :],
            mask=real[:, None] & (at < d)[None, :],
            other=0.0,
        ).to(key_ptr.dtype.element_ty)
        if has_sinks:
            best = tl.load(sinks_ptr + head, mask=real, other=0.0).to(tl.float32)
            total = tl.full([ROWS], 1.0, tl.float32)
        else:
            best = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D_V], tl.float32)
        # Keys of other positions may be anything, NaN too: they are masked to zero, in V as well (0 * NaN is NaN).
        key_to = tl.minimum(length, length - new + query_from + QUERIES)
        key_from = 0
        if has_window:
            key_from = tl.maximum(0, length - new + query_from - window + 1)
        for start in range(key_from // KEYS * KEYS, key_to, KEYS):
            p = start + tl.arange(0, KEYS)
            owned = (p >= key_from) & (p < key_to)
            block = tl.load(table_ptr + sequence * table_stride + p // block_size, mask=owned, other=0).to(
                tl.int64
            )
            slot = p % block_size
            k = tl.load(
                key_ptr
                + (block * key_block_stride + slot * key_slot_stride + kv_head * key_head_stride)[None, :]
                + at[:, None],
                mask=owned[None, :] & (at < d)[:, None],
                other=0.0,
            )
            v = tl.load(
                value_ptr
                + (block * value_block_stride + slot * value_slot_stride + kv_head * value_head_stride)[
                    :, None
                ]
                + at_v[None, :],
                mask=owned[:, None] & (at_v < d_v)[None, :],
                other=0.0,
            )
            score = tl.dot(q, k, input_precision="tf32x3") * scaling
            if has_softcap:
                # tanh(x) = 1 - 2 / (exp(2x) + 1), exact at both ends
                score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))
            seen = owned[None, :] & (p[None, :] <= position[:, None])
            if has_window:
                seen &= p[None, :] > position[:, None] - window
            score = tl.where(seen, score, float("-inf"))
            new_best = tl.maximum(best, tl.max(score, 1))
            shift = tl.where(new_best == float("-inf"), 0.0, new_best)  # a row that has seen nothing yet
            shrink = tl.exp(best - shift)
            weight = tl.exp(score - shift[:, None])
            total = total * shrink + tl.sum(weight, 1)
            acc = acc * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="tf32x3")
            best = new_best
        result = acc / tl.where(real, total, 1.0)[:, None]
        tl.store(
            out_ptr + (token[:, None] * heads + head[:, None]) * d_v + at_v[None, :],
            result.to(out_ptr.dtype.element_ty),
            mask=real[:, None] & (at_v < d_v)[None, :],
        )
