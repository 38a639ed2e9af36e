"""quant_matmul in Triton: one kernel for 2, 3, 4 and 8 bits and every kind of scale set, tasks mixed in one launch.

This file holds one weight on its device and launches the kernel (gpu_kernel) on it; the order of the codes is
gpu_layout's, the choice of tiles is tuning's. A launch never waits for the device and allocates from torch's caching
allocator only, so CUDA graphs can hold it. One weight must not be multiplied on two streams at once: the programs of
one launch meet at counters that belong to the weight.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import triton
from torch import Tensor

from peqa_kernels.device import launching_on
from peqa_kernels.quant_matmul import gpu_kernel
from peqa_kernels.quant_matmul.gpu_check import is_exact
from peqa_kernels.quant_matmul.gpu_dense import dense_matmul
from peqa_kernels.quant_matmul.gpu_device import gpu_device, key_of
from peqa_kernels.quant_matmul.gpu_inputs import group_totals, needs_copies, scaled_inputs
from peqa_kernels.quant_matmul.gpu_layout import Layout, lay_out, layout_of, padded_outputs, panels
from peqa_kernels.quant_matmul.tile_rule import MOST_SPLIT_ROW_TILES
from peqa_kernels.quant_matmul.tuning import Scales, Tile, bucket
from peqa_kernels.quant_matmul.weight import LinearBank, QuantizedWeight


class TritonGpu:
    """One weight in the kernel's layout, where its scales lie; its canonical codes may lie elsewhere."""

    def __init__(self, weight: QuantizedWeight, segments: tuple[int, ...]) -> None:
        """Lay `weight` out; `segments` are the output sizes of fused siblings."""
        device = weight.scales.device
        self.layout = layout_of(weight, segments)
        self.out_features = weight.out_features
        self._weight = weight
        self._words: Tensor | None = None
        source = padded_outputs(self.layout).to(device)
        self.scales = _half_if_exact(weight.scales.float()[source].t().contiguous())  # [G, padded N]
        self.zeros, self.zeros_mode = _zeros(weight.zeros.float()[source].t().contiguous(), weight.bits)
        self.panels = {width: panels(self.layout, width).to(device) for width in self.layout.widths}
        most = MOST_SPLIT_ROW_TILES * len(self.panels[64])
        self.counters = torch.zeros(most, dtype=torch.int32, device=device)
        self.device = gpu_device(device)
        self._invariant = False
        self._tiles: dict[tuple[int, torch.dtype, Scales], Tile] = {}

    @property
    def words(self) -> Tensor:
        """The codes as gpu_layout orders them; laid out when first wanted, since training never wants them."""
        if self._words is None:
            self._words = lay_out(self._weight, self.layout, self.scales.device)
        return self._words

    def release_codes(self, weight: QuantizedWeight) -> None:
        """Lay the codes out now; from here on only `weight`, the same one with its codes elsewhere, is kept."""
        assert self.words.device == self.scales.device
        self._weight = weight

    def clone(self) -> TritonGpu:
        """The same weight with codes at another address: measurements walk through many, past the caches."""
        other = copy.copy(self)
        other._words = self.words.clone()
        return other

    def set_row_invariant(self, on: bool) -> None:
        """Make a row's bits independent of the number of rows that run with it, and of their tasks."""
        self._invariant = on
        self._tiles.clear()

    def matmul(
        self,
        x: Tensor,  # [M, K]
        bias: Tensor | None,
        bank: LinearBank | None,
        row: Tensor | None,
        group_row: Tensor | None,
    ) -> Tensor:
        """Compute quant_matmul, [M, N] in x.dtype; fp32 activations enter with 22 bits or more.

        Activations of one group row should be neighbours: a large batch reads the codes once for each run of them.
        """
        tile = self.tile(x.shape[0], x.dtype, scales_of(bank, row, group_row))
        return launch(self, tile, x, bias, bank, row, group_row)

    def tile(self, rows: int, dtype: torch.dtype, scales: Scales) -> Tile:
        """Give the tile for a batch, tried for exactness the first time that it is needed."""
        key = (bucket(rows), dtype, scales)
        tile = self._tiles.get(key)
        if tile is None:
            fractional = self.zeros_mode == gpu_kernel.FRACTIONAL.value
            tile = self.device.choose(
                self.layout, rows, dtype, scales, invariant=self._invariant, fractional=fractional
            )
            if self.scales.is_cuda and not tile.dense:
                if torch.cuda.is_current_stream_capturing():
                    return tile  # no time for a trial; `warm_up` is to be called before a capture
                name = (key_of(self.layout, rows, dtype, scales), self.zeros_mode, tile)
                tile = self.device.proven(name, tile, lambda tile: is_exact(self, tile, rows, dtype, scales))
            self._tiles[key] = tile
        return tile


def launch(
    weight: TritonGpu,
    tile: Tile,
    x: Tensor,  # [M, K]
    bias: Tensor | None = None,
    bank: LinearBank | None = None,
    row: Tensor | None = None,
    group_row: Tensor | None = None,
) -> Tensor:
    """Compute quant_matmul on a tile of the caller's choice; [M, N] in x.dtype."""
    rows = x.shape[0]
    if x.stride(1) != 1:
        x = x.contiguous()
    if rows == 0:
        return x.new_empty((rows, weight.out_features))
    out = None if bank is None or row is None else bank.out_scale
    into = None if bank is None or row is None else bank.in_scale
    group = None if bank is None or group_row is None else bank.group_scale
    if tile.dense:
        assert group is None, tile
        return dense_matmul(weight, x, bias, out, into, row)
    fractional = weight.zeros_mode == gpu_kernel.FRACTIONAL.value
    copied = needs_copies(rows, totals=fractional)
    inputs = "none" if into is None else "copies" if copied else "by row"
    table = weight.panels[tile.outputs]
    number = len(table) * triton.cdiv(rows, tile.rows)
    assert (tile.splits - 1) * -(-weight.layout.tiles // tile.splits) < weight.layout.tiles, (
        tile,
        weight.layout,
    )
    y = x.new_empty((rows, weight.out_features))
    parts, programs = y, 1
    if tile.splits > 1 and not tile.in_turn:
        assert number <= len(weight.counters), (tile, rows)
        programs = tile.splits
        parts = torch.empty(
            number * tile.splits * tile.outputs * tile.rows, dtype=torch.float32, device=x.device
        )
    stride = x.stride(0)
    if inputs == "copies":
        assert into is not None
        assert row is not None
        x, stride = scaled_inputs(x, into, row), x.shape[1]
    totals = group_totals(x.view(-1, x.shape[-1]), weight.layout.groups) if fractional else y
    compiled_for = constants(
        weight.layout,
        tile,
        weight.zeros_mode,
        weight.device.assembly and x.dtype != torch.float32,
        inputs=inputs,
        has_out=out is not None,
        has_group=group is not None,
        has_bias=bias is not None,
    )
    with launching_on(x.device):
        gpu_kernel.quant_matmul_kernel[(number, programs)](
            x,
            totals,
            weight.words,
            weight.scales,
            weight.zeros,
            table,
            # A pointer that is not read still needs a tensor.
            *(y if tensor is None else tensor for tensor in (bias, out, into, group, row, group_row)),
            y,
            parts,
            weight.counters,
            rows,
            weight.out_features,
            weight.layout.padded,
            stride,
            min((len(scales) for scales in (out, into) if scales is not None), default=0),
            0 if group is None else len(group),
            **compiled_for,
            **options(tile),
        )
    return y


def constants(
    layout: Layout,
    tile: Tile,
    zeros_mode: int,
    assembly: bool,
    *,
    inputs: str = "none",
    has_out: bool = False,
    has_group: bool = False,
    has_bias: bool = False,
) -> dict[str, Any]:
    """What the kernel is compiled for. `inputs`, the task scales of inputs: "none", "by row" or "copies"."""
    how = {"none": gpu_kernel.UNSCALED, "by row": gpu_kernel.BY_ROW, "copies": gpu_kernel.COPIES}[inputs]
    grouped = gpu_kernel.NO_GROUPS
    if has_group:
        grouped = gpu_kernel.TASKWISE if tile.taskwise else gpu_kernel.MIXED
    whole = all(size % tile.outputs == 0 for size in layout.segments)
    return {
        "BITS": layout.bits,
        "GROUPS": layout.groups,
        "SIZE": layout.group_size,
        "BK": layout.step,
        "TILES": layout.tiles,
        "SEGMENTS": len(layout.segments) if inputs == "by row" else 1,
        "PLAIN": whole
        and layout.padded == sum(layout.segments)
        and (len(layout.segments) == 1 or inputs == "none"),
        "ALIGNED": all(size % 16 == 0 for size in layout.segments),
        "SPLITS": tile.splits,
        "IN_TURN": tile.in_turn,
        "HAS_BIAS": has_bias,
        "HAS_OUT": has_out,
        "INPUTS": int(how.value),
        "GROUPED": int(grouped.value),
        "ZEROS": zeros_mode,
        "ASM": assembly and layout.bits != 8,
        "BM": tile.rows,
        "BN": tile.outputs,
        "STAGES": tile.stages,
        "AHEAD": tile.ahead,
    }


def options(tile: Tile) -> dict[str, Any]:
    """How the kernel is compiled and launched beside its constants."""
    made: dict[str, Any] = {"num_warps": tile.warps, "enable_fp_fusion": True}
    if tile.ahead:
        made["launch_pdl"] = True
    if tile.warps == 8 and (tile.rows <= 16 or (tile.rows == 32 and tile.outputs == 256)):
        made["maxnreg"] = 128  # two such programs a processor; left alone it takes 164, which allows one
    elif tile.outputs == 64 or tile.in_turn or (tile.warps == 8 and tile.splits > 1):
        made["maxnreg"] = 255  # left alone it takes 128 for some of them, or 80, and spills a few
    return made


def scales_of(bank: LinearBank | None, row: Tensor | None, group_row: Tensor | None) -> Scales:
    """Which task scales a launch reads."""
    if bank is None:
        return "base"
    if bank.group_scale is not None and group_row is not None:
        return "group"
    if row is None:
        return "base"
    return "channel" if bank.in_scale is None else "channel+input"


def _half_if_exact(scales: Tensor) -> Tensor:
    """fp16 where that loses nothing: most quantizers wrote fp16."""
    half = scales.half()
    return half if torch.equal(half.float(), scales) else scales


def _zeros(zeros: Tensor, bits: int) -> tuple[Tensor, int]:
    """Zero points [G, N] as the kernel wants them, and how it is to read them."""
    middle = 1 << (bits - 1)
    if bool((zeros == middle).all()):
        return zeros[:, :1].to(torch.uint8), gpu_kernel.MIDDLE.value
    most = 255 if bits == 8 else 127  # what the subtraction of a code takes exactly
    if bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= most)).all()):
        return zeros.to(torch.uint8), gpu_kernel.INTEGER.value
    return zeros - middle, gpu_kernel.FRACTIONAL.value
