"""Random weights and banks for the compiled CPU kernels, and a call of them."""

from __future__ import annotations

import torch
from torch import Tensor

from peqa_kernels import native
from peqa_kernels.native import NativeOps
from peqa_kernels.packing import pack_codes
from peqa_kernels.quant_matmul import LinearBank, QuantizedWeight


def make_weight(n: int, k: int, bits: int, group: int, *, whole_zeros: bool = False) -> QuantizedWeight:
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    groups = k // group
    zeros = torch.rand(n, groups) * (1 << bits)
    return QuantizedWeight(
        pack_codes(codes, bits),
        torch.rand(n, groups) * 0.02 + 0.01,
        zeros.round() if whole_zeros else zeros,
        bits,
        k,
    )


def make_bank(weight: QuantizedWeight, segments: tuple[int, ...], rows: int = 5) -> LinearBank:
    n, k, groups = weight.out_features, weight.in_features, weight.groups

    def random(*shape: int) -> Tensor:
        bank = torch.rand(rows, *shape) + 0.5
        bank[0] = 1.0
        return bank

    return LinearBank(segments, random(n), random(len(segments), k), random(groups, n))


def run(ops: NativeOps, x: Tensor, packed: native.PackedWeight, bias: Tensor | None, bank: LinearBank | None,
        row: Tensor | None, group_row: Tensor | None) -> Tensor:  # fmt: skip
    if bank is None:
        return ops.quant_matmul(x, packed, bias, None, None, None, None, None)
    return ops.quant_matmul(x, packed, bias, bank.out_scale, bank.in_scale, bank.group_scale, row, group_row)


def rows_of(count: int, rows: int = 5) -> Tensor:
    return torch.randint(0, rows, (count,), dtype=torch.int32)
