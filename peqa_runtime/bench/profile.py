"""Where the time of a decode step goes: matmuls, attention, the rest of the model, and everything around it.

Scheduling, building tensors, the model's forward and sampling are timed inside running steps. The matmuls and the
attention of one forward are then timed apart, on the engine's own weights and cache, at the same sizes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from peqa_kernels.bench.row import Row
from peqa_kernels.bench.timing import Timer, Way
from peqa_kernels.paged_attention import paged_attention
from peqa_kernels.quant_matmul import quant_matmul
from peqa_runtime.bench.workload import Load, Prompts, mixed
from peqa_runtime.core import Request
from peqa_runtime.engine.engine import Engine

SEQUENCES = 16
BOOKKEEPING = {"cpu": 0.15, "cuda": 0.10}  # of the step, at most


def step_profile(engine: Engine, load: Load, prompts: Prompts, timer: Timer) -> list[Row]:
    """Shares of a decode step of 16 sequences with a task each."""
    steps = _decode_steps(engine, load, prompts)
    medians = {name: statistics.median(step[name] for step in steps) for name in steps[0]}
    step, forward = medians["step"], medians["forward"]
    device = engine.model.device
    context = load.prompt_tokens + load.output_tokens // 2
    with torch.inference_mode():
        parts = timer.compare(
            "parts of a step",
            Way("matmul", [partial(_matmuls, engine, _rows(device))]),
            Way("attention", [_attention(engine, context)]),
        )
    matmul, attention = parts["matmul"].median, parts["attention"].median
    shares = {
        "matmul": matmul,
        "attention": attention,
        "rest-of-model": max(0.0, forward - matmul - attention),
        "bookkeeping": step - forward,
    }
    facts = {"device": str(device), "sequences": SEQUENCES, "step_us": step * 1e6, "samples": len(steps)}
    around = {f"{name}_us": medians[name] * 1e6 for name in ("schedule", "run", "update")}
    around["tensors_and_sampling_us"] = around.pop("run_us") - forward * 1e6
    rows = []
    for name, seconds in shares.items():
        bar = BOOKKEEPING[device.type] if name == "bookkeeping" else None
        own = {"time_us": seconds * 1e6, **facts, **(around if name == "bookkeeping" else {})}
        rows.append(Row(f"engine/step-profile/{name}", seconds / step, "of step", "<=", bar, own))
    return rows


def _decode_steps(engine: Engine, load: Load, prompts: Prompts) -> list[dict[str, float]]:
    """Seconds of each part of the steps in which every sequence gets one token."""
    taken: dict[str, float] = {}
    steps = []
    for number, task in enumerate(mixed(load.task_names, SEQUENCES)):
        lease = engine.tasks.acquire(task)
        prompt = prompts.write(load.prompt_tokens)
        engine.add_request(
            Request(f"bench-{number}", prompt, load.params, lease.task, lease.revision, lease.kind), lease
        )
    with (
        _timed(engine.scheduler, "schedule", taken),
        _timed(engine.scheduler, "update", taken),
        _timed(engine.runner, "run", taken),
        _timed(engine.model, "forward", taken),
    ):
        while engine.has_work:
            begin = time.perf_counter()
            outputs = engine.step()
            taken["step"] = time.perf_counter() - begin
            if len(outputs) == SEQUENCES and all(o.finish_reason is None for o in outputs):
                steps.append(dict(taken))
    return steps[1:]  # the first such step may still hold the end of a prompt


@contextmanager
def _timed(owner: Any, name: str, taken: dict[str, float]) -> Iterator[None]:
    """Enter the seconds of each call of a method of one object into `taken`."""
    method: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        result = method(*args, **options)
        taken[name] = time.perf_counter() - begin
        return result

    setattr(owner, name, timed)
    try:
        yield
    finally:
        delattr(owner, name)  # the class's own method shows again


def _rows(device: torch.device) -> torch.Tensor:
    """Bank rows of the sequences, int32 [SEQUENCES]."""
    return torch.arange(1, SEQUENCES + 1, dtype=torch.int32, device=device)


def _matmuls(engine: Engine, row: torch.Tensor) -> None:
    """Every quantized linear of one step, and the head."""
    model = engine.model
    x: dict[int, torch.Tensor] = {}
    for linear in model.linears:
        k = linear.in_features
        if k not in x:
            x[k] = torch.ones(SEQUENCES, k, dtype=model.dtype, device=model.device)
        quant_matmul(x[k], linear.module.prepare(), bank=linear.module.bank, row=row)
    head = model.model.get_output_embeddings()
    k = model.model.config.get_text_config().hidden_size
    head(x[k] if k in x else torch.ones(SEQUENCES, k, dtype=model.dtype, device=model.device))


def _attention(engine: Engine, context: int) -> Callable[[], None]:
    """One layer's decode attention over `context` tokens each, for every layer in turn."""
    model, blocks = engine.model, engine.scheduler.blocks
    heads = model.model.config.get_text_config().num_attention_heads
    width = blocks.blocks_for(context)
    ints = partial(torch.tensor, dtype=torch.int32, device=model.device)
    tables = ints([[(i * width + j) % blocks.num_blocks for j in range(width)] for i in range(SEQUENCES)])
    starts, lengths = ints(range(SEQUENCES + 1)), ints([context] * SEQUENCES)
    queries = {
        spec.d_k: torch.randn(SEQUENCES, heads, spec.d_k, device=model.device).to(model.dtype)
        for spec in model.kv_spec
    }

    def call() -> None:
        for spec, (keys, values) in zip(model.kv_spec, engine.kv_cache.layers, strict=True):
            paged_attention(
                queries[spec.d_k],
                keys,
                values,
                tables,
                starts,
                lengths,
                scaling=spec.d_k**-0.5,
                sliding_window=spec.sliding_window,
            )

    return call
