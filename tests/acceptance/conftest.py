"""A real `peqa serve` process with the demo model, and what every acceptance test needs to talk to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

READY_TIMEOUT_S = 300.0  # the first start fetches and imports the demo model


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Server:
    """A `peqa serve` subprocess; `client` talks to it."""

    arguments: list[str]
    log: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "peqa_server.cli", "serve", *self.arguments, "--port", str(self.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, (
                f"the server ended while starting:\n{self.log.read_text()[-3000:]}"
            )
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready after {READY_TIMEOUT_S} s:\n{self.log.read_text()[-3000:]}")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kill(self, signum: int = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(signum)
        return self.process.wait(60)

    def complete(self, prompt: str | list[int], task: str | None = None, **fields: Any) -> dict[str, Any]:
        """One greedy completion with its token ids; asserts that it succeeded."""
        body = {"prompt": prompt, "temperature": 0, "return_token_ids": True, **fields}
        if task is not None:
            body["task"] = task
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name]
        assert values, f"no metric {name}"
        return sum(values)


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`peqa serve` with its defaults: the demo base and its three tasks, in a store of its own."""
    folder = tmp_path_factory.mktemp("demo-server")
    server = Server(["--store", str(folder / "store")], folder / "log").start()
    yield server
    server.kill(signal.SIGTERM)


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[[list[str]], Server]]:
    """Start more servers; whatever still runs at the end is ended."""
    started: list[Server] = []

    def start(arguments: list[str]) -> Server:
        started.append(Server(arguments, tmp_path / f"server-{len(started)}.log").start())
        return started[-1]

    yield start
    for server in started:
        if server.process is not None and server.process.poll() is None:
            server.kill()


@pytest.fixture
def together() -> Callable[..., list[Any]]:
    """Run calls at the same time, one thread each; results in order."""

    def run(calls: list[Callable[[], Any]]) -> list[Any]:
        with ThreadPoolExecutor(len(calls)) as pool:
            return [future.result() for future in [pool.submit(call) for call in calls]]

    return run


@pytest.fixture(scope="session")
def demo_manifest(smollm2_base: Path) -> Any:
    """Names and shapes that a scale set for the demo base must have."""
    from peqa_runtime import read_manifest

    return read_manifest(smollm2_base)
