"""One timed completion over HTTP: server-sent events in, an Answer with its clock readings out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

MESSAGE_LIMIT = 160  # characters of an error message that the report keeps


class LoadTestError(Exception):
    """The load test cannot begin or go on; the message says why."""


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer."""

    status: int | None  # HTTP status; None = the connection failed or the stream broke off
    message: str


@dataclass
class Answer:
    """What came of one request. Times are time.perf_counter() readings in seconds."""

    task: str
    prompt: str
    started: float  # when it was due
    sent: float = 0.0  # when it went out
    finished: float = 0.0
    text_times: list[float] = field(default_factory=list)  # one per streamed chunk that carried text
    text: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None  # as the server counts; None = it did not say
    finish_reason: str | None = None
    revisions: set[str] = field(default_factory=set)  # every value of the chunks' `revision` field
    failure: Failure | None = None
    retried: bool = False


@dataclass(frozen=True)
class Target:
    """A server and how to talk to it."""

    url: str  # without /v1
    task_field: Literal["task", "model"] = "task"
    model: str | None = None  # sent as `model`; with task_field "model", what task "base" is called
    api_key: str | None = None
    ignore_eos: bool = True
    timeout: float = 300.0  # seconds without a byte
    fields: Mapping[str, Any] = field(default_factory=dict)  # of every completion, above what is sent anyway


class EventParser:
    """Cuts a byte stream into the data of server-sent events, wherever the network has cut it."""

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The data of each event that `chunk` completes. Comments and other fields are dropped."""
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                data, self._data = b"\n".join(self._data), []
                yield data.decode(errors="replace")


class CompletionClient:
    """An asynchronous context that sends completions to one Target."""

    def __init__(self, target: Target) -> None:
        self.target = target
        headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
        self._http = httpx.AsyncClient(
            base_url=target.url.rstrip("/").removesuffix("/v1"),
            headers=headers,
            timeout=httpx.Timeout(target.timeout, connect=10.0, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def __aenter__(self) -> CompletionClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    def body(self, task: str, prompt: str, max_tokens: int) -> dict[str, Any]:
        """The JSON of a greedy, streamed completion for `task`."""
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.target.model is not None:
            body["model"] = self.target.model
        if self.target.task_field == "task":
            body["task"] = task
        elif task != "base":
            body["model"] = task
        if self.target.ignore_eos:
            body["ignore_eos"] = True
        return {**body, **self.target.fields}

    async def complete(self, task: str, prompt: str, max_tokens: int, started: float | None = None) -> Answer:
        """Send one request and read its stream to the end. Never raises for what the server or network does.

        `started`: when the request was due (open loop), so that waiting to be sent counts; None = now.
        """
        answer = Answer(task, prompt, time.perf_counter() if started is None else started)
        connection = _ConnectionWatch()
        body = self.body(task, prompt, max_tokens)
        try:
            try:
                await self._stream(body, answer, connection)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                # An idle connection that the server has just closed: it never saw the request.
                if not connection.reused or connection.answered:
                    raise
                answer.retried = True
                await self._stream(body, answer, _ConnectionWatch())
        except httpx.HTTPError as error:
            answer.failure = Failure(None, f"{type(error).__name__}: {error}"[:MESSAGE_LIMIT])
        answer.finished = time.perf_counter()
        return answer

    async def _stream(self, body: dict[str, Any], answer: Answer, connection: _ConnectionWatch) -> None:
        answer.sent = time.perf_counter()
        request = self._http.build_request(
            "POST", "/v1/completions", json=body, extensions={"trace": connection.trace}
        )
        response = await self._http.send(request, stream=True)
        try:
            if response.status_code != 200:
                answer.failure = failure_of(response.status_code, await response.aread())
                return
            parser = EventParser()
            async for chunk in response.aiter_bytes():
                now = time.perf_counter()
                for data in parser.feed(chunk):
                    if data == "[DONE]":
                        continue
                    read_event(answer, data, now)
            if answer.failure is None and answer.finish_reason is None:
                answer.failure = Failure(None, "the stream ended without a finish_reason")
        finally:
            await response.aclose()

    async def call(self, method: str, path: str, content: bytes | None = None) -> httpx.Response:
        """One plain request. Raises LoadTestError when no connection can be had."""
        headers = {"content-type": "application/octet-stream"} if content is not None else {}
        try:
            return await self._http.request(method, path, content=content, headers=headers)
        except httpx.HTTPError as error:
            raise LoadTestError(f"{method} {path}: {type(error).__name__}: {error}") from error


class _ConnectionWatch:
    """Notes whether a request took over an idle connection, and whether a response began."""

    def __init__(self) -> None:
        self.reused = True
        self.answered = False

    async def trace(self, event: str, _: dict[str, Any]) -> None:
        if event == "connection.connect_tcp.started":
            self.reused = False
        elif event == "http11.receive_response_headers.complete":
            self.answered = True


def read_event(answer: Answer, data: str, now: float) -> None:
    """Enter one event of a completion stream, received at `now`, into `answer`."""
    try:
        event = json.loads(data)
    except ValueError:
        answer.failure = Failure(None, f"not JSON in the stream: {data}"[:MESSAGE_LIMIT])
        return
    if "error" in event:
        answer.failure = failure_of(None, data.encode())
        return
    if event.get("revision") is not None:
        answer.revisions.add(str(event["revision"]))
    if usage := event.get("usage"):
        answer.prompt_tokens = usage.get("prompt_tokens")
        answer.output_tokens = usage.get("completion_tokens")
    for choice in event.get("choices") or []:
        if choice.get("text"):
            answer.text_times.append(now)
            answer.text += choice["text"]
        if reason := choice.get("finish_reason"):
            answer.finish_reason = reason
            if reason not in ("stop", "length"):
                answer.failure = Failure(None, f"finish_reason {reason}")


def failure_of(status: int | None, body: bytes) -> Failure:
    """The failure that an error body describes: OpenAI's shape, a flat one, FastAPI's, or plain text."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        return Failure(status, text[:MESSAGE_LIMIT])
    if isinstance(found, dict):
        found = found.get("error", found)
    if isinstance(found, dict):
        found = found.get("message", found.get("detail", found))
    return Failure(status, str(found)[:MESSAGE_LIMIT])
