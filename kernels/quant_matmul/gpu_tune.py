"""Before serving: compile what will run, so that no request waits for it; and measure tiles for a GPU's table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from peqa_kernels.quant_matmul import PreparedWeight
from peqa_kernels.quant_matmul.gpu import TritonGpu, launch
from peqa_kernels.quant_matmul.gpu_check import is_exact
from peqa_kernels.quant_matmul.tuning import BUCKETS, Scales, Tile, bucket, line_of
from peqa_kernels.quant_matmul.weight import LinearBank

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
    first = weight.tile(size, dtype, scales)
    timed = []
    for tile in dict.fromkeys([first, *candidates(weight, first, size)]):
        try:
            timed.append((_microseconds(weight, tile, arguments), tile))
        except Exception as error:
            # Triton's own exceptions differ from version to version; all mean that this tile does not fit here.
            if "OutOfResources" not in type(error).__name__ and "PTXAS" not in type(error).__name__:
                raise
    for us, tile in sorted(timed):
        if is_exact(weight, tile, size, dtype, scales):
            return line_of(weight.layout, size, dtype, scales, tile, us)
    raise RuntimeError(f"no tile computes {weight.layout} exactly on this device")


def candidates(weight: TritonGpu, first: Tile, rows: int) -> Iterator[Tile]:
    """Tiles near the rule's: half and twice of each of its numbers."""
    layout = weight.layout
    for size in {max(8, first.rows // 2), first.rows, min(128, first.rows * 2)}:
        for outputs in weight.panels:
            for warps in (4, 8) if outputs == 128 else (4,):
                for stages in (2, 3, 4, 5):
                    for wanted in (
                        {1} if first.taskwise else {1, *(first.splits + more for more in (-1, 0, 1, 2)), 8}
                    ):
                        per = -(-layout.tiles // min(max(1, wanted), layout.tiles))
                        splits = -(-layout.tiles // per)
                        if splits == 1 or -(-rows // size) * len(weight.panels[outputs]) <= len(
                            weight.counters
                        ):
                            yield Tile(size, outputs, warps, stages, splits, taskwise=first.taskwise)


def _microseconds(weight: TritonGpu, tile: Tile, arguments: tuple[Any, ...]) -> float:
    """Median time of one launch in a CUDA graph that walks through copies of the weight."""
    x, bank, row, group_row = arguments
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    number = min(64, 1 + _CACHE_TIMES * cache // (4 * weight.words.numel()))
    copies = [weight.clone() for _ in range(number)]
    launch(weight, tile, x, None, bank, row, group_row)  # compiles
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
