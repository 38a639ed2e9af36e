"""Before serving: compile what will run, so that no request waits for it; and measure tiles for a GPU's table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peqa_kernels.bench.timing import GraphReplay, Timer, Way
from peqa_kernels.quant_matmul import PreparedWeight
from peqa_kernels.quant_matmul.gpu import TritonGpu, launch
from peqa_kernels.quant_matmul.gpu_check import is_exact
from peqa_kernels.quant_matmul.gpu_compile import Compilers, example, job_of
from peqa_kernels.quant_matmul.tile_rule import cost, may_split, splits_of, tile_for
from peqa_kernels.quant_matmul.tuning import BUCKETS, Measured, Scales, Tile, bucket, line_of

_TRIED = 8  # tiles that are compiled and timed for the choice of width and splits
_CACHE_TIMES = 3  # a measurement walks through that many times the bytes that the second-level cache holds
_ROUNDS = 12
_PASS_SECONDS = 2e-3  # good tiles differ by a few percent, and launching a pass costs 10 us


def warm_up(
    weights: Iterable[tuple[PreparedWeight, Tensor | None]],
    rows: Iterable[int] = BUCKETS,
    dtype: torch.dtype = torch.bfloat16,
    scales: Iterable[Scales] = ("base", "channel"),
) -> int:
    """Compile and try the kernels that batches of these sizes will run; weights of other backends are passed over.

    `weights` are all linears with their biases; of those that share a shape one is enough to compile for all. `scales`
    are the kinds of task scales to expect. Gives the number of launches. Waits for the device, and is to be called
    before anything is captured into a CUDA graph. RuntimeError where no tile computes exactly on this device.
    """
    done: set[object] = set()
    sizes, kinds = sorted({bucket(size) for size in rows}), list(scales)
    for prepared, bias in weights:
        weight = prepared.impl
        if not isinstance(weight, TritonGpu):
            continue
        for size in sizes:
            for kind in kinds:
                tile = weight.tile(size, dtype, kind)
                key = (
                    weight.layout,
                    weight.zeros_mode,
                    weight.scales.dtype,
                    tile,
                    size > 64,
                    kind,
                    bias is None,
                )
                if key not in done:
                    done.add(key)
                    x, bank, row, group_row = example(weight, size, dtype, kind)
                    launch(weight, tile, x, bias, bank, row, group_row)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return len(done)


class Wanted(NamedTuple):
    """Batches to find the fastest tile for."""

    rows: int
    dtype: torch.dtype = torch.bfloat16
    scales: Scales = "channel"


def tune(
    prepared: PreparedWeight,
    wanted: Sequence[Wanted],
    compilers: Compilers,
    measured: Measured,
    timer: Timer | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure the tiles that may suit each batch, and give the fastest exact one as a line of a TileTable.

    For a CUDA device; ValueError elsewhere. First `compilers` compile all candidates, then each batch's are timed, then
    the same with the neighbours of the fastest. What `measured` knows is not timed again. To keep the lines:
    `TileTable.with_line`, `save`; the `cli` module does both.
    """
    weight = prepared.impl
    if not isinstance(weight, TritonGpu) or not weight.words.is_cuda:
        raise ValueError("tiles are measured on a CUDA device: prepare the weight there")
    timer = timer or GraphReplay(rounds=_ROUNDS, pass_seconds=_PASS_SECONDS)
    return lines(Search(weight, compilers, measured, timer), wanted)


def lines(search: Search, wanted: Sequence[Wanted]) -> Iterator[dict[str, Any]]:
    """The line of each batch, as soon as it is known. RuntimeError where no tile computes exactly."""
    weight = search.weight
    wanted = list(dict.fromkeys(want._replace(rows=bucket(want.rows)) for want in wanted))
    gpu, layout = weight.device.gpu, weight.layout
    first = {want: candidates(weight, tile_for(layout, *want, gpu), want.rows) for want in wanted}
    search.measure(first)
    search.measure(
        {
            want: [t for tile in search.fastest(want, first[want])[:1] for t in neighbours(tile)]
            for want in wanted
        }
    )
    for want in wanted:
        for tile in search.fastest(want):
            if search.is_exact(tile, want):
                yield line_of(layout, *want, tile, search.microseconds(want)[tile])
                break
        else:
            raise RuntimeError(f"no tile computes {layout} exactly on this device")


class Search:
    """Times of tiles on one weight."""

    def __init__(self, weight: TritonGpu, compilers: Compilers, measured: Measured, timer: Timer) -> None:
        """Time nothing yet."""
        self.weight = weight
        self._compilers = compilers
        self._measured = measured
        self._timer = timer

    def measure(self, tiles: Mapping[Wanted, Sequence[Tile]]) -> None:
        """Compile all that were not timed before, then time them."""
        layout = self.weight.layout
        left = {
            want: [tile for tile in dict.fromkeys(some) if tile not in self._measured.of(layout, *want)]
            for want, some in tiles.items()
        }
        self._compilers.compile(
            job_of(self.weight, *want, tile) for want, some in left.items() for tile in some
        )
        copies = self._copies() if any(left.values()) else []
        for want, some in left.items():
            for tile, us in self._times(want, some, copies).items():
                self._measured.add(layout, *want, tile, us)

    def fastest(self, want: Wanted, among: Sequence[Tile] | None = None) -> list[Tile]:
        """Tiles that run, or those of `among`, the fastest first."""
        times = self.microseconds(want)
        return sorted(
            (tile for tile in times if among is None or tile in among), key=lambda tile: times[tile]
        )

    def microseconds(self, want: Wanted) -> dict[Tile, float]:
        """Times of the tiles that run."""
        known = self._measured.of(self.weight.layout, *want)
        return {tile: us for tile, us in known.items() if us is not None}

    def is_exact(self, tile: Tile, want: Wanted) -> bool:
        """Whether it computes exactly on this device."""
        return tile.dense or is_exact(self.weight, tile, *want)

    def _copies(self) -> list[TritonGpu]:
        """The weight again and again, until no cache holds one until its next turn."""
        words = self.weight.words
        cache = torch.cuda.get_device_properties(words.device).L2_cache_size if words.is_cuda else 0
        return [self.weight.clone() for _ in range(min(64, 1 + _CACHE_TIMES * cache // (4 * words.numel())))]

    def _times(
        self, want: Wanted, tiles: Sequence[Tile], copies: Sequence[TritonGpu]
    ) -> dict[Tile, float | None]:
        """Microseconds of one launch of each, in turn; None for a tile that the device has no room for."""
        x, bank, row, group_row = example(self.weight, *want)
        times: dict[Tile, float | None] = {}
        ways = []
        for tile in tiles:
            try:
                launch(self.weight, tile, x, None, bank, row, group_row)
            except Exception as error:
                # Triton's own exceptions differ from version to version; all mean that this tile does not fit here.
                if "OutOfResources" not in type(error).__name__ and "PTXAS" not in type(error).__name__:
                    raise
                times[tile] = None
                continue
            calls = [partial(launch, copy, tile, x, None, bank, row, group_row) for copy in copies]
            ways.append(Way(str(tile), calls))
            times[tile] = 0.0
        taken = self._timer.compare(f"{want.rows} rows", *ways) if ways else {}
        return {tile: None if us is None else taken[str(tile)].median * 1e6 for tile, us in times.items()}


def candidates(weight: TritonGpu, first: Tile, rows: int) -> list[Tile]:
    """The rule's tile, and those of other widths and splits that the rule thinks to be nearly as good."""
    layout, gpu = weight.layout, weight.device.gpu
    if rows > 64:  # few choices: floats made once, or codes unpacked in every tile, by more or fewer warps
        fused = first._replace(dense=False)
        others = [fused, *(fused._replace(rows=size, warps=warps) for size in (64, 128) for warps in (4, 8))]
        return [first, *others] if first.taskwise else [first, first._replace(dense=True), *others]
    found = [
        tile._replace(splits=splits)
        for size in {first.rows, max(8, first.rows // 2)}
        for outputs in layout.widths
        for tile in [first._replace(rows=size, outputs=outputs, warps=8 if outputs == 256 else 4)]
        for splits in splits_of(layout.tiles)
        if may_split(tile, splits, rows)
    ]
    return [first, *sorted(found, key=lambda tile: cost(tile, layout, rows, gpu))[:_TRIED]]


def neighbours(tile: Tile) -> list[Tile]:
    """The same tile with more or fewer loads under way, other warps, and an earlier or later begin."""
    if tile.dense:
        return []
    stages = [tile._replace(stages=tile.stages + more) for more in (-2, -1, 1, 2) if tile.stages + more > 1]
    begins = [tile._replace(ahead=ahead) for ahead in (0, 2, 8) if tile.ahead]
    return [*stages, *begins, *([tile._replace(warps=12 - tile.warps)] if tile.outputs == 128 else [])]
