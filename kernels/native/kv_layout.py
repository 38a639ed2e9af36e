"""How caches of keys and values lie in memory: [blocks, block_size, kv_heads, d] to look at, always (kv_layout.h)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

TOKENS_FIRST, HEADS_FIRST = range(2)
"""Contiguous; or as the C library reads fastest: what one head of a block needs is one run of memory."""


def new_caches(
    layout: int,
    blocks: int,
    block_size: int,
    kv_heads: int,
    d: int,
    d_v: int,
    make: Callable[[tuple[int, ...]], Tensor],
) -> tuple[Tensor, Tensor]:
    """Keys [blocks, block_size, kv_heads, d] and values [..., d_v] over contiguous memory that `make(shape)` gives."""
    if layout == TOKENS_FIRST:
        return make((blocks, block_size, kv_heads, d)), make((blocks, block_size, kv_heads, d_v))
    keys, values = make((blocks, kv_heads, d, block_size)), make((blocks, kv_heads, block_size, d_v))
    return keys.permute(0, 3, 1, 2), values.transpose(1, 2)


def layout_of(key_cache: Tensor, value_cache: Tensor) -> int | None:
    """The layout of a pair of caches; None for any other."""
    if key_cache.is_contiguous() and value_cache.is_contiguous():
        return TOKENS_FIRST
    if key_cache.permute(0, 2, 3, 1).is_contiguous() and value_cache.transpose(1, 2).is_contiguous():
        return HEADS_FIRST
    return None
