"""A run of the offline half: which parts there are, and what each needs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from peqa_kernels.bench.machine import PROBES, linear_rate, measure_machine
from peqa_kernels.bench.report import Progress
from peqa_kernels.bench.row import Row
from peqa_kernels.bench.timing import Clock, GraphReplay, Timer
from peqa_runtime.bench.equality import (
    SMALL_BLOCKS,
    WIDE_BLOCKS,
    WIDE_EVERY,
    Batches,
    answers_alone,
    little_memory,
    load_cases,
    random_batches,
    random_cases,
)
from peqa_runtime.bench.gpu import answers_of_both, random_base_steps
from peqa_runtime.bench.load_profile import load_profile
from peqa_runtime.bench.machine import speed_of_the_day
from peqa_runtime.bench.profile import SEQUENCES, step_profile
from peqa_runtime.bench.random_base import LlamaShape
from peqa_runtime.bench.throughput import STREAMS, many_streams, mixed_against_base
from peqa_runtime.bench.workload import Load, Prompts, engine_with_tasks
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine

PARTS = ("machine", "mixed", "profile", "streams", "equality", "gpu")
LITTLE_MEMORY_REQUESTS = 24
LITTLE_MEMORY_BLOCKS = 96  # eight of the twelve-block requests at once
GPU_TASKS = 64
GPU_BATCHES = 50  # random mixed batches


@dataclass(frozen=True)
class Options:
    """One run."""

    base: Path
    parts: tuple[str, ...]
    device: str
    seconds: float
    batches: int
    seed: int
    load: Load


def measure(options: Options, progress: Progress) -> Iterator[list[Row]]:
    """Rows of each part, as they come."""
    load, seed = options.load, options.seed
    timer = Clock(options.seconds, least_rounds=5, show=progress.detail)
    if "machine" in options.parts:
        progress.case("machine")
        yield [speed_of_the_day(Clock(min(2.0, options.seconds), show=progress.detail))]
    if {"mixed", "profile", "streams"} & set(options.parts):
        config = EngineConfig(max_sequences=STREAMS)
        with engine_with_tasks(options.base, load.task_names, config, options.device) as engine:
            prompts = Prompts(engine.model.vocab_size, seed)
            if "mixed" in options.parts:
                progress.case("mixed tasks against the base")
                yield mixed_against_base(engine, load, prompts, options.seconds, progress.detail)
            if "profile" in options.parts:
                progress.case(f"profile of a step of {SEQUENCES} sequences")
                yield _profiles(engine, load, prompts, timer)
            if "streams" in options.parts:
                progress.case(f"{STREAMS} streams offline")
                yield [many_streams(engine, load, prompts)]
    if "equality" in options.parts:
        progress.case("the same answer, whatever the neighbours")
        yield from _equality(options, progress.detail)
    if "gpu" in options.parts and torch.cuda.is_available():
        progress.case("a GPU")
        machine = measure_machine(torch.device("cuda"), GraphReplay(show=progress.detail))
        progress.detail("decode steps of a random 7B base")
        yield random_base_steps(options.base, LlamaShape(), machine, replace(load, tasks=GPU_TASKS), seed)
        if has_weights(options.base):
            progress.detail("the answers of CPU and GPU")
            yield [answers_of_both(options.base, "cuda", load, seed)]
            there = replace(options, device="cuda", batches=min(options.batches, GPU_BATCHES))
            for rows in rows_on(there, progress.detail):
                yield [replace(row, name=row.name.replace("engine/", "engine/gpu/", 1)) for row in rows]


def rows_on(options: Options, show: Callable[[str], None]) -> Iterator[list[Row]]:
    """Where the time goes, and whether answers stay the same, on the device of the options."""
    config = EngineConfig(max_sequences=STREAMS)
    with engine_with_tasks(options.base, options.load.task_names, config, options.device) as engine:
        show(f"profile on {options.device}")
        prompts = Prompts(engine.model.vocab_size, options.seed)
        yield _profiles(engine, options.load, prompts, Clock(options.seconds, least_rounds=5, show=show))
    del engine
    gc.collect()  # a device may have no room for two
    yield from _equality(options, show)


def _profiles(engine: Engine, load: Load, prompts: Prompts, timer: Timer) -> list[Row]:
    device = engine.model.device
    probe = PROBES[device.type]
    if device.type == "cuda":
        timer = GraphReplay()  # a clock sees launches
    rate = linear_rate(device, timer, probe.shape, probe.rows, probe.weights)
    return step_profile(engine, load) + load_profile(engine, load, prompts, rate)


def has_weights(base: Path) -> bool:
    """False for a tokenizer's folder, which is all that the steps of a random base need of another one."""
    return (base / "config.json").exists()


def _equality(options: Options, show: Callable[[str], None]) -> Iterator[list[Row]]:
    """References from an engine with ample memory and no prefix cache, then the loads in small ones."""
    load, seed = options.load, options.seed
    ample = EngineConfig(prefix_cache=False, row_invariant=True)
    with engine_with_tasks(options.base, load.task_names, ample, options.device) as engine:
        cases = random_cases(load, engine.model.vocab_size, seed)
        show("each request alone")
        alone = answers_alone(engine, cases)
        heavy = load_cases(load, engine.model.vocab_size, seed, LITTLE_MEMORY_REQUESTS)
        want = answers_alone(engine, heavy)
    del engine
    gc.collect()
    found = Batches()
    wide_ones = options.batches // WIDE_EVERY
    for blocks, batches, wide in (
        (SMALL_BLOCKS, options.batches - wide_ones, False),
        (WIDE_BLOCKS, wide_ones, True),
    ):
        config = EngineConfig(num_blocks=blocks, row_invariant=True)
        with engine_with_tasks(options.base, load.task_names, config, options.device) as engine:
            random_batches(engine, cases, alone, batches, seed, show, found, wide=wide)
        del engine
        gc.collect()
    yield found.rows()
    few = EngineConfig(num_blocks=LITTLE_MEMORY_BLOCKS, row_invariant=True)
    with engine_with_tasks(options.base, load.task_names, few, options.device) as engine:
        show("a load that needs more KV memory than there is")
        yield little_memory(engine, want, heavy)
