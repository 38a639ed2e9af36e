"""Client, runner and command against a stub server over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from typer.testing import CliRunner

from peqa_loadtest.cli import app as command
from peqa_loadtest.client import Answer, CompletionClient, EventParser, Target, failure_of, read_event
from peqa_loadtest.run import calibrate


@dataclass
class Stub:
    """An OpenAI-style server whose answer is a function of task, revision and prompt; with faults to switch on."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    sets: dict[str, bytes] = field(default_factory=dict)  # task -> uploaded bytes
    known_fields: set[str] | None = None  # others are a 400; None = all are known
    tasks: set[str] | None = None  # others are a 404; None = all are known
    usage: bool = True
    broken: bool = False  # streams end in the middle
    stale_text: bool = False  # answers come from the set before, under the new name
    stale: bool = False  # answers come from the set before, under its own name
    mixed: bool = False  # second half of an answer comes from the set before
    nameless: bool = False  # no `revision`
    refuse_sets: int = 0  # status of every upload from now on
    tokens_delay: float = 0.001
    before: dict[str, bytes] = field(default_factory=dict)

    def revision(self, data: bytes) -> str:
        return "rev-" + data.decode()

    def words(self, task: str, data: bytes, prompt: str, count: int) -> list[str]:
        return [f" {task}{data.decode()}{prompt[:3]}{i}" for i in range(count)]


def make_app(stub: Stub) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [{"id": "base-model"}, {"id": "sql"}]}

    @app.put("/v1/tasks/{task}")
    async def put(task: str, request: Request) -> Response:
        if stub.refuse_sets:
            return JSONResponse({"error": {"message": "cannot now"}}, stub.refuse_sets)
        await asyncio.sleep(0.002)
        stub.before[task] = stub.sets.get(task, b"0")
        stub.sets[task] = await request.body()
        return JSONResponse({"task": task, "revision": stub.revision(stub.sets[task])})

    @app.get("/v1/tasks/{task}/content")
    async def content(task: str) -> Response:
        if task not in stub.sets:
            return JSONResponse({"error": {"message": "unknown"}}, 404)
        return Response(stub.sets[task])

    @app.delete("/v1/tasks/{task}")
    async def delete(task: str) -> dict:
        stub.sets.pop(task, None)
        return {}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        stub.bodies.append(body)
        unknown = set(body) - stub.known_fields if stub.known_fields is not None else set()
        if unknown:
            return JSONResponse({"error": {"message": f"unknown field {sorted(unknown)}"}}, 400)
        task = body.get("task", body.get("model"))
        if stub.tasks is not None and task not in stub.tasks:
            return JSONResponse({"error": {"message": f"unknown task {task}"}}, 404)
        new = stub.sets.get(task, b"0")
        old = stub.before.get(task, b"0")
        data = old if stub.stale or stub.stale_text else new
        named = new if stub.stale_text else data
        words = stub.words(task, data, body["prompt"], body["max_tokens"])
        if stub.mixed:
            words[len(words) // 2 :] = stub.words(task, old, body["prompt"], body["max_tokens"])[
                len(words) // 2 :
            ]

        async def events() -> Any:
            extra = {} if stub.nameless else {"task": task, "revision": stub.revision(named)}
            for i, word in enumerate(words):
                await asyncio.sleep(stub.tokens_delay)
                if stub.broken and i == 2:
                    return
                last = "length" if i == len(words) - 1 else None
                choice = {"index": 0, "text": word, "finish_reason": last}
                yield f"data: {json.dumps({'choices': [choice], **extra})}\n\n"
            if stub.usage and body.get("stream_options", {}).get("include_usage"):
                usage = {
                    "prompt_tokens": 3 + 2 * len(body["prompt"].split()),
                    "completion_tokens": len(words),
                }
                yield f"data: {json.dumps({'choices': [], 'usage': usage, **extra})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


@contextlib.contextmanager
def serve(stub: Stub) -> Iterator[Stub]:
    server = uvicorn.Server(uvicorn.Config(make_app(stub), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield stub
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serve(Stub()) as running:
        yield running


def run_command(stub: Stub, *arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(command, [stub.url, "--quiet", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def report_of(stub: Stub, *arguments: str) -> tuple[int, dict[str, Any]]:
    code, out, _ = run_command(stub, "--json", *arguments)
    return code, json.loads(out)


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


def test_events_may_be_cut_anywhere() -> None:
    stream = 'data: {"a":"é"}\r\n\r\n: ping\n\nevent: x\ndata: one\ndata: two\n\ndata:[DONE]\n\n'.encode()
    want = ['{"a":"é"}', "one\ntwo", "[DONE]"]
    for size in (1, 2, 3, 7, len(stream)):
        parser = EventParser()
        got = [e for i in range(0, len(stream), size) for e in parser.feed(stream[i : i + size])]
        assert got == want, size


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error": {"message": "no such task", "code": 404}}', "no such task"),
        ('{"object": "error", "message": "flat"}', "flat"),
        ('{"error": "Unauthorized"}', "Unauthorized"),
        ('{"detail": "Not Found"}', "Not Found"),
        ("<html>bad gateway", "<html>bad gateway"),
    ],
)
def test_error_bodies_of_many_servers(body: str, message: str) -> None:
    assert failure_of(400, body.encode()).message == message


def test_an_error_event_is_a_failure() -> None:
    answer = Answer("t", "p", 0.0)
    read_event(answer, '{"error": {"message": "engine died"}}', 1.0)
    assert answer.failure is not None
    assert answer.failure.message == "engine died"


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


def serve_by_hand(listener: socket.socket, script: list[list[bytes]]) -> None:
    """On connection i read one request before each of script[i]'s responses; then close. An empty one says nothing."""
    for responses in script:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as reader:
            for response in responses:
                length = 0
                while (line := reader.readline().strip()) != b"":
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                reader.read(length)
                connection.sendall(response)


EVENT = b'data: {"choices": [{"text": "hi", "finish_reason": "stop"}]}\n\n'
FULL = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(EVENT), EVENT)


def complete_twice(script: list[list[bytes]]) -> list[Answer]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve_by_hand, args=(listener, script), daemon=True)
        thread.start()

        async def both() -> list[Answer]:
            async with CompletionClient(Target(f"http://127.0.0.1:{listener.getsockname()[1]}")) as client:
                return [await client.complete("t", "p", 4) for _ in range(2)]

        done = asyncio.run(both())
        thread.join(10)
        return done


def test_a_reused_connection_that_closes_is_tried_once_more() -> None:
    first, second = complete_twice([[FULL, b""], [FULL]])
    assert (first.failure, second.failure) == (None, None)
    assert (first.retried, second.retried) == (False, True)
    assert second.text == "hi"


def test_a_new_connection_that_closes_is_an_error() -> None:
    first, second = complete_twice([[b""], [FULL]])
    assert first.failure is not None
    assert "disconnected" in first.failure.message
    assert not first.retried
    assert second.failure is None


def test_a_response_that_breaks_off_is_not_tried_again() -> None:
    first, second = complete_twice([[FULL, FULL[:-20]]])
    assert first.failure is None
    assert second.failure is not None
    assert not second.retried


# ---- swapping ----


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
