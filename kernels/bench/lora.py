"""The rival that scale sets replace: the same int4 matmul with a LoRA adapter per row, in its two usual forms."""

from __future__ import annotations

import torch
from torch import Tensor

from peqa_kernels.bench.timing import Call, Way
from peqa_kernels.bench.weights import Shape
from peqa_kernels.quant_matmul import PreparedWeight, quant_matmul

BLOCK = 256  # outputs that share a segment number, as the Triton form asks for


class LoraSets:
    """One linear's adapters: A [tasks, segments, rank, K] and B [tasks, N, rank], as servers stack them."""

    def __init__(self, shape: Shape, tasks: int, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make random adapters; every sibling of a fused linear has its own A."""
        k, n, segments = shape.in_features, shape.out_features, len(shape.segments)
        self.a = (torch.randn(tasks, segments, rank, k, device=device) * 0.01).to(dtype)
        self.b = (torch.randn(tasks, n, rank, device=device) * 0.01).to(dtype)
        self.segments = shape.segments
        owner = torch.arange(segments).repeat_interleave(torch.tensor(shape.segments))
        self.segment_of = owner[::BLOCK].to(device=device, dtype=torch.int32)

    @property
    def fits_blocks(self) -> bool:
        """Whether no block of outputs belongs to two segments."""
        return all(size % BLOCK == 0 for size in self.segments[:-1])

    def add_gathered(self, y: Tensor, x: Tensor, row: Tensor) -> None:
        """Add B[row] (A[row] x) to y [M, N] with gathered adapters and batched matmuls."""
        low = torch.einsum("mk,msrk->msr", x, self.a.index_select(0, row))
        up, first = self.b.index_select(0, row), 0
        for segment, size in enumerate(self.segments):
            last = first + size
            y[:, first:last] += torch.bmm(up[:, first:last], low[:, segment, :, None]).squeeze(-1)
            first = last

    def add_fused(self, y: Tensor, x: Tensor, row: Tensor) -> None:
        """Add the same with one Triton launch to shrink and one to expand."""
        from peqa_kernels.bench.lora_triton import add_lora

        add_lora(y, x, self.a, self.b, row, self.segment_of)


def lora_ways(x: Tensor, weights: list[PreparedWeight], sets: list[LoraSets], row: Tensor) -> list[Way]:
    """The forms that run on x's device; whichever is faster is the rival. `row` counts adapters from 0."""

    def gathered(weight: PreparedWeight, own: LoraSets) -> Call:
        return lambda: own.add_gathered(quant_matmul(x, weight), x, row)

    def fused(weight: PreparedWeight, own: LoraSets) -> Call:
        return lambda: own.add_fused(quant_matmul(x, weight), x, row)

    pairs = list(zip(weights, sets, strict=True))
    ways = [Way("lora gathered", [gathered(*pair) for pair in pairs])]
    if x.device.type == "cuda" and sets[0].fits_blocks:
        ways.append(Way("lora fused", [fused(*pair) for pair in pairs]))
    return ways
