"""A GPU's mode in which a row's bits do not depend on how many rows run with it: what torch's own operations need.

The libraries behind torch's matrix products and reductions choose a kernel, and with it the order in which they add, by
the number of rows. So in this mode they only ever see one number: rows are computed in parts of a fixed size, the last
one filled up. (`quant_matmul` and `paged_attention` have fixed tiles of their own, the elementwise kernels a program
for each row.) Operations that work element by element, and torch's own LayerNorm and RMSNorm, where one block of
threads has one row, need nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from peqa_runtime.model.float_linear import SteadyLinear, in_parts
from peqa_runtime.model.own_products import modules_with_own_products

PART = 64
"""Rows of a product: one tile of the kernels that GPUs have for it, so fewer rows cost no less."""
_PART_VALUES = 1 << 17  # of a norm's part: 1024 heads of 128, or 64 hidden states of 2048


def set_equal_bits(model: nn.Module) -> list[str]:
    """Have a loaded model compute its floats in parts from now on.

    Return the names of modules that multiply by floats in ways of their own, as experts do: those stay as they are.
    """
    for module in model.modules():
        name = type(module).__name__
        if isinstance(module, SteadyLinear):
            module.part = PART
        elif name.endswith("RMSNorm") and not isinstance(module, nn.RMSNorm):
            module.forward = partial(_norm, module.forward)
    return list(modules_with_own_products(model))


def _norm(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return in_parts(compute, x, max(PART, _PART_VALUES // x.shape[-1]))
