"""What one GPU can do: its tiles, measured and by rule, and which of them were seen to compute exactly."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch

from peqa_kernels.quant_matmul.gpu_layout import Layout
from peqa_kernels.quant_matmul.tile_rule import MOST_SPLIT_ROW_TILES, Gpu, safe, tile_for
from peqa_kernels.quant_matmul.tuning import Scales, Tile, TileTable, bucket


class GpuDevice:
    """One device. `assembly`: it takes the inline assembly of NVIDIA GPUs."""

    def __init__(self, gpu: Gpu, table: TileTable, *, assembly: bool) -> None:
        """Begin with no tile proven."""
        self.gpu = gpu
        self.table = table
        self.assembly = assembly
        self._proven: dict[object, Tile] = {}

    def choose(
        self,
        layout: Layout,
        rows: int,
        dtype: torch.dtype,
        scales: Scales,
        *,
        invariant: bool = False,
        fractional: bool = False,
    ) -> Tile:
        """Give the measured tile where it fits, or else the rule's; a row-invariant one always comes from the rule."""
        if not invariant:
            found = self.table.find(layout, rows, dtype, scales)
            if found is not None and _fits(found, layout, rows):
                return found
        return tile_for(layout, rows, dtype, scales, self.gpu, invariant=invariant, fractional=fractional)

    def proven(self, key: object, tile: Tile, is_exact: Callable[[Tile], bool]) -> Tile:
        """Give `tile`, or a safe one (with a warning) where `is_exact` finds that it computes wrongly here.

        Each `key` is tried once in the life of the process. Assemblers before CUDA 13.3 may overwrite a register
        operand of wgmma that is still being read, which shows in the result alone.
        """
        if key not in self._proven:
            chosen = tile
            if not is_exact(tile):
                chosen = safe(tile)
                warnings.warn(
                    f"the Triton kernel computes wrong results on {self.gpu.name} with {tile}: this shape runs on "
                    f"{chosen}, which is slower. A newer Triton (3.8 or later) brings an assembler without the fault.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                if not is_exact(chosen):
                    raise RuntimeError(
                        f"the Triton kernel computes wrong results on {self.gpu.name}, with {chosen} too; "
                        "use another version of Triton, or device cpu"
                    )
            self._proven[key] = chosen
        return self._proven[key]


def _fits(tile: Tile, layout: Layout, rows: int) -> bool:
    """Whether a tile measured on a weight of these sizes can run on this one, whose siblings may end elsewhere."""
    if tile.dense:
        return True
    split = (tile.splits - 1) * -(-layout.tiles // tile.splits) < layout.tiles
    counted = tile.splits == 1 or tile.in_turn or -(-bucket(rows) // tile.rows) <= MOST_SPLIT_ROW_TILES
    return tile.outputs in layout.widths and split and counted


def key_of(layout: Layout, rows: int, dtype: torch.dtype, scales: Scales) -> object:
    """What tells launches apart that are compiled differently; outputs are no part of it."""
    cut = (layout.bits, layout.groups, layout.group_size, layout.step, layout.panel)
    return cut, bucket(rows), dtype, scales


@functools.cache
def gpu_device(device: torch.device) -> GpuDevice:
    """Give the one GpuDevice of a torch device; Triton's interpreter on the CPU counts as a small GPU."""
    if device.type != "cuda":
        return GpuDevice(
            Gpu("interpreter", 4, register_products=True, early_launch=False), TileTable([]), assembly=False
        )
    found = torch.cuda.get_device_properties(device)
    nvidia = torch.version.hip is None
    gpu = Gpu(
        found.name,
        found.multi_processor_count,
        register_products=nvidia and found.major == 9,
        early_launch=nvidia and found.major >= 9,
        shared=found.shared_memory_per_multiprocessor if nvidia else 64 << 10,
    )
    return GpuDevice(gpu, TileTable.load(found.name), assembly=nvidia and found.major >= 8)
