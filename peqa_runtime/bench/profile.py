"""Where the time of a decode step goes, as rows: the parts inform, all that is not the model has a bar."""

from __future__ import annotations

from peqa_kernels.bench.row import Row
from peqa_runtime.bench.workload import Load
from peqa_runtime.engine.engine import Engine
from peqa_runtime.engine.step_profile import profile_step

SEQUENCES = 16
OVERHEAD = {"cpu": 0.15, "cuda": 0.10}  # of the step, at most


def step_profile(engine: Engine, load: Load) -> list[Row]:
    """Shares of a decode step of 16 sequences with a task each."""
    profile = profile_step(
        engine,
        sequences=SEQUENCES,
        context=load.prompt_tokens,
        steps=load.output_tokens,
        tasks=load.task_names,
    )
    device = engine.model.device.type
    facts = {"device": device, "sequences": SEQUENCES, "step_us": profile.milliseconds * 1e3}
    facts |= {"samples": profile.steps, "tasks": load.tasks}
    rows = [
        Row(
            f"engine/step-profile/{name}",
            value / profile.milliseconds,
            "of step",
            "<=",
            None,
            {"time_us": value * 1e3, **facts},
        )
        for name, value in profile.parts.items()
    ]
    spent = {"time_us": profile.overhead * profile.milliseconds * 1e3}
    return [
        *rows,
        Row(
            "engine/step-profile/overhead", profile.overhead, "of step", "<=", OVERHEAD[device], spent | facts
        ),
    ]
