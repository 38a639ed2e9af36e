"""A quantized weight as floats: a panel at a time for training, whole for the CPU path without compiled kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from peqa_kernels import native
from peqa_kernels.packing import packed_width, unpack_codes
from peqa_kernels.quant_matmul.reference import dequantize
from peqa_kernels.quant_matmul.weight import QuantizedWeight

_CHUNK = 1 << 18  # elements of an fp32 intermediate: 1 MB, so that it stays in the second-level cache


class Scales(NamedTuple):
    """One task's scales relative to the base, fp32; None means ones."""

    out: Tensor | None = None  # [N]
    into: Tensor | None = None  # [K]
    group: Tensor | None = None  # [G, N]


class DenseCopies:
    """The base weight s0 * (q - z) as [N, K], made on demand and kept per dtype until dropped."""

    def __init__(self, weight: QuantizedWeight) -> None:
        """Keep the weight to make copies of; none is made yet."""
        self._weight = weight
        self._copies: dict[torch.dtype, Tensor] = {}

    def get(self, dtype: torch.dtype) -> Tensor:
        """Give the copy in `dtype`, rounded from fp32."""
        found = self._copies.get(dtype)
        if found is None:
            found = self._copies[dtype] = dequantize(self._weight).to(dtype)
        return found

    def drop(self) -> None:
        """Free the copies; the next `get` makes them anew."""
        self._copies.clear()


def column_step(weight: QuantizedWeight, wanted: int) -> int:
    """Columns that one panel may have, about `wanted`: whole groups, and whole bytes of codes."""
    unit = math.lcm(8, weight.group_size if weight.groups > 1 else 1)
    return max(unit, wanted // unit * unit)


def dequantize_panel(
    weight: QuantizedWeight,
    dtype: torch.dtype,
    scales: Scales = Scales(),
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Tensor:
    """Give rows × columns of s0 * (q - z) under a task's scales, rounded once from fp32 to `dtype`.

    `columns` begins at a multiple of `column_step(weight, 0)`, and ends at one or at K.
    """
    n, k = weight.out_features, weight.in_features
    row, last_row, _ = rows.indices(n)
    column, last_column, _ = columns.indices(k)
    assert column % column_step(weight, 0) == 0, (column, weight.group_size)
    assert last_column == k or last_column % column_step(weight, 0) == 0, (last_column, weight.group_size)
    panel = torch.empty((last_row - row, last_column - column), dtype=dtype, device=weight.qweight.device)
    if panel.is_cuda:
        from peqa_kernels.quant_matmul.backward_gpu import dequantize_panel_gpu

        dequantize_panel_gpu(weight, scales, row, column, panel)
    elif dtype in (torch.float32, torch.bfloat16) and (ops := native.load()) is not None:
        ops.dequantize(weight, panel, row, column, *scales)
    else:
        dequantize_panel_torch(weight, scales, row, column, panel)
    return panel


def dequantize_panel_torch(
    weight: QuantizedWeight, scales: Scales, row: int, column: int, panel: Tensor
) -> None:
    """`NativeOps.dequantize` in torch, with the same bits: fill `panel` [rows, columns], whose first
    element is weight element [row, column].
    """
    count, width = panel.shape
    size = weight.group_size
    groups = slice(None) if weight.groups == 1 else slice(column // size, (column + width) // size)
    factor, zeros = weight.scales[:, groups], weight.zeros[:, groups]
    if scales.group is not None:
        factor = factor * scales.group[groups].t()
    if scales.out is not None:
        factor = factor * scales.out.unsqueeze(1)
    into = None if scales.into is None else scales.into[column : column + width]
    data = slice(column * weight.bits // 8, packed_width(column + width, weight.bits))
    step = max(1, _CHUNK // width)
    for first in range(0, count, step):
        some = slice(row + first, row + min(first + step, count))
        codes = unpack_codes(weight.qweight[some, data], weight.bits, width)
        grouped = codes.view(codes.shape[0], factor.shape[1], -1)
        values = (
            torch.sub(grouped, zeros[some].unsqueeze(-1)).mul_(factor[some].unsqueeze(-1)).view(codes.shape)
        )
        if into is not None:
            values *= into
        panel[first : first + step] = values
