"""Do the compiled elementwise kernels compute what torch computes on this device? Tried once, on random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from peqa_kernels.elementwise import (
    add_rms_norm,
    reference,
    rms_norm,
    rotate_and_write,
    silu_mul,
)

_ROWS = 5
_BLOCKS = (2, 4)  # of four slots each
_POSITIONS = 8
_EPS = 1e-5
# Torch adds up a row, and takes roots and exponentials, with other roundings in fp32. Where that takes what is rounded
# inside to 16 bits to its other neighbour, the last product rounds once more: two units. Few numbers are so near to the
# middle. In fp32 most results are touched, by more than that.
_UNITS = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 64}
_OTHER = {torch.float16: 0.02, torch.bfloat16: 0.02, torch.float32: 1.0}


class DecoderSizes(NamedTuple):
    """Of a model whose elementwise work is to be computed."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    d: int
    head_norms: bool


def agrees(sizes: DecoderSizes, dtype: torch.dtype, device: torch.device) -> bool:
    """Run every op at these sizes beside its reference. Compiles what they will launch; waits for the device."""
    numbers = Numbers(dtype, device)
    with torch.inference_mode():
        return all(_close(got, want) for got, want in pairs(sizes, numbers))


def pairs(sizes: DecoderSizes, numbers: Numbers) -> Iterator[tuple[Tensor, Tensor]]:
    """What each op gives, and what it should."""
    x, y = numbers.draw(_ROWS, sizes.hidden), numbers.draw(_ROWS, sizes.hidden)
    weight = numbers.draw(sizes.hidden)
    yield rms_norm(x, weight, _EPS), reference.rms_norm_reference(x, weight, _EPS)
    yield from zip(
        add_rms_norm(x, y, weight, _EPS), reference.add_rms_norm_reference(x, y, weight, _EPS), strict=True
    )
    gate_up = numbers.draw(_ROWS, 2 * sizes.intermediate)
    yield silu_mul(gate_up), reference.silu_mul_reference(gate_up)
    qkv = numbers.draw(_ROWS, (sizes.heads + 2 * sizes.kv_heads) * sizes.d)
    angles = 6.0 * torch.rand(_POSITIONS, sizes.d // 2, generator=numbers.generator, device=numbers.device)
    cosines, sines = angles.cos().to(qkv.dtype), angles.sin().to(qkv.dtype)
    positions = torch.tensor([0, 3, 1, 7, 2], device=numbers.device)
    slots = torch.tensor([6, -1, 0, 3, 5], device=numbers.device)
    norms = (1.0 + numbers.draw(2, sizes.d) / 4) if sizes.head_norms else None
    caches = qkv.new_zeros(2, 2, *_BLOCKS, sizes.kv_heads, sizes.d)  # keys and values, found and wanted
    turn = (cosines, sines, positions)
    yield (
        rotate_and_write(qkv, *turn, caches[0, 0], caches[0, 1], slots, norms, _EPS),
        reference.rotate_and_write_reference(qkv, *turn, caches[1, 0], caches[1, 1], slots, norms, _EPS),
    )
    yield caches[0], caches[1]


class Numbers:
    """Random numbers on a device, always the same."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(1)
        self._dtype = dtype

    def draw(self, *shape: int) -> Tensor:
        """Of deviation 1, so that gates are neither all open nor all shut."""
        return torch.randn(shape, generator=self.generator, device=self.device).to(self._dtype)


def _close(got: Tensor, want: Tensor) -> bool:
    """Equal but for roundings, and in 16 bits nearly everywhere equal.

    What is turned is a difference, whose roundings are those of its parts: units are at least those of 1.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    unit = torch.finfo(want.dtype).eps * want.float().abs().clamp(min=1.0)
    off = (got.float() - want.float()).abs()
    near = bool((off <= _UNITS[want.dtype] * unit).all())  # NaN is near nothing
    return near and bool((got != want).float().mean() <= _OTHER[want.dtype])
