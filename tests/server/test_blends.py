"""A task as an object of weights: what is taken, what is answered, and what every wrong form says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from server_stubs import Live, StubTasks, check_error, wait_until

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_blend_is_served_and_named_in_the_answer(server: Live, stream: bool) -> None:
    body = {"prompt": "hi", "task": {"sql": 0.3, "qa": 0.7}, "max_tokens": 3, "stream": stream}
    answer = server.post(**body)
    assert answer.status_code == 200, answer.text
    if stream:
        chunks = [line for line in answer.text.split("\n\n") if line.startswith("data: {")]
        assert all('"task":{"qa":0.7,"sql":0.3}' in chunk.replace(" ", "") for chunk in chunks)
    else:
        assert answer.json()["task"] == {"qa": 0.7, "sql": 0.3}
        assert list(answer.json()["task"]) == ["qa", "sql"], "names in order"
        assert len(answer.json()["revision"]) == 64
    (request,) = server.engine.requests
    assert (request.task, len(request.revision), request.kind) == ("qa:0.7+sql:0.3", 64, "channel")
    wait_until(lambda: server.idle)


def test_chat_takes_a_blend_too(server: Live) -> None:
    answer = server.post(CHAT, messages=HELLO, task={"sql": 0.5, "qa": 0.5}, max_tokens=2)
    assert answer.json()["task"] == {"qa": 0.5, "sql": 0.5}
    assert bytes(server.engine.requests[0].prompt_token_ids) == b"Q: hello\nA:", "their common prompt format"


def test_integers_are_weights_and_a_near_sum_is_normalised(server: Live) -> None:
    assert server.complete(task={"sql": 1})["task"] == {"sql": 1.0}
    shares = server.complete(task={"sql": 0.5004, "qa": 0.5})["task"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({}, "1 to 8 tasks"),
        ({"sql": 0.5}, "must sum to 1"),
        ({"sql": -1, "qa": 2}, "greater than 0"),
        ({"sql": "1"}, "numbers as weights"),
        ({"sql": True}, "numbers as weights"),
        ({"sql": None}, "numbers as weights"),
        ({"sql": 10**400}, "sum to 1"),
        ({f"t{i}": 0.1 for i in range(10)}, "1 to 8 tasks"),
        (["sql"], "a task's name, or an object"),
        (3, "a task's name, or an object"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", CHAT])
def test_what_is_no_blend_is_a_400(server: Live, task: Any, words: str, path: str) -> None:
    body = {"messages": HELLO} if path == CHAT else {"prompt": "hi"}
    error = server.error(400, path=path, task=task, **body)
    assert words in error["message"]
    assert error["param"] == "task"
    assert server.idle


def test_nan_weights_are_no_json(server: Live) -> None:
    check_error(server.send('{"prompt": "hi", "task": {"sql": NaN}}'), 400)


def test_an_unknown_member_is_a_404_that_names_it(server: Live) -> None:
    error = server.error(404, prompt="hi", task={"sql": 0.5, "nope": 0.5})
    assert "'nope'" in error["message"]
    assert (error["code"], error["param"]) == ("task_not_found", "task")
    error = server.error(404, prompt="hi", task={"sql": 0.5, "NOT A NAME": 0.5})
    assert "'NOT A NAME'" in error["message"]


def test_a_blend_and_another_name_are_a_contradiction(server: Live) -> None:
    for other in ({"adapter_id": "sql"}, {"model": "sql"}):
        error = server.error(400, prompt="hi", task={"sql": 1.0}, **other)
        assert error["code"] == "task_conflict"
    assert server.complete(task={"sql": 1.0}, model="tiny-base")["task"] == {"sql": 1.0}


def test_all_blends_share_one_label(server: Live) -> None:
    for share in (0.1, 0.2, 0.3):
        server.complete(task={"sql": share, "qa": 1 - share})
    metrics = server.client.get("/metrics").text
    assert 'peqa_choices_finished_total{finish_reason="length",task="blend"}' in metrics
    assert 'task="qa:' not in metrics


def test_a_cold_task_delays_only_its_own_requests(live: Callable[..., Live]) -> None:
    tasks = StubTasks(load_seconds=0.0)
    server = live(tasks=tasks)
    tasks.upload("cold", b"SET cold")
    tasks.load_seconds = 1.0
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(server.post(prompt="hi", task="cold")))
    waiting.start()
    wait_until(lambda: len(tasks.leases) == 1)
    started = time.perf_counter()
    server.complete(task="base")
    assert time.perf_counter() - started < 0.5
    assert not answers
    waiting.join(10)
    assert answers[0].status_code == 200
    wait_until(lambda: server.idle)
