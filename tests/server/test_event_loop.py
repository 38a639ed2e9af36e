"""No request keeps the event loop, and so everybody's tokens, waiting: how long it is held while a large one is served.

Bodies are made, and answers read, while nothing is measured: the client shares the interpreter with the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError
from server_stubs import MANIFEST, ByteTokenizer, Script, StubEngine, StubStream, StubTasks

from peqa_runtime.core import Request
from peqa_server.app import create_app
from peqa_server.fields.chat_schemas import ChatCompletionRequest, DetokenizeRequest
from peqa_server.fields.schemas import CompletionRequest, parse, parse_object
from peqa_server.fields.types import Strict
from peqa_server.http.json_text import json_parts
from peqa_server.openai import tokenizer_routes
from peqa_server.services import ServedModel

BOUND = 0.5  # seconds; each of these requests held the loop for more than a second

WORDS = "the quick brown fox jumps over the lazy dog. "


class CarefulTokenizer(ByteTokenizer):
    """Takes as long as a real one, and meanwhile, as a real one does, lets other threads run."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        time.sleep(0.0015 + len(text) * 3e-7)
        return super().__call__(text, add_special_tokens)


class SlowToTake(StubEngine):
    """Looks at each request for a while, in the event loop's thread."""

    seconds = 0.0

    def submit(self, request: Request) -> StubStream:
        time.sleep(self.seconds)
        return super().submit(request)


class Probed:
    """A server, and how long its event loop was held."""

    def __init__(self, url: str, loop: asyncio.AbstractEventLoop, app: FastAPI, engine: SlowToTake) -> None:
        self.loop, self.app, self.engine = loop, app, engine
        self._client = httpx.Client(base_url=url, timeout=60)

    @contextlib.contextmanager
    def held(self) -> Iterator[list[float]]:
        """Around something that the loop serves: the longest time for which it did nothing else."""
        worst = [0.0]
        over = asyncio.Event()

        async def watch() -> None:
            while not over.is_set():
                before = time.perf_counter()
                await asyncio.sleep(0.001)
                worst[0] = max(worst[0], time.perf_counter() - before - 0.001)

        watching = asyncio.run_coroutine_threadsafe(watch(), self.loop)
        time.sleep(0.02)
        try:
            yield worst
        finally:
            self.loop.call_soon_threadsafe(over.set)
            watching.result(60)

    def post(self, path: str, body: bytes) -> tuple[float, httpx.Response]:
        """How long the loop was held, and the answer; the best of three, because a busy machine holds it, too."""
        for _ in range(3):
            with self.held() as worst:
                answer = self._client.post(path, content=body)
            if worst[0] < BOUND:
                break
        return worst[0], answer


@pytest.fixture(scope="module")
def probed(run_app: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probed]:
    engine = SlowToTake()
    model = ServedModel(MANIFEST, CarefulTokenizer(), max_model_len=8192, vocab_size=257)
    app = create_app(engine, StubTasks(), model, spool_folder=tmp_path_factory.mktemp("spool"))
    gc.collect()
    gc.freeze()  # as a server does once it has loaded: looking through all that tests have loaded takes long, too
    yield Probed(*run_app(app), app, engine)
    gc.unfreeze()


def listed(item: bytes, times: int) -> bytes:
    return b"[" + b",".join([item] * times) + b"]"


def test_the_loop_is_seen_to_be_held(probed: Probed) -> None:
    with probed.held() as worst:
        probed.loop.call_soon_threadsafe(time.sleep, 0.6)
        time.sleep(0.1)
    assert worst[0] > BOUND


CHAT = "/v1/chat/completions"
HELLO = {"role": "user", "content": "hello"}
STRANGE = {f"f{i}": None for i in range(99)}
LARGE: dict[str, tuple[str, bytes, int]] = {
    "texts of tokens": ("/tokenize", json.dumps({"prompt": WORDS * 15000, "return_token_strs": True}).encode(), 200),
    "many texts": ("/v1/completions", json.dumps({"prompt": [WORDS * 90] * 600, "max_tokens": 1}).encode(), 200),
    "many lists of ids": ("/v1/completions", b'{"prompt": %s}' % listed(b"[7]", 1_500_000), 400),
    "an id that is none, after many": (
        "/v1/completions", b'{"prompt": "x", "allowed_token_ids": %s}' % listed(b'""', 1_000_000), 400,
    ),
    "messages that are none": (CHAT, b'{"messages": %s}' % listed(b"{}", 500_000), 400),
    "bad words": (
        "/v1/completions",
        json.dumps({"prompt": "x", "max_tokens": 1, "bad_words": [f"{i} {WORDS}" for i in range(512)]}).encode(), 200,
    ),
    "prompts echoed in many choices": (
        "/v1/completions",
        json.dumps({"prompt": [list(b"ab" * 1000)] * 8, "n": 32, "echo": True, "max_tokens": 1}).encode(), 200,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LARGE)
def test_large_requests_hold_nobody_up(probed: Probed, what: str) -> None:
    path, body, status = LARGE[what]
    held, answer = probed.post(path, body)
    assert answer.status_code == status, answer.text[:300]
    assert held < BOUND


@pytest.mark.parametrize(
    ("schema", "fields", "place"),
    [
        (CompletionRequest, {"prompt": "x", "allowed_token_ids": ["a"] * 99}, ("allowed_token_ids", 0)),
        (CompletionRequest, {"prompt": "x", "bad_words": ["a", 1, 2]}, ("bad_words", 1)),
        (ChatCompletionRequest, {"messages": [HELLO, {}, {}]}, ("messages", 1, "role")),
        (ChatCompletionRequest, {"messages": [STRANGE | HELLO]}, ("messages", 0, "f0")),
        (ChatCompletionRequest, {"messages": [HELLO], "tools": [{}, {}]}, ("tools", 0, "type")),
        (DetokenizeRequest, {"tokens": [1, True, "a"]}, ("tokens", 1)),
    ],
)
def test_the_first_fault_is_found_and_no_other(
    schema: type[Strict], fields: dict[str, Any], place: tuple[int | str, ...]
) -> None:
    """A million of them took ten seconds to describe, for a refusal that tells of one."""
    with pytest.raises(ValidationError) as caught:
        parse(schema, fields)
    first, *others = caught.value.errors()
    assert first["loc"] == place
    assert {error["loc"][:-1] for error in others} <= {place[:-1]}, "of the same object"
    assert len(others) < 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/completions", {"prompt": "x", "logprobs": 20}), (CHAT, {"logprobs": True, "top_logprobs": 20})],
)
def test_large_answers_hold_nobody_up(
    probed: Probed, path: str, fields: dict[str, Any], stream: bool
) -> None:
    tokens = random.Random(1).choices(range(256), k=4000)
    probed.engine.script = lambda request: Script(tokens)
    chat = {"messages": [HELLO]} if path == CHAT else {}
    interval = {"stream": True, "stream_interval": 4000} if stream else {}
    body = {**fields, **chat, **interval, "max_tokens": 4000, "n": 4}
    held, answer = probed.post(path, json.dumps(body).encode())
    assert answer.status_code == 200, answer.text[:300]
    assert len(answer.content) > 4 * 4000 * 20 * 5
    assert held < BOUND


def test_many_lists_are_read_without_looking_for_garbage() -> None:
    looks: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        looks.append(phase)

    body = b'{"a": %s}' % listed(b"[]", 200_000)
    gc.callbacks.append(note)
    try:
        assert len(parse_object(body)["a"]) == 200_000
    finally:
        gc.callbacks.remove(note)
    assert len(looks) < 10, "not hundreds"
    assert gc.isenabled()


def test_a_body_has_its_place_in_memory_until_it_is_read(
    probed: Probed, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({"prompt": "x" * 50_000}).encode()
    room = probed.app.state.gate.bodies
    taken: list[int] = []
    read = tokenizer_routes._wanted

    def slow(data: bytes) -> Any:
        taken.append(room.taken)
        return read(data)

    monkeypatch.setattr(tokenizer_routes, "_wanted", slow)
    assert probed.post("/tokenize", body)[1].status_code == 200
    assert taken == [len(body)]
    assert room.taken == 0


def test_many_choices_are_handed_over_with_pauses(probed: Probed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probed.engine, "seconds", 0.006)
    body = {"prompt": ["x"] * 300, "max_tokens": 1}
    held, answer = probed.post("/v1/completions", json.dumps(body).encode())
    assert len(answer.json()["choices"]) == 300
    assert held < BOUND


def made_up(rng: random.Random, depth: int) -> Any:
    if depth and rng.random() < 0.8:
        items = [made_up(rng, depth - 1) for _ in range(rng.choice((0, 1, 3, 30)))]
        return items if rng.random() < 0.5 else {f"ü{i}": item for i, item in enumerate(items)}
    return rng.choice((None, True, 7, -0.25, "", 'a"\u2028\\é😀', "long\n" * 2000))


def test_json_in_parts_is_the_same_text() -> None:
    rng = random.Random(3)
    values = [made_up(rng, 4) for _ in range(10)]
    values += [list(range(20_000)), [None, *({"a": [i]} for i in range(9000))], {"é": "😀" * 200_000}, []]
    for value in values:
        for ascii_only in (False, True):
            parts = list(json_parts(value, ascii_only=ascii_only))
            assert "".join(parts) == json.dumps(value, ensure_ascii=ascii_only, separators=(",", ":"))
            assert max(map(len, parts)) < 1_000_000
