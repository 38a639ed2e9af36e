"""The trials of `peqa train --auto`: what they run, what is kept of them, and what they choose."""

from __future__ import annotations

import json
import os
import signal
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from peqa_runtime.cli import app
from peqa_runtime.errors import InvalidData
from peqa_runtime.training import auto
from peqa_runtime.training.auto import Trial, best_of, sweep
from peqa_runtime.training.callbacks import KeepPositive
from peqa_runtime.training.run import TrainingFiles, checkpoints_of, open_teacher, trials_of
from peqa_runtime.training.settings import TuneConfig, Wanted
from peqa_runtime.training.trainer import tune
from peqa_runtime.training.tuning import TunableModel, load_tunable

Rows = Callable[[str, int], Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tunable(tiny_base: Path) -> TunableModel:
    return load_tunable(tiny_base, device="cpu")


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    def write(word: str, count: int) -> Path:
        file = tmp_path / f"{word}.jsonl"
        pairs = ({"prompt": f"{i} is" + "?" * (i % 5), "completion": f"{word} {i % 3}"} for i in range(count))
        file.write_text("\n".join(map(json.dumps, pairs)))
        return file

    return write


def test_a_sweep_tries_all_on_a_slice_and_goes_on_where_it_stopped(
    tunable: TunableModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [TrainingFiles("t", rows("t", 40), tmp_path / "t.safetensors")]
    wanted = Wanted(steps=3, batch_rows=4, others={"compute": "float32"})
    monkeypatch.setattr("peqa_runtime.training.auto.RATES", (1e-3, 3e-2))
    calls: list[str] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["folder"].name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return tune(*args, **kwargs)

    monkeypatch.setattr("peqa_runtime.training.auto.tune", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep(tunable, files, wanted, progress=False)
    told: list[str] = []
    trials = sweep(tunable, files, wanted, progress=False, say=told.append)
    assert calls[:3] + calls[4:] == [
        f"{kind}-{rate}" for kind in ("channel", "channel+input", "group") for rate in ("0.001", "0.03")
    ]
    assert len(told) == 7
    best = best_of(trials)
    assert told[1].endswith("*")
    assert f"{best.loss:.4f}" in told[1]
    assert best.loss < best.base_loss
    assert [path.name for path in trials_of(files).iterdir()] == ["trials.json"]
    with pytest.raises(InvalidData, match="every trial diverged"):
        best_of([Trial("channel", 1.0, float("inf"), 1.0, 3, 0.0)])


@pytest.mark.parametrize(
    ("wanted", "beta2"),
    [
        (Wanted(), {"channel": 0.95, "channel+input": 0.999, "group": 0.999}),
        (Wanted(beta2=0.9), {"channel": 0.9, "channel+input": 0.9, "group": 0.9}),
    ],
)
def test_a_trial_has_the_settings_of_the_run_that_it_stands_for(
    tunable: TunableModel,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: Wanted,
    beta2: dict[str, float],
) -> None:
    """But for what makes it short."""
    tried: list[TuneConfig] = []

    def noted(tunable: TunableModel, config: TuneConfig, *args: Any, **kwargs: Any) -> Any:
        tried.append(config)
        return tune(tunable, replace(config, steps=1), *args, **kwargs)

    monkeypatch.setattr(auto, "tune", noted)
    wanted = replace(wanted, learning_rate=2e-2, batch_rows=4, schedule="cosine", others={"clip": 0.5})
    sweep(tunable, [TrainingFiles("t", rows("t", 12), tmp_path / "t.safetensors")], wanted, progress=False)
    short = dict.fromkeys(("steps", "warmup_steps", "check_every", "patience"), 0)
    for config in tried:
        run = replace(wanted, kind=config.kind).config(12)
        assert asdict(config) | short == asdict(run) | short
    assert {config.kind: config.beta2 for config in tried} == beta2


def test_trials_learn_from_the_runs_teacher_and_are_ranked_by_rows(
    tunable: TunableModel, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base as the whole loss teaches nothing, which held-out rows show."""
    files = [TrainingFiles("t", rows("t", 40), tmp_path / "t.safetensors")]
    wanted = Wanted(kind="channel", learning_rate=2e-2, steps=6, batch_rows=4)
    (alone,) = sweep(tunable, files, wanted, progress=False)
    taught = replace(wanted, others={"distill": 1.0, "compute": "float32"})
    opened: list[weakref.ref[Any]] = []

    def noted(*args: Any) -> Any:
        teacher = open_teacher(*args)
        opened.append(weakref.ref(teacher))
        return teacher

    monkeypatch.setattr(auto, "open_teacher", noted)
    (trial,) = sweep(tunable, files, taught, teacher="base", progress=False)
    assert trial.base_loss == pytest.approx(alone.base_loss, rel=1e-3)
    assert alone.loss < 0.95 * alone.base_loss
    assert trial.loss > 0.99 * trial.base_loss
    assert [teacher() for teacher in opened] == [None], "the run loads its own"
    with pytest.raises(InvalidData, match="belong together"):
        sweep(tunable, files, taught, progress=False)


def test_the_command_gives_its_teacher_to_the_trials(tiny_base: Path, rows: Rows, tmp_path: Path) -> None:
    given = ["train", tiny_base, rows("t", 40), "--task", "t", "-o", tmp_path / "t.safetensors", "--auto"]
    given += ["--kind", "channel", "--lr", "2e-2", "--steps", 6, "--batch", 4, "-q", "--json"]
    given += ["--teacher", "base", "--distill", 1, "--compute", "float32"]
    shown = CliRunner().invoke(app, list(map(str, given)), catch_exceptions=False)
    (trial,) = json.loads(shown.stdout)["trials"]
    assert trial["loss"] > 0.99 * trial["base_loss"]


def test_an_interrupted_run_goes_on_with_what_its_trials_chose(
    tiny_base: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "sets" / "t.safetensors"
    given = ["train", tiny_base, rows("t", 40), "--task", "t", "-o", output, "--auto", "--kind", "channel"]
    given += ["--steps", 4, "--batch", 4, "--compute", "float32", "-q", "--json"]
    monkeypatch.setattr(auto, "RATES", (1e-3, 3e-2))
    clamp, steps = KeepPositive.on_optimizer_step, iter(range(1, 100))

    def interrupt(self: KeepPositive, *args: object, **kwargs: object) -> None:
        clamp(self, *args, **kwargs)
        if next(steps) == 4 + 4 + 2:  # in the run that follows the two trials
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(KeepPositive, "on_optimizer_step", interrupt)
    refused = CliRunner().invoke(app, [*map(str, given), "--resume"], catch_exceptions=False)
    assert "nothing to resume" in refused.stderr
    assert not output.parent.exists(), "that is known before the trials"
    stopped = CliRunner().invoke(app, list(map(str, given)), catch_exceptions=False)
    assert stopped.exit_code == 130
    assert "stopped after step 2 of 4; the same command goes on" in stopped.stderr

    def again(*args: object) -> Trial:
        raise AssertionError("a trial is repeated")

    monkeypatch.setattr(auto, "_try", again)
    done = CliRunner().invoke(app, list(map(str, given)), catch_exceptions=False)
    assert "going on from" in done.stderr
    report = json.loads(done.stdout)
    assert [trial["learning_rate"] for trial in report["trials"]] == [1e-3, 3e-2]
    assert report["learning_rate"] == 3e-2
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kinds that were tried, without any training."""
    kinds: list[str] = []

    def fake(tunable: TunableModel, config: TuneConfig, *args: object) -> Trial:
        kinds.append(config.kind)
        trials = args[2]
        assert isinstance(trials, Path)
        trials.mkdir(parents=True)
        return Trial(config.kind, config.learning_rate, 1.0, 2.0, config.steps, 0.0)

    monkeypatch.setattr(auto, "_try", fake)
    return kinds


@pytest.mark.parametrize(
    ("of_files", "of_wanted", "teacher"),
    [
        ({"data": "other"}, {}, None),
        ({"held_out": "other"}, {}, None),
        ({"prompt_format": "Q: {prompt}"}, {}, None),
        ({"max_tokens": 100}, {}, None),
        ({}, {"beta2": 0.9}, None),
        ({}, {"others": {"seed": 3}}, None),
        ({}, {"others": {"distill": 0.5}}, "base"),
    ],
)
def test_trials_of_other_data_or_settings_do_not_count(
    tunable: TunableModel,
    rows: Rows,
    tmp_path: Path,
    counted: list[str],
    of_files: dict[str, Any],
    of_wanted: dict[str, Any],
    teacher: str | None,
) -> None:
    files = TrainingFiles("t", rows("t", 12), tmp_path / "t.safetensors", held_out=rows("held", 4))
    wanted = Wanted(learning_rate=1e-2)
    first, again = (sweep(tunable, [files], wanted, progress=False) for _ in range(2))
    assert counted == ["channel", "channel+input", "group"], "once each"
    changed = {name: rows("other", 12) if value == "other" else value for name, value in of_files.items()}
    sweep(
        tunable,
        [replace(files, **changed)],
        replace(wanted, **of_wanted),
        teacher=teacher,
        progress=False,
    )
    assert len(counted) == 6
    assert first == again == sweep(tunable, [files], wanted, progress=False)
    assert len(counted) == 6, "those of before are still known"


def test_a_run_that_trials_did_not_choose_is_refused_before_them(
    tunable: TunableModel, rows: Rows, tmp_path: Path, counted: list[str]
) -> None:
    files = [TrainingFiles("t", rows("t", 12), tmp_path / "t.safetensors")]
    with pytest.raises(InvalidData, match="nothing to resume"):
        sweep(tunable, files, Wanted(), resume=True, progress=False)
    checkpoint = checkpoints_of(files) / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    with pytest.raises(InvalidData, match=r"a run that trials of these settings .* --no-resume"):
        sweep(tunable, files, Wanted(), progress=False)
    assert counted == []
    for _ in range(2):
        sweep(tunable, files, Wanted(learning_rate=1e-2), resume=False, progress=False)
    assert len(counted) == 6, "who starts anew tries anew"
    assert not checkpoint.exists()
