"""CPU paths of quant_matmul: the compiled C one where it was built, else torch alone.

Both keep the promise that a row's bits depend neither on how many rows run with it nor on which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from peqa_kernels.quant_matmul.checks import check_rows_exist
from peqa_kernels.quant_matmul.dense import DenseCopies
from peqa_kernels.quant_matmul.weight import LinearBank

if TYPE_CHECKING:
    from peqa_kernels.native import NativeOps, PackedWeight

# MKL's fp32 GEMM handles a remainder of fewer than four rows (per thread) with other kernels, whose sums differ in
# the last bits: measured on AVX-512 with 1 to 16 threads, every M that is a multiple of 4 gives equal bits per row.
ROW_MULTIPLE = 8


class TorchCpu:
    """Dense fp32 copy and F.linear: works on every CPU, at 4 bytes per weight."""

    def __init__(self, copies: DenseCopies, segments: tuple[int, ...]) -> None:
        """Take what gives the dense base weight, and the output sizes of the fused siblings."""
        self._copies = copies
        self._segments = segments

    def matmul(
        self,
        x: Tensor,  # [M, K]
        bias: Tensor | None,
        bank: LinearBank | None,
        row: Tensor | None,
        group_row: Tensor | None,
    ) -> Tensor:
        """Compute quant_matmul, [M, N] fp32."""
        if bank is not None:
            check_rows_exist(bank, row, group_row)
        x = x.float()
        dense = self._copies.get(torch.float32)
        in_scale = None if bank is None or row is None else bank.in_scale
        group_scale = None if bank is None or group_row is None else bank.group_scale
        if group_scale is None or group_row is None:
            y = self._segmented(x, dense, in_scale, row)
        else:
            y = x.new_empty((x.shape[0], dense.shape[0]))
            groups = group_scale.shape[1]
            for task in group_row.unique().tolist():
                picked = (group_row == task).nonzero().squeeze(1)
                scale = group_scale[task].t().unsqueeze(-1).float()  # [N, G, 1]
                scaled = (dense.view(dense.shape[0], groups, -1) * scale).view_as(dense)
                y[picked] = self._segmented(x[picked], scaled, in_scale, None if row is None else row[picked])
        if bank is not None and row is not None:
            y *= bank.out_scale.index_select(0, row)
        # Added here and not inside F.linear: the sum must round alike with and without a task row.
        return y if bias is None else y.add_(bias.float())

    def _segmented(self, x: Tensor, dense: Tensor, in_scale: Tensor | None, row: Tensor | None) -> Tensor:
        """Multiply by one [N, K] weight, each segment with its own input scales; [M, N]."""
        rows = x.shape[0]
        if len(self._segments) == 1 and in_scale is None:
            return _linear(x, dense)
        y = x.new_empty((rows, dense.shape[0]))
        first = 0
        # Segment by segment even without input scales: a row keeps its bits when the first set brings some.
        for segment, width in enumerate(self._segments):
            last = first + width
            inputs = x if in_scale is None or row is None else x * in_scale[:, segment].index_select(0, row)
            y[:, first:last] = _linear(inputs, dense[first:last])
            first = last
        return y


class NativeCpu:
    """The compiled kernels of peqa_kernels.native on their own packed layout."""

    def __init__(self, ops: NativeOps, packed: PackedWeight) -> None:
        """Take the loaded library (NativeOps) and what its `pack` returned."""
        self._ops = ops
        self.packed = packed

    def matmul(
        self,
        x: Tensor,  # [M, K]
        bias: Tensor | None,
        bank: LinearBank | None,
        row: Tensor | None,
        group_row: Tensor | None,
    ) -> Tensor:
        """Compute quant_matmul, [M, N] fp32."""
        if x.dtype != torch.float32:
            x = x.float()
        if x.stride(1) != 1:
            x = x.contiguous()
        if bank is None:
            return self._ops.quant_matmul(x, self.packed, bias, None, None, None, None, None)
        tasks = row is not None
        groups = group_row is not None and bank.group_scale is not None
        return self._ops.quant_matmul(
            x,
            self.packed,
            bias,
            bank.out_scale if tasks else None,
            bank.in_scale if tasks else None,
            bank.group_scale if groups else None,
            row,
            group_row if groups else None,
        )


def _linear(x: Tensor, dense: Tensor) -> Tensor:
    """F.linear whose every row has the bits that it has alone."""
    rows = x.shape[0]
    missing = -rows % ROW_MULTIPLE
    if missing:
        return F.linear(F.pad(x, (0, 0, 0, missing)), dense)[:rows]
    return F.linear(x, dense)
