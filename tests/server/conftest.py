"""A real uvicorn on a free port, in a thread: streaming and disconnects cannot be seen through a test client."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package; the stubs are shared by name

from page_visit import CHROMIUM, Visit
from server_stubs import MANIFEST, ByteTokenizer, Live, StubEngine, StubTasks, wait_until

from peqa_server.app import create_app
from peqa_server.services import ServedModel
from peqa_server.settings import ServerSettings


@pytest.fixture(scope="session")
def run_app() -> Iterator[Callable[..., tuple[str, asyncio.AbstractEventLoop]]]:
    """Serve any app on a free port until the tests end; options are uvicorn's."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def run(app: Any, **options: Any) -> tuple[str, asyncio.AbstractEventLoop]:
        common = {"port": 0, "log_level": "warning", "timeout_graceful_shutdown": 1}
        server = uvicorn.Server(uvicorn.Config(app, **common, **options))
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
        server.should_exit = server.force_exit = True  # connections that tests left open are not waited for
    deadline = time.monotonic() + 5  # for all: the last test of a session has dozens of servers to end
    for _, thread in servers:
        thread.join(max(0.0, deadline - time.monotonic()))


@pytest.fixture(scope="session")
def start(run_app: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Live]:
    """Start a server over stubs: `start(engine=…, settings=…)`."""
    client = httpx.Client(timeout=10)  # its SSL context takes longer to make than most tests

    def start(
        engine: Any = None,
        tasks: Any = None,
        settings: ServerSettings | None = None,
        max_model_len: int = 200,
    ) -> Live:
        engine = engine or StubEngine()
        tasks = tasks or StubTasks()
        model = ServedModel(MANIFEST, ByteTokenizer(), max_model_len=max_model_len, vocab_size=257)
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, while a module's tests run; they are skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium, or name one in $PEQA_CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # No sandbox: it needs a user that is not root. The rest: calls to its maker's hosts of the browser's own.
        options = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        options += ["--disable-component-update", "--disable-sync", "--disable-quic"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """Open tabs; at the end none has asked another host for anything, nor complained."""
    visits: list[Visit] = []

    def visit(url: str, **options: Any) -> Visit:
        visits.append(Visit(browser, url, **options))
        return visits[-1]

    yield visit
    for tab in visits:
        tab.context.close()
        assert tab.outside == []
        assert tab.complaints == []
