"""A byte tokenizer, an engine that replays scripts and tasks in memory: the HTTP side alone, in milliseconds."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from peqa_runtime.constraint import Constraint
from peqa_runtime.core import (
    NO_TASK,
    BaseManifest,
    Blend,
    Lease,
    LinearShape,
    Request,
    RevisionInfo,
    TaskInfo,
    TokenLogprobs,
    TokenOutput,
)
from peqa_runtime.errors import EngineDead, InvalidScaleSet, NoSuchRevision, RevisionConflict, UnknownTask

EOS = 256
DIGEST = "0123456789abcdef" * 4


class ByteTokenizer:
    """Ids 0–255 are bytes, 256 is end-of-sequence."""

    chat_template = "yes"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def __len__(self) -> int:
        return 257

    def decode(self, ids: list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        text = b"".join(bytes([i]) if i < 256 else b"" if skip_special_tokens else b"</s>" for i in ids)
        return text.decode("utf-8", "replace")

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return f"<0x{token_id:02X}>"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        text = "".join(f"[{m['role']}]{m['content']}" for m in messages)
        return text + ("[assistant]" if options["add_generation_prompt"] else "")


@dataclass
class Script:
    """What the engine says to a request: seconds in its queue, tokens, seconds between them, and how it ends."""

    tokens: list[int]
    delay: float = 0.0
    ends_with_eos: bool = False
    error: str | None = None
    dies: bool = False
    cached: int = 0
    queued: float = 0.0


def reply(request: Request) -> Script:
    """Default: the task's revision and the seed, then the alphabet for ever."""
    head = (
        f"{request.revision[:4] or 'base'}:{request.params.seed if request.params.seed is not None else '-'}:"
    )
    return Script(list((head + "abcdefghijklmnopqrstuvwxyz" * 100).encode()))


class StubStream:
    def __init__(self, engine: StubEngine, request: Request, script: Script) -> None:
        self.engine, self.request, self.script = engine, request, script
        self.cancelled = False

    def cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            self.engine.cancelled.append(self.request)
            self.engine.running.discard(self.request.request_id)

    async def __aiter__(self) -> AsyncIterator[TokenOutput]:
        request, params, script = self.request, self.request.params, self.script
        await asyncio.sleep(script.queued)
        started = time.perf_counter()
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            rest = [
                replace(_logprobs(t, params.prompt_logprobs), rank=1) for t in request.prompt_token_ids[1:]
            ]
            prompt_logprobs = (None, *rest)
        if params.max_tokens == 0:
            self.engine.running.discard(request.request_id)
            yield TokenOutput(request.request_id, finish_reason="length", prompt_logprobs=prompt_logprobs)
            return
        tokens = script.tokens[: params.max_tokens]
        if script.ends_with_eos:
            tokens = [*tokens[: params.max_tokens - 1], EOS]
        for i, token in enumerate(tokens):
            await asyncio.sleep(script.delay)
            if self.cancelled:
                return
            if not self.engine.alive:
                yield TokenOutput(request.request_id, finish_reason="abort")
                return
            reason = None
            if i == len(tokens) - 1:
                if script.dies:
                    raise EngineDead("the engine stopped: stub")
                reason = "stop" if token == EOS else "error" if script.error else "length"
                self.engine.running.discard(request.request_id)
            yield TokenOutput(
                request.request_id,
                token_id=token if reason != "error" else None,
                logprobs=_logprobs(token, params.logprobs) if params.logprobs is not None else None,
                finish_reason=reason,  # type: ignore[arg-type]
                prompt_logprobs=prompt_logprobs if i == 0 else None,
                error=script.error if reason == "error" else None,
                num_cached_tokens=script.cached,
                started=started,
            )


def _logprobs(token: int, count: int) -> TokenLogprobs:
    top = [((token + i) % 256, -0.5 - i) for i in range(max(1, count))]
    return TokenLogprobs(token, -0.5, tuple(top[:count]))


class StubEngine:
    def __init__(self, script: Callable[[Request], Script] = reply) -> None:
        self.script = script
        self.alive = True
        self.requests: list[Request] = []
        self.cancelled: list[Request] = []
        self.running: set[str] = set()
        self.reserved: list[tuple[str, int]] = []  # task, choices
        self.refuse: Exception | None = None
        self.failure: str | None = None

    def reserve(self, task: str, choices: int) -> SimpleNamespace:
        self.reserved.append((task, choices))
        if self.refuse is not None:
            raise self.refuse
        return SimpleNamespace(release=lambda: None)

    def prepare(self, constraint: Constraint) -> Future[None]:
        ready: Future[None] = Future()
        ready.set_result(None)
        return ready

    def submit(self, request: Request) -> StubStream:
        if self.refuse is not None:
            raise self.refuse
        assert request.request_id not in self.running
        self.requests.append(request)
        self.running.add(request.request_id)
        return StubStream(self, request, self.script(request))

    def stats(self) -> dict[str, float]:
        return {
            "requests_running": len(self.running),
            "requests_waiting": 0,
            "kv_blocks_used": 3,
            "kv_blocks": 12,
            "kv_block_tokens": 16,
            "task_rows": 8,
            "steps_total": 7,
            "rejected_total": 2,
        }

    def tasks_in_work(self) -> tuple[dict[str, int], dict[str, int]]:
        names = [r.task for r in self.requests if r.request_id in self.running]
        return {name: names.count(name) for name in names}, {}

    def stop(self, drain_seconds: float = 0.0) -> None:
        self.alive = False


@dataclass
class StubTasks:
    """Tasks in memory. A valid file starts with b"SET"; its revision is its SHA-256."""

    history: dict[str, list[bytes]] = field(default_factory=dict)
    leases: list[Lease] = field(default_factory=list)
    upload_seconds: float = 0.0
    set_aside: dict[str, str] = field(default_factory=dict)
    load_seconds: float = 0.0

    def acquire_soon(self, choice: str | Blend) -> Future[Lease]:
        """At once, or after `load_seconds`."""
        if isinstance(choice, Blend):
            infos = [self.info(task) for task, _ in choice.shares if task != "base"]
            revision = hashlib.sha256(repr(choice).encode()).hexdigest()
            lease = Lease(choice.name, revision, "channel", infos[0].prompt_format, choice)
        else:
            info = self.info(choice)
            lease = Lease(choice, info.revision, info.kind, info.prompt_format)
        self.leases.append(lease)
        future: Future[Lease] = Future()

        def arrive() -> None:
            time.sleep(self.load_seconds)
            if future.set_running_or_notify_cancel():
                future.set_result(lease)
            else:
                self.leases.remove(lease)

        if self.load_seconds:
            threading.Thread(target=arrive).start()
        else:
            arrive()
        return future

    def has(self, task: str) -> bool:
        return bool(self.history.get(task))

    def release(self, lease: Lease) -> None:
        self.leases.remove(lease)

    def upload(self, task: str, data: bytes | Path, if_match: str | None = None) -> TaskInfo:
        time.sleep(self.upload_seconds)
        content = data.read_bytes() if isinstance(data, Path) else data
        if not content.startswith(b"SET"):
            raise InvalidScaleSet("the file is not a scale set: it must start with SET")
        now = self.info(task).revision if self.history.get(task) else None
        if if_match is not None and if_match != (now or NO_TASK):
            raise RevisionConflict(f"the current revision is {now}, not {if_match}")
        self.history.setdefault(task, []).append(content)
        return self.info(task)

    def rollback(self, task: str, revision: str | None = None, if_match: str | None = None) -> TaskInfo:
        self._check(task, if_match)
        if len(self.history[task]) < 2:
            raise NoSuchRevision(f"task {task!r} has no earlier revision")
        self.history[task].pop()
        while revision not in (None, self.info(task).revision):
            self.history[task].pop()
        return self.info(task)

    def delete(self, task: str, if_match: str | None = None) -> None:
        self._check(task, if_match)
        del self.history[task]

    def info(self, task: str) -> TaskInfo:
        if not self.history.get(task):
            raise UnknownTask(f"no task {task!r} is served here; GET /v1/tasks lists them")
        content = self.history[task][-1]
        return TaskInfo(task, revision_of(content), "channel", len(content), 1.5, DIGEST, "Q: {prompt}\nA:")

    def _check(self, task: str, if_match: str | None) -> None:
        if if_match not in (None, self.info(task).revision):
            raise RevisionConflict(f"the current revision is not {if_match}")

    def quarantined(self) -> dict[str, str]:
        return self.set_aside

    def unusable(self) -> dict[str, str]:
        return {"foreign": "belongs to another base"}

    def page(self, after: str = "", limit: int | None = None) -> list[Any]:
        names = [task for task in sorted(self.history) if task > after]
        return [self.info(task) for task in names[:limit]]

    def close(self) -> None:
        pass

    def revisions(self, task: str) -> list[RevisionInfo]:
        self.info(task)
        rows = [RevisionInfo(revision_of(c), "channel", len(c), 1.5, False) for c in self.history[task]]
        return rows[::-1]

    def content(self, task: str, revision: str | None = None) -> bytes:
        self.info(task)
        for content in self.history[task][::-1]:
            if revision in (None, revision_of(content)):
                return content
        raise NoSuchRevision(f"task {task!r} keeps no revision {revision}")


def revision_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


MANIFEST = BaseManifest("tiny-base", DIGEST, {"model.q": LinearShape(8, 4, 2)})


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
