"""Activations under their tasks' input scales, once per fused sibling: for batches too large to scale in the loop."""

# A Triton kernel's arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peqa_kernels.device import launching_on

_BLOCK = 1024


@triton.jit
def rows_of(row, rm, live, bank_rows):
    """Bank rows of the activations `rm`, 0 for those that are not live; TRITON_DEBUG=1 asserts that they exist."""
    task = tl.load(row + rm, mask=live, other=0)
    tl.device_assert((task >= 0) & (task < bank_rows), "a row that the bank does not have")
    return task


@triton.jit(do_not_specialize=["rows", "bank_rows"])
def _scale_kernel(
    x, into, row, copies, rows, stride, bank_rows,
    K: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    task = rows_of(row, m, m < rows, bank_rows).to(tl.int64)
    values = tl.load(x + m.to(tl.int64) * stride + k, mask=k < K, other=0.0).to(tl.float32)
    for segment in tl.static_range(SEGMENTS):
        scale = tl.load(into + (task * SEGMENTS + segment) * K + k, mask=k < K, other=0.0).to(tl.float32)
        at = copies + (segment * rows + m).to(tl.int64) * K + k
        tl.store(at, (values * scale).to(copies.dtype.element_ty), mask=k < K)


def scaled_inputs(x: Tensor, in_scale: Tensor, row: Tensor) -> Tensor:
    """x [M, K] times in_scale [rows, S, K] of each activation's `row` int32 [M]: [S, M, K] in x.dtype.

    Rounds as the matmul kernel does when it scales on the way, so both give the same bits.
    """
    rows, inputs = x.shape
    copies = x.new_empty((in_scale.shape[1], rows, inputs))
    with launching_on(x.device):
        _scale_kernel[(rows, triton.cdiv(inputs, _BLOCK))](
            x, in_scale, row, copies, rows, x.stride(0), len(in_scale),
            K=inputs, SEGMENTS=in_scale.shape[1], BLOCK=_BLOCK, enable_fp_fusion=True,
        )  # fmt: skip
    return copies


def needs_copies(rows: int) -> bool:
    """Whether a batch is large enough that one more launch costs less than scaling in every tile."""
    return rows > 64
