"""Several tenants on one server: each sees, uses and changes what its key names, and nothing tells it of the rest."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from key_stubs import bearer, key, text_of, write_keys
from server_stubs import Script, StubEngine, check_error, revision_of, wait_until

from peqa_runtime.errors import UnknownTask
from peqa_server.settings import ServerSettings

SECRET = "zeta-secret"  # the other tenant's task, which user and uploader must never read of


@pytest.fixture(scope="module")
def guarded(start: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_keys(
        tmp_path_factory.mktemp("keys") / "keys.json",
        key("user", "user", "acme-*"),
        key("taskless", "user", "acme-*", base=False),
        key("uploader", "uploader", "acme-*", tenant="acme"),
        key("admin", "admin"),
        key("vip", "user", "*", highest_priority=-10),
    )
    return start(settings=ServerSettings(key_file=path))


@pytest.fixture
def server(guarded: Any) -> Iterator[Any]:
    guarded.tasks.__init__()
    guarded.engine.__init__()
    guarded.tasks.upload("acme-sql", b"SET sql one")
    guarded.tasks.upload("acme-qa", b"SET qa one")
    guarded.tasks.upload(SECRET, b"SET secret one")
    yield guarded
    wait_until(lambda: guarded.idle)


def complete(server: Any, who: str, **body: Any) -> httpx.Response:
    answer: httpx.Response = server.client.post(
        "/v1/completions", json={"prompt": "hi", "max_tokens": 3} | body, headers=bearer(who)
    )
    return answer


def get(server: Any, who: str, path: str) -> httpx.Response:
    answer: httpx.Response = server.client.get(path, headers=bearer(who))
    return answer


FORMS: list[dict[str, Any]] = [
    {"task": "NAME"},
    {"model": "NAME"},
    {"model": "base:NAME"},
    {"model": "tiny-base:NAME"},
    {"adapter_id": "NAME"},
    {"task": {"NAME": 1.0}},
    {"task": {"acme-sql": 0.5, "NAME": 0.5}},
    {"task": {"NAME": 0.5, "base": 0.5}},
    {"task": "NAME@" + revision_of(b"SET secret one")[:8]},
    {"model": "NAME@" + revision_of(b"SET secret one")[:8]},
]


def named(form: Any, name: str) -> Any:
    return json.loads(json.dumps(form).replace("NAME", name))


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_spelling_of_a_task_gets_past_the_globs(server: Any, form: dict[str, Any], path: str) -> None:
    """What may not be used and what does not exist have one answer, letter for letter."""
    server.tasks.load_seconds = 0.0
    told = []
    for name in (SECRET, "zeta-unheard"):
        answer = server.client.post(path, json=BODIES[path] | named(form, name), headers=bearer("user"))
        told.append(json.dumps(check_error(answer, 404)).replace(name, "NAME"))
    assert told[0] == told[1]
    assert not server.engine.requests
    assert not server.tasks.leases


def test_hidden_and_missing_tasks_answer_alike_on_every_route(server: Any) -> None:
    for who in ("user", "uploader"):
        for path in ("/v1/tasks/NAME", "/v1/tasks/NAME/revisions", "/v1/tasks/NAME/content", "/v1/models/NAME",
                     "/v1/models/base:NAME"):  # fmt: skip
            if who == "user" and path.endswith("content"):
                continue
            told = []
            for name in (SECRET, "zeta-unheard"):
                answer = get(server, who, path.replace("NAME", name))
                told.append(json.dumps(check_error(answer, 404)).replace(name, "NAME"))
            assert told[0] == told[1]
            assert get(server, "admin", path.replace("NAME", SECRET)).status_code == 200


def test_a_missing_task_is_told_without_naming_others(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's own sentence lists the tasks that there are."""

    def info(task: str) -> Any:
        raise UnknownTask(f"there is no task {task!r} in the store; known: {SECRET}")

    monkeypatch.setattr(server.tasks, "info", info)
    for answer in (get(server, "user", "/v1/tasks/acme-no"), complete(server, "user", task="acme-no"),
                   complete(server, "user", task={"acme-no": 0.5, "acme-nope": 0.5}),
                   server.client.delete("/v1/tasks/acme-no", headers=bearer("uploader")),
                   server.client.post("/v1/tasks/acme-no/rollback", headers=bearer("uploader"))):  # fmt: skip
        assert SECRET not in answer.text
        assert check_error(answer, 404)


def test_what_is_allowed_works(server: Any) -> None:
    for form in FORMS[:7]:
        assert complete(server, "user", **named(form, "acme-qa")).status_code == 200
    revision = revision_of(b"SET qa one")
    assert complete(server, "user", task={"acme-sql": 0.5, "base": 0.5}).status_code == 200
    assert complete(server, "user").json()["task"] == "base"
    assert complete(server, "admin", task=SECRET).status_code == 200
    assert get(server, "user", "/v1/tasks/acme-qa").json()["revision"] == revision
    client = openai.OpenAI(base_url=server.url + "/v1", api_key=text_of("user"), max_retries=0)
    assert client.completions.create(model="acme-sql", prompt="x", max_tokens=2).choices[0].text
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=SECRET, prompt="x")


def test_the_base_is_a_right_of_its_own(server: Any) -> None:
    for body in ({}, {"model": "tiny-base"}, {"task": "base"}, {"task": {"base": 0.5, "acme-sql": 0.5}}):
        answer = complete(server, "taskless", **body)
        assert check_error(answer, 403)["code"] == "task_not_allowed"
        assert "acme-*" in answer.text
    assert complete(server, "taskless", task="acme-sql").status_code == 200
    assert [m["id"] for m in get(server, "taskless", "/v1/models").json()["data"]] == ["acme-qa", "acme-sql"]


def test_lists_show_what_may_be_used(server: Any) -> None:
    for i in range(5):
        server.tasks.upload(f"between-{i}", b"SET")
    server.tasks.set_aside = {SECRET: "three times NaN"}
    tasks = get(server, "user", "/v1/tasks").json()
    assert [t["task"] for t in tasks["data"]] == ["acme-qa", "acme-sql"]
    assert tasks["unusable"] == []
    assert get(server, "admin", "/v1/tasks").json()["unusable"]
    assert [m["id"] for m in get(server, "user", "/v1/models").json()["data"]] == [
        "tiny-base",
        "acme-qa",
        "acme-sql",
    ]
    page = get(server, "user", "/v1/tasks?limit=1").json()
    assert ([t["task"] for t in page["data"]], page["has_more"]) == (["acme-qa"], True)
    page = get(server, "user", "/v1/tasks?limit=1&after=acme-qa").json()
    assert ([t["task"] for t in page["data"]], page["has_more"]) == (["acme-sql"], False)
    assert len(get(server, "admin", "/v1/tasks").json()["data"]) == 8


def test_a_list_longer_than_a_page_is_whole(server: Any) -> None:
    for i in range(1200):
        server.tasks.history[f"a{i:04d}"] = [b"SET"]
        if i % 3 == 0:
            server.tasks.history[f"acme-{i:04d}"] = [b"SET"]
    listed = [t["task"] for t in get(server, "user", "/v1/tasks").json()["data"]]
    assert listed == sorted(name for name in server.tasks.history if name.startswith("acme-"))
    assert len(get(server, "user", "/v1/tasks?limit=300").json()["data"]) == 300


def test_an_uploader_changes_its_own_tasks_alone(server: Any) -> None:
    put = server.client.put
    assert put("/v1/tasks/acme-new", content=b"SET new", headers=bearer("uploader")).status_code == 200
    assert put("/v1/tasks/acme-new", content=b"SET newer", headers=bearer("uploader")).status_code == 200
    rolled = server.client.post("/v1/tasks/acme-new/rollback", headers=bearer("uploader")).json()
    assert rolled["revision"] == revision_of(b"SET new")
    assert get(server, "uploader", "/v1/tasks/acme-new/content").content == b"SET new"
    before = dict(server.tasks.history)
    told = []
    for name in (SECRET, "zeta-unheard"):
        for answer in (
            put(f"/v1/tasks/{name}", content=b"SET mine", headers=bearer("uploader")),
            server.client.post(f"/v1/tasks/{name}/rollback", headers=bearer("uploader")),
            server.client.delete(f"/v1/tasks/{name}", headers=bearer("uploader")),
        ):
            error = check_error(answer, 403)
            assert (error["code"], "acme-*" in error["message"]) == ("task_not_allowed", True)
            told.append(error["message"].replace(name, "NAME"))
    assert len(set(told)) == 1
    assert server.tasks.history == before
    assert server.client.delete("/v1/tasks/acme-new", headers=bearer("uploader")).status_code == 200


def test_priority_goes_down_alone(server: Any) -> None:
    assert complete(server, "user", priority=5).status_code == 200
    error = check_error(complete(server, "user", priority=-1), 403)
    assert (error["param"], error["code"]) == ("priority", "priority_not_allowed")
    assert complete(server, "vip", priority=-10).status_code == 200
    check_error(complete(server, "vip", priority=-11), 403)
    assert [r.priority for r in server.engine.requests] == [5, -10]


def test_cache_salts_come_from_the_key(server: Any) -> None:
    for who, salt in (("user", None), ("user", "x"), ("vip", None), ("vip", "x"), ("user", "x")):
        assert complete(server, who, **({} if salt is None else {"cache_salt": salt})).status_code == 200
    salts = [r.cache_salt for r in server.engine.requests]
    assert len(set(salts[:4])) == 4
    assert salts[4] == salts[1]
    stolen = complete(server, "vip", cache_salt=salts[0])
    assert stolen.status_code == 200
    assert server.engine.requests[-1].cache_salt not in salts, (
        "another tenant's salt, even if known, is not taken over"
    )
    assert check_error(complete(server, "user", cache_salt="x" * 257), 400)["param"] == "cache_salt"


def test_without_keys_the_body_salts(start: Any) -> None:
    server = start()
    server.complete(cache_salt="mine")
    server.complete()
    assert [r.cache_salt for r in server.engine.requests] == ["mine", ""]


def limited(start: Any, path: Path, engine: Any = None, **limits: Any) -> Any:
    keys = write_keys(path / "keys.json", key("alice", "uploader", "acme-*", **limits), key("admin", "admin"))
    server = start(engine=engine, settings=ServerSettings(key_file=keys))
    server.tasks.upload("acme-sql", b"SET sql one")
    return server


def test_request_rate(start: Any, tmp_path: Path) -> None:
    server = limited(start, tmp_path, requests_per_minute=3)
    for left in (2, 1, 0):
        answer = get(server, "alice", "/v1/models")
        assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (200, str(left))
    for answer in (
        get(server, "alice", "/v1/models"),
        complete(server, "alice"),
        get(server, "alice", "/no/such"),
    ):
        error = check_error(answer, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "request_rate_limit")
        assert 0 < int(answer.headers["retry-after"]) <= 20
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
    assert get(server, "admin", "/v1/models").status_code == 200
    client = openai.OpenAI(base_url=server.url + "/v1", api_key=text_of("alice"), max_retries=0)
    with pytest.raises(openai.RateLimitError):
        client.models.list()


@pytest.mark.parametrize("stream", [False, True])
def test_token_rate(start: Any, tmp_path: Path, stream: bool) -> None:
    server = limited(start, tmp_path, tokens_per_minute=600)
    first = complete(server, "alice", prompt="x" * 90, max_tokens=60, stream=stream)
    assert first.status_code == 200
    assert int(first.headers["x-ratelimit-limit-tokens"]) == 600
    left = 600 - 90 - 60
    assert left <= int(get(server, "alice", "/version").headers["x-ratelimit-remaining-tokens"]) <= left + 30
    for _ in range(3):
        complete(server, "alice", prompt="x", max_tokens=190, stream=stream)
    answer = complete(server, "alice")
    assert check_error(answer, 429)["code"] == "token_rate_limit"
    assert answer.headers["x-ratelimit-remaining-tokens"] == "0"
    assert complete(server, "admin").status_code == 200


def test_places_are_given_back_however_a_request_ends(start: Any, tmp_path: Path) -> None:
    engine = StubEngine(lambda r: Script([97] * 200, delay=0.02))
    server = limited(start, tmp_path, engine, concurrent=2)
    alone = check_error(complete(server, "alice", n=3), 400)
    assert "alone asks for 3" in alone["message"]
    with httpx.stream("POST", server.url + "/v1/completions", headers=bearer("alice"), timeout=10,
                      json={"prompt": "x", "max_tokens": 150, "n": 2, "stream": True}) as stream:  # fmt: skip
        lines = stream.iter_lines()  # kept: the connection is closed with it
        next(lines)
        busy = complete(server, "alice")
        assert check_error(busy, 429)["code"] == "concurrency_limit"
        assert busy.headers["retry-after"] == "1"
        assert check_error(
            server.client.put("/v1/tasks/acme-x", content=b"SET", headers=bearer("alice")), 429
        )
        assert complete(server, "admin", max_tokens=1).status_code == 200
    wait_until(lambda: complete(server, "alice", max_tokens=1).status_code == 200)
    for script in (Script([97], error="broken"), Script([97] * 2, dies=True)):
        engine.script = lambda r, script=script: script
        for _ in range(3):
            assert complete(server, "alice").status_code >= 500
    engine.script = lambda r: Script([97] * 3)
    assert complete(server, "alice", n=2).status_code == 200
    engine.refuse = UnknownTask("gone meanwhile")
    for _ in range(3):
        complete(server, "alice")
    engine.refuse = None
    assert complete(server, "alice", n=2).status_code == 200
    text = get(server, "admin", "/metrics").text
    assert 'peqa_key_running{key="alice"} 0.0' in text


def test_an_upload_takes_a_place(start: Any, tmp_path: Path) -> None:
    server = limited(start, tmp_path, concurrent=1)
    server.tasks.upload_seconds = 0.5
    answers: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: answers.append(
            httpx.put(server.url + "/v1/tasks/acme-x", content=b"SET", headers=bearer("alice"))
        )
    )
    thread.start()
    wait_until(lambda: 'peqa_key_running{key="alice"} 1.0' in get(server, "admin", "/metrics").text)
    assert check_error(complete(server, "alice"), 429)
    thread.join()
    assert answers[0].status_code == 200
    assert complete(server, "alice").status_code == 200


def test_limits_change_while_the_server_runs(start: Any, tmp_path: Path) -> None:
    server = limited(start, tmp_path, requests_per_minute=1)
    assert get(server, "alice", "/version").status_code == 200
    check_error(get(server, "alice", "/version"), 429)
    write_keys(tmp_path / "keys.json", key("alice", "user", "other-*"), key("admin", "admin"))
    wait_until(lambda: get(server, "alice", "/version").status_code == 200, 2.0)
    check_error(complete(server, "alice", task="acme-sql"), 404)
    check_error(server.client.put("/v1/tasks/other-x", content=b"SET", headers=bearer("alice")), 403)


def test_the_log_and_the_metrics_name_the_key_never_its_text(
    start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = limited(start, tmp_path, requests_per_minute=5)
    with caplog.at_level(logging.DEBUG):
        assert complete(server, "alice", task="acme-sql").status_code == 200
        complete(server, "alice", task="nope")
        get(server, "alice", f"/v1/tasks/{text_of('alice')}")
        server.client.get("/v1/models", headers={"Authorization": "Bearer peqa_almost_a_key"})
        for _ in range(4):
            get(server, "alice", "/version")
        wait_until(lambda: sum(r.name == "peqa.access" for r in caplog.records) >= 8)
    fields = [getattr(r, "fields", {}) for r in caplog.records if r.name == "peqa.access"]
    alice = key("alice").id
    assert [f.get("key") for f in fields].count(alice) == 7
    said = "".join(
        r.getMessage() + repr(getattr(r, "fields", "")) for r in caplog.records if r.name.startswith("peqa")
    )
    assert "peqa_almost_a_key" not in said
    assert f"Bearer {text_of('alice')}" not in said
    text = get(server, "admin", "/metrics").text
    assert 'peqa_key_requests_total{key="alice"} 7.0' in text
    assert 'peqa_key_tokens_total{key="alice",kind="prompt"} 2.0' in text
    assert 'peqa_key_tokens_total{key="alice",kind="generated"} 3.0' in text
    assert 'peqa_key_refusals_total{code="request_rate_limit",key="alice"} 2.0' in text
    assert 'peqa_key_refusals_total{code="task_not_found",key="alice"} 2.0' in text
    assert "peqa_test_" not in text


def test_time_tells_nothing_of_a_hidden_task(server: Any) -> None:
    """A set that would have to come from disk is not even looked for."""
    server.tasks.load_seconds = 0.3
    began = time.perf_counter()
    check_error(complete(server, "user", task=SECRET), 404)
    assert time.perf_counter() - began < 0.25
    server.tasks.load_seconds = 0.0
