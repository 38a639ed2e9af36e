"""A stub server with faults to switch on, over real sockets, and runs of the command against it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from typer.testing import CliRunner

from peqa_loadtest.cli import app as command


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


def run_command(stub: Stub, *arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(command, [stub.url, "--quiet", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def report_of(stub: Stub, *arguments: str) -> tuple[int, dict[str, Any]]:
    code, out, _ = run_command(stub, "--json", *arguments)
    return code, json.loads(out)
