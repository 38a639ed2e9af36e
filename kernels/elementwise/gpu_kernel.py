"""The Triton kernels of the elementwise ops. A program has one row or one head, so its bits hang on nothing else.

Numbers are rounded to the activations' dtype wherever torch's operations, one launch each, would store them; no
multiply-add is fused (the launches forbid it).
"""

# A Triton kernel's arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from peqa_kernels.paged_attention.attend import begin_early


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """fp32 numbers as an operation that stores `dtype` would leave them."""
    return x.to(dtype).to(tl.float32)


@triton.jit
def norm_kernel(
    x_ptr, y_ptr, weight_ptr, total_ptr, out_ptr, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Norm a row, or its sum with another, which is stored too. Grid: (rows,)."""
    if EARLY:
        begin_early()
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    at = tl.arange(0, BLOCK)
    live = at < N
    here = tl.program_id(0).to(tl.int64) * N + at
    x = tl.load(x_ptr + here, mask=live, other=0.0).to(tl.float32)
    if ADDS:
        y = tl.load(y_ptr + here, mask=live, other=0.0).to(tl.float32)
        x = _rounded(x + y, dtype)
        tl.store(total_ptr + here, x.to(dtype), mask=live)
    weight = tl.load(weight_ptr + at, mask=live, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) * (1.0 / N) + eps)
    tl.store(out_ptr + here, (_rounded(x * scale, dtype) * weight).to(dtype), mask=live)


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """silu(gate) * up of BLOCK features of a row. Grid: (rows, blocks)."""
    if EARLY:
        begin_early()
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < N
    gate = tl.load(gate_up_ptr + row * (2 * N) + at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * (2 * N) + N + at, mask=live, other=0.0).to(tl.float32)
    opened = _rounded(gate / (1.0 + tl.exp(-gate)), dtype)
    tl.store(out_ptr + row * N + at, (opened * up).to(dtype), mask=live)


@triton.jit(do_not_specialize_on_alignment=["position_ptr", "slot_ptr"])
def rotate_kernel(
    qkv_ptr, cosine_ptr, sine_ptr, position_ptr, norm_ptr, q_ptr, key_cache_ptr, value_cache_ptr, slot_ptr, eps,
    heads: tl.constexpr, kv_heads: tl.constexpr, half: tl.constexpr, HALF: tl.constexpr,
    HAS_NORMS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Turn one query head, or turn one key head and write it with its value. Grid: (tokens, heads + kv_heads)."""
    if EARLY:
        begin_early()
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    d: tl.constexpr = 2 * half
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, HALF)
    live = at < half
    source = qkv_ptr + (token * (heads + 2 * kv_heads) + head) * d + at
    first = tl.load(source, mask=live, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=live, other=0.0).to(tl.float32)
    angle = tl.load(position_ptr + token) * half + at
    cosine = tl.load(cosine_ptr + angle, mask=live, other=0.0).to(tl.float32)
    sine = tl.load(sine_ptr + angle, mask=live, other=0.0).to(tl.float32)
    if HAS_NORMS:
        weight = norm_ptr + tl.where(head < heads, 0, d) + at
        scale = tl.rsqrt(tl.sum(first * first + second * second, axis=0) * (1.0 / d) + eps)
        factor = tl.load(weight, mask=live, other=0.0).to(tl.float32)
        factor_2 = tl.load(weight + half, mask=live, other=0.0).to(tl.float32)
        first = _rounded(_rounded(first * scale, dtype) * factor, dtype)
        second = _rounded(_rounded(second * scale, dtype) * factor_2, dtype)
    turned = (_rounded(first * cosine, dtype) - _rounded(second * sine, dtype)).to(dtype)
    turned_2 = (_rounded(second * cosine, dtype) + _rounded(first * sine, dtype)).to(dtype)
    if head < heads:
        into = q_ptr + (token * heads + head) * d + at
        tl.store(into, turned, mask=live)
        tl.store(into + half, turned_2, mask=live)
    else:
        slot = tl.load(slot_ptr + token)
        if slot >= 0:
            place = (slot * kv_heads + head - heads) * d + at
            tl.store(key_cache_ptr + place, turned, mask=live)
            tl.store(key_cache_ptr + place + half, turned_2, mask=live)
            value = source + kv_heads * d
            tl.store(value_cache_ptr + place, tl.load(value, mask=live), mask=live)
            tl.store(value_cache_ptr + place + half, tl.load(value + half, mask=live), mask=live)
