"""The Triton kernel that copies new keys and values into the cache."""

# A Triton kernel's arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from peqa_kernels.paged_attention.attend import begin_early


@triton.jit
def write_kernel(
    key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, slot_ptr,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    kv_heads: tl.constexpr, d: tl.constexpr, d_v: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One head of one token; a slot of -1 is skipped. Grid: (tokens, kv_heads)."""
    if EARLY:
        begin_early()
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
