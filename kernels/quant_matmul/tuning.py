"""Tile sizes of the Triton kernel. Nothing here is measured yet: these are the limits of the hardware, no more."""

from __future__ import annotations

from typing import NamedTuple

import torch

PANEL = 64  # outputs of one tile: the least that lets Hopper's wgmma (4 warps of 16 rows) take the weight


class Tile(NamedTuple):
    """What one program of the kernel works on: PANEL outputs by `rows` activations."""

    rows: int
    warps: int
    stages: int  # depth of the load pipeline


def inputs_per_step(group_size: int) -> int:
    """Inputs that one step of the loop takes; a group is filled up to a multiple of it.

    The largest of 128, 64 and 32 that wastes at most 1/16 of the group, since long steps mean long loads.
    """
    for step in (128, 64):
        if -group_size % step <= group_size // 16:
            return step
    return 32


def tile_for(rows: int, dtype: torch.dtype, bits: int, *, in_scale: bool, group_scale: bool) -> Tile:
    """The tile for a batch of `rows` activations; a test compiles each for sm_80 and sm_90 without spills.

    `in_scale`, `group_scale`: whether the launch reads such scales. Each costs registers, as do the two planes of
    3 bits and the parts that fp32 activations are split into.
    """
    wide = dtype == torch.float32
    most = 16 if wide or (group_scale and bits == 3) else 32 if group_scale or in_scale or bits == 3 else 64
    least = 16  # of tl.dot
    size = min(most, max(least, 1 << (rows - 1).bit_length()))
    return Tile(size, 4, 2 if wide else 4 if size == least else 3)
