"""Triton kernels of tuning: panels of floats from the packed codes, column sums, and the gradient of group scales.

They read codes as files hold them (`peqa_kernels.packing`), not in the layout of the serving kernels, so any order of
reading is as good: outputs for the forward pass, inputs for the backward one. Nothing here waits for the device, sums
are cut at fixed places and added in a fixed order.
"""

# A Triton kernel's arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peqa_kernels.device import launching_on
from peqa_kernels.quant_matmul.dense import Scales
from peqa_kernels.quant_matmul.weight import QuantizedWeight

PANEL_TILE = (32, 128)  # rows and columns of a program of `dequantize_kernel`
DOT_TILE = (64, 128, 512)  # rows of a step, columns and rows of a program of `column_dot_kernel`
# Outputs, inputs and rows per step of `group_gradient_kernel`; 8 warps hold the 128 × 128 sums in 64 registers each.
GRADIENT_TILE = (128, 128, 64)
LEAST_GROUP = 16  # inputs of a group for which sums per tile are small beside the weight


def dequantize_panel_gpu(
    weight: QuantizedWeight, scales: Scales, row: int, column: int, panel: Tensor
) -> None:
    """Fill `panel` [rows, columns], whose first element is weight element [row, column]; as `dequantize_panel`."""
    rows, columns = panel.shape
    tile_rows, tile_columns = PANEL_TILE
    with launching_on(panel.device):
        dequantize_kernel[(triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns))](
            *_weight_pointers(weight),
            *_scale_pointers(scales, panel),
            panel,
            row,
            rows,
            column,
            columns,
            weight.qweight.shape[1],
            weight.out_features,
            weight.groups,
            weight.group_size,
            BITS=weight.bits,
            HAS_OUT=scales.out is not None,
            HAS_IN=scales.into is not None,
            HAS_GROUP=scales.group is not None,
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            num_warps=4,
            enable_fp_fusion=False,
        )


def column_dot_gpu(a: Tensor, b: Tensor) -> Tensor:
    """Sum a * b over the rows in fp32: [M, N] x 2 -> [N]."""
    rows, columns = a.shape
    step, width, most = DOT_TILE
    a, b = a.contiguous(), b.contiguous()
    parts = torch.empty((triton.cdiv(rows, most), columns), dtype=torch.float32, device=a.device)
    with launching_on(a.device):
        grid = (triton.cdiv(columns, width), parts.shape[0])
        column_dot_kernel[grid](
            a,
            b,
            parts,
            rows,
            columns,
            STEP=step,
            COLUMNS=width,
            MOST=most,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return parts.sum(0)


def fits_group_kernel(dy: Tensor, weight: QuantizedWeight) -> bool:
    """Whether `group_gradient_gpu` takes this call: 16-bit inputs, and groups that tiles can hold or divide."""
    return dy.dtype != torch.float32 and _part_of(weight) >= LEAST_GROUP


def group_gradient_gpu(dy: Tensor, x: Tensor, weight: QuantizedWeight, in_scale: Tensor | None) -> Tensor:
    """Give sum_{k in g} W0[n, k] * in[k] * (dY^T x)[n, k], fp32 [G, N].

    A program forms one tile of dY^T x in registers, multiplies it by the weight there and writes one number per row and
    group, or part of a group: [K / part, N] in memory, never [N, K].
    """
    outputs, inputs, step = GRADIENT_TILE
    n, k = weight.out_features, weight.in_features
    part = _part_of(weight)
    dy, x = dy.contiguous(), x.contiguous()
    parts = torch.empty((k // part, n), dtype=torch.float32, device=dy.device)
    with launching_on(dy.device):
        group_gradient_kernel[(triton.cdiv(n, outputs), triton.cdiv(k, inputs))](
            dy,
            x,
            *_weight_pointers(weight),
            parts if in_scale is None else in_scale.contiguous(),
            parts,
            dy.shape[0],
            n,
            k,
            weight.qweight.shape[1],
            weight.groups,
            weight.group_size,
            BITS=weight.bits,
            HAS_IN=in_scale is not None,
            PART=part,
            OUTPUTS=outputs,
            INPUTS=inputs,
            STEP=step,
            num_warps=8,
            num_stages=3,
            enable_fp_fusion=False,
        )
    return parts.view(weight.groups, -1, n).sum(1)


def _part_of(weight: QuantizedWeight) -> int:
    """Inputs that are summed up at once: the largest power of two that divides the group, at most a quarter tile."""
    size = weight.group_size
    return min(size & -size, GRADIENT_TILE[1] // 4)


def _weight_pointers(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    return weight.qweight.contiguous(), weight.scales.contiguous(), weight.zeros.contiguous()


def _scale_pointers(scales: Scales, stand_in: Tensor) -> tuple[Tensor, ...]:
    """The scales; what is not there is not read, but a pointer must be given."""
    return tuple(stand_in if scale is None else scale.contiguous() for scale in scales)


@triton.jit
def _codes(code_ptr, n, k, live, row_bytes, BITS: tl.constexpr):
    """Codes of outputs n [R] at inputs k [C] as fp32 [R, C]; a code may lie in two bytes where BITS is 3."""
    bit = k * BITS
    at = code_ptr + n.to(tl.int64)[:, None] * row_bytes + (bit // 8)[None, :]
    byte = tl.load(at, mask=live, other=0).to(tl.int32)
    if BITS == 8:
        return byte.to(tl.float32)
    if BITS == 3:
        split = (bit % 8 > 5)[None, :]
        byte |= tl.load(at + 1, mask=live & split, other=0).to(tl.int32) << 8
    return ((byte >> (bit % 8)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _base(code_ptr, scale_ptr, zero_ptr, n, k, live, row_bytes, groups, size, BITS: tl.constexpr):
    """The base weight s0 * (q - z) of outputs n [R] at inputs k [C], fp32 [R, C]."""
    at = n.to(tl.int64)[:, None] * groups + (k // size)[None, :]
    zero = tl.load(zero_ptr + at, mask=live, other=0.0)
    scale = tl.load(scale_ptr + at, mask=live, other=0.0)
    return _codes(code_ptr, n, k, live, row_bytes, BITS) - zero, scale


@triton.jit(do_not_specialize=["row", "rows", "column", "columns"])
def dequantize_kernel(
    code_ptr, scale_ptr, zero_ptr, out_ptr, in_ptr, group_ptr, panel_ptr,
    row, rows, column, columns, row_bytes, outputs, groups, size,
    BITS: tl.constexpr, HAS_OUT: tl.constexpr, HAS_IN: tl.constexpr, HAS_GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS × COLUMNS of the panel, the factors multiplied in the order of the CPU's paths."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = (r < rows)[:, None] & (c < columns)[None, :]
    n = row + r
    k = column + c
    value, scale = _base(code_ptr, scale_ptr, zero_ptr, n, k, live, row_bytes, groups, size, BITS)
    if HAS_GROUP:
        scale *= tl.load(
            group_ptr + (k // size).to(tl.int64)[None, :] * outputs + n[:, None], mask=live, other=0.0
        )
    if HAS_OUT:
        scale *= tl.load(out_ptr + n, mask=r < rows, other=0.0)[:, None]
    value *= scale
    if HAS_IN:
        value *= tl.load(in_ptr + k, mask=c < columns, other=0.0)[None, :]
    at = panel_ptr + r.to(tl.int64)[:, None] * columns + c[None, :]
    tl.store(at, value.to(panel_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rows"])
def column_dot_kernel(
    a_ptr, b_ptr, part_ptr, rows, columns, STEP: tl.constexpr, COLUMNS: tl.constexpr, MOST: tl.constexpr
):
    """Sum a * b over MOST rows of COLUMNS columns. Grid: (columns / COLUMNS, rows / MOST)."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * MOST
    total = tl.zeros([STEP, COLUMNS], tl.float32)
    for start in range(first, tl.minimum(rows, first + MOST), STEP):
        r = start + tl.arange(0, STEP)
        live = (r < rows)[:, None] & (c < columns)[None, :]
        at = r.to(tl.int64)[:, None] * columns + c[None, :]
        a = tl.load(a_ptr + at, mask=live, other=0.0).to(tl.float32)
        total += a * tl.load(b_ptr + at, mask=live, other=0.0).to(tl.float32)
    tl.store(part_ptr + tl.program_id(1) * columns + c, tl.sum(total, 0), mask=c < columns)


@triton.jit
def _store_sums(
    acc, first, n, code_ptr, scale_ptr, zero_ptr, in_ptr, part_ptr, outputs, inputs, row_bytes, groups, size,
    BITS: tl.constexpr, HAS_IN: tl.constexpr, PART: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Multiply dY^T x [OUTPUTS, INPUTS], whose first input is `first`, by the weight; store sums over PART inputs."""
    k = first + tl.arange(0, INPUTS)
    live = (n < outputs)[:, None] & (k < inputs)[None, :]
    value, scale = _base(code_ptr, scale_ptr, zero_ptr, n, k, live, row_bytes, groups, size, BITS)
    acc *= value * scale
    if HAS_IN:
        acc *= tl.load(in_ptr + k, mask=k < inputs, other=0.0)[None, :]
    sums = tl.sum(tl.reshape(acc, (OUTPUTS, INPUTS // PART, PART)), 2)
    p = first // PART + tl.arange(0, INPUTS // PART)
    tl.store(
        part_ptr + p.to(tl.int64)[None, :] * outputs + n[:, None],
        sums,
        mask=(n < outputs)[:, None] & (p < inputs // PART)[None, :],
    )


@triton.jit(do_not_specialize=["rows"])
def group_gradient_kernel(
    dy_ptr, x_ptr, code_ptr, scale_ptr, zero_ptr, in_ptr, part_ptr,
    rows, outputs, inputs, row_bytes, groups, size,
    BITS: tl.constexpr, HAS_IN: tl.constexpr, PART: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """OUTPUTS × INPUTS of dY^T x, times the weight, summed over runs of PART inputs: part [K / PART, N]."""
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    acc = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    for start in range(0, rows, STEP):
        m = start + tl.arange(0, STEP)
        wide = m.to(tl.int64)
        dy = tl.load(
            dy_ptr + wide[None, :] * outputs + n[:, None],
            mask=(n < outputs)[:, None] & (m < rows)[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + wide[:, None] * inputs + k[None, :],
            mask=(m < rows)[:, None] & (k < inputs)[None, :],
            other=0.0,
        )
        acc = tl.dot(dy, x, acc)
    # A quarter of the inputs at a time: all of them would want more registers than there are.
    QUARTER: tl.constexpr = INPUTS // 4
    even, odd = tl.split(tl.permute(tl.reshape(acc, (OUTPUTS, 2, 2, QUARTER)), (0, 3, 1, 2)))
    first = tl.program_id(1) * INPUTS
    for i in tl.static_range(4):
        low, high = tl.split(even if i % 2 == 0 else odd)
        _store_sums(
            low if i < 2 else high, first + i * QUARTER, n, code_ptr, scale_ptr, zero_ptr, in_ptr, part_ptr,
            outputs, inputs, row_bytes, groups, size, BITS, HAS_IN, PART, OUTPUTS, QUARTER,
        )  # fmt: skip
