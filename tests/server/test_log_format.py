"""Log lines as an operator and a program read them; nothing that a client sends can forge one."""

from __future__ import annotations

import io
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_stubs import Script, StubEngine, wait_until

from peqa_server.observe.log_format import (
    JsonFormatter,
    LogFormat,
    TextFormatter,
    event,
    set_up_logging,
    shown,
)


@pytest.fixture
def logger() -> Iterator[tuple[logging.Logger, io.StringIO, logging.Handler]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    found = logging.getLogger("peqa.test_log_format")
    found.addHandler(handler)
    found.setLevel(logging.INFO)
    found.propagate = False
    yield found, stream, handler
    found.removeHandler(handler)


def test_text_says_the_message_and_then_the_fields(logger: Any) -> None:
    log, stream, handler = logger
    handler.setFormatter(TextFormatter())
    event(log, logging.WARNING, "task set aside", task="sql", reason="NaN, three times", tokens=3, gone=None)
    assert stream.getvalue().endswith(
        'Z WARNING peqa.test_log_format  task set aside  task=sql reason="NaN, three times" tokens=3\n'
    )
    event(log, logging.DEBUG, "not at this level")
    assert stream.getvalue().count("\n") == 1


def test_json_has_every_field_beside_the_message(logger: Any) -> None:
    log, stream, handler = logger
    handler.setFormatter(JsonFormatter())
    event(log, logging.INFO, "GET /x 200", said={"status": 200}, task="sql")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("request %s failed", "id-1")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["level"], first["message"], first["status"], first["task"]) == (
        "info",
        "GET /x 200",
        200,
        "sql",
    )
    assert first["time"].endswith("Z")
    assert second["message"] == "request id-1 failed"
    assert "ValueError: two\nlines" in second["exception"]


@pytest.mark.parametrize("text", ["a b", "a\nINFO forged", 'say "x"', "esc\x1b[31m", "\u2028", "é", ""])
def test_what_is_not_plain_is_quoted(text: str) -> None:
    assert json.loads(shown(text)) == text
    assert "\n" not in shown(text)
    assert "\x1b" not in shown(text)


@pytest.mark.parametrize("text", ["sql", "127.0.0.1:8000", "/v1/tasks/sql", "a:0.5+b:0.5"])
def test_plain_words_stay(text: str) -> None:
    assert shown(text) == text


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_path_cannot_forge_a_line(server: Any, caplog: pytest.LogCaptureFixture, form: LogFormat) -> None:
    with caplog.at_level(logging.INFO, logger="peqa.access"):
        server.client.get("/x%0a2026-11-22T00:00:00Z%20INFO%20forged%1b[2J")
        wait_until(lambda: len(caplog.records) >= 1)
    (record,) = [r for r in caplog.records if r.name == "peqa.access"]
    line = (JsonFormatter() if form == "json" else TextFormatter()).format(record)
    assert "\n" not in line
    assert "\x1b" not in line
    assert "forged" in line


def test_the_access_line_has_the_times(live: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = live(StubEngine(lambda r: Script([97] * 3, delay=0.01, queued=0.03, cached=2)))
    server.tasks.upload("sql", b"SET")
    with caplog.at_level(logging.INFO, logger="peqa.access"):
        server.complete("secret", task="sql", max_tokens=3, n=2)
        server.client.put("/v1/tasks/new", content=b"SET new")
        server.client.put("/v1/tasks/bad", content=b"nonsense")
        wait_until(lambda: len(caplog.records) >= 3)
    lines = [json.loads(JsonFormatter().format(r)) for r in caplog.records if r.name == "peqa.access"]
    asked, new, bad = lines
    assert 25 < asked["queue_ms"] < asked["first_token_ms"] < asked["ms"]
    assert (asked["tokens"], asked["prompt_tokens"], asked["cached_tokens"], asked["finish"]) == (
        6,
        6,
        2,
        "length",
    )
    assert (new["change"], new["task"], len(new["revision"]), new["status"]) == ("upload", "new", 12, 200)
    assert (bad["change"], bad["task"], bad["error"], bad["status"]) == (
        "upload",
        "bad",
        "invalid_scale_set",
        422,
    )
    assert "secret" not in json.dumps(lines)


def test_the_engine_knows_a_request_by_the_clients_id(server: Any) -> None:
    for _ in range(2):  # two with one id must still be two for the engine
        server.client.post("/v1/completions", json={"prompt": "x", "n": 2}, headers={"X-Request-Id": "mine"})
    names = [request.request_id for request in server.engine.requests]
    assert len(set(names)) == 4
    assert all(name.startswith("mine/") for name in names)


def test_setting_up_gives_the_root_a_form() -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    try:
        root.handlers.clear()
        set_up_logging("warning", "json", stream)
        logging.getLogger("peqa.server").info("too quiet")
        logging.getLogger("peqa.server").warning("loud %d", 5)
        logging.getLogger("httpx").info("noise")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["loud 5"]


@pytest.mark.slow
def test_an_operator_reads_a_servers_life(tiny_base: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "peqa_server.cli", "serve", str(tiny_base), "--port", "0", "--json"]
    command += ["--store", str(tmp_path / "store"), "--home", str(tmp_path), "--log-format", "json"]
    command += ["--activation-bits", "8", "--kv-cache-dtype", "float32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        report = json.loads(process.stdout.readline())
        url = report["url"]
        assert report["activation_bits"] == 8
        assert report["kv_cache_dtype"] == "float32"
        wait_until(lambda: httpx.get(url + "/ready").status_code == 200, 10)
        httpx.put(url + "/v1/tasks/bad", content=b"no set")
        httpx.post(
            url + "/v1/completions", json={"prompt": "a b", "max_tokens": 2}, headers={"X-Request-Id": "q1"}
        )
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=30)
        assert process.returncode == 0
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert len(lines) == len(text.splitlines()), "every line of a JSON log is JSON"
    told = [line["message"] for line in lines]
    assert told[0] == "serving"
    serving = lines[0]
    assert (serving["url"], serving["device"], serving["tasks"]) == (url, "cpu", 0)
    assert serving["keys"]
    assert told[1:3] == ["PUT /v1/tasks/bad 422", "POST /v1/completions 200"]
    assert lines[2]["id"] == "q1"
    assert "draining" in told[3]
    assert (told[4], lines[4]["all_finished"]) == ("drained; the server ends", True)
