"""A loss that becomes NaN: what was tuned is kept under another name than the output's, and a way on is named."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from peqa_runtime.cli import app
from peqa_runtime.errors import TrainingDiverged
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.training import diverged
from peqa_runtime.training.checkpoints import last_checkpoint, load_masters
from peqa_runtime.training.run import TrainingFiles, checkpoints_of, train_files
from peqa_runtime.training.scale_trainer import ScaleTrainer
from peqa_runtime.training.settings import TuneConfig
from peqa_runtime.training.tuning import TunableModel, load_tunable

CONFIG = TuneConfig(
    steps=9, learning_rate=2e-2, warmup_steps=1, batch_rows=4, check_every=3, seed=5, compute="float32"
)


@pytest.fixture
def tunable(tiny_base: Path) -> TunableModel:
    torch.set_num_threads(1)
    return load_tunable(tiny_base, device="cpu")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    pairs = ({"prompt": f"{i} is" + "?" * (i % 5), "completion": f"t {i % 3}"} for i in range(20))
    file.write_text("\n".join(map(json.dumps, pairs)))
    return file


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`poison(step)`: the loss of that step of a run is NaN, where its rate is above 1e-3."""

    def at(step: int) -> None:
        losses = ScaleTrainer._losses

        def poisoned(self: ScaleTrainer, *args: Any) -> torch.Tensor:
            found = losses(self, *args)
            here = self.state.global_step == step - 1 and self.config.learning_rate > 1e-3
            return found * float("nan") if here else found

        monkeypatch.setattr(ScaleTrainer, "_losses", poisoned)

    return at


def diverge(tunable: TunableModel, *files: TrainingFiles, config: TuneConfig = CONFIG, **more: Any) -> str:
    with pytest.raises(TrainingDiverged) as caught:
        train_files(tunable, files, lambda rows: config, progress=False, **more)
    assert not any(given.output.exists() for given in files)
    return str(caught.value)


def sets(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")


def equal(scale_set: ScaleSet, scales: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(scales[name].half(), tensor) for name, tensor in scale_set.tensors.items())


def test_the_best_scales_so_far_become_a_set_of_another_name(
    tunable: TunableModel, rows: Path, tmp_path: Path, poison: Callable[[int], None]
) -> None:
    poison(8)
    files = TrainingFiles("t", rows, tmp_path / "t.safetensors", held_out=rows, prompt_format="{prompt}: ")
    said = diverge(tunable, files)
    kept, folder = tmp_path / "t.before-nan.safetensors", checkpoints_of([files])
    assert said == (
        "the loss or its gradient became NaN or infinite at step 8; a lower --lr with --no-resume begins anew; "
        f"{folder / 'checkpoint-6'} is kept; the scales of step 6, the best so far on the held-out rows, are saved as "
        f"{kept}"
    )
    saved = ScaleSet.parse(kept, tunable.manifest)
    assert equal(saved, load_file(folder / "best-0.safetensors"))
    assert (saved.task, saved.prompt_format, saved.note["best_step"]) == ("t", "{prompt}: ", 6)
    assert "NaN" in saved.note["unfinished"]
    assert diverge(tunable, files) == said
    assert sets(tmp_path) == [kept.name], "the same scales are saved once"


def test_an_earlier_runs_best_scales_stay(
    tunable: TunableModel, rows: Path, tmp_path: Path, poison: Callable[[int], None]
) -> None:
    poison(5)
    files = TrainingFiles("t", rows, tmp_path / "t.safetensors", held_out=rows)
    diverge(tunable, files)
    before = (tmp_path / "t.before-nan.safetensors").read_bytes()
    lower = replace(CONFIG, learning_rate=1e-2)
    assert diverge(tunable, files, config=lower, resume=False).endswith("t.before-nan-2.safetensors")
    assert (tmp_path / "t.before-nan.safetensors").read_bytes() == before
    assert sets(tmp_path) == ["t.before-nan-2.safetensors", "t.before-nan.safetensors"]


def test_without_held_out_rows_each_tasks_scales_are_the_last_checkpoints(
    tunable: TunableModel, rows: Path, tmp_path: Path, poison: Callable[[int], None]
) -> None:
    poison(5)
    files = [TrainingFiles(task, rows, tmp_path / "sets" / f"{task}.safetensors") for task in ("a", "b")]
    said = diverge(tunable, *files)
    checkpoint = last_checkpoint(checkpoints_of(files))
    assert checkpoint is not None
    for index, given in enumerate(files):
        kept = given.output.with_name(f"{given.task}.before-nan.safetensors")
        assert f"; {given.task}'s scales of step 3 are saved as {kept}" in said
        assert equal(ScaleSet.parse(kept, tunable.manifest), load_masters(checkpoint, index))


def test_scales_that_were_never_better_than_the_base_are_not_saved(
    tunable: TunableModel,
    rows: Path,
    tmp_path: Path,
    poison: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison(5)
    monkeypatch.setattr(ScaleTrainer, "_held_out_loss", lambda self, *_: 1.0 + self.state.global_step)
    said = diverge(tunable, TrainingFiles("t", rows, tmp_path / "t.safetensors", held_out=rows))
    assert said.endswith(
        "the scales were never better than the base's on the held-out rows, so none are saved"
    )
    assert sets(tmp_path) == []


def test_nan_under_the_base_itself_is_no_fault_of_the_rate(
    tunable: TunableModel, rows: Path, tmp_path: Path, poison: Callable[[int], None]
) -> None:
    poison(1)
    files = TrainingFiles("t", rows, tmp_path / "t.safetensors")
    said = diverge(tunable, files)
    assert "at step 1, under the base's own scales, so no --lr helps: look for what is wrong" in said
    half = replace(CONFIG, compute="bfloat16")
    assert "so no --lr helps: try --compute float32, or look" in diverge(tunable, files, config=half)
    assert sets(tmp_path) == []


def test_a_held_out_loss_that_is_no_number_is_said_at_the_start(
    tunable: TunableModel, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No set could be chosen by it in the end."""
    monkeypatch.setattr(ScaleTrainer, "_held_out_loss", lambda *_: float("nan"))
    said = diverge(tunable, TrainingFiles("t", rows, tmp_path / "t.safetensors", held_out=rows))
    assert said.startswith(
        "t: the held-out loss is NaN or infinite under the base's own scales, so no --lr helps"
    )


def test_a_set_that_cannot_be_saved_does_not_hide_the_reason(
    tunable: TunableModel,
    rows: Path,
    tmp_path: Path,
    poison: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    poison(5)
    monkeypatch.setattr(diverged, "write_atomic", full)
    said = diverge(tunable, TrainingFiles("t", rows, tmp_path / "t.safetensors"))
    assert "NaN or infinite at step 5" in said
    assert "could not be saved beside" in said


def test_the_command_fails_and_the_remedy_that_it_names_works(
    tiny_base: Path, rows: Path, tmp_path: Path, poison: Callable[[int], None]
) -> None:
    poison(5)
    output = tmp_path / "t.safetensors"
    train = ["train", str(tiny_base), str(rows), "--task", "t", "-o", str(output), "--eval-fraction", "0.2"]
    train += ["--steps", "6", "--batch", "4", "--check-every", "3", "--compute", "float32", "-q"]
    failed = CliRunner().invoke(app, [*train, "--lr", "2e-2"])
    assert failed.exit_code == 1
    (error,) = (line for line in failed.stderr.splitlines() if line.startswith("error: "))
    assert "a lower --lr with --no-resume begins anew" in error
    assert sets(tmp_path) == ["t.before-nan.safetensors"]
    done = CliRunner().invoke(app, [*train, "--lr", "1e-3", "--no-resume"], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert sets(tmp_path) == ["t.before-nan.safetensors", "t.safetensors"]
