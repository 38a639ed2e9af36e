"""Before serving: compile what will run, so that no request waits for it; and measure tiles for a GPU's table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from peqa_kernels.quant_matmul import PreparedWeight
from peqa_kernels.quant_matmul.gpu import TritonGpu, launch
from peqa_kernels.quant_matmul.gpu_check import is_exact
from peqa_kernels.quant_matmul.tile_rule import MOST_SPLIT_ROW_TILES, cost, splits_of
from peqa_kernels.quant_matmul.tuning import BUCKETS, Scales, Tile, bucket, line_of
from peqa_kernels.quant_matmul.weight import LinearBank

_TRIED = 8  # tiles that are compiled and timed for the choice of width and splits
_CACHE_TIMES = 3  # a measurement walks through that many times the bytes that the second-level cache holds


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


def example(
    weight: TritonGpu, rows: int, dtype: torch.dtype, scales: Scales, tasks: int = 1
) -> tuple[Tensor, LinearBank | None, Tensor | None, Tensor | None]:
    """Random activations and fp16 task scales for one launch: x, bank, row, group_row, sorted by task."""
    layout, device = weight.layout, weight.words.device
    x = torch.randn((rows, layout.in_features), device=device).to(dtype)
    if scales == "base":
        return x, None, None, None
    n, segments = weight.out_features, layout.segments

    def around_one(*shape: int) -> Tensor:
        return (1 + 0.1 * torch.rand(shape, device=device)).half()  # as `bank_dtype` has it on a GPU

    bank = LinearBank(
        segments,
        around_one(tasks, n),
        around_one(tasks, len(segments), layout.in_features) if scales == "channel+input" else None,
        around_one(tasks, layout.groups, n) if scales == "group" else None,
    )
    row = (torch.arange(rows, device=device) * tasks // rows).int()
    return x, bank, row, row if scales == "group" else None


def tune(
    prepared: PreparedWeight,
    rows: int,
    dtype: torch.dtype = torch.bfloat16,
    scales: Scales = "channel",
    tasks: int = 1,
) -> dict[str, Any]:
    """Measure the tiles that may suit a batch of `rows`, and give the fastest exact one as a line of a TileTable.

    For a CUDA device; ValueError elsewhere. To keep it: `TileTable.with_line`, `save`; the `cli` module does both.
    """
    weight = prepared.impl
    if not isinstance(weight, TritonGpu) or not weight.words.is_cuda:
        raise ValueError("tiles are measured on a CUDA device: prepare the weight there")
    size = bucket(rows)
    arguments = example(weight, size, dtype, scales, tasks)
    timed: dict[Tile, float] = {}

    def measure(tiles: Iterable[Tile]) -> list[Tile]:
        """Time those that were not timed; all so far, the fastest first."""
        for tile in tiles:
            if tile not in timed:
                timed[tile] = _microseconds(weight, tile, arguments)
        return sorted(timed, key=lambda tile: timed[tile])

    fastest = measure(candidates(weight, weight.tile(size, dtype, scales), size))
    for tile in measure(neighbours(fastest[0])):
        if tile.dense or is_exact(weight, tile, size, dtype, scales):
            return line_of(weight.layout, size, dtype, scales, tile, timed[tile])
    raise RuntimeError(f"no tile computes {weight.layout} exactly on this device")


def candidates(weight: TritonGpu, first: Tile, rows: int) -> list[Tile]:
    """The rule's tile, and those of other widths and splits that the rule thinks to be nearly as good."""
    layout, gpu = weight.layout, weight.device.gpu
    if rows > 64:  # few choices: floats made once, or codes unpacked in every tile, by more or fewer warps
        fused = first._replace(dense=False)
        others = [fused, *(fused._replace(rows=size, warps=warps) for size in (64, 128) for warps in (4, 8))]
        return [first, *others] if first.taskwise else [first, first._replace(dense=True), *others]
    found = [
        first._replace(rows=size, outputs=outputs, warps=8 if outputs == 256 else 4, splits=splits)
        for size in {first.rows, max(8, first.rows // 2)}
        for outputs in layout.widths
        for splits in splits_of(layout.tiles)
        if splits == 1 or -(-rows // size) <= MOST_SPLIT_ROW_TILES
    ]
    return [first, *sorted(found, key=lambda tile: cost(tile, layout, rows, gpu))[:_TRIED]]


def neighbours(tile: Tile) -> list[Tile]:
    """The same tile with more or fewer loads under way, other warps, and an earlier or later begin."""
    if tile.dense:
        return []
    stages = [tile._replace(stages=tile.stages + more) for more in (-1, 1, 2) if tile.stages + more > 1]
    begins = [tile._replace(ahead=ahead) for ahead in (0, 2, 8) if tile.ahead]
    return [*stages, *begins, *([tile._replace(warps=12 - tile.warps)] if tile.outputs == 128 else [])]


def _microseconds(weight: TritonGpu, tile: Tile, arguments: tuple[Any, ...]) -> float:
    """Median time of one launch in a CUDA graph that walks through copies of the weight; infinite where none fits."""
    x, bank, row, group_row = arguments
    try:
        launch(weight, tile, x, None, bank, row, group_row)  # compiles
    except Exception as error:
        # Triton's own exceptions differ from version to version; all mean that this tile does not fit here.
        if "OutOfResources" not in type(error).__name__ and "PTXAS" not in type(error).__name__:
            raise
        return float("inf")
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    number = min(64, 1 + _CACHE_TIMES * cache // (4 * weight.words.numel()))
    copies = [weight.clone() for _ in range(number)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for other in copies:
            launch(other, tile, x, None, bank, row, group_row)
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / number)
    return statistics.median(times[2:])
