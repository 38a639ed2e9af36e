"""Linears that stay floats while serving: heads, routers, layers that a checkpoint did not quantize."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peqa_kernels.quant_matmul.cpu import ROW_MULTIPLE


def in_parts(compute: Callable[[Tensor], Tensor], x: Tensor, part: int) -> Tensor:
    """`compute` of x [..., K] row by row, in calls of `part` rows each: [..., N]. Rows that fill up are zeros."""
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    pieces = [compute(piece) for piece in F.pad(rows, (0, 0, 0, -count % part)).split(part)]
    y = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return y[:count].view(*x.shape[:-1], y.shape[-1])


class SteadyLinear(nn.Module):
    """nn.Linear whose rows keep their bits on the CPU however many rows run together.

    The libraries behind F.linear take other kernels for the last few rows of a matrix; whole multiples avoid them. On a
    GPU they take other kernels for every number of rows: `part`, where it is set, is then the only one (`equal_bits`).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.part: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if self.part is not None:
            return in_parts(lambda rows: F.linear(rows, self.weight, self.bias), x, self.part)
        if x.device.type != "cpu":
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        count = rows.shape[0]
        y = F.linear(F.pad(rows, (0, 0, 0, -count % ROW_MULTIPLE)), self.weight, self.bias)[:count]
        return y.view(*x.shape[:-1], self.out_features)


def steady_linears(model: nn.Module) -> None:
    """Replace every nn.Linear that is left in a model by a SteadyLinear on the same weight, in place."""
    for parent in list(model.modules()):
        for leaf, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, leaf, SteadyLinear(child))
