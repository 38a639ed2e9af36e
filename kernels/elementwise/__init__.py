"""What a decoder of the Llama family does between its products: norms, turned heads, gates; each op one launch.

Every op rounds where transformers' modules round: sums of squares in fp32, what is normed to the activations' dtype and
then times the weight; each product of a rotation, and their sum; the gate before it is multiplied. On a CPU they are
the reference, in torch's own operations. For inference: no op has a gradient. Importing this loads no triton.
"""

from __future__ import annotations

from torch import Tensor

from peqa_kernels.elementwise.reference import (
    add_rms_norm_reference,
    rms_norm_reference,
    rotate_and_write_reference,
    silu_mul_reference,
)

__all__ = ["LARGEST_ROW", "add_rms_norm", "rms_norm", "rotate_and_write", "silu_mul"]

LARGEST_ROW = 16384
"""Features of the widest row that a norm takes on a GPU: one program holds it in registers."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight [N] * x / sqrt(mean(x²) + eps), row by row: [rows, N] in the dtype of x [rows, N] and weight."""
    if x.is_cuda and len(x):
        from peqa_kernels.elementwise.gpu import rms_norm_gpu

        return rms_norm_gpu(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its `rms_norm`: both [rows, N], as x and y are."""
    if x.is_cuda and len(x):
        from peqa_kernels.elementwise.gpu import add_rms_norm_gpu

        return add_rms_norm_gpu(x, y, weight, eps)
    return add_rms_norm_reference(x, y, weight, eps)


def rotate_and_write(
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
    """Turn queries and keys by their positions' angles, and write keys and values to their slots.

    Args:
        qkv: [tokens, (heads + 2 kv_heads) * d], a token's queries, keys and values one after the other.
        cosines: [positions, d / 2], of the angle by which feature i turns with feature i + d / 2; in qkv's dtype.
        sines: [positions, d / 2].
        positions: int64 [tokens].
        key_cache: [blocks, block_size, kv_heads, d].
        value_cache: [blocks, block_size, kv_heads, d].
        slot_mapping: int64 [tokens]; -1: neither key nor value is written.
        norms: [2, d], the weights of an `rms_norm` of each query head and of each key head before they turn.
        eps: of these norms.

    Returns the queries, [tokens, heads, d].
    """
    given = (qkv, cosines, sines, positions, key_cache, value_cache, slot_mapping, norms, eps)
    if qkv.is_cuda and len(qkv):
        from peqa_kernels.elementwise.gpu import rotate_and_write_gpu

        return rotate_and_write_gpu(*given)
    return rotate_and_write_reference(*given)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [rows, N], of gate and up side by side, [rows, 2 N]."""
    if gate_up.is_cuda and len(gate_up):
        from peqa_kernels.elementwise.gpu import silu_mul_gpu

        return silu_mul_gpu(gate_up)
    return silu_mul_reference(gate_up)
