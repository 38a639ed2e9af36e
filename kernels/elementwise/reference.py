"""The elementwise ops in plain torch, operation for operation as transformers' Llama modules write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peqa_kernels.paged_attention import write_kv


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm`, over the last dimension of an x of any shape."""
    wide = x.float()
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + eps)).to(x.dtype)


def add_rms_norm_reference(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `add_rms_norm`."""
    total = x + y
    return total, rms_norm_reference(total, weight, eps)


def rotate_and_write_reference(
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
    kv_heads, d = key_cache.shape[2:]
    heads = qkv.shape[1] // d - 2 * kv_heads
    q, key, value = qkv.view(len(qkv), -1, d).split([heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q, key = (rms_norm_reference(x, w, eps) for x, w in zip((q, key), norms.unbind(), strict=True))
    cosine, sine = (table[positions].repeat(1, 2)[:, None] for table in (cosines, sines))
    q, key = (x * cosine + _turned(x) * sine for x in (q, key))
    write_kv(key, value, key_cache, value_cache, slot_mapping)
    return q


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """As `silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _turned(x: Tensor) -> Tensor:
    """x [..., d] turned by a quarter."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
