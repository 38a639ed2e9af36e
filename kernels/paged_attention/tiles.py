"""Shapes of the attention kernels' tiles, and where the keys of a long sequence are cut. Plain numbers, no device.

Not measured on a GPU: chosen by the registers and shared memory that the compiled kernels take (a test compiles each
shape for sm_80 and sm_90 and finds no spill), by Hopper's wgmma, which wants 64 rows, and by the bytes in flight that a
decode step needs. Only fp32 caches with heads wider than 128 spill, 2 to 22 registers of the least tile that there is:
tf32x3 holds each operand twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# The first SPLITS_PER_LEVEL splits have FIRST_SPLIT keys each, the next as many twice that, and so on: a sequence of
# 4 096 keys is read by up to 16 programs per key/value head, one of 128 000 by up to 81, and a launch for the longest
# sequence that a server takes has no room for a thousand partial results where a short one gives two. Boundaries are
# absolute positions.
FIRST_SPLIT = 256
SPLITS_PER_LEVEL = 16

LEAST_ROWS = 16  # least M of tl.dot
LEAST_WIDTH = 16  # least K and N of tl.dot; narrower heads (toy models) are filled up
MOST_DECODE_ROWS = 64  # query heads of one tile; more heads of one key/value head take several tiles


class Tile(NamedTuple):
    """One step of a kernel's loop: `rows` (queries × heads) against `keys`, by `warps`, loads `stages` deep.

    Keys wait for the block table, which is loaded in the same loop, so of the stages most go to that chain: five give
    two tiles of keys and values (three where wgmma reads them from shared memory), fewer give one.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def decode_tile(repeat: int, d: int, dtype: torch.dtype, *, invariant: bool, wgmma: bool) -> Tile:
    """The tile of one new token and `repeat` query heads per key/value head of `d` features.

    `invariant`: the tile that prefill has too. `wgmma`: the GPU has those instructions (Hopper).
    """
    if invariant:
        return prefill_tile(d, dtype, invariant=True, wgmma=wgmma)
    if dtype == torch.float32:
        return Tile(LEAST_ROWS, 32 if d <= 128 else 16, 8, 2)
    rows = min(MOST_DECODE_ROWS, max(LEAST_ROWS, 1 << (repeat - 1).bit_length()))
    return Tile(rows, 64, 8 if rows * d > 64 * 64 else 4, 5 if d <= 128 else 2)


def prefill_tile(d: int, dtype: torch.dtype, *, invariant: bool, wgmma: bool) -> Tile:
    """The tile of sequences that bring two or more new tokens each; arguments as `decode_tile`."""
    if dtype == torch.float32:
        return Tile(LEAST_ROWS, 32 if d <= 128 else 16, 8, 2)
    keys = 64 if (d <= 64 and not invariant) or (wgmma and d <= 128) else 32
    if invariant:  # the accumulator stands twice in the registers: this split's, and all splits' so far
        return Tile(64 if d <= 128 or wgmma else 32, keys, 8, 3 if wgmma else 5)
    return Tile(128 if d <= 64 or (wgmma and d <= 128) else 64, keys, 8, 3 if wgmma else 5)


def split_of(position: int) -> int:
    """Index of the split that holds the key at `position`."""
    level = (position // (FIRST_SPLIT * SPLITS_PER_LEVEL) + 1).bit_length() - 1
    start = FIRST_SPLIT * SPLITS_PER_LEVEL * ((1 << level) - 1)
    return level * SPLITS_PER_LEVEL + (position - start) // (FIRST_SPLIT << level)


def most_splits(max_len: int, sliding_window: int | None) -> int:
    """Splits that the keys of one token can lie in, when no sequence has more than `max_len` keys."""
    splits = split_of(max_len - 1) + 1
    if sliding_window is not None:
        splits = min(splits, (sliding_window - 1) // FIRST_SPLIT + 2)
    return splits
