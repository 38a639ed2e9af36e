"""Linears that stay floats while serving: heads, routers, layers that a checkpoint did not quantize."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from peqa_kernels.quant_matmul.cpu import ROW_MULTIPLE


class SteadyLinear(nn.Module):
    """nn.Linear whose rows keep their bits on the CPU however many rows run together.

    The libraries behind F.linear take other kernels for the last few rows of a matrix; whole multiples avoid them.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.in_features = linear.in_features
        self.out_features = linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
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
