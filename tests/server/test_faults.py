"""Faults in a real server process: who gets an error and which, who does not notice, and how the process ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from faulty_server import CRASH, CRASHES, FAST, NAN, RAISE, SLOW, load
from server_stubs import check_error, wait_until

from peqa_runtime.model import read_manifest
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_server.app import create_loading_app

Start = Callable[..., "Process"]


class Asked:
    """A server, and what tests ask it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=30)

    def post(self, prompt: Any, **fields: Any) -> httpx.Response:
        body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": 8, **fields}
        return self.client.post("/v1/completions", json=body)

    def complete(self, prompt: Any, **fields: Any) -> list[int]:
        answer = self.post(prompt, return_token_ids=True, **fields)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["choices"][0]["token_ids"])

    def events(self, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
        """The events of a stream, which must end in [DONE]."""
        answer = self.post(prompt, stream=True, **fields)
        assert answer.status_code == 200, answer.text
        lines = answer.text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line[6:]) for line in lines[:-2]]

    def tokens(self, prompt: Any, **fields: Any) -> list[int]:
        """The tokens of a stream."""
        events = self.events(prompt, return_token_ids=True, **fields)
        return [token for event in events for token in event["choices"][0]["token_ids"]]

    def metric(self, name: str) -> float:
        rows = self.client.get("/metrics").text.splitlines()
        return sum(float(row.rsplit(" ", 1)[1]) for row in rows if row.split("{")[0].split(" ")[0] == name)


class Process(Asked):
    """A server in a process of its own."""

    def __init__(self, base: Path, folder: Path, drain_seconds: float) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        super().__init__(f"http://127.0.0.1:{port}")
        self.log = folder / "log"
        program = Path(__file__).parent / "faulty_server.py"
        arguments = [str(base), str(folder / "store"), str(port), str(drain_seconds)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(program), *arguments],
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        wait_until(self.is_ready, 120)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        try:
            return self.client.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@pytest.fixture
def start(tiny_base: Path, tmp_path: Path) -> Iterator[Start]:
    started: list[Process] = []

    def make(drain_seconds: float = 30.0) -> Process:
        folder = tmp_path / str(len(started))
        folder.mkdir()
        started.append(Process(tiny_base, folder, drain_seconds))
        return started[-1]

    yield make
    for server in started:
        server.process.kill()
        server.process.wait(10)


@pytest.fixture(scope="module")
def shared(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, run_app: Any) -> Iterator[Asked]:
    services = load(str(tiny_base), str(tmp_path_factory.mktemp("faults") / "store"))
    app = create_loading_app()
    url, loop = run_app(app)
    loop.call_soon_threadsafe(app.state.gate.open, services)
    server = Asked(url)
    wait_until(lambda: server.client.get("/ready").status_code == 200)
    yield server
    services.engine.stop()
    services.tasks.close()


def scale_set(base: Path, seed: int) -> bytes:
    manifest = read_manifest(base)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.out_scale": 1 + 0.3 * torch.rand(shape.out_features, generator=generator)
        for name, shape in manifest.linears.items()
    }
    return bytes(ScaleSet.build("channel", tensors, manifest).to_bytes())


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def exits(server: Process, within: float) -> int:
    try:
        return server.process.wait(within)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still running after {within} s:\n{server.log.read_text()[-2000:]}") from None


@pytest.mark.parametrize(("fault", "code"), [(NAN, "numerical_error"), (RAISE, "request_failed")])
def test_a_faulty_request_gets_a_named_error_and_its_neighbours_the_right_answer(
    shared: Asked, fault: int, code: str
) -> None:
    prompts = [[5 + i, 6, 7] for i in range(6)]
    want = [shared.complete(prompt, max_tokens=30) for prompt in prompts]
    restarts = shared.metric("peqa_engine_restarts_total")
    calls: list[Callable[[], Any]] = [lambda p=p: shared.complete(p, max_tokens=30) for p in prompts]
    calls += [lambda: shared.post([fault]), lambda: shared.events([fault])]
    got = together(calls)
    assert got[:6] == want
    error = check_error(got[6], 500)
    assert (error["code"], error["type"]) == (code, "server_error")
    assert [event["error"]["code"] for event in got[7]] == [code]
    assert shared.metric("peqa_engine_restarts_total") == restarts
    assert shared.metric("peqa_kv_blocks_used") == 0


def test_an_error_in_the_middle_of_a_stream_comes_after_its_tokens(shared: Asked) -> None:
    shared.complete([SLOW, 9], max_tokens=1)
    streamed: list[list[dict[str, Any]]] = []
    reader = threading.Thread(target=lambda: streamed.append(shared.events([5, 6], max_tokens=60)))
    reader.start()
    wait_until(lambda: shared.metric("peqa_requests_running") == 1)
    shared.complete([CRASH, 3], max_tokens=1)  # the next step after this one crashes
    reader.join()
    *tokens, last = streamed[0]
    assert len(tokens) > 0
    assert last["error"]["code"] == "engine_restarted"
    assert shared.client.get("/health").status_code == 200
    shared.complete([FAST, 9], max_tokens=1)
    assert len(shared.complete([5, 6], max_tokens=60)) == 60
    assert shared.metric("peqa_engine_restarts_total") >= 1


def test_a_task_that_makes_nan_is_set_aside_and_an_upload_brings_it_back(
    shared: Asked, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = scale_set(tiny_base, 1), scale_set(tiny_base, 2)
    for task in ("sick", "sound"):
        assert (
            shared.client.put(f"/v1/tasks/{task}", content=first if task == "sick" else second).status_code
            == 200
        )
    assert shared.client.get("/v1/tasks/sick").json()["status"] == "ready"
    for _ in range(3):
        assert check_error(shared.post([NAN], task="sick"), 500)["code"] == "numerical_error"
    for answer in (shared.post([5], task="sick"), shared.post([5], model="sick", stream=True)):
        error = check_error(answer, 409)
        assert error["code"] == "task_quarantined"
        assert "Roll the task back or upload" in error["message"]
    task = shared.client.get("/v1/tasks/sick").json()
    assert task["status"] == "quarantined"
    assert "NaN" in task["status_reason"]
    listed = {row["task"]: row["status"] for row in shared.client.get("/v1/tasks").json()["data"]}
    assert listed == {"sick": "quarantined", "sound": "ready"}
    assert shared.metric("peqa_tasks_quarantined") == 1
    assert "is in quarantine" in caplog.text
    assert len(shared.complete([5], task="sound")) == 8
    assert shared.client.put("/v1/tasks/sick", content=first).json()["status"] == "ready"
    assert len(shared.complete([5], task="sick")) == 8
    for _ in range(3):
        shared.post([NAN], task="sick")
    check_error(shared.post([5], task="sick"), 409)
    assert shared.client.put("/v1/tasks/sick", content=second).status_code == 200
    assert shared.client.post("/v1/tasks/sick/rollback").json()["status"] == "ready"
    assert len(shared.complete([5], task="sick")) == 8


def test_a_blend_that_makes_nan_is_refused_until_one_of_its_tasks_changes(
    shared: Asked, tiny_base: Path
) -> None:
    for number, task in enumerate(("one", "two")):
        content = scale_set(tiny_base, number)
        assert shared.client.put(f"/v1/tasks/{task}", content=content).status_code == 200
    blend = {"one": 0.5, "two": 0.5}
    for _ in range(3):
        assert check_error(shared.post([NAN], task=blend), 500)["code"] == "numerical_error"
    error = check_error(shared.post([5], task=blend), 409)
    assert error["code"] == "task_quarantined"
    assert "blend one:0.5+two:0.5 is in quarantine" in error["message"]
    for choice in ("one", "two", {"one": 0.25, "two": 0.75}):
        assert len(shared.complete([5], task=choice)) == 8
    assert shared.client.put("/v1/tasks/two", content=content).status_code == 200
    assert len(shared.complete([5], task=blend)) == 8


@pytest.mark.slow
def test_three_crashes_in_a_minute_end_the_process(start: Start) -> None:
    server = start()
    streams: list[httpx.Response] = []
    server.complete([SLOW, 9], max_tokens=1)
    reader = threading.Thread(target=lambda: streams.append(server.post([5, 6], max_tokens=200, stream=True)))
    reader.start()
    wait_until(lambda: server.metric("peqa_requests_running") == 1)
    server.complete([CRASHES, 3], max_tokens=1)
    reader.join()
    assert '"code":"engine_restarted"' in streams[0].text
    codes = []
    ready = 0
    while server.process.poll() is None and len(codes) < 5:
        try:
            codes.append(server.post([7, 8]).json()["error"]["code"])
            ready = server.client.get("/ready").status_code
        except httpx.TransportError:
            break
    assert codes[0] == "engine_restarted"
    assert codes[-1] == "engine_dead", "the last one hears of it before the process ends"
    assert ready == 503 or len(codes) == 2
    assert exits(server, 8) == 1
    log = server.log.read_text()
    assert "3 crashes within" in log
    assert "injected crash" in log


@pytest.mark.slow
def test_sigterm_finishes_what_runs_refuses_what_comes_and_exits_with_0(start: Start) -> None:
    server = start()
    server.complete([SLOW, 9], max_tokens=1)
    answers: list[Any] = []
    running = [
        threading.Thread(target=lambda: answers.append(len(server.complete([5, 6], max_tokens=40)))),
        threading.Thread(target=lambda: answers.append(len(server.tokens([5, 7], max_tokens=40)))),
    ]
    for thread in running:
        thread.start()
    wait_until(lambda: server.metric("peqa_requests_running") == 2)
    server.terminate()
    wait_until(lambda: server.client.get("/ready").status_code == 503)
    refused = server.post([1])
    assert check_error(refused, 503)["code"] == "draining"
    assert int(refused.headers["retry-after"]) > 0
    assert server.client.get("/health").status_code == 200
    for thread in running:
        thread.join()
    assert answers == [40, 40]
    assert exits(server, 5) == 0


@pytest.mark.slow
def test_what_does_not_finish_in_the_drain_time_is_told_so(start: Start) -> None:
    server = start(drain_seconds=0.5)
    server.complete([SLOW, 9], max_tokens=1)
    answers: list[Any] = []
    running = [
        threading.Thread(target=lambda: answers.append(server.post([5, 6], max_tokens=200))),
        threading.Thread(target=lambda: answers.append(server.events([5, 7], max_tokens=200)[-1])),
    ]
    for thread in running:
        thread.start()
    wait_until(lambda: server.metric("peqa_requests_running") == 2)
    begun = time.monotonic()
    server.terminate()
    assert exits(server, 15) == 0
    assert 0.4 < time.monotonic() - begun < 15
    for thread in running:
        thread.join()
    for answer in answers:
        if isinstance(answer, httpx.Response):
            assert check_error(answer, 503)["code"] == "aborted"
            assert answer.headers["retry-after"]
        else:
            assert answer["error"]["code"] == "aborted"
    assert len(answers) == 2


@pytest.mark.slow
def test_a_second_sigterm_ends_at_once(start: Start) -> None:
    server = start()
    server.complete([SLOW, 9], max_tokens=1)

    def ask() -> None:
        with pytest.raises(httpx.TransportError):
            server.post([5, 6], max_tokens=400)

    running = threading.Thread(target=ask)
    running.start()
    wait_until(lambda: server.metric("peqa_requests_running") == 1)
    server.terminate()
    wait_until(lambda: server.client.get("/ready").status_code == 503)
    begun = time.monotonic()
    server.terminate()
    exits(server, 3)
    assert time.monotonic() - begun < 1.5
    running.join()
