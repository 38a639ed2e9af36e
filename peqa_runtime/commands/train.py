"""`peqa train`: tune tasks' scales."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from peqa_runtime.commands.options import AsJson, Base, Device, Quiet, Seed
from peqa_runtime.commands.terminal import quiet_libraries, reported, say, show
from peqa_runtime.core import ScaleKind
from peqa_runtime.errors import InvalidData

if TYPE_CHECKING:
    from peqa_runtime.training.run import FinishedRun


@reported
def train(
    base: Base,
    data: Annotated[
        list[Path],
        typer.Argument(
            help="Rows (.jsonl, .json) or plain text (.txt, .md); one file a task.", envvar="PEQA_DATA"
        ),
    ],
    task: Annotated[
        list[str],
        typer.Option(help="Name of the task, noted in the set; once for each file.", envvar="PEQA_TASK"),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Set to write (.safetensors); a folder for several tasks.",
            envvar="PEQA_OUTPUT",
        ),
    ],
    kind: Annotated[
        ScaleKind | None, typer.Option(help="Which scales are tuned. Default: channel.", envvar="PEQA_KIND")
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval", help="Held-out rows, once for each file; the best set is kept.", envvar="PEQA_EVAL"
        ),
    ] = None,
    eval_fraction: Annotated[
        float, typer.Option(help="Or: split off this share of DATA.", envvar="PEQA_EVAL_FRACTION")
    ] = 0.0,
    auto: Annotated[
        bool,
        typer.Option(
            "--auto",
            help="Try kinds and learning rates on a slice first; keep the best by held-out loss.",
            envvar="PEQA_AUTO",
        ),
    ] = False,
    recipe: Annotated[
        Literal["default", "peqa-paper"],
        typer.Option(help="What fills in for options not given.", envvar="PEQA_RECIPE"),
    ] = "default",
    epochs: Annotated[
        float | None, typer.Option(help="Times over the rows. Default: 1.", envvar="PEQA_EPOCHS")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", "--max-steps", help="Optimizer steps, instead of --epochs.", envvar="PEQA_STEPS"
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option("--lr", help="Per step, on the relative scale. Default: 0.01.", envvar="PEQA_LR"),
    ] = None,
    schedule: Annotated[
        Literal["cosine", "linear", "constant"] | None,
        typer.Option(help="Decay of the learning rate. Default: linear.", envvar="PEQA_SCHEDULE"),
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Steps of warm-up. Default: 20.", envvar="PEQA_WARMUP")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Rows of a step, of each task. Default: 16.", envvar="PEQA_BATCH")
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(help="Parts that a step is computed in, to save memory.", envvar="PEQA_ACCUMULATE"),
    ] = None,
    pack: Annotated[
        bool, typer.Option("--pack", help="Several rows in one, kept apart; no padding.", envvar="PEQA_PACK")
    ] = False,
    checkpoint_activations: Annotated[
        bool,
        typer.Option(
            "--checkpoint-activations",
            help="Keep few activations and compute the rest again.",
            envvar="PEQA_CHECKPOINT_ACTIVATIONS",
        ),
    ] = False,
    beta2: Annotated[
        float | None,
        typer.Option(help="Of AdamW's mean of squared gradients. Default: by kind.", envvar="PEQA_BETA2"),
    ] = None,
    clip: Annotated[float, typer.Option(help="Largest norm of a task's gradient.", envvar="PEQA_CLIP")] = 1.0,
    patience: Annotated[
        int,
        typer.Option(
            help="Stop after so many held-out losses without a better one (0: never).", envvar="PEQA_PATIENCE"
        ),
    ] = 0,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="A model folder to learn from too, or `base` for BASE itself.", envvar="PEQA_TEACHER"
        ),
    ] = None,
    distill: Annotated[
        float | None,
        typer.Option(help="The teacher's share of the loss. Default: 0.5.", envvar="PEQA_DISTILL"),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of the teacher's probabilities. Default: 1.", envvar="PEQA_TEMPERATURE"),
    ] = None,
    prompt_format: Annotated[
        str,
        typer.Option(
            help="Text around each prompt, with {prompt} in it; or alpaca, or chat: the model's template.",
            envvar="PEQA_PROMPT_FORMAT",
        ),
    ] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Longest row; window of plain text. Default: 1024.", envvar="PEQA_MAX_TOKENS"),
    ] = None,
    too_long: Annotated[
        Literal["drop", "fail"], typer.Option(help="Rows longer than that.", envvar="PEQA_TOO_LONG")
    ] = "drop",
    check_every: Annotated[
        int, typer.Option(help="Steps between checkpoints and held-out losses.", envvar="PEQA_CHECK_EVERY")
    ] = 100,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume", help="Default: go on with an unfinished run.", envvar="PEQA_RESUME"
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard events.", envvar="PEQA_TENSORBOARD")
    ] = None,
    compute: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="Dtype of the matrix products.", envvar="PEQA_COMPUTE"),
    ] = "auto",
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="Dtype of the set.", envvar="PEQA_DTYPE")
    ] = "float16",
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tune one task, or several that share each forward. Ctrl-C keeps a checkpoint; the same command goes on.

    Rows are {"prompt", "completion"}, {"instruction", "input", "output"} or {"messages"}. The model learns prompt,
    completion and end-of-sequence exactly as written. `accelerate launch -m peqa_runtime train …` uses more processes.

    Example: peqa train bases/smollm2 train.jsonl --task sql -o sql.safetensors --eval-fraction 0.02
    """
    from accelerate import PartialState

    from peqa_runtime.peak_memory import peak_memory
    from peqa_runtime.training.auto import best_of, sweep
    from peqa_runtime.training.data import TEXT_SUFFIXES
    from peqa_runtime.training.run import TrainingFiles, refuse_existing, train_files
    from peqa_runtime.training.settings import RECIPES, Wanted
    from peqa_runtime.training.tensorboard import summary_writer
    from peqa_runtime.training.trainer import TrainingInterrupted
    from peqa_runtime.training.tuning import load_tunable, refuse_groups

    if temperature is not None and teacher is None:
        raise InvalidData(
            "--temperature is of a teacher's probabilities; give --teacher too, or leave it out"
        )
    wanted = Wanted(
        recipe,
        kind,
        learning_rate,
        steps,
        epochs,
        schedule,
        warmup,
        batch,
        accumulate,
        beta2,
        {
            "clip": clip,
            "seed": seed,
            "compute": compute,
            "check_every": check_every,
            "patience": patience,
            "pack": pack,
            "checkpoint_activations": checkpoint_activations,
            "distill": (0.5 if teacher else 0.0) if distill is None else distill,
            "temperature": 1.0 if temperature is None else temperature,
        },
    )
    text = all(path.suffix.lower() in TEXT_SUFFIXES for path in data)
    files = [
        TrainingFiles(name, path, where, own, eval_fraction, prompt_format, max_tokens, too_long, dtype)
        for name, path, where, own in _pairs(task, data, output, held_out or [])
    ]
    wanted.config(0, text=text)  # settings are checked before time is spent
    if tensorboard is not None:
        summary_writer()  # and so is its package
    refuse_existing(files, resume=resume)
    quiet_libraries()
    tunable = load_tunable(base, device=device)
    if RECIPES[recipe].per_channel_base:
        refuse_groups(tunable)
    trials: list[dict[str, Any]] = []
    try:
        if auto:
            tried = sweep(
                tunable,
                files,
                wanted,
                text=text,
                teacher=teacher,
                resume=resume,
                progress=not quiet,
                say=say,
            )
            wanted = replace(wanted, kind=best_of(tried).kind, learning_rate=best_of(tried).learning_rate)
            trials = [asdict(trial) for trial in tried]
        runs = train_files(
            tunable,
            files,
            lambda rows: wanted.config(rows, text=text),
            teacher=teacher,
            tensorboard=tensorboard,
            resume=resume,
            progress=not quiet,
            say=say,
        )
    except TrainingInterrupted as stopped:
        say(f"{stopped}; the same command goes on from there")
        raise typer.Exit(130) from None
    if PartialState().is_main_process:
        _report(runs, trials, peak_memory(tunable.model.device), as_json=as_json)


def _pairs(
    tasks: list[str], data: list[Path], output: Path, held_out: list[Path]
) -> list[tuple[str, Path, Path, Path | None]]:
    """(task, data, output, held-out) of each file."""
    if len(tasks) != len(data):
        raise InvalidData(f"{len(data)} files of rows and {len(tasks)} --task names: give one for each")
    if held_out and len(held_out) != len(data):
        raise InvalidData(f"{len(data)} files of rows and {len(held_out)} --eval files: give one for each")
    outputs = [output] if len(data) == 1 else [output / f"{name}.safetensors" for name in tasks]
    if len(data) > 1 and output.suffix == ".safetensors":
        raise InvalidData(f"several tasks are written to a folder; {output} names one set")
    own: list[Path | None] = [*held_out] or [None] * len(data)
    return list(zip(tasks, data, outputs, own, strict=True))


def _report(runs: list[FinishedRun], trials: list[dict[str, Any]], peak: int, *, as_json: bool) -> None:
    """Print what became of each task: an object (a list for several tasks), or lines. `peak`: bytes of memory."""
    reports = [
        {
            "output": str(run.output),
            "task": run.scale_set.task,
            "kind": run.scale_set.kind,
            "revision": run.scale_set.revision,
            "base_digest": run.scale_set.base_digest,
            "bytes": run.output.stat().st_size,
            **run.scale_set.note,
            "peak_memory_bytes": peak,
            **({"trials": trials} if trials else {}),
        }
        for run in runs
    ]
    keys = ("output", "kind", "revision", "bytes", "train_loss", "base_held_out_loss", "held_out_loss")
    show(reports, as_json=as_json, keys=(*keys, "best_step", "tokens", "seconds", "peak_memory_bytes"))
