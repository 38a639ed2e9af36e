"""Launches of the elementwise kernels. Nothing here waits for the device; the model's sizes alone choose the shapes."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from peqa_kernels.device import launching_on
from peqa_kernels.elementwise.gpu_kernel import norm_kernel, rotate_kernel, silu_mul_kernel
from peqa_kernels.paged_attention.gpu import begins_early

_BLOCK = 1024  # gates of a program: four warps, 8 a thread, which is 16 bytes


def rms_norm_gpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm`; x of any shape but empty, normed over its last dimension."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _norm(x, x, weight, x, out, eps, adds=False)
    return out


def add_rms_norm_gpu(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `add_rms_norm`."""
    x, y = x.contiguous(), y.contiguous()
    assert x.shape == y.shape, (x.shape, y.shape)
    total, out = torch.empty_like(x), torch.empty_like(x)
    _norm(x, y, weight, total, out, eps, adds=True)
    return total, out


def _norm(
    x: Tensor, y: Tensor, weight: Tensor, total: Tensor, out: Tensor, eps: float, *, adds: bool
) -> None:
    features = x.shape[-1]
    assert weight.shape == (features,), (weight.shape, features)
    with launching_on(x.device):
        norm_kernel[(x.numel() // features,)](
            x, y, weight, total, out, eps, ADDS=adds, **norm_options(features), **begins_early(x.device)
        )


def norm_options(features: int) -> dict[str, Any]:
    """Constants and options for rows of so many features: 16 a thread, 32 in the widest rows."""
    block = triton.next_power_of_2(features)
    return {
        **{"N": features, "BLOCK": block},
        **{"num_warps": min(16, max(1, block // 512)), "enable_fp_fusion": False},
    }


def silu_mul_gpu(gate_up: Tensor) -> Tensor:
    """As `silu_mul`."""
    gate_up = gate_up.contiguous()
    rows, both = gate_up.shape
    out = gate_up.new_empty(rows, both // 2)
    options = silu_mul_options(both // 2)
    with launching_on(gate_up.device):
        silu_mul_kernel[(rows, triton.cdiv(both // 2, options["BLOCK"]))](
            gate_up, out, **options, **begins_early(gate_up.device)
        )
    return out


def silu_mul_options(features: int) -> dict[str, Any]:
    """Constants and options for rows of so many gates."""
    return {"N": features, "BLOCK": _BLOCK, "num_warps": 4, "enable_fp_fusion": False}


def rotate_and_write_gpu(
    qkv: Tensor,
    cosines: Tensor,
    sines: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    norms: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """As `rotate_and_write`."""
    qkv = qkv.contiguous()
    tokens = len(qkv)
    kv_heads, d = key_cache.shape[2:]
    heads = qkv.shape[1] // d - 2 * kv_heads
    assert qkv.shape[1] == (heads + 2 * kv_heads) * d, (qkv.shape, key_cache.shape)
    assert value_cache.shape == key_cache.shape, (value_cache.shape, key_cache.shape)
    assert key_cache.is_contiguous()
    assert value_cache.is_contiguous()
    assert cosines.shape == sines.shape == (len(cosines), d // 2), (cosines.shape, sines.shape)
    assert positions.shape == slot_mapping.shape == (tokens,), (positions.shape, slot_mapping.shape)
    q = qkv.new_empty(tokens, heads, d)
    with launching_on(qkv.device):
        rotate_kernel[(tokens, heads + kv_heads)](
            qkv,
            cosines,
            sines,
            positions,
            cosines if norms is None else norms,  # a kernel without norms reads none
            q,
            key_cache,
            value_cache,
            slot_mapping,
            eps,
            **rotate_options(heads, kv_heads, d, norms is not None),
            **begins_early(qkv.device),
        )
    return q


def rotate_options(heads: int, kv_heads: int, d: int, has_norms: bool) -> dict[str, Any]:
    """Constants and options for such heads."""
    return {
        **{"heads": heads, "kv_heads": kv_heads, "half": d // 2, "HALF": triton.next_power_of_2(d // 2)},
        **{"HAS_NORMS": has_norms, "num_warps": 1, "enable_fp_fusion": False},
    }
