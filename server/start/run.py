"""Run an app under uvicorn: bind first, load in a thread, drain on SIGTERM, exit with a meaningful status."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from peqa_runtime.errors import PeqaError
from peqa_server.http.connection import MAX_HEAD_BYTES, bounded_connection
from peqa_server.observe.access_log import refused_connection
from peqa_server.observe.conditions import watch_conditions
from peqa_server.observe.log_format import event
from peqa_server.services import EngineService, Gate, Services
from peqa_server.threads import ended_in_time

log = logging.getLogger("peqa.server")

KEEP_ALIVE_SECONDS = (
    65  # longer than the minute after which common clients and balancers drop an idle connection
)
UNREAD_SECONDS = 120  # of bytes that the other side does not acknowledge, or has no room for
MAX_CONNECTIONS = 4096
SPARE_FILES = 256  # handles for all that is no connection
ENGINE_WATCH_SECONDS = 0.1
ENGINE_SECONDS = (
    2  # for the engine to stop; a step that takes longer may still end while the last answers are sent
)
ENDING_SECONDS = 3  # for the engine and the tasks together
LAST_ANSWERS_SECONDS = 3  # after that: time to send what says so

Load = Callable[[], Services]


class CannotBind(Exception):
    """The address cannot be listened on; the message says why."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `CannotBind` with a sentence."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Named, or asyncio does not know a TCP socket by it and leaves Nagle's algorithm on: 40 ms an answer.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(
            socket, "TCP_USER_TIMEOUT"
        ):  # inherited by connections; a peer that takes nothing is given up
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CannotBind(
            f"cannot listen on {host}:{port}: {reason}; choose another with --host and --port"
        ) from None
    listener.set_inheritable(True)
    return listener


def _connection_limit() -> int:
    """As many connections as this process may have files for, after asking the system for enough."""
    wanted = MAX_CONNECTIONS + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(wanted, soft) - SPARE_FILES)


class DrainingServer(uvicorn.Server):
    """Uvicorn that, on the first SIGTERM or SIGINT, lets running answers finish; a second signal ends it at once.

    While it drains it still answers: /ready and new generations get 503.
    """

    def __init__(self, app: FastAPI, drain_seconds: float) -> None:
        gate: Gate = app.state.gate
        refused = partial(refused_connection, gate.metrics)
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                http=bounded_connection(_connection_limit(), refused=refused),
                ws="none",
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
            )
        )
        self.gate = gate
        self.drain_seconds = drain_seconds
        self.failed = False
        self.opened = False
        self._told_to_end = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._conditions: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal or a failed load."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came. It is not passed on afterwards, as uvicorn would: a clean end is exit status 0."""
        if self._loop is None or self._told_to_end or self.gate.phase != "ready":
            # Python's own end would wait for the engine's step and for threads that load; what is on disk is whole.
            _end_process(1 if self.failed else 0)
        self._told_to_end = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def load_in_thread(self, load: Load) -> None:
        """Load the services beside the running server; a failure ends the server."""
        loop = asyncio.get_running_loop()

        def work() -> None:
            try:
                services = load()
            except (PeqaError, ValueError, OSError) as error:
                print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201 - the command's one sentence
                self._tell(loop, self._fail, str(error))
            except Exception:
                log.exception("the server could not start")
                self._tell(loop, self._fail, "the server could not start; its log says why")
            else:
                # What is loaded stays. To look through it for garbage again would hold up everything for 0.2 s.
                gc.collect()
                gc.freeze()
                self._tell(loop, self._open, services)

        threading.Thread(target=work, name="peqa-load", daemon=True).start()

    @staticmethod
    def _tell(loop: asyncio.AbstractEventLoop, call: Callable[..., None], argument: object) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(call, argument)

    def _open(self, services: Services) -> None:
        self.gate.open(services)
        self.opened = True
        self._watching = asyncio.ensure_future(self._watch(services.engine))
        self._conditions = asyncio.ensure_future(watch_conditions(services, services.spool_folder))

    async def _watch(self, engine: EngineService) -> None:
        """End the server when the engine has died: its running answers have been told, and get time to say so."""
        while engine.failure is None:
            await asyncio.sleep(ENGINE_WATCH_SECONDS)
        log.critical("the server ends: %s", engine.failure)
        self._fail(f"the engine has died: {engine.failure}")

    def _fail(self, reason: str) -> None:
        self.failed = True
        self.gate.fail(reason)
        self.should_exit = True

    def _begin_drain(self) -> None:
        if self._draining is None:
            log.info(
                "draining: running answers have %g s to finish; a second signal ends at once",
                self.drain_seconds,
            )
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        began = time.perf_counter()
        finished = await self.gate.drain(self.drain_seconds)
        if not finished:
            log.warning("some answers did not finish in %g s and are cut short", self.drain_seconds)
        await self._end_services()
        seconds = round(time.perf_counter() - began, 1)
        event(log, logging.INFO, "drained; the server ends", seconds=seconds, all_finished=finished)
        self.should_exit = True

    async def _end_services(self) -> None:
        """Stop the engine, close the tasks. Neither may keep the process: the tasks' lock may be held elsewhere, and
        what is on disk is whole."""
        services, due = self.gate.services, time.monotonic() + ENDING_SECONDS
        if not await ended_in_time(partial(services.engine.stop, 0.0), ENGINE_SECONDS, "peqa-stop"):
            log.warning("the engine has not stopped in %g s", ENGINE_SECONDS)
        if not await ended_in_time(services.tasks.close, due - time.monotonic(), "peqa-close"):
            log.warning("the store's disk or lock keeps the server waiting; it ends without")


def run(
    app: FastAPI,
    listener: socket.socket,
    load: Load,
    drain_seconds: float,
    close: Callable[[], None] = lambda: None,
) -> int:
    """Serve `app` on `listener` until it is told to stop, then `close`. Returns 1 when the services cannot be loaded.

    A server that has served ends the process itself, with status 0, or 1 when its engine died: Python's own end would
    wait for threads, and one that checks an upload, or waits for the store's lock, may take a minute.
    """
    server = DrainingServer(app, drain_seconds)

    async def main() -> None:
        server.load_in_thread(load)
        await server.serve([listener])
        if server.opened:
            close()
            _end_process(1 if server.failed else 0)

    try:
        asyncio.run(main())
    finally:
        close()
    return 1 if server.failed else 0


def _end_process(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
