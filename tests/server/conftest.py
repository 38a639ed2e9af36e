"""A real uvicorn on a free port, in a thread: streaming and disconnects cannot be seen through a test client."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package; the stubs are shared by name

from peqa_server.app import create_app
from peqa_server.services import ServedModel
from peqa_server.settings import ServerSettings
from server_stubs import MANIFEST, ByteTokenizer, StubEngine, StubTasks


@dataclass
class Live:
    """A running server over stubs."""

    url: str
    app: Any
    engine: Any
    tasks: Any
    loop: asyncio.AbstractEventLoop

    client: httpx.Client
    spool: Path

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def send(self, content: bytes | str, path: str = "/v1/completions") -> httpx.Response:
        return self.client.post(path, content=content)

    def complete(self, prompt: Any = "hi", **body: Any) -> dict[str, Any]:
        answer = self.post(prompt=prompt, **body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def error(self, status: int, *, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
        """The error of a request that must be refused with `status`."""
        return check_error(self.post(path, **body), status)

    @property
    def idle(self) -> bool:
        return not self.engine.running and not self.tasks.leases


def check_error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, f"{answer.status_code}: {answer.text[:300]}"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) > 15
    assert answer.headers["x-request-id"]
    return dict(error)


def wait_until(condition: Callable[[], bool], seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def run_app() -> Iterator[Callable[[Any], tuple[str, asyncio.AbstractEventLoop]]]:
    """Serve any app on a free port until the tests end."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def run(app: Any) -> tuple[str, asyncio.AbstractEventLoop]:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=1))
        found: list[asyncio.AbstractEventLoop] = []

        async def main() -> None:
            found.append(asyncio.get_running_loop())
            await server.serve()

        thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
        thread.start()
        servers.append((server, thread))
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}", found[0]

    yield run
    for server, _ in servers:
        server.should_exit = True
    for _, thread in servers:
        thread.join(5)


@pytest.fixture(scope="session")
def start(run_app: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Live]:
    """Start a server over stubs: `start(engine=…, settings=…)`."""
    client = httpx.Client(timeout=10)  # its SSL context takes longer to make than most tests

    def start(engine: Any = None, tasks: Any = None, settings: ServerSettings | None = None) -> Live:
        engine = engine or StubEngine()
        tasks = tasks or StubTasks()
        model = ServedModel(MANIFEST, ByteTokenizer(), max_model_len=200, vocab_size=257)
        spool = tmp_path_factory.mktemp("spool")
        app = create_app(engine, tasks, model, settings, spool_folder=spool)
        url, loop = run_app(app)
        own = httpx.Client(base_url=url, timeout=10, transport=client._transport)
        return Live(url, app, engine, tasks, loop, own, spool)

    return start


@pytest.fixture
def live(start: Callable[..., Live]) -> Callable[..., Live]:
    """Start a server of the test's own."""
    return start


@pytest.fixture(scope="session")
def _shared(start: Callable[..., Live]) -> Live:
    return start()


@pytest.fixture
def server(_shared: Live) -> Live:
    """The default server, as new, with tasks "sql" and "qa"."""
    _shared.engine.__init__()
    _shared.tasks.__init__()
    _shared.tasks.upload("sql", b"SET sql one")
    _shared.tasks.upload("qa", b"SET qa one")
    return _shared
