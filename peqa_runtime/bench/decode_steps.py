"""Seconds of decode steps."""

from __future__ import annotations

import time

from peqa_runtime.bench.workload import Load, Prompts, mixed
from peqa_runtime.core import Request
from peqa_runtime.engine.engine import Engine


def decode_steps(engine: Engine, load: Load, prompts: Prompts, sequences: int) -> list[float]:
    """Seconds of each step in which all of `sequences` sequences, tasks in turn, get one token."""
    steps = []
    for number, task in enumerate(mixed(load.task_names, sequences)):
        lease = engine.tasks.acquire(task)
        prompt = prompts.write(load.prompt_tokens)
        request = Request(f"bench-{number}", prompt, load.params, lease.task, lease.revision, lease.kind)
        engine.add_request(request, lease)
    while engine.has_work:
        begin = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - begin
        if len(outputs) == sequences and all(o.finish_reason is None for o in outputs):
            steps.append(seconds)
    return steps[1:]  # the first such step may still hold the end of a prompt
