"""`peqa train`: tune one task's scales."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from peqa_runtime.commands.options import AsJson, Base, Device, Quiet, Seed
from peqa_runtime.commands.terminal import quiet_libraries, reported, say


class Kind(str, Enum):
    """Kinds of scale set."""

    channel = "channel"
    channel_input = "channel+input"
    group = "group"


class Schedule(str, Enum):
    """How the learning rate falls after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class TooLongRows(str, Enum):
    """What happens to rows longer than --max-tokens."""

    drop = "drop"
    fail = "fail"


class Compute(str, Enum):
    """Dtype of the matrix products in training."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class SetDtype(str, Enum):
    """Dtype of a saved set."""

    float16 = "float16"
    float32 = "float32"


@reported
def train(
    base: Base,
    data: Annotated[Path, typer.Argument(help="Rows (.jsonl) or plain text (.txt).", envvar="PEQA_DATA")],
    task: Annotated[str, typer.Option(help="Name of the task, noted in the set.", envvar="PEQA_TASK")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Scale set to write (.safetensors).", envvar="PEQA_OUTPUT")
    ],
    kind: Annotated[Kind, typer.Option(help="Which scales are tuned.", envvar="PEQA_KIND")] = Kind.channel,
    held_out: Annotated[
        Path | None,
        typer.Option("--eval", help="Held-out rows; the best set on them is kept.", envvar="PEQA_EVAL"),
    ] = None,
    eval_fraction: Annotated[
        float, typer.Option(help="Or: split off this share of DATA.", envvar="PEQA_EVAL_FRACTION")
    ] = 0.0,
    epochs: Annotated[float, typer.Option(help="Times over the rows.", envvar="PEQA_EPOCHS")] = 1.0,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", "--max-steps", help="Optimizer steps, instead of --epochs.", envvar="PEQA_STEPS"
        ),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option("--lr", help="Per step, on the relative scale.", envvar="PEQA_LR")
    ] = 1e-2,
    schedule: Annotated[
        Schedule, typer.Option(help="Decay of the learning rate.", envvar="PEQA_SCHEDULE")
    ] = Schedule.cosine,
    warmup: Annotated[int, typer.Option(help="Steps of warm-up.", envvar="PEQA_WARMUP")] = 20,
    batch: Annotated[int, typer.Option(help="Rows of a step.", envvar="PEQA_BATCH")] = 16,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.", envvar="PEQA_CLIP")] = 1.0,
    prompt_format: Annotated[
        str, typer.Option(help="Text around each prompt, with {prompt} in it.", envvar="PEQA_PROMPT_FORMAT")
    ] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Longest row; window of plain text. Default: 1024.", envvar="PEQA_MAX_TOKENS"),
    ] = None,
    too_long: Annotated[
        TooLongRows, typer.Option(help="Rows longer than that.", envvar="PEQA_TOO_LONG")
    ] = TooLongRows.drop,
    check_every: Annotated[
        int, typer.Option(help="Steps between checkpoints and held-out losses.", envvar="PEQA_CHECK_EVERY")
    ] = 100,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume", help="Default: go on with an unfinished run.", envvar="PEQA_RESUME"
        ),
    ] = None,
    compute: Annotated[
        Compute, typer.Option(help="Dtype of the matrix products.", envvar="PEQA_COMPUTE")
    ] = Compute.auto,
    dtype: Annotated[
        SetDtype, typer.Option(help="Dtype of the set.", envvar="PEQA_DTYPE")
    ] = SetDtype.float16,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tune one task's scales. Ctrl-C keeps a checkpoint; the same command goes on.

    Rows are {"prompt": …, "completion": …}. The model learns prompt, completion and end-of-sequence exactly as written.

    Example: peqa train bases/smollm2 train.jsonl --task sql -o sql.safetensors --eval-fraction 0.02
    """
    from peqa_runtime.training.run import TrainingFiles, steps_for, train_file
    from peqa_runtime.training.trainer import TrainingInterrupted, TuneConfig
    from peqa_runtime.training.tuning import load_tunable

    def config_of(rows: int) -> TuneConfig:
        return TuneConfig(
            task=task,
            kind=kind.value,
            steps=steps_for(rows, batch, epochs) if steps is None else steps,
            learning_rate=learning_rate,
            schedule=schedule.value,
            warmup_steps=warmup,
            batch_rows=batch,
            clip=clip,
            seed=seed,
            compute=compute.value,
            check_every=check_every,
        )

    files = TrainingFiles(
        data, output, held_out, eval_fraction, prompt_format, max_tokens, too_long.value, dtype.value
    )
    quiet_libraries()
    try:
        run = train_file(
            load_tunable(base, device=device), files, config_of, resume=resume, progress=not quiet, say=say
        )
    except TrainingInterrupted as stopped:
        say(f"{stopped}; the same command goes on from there")
        raise typer.Exit(130) from None
    report = {
        "output": str(output),
        "task": run.scale_set.task,
        "kind": run.scale_set.kind,
        "revision": run.scale_set.revision,
        "base_digest": run.scale_set.base_digest,
        "bytes": output.stat().st_size,
        **run.scale_set.note,
    }
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        keys = (
            "output",
            "revision",
            "bytes",
            "train_loss",
            "held_out_loss",
            "best_step",
            "tokens",
            "seconds",
        )
        typer.echo("\n".join(f"{key}: {report[key]}" for key in keys))
