"""Health, readiness, metrics, models, tokenizer, keys, draining, chat, and the error shape of every route."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_stubs import (
    MANIFEST,
    ByteTokenizer,
    Script,
    StubEngine,
    StubTasks,
    check_error,
    reply,
    revision_of,
    wait_until,
)

from peqa_runtime.errors import Overloaded
from peqa_server.app import create_app, create_loading_app
from peqa_server.observe.log_format import JsonFormatter
from peqa_server.observe.metrics import Metrics
from peqa_server.services import ServedModel, Services

MODEL = ServedModel(MANIFEST, ByteTokenizer(), max_model_len=200, vocab_size=257)


def test_models(server: Any) -> None:
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [m["id"] for m in listed["data"]] == ["tiny-base", "qa", "sql"]
    sql = server.client.get("/v1/models/sql").json()
    assert sql == listed["data"][2]
    assert (sql["parent"], sql["root"], sql["object"]) == ("tiny-base", "tiny-base", "model")
    assert sql["revision"] == revision_of(b"SET sql one")
    assert server.client.get("/v1/models/tiny-base:sql").json() == sql
    assert server.client.get("/v1/models/tiny-base").json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == 200
    assert check_error(server.client.get("/v1/models/nope"), 404)["code"] == "model_not_found"
    check_error(server.client.get("/v1/models/a/b"), 404)


def test_tokenizer_routes(server: Any) -> None:
    answer = server.post("/tokenize", prompt="hé", return_token_strs=True).json()
    assert answer == {
        "count": 3,
        "max_model_len": 200,
        "tokens": [104, 195, 169],
        "token_strs": ["h", "�", "�"],
    }
    assert server.post("/detokenize", tokens=[104, 195, 169]).json() == {"prompt": "hé"}
    assert server.error(400, path="/detokenize", tokens=[999])["param"] == "tokens"
    assert server.error(400, path="/detokenize", tokens="x")["param"] == "tokens"
    assert server.error(400, path="/tokenize", prompt=5)["param"] == "prompt"
    assert server.error(400, path="/tokenize", prompt="x", extra=5)["param"] == "extra"


def test_every_refusal_has_the_shape(server: Any) -> None:
    check_error(server.client.get("/no/such/route"), 404)
    check_error(server.client.get("/v1/completions"), 405)
    check_error(server.client.put("/v1/completions"), 405)
    check_error(server.client.post("/v1/tasks"), 405)
    assert server.client.get("/v1/completions").headers["allow"] == "POST"
    wrong_method = server.client.post("/v1/tasks/sql")
    assert wrong_method.headers["allow"] == "DELETE, GET, HEAD, PUT"
    assert "DELETE, GET, HEAD, PUT" in check_error(wrong_method, 405)["message"]
    assert len(server.error(400, prompt=[10**4000])["message"]) <= 1000
    check_error(server.client.get("/v1/models/"), 404)


def test_chat_on_the_base_uses_the_template(server: Any) -> None:
    server.engine.script = lambda r: Script(list(b"ok"))
    answer = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], logprobs=True,
                         top_logprobs=1).json()  # fmt: skip
    assert bytes(server.engine.requests[0].prompt_token_ids) == b"[user]hi[assistant]"
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "ok"}
    content = answer["choices"][0]["logprobs"]["content"]
    assert [c["token"] for c in content] == ["o", "k"]
    assert content[0]["bytes"] == [111]
    assert content[0]["top_logprobs"] == [{"token": "o", "logprob": -0.5, "bytes": [111]}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    server.post("/v1/chat/completions", messages=parts)
    assert bytes(server.engine.requests[1].prompt_token_ids) == b"[user]ab[assistant]"


def test_chat_on_a_task_uses_its_prompt_format(server: Any) -> None:
    answer = server.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hi"}],
        task="sql",
        max_completion_tokens=5,
    ).json()
    assert bytes(server.engine.requests[0].prompt_token_ids) == b"Q: hi\nA:"
    assert (answer["task"], answer["usage"]["completion_tokens"]) == ("sql", 5)
    two = [{"role": "user", "content": "hi"}, {"role": "user", "content": "ho"}]
    assert server.error(400, path="/v1/chat/completions", messages=two, task="sql")["param"] == "messages"


def test_chat_streams_deltas(server: Any) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 4}
    text = server.post("/v1/chat/completions", **body).text
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"]["content"] for e in events[1:]) == "base"
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("field", "value"),
    [("messages", "x"), ("messages", []), ("messages", [{"role": 5}]), ("messages", [{"content": "x"}]),
     ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
     ("messages", [{"role": "user", "content": [{"type": "audio", "text": "x"}]}]),
     ("tools", [{"type": "function"}]), ("top_logprobs", 3), ("max_completion_tokens", "x"), ("prompt", "x")],
    ids=lambda v: str(v)[:30],
)  # fmt: skip
def test_chat_names_wrong_fields(server: Any, field: str, value: Any) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]} | {field: value}
    assert server.error(400, path="/v1/chat/completions", **body)["param"].startswith(field)


def test_metrics_count_and_stay_bounded(server: Any) -> None:
    def value(line: str) -> float:
        text = server.client.get("/metrics").text
        return sum(float(row.rsplit(" ", 1)[1]) for row in text.splitlines() if row.startswith(line))

    sql = 'peqa_generation_tokens_total{task="sql"}'
    before = value(sql)
    server.complete(task="sql", max_tokens=7)
    assert value(sql) == before + 7
    assert value('peqa_time_to_first_token_seconds_count{task="sql"}') >= 1
    assert value("peqa_kv_blocks_used ") == 3
    assert value("peqa_requests_running ") == 0
    assert value("peqa_engine_steps_total ") == 7
    prompts = 'peqa_prompt_tokens_total{task="sql"}'
    before = value(prompts)
    server.engine.refuse = Overloaded("100 requests wait already", retry_after=3)
    server.error(429, prompt="abc", task="sql")
    server.engine.refuse = None
    server.complete("abc", task="sql", n=2)
    assert value(prompts) == before + 3, "a prompt counts once, a refused one not at all"
    for i in range(3):
        server.client.get(f"/no/such/{i}")
        server.client.get(f"/v1/tasks/nope{i}")
    text = server.client.get("/metrics").text
    assert "nope" not in text
    assert "/no/such" not in text
    assert value('peqa_http_requests_total{method="GET",route="unmatched",status="404"}') >= 3
    assert value('peqa_http_requests_total{method="GET",route="/v1/tasks/{task:path}",status="404"}') >= 3
    assert value('peqa_rejections_total{code="task_not_found"}') >= 3
    metrics = Metrics(max_tasks=2)
    assert [metrics.task_label(t) for t in ("a", "b", "c", "a")] == ["a", "b", "other", "a"]


def test_version(server: Any) -> None:
    answer = server.client.get("/version").json()
    assert answer["version"]
    assert answer["model"] == "tiny-base"


def test_the_log_has_one_line_per_request_and_no_prompt(
    server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="peqa.access"):
        server.complete("my secret", task="sql", max_tokens=3)
        wait_until(lambda: len(caplog.records) >= 1)
    (record,) = [r for r in caplog.records if r.name == "peqa.access"]
    line = json.loads(JsonFormatter().format(record))
    assert (line["path"], line["status"], line["task"], line["tokens"]) == ("/v1/completions", 200, "sql", 3)
    assert (line["prompt_tokens"], len(line["id"]), line["client"]) == (9, 32, "127.0.0.1")
    assert line["ms"] >= line["first_token_ms"] > 0
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="peqa.access"):
        server.error(404, prompt="my secret", task="nope")
        server.error(400, prompt="my secret", max_tokens="x")
        wait_until(lambda: len(caplog.records) >= 2)
    lines = [json.loads(JsonFormatter().format(r)) for r in caplog.records if r.name == "peqa.access"]
    assert [(x["error"], x["param"], x.get("task")) for x in lines] == [
        ("task_not_found", "task", "nope"),
        ("invalid_type", "max_tokens", None),
    ]
    assert "secret" not in caplog.text


def test_a_dead_engine_is_unhealthy(live: Any) -> None:
    server = live()
    assert server.client.get("/health").json() == {"status": "ready"}
    server.engine.alive = False
    check_error(server.client.get("/health"), 503)
    check_error(server.client.get("/ready"), 503)


def test_before_the_model_is_loaded(run_app: Any, tmp_path: Path) -> None:
    app = create_loading_app()
    url, loop = run_app(app)
    assert httpx.get(url + "/health").json() == {"status": "starting"}
    for answer in (
        httpx.get(url + "/ready"),
        httpx.post(url + "/v1/completions", json={"prompt": "x"}),
        httpx.get(url + "/v1/models"),
        httpx.put(url + "/v1/tasks/t", content=b"SET"),
    ):
        check_error(answer, 503)
        assert answer.headers["retry-after"]
    loop.call_soon_threadsafe(app.state.gate.open, Services(StubEngine(), StubTasks(), MODEL, tmp_path))
    wait_until(lambda: httpx.get(url + "/ready").status_code == 200)
    loop.call_soon_threadsafe(app.state.gate.fail, "the folder is not a base")
    wait_until(lambda: httpx.get(url + "/health").status_code == 503)
    assert "not a base" in httpx.get(url + "/health").json()["error"]["message"]


def test_draining_refuses_the_new_and_finishes_the_running(live: Any) -> None:
    server = live(StubEngine(lambda r: Script([97] * 10, delay=0.05)))
    answers: list[Any] = []
    running = threading.Thread(target=lambda: answers.append(server.complete(max_tokens=10)))
    running.start()
    wait_until(lambda: len(server.engine.running) == 1)
    drained = asyncio.run_coroutine_threadsafe(server.app.state.gate.drain(5.0), server.loop)
    wait_until(lambda: server.client.get("/ready").status_code == 503)
    refusal = server.post(prompt="x")
    assert check_error(refusal, 503)["code"] == "draining"
    assert refusal.headers["retry-after"]
    assert drained.result(5)
    running.join()
    assert answers[0]["usage"]["completion_tokens"] == 10
    assert server.client.get("/health").json() == {"status": "draining"}


def test_draining_lets_an_upload_finish(live: Any) -> None:
    server = live()
    came = threading.Event()

    def body() -> Any:
        yield b"SET "
        came.wait(5)
        yield b"late"

    answers: list[Any] = []
    uploading = threading.Thread(
        target=lambda: answers.append(httpx.put(server.url + "/v1/tasks/t", content=body(), timeout=10))
    )
    uploading.start()
    wait_until(lambda: bool(list(server.spool.iterdir())))
    drained = asyncio.run_coroutine_threadsafe(server.app.state.gate.drain(5.0), server.loop)
    wait_until(lambda: server.client.get("/ready").status_code == 503)
    assert check_error(server.client.put("/v1/tasks/t", content=b"SET"), 503)["code"] == "draining"
    assert not drained.done()
    came.set()
    assert drained.result(5)
    uploading.join()
    assert answers[0].json()["revision"] == revision_of(b"SET late")


def test_draining_gives_up_in_time(live: Any) -> None:
    server = live(StubEngine(lambda r: Script([97], delay=1.0)))
    threading.Thread(target=lambda: server.post(prompt="x"), daemon=True).start()
    wait_until(lambda: len(server.engine.running) == 1)
    begin = time.monotonic()
    drained = asyncio.run_coroutine_threadsafe(server.app.state.gate.drain(0.2), server.loop)
    assert drained.result(5) is False
    assert time.monotonic() - begin < 2


def test_two_apps_share_nothing(live: Any) -> None:
    one, two = live(StubEngine(reply)), live(StubEngine(reply))
    one.tasks.upload("only-here", b"SET")
    one.complete(task="only-here", max_tokens=2)
    two.error(404, prompt="x", task="only-here")
    assert "only-here" in one.client.get("/metrics").text
    assert "only-here" not in two.client.get("/metrics").text


def test_importing_makes_no_app() -> None:
    import peqa_server.app

    assert not [name for name, value in vars(peqa_server.app).items() if type(value).__name__ == "FastAPI"]
    assert create_app(StubEngine(), StubTasks(), MODEL, spool_folder=Path()) is not create_app(
        StubEngine(), StubTasks(), MODEL, spool_folder=Path()
    )
