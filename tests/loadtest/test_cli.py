"""The command against a stub server: its report, fallbacks, errors, open loop, lengths, and wrong arguments."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from completion_stub import Stub, report_of, run_command
from typer.testing import CliRunner

from peqa_loadtest.cli import app as command
from peqa_loadtest.client import Target
from peqa_loadtest.run import calibrate

SMALL = [
    "--concurrency",
    "4",
    "--requests",
    "12",
    "--warmup",
    "3",
    "--input-tokens",
    "60",
    "--output-tokens",
    "6",
]


def test_numbers_overall_and_per_task(stub: Stub) -> None:
    code, report = report_of(stub, *SMALL, "--tasks", "base,sql,slots", "--seed", "5")
    assert code == 0
    assert report["overall"]["completed"] == 12
    assert {name: part["completed"] for name, part in report["tasks"].items()} == {
        "base": 4,
        "sql": 4,
        "slots": 4,
    }
    assert report["overall"]["output_tokens_per_s"] * report["duration_s"] == pytest.approx(72)
    assert report["overall"]["prompt_tokens_mean"] == pytest.approx(60, abs=4)
    for name in ("ttft_s", "inter_token_s", "end_to_end_s"):
        assert (
            0
            < report["overall"][name]["p50"]
            <= report["overall"][name]["p90"]
            <= report["overall"][name]["p99"]
        )
    assert report["overall"]["inter_token_s"]["count"] == 12 * 5
    assert report["errors"] == report["notes"] == []
    assert len(stub.bodies) == 1 + 3 + 12
    assert len({body["prompt"].split()[0] for body in stub.bodies}) == 16, "different from the first word on"
    assert all(body["stream"] and body["temperature"] == 0 and body["ignore_eos"] for body in stub.bodies)


def test_the_table(stub: Stub) -> None:
    code, out, _ = run_command(stub, *SMALL, "--tasks", "base,sql")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split()[:5] == ["task", "requests", "failed", "tok/s", "req/s"]
    assert [line.split()[0] for line in lines[2:5]] == ["all", "base", "sql"]
    assert len({len(line.rstrip()) for line in lines[2:5]}) == 1, "aligned"


def test_progress_goes_to_stderr(stub: Stub) -> None:
    done = CliRunner().invoke(command, [stub.url, "--json", *SMALL])
    assert "12/12" in done.stderr
    json.loads(done.stdout)


def test_model_field_for_other_servers(stub: Stub) -> None:
    stub.tasks = {"base-model", "sql"}
    code, report = report_of(stub, *SMALL, "--tasks", "base,sql", "--task-field", "model")
    assert code == 0
    assert report["overall"]["failed"] == 0
    assert {body["model"] for body in stub.bodies} == {"base-model", "sql"}
    assert not any("task" in body for body in stub.bodies)


def test_ignore_eos_falls_back(stub: Stub) -> None:
    stub.known_fields = {"prompt", "max_tokens", "temperature", "stream", "stream_options", "task"}
    code, report = report_of(stub, *SMALL)
    assert code == 0
    assert report["overall"]["completed"] == 12
    assert any("ignore_eos" in note for note in report["notes"])


def test_without_usage_tokens_are_counted_in_chunks(stub: Stub) -> None:
    stub.usage = False
    code, report = report_of(stub, *SMALL)
    assert code == 0
    assert report["overall"]["output_tokens_mean"] == 6
    assert len(report["notes"]) == 2


def test_errors_are_counted_and_do_not_hide(stub: Stub) -> None:
    stub.tasks = {"base"}
    code, report = report_of(stub, *SMALL, "--tasks", "base,nope")
    assert code == 0, "some were answered"
    assert report["overall"]["failed"] == report["tasks"]["nope"]["failed"] == 6
    assert report["errors"] == [{"status": 404, "message": "unknown task nope", "count": 6}]
    assert report["warmup_errors"][0]["status"] == 404


def test_a_stream_that_breaks_off_is_an_error(stub: Stub) -> None:
    stub.broken = True
    code, report = report_of(stub, *SMALL)
    assert code == 1
    assert report["overall"]["completed"] == 0
    assert report["errors"][0]["message"] == "the stream ended without a finish_reason"


def test_no_server_is_a_sentence() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    code, out, err = run_command(Stub(url), *SMALL)
    assert code == 1
    assert out == ""
    assert "probe request" in err


def test_open_loop_does_not_wait(stub: Stub) -> None:
    stub.tokens_delay = 0.05  # one request takes 0.3 s; one after the other they would take 6 s
    code, report = report_of(
        stub,
        "--rate",
        "40",
        "--concurrency",
        "1",
        "--requests",
        "20",
        "--warmup",
        "0",
        "--output-tokens",
        "6",
    )
    assert code == 0
    assert report["overall"]["completed"] == 20
    assert report["duration_s"] < 4


def test_calibration_meets_the_asked_length(stub: Stub) -> None:
    found = asyncio.run(calibrate(Target(stub.url), "base", 512, seed=0, number=0))
    assert 3 + 2 * found.words == pytest.approx(512, rel=0.03)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--swap-every", "1"],
        ["--swap-every", "1", "--tasks", "t", "--swap-task", "t", "--swap-sets", "/nowhere/a,/nowhere/b"],
        ["--tasks", ","],
        ["--rate", "0"],
        ["--mix", "fair"],
    ],
)
def test_wrong_arguments_are_named(stub: Stub, arguments: list[str]) -> None:
    code, out, err = run_command(stub, *arguments)
    assert code == 2
    assert out == ""
    assert arguments[-2 if "/nowhere" in arguments[-1] else 0] in err
    assert stub.bodies == []
