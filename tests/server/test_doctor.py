"""`peqa doctor`: its packages and variables, its probes, and the command as a whole."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from findings import free_port, is_broken
from typer.testing import CliRunner

from peqa_server.doctor import examination, probe, software
from peqa_server.doctor.finding import Asked, Finding


def test_packages_of_this_installation_are_fine() -> None:
    python, *packages = software.packages(Asked(Path()))
    assert python.state == "ok"
    assert [finding.state for finding in packages] == ["ok"]
    assert "torch 2." in packages[0].found


@pytest.mark.parametrize(
    ("versions", "state", "words"),
    [
        ({"transformers": "4.9", "torch": "2.13.0+cpu"}, "warning", ("transformers is 4.9", ">=5.17")),
        ({"torch": "2.13.0+cpu"}, "problem", ("transformers is missing", "pip install 'transformers")),
        ({"transformers": "5.20", "torch": "2.13.0", "triton": "4.1"}, "warning", ("triton is 4.1",)),
    ],
)
def test_wrong_packages(versions: dict[str, str], state: str, words: tuple[str, ...]) -> None:
    wanted = [
        "torch<3,>=2.11",
        "transformers<6,>=5.17",
        'triton<4,>=3.6; extra == "gpu"',
        'pytest; extra == "dev"',
    ]
    (finding,) = software.compared(wanted, versions.get)
    is_broken(finding, state, *words)


def test_a_misspelt_variable() -> None:
    known = frozenset({"PEQA_PORT", "PEQA_TASK_ROWS"})
    asked = Asked(
        Path(), environ={"PEQA_TASKROWS": "9", "PEQA_PORT": "1", "PATH": "/"}, known_variables=known
    )
    (finding,) = software.environment(asked)
    is_broken(finding, "warning", "PEQA_TASKROWS", "PEQA_TASK_ROWS?")


def test_traces_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(Path(), environ={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"})
    assert software.traces(asked)[0].state == "ok"
    assert software.traces(Asked(Path()))[0].found == "not asked for"
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda name: None)
    is_broken(software.traces(asked)[0], "problem", "otel")


def test_a_check_that_hangs_or_fails_takes_nothing_with_it() -> None:
    def hang(asked: Asked) -> list[Finding]:
        threading.Event().wait(30)
        return []

    def fail(asked: Asked) -> list[Finding]:
        raise KeyError("gone")

    began = time.monotonic()
    found = examination.examine(
        Asked(Path(), timeout=0.3),
        {"slow": hang, "bad": fail, "good": lambda _: [Finding("good", "ok", "fine")]},
    )
    assert time.monotonic() - began < 3
    assert [(finding.name, finding.state) for finding in found] == [
        ("slow", "problem"), ("bad", "problem"), ("good", "ok"),
    ]  # fmt: skip
    assert "0.3 s" in found[0].found
    assert "KeyError" in found[1].found


def test_probes_end_in_time() -> None:
    began = time.monotonic()
    with pytest.raises(probe.ProbeFailed, match=r"within 0\.2 s"):
        probe.answer(["sleep", "30"], 0.2)
    assert time.monotonic() - began < 5
    with pytest.raises(probe.ProbeFailed, match="not installed"):
        probe.answer(["no-such-program-here"], 1)
    with pytest.raises(probe.ProbeFailed, match="status 3: boo"):
        probe.answer(["sh", "-c", "echo boo >&2; exit 3"], 5)


def doctor(*arguments: str, **environ: str) -> Any:
    from peqa_server.cli import app

    return CliRunner().invoke(app, ["doctor", *arguments], env=environ)


def test_the_command_ends_with_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Asked] = []
    answer = [Finding("a", "ok", "fine"), Finding("b", "warning", "odd", "look at it")]

    def examine(asked: Asked) -> list[Finding]:
        seen.append(asked)
        return answer

    monkeypatch.setattr(examination, "examine", examine)
    done = doctor("--home", str(tmp_path), "--port", "81", PEQA_STORE="tasks", PEQA_STOER="x")
    assert done.exit_code == 0, done.output
    assert "→ look at it" in done.stdout
    assert "Nothing stops serving. 1 to look at." in done.stdout
    (asked,) = seen
    assert (asked.home, asked.port, asked.store) == (tmp_path, 81, Path("tasks"))
    assert {"PEQA_TASK_ROWS", "PEQA_SERVER", "PEQA_HOME"} <= asked.known_variables
    assert "PEQA_STOER" not in asked.known_variables
    answer.append(Finding("c", "problem", "broken", "mend it"))
    done = doctor("--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["ok"] is False
    assert told["findings"][2] == {"name": "c", "state": "problem", "found": "broken", "advice": "mend it"}


@pytest.mark.slow
def test_the_whole_doctor(tiny_base: Path, tmp_path: Path) -> None:
    done = doctor(str(tiny_base), "--store", str(tmp_path / "store"), "--home", str(tmp_path), "--json",
                  "--port", str(free_port()))  # fmt: skip
    told = json.loads(done.stdout)
    names = {finding["name"] for finding in told["findings"]}
    assert {
        "python",
        "processor",
        "device",
        "memory",
        "home",
        "base",
        "store",
        "port",
        "keys",
        "clock",
    } <= names
    assert done.exit_code == 0, [finding for finding in told["findings"] if finding["state"] == "problem"]
