"""What is made of activations before they are multiplied: copies under their tasks' input scales, totals of groups."""

# A Triton kernel's arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
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
    """A copy of BLOCK inputs of one activation for each segment. Grid: (rows, blocks)."""
    m = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    task = rows_of(row, m, m < rows, bank_rows).to(tl.int64)
    values = tl.load(x + m.to(tl.int64) * stride + k, mask=k < K, other=0.0).to(tl.float32)
    for segment in tl.static_range(SEGMENTS):
        scale = tl.load(into + (task * SEGMENTS + segment) * K + k, mask=k < K, other=0.0).to(tl.float32)
        at = copies + (segment * rows + m).to(tl.int64) * K + k
        tl.store(at, (values * scale).to(copies.dtype.element_ty), mask=k < K)


@triton.jit
def total_kernel(
    x, totals, stride,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the inputs of MANY groups of one activation, fp32. Grid: (rows, groups / MANY)."""
    m = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * MANY + tl.arange(0, MANY)
    total = tl.zeros((MANY,), tl.float32)
    for start in range(0, SIZE, BLOCK):
        k = start + tl.arange(0, BLOCK)
        live = (g < GROUPS)[:, None] & (k < SIZE)[None, :]
        values = tl.load(x + m * stride + g[:, None] * SIZE + k[None, :], mask=live, other=0.0)
        total += tl.sum(values.to(tl.float32), axis=1)
    tl.store(totals + m * GROUPS + g, total, mask=g < GROUPS)


def group_totals(x: Tensor, groups: int) -> Tensor:
    """Sums over each group of inputs of x [M, K], fp32 [M, groups]: what a zero point is multiplied by.

    Asked for once per call: in the loop over K every tile would sum them again, at twice its own instructions.
    """
    rows, inputs = x.shape
    totals = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    constants = total_constants(inputs, groups)
    with launching_on(x.device):
        total_kernel[(rows, triton.cdiv(groups, constants["MANY"]))](
            x, totals, x.stride(0), **constants, enable_fp_fusion=True
        )
    return totals


def total_constants(inputs: int, groups: int) -> dict[str, int]:
    """What `total_kernel` is compiled for."""
    size = inputs // groups
    block = min(_BLOCK, triton.next_power_of_2(size))
    return {"GROUPS": groups, "SIZE": size, "MANY": _BLOCK // block, "BLOCK": block}


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


def needs_copies(rows: int, *, totals: bool = False) -> bool:
    """Whether one more launch costs less than scaling in every tile, or `totals` of scaled inputs are wanted anyway."""
    return totals or rows > 64
