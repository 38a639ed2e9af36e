"""Compiles kernels before they are wanted, many at a time: processes that launch each once fill Triton's disk cache."""

from __future__ import annotations

import functools
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from peqa_kernels.packing import packed_width
from peqa_kernels.quant_matmul import gpu_kernel
from peqa_kernels.quant_matmul.gpu import TritonGpu, launch
from peqa_kernels.quant_matmul.gpu_layout import Layout
from peqa_kernels.quant_matmul.tuning import Scales, Tile
from peqa_kernels.quant_matmul.weight import LinearBank, QuantizedWeight


class Job(NamedTuple):
    """A launch on made-up numbers, for a process that has no weight."""

    layout: Layout
    zeros_mode: int
    scales_dtype: torch.dtype
    rows: int
    dtype: torch.dtype
    scales: Scales
    tile: Tile | None  # None: the one that would serve, with its trial
    invariant: bool = False


def job_of(weight: TritonGpu, rows: int, dtype: torch.dtype, scales: Scales, tile: Tile | None) -> Job:
    """The launch of `tile` on a weight like this one."""
    return Job(weight.layout, weight.zeros_mode, weight.scales.dtype, rows, dtype, scales, tile)


def compiled(job: Job) -> str:
    """Launch it once on this process's device; the reason where that does not work, else nothing."""
    try:
        weight = _stand_in(job.layout, job.zeros_mode, job.scales_dtype)
        weight.set_row_invariant(job.invariant)
        tile = job.tile or weight.tile(job.rows, job.dtype, job.scales)
        x, bank, row, group_row = example(weight, job.rows, job.dtype, job.scales)
        launch(weight, tile, x, None, bank, row, group_row)
        if x.is_cuda:
            torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  the edge of a process: whoever wants the tile will meet the fault itself
        return f"{job.tile}: {type(error).__name__}: {error}"
    return ""


class Compilers:
    """Processes that compile jobs, as many as there are cores. They rest while the device is measured.

    Where a process dies, one warning says so, and launches compile what they need themselves.
    """

    def __init__(self, processes: int | None = None, work: Callable[[Job], str] = compiled) -> None:
        """Start none yet."""
        self._processes = processes or len(os.sched_getaffinity(0))
        self._work = work
        self._pool: ProcessPoolExecutor | None = None
        self._broken = False
        self._done: set[Job] = set()

    def __enter__(self) -> Compilers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=error is None, cancel_futures=True)

    def compile(self, jobs: Iterable[Job]) -> list[str]:
        """Wait until each has been compiled that was not before; give the reasons of those that cannot be."""
        wanted = [job for job in dict.fromkeys(jobs) if job not in self._done]
        if self._broken or not wanted:
            return []
        if self._pool is None:  # fork would take the parent's CUDA context along
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._processes, mp_context=spawn, initializer=_begin)
        try:
            reasons = list(self._pool.map(self._work, wanted))
        except BrokenProcessPool:
            self._broken = True
            warnings.warn(
                "a process that compiled kernels has died: the rest is compiled one by one, which takes longer",
                RuntimeWarning,
                stacklevel=2,
            )
            return []
        self._done.update(wanted)
        return [reason for reason in reasons if reason]


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


def _begin() -> None:
    torch.set_num_threads(1)


@functools.lru_cache(maxsize=2)
def _stand_in(layout: Layout, zeros_mode: int, scales_dtype: torch.dtype) -> TritonGpu:
    """A weight of this layout, with zero points and scales that are held as told."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n, k = sum(layout.segments), layout.in_features
    middle = 1 << (layout.bits - 1)
    zero = {gpu_kernel.MIDDLE.value: 0.0, gpu_kernel.INTEGER.value: -1.0, gpu_kernel.FRACTIONAL.value: 0.5}
    scale = 1 / 64 if scales_dtype == torch.float16 else 1 / 3  # which fp16 does not hold
    shape = (n, layout.groups)
    weight = TritonGpu(
        QuantizedWeight(
            torch.zeros((n, packed_width(k, layout.bits)), dtype=torch.uint8, device=device),
            torch.full(shape, scale, device=device),
            torch.full(shape, middle + zero[zeros_mode], device=device),
            layout.bits,
            k,
        ),
        layout.segments,
    )
    assert (weight.layout, weight.zeros_mode, weight.scales.dtype) == (layout, zeros_mode, scales_dtype)
    return weight
