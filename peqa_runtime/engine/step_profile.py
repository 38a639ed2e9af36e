"""Where the time of a decode step goes: `python -m peqa_runtime.engine.step_profile BASE --sequences 16`."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from peqa_kernels.native.decoder import KINDS
from peqa_runtime.core import BASE_TASK, Request
from peqa_runtime.engine.engine import Engine
from peqa_runtime.sampling_params import SamplingParams

OVERHEAD = ("call", "scheduling", "inputs", "sampling", "rest")
"""Parts of a step that are neither matmul nor attention nor what lies between them in the model."""


@dataclass(frozen=True)
class StepProfile:
    """A decode step of `sequences` sequences, median of `steps`, in milliseconds.

    `parts`: the model's time as matmul, attention, elementwise, head and call (describing tensors and getting
    there), or as one part "model" where it runs through transformers' modules; then scheduling (plan and book), inputs
    (building tensors), sampling, and the rest of `Engine.step`. They add up to `milliseconds` as medians do: nearly.
    """

    sequences: int
    context: int
    steps: int
    milliseconds: float
    parts: dict[str, float]

    @property
    def overhead(self) -> float:
        """Share of bookkeeping, tensor building and sampling in the step, 0 to 1."""
        return sum(self.parts.get(name, 0.0) for name in OVERHEAD) / self.milliseconds

    def __str__(self) -> str:
        """A table."""
        lines = [
            f"{self.sequences} sequences after {self.context} tokens each: {self.milliseconds:.2f} ms a step "
            f"(median of {self.steps})"
        ]
        for name, value in self.parts.items():
            lines.append(f"  {name:<12}{value:8.3f} ms {value / self.milliseconds:7.1%}")
        lines.append(f"  bookkeeping, tensor building and sampling together: {self.overhead:.1%}")
        return "\n".join(lines)


def profile_step(
    engine: Engine,
    *,
    sequences: int = 16,
    context: int = 128,
    steps: int = 64,
    tasks: Sequence[str] = (BASE_TASK,),
    params: SamplingParams | None = None,
) -> StepProfile:
    """Profile decode steps of an idle engine that nobody else steps.

    `context`: tokens of each prompt. `tasks` are dealt to the sequences in turn. `params`: how tokens are chosen
    (default: greedily); its max_tokens is not used. Raises `UnknownTask`, and `PromptTooLong` where context and steps
    do not fit the model.
    """
    assert not engine.has_work, "profile_step() steps the engine itself"
    # Every other step is timed as a whole, and those between them in parts.
    params = replace(
        params or SamplingParams(temperature=0.0),
        max_tokens=2 * steps + sequences + 8,
        min_tokens=0,
        ignore_eos=True,
        stop_token_ids=(),
    )
    whole: list[float] = []
    parts: dict[str, list[float]] = {}
    try:
        for i in range(sequences):
            prompt = tuple((7 * i + j) % engine.model.vocab_size for j in range(context))
            lease = engine.tasks.acquire(tasks[i % len(tasks)])
            request = Request(f"profile-{i}", prompt, params, lease.task, lease.revision, lease.kind)
            engine.add_request(request, lease)
        while any(s.num_uncomputed_tokens != 1 for s in engine.scheduler.running) or engine.scheduler.waiting:
            engine.step()
        tick = engine.model.lean.native.seconds_per_tick() if engine.model.lean is not None else 0.0
        for _ in range(steps):
            started = time.perf_counter()
            engine.step()
            whole.append(time.perf_counter() - started)
            for name, seconds in _timed_step(engine, tick).items():
                parts.setdefault(name, []).append(seconds)
    finally:
        engine.abort_all()
    medians = {name: median(seconds) * 1e3 for name, seconds in parts.items()}
    step = median(whole) * 1e3
    return StepProfile(
        sequences, context, steps, step, medians | {"rest": max(0.0, step - sum(medians.values()))}
    )


def _timed_step(engine: Engine, tick: float) -> dict[str, float]:
    """One step as `Engine.step` makes it, its parts timed, in seconds; `tick`: of the lean decoder's counter."""
    runner, scheduler, clock = engine.runner, engine.scheduler, time.perf_counter
    native = engine.model.lean.native if engine.model.lean is not None and tick else None
    times = [clock()]
    batch = scheduler.schedule()
    times.append(clock())
    runner.write_rows(batch)
    with torch.inference_mode():
        compute = runner.prepare(batch)
        before = native.ticks() if native else ()
        times.append(clock())
        logits = compute()
        if logits.is_cuda:  # launched is not computed
            torch.cuda.synchronize(logits.device)
        times.append(clock())
        results = runner.sampler.sample(batch, logits)
    after = native.ticks() if native else ()
    times.append(clock())
    scheduler.update(batch, results)
    times.append(clock())
    plan, inputs_time, model, sampling, book = (b - a for a, b in itertools.pairwise(times))
    inner = {kind: (b - a) * tick for kind, a, b in zip(KINDS, before, after, strict=False)}
    inner["call" if native else "model"] = model - sum(inner.values())
    return inner | {"scheduling": plan + book, "inputs": inputs_time, "sampling": sampling}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each number of sequences that was asked for."""
    parser = argparse.ArgumentParser(prog="python -m peqa_runtime.engine.step_profile", description=__doc__)
    parser.add_argument("base", type=Path, help="base folder")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    asked = parser.parse_args(arguments)
    engine = Engine(asked.base, device=asked.device)
    for sequences in asked.sequences:
        profile = profile_step(engine, sequences=sequences, context=asked.context, steps=asked.steps)
        sys.stdout.write(f"{profile}\n")
    engine.close()


if __name__ == "__main__":
    main()
