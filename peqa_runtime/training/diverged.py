"""What a run leaves whose loss became NaN: its best scales so far, as sets beside those that it was to write."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peqa_runtime.scales.atomic_file import write_atomic
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.training.checkpoints import BestScales, last_checkpoint, load_masters
from peqa_runtime.training.data import file_digest
from peqa_runtime.training.settings import TuneConfig
from peqa_runtime.training.trainer import TaskData
from peqa_runtime.training.tuning import TunableModel

if TYPE_CHECKING:
    from peqa_runtime.training.run import TrainingFiles


def save_before_nan(
    tunable: TunableModel,
    files: Sequence[TrainingFiles],
    config: TuneConfig,
    tasks: Sequence[TaskData],
    folder: Path,
) -> list[str]:
    """Write each task's scales that did best on the held-out rows, or those of the last checkpoint in `folder` where
    there are no such rows, to `<output>.before-nan.safetensors`: the output's own name is for a whole run.

    Returns what to tell a person, in half sentences.
    """
    best = BestScales(folder, len(files))
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return []
    told: list[str] = []
    for index, (given, task) in enumerate(zip(files, tasks, strict=True)):
        whose = f"{given.task}'s scales" if len(files) > 1 else "the scales"
        if task.held_out is None:
            step = int(checkpoint.name.rpartition("-")[2])
            saved = _save(tunable, given, config, task, step, load_masters(checkpoint, index))
            told.append(f"{whose} of step {step} {saved}")
        elif best.steps[index]:
            step, loss = best.steps[index], best.losses[index]
            saved = _save(tunable, given, config, task, step, best.load(index), held_out_loss=loss)
            told.append(f"{whose} of step {step}, the best so far on the held-out rows, {saved}")
        else:
            told.append(f"{whose} were never better than the base's on the held-out rows, so none are saved")
    return told


def _save(
    tunable: TunableModel,
    files: TrainingFiles,
    config: TuneConfig,
    task: TaskData,
    step: int,
    scales: dict[str, Tensor],
    *,
    held_out_loss: float | None = None,
) -> str:
    settings = asdict(config)
    del settings["kind"]
    note = {
        "unfinished": "the loss became NaN or infinite after these scales",
        "data": files.data.name,
        "data_digest": file_digest(files.data),
        "rows": len(task.train.examples),
        **settings,
        "held_out_loss": held_out_loss,
        "best_step": step,
    }
    data = ScaleSet.build(
        config.kind,
        scales,
        tunable.manifest,
        task=files.task,
        prompt_format=task.train.prompt_format,
        note=note,
        dtype=torch.float16 if files.dtype == "float16" else torch.float32,
    ).to_bytes()
    try:
        files.output.parent.mkdir(parents=True, exist_ok=True)
        path = _free(files.output, data)
        write_atomic(path, data)
    except OSError as error:
        return f"could not be saved beside {files.output} ({error})"
    return f"are saved as {path}"


def _free(output: Path, data: bytes) -> Path:
    """The first such name that no other set has: what an earlier run left stays."""
    for number in itertools.count(1):
        mark = "before-nan" if number == 1 else f"before-nan-{number}"
        path = output.with_name(f"{output.stem}.{mark}.safetensors")
        if not path.exists() or path.read_bytes() == data:
            return path
    raise AssertionError("numbers do not end")
