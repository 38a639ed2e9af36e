"""Where a code lies on a GPU: tiles of BK inputs, in each the words of one output in a run, as wgmma takes them.

    words  int32 [tiles, planes, padded N, BK / codes per word]

In a tile, input k is pair k // (2 W), word (k % (2 W)) // 2 and half k % 2, W words a plane. The code lies at bits
bits * pair + 16 * half of its word; at 3 bits a word of the first, second and third plane holds five pairs each, and
the sixteenth pair's bits are the spare bit 15 of the three halves: 3.0 bits a weight. Words are stored in the order of
the threads of a register operand: word w at (w % 4) * W / 4 + w // 4. So one wide load gives a thread whole operands.

Outputs are filled up to whole panels per segment, so that a tile has one input scale. A group is whole tiles (filled
up where it has to be), or a tile is whole groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peqa_kernels.packing import unpack_codes
from peqa_kernels.quant_matmul.gpu_unpack import CODES_PER_WORD, PLANES
from peqa_kernels.quant_matmul.weight import QuantizedWeight

_STEP = 128  # inputs a tile: whole 16 byte loads at every width, and few enough registers for several programs a core


@dataclass(frozen=True)
class Layout:
    """How one weight is cut up; the kernels are compiled for its numbers."""

    bits: int
    groups: int  # G
    group_size: int  # inputs per group
    step: int  # inputs per tile, a power of two
    tiles: int
    panel: int  # outputs are filled up to whole panels, per segment: 64 or 128
    segments: tuple[int, ...]

    @property
    def in_features(self) -> int:
        """K."""
        return self.groups * self.group_size

    @property
    def groups_per_tile(self) -> int:
        """1 where a group is whole tiles."""
        return max(1, self.groups // self.tiles)

    @property
    def tiles_per_group(self) -> int:
        """1 where a tile is whole groups."""
        return max(1, self.tiles // self.groups)

    @property
    def words(self) -> int:
        """Words of one output in one tile and plane."""
        return self.step // CODES_PER_WORD[self.bits]

    @property
    def padded(self) -> int:
        """Outputs with the filling of each segment."""
        return sum(-(-size // self.panel) * self.panel for size in self.segments)

    @property
    def widths(self) -> tuple[int, ...]:
        """Outputs that one program may take: whole panels, halves of one, or two where no segment ends between them."""
        two = self.panel == 128 and all(size % 256 == 0 for size in self.segments)
        return (64, *((128,) if self.panel == 128 else ()), *((256,) if two else ()))

    @property
    def num_bytes(self) -> int:
        """Size of the words."""
        return 4 * self.tiles * PLANES[self.bits] * self.padded * self.words


def layout_of(weight: QuantizedWeight, segments: tuple[int, ...]) -> Layout:
    """Choose the cut that fills up least: 3 bits take 3.0 bits a weight wherever K is a multiple of the step."""
    step, together = _step(weight.bits, weight.groups, weight.group_size)
    tiles = weight.in_features // step if together else weight.groups * -(-weight.group_size // step)
    wasted = sum(-size % 128 for size in segments)
    panel = 128 if wasted * 16 <= sum(segments) else 64
    return Layout(weight.bits, weight.groups, weight.group_size, step, tiles, panel, segments)


def _step(bits: int, groups: int, size: int) -> tuple[int, bool]:
    """Inputs per tile: the most that fill up at most a sixteenth of a group; True where it is several whole groups."""
    for step in (_STEP, _STEP // 2):
        pair = 2 * step // CODES_PER_WORD[bits]  # inputs that lie side by side in the words
        if (
            groups > 1
            and step > size >= 32
            and (groups * size) % step == 0
            and step % size == size % pair == 0
        ):
            return step, True
        if -size % step <= size // 16:
            return step, False
    return 32, False


def lay_out(weight: QuantizedWeight, layout: Layout, device: torch.device) -> Tensor:
    """Give the words, int32 [tiles, planes, padded N, words], on `device`."""
    codes = unpack_codes(weight.qweight.to(device), weight.bits, weight.in_features)
    source = padded_outputs(layout).to(device)
    per_group = layout.step * layout.tiles // layout.groups
    codes = codes.view(weight.out_features, layout.groups, layout.group_size)
    codes = torch.nn.functional.pad(codes, (0, max(0, per_group - layout.group_size)))
    tiles = codes.reshape(weight.out_features, layout.tiles, layout.step)
    words = torch.empty(
        (layout.tiles, PLANES[layout.bits], layout.padded, layout.words), dtype=torch.int32, device=device
    )
    for tile in range(layout.tiles):  # tile by tile: the int32 intermediates stay small
        words[tile] = _tile_words(tiles[:, tile][source], layout)
    return words


def _tile_words(codes: Tensor, layout: Layout) -> Tensor:
    """uint8 [N, step] -> int32 [planes, N, words]."""
    bits, words = layout.bits, layout.words
    halves = codes.view(len(codes), -1, words, 2).to(torch.int32)  # [N, pair, word, half]
    pairs = halves[..., 0] | (halves[..., 1] << 16)
    planes = torch.zeros((PLANES[bits], len(codes), words), dtype=torch.int32, device=codes.device)
    per_word = 16 // bits
    for pair in range(PLANES[bits] * per_word):
        planes[pair // per_word] |= pairs[:, pair] << (bits * (pair % per_word))
    if bits == 3:
        for plane in range(3):
            planes[plane] |= ((pairs[:, 15] >> plane) & 0x00010001) << 15
    run = min(4, words)
    return planes.view(len(planes), len(codes), words // run, run).transpose(2, 3).reshape(planes.shape)


def padded_outputs(layout: Layout) -> Tensor:
    """Output that each padded one repeats, int64 [padded N]: itself, and its segment's first in the filling."""
    source, first = [], 0
    for size in layout.segments:
        lane = torch.arange(-(-size // layout.panel) * layout.panel)
        source.append(torch.where(lane < size, lane, 0) + first)
        first += size
    return torch.cat(source)


def panels(layout: Layout, outputs: int) -> Tensor:
    """One line per `outputs` padded outputs that hold any: int32 [P, 4] of (padded first, first, how many, segment)."""
    lines, padded, first = [], 0, 0
    for segment, size in enumerate(layout.segments):
        for start in range(0, size, outputs):
            lines.append((padded + start, first + start, min(outputs, size - start), segment))
        padded += -(-size // layout.panel) * layout.panel
        first += size
    return torch.tensor(lines, dtype=torch.int32).view(-1, 4)
