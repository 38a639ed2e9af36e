"""Swapping sets under load: an honest server passes, and every kind of stale or mixed answer is caught."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from completion_stub import Stub, report_of, run_command


@pytest.fixture
def sets(tmp_path: Path) -> str:
    for name in "AB":
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    return f"{tmp_path / 'A.safetensors'},{tmp_path / 'B.safetensors'}"


def swap_arguments(sets: str) -> list[str]:
    return [
        *[
            "--concurrency",
            "4",
            "--requests",
            "60",
            "--warmup",
            "2",
            "--output-tokens",
            "6",
            "--tasks",
            "base,t",
        ],
        *["--swap-every", "0.06", "--swap-task", "t", "--swap-sets", sets, "--swap-pool", "3"],
    ]


def test_swapping_an_honest_server(stub: Stub, sets: str) -> None:
    code, report = report_of(stub, *swap_arguments(sets))
    swap = report["swap"]
    assert (code, swap["violations"]) == (0, [])
    assert swap["uploads"] >= 2
    assert swap["checked"] == 30
    assert swap["could_be_stale"] > 0
    assert swap["answers_per_revision"].keys() == {"rev-A", "rev-B"}
    assert "t" not in stub.sets, "the server is left as it was found"


def test_a_task_gets_its_set_back(stub: Stub, sets: str) -> None:
    stub.sets["t"] = b"mine"
    assert report_of(stub, *swap_arguments(sets))[0] == 0
    assert stub.sets["t"] == b"mine"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("stale", "stale"),
        ("stale_text", "but is the answer of"),
        ("mixed", "no revision's answer"),
        ("nameless", "names 0 revisions"),
    ],
)
def test_a_dishonest_server_is_caught(
    stub: Stub, sets: str, fault: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault begins after the references have been recorded, as a race in a server would."""
    from peqa_loadtest import cli

    honest = cli.prepare_swap

    async def prepare_then_break(*arguments: Any) -> Any:
        check = await honest(*arguments)
        setattr(stub, fault, True)
        return check

    monkeypatch.setattr(cli, "prepare_swap", prepare_then_break)
    code, report = report_of(stub, *swap_arguments(sets))
    assert code == 1
    assert report["overall"]["completed"] == 60
    assert any(words in violation for violation in report["swap"]["violations"]), report["swap"]


def test_a_failed_upload_is_a_violation(stub: Stub, sets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peqa_loadtest import cli

    honest = cli.prepare_swap

    async def prepare_then_refuse(*arguments: Any) -> Any:
        check = await honest(*arguments)
        stub.refuse_sets = 507
        return check

    async def leave(*_: Any) -> None:
        """The stub takes no set back either."""

    monkeypatch.setattr(cli, "prepare_swap", prepare_then_refuse)
    monkeypatch.setattr(cli, "restore_task", leave)
    code, report = report_of(stub, *swap_arguments(sets))
    assert code == 1
    assert any("HTTP 507: cannot now" in violation for violation in report["swap"]["violations"])


def test_sets_that_answer_alike_are_refused(stub: Stub, tmp_path: Path) -> None:
    for name in "AB":
        (tmp_path / f"{name}.safetensors").write_bytes(b"same")
    sets = f"{tmp_path / 'A.safetensors'},{tmp_path / 'B.safetensors'}"
    code, _, err = run_command(stub, *swap_arguments(sets))
    assert code == 1
    assert "answer alike" in err
