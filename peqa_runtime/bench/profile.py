"""Where the time of a decode step goes, as rows: the parts inform, all that is not the model has a bar."""

from __future__ import annotations

from peqa_kernels.bench.row import Row
from peqa_runtime.bench.workload import Load
from peqa_runtime.engine.engine import Engine
from peqa_runtime.engine.step_profile import profile_step
from peqa_runtime.sampling_params import SamplingParams

SEQUENCES = 16
OVERHEAD = {"cpu": 0.15, "cuda": 0.10}  # of the step, at most
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, frequency_penalty=0.2)


def step_profile(engine: Engine, load: Load) -> list[Row]:
    """Shares of a decode step of 16 sequences with a task each, greedy; all that is not the model also when sampled."""
    profile, sampled = (
        profile_step(
            engine,
            sequences=SEQUENCES,
            context=load.prompt_tokens,
            steps=load.output_tokens,
            tasks=load.task_names,
            params=params,
        )
        for params in (None, SAMPLED)
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
        Row(
            "engine/step-profile/overhead-sampled",
            sampled.overhead,
            "of step",
            "<=",
            None,
            facts
            | {
                "step_us": sampled.milliseconds * 1e3,
                "temperature": 0.8,
                "top_p": 0.95,
                "frequency_penalty": 0.2,
            },
        ),
    ]
