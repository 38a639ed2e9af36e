"""Dense copies of a quantized weight: for training, and for the CPU path without compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from peqa_kernels.quant_matmul.reference import dequantize
from peqa_kernels.quant_matmul.weight import QuantizedWeight


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
