"""A whole tuning run: files in, one scale set file a task out, each with a note on how it came about."""

from __future__ import annotations

import importlib.metadata
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from safetensors import SafetensorError

from peqa_runtime.core import check_task_name
from peqa_runtime.errors import InvalidData, StoreError, TrainingDiverged
from peqa_runtime.scales.scale_set import ScaleSet, check_set_path, refuse_existing_set
from peqa_runtime.training.checkpoints import last_checkpoint, prepare_folder
from peqa_runtime.training.data import EncodedData, TooLong, encode_file, file_digest, split_held_out
from peqa_runtime.training.distill import Teacher, load_teacher, teacher_digest
from peqa_runtime.training.diverged import save_before_nan
from peqa_runtime.training.guards import ZeroCodes, count_clamped, count_zero_codes
from peqa_runtime.training.rows import check_prompt_format
from peqa_runtime.training.settings import TuneConfig
from peqa_runtime.training.tensorboard import summary_writer
from peqa_runtime.training.trainer import TaskData, TuneResult, tune
from peqa_runtime.training.tuning import TunableModel

Say = Callable[[str], None]
OWN_BASE = "base"
"""The teacher that is the tuned base itself."""


@dataclass(frozen=True)
class TrainingFiles:
    """What one task's run reads and writes. `held_out` is a file; `held_out_fraction` splits off rows instead.

    `prompt_format` is filled with each prompt and noted in the set; empty means the prompt alone.
    """

    task: str
    data: Path
    output: Path
    held_out: Path | None = None
    held_out_fraction: float = 0.0
    prompt_format: str = ""
    max_tokens: int | None = None  # None: 1024, or the model's context where that is less
    too_long: TooLong = "drop"
    dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        check_task_name(self.task)
        check_prompt_format(self.prompt_format)
        if self.held_out is not None and self.held_out_fraction:
            raise InvalidData("give a file of held-out rows or a fraction to split off, not both")
        check_set_path(self.output)


@dataclass(frozen=True)
class FinishedRun:
    """The saved set of one task and what the run measured."""

    scale_set: ScaleSet
    output: Path
    result: TuneResult
    rows: int
    dropped_lines: tuple[int, ...]


def checkpoints_of(files: Sequence[TrainingFiles]) -> Path:
    """Folder of an unfinished run, beside the output; that of several tasks is named after all of them."""
    name = files[0].output.name if len(files) == 1 else "+".join(given.task for given in files)
    return files[0].output.with_name(f"{name}.checkpoints")


def trials_of(files: Sequence[TrainingFiles]) -> Path:
    """Folder of what `--auto` tried, beside the output."""
    return checkpoints_of(files).with_suffix(".sweep")


def refuse_existing(files: Sequence[TrainingFiles], *, resume: bool | None = None) -> None:
    """Raise `InvalidData` for an output that is there already, unless an unfinished run may have written it."""
    if resume is not False and last_checkpoint(checkpoints_of(files)) is not None:
        return
    for given in files:
        refuse_existing_set(given.output)


def row_limit(tunable: TunableModel, files: TrainingFiles) -> int:
    """Most tokens of a row, window of plain text."""
    return min(1024, tunable.max_tokens) if files.max_tokens is None else files.max_tokens


def read_training_data(
    tunable: TunableModel, files: TrainingFiles, seed: int
) -> tuple[EncodedData, EncodedData | None]:
    """(rows to train on, held-out rows or None). Raises `InvalidData`."""
    max_tokens = row_limit(tunable, files)
    if not 2 <= max_tokens <= tunable.max_tokens:
        raise InvalidData(f"a row may have 2 to {tunable.max_tokens} tokens here, not {max_tokens}")

    def encoded(path: Path) -> EncodedData:
        return encode_file(
            path,
            tunable,
            prompt_format=files.prompt_format,
            max_tokens=max_tokens,
            too_long=files.too_long,
        )

    data = encoded(files.data)
    if files.held_out is not None:
        return data, encoded(files.held_out)
    if files.held_out_fraction:
        return split_held_out(data, files.held_out_fraction, seed)
    return data, None


def train_files(
    tunable: TunableModel,
    files: Sequence[TrainingFiles],
    config_of: Callable[[int], TuneConfig],
    *,
    teacher: str | None = None,
    tensorboard: Path | None = None,
    resume: bool | None = None,
    progress: bool = True,
    say: Say = lambda line: None,
) -> list[FinishedRun]:
    """Tune a task on each of `files`, all in one run, and save their sets. `config_of(rows)` gives the settings once
    the rows of the largest are counted.

    `teacher`: a model folder to learn from, or `base` for the base itself (`config.distill` is its share of the loss).
    `resume`: None goes on with an unfinished run of the same settings, if there is one; True demands one; False starts
    anew. Checkpoints, and the trials before the run, are removed when the sets are saved; a run whose loss becomes NaN
    saves its best under another name. Raises `InvalidData`, `TrainingInterrupted`, `TrainingDiverged`, `StoreError`,
    `DiskFull`.
    """
    config = config_of(0)  # settings are checked before time is spent
    check_together(files, config, teacher)
    if tensorboard is not None:
        summary_writer()
    process = PartialState(cpu=tunable.model.device.type == "cpu")
    say = say if process.is_main_process else lambda line: None
    tasks = [TaskData(f.task, *read_training_data(tunable, f, config.seed)) for f in files]
    config = config_of(max(len(task.train.examples) for task in tasks))
    for given, task in zip(files, tasks, strict=True):
        _tell(given, task, row_limit(tunable, given), say)
    say(f"{config.steps} steps of {config.batch_rows} rows" + (" of each task" if len(tasks) > 1 else ""))
    zeros = count_zero_codes(tunable)
    _warn_of_zeros(zeros, say)
    folder = checkpoints_of(files)
    fingerprint = fingerprint_of(tunable, files, config, teacher)
    checkpoint = prepare_folder(folder, fingerprint, resume=resume) if process.is_main_process else None
    process.wait_for_everyone()
    if not process.is_main_process:
        checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
    try:
        results = tune(
            tunable,
            config,
            tasks,
            folder=folder,
            resume_from=checkpoint,
            teacher=open_teacher(teacher, tunable),
            tensorboard=tensorboard,
            progress=progress,
        )
    except TrainingDiverged as error:
        if not process.is_main_process:
            raise
        told = [str(error), *save_before_nan(tunable, files, config, tasks, folder)]
        raise TrainingDiverged("; ".join(told)) from error
    finished = [
        _finish(tunable, given, config, task, result, zeros, write=process.is_main_process)
        for given, task, result in zip(files, tasks, results, strict=True)
    ]
    for run in finished:
        _tell_outcome(run, config, say)
    process.wait_for_everyone()
    if process.is_main_process:
        for done in (folder, trials_of(files)):
            shutil.rmtree(done, ignore_errors=True)
    return finished


def check_together(files: Sequence[TrainingFiles], config: TuneConfig, teacher: str | None) -> None:
    """Refuse tasks and settings that do not go together, with `InvalidData`."""
    if len({given.task for given in files}) < len(files) or len({given.output for given in files}) < len(
        files
    ):
        raise InvalidData("each task of a run needs a name and an output of its own")
    if len({bool(given.held_out or given.held_out_fraction) for given in files}) > 1:
        raise InvalidData("either all tasks of a run have held-out rows, or none has")
    if bool(teacher) != bool(config.distill):
        raise InvalidData(
            "a teacher and its share of the loss (--distill) belong together; give both or neither"
        )
    if config.patience and not (files[0].held_out or files[0].held_out_fraction):
        raise InvalidData(
            "stopping early needs held-out rows: give a file of them or a fraction to split off"
        )


def open_teacher(teacher: str | None, tunable: TunableModel) -> Teacher | None:
    """The teacher that `train_files` is given by name. Raises as `load_teacher` does."""
    if not teacher:
        return None
    return load_teacher(None if teacher == OWN_BASE else Path(teacher), tunable)


def _tell(files: TrainingFiles, task: TaskData, limit: int, say: Say) -> None:
    data = task.train
    if data.dropped_lines:
        shown = ", ".join(map(str, data.dropped_lines[:5])) + (" …" if len(data.dropped_lines) > 5 else "")
        say(
            f"{files.data}: {len(data.dropped_lines)} rows of more than {limit} tokens are left out (lines {shown})"
        )
    say(
        f"{files.task}: {len(data.examples)} rows ({data.num_loss_tokens} tokens in the loss), "
        f"{len(task.held_out.examples) if task.held_out else 0} held out"
    )


def _tell_outcome(run: FinishedRun, config: TuneConfig, say: Say) -> None:
    task, result = run.scale_set.task, run.result
    if result.last_step < config.steps:
        say(
            f"{task}: stopped early after step {result.last_step} of {config.steps}; step {result.best_step} is kept"
        )
    if result.held_out_loss is not None and result.best_step == 0:
        say(
            f"{task}: nothing did better than the base on the held-out rows, so the set is the base's own scales"
        )
    if clamped := run.scale_set.note["clamped_scales"]:
        say(f"{task}: {clamped} scales stand at an end of their range; a lower --lr may do better")


def _warn_of_zeros(zeros: ZeroCodes, say: Say) -> None:
    if zeros.share > 0.5:
        say(
            f"{zeros.share:.0%} of the base's weights are zero codes, which no scale can change: expect little"
        )
    if zeros.dead_rows:
        shown = ", ".join(zeros.dead_rows[:3]) + (" …" if len(zeros.dead_rows) > 3 else "")
        say(f"{len(zeros.dead_rows)} rows hold zeros only, so their scales stay as they are ({shown})")


def fingerprint_of(
    tunable: TunableModel, files: Sequence[TrainingFiles], config: TuneConfig, teacher: str | None
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be gone on with."""
    return {
        **asdict(config),
        "teacher": teacher,
        "teacher_digest": teacher_digest(Path(teacher)) if teacher and teacher != OWN_BASE else None,
        "task": [given.task for given in files],
        "data_digest": [file_digest(given.data) for given in files],
        "held_out_digest": [file_digest(given.held_out) if given.held_out else None for given in files],
        "held_out_fraction": [given.held_out_fraction for given in files],
        "prompt_format": [given.prompt_format for given in files],
        "max_tokens": [row_limit(tunable, given) for given in files],
        "base_digest": tunable.manifest.base_digest,
    }


def _finish(
    tunable: TunableModel,
    files: TrainingFiles,
    config: TuneConfig,
    task: TaskData,
    result: TuneResult,
    zeros: ZeroCodes,
    *,
    write: bool,
) -> FinishedRun:
    """Make the set, and write it if this process is the one to do so."""
    scale_set = ScaleSet.build(
        config.kind,
        result.scales,
        tunable.manifest,
        task=files.task,
        prompt_format=task.train.prompt_format,
        note=_note(files, config, task, result, zeros),
        dtype=torch.float16 if files.dtype == "float16" else torch.float32,
    )
    if write:
        try:
            files.output.parent.mkdir(parents=True, exist_ok=True)
            scale_set.save(files.output)
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"{files.output} could not be written ({error}); the tuned scales are kept beside it, "
                "and the same command writes them once there is room"
            ) from error
    return FinishedRun(scale_set, files.output, result, len(task.train.examples), task.train.dropped_lines)


def _note(
    files: TrainingFiles, config: TuneConfig, task: TaskData, result: TuneResult, zeros: ZeroCodes
) -> dict[str, Any]:
    settings = asdict(config)
    del settings["kind"]
    return {
        "data": files.data.name,
        "data_digest": file_digest(files.data),
        "rows": len(task.train.examples),
        "dropped_rows": len(task.train.dropped_lines),
        "held_out_rows": len(task.held_out.examples) if task.held_out else 0,
        **settings,
        "parameters": sum(scale.numel() for scale in result.scales.values()),
        "train_loss": _finite(result.train_loss),
        "held_out_loss": _finite(result.held_out_loss),
        "base_held_out_loss": _finite(result.base_loss),
        "best_step": result.best_step,
        "last_step": result.last_step,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 1),
        "zero_code_share": round(zeros.share, 4),
        "clamped_scales": count_clamped(result.scales),
        "versions": {
            name: importlib.metadata.version(name) for name in ("peqa-serve", "torch", "transformers")
        },
    }


def _finite(value: float | None) -> float | None:
    return round(value, 5) if value is not None and math.isfinite(value) else None
