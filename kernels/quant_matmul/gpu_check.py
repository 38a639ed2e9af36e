"""Does a compiled tile compute exactly? Integers small enough that fp32 sums have one right answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peqa_kernels.packing import pack_codes
from peqa_kernels.quant_matmul import gpu_kernel
from peqa_kernels.quant_matmul.gpu_inputs import needs_copies
from peqa_kernels.quant_matmul.reference import quant_matmul_reference
from peqa_kernels.quant_matmul.tuning import Scales, Tile, bucket
from peqa_kernels.quant_matmul.weight import LinearBank, QuantizedWeight

if TYPE_CHECKING:
    from peqa_kernels.quant_matmul.gpu import TritonGpu

_OUTPUTS = 1024
_TASKS = 3


def is_exact(like: TritonGpu, tile: Tile, rows: int, dtype: torch.dtype, scales: Scales) -> bool:
    """Multiply random integers on a weight cut as `like` is, by `tile`, and compare with the exact answer.

    Waits for the device; compiles what a launch of `like` compiles, but for biases and fused siblings.
    """
    from peqa_kernels.quant_matmul.gpu import TritonGpu, launch  # here, since they ask for this check

    layout = like.layout
    numbers = _Integers(like.words.device)
    weight = numbers.weight(_OUTPUTS, layout.in_features, layout.groups, layout.bits, like.zeros_mode)
    enough = min(bucket(rows), 2 * tile.rows + 5)
    if needs_copies(rows) and not needs_copies(enough):
        enough = bucket(rows)
    x = numbers.draw(-2, 3, enough, layout.in_features).to(dtype)
    row = (torch.arange(enough, device=x.device) % _TASKS).int()
    bank = None if scales == "base" else numbers.bank(weight, scales)
    group_row = row.sort().values if scales == "group" else None
    got = launch(TritonGpu(weight, (_OUTPUTS,)), tile, x, None, bank, row, group_row)
    want = quant_matmul_reference(x, weight, None, bank, row, group_row)
    return torch.equal(got, want.to(dtype))


class _Integers:
    """Random whole numbers on a device, always the same."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(1)

    def draw(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """float32, low .. high - 1."""
        whole = torch.randint(low, high, shape, generator=self._generator, device=self._device)
        return whole.float()

    def weight(self, n: int, k: int, groups: int, bits: int, zeros_mode: int) -> QuantizedWeight:
        """Scales that are powers of two, and zero points that are held in that mode."""
        middle = 1 << (bits - 1)
        zeros = torch.full((n, groups), float(middle), device=self._device)
        if zeros_mode == gpu_kernel.INTEGER.value:
            zeros = self.draw(0, 1 << min(bits, 6), n, groups)
        elif zeros_mode == gpu_kernel.FRACTIONAL.value:
            zeros += self.draw(-3, 4, n, groups) / 2
        codes = self.draw(0, 1 << bits, n, k).to(torch.uint8)
        return QuantizedWeight(pack_codes(codes, bits), 2.0 ** self.draw(-1, 2, n, groups), zeros, bits, k)

    def bank(self, weight: QuantizedWeight, scales: Scales) -> LinearBank:
        """Rows that differ; small factors keep sums exact."""
        n, k = weight.out_features, weight.in_features
        with_inputs, with_groups = scales == "channel+input", scales == "group"
        return LinearBank(
            (n,),
            self.draw(1, 4, _TASKS, n).half(),
            self.draw(1, 3, _TASKS, 1, k).half() if with_inputs else None,
            self.draw(1, 3, _TASKS, weight.groups, n).half() if with_groups else None,
        )
