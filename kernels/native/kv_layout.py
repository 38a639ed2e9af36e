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
    """Keys [blocks, block_size, kv_heads, d] and values [..., d_v] over memory that `make(shape)` gives.

    That is contiguous, but for what may lie between two blocks.
    """
    if layout == TOKENS_FIRST:
        return make((blocks, block_size, kv_heads, d)), make((blocks, block_size, kv_heads, d_v))
    keys, values = make((blocks, kv_heads, d, block_size)), make((blocks, kv_heads, block_size, d_v))
    return keys.permute(0, 3, 1, 2), values.transpose(1, 2)


def layout_of(key_cache: Tensor, value_cache: Tensor) -> int | None:
    """The layout of a pair of caches; None for any other. What lies between two blocks does not matter."""
    if _packed(key_cache, (1, 2, 3)) and _packed(value_cache, (1, 2, 3)):
        return TOKENS_FIRST
    if _packed(key_cache, (2, 3, 1)) and _packed(value_cache, (2, 1, 3)):
        return HEADS_FIRST
    return None


def _packed(cache: Tensor, order: tuple[int, ...]) -> bool:
    """Whether the dimensions in `order`, outermost first, leave no gaps, and no block reaches into the next."""
    shape, strides, step = cache.shape, cache.stride(), 1
    for dimension in reversed(order):
        if strides[dimension] != step and shape[dimension] != 1:
            return False
        step *= shape[dimension]
    return strides[0] >= step or shape[0] <= 1
