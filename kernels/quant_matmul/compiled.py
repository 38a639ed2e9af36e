"""quant_matmul as a torch custom op, so that a model around it compiles without graph breaks.

Only traced code comes here: the dispatcher's Python layers cost more than a small matmul, so eager calls go straight
to the backend. An op takes tensors and numbers only; a weight enters as a one-element tensor that holds its number. A
tensor is an input of the compiled graph, where a plain number would be baked into artefacts that other processes read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from peqa_kernels.quant_matmul.weight import LinearBank

Multiply = Callable[[Tensor, Tensor | None, LinearBank | None, Tensor | None, Tensor | None], Tensor]


class Handle:
    """Ties a number that an op can carry to what multiplies; forgotten together with its owner."""

    def __init__(self, multiply: Multiply) -> None:
        """Number `multiply`, which owns the weight."""
        self.multiply = multiply
        self.tensor = torch.tensor(
            next(_numbers), dtype=torch.int64
        )  # CPU, so that reading it waits for no device
        _live[int(self.tensor)] = self


# Ops are process-wide, so their weights' numbers are too. No number is used twice and nothing is kept alive: two
# engines in one process cannot meet here.
_numbers = itertools.count()
_live: WeakValueDictionary[int, Handle] = WeakValueDictionary()


@torch.library.custom_op("peqa::quant_matmul", mutates_args=())
def quant_matmul_op(
    x: Tensor,
    handle: Tensor,
    out_features: int,
    segments: Sequence[int],
    bias: Tensor | None,
    out_scale: Tensor | None,
    in_scale: Tensor | None,
    group_scale: Tensor | None,
    row: Tensor | None,
    group_row: Tensor | None,
) -> Tensor:
    """Compute quant_matmul, [M, N] in x.dtype, on the weight that `handle` numbers."""
    bank = None
    if out_scale is not None:
        bank = LinearBank(tuple(segments), out_scale, in_scale, group_scale)
    y = _live[int(handle)].multiply(x, bias, bank, row, group_row)
    assert y.shape[1] == out_features
    return y if y.dtype == x.dtype else y.to(x.dtype)


@quant_matmul_op.register_fake
def _(
    x: Tensor,
    handle: Tensor,
    out_features: int,
    segments: Sequence[int],
    bias: Tensor | None,
    out_scale: Tensor | None,
    in_scale: Tensor | None,
    group_scale: Tensor | None,
    row: Tensor | None,
    group_row: Tensor | None,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features))
