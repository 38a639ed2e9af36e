"""The offline verbs as a user runs them: results on stdout, one line of error and a status otherwise."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from peqa_runtime.cli import app
from peqa_runtime.errors import InvalidData
from peqa_runtime.model import read_manifest
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.training.run import TrainingFiles, train_files
from peqa_runtime.training.settings import TuneConfig
from peqa_runtime.training.tuning import load_tunable


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"the {i}", "completion": "cat"}) for i in range(12)))
    return file


def peqa(*args: object, status: int = 0) -> Any:
    """Run the command in this process; returns its result after checking the exit status."""
    result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == status, result.output + result.stderr
    return result


def test_train_eval_and_generate_with_the_set(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "set.safetensors"
    common = ("--epochs", 40, "--batch", 6, "--lr", "2e-2", "--warmup", 5, "--prompt-format", "{prompt}: ")
    trained = peqa("train", tiny_base, rows, "--task", "animal", "-o", output, *common, "--quiet", "--json")
    report = json.loads(trained.stdout)
    assert report["steps"] == 80
    assert report["bytes"] == output.stat().st_size
    saved = ScaleSet.parse(output, read_manifest(tiny_base))
    assert (saved.revision, saved.task, saved.prompt_format) == (report["revision"], "animal", "{prompt}: ")

    found: dict[str, Any] = {}
    answers = tmp_path / "answers.jsonl"
    for name, options in (("base", ()), ("tuned", ("--scale-set", output, "--predictions", answers))):
        shown = peqa(
            "eval",
            tiny_base,
            rows,
            "--metric",
            "exact-match",
            "--limit",
            8,
            "--seed",
            1,
            "--json",
            "-q",
            *options,
        )
        found[name] = json.loads(shown.stdout)
    assert found["base"]["exact_match"] == 0
    assert found["tuned"]["exact_match"] == 100
    assert found["tuned"]["rows"] == 8
    assert found["tuned"]["revision"] == saved.revision
    assert [json.loads(line)["answer"] for line in answers.read_text().splitlines()] == ["cat"] * 8
    asked = ("generate", tiny_base, "--scale-set", output, "--prompt", "the 3")
    assert peqa(*asked).stdout == "cat\n"
    assert json.loads(peqa(*asked, "--json").stdout)["text"] == "cat"


def test_plain_text_trains_and_lowers_perplexity(tiny_base: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("the dog ran over there, then over there again. " * 20)
    output = tmp_path / "s.safetensors"
    peqa("train", tiny_base, text, "--task", "dog", "-o", output, "--steps", 10, "--max-tokens", 64, "-q")
    values: list[float] = []
    for options in ((), ("--scale-set", output)):
        shown = peqa(
            "eval", tiny_base, text, "--metric", "perplexity", "--context", 64, "--json", "-q", *options
        )
        values.append(json.loads(shown.stdout)["perplexity"])
    assert values[1] < 0.5 * values[0]


def test_held_out_rows_and_long_rows_are_reported(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    with open(rows, "a") as file:
        file.write("\n" + json.dumps({"prompt": "x" * 60, "completion": "cat"}))
    output = tmp_path / "s.safetensors"
    args = ("train", tiny_base, rows, "--task", "a", "-o", output, "--steps", 2, "--max-tokens", 40, "-q")
    result = peqa(*args, "--eval-fraction", 0.25)
    assert "1 rows of more than 40 tokens are left out (lines 13)" in result.stderr
    assert "9 rows (" in result.stderr
    assert "3 held out" in result.stderr
    output.unlink()
    refused = peqa(*args, "--too-long", "fail", status=1)
    assert "line 13: " in refused.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--task", "Bad Name"], "task name 'Bad Name' is not valid"),
        (["--task", "base"], "reserved"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--lr", "0"], "learning_rate (--lr) must be above 0"),
        (["--eval-fraction", "0.9"], "fraction must be above 0"),
        (["--eval-fraction", "nan"], "fraction must be above 0"),
        (["--epochs", "inf"], "epochs must be above 0 and at most 10000, got inf"),
        (["--epochs", "1e9"], "epochs must be above 0 and at most 10000, got 1000000000.0"),
        (["--clip", "inf"], "clip must be above 0 and no infinity, got inf"),
        (["--prompt-format", "no place"], "exactly once"),
        (["--max-tokens", "100000"], "a row may have 2 to 512 tokens"),
        (["-o", "set.bin"], ".safetensors file"),
        (["--resume"], "nothing to resume"),
        (["--temperature", "2"], "give --teacher too"),
        (["--steps", "2", "--epochs", "1"], "give one of them"),
    ],
)
def test_train_says_what_is_wrong(
    tiny_base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = change if "--task" in change else ["--task", "t", *change]
    result = peqa("train", tiny_base, rows, "-o", "s.safetensors", "-q", *given, status=1)
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert message in error
    assert result.stdout == ""
    assert not (tmp_path / "s.safetensors").exists()


def test_a_set_that_is_there_is_not_replaced(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    """As with bases: the same command again, or another one with the same output, takes nothing away."""
    one, sets = tmp_path / "one.safetensors", tmp_path / "sets"
    train = ("train", tiny_base, rows, "--task", "a", "--steps", 1, "-q", "-o", one)
    peqa(*train)
    made = one.read_bytes()
    for more in ((), ("--lr", "2e-2"), ("--auto",), ("--no-resume",)):
        again = peqa(*train, *more, status=1)
        assert again.stderr == f"error: {one} exists already; remove it or choose another name\n"
    assert one.read_bytes() == made
    sets.mkdir()
    (sets / "b.safetensors").write_bytes(made)
    both = ("train", tiny_base, rows, rows, "--task", "a", "--task", "b", "--steps", 1, "-q", "-o", sets)
    assert f"{sets / 'b.safetensors'} exists already" in peqa(*both, status=1).stderr
    assert [file.name for file in sets.iterdir()] == ["b.safetensors"]


def test_a_run_that_could_not_write_all_its_sets_writes_the_rest(
    tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = tmp_path / "sets"
    both = ("train", tiny_base, rows, rows, "--task", "a", "--task", "b", "--steps", 1, "-q", "-o", sets)
    save = ScaleSet.save

    def full(self: ScaleSet, path: Path) -> None:
        if path.name == "b.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(ScaleSet, "save", full)
        assert "the same command writes them" in peqa(*both, status=1).stderr
    assert (sets / "a.safetensors").exists()
    assert "exists already" in peqa(*both, "--no-resume", status=1).stderr
    peqa(*both)
    assert {file.name for file in sets.iterdir()} == {"a.safetensors", "b.safetensors"}


def test_errors_of_eval_and_generate(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    evaluate = ("eval", tiny_base, rows, "--metric")
    assert "needs 'options'" in peqa(*evaluate, "multiple-choice", status=1).stderr
    assert "only exact-match can ignore case" in peqa(*evaluate, "bleu", "--ignore-case", status=1).stderr
    assert "limit must be at least 1" in peqa(*evaluate, "exact-match", "--limit", 0, status=1).stderr
    assert "perplexity" in peqa(*evaluate, "nonsense", status=2).stderr
    assert "greater than or equal to 0" in peqa(*evaluate, "exact-match", "--seed", -1, status=2).stderr
    assert "no model folder" in peqa("eval", tmp_path, rows, "--metric", "exact-match", status=1).stderr
    assert "is empty" in peqa("generate", tiny_base, "--prompt", "", status=1).stderr
    assert "exceed the context of 512" in peqa("generate", tiny_base, "--prompt", "a" * 600, status=1).stderr
    broken = tmp_path / "set.safetensors"
    broken.write_bytes(b"\xff" * 100)
    assert peqa("generate", tiny_base, "--prompt", "a", "--scale-set", broken, status=1).stderr.startswith(
        "error: "
    )


def test_a_set_of_another_base_is_refused(
    tiny_base: Path, tiny_hf_folder: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "s.safetensors"
    peqa("train", tiny_base, rows, "--task", "a", "-o", output, "--steps", 1, "-q")
    other = tmp_path / "other"
    made = peqa("quantize", tiny_hf_folder, "-o", other, "--bits", 3, "--group-size", -1)
    assert "base " in made.stderr
    refused = peqa("generate", other, "--prompt", "a", "--scale-set", output, status=1)
    assert "tuned on" in refused.stderr


def test_import_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"not a model")
    assert peqa("import", file, "-o", tmp_path / "base", status=1).stderr.startswith("error: ")
    assert "is no folder" in peqa("import", tmp_path / "m.bin", "-o", tmp_path / "base", status=1).stderr
    assert (
        "says what it is"
        in peqa("import", file, "-o", tmp_path / "base", "--format", "gptq", status=1).stderr
    )
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    "verb", ["import", "import-adapter", "quantize", "export", "train", "eval", "generate"]
)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    shown = peqa(verb, "--help").stdout
    assert f"Example: peqa {verb}" in shown
    for flag in ("--output", "--seed", "--device", "--json"):
        assert flag not in shown or f"PEQA_{flag.removeprefix('--').upper()}" in shown


def test_flags_are_variables_too(
    tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEQA_STEPS", "1")
    monkeypatch.setenv("PEQA_TASK", "from-environment")
    output = tmp_path / "s.safetensors"
    report = json.loads(peqa("train", tiny_base, rows, "-o", output, "-q", "--json").stdout)
    assert (report["steps"], report["task"]) == (1, "from-environment")


def test_a_folder_that_cannot_be_written_is_one_line(tiny_base: Path, rows: Path) -> None:
    failed = peqa(
        "train", tiny_base, rows, "--task", "a", "--steps", 1, "-o", "/dev/null/x.safetensors", "-q", status=1
    )
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "/dev/null" in failed.stderr.splitlines()[-1]


def test_several_tasks_are_tuned_in_one_run(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    """By rows of two shapes, packed, with a sweep first; each task gets its set, and its events are written."""
    pytest.importorskip("tensorboard")
    alpaca = tmp_path / "alpaca.json"
    alpaca.write_text(json.dumps([{"instruction": f"say {i}", "output": "dog"} for i in range(12)]))
    given = (
        "train",
        tiny_base,
        rows,
        alpaca,
        "--task",
        "cat",
        "--task",
        "dog",
        "-o",
        tmp_path / "sets",
        "-q",
    )
    given += ("--steps", 4, "--batch", 4, "--eval-fraction", "0.2", "--pack", "--lr", "2e-2", "--json")
    shown = peqa(*given, "--auto", "--tensorboard", tmp_path / "events")
    reports = {report["task"]: report for report in json.loads(shown.stdout)}
    assert reports.keys() == {"cat", "dog"}
    for task, report in reports.items():
        saved = ScaleSet.parse(tmp_path / "sets" / f"{task}.safetensors", read_manifest(tiny_base))
        assert (saved.task, saved.revision) == (task, report["revision"])
        assert report["held_out_loss"] < report["base_held_out_loss"]
        trials = {trial["kind"]: trial["loss"] for trial in report["trials"]}
        assert trials.keys() == {"channel", "channel+input", "group"}, "the given rate is the only one"
        assert report["kind"] == min(trials, key=lambda kind: trials[kind])
        assert report["learning_rate"] == 2e-2
    assert shown.stderr.count("held-out loss") == 1
    assert list((tmp_path / "events").glob("events.*"))
    assert not list((tmp_path / "sets").glob("*.sweep"))


def test_a_missing_tensorboard_is_noticed_before_any_work(
    tiny_base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the base is loaded, or rows are read")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tunable = load_tunable(tiny_base, device="cpu")
    monkeypatch.setattr("peqa_runtime.training.tuning.load_tunable", worked)
    monkeypatch.setattr("peqa_runtime.training.run.read_training_data", worked)
    events, output = tmp_path / "events", tmp_path / "s.safetensors"
    given = ("train", tiny_base, rows, "--task", "a", "-o", output, "--auto", "--tensorboard", events)
    assert "pip install tensorboard" in peqa(*given, status=1).stderr
    with pytest.raises(InvalidData, match="pip install tensorboard"):
        train_files(
            tunable, [TrainingFiles("a", rows, output)], lambda rows: TuneConfig(), tensorboard=events
        )
    assert [path.name for path in tmp_path.iterdir()] == [rows.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "a"], "2 files of rows and 1 --task names"),
        (["--task", "a", "--task", "b", "--eval", "x"], "2 files of rows and 1 --eval files"),
        (["--task", "a", "--task", "b", "-o", "one.safetensors"], "several tasks are written to a folder"),
        (["--task", "a", "--task", "a"], "a name and an output of its own"),
        (["--task", "a", "--task", "b", "--recipe", "peqa-paper"], "--group-size -1"),
        (["--task", "a", "--task", "b", "--accumulate", "99"], "accumulate must be between 1"),
        (["--task", "a", "--task", "b", "--teacher", "nowhere"], "the teacher nowhere is no model folder"),
    ],
)
def test_several_tasks_that_do_not_go_together(
    tiny_base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    output = [] if "-o" in options else ["-o", "sets"]
    result = peqa("train", tiny_base, rows, rows, *options, *output, "-q", status=1)
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert message in error
