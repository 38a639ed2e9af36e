"""Server-sent events: what comes when, in which shape, and what happens when either side fails."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_stubs import MANIFEST, ByteTokenizer, Script, StubEngine, StubTasks, wait_until

from peqa_server.app import create_app
from peqa_server.services import ServedModel


def stream(server: Any, **body: Any) -> list[Any]:
    """All events of a streamed completion; the last one must be [DONE]."""
    with server.client.stream(
        "POST", "/v1/completions", json={"prompt": "hi", "stream": True} | body
    ) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def text_of(events: list[Any], index: int = 0) -> str:
    return "".join(c["text"] for e in events for c in e["choices"] if c["index"] == index)


def test_chunks_add_up_to_the_answer(server: Any) -> None:
    whole = server.complete(max_tokens=12, task="sql", seed=3)
    events = stream(server, max_tokens=12, task="sql", seed=3)
    assert text_of(events) == whole["choices"][0]["text"]
    assert len(events) == 12
    for e in events:
        assert (e["task"], e["revision"], e["object"]) == ("sql", whole["revision"], "text_completion")
        assert "usage" not in e
    assert [e["choices"][0]["finish_reason"] for e in events] == [None] * 11 + ["length"]
    assert len({e["id"] for e in events}) == 1
    wait_until(lambda: server.idle)


def test_usage_at_the_end_or_in_every_chunk(server: Any) -> None:
    events = stream(server, max_tokens=3, stream_options={"include_usage": True})
    assert [e["usage"] for e in events[:-1]] == [None] * 3
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert events[-1]["task"] == "base"
    events = stream(
        server, max_tokens=3, stream_options={"continuous_usage_stats": True, "include_usage": True}
    )
    assert [e["usage"]["completion_tokens"] for e in events] == [1, 2, 3, 3]


def test_choices_of_a_batch_interleave_by_index(server: Any) -> None:
    events = stream(server, prompt=["A", "B"], n=2, seed=1, max_tokens=8, echo=True)
    whole = server.complete(["A", "B"], n=2, seed=1, max_tokens=8, echo=True)
    for choice in whole["choices"]:
        assert text_of(events, choice["index"]) == choice["text"]


def test_no_text_is_sent_that_is_later_cut(live: Any) -> None:
    server = live(StubEngine(lambda r: Script(list(b"ab<E<EN<END>more"))))
    events = stream(server, stop=["<END>"], max_tokens=16)
    assert text_of(events) == "ab<E<EN"
    assert events[-1]["choices"][0]["stop_reason"] == "<END>"
    assert all("D" not in c["text"] for e in events for c in e["choices"])


def test_characters_are_never_halved(live: Any) -> None:
    text = "né€😀\u2028\u0085x"
    server = live(StubEngine(lambda r: Script(list(text.encode()))))
    events = stream(server, max_tokens=len(text.encode()))
    assert text_of(events) == text
    assert all("�" not in c["text"] for e in events for c in e["choices"])


def test_logprobs_and_ids_come_with_their_tokens(server: Any) -> None:
    events = stream(server, max_tokens=3, logprobs=1, echo=True, return_token_ids=True)
    whole = server.complete(max_tokens=3, logprobs=1, echo=True, return_token_ids=True)["choices"][0]
    rows = [e["choices"][0] for e in events]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [v for r in rows for v in r["logprobs"][key]] == whole["logprobs"][key]
    assert [t for r in rows for t in r["token_ids"]] == whole["token_ids"]
    assert rows[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert "prompt_token_ids" not in rows[1]


def test_tokens_come_as_they_are_made(live: Any) -> None:
    server = live(StubEngine(lambda r: Script([97] * 5, delay=0.1)))
    begin, times = time.monotonic(), []
    with httpx.stream(
        "POST",
        server.url + "/v1/completions",
        json={"prompt": "x", "stream": True, "max_tokens": 5},
        timeout=10,
    ) as answer:
        for line in answer.iter_lines():
            if line:
                times.append(time.monotonic() - begin)
    assert times[0] < 0.3
    assert times[4] - times[0] > 0.3


def test_a_client_that_leaves_is_noticed_at_once(live: Any) -> None:
    server = live(
        StubEngine(lambda r: Script([97] * 100, delay=0.001 if r.prompt_token_ids == (97,) else 5.0))
    )
    server.tasks.upload("sql", b"SET")
    for prompt in ("a", "b"):  # between two tokens, and while none comes
        with httpx.stream(
            "POST", server.url + "/v1/completions",
            json={"prompt": prompt, "stream": True, "max_tokens": 100, "task": "sql"}, timeout=10,
        ) as answer:  # fmt: skip
            assert answer.status_code == 200
        wait_until(lambda: server.idle, 1.0)
    assert len(server.engine.cancelled) >= 1


def test_a_client_that_never_reads_and_leaves(tmp_path: Path) -> None:
    """The connection takes not even the head of the answer, so no event was ever asked for."""
    engine, tasks = StubEngine(), StubTasks()
    tasks.upload("sql", b"SET")
    model = ServedModel(MANIFEST, ByteTokenizer(), max_model_len=200, vocab_size=257)
    app = create_app(engine, tasks, model, spool_folder=tmp_path)
    body = json.dumps({"prompt": "x", "stream": True, "n": 2, "task": "sql"}).encode()
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        await asyncio.Event().wait()

    path = "/v1/completions"
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [],
        "http_version": "1.1", "scheme": "http", "root_path": "",
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert len(engine.cancelled) == 2
    assert not engine.running
    assert not tasks.leases


def test_an_error_in_the_middle_is_an_event(live: Any) -> None:
    server = live(StubEngine(lambda r: Script([97, 98, 99], error="numbers were not finite")))
    events = stream(server, max_tokens=3)
    assert text_of(events[:-1]) == "ab"
    assert events[-1]["error"]["code"] == "generation_failed"
    wait_until(lambda: server.idle)


def test_refusals_before_the_stream_keep_their_status(server: Any) -> None:
    assert server.error(404, prompt="x", stream=True, task="nope")["code"] == "task_not_found"
    assert server.error(400, prompt="x", stream=True, max_tokens="x")["param"] == "max_tokens"


@pytest.mark.parametrize("stop", [["b"], ["ba", "b"], ["base"]])
def test_a_stop_at_the_first_token(server: Any, stop: list[str]) -> None:
    events = stream(server, stop=stop, max_tokens=10)
    assert text_of(events) == ""
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
