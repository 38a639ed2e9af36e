"""Which kind of set and which learning rate: each tried on a slice of the data, the lowest held-out loss wins."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from accelerate import PartialState
from tqdm import tqdm

from peqa_runtime.core import ScaleKind
from peqa_runtime.disk_space import disk_full_named
from peqa_runtime.errors import InvalidData, TrainingDiverged
from peqa_runtime.scales.atomic_file import write_atomic
from peqa_runtime.training.checkpoints import last_checkpoint, prepare_folder
from peqa_runtime.training.data import EncodedData, split_held_out
from peqa_runtime.training.distill import Teacher
from peqa_runtime.training.run import (
    Say,
    TrainingFiles,
    check_together,
    checkpoints_of,
    fingerprint_of,
    open_teacher,
    read_training_data,
    trials_of,
)
from peqa_runtime.training.settings import TuneConfig, Wanted
from peqa_runtime.training.trainer import TaskData, tune
from peqa_runtime.training.tuning import TunableModel

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SLICE_STEPS = 60
"""Steps of a trial. The order of learning rates is seen by then; more would cost more than the run itself."""
HELD_OUT_ROWS = 64


@dataclass(frozen=True)
class Trial:
    """One setting, its held-out loss after the slice (the mean over the tasks), and the base's."""

    kind: ScaleKind
    learning_rate: float
    loss: float  # infinite where the run diverged
    base_loss: float
    steps: int
    seconds: float


def best_of(trials: Sequence[Trial]) -> Trial:
    """The lowest loss. None that is a number: `InvalidData`."""
    best = min(trials, key=lambda trial: trial.loss)
    if not math.isfinite(best.loss):
        raise InvalidData("every trial diverged; give a lower --lr")
    return best


def sweep(
    tunable: TunableModel,
    files: Sequence[TrainingFiles],
    wanted: Wanted,
    *,
    text: bool = False,
    teacher: str | None = None,
    resume: bool | None = None,
    progress: bool = True,
    say: Say = lambda line: None,
) -> list[Trial]:
    """Try every kind (or the wanted one) at every rate (or the wanted one) on a seeded slice, and say the table.

    `teacher` is that of the run: trials learn from it too, and are ranked by cross-entropy on held-out rows all the
    same. Finished trials are kept until `train_files` has saved the sets, so that the same command goes on with the
    same choice; those of other settings or data do not count. `resume` is that of the run: False removes the trials and
    the run that are there. Raises as `train_files` does.
    """
    config = wanted.config(0, text=text)
    check_together(files, config, teacher)
    tasks = [_slice(tunable, given, config) for given in files]
    configs = _configs(wanted, max(len(task.train.examples) for task in tasks), text)
    folder = trials_of(files)
    file = folder / "trials.json"
    process = PartialState(cpu=tunable.model.device.type == "cpu")
    if resume is False and process.is_main_process:
        for begun in (folder, checkpoints_of(files)):
            shutil.rmtree(begun, ignore_errors=True)
    done = {} if resume is False else _finished(file)
    shared = fingerprint_of(tunable, files, config, teacher)
    keys = [_key({**shared, **asdict(config)}) for config in configs]
    todo = [(key, config) for key, config in zip(keys, configs, strict=True) if key not in done]
    if todo and resume is not False:
        _check_nothing_begun(checkpoints_of(files), resume)
    loaded = open_teacher(teacher, tunable) if todo else None
    quiet = not (progress and process.is_main_process)
    before = len(keys) - len(todo)
    for key, config in tqdm(todo, desc="trials", initial=before, total=len(keys), disable=quiet):
        own = folder / f"{config.kind}-{config.learning_rate:g}"
        done[key] = _try(tunable, config, tasks, loaded, own, json.loads(key))
        if process.is_main_process:
            _write(file, done)
        process.wait_for_everyone()
        if process.is_main_process:
            shutil.rmtree(own, ignore_errors=True)  # its loss is what is kept of a trial
    del loaded
    gc.collect()  # the trials' trainers hold the teacher in cycles, and the run loads it anew
    tried = [done[key] for key in keys]
    if process.is_main_process:
        _tell(tried, say)
    return tried


def _check_nothing_begun(run: Path, resume: bool | None) -> None:
    """Refuse, before the time of the trials is spent, a run that they did not choose."""
    if last_checkpoint(run) is not None:
        raise InvalidData(
            f"{run} holds a run that trials of these settings and data did not choose; go on as it was begun, "
            "or give --no-resume to start anew"
        )
    if resume:
        raise InvalidData(f"nothing to resume: {run} holds no complete checkpoint")


def _configs(wanted: Wanted, rows: int, text: bool) -> list[TuneConfig]:
    """Settings of the trials: each has those of the run that would follow if it won, but is short."""
    kinds: tuple[ScaleKind, ...] = (wanted.kind,) if wanted.kind else get_args(ScaleKind)
    rates = (wanted.learning_rate,) if wanted.learning_rate else RATES
    runs = [
        replace(wanted, kind=kind, learning_rate=rate).config(rows, text=text)
        for kind in kinds
        for rate in rates
    ]
    return [
        replace(
            run,
            steps=min(run.steps, SLICE_STEPS),
            warmup_steps=min(run.warmup_steps, 10),
            check_every=SLICE_STEPS,
            patience=0,
        )
        for run in runs
    ]


def _slice(tunable: TunableModel, files: TrainingFiles, config: TuneConfig) -> TaskData:
    data, held_out = read_training_data(tunable, files, config.seed)
    if held_out is None:
        data, held_out = split_held_out(data, min(0.5, HELD_OUT_ROWS / len(data.examples)), config.seed)
    count = SLICE_STEPS * config.batch_rows
    if len(data.examples) > count:
        _, data = split_held_out(data, min(0.5, count / len(data.examples)), config.seed)
    return TaskData(files.task, data, _some(held_out, HELD_OUT_ROWS))


def _some(data: EncodedData, count: int) -> EncodedData:
    step = max(1, len(data.examples) // count)
    return EncodedData(data.examples[::step][:count])


def _try(
    tunable: TunableModel,
    config: TuneConfig,
    tasks: Sequence[TaskData],
    teacher: Teacher | None,
    folder: Path,
    fingerprint: dict[str, Any],
) -> Trial:
    if PartialState().is_main_process:
        prepare_folder(folder, fingerprint, resume=False)
    PartialState().wait_for_everyone()
    try:
        results = tune(tunable, config, tasks, folder=folder, teacher=teacher, progress=False)
    except TrainingDiverged:
        return Trial(config.kind, config.learning_rate, math.inf, math.nan, config.steps, 0.0)
    loss = sum(result.held_out_loss or 0.0 for result in results) / len(results)
    base = sum(result.base_loss or 0.0 for result in results) / len(results)
    return Trial(config.kind, config.learning_rate, loss, base, config.steps, round(results[0].seconds, 1))


def _key(settings: dict[str, Any]) -> str:
    """What a trial is known by."""
    return json.dumps(settings, sort_keys=True)


def _finished(file: Path) -> dict[str, Trial]:
    """Trials by their key; none where the file cannot be read."""
    try:
        return {_key(entry["of"]): Trial(**entry["trial"]) for entry in json.loads(file.read_text())}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(file: Path, trials: dict[str, Trial]) -> None:
    kept = [{"of": json.loads(key), "trial": asdict(trial)} for key, trial in trials.items()]
    with disk_full_named(file):
        write_atomic(file, json.dumps(kept).encode())


def _tell(trials: Sequence[Trial], say: Say) -> None:
    best = best_of(trials)
    say(f"{'kind':<14} {'lr':>8} {'held-out loss':>14} {'base':>8} {'s/step':>7}")
    for trial in sorted(trials, key=lambda trial: trial.loss):
        pace = trial.seconds / trial.steps
        chosen = " *" if trial is best else ""
        loss = f"{trial.loss:>14.4f} {trial.base_loss:>8.4f}"
        say(f"{trial.kind:<14} {trial.learning_rate:>8g} {loss} {pace:>7.2f}{chosen}")
