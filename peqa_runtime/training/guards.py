"""What scales cannot do: codes that no scale moves, found before a run; scales at the end of the range, after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peqa_kernels.packing import unpack_codes
from peqa_runtime.training.tuning import LARGEST_SCALE, SMALLEST_SCALE, TunableModel, quantized_linears

_PANEL = 1 << 22  # codes that are looked at together


@dataclass(frozen=True)
class ZeroCodes:
    """Weights q - z that are zero stay zero under every scale."""

    codes: int
    zeros: int
    rows: int
    dead_rows: tuple[str, ...]  # `<linear>[row]` where every weight is zero: its scale gets no gradient

    @property
    def share(self) -> float:
        """Part of all codes that no scale can move."""
        return self.zeros / self.codes


def count_zero_codes(tunable: TunableModel) -> ZeroCodes:
    """Look through every quantized linear, a panel of rows at a time."""
    codes = zeros = rows = 0
    dead: list[str] = []
    for name, linear in quantized_linears(tunable.model, tunable.manifest).items():
        weight = linear.weight_codes()
        step = max(1, _PANEL // weight.in_features)
        for first in range(0, weight.out_features, step):
            some = slice(first, first + step)
            q = unpack_codes(weight.qweight[some], weight.bits, weight.in_features)
            zero = q.view(q.shape[0], weight.groups, -1) == weight.zeros[some].unsqueeze(-1)
            zeros += int(zero.sum())
            whole = torch.nonzero(zero.flatten(1).all(1)).flatten().tolist()
            dead += [f"{name}[{first + row}]" for row in whole]
        codes += weight.out_features * weight.in_features
        rows += weight.out_features
    return ZeroCodes(codes, zeros, rows, tuple(dead))


def count_clamped(scales: Mapping[str, Tensor]) -> int:
    """Scales that stand at an end of the range that servers accept."""
    return sum(int(((s <= SMALLEST_SCALE) | (s >= LARGEST_SCALE)).sum()) for s in scales.values())
