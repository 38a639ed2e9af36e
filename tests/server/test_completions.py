"""POST /v1/completions over a real uvicorn and a scripted engine: shapes, choices, stops, echo, refusals."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from server_stubs import (
    EOS,
    MANIFEST,
    ByteTokenizer,
    Script,
    StubEngine,
    check_error,
    revision_of,
    wait_until,
)

from peqa_runtime.core import Lease, TokenLogprobs
from peqa_server.fields.schemas import CompletionRequest
from peqa_server.openai.choice import Piece, Prompt, ShownPrompt, TextRules, TokenPiece
from peqa_server.openai.completion_json import Answer, AnswerStyle, Gathered, Usage
from peqa_server.services import ServedModel

SQL = revision_of(b"SET sql one")
FRESH = {"prompt_tokens_details": {"cached_tokens": 0}}


def test_the_shape_of_an_answer(server: Any) -> None:
    answer = server.complete("hi", max_tokens=9)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "tiny-base"
    assert (answer["task"], answer["revision"]) == ("base", None)
    assert answer["system_fingerprint"] == "peqa-0123456789abcdef"
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11} | FRESH
    assert answer["choices"] == [
        {"index": 0, "text": "base:-:ab", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert server.idle


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "sql"},
        {"adapter_id": "sql"},
        {"model": "sql"},
        {"model": "tiny-base:sql"},
        {"model": "base:sql"},
        {"model": "tiny-base", "task": "sql"},
        {"model": "sql", "task": "sql"},
    ],
    ids=str,
)
def test_ways_to_name_a_task(server: Any, fields: dict[str, str]) -> None:
    answer = server.complete(**fields)
    assert (answer["task"], answer["revision"]) == ("sql", SQL)
    assert answer["choices"][0]["text"].startswith(SQL[:4])
    assert server.engine.requests[0].revision == SQL


@pytest.mark.parametrize("fields", [{}, {"model": "tiny-base"}, {"task": "base"}, {"model": "base"}], ids=str)
def test_ways_to_name_the_base(server: Any, fields: dict[str, str]) -> None:
    assert server.complete(**fields)["task"] == "base"


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"task": "nope"}, 404, "task_not_found", "task"),
        ({"model": "nope"}, 404, "model_not_found", "model"),
        ({"model": "tiny-base:nope"}, 404, "model_not_found", "model"),
        ({"model": ""}, 404, "model_not_found", "model"),
        ({"task": "../x"}, 404, "task_not_found", "task"),
        ({"task": "sql", "model": "qa"}, 400, "task_conflict", "task"),
        ({"task": "sql", "model": "tiny-base:qa"}, 400, "task_conflict", "task"),
        ({"task": "sql", "model": "base"}, 400, "task_conflict", "task"),
        ({"task": "sql", "adapter_id": "qa"}, 400, "task_conflict", "task"),
    ],
    ids=str,
)
def test_tasks_that_are_refused(server: Any, fields: Any, status: int, code: str, param: str) -> None:
    error = server.error(status, prompt="x", **fields)
    assert (error["code"], error["param"]) == (code, param)
    assert not server.engine.requests, "never the base in silence"
    assert server.idle


@pytest.mark.parametrize(
    ("prompt", "count"), [("ab", 1), (["ab", "cde"], 2), ([97, 98], 1), ([[97], [98, 99]], 2)], ids=str
)
def test_forms_of_a_prompt(server: Any, prompt: Any, count: int) -> None:
    answer = server.complete(prompt, echo=True, max_tokens=1)
    assert len(answer["choices"]) == count
    assert answer["choices"][0]["text"] in ("abb", "ab", "abb")
    assert [c["index"] for c in answer["choices"]] == list(range(count))


def test_choices_are_numbered_prompt_by_prompt_and_seeded(server: Any) -> None:
    answer = server.complete(["A", "B"], n=3, seed=7, echo=True, max_tokens=7, task="sql")
    texts = [c["text"] for c in answer["choices"]]
    assert texts == [f"{p}{SQL[:4]}:{s}:" for p in "AB" for s in (7, 8, 9)]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 42, "total_tokens": 44} | FRESH
    assert {r.revision for r in server.engine.requests} == {SQL}
    assert len({r.request_id for r in server.engine.requests}) == 6
    wrapped = server.complete(seed=2**63 - 1, n=2, max_tokens=1)
    assert [c["index"] for c in wrapped["choices"]] == [0, 1]
    assert server.engine.requests[-1].params.seed == -(2**63)


def test_stop_strings_cut_the_text_and_cancel_the_engine(live: Any) -> None:
    server = live(StubEngine(lambda r: Script(list(b"one two<END>three"), delay=0.001)))
    choice = server.complete(stop=["<END>", "zzz"], max_tokens=17)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one two", "stop", "<END>")
    assert len(server.engine.cancelled) == 1
    wait_until(lambda: server.idle)
    choice = server.complete(stop="<END>", include_stop_str_in_output=True, max_tokens=17)["choices"][0]
    assert choice["text"] == "one two<END>"
    choice = server.complete(stop="two", min_tokens=9, max_tokens=17)["choices"][0]
    assert choice["text"] == "one two<END>three", "a stop string before min_tokens does not count"
    choice = server.complete(stop="threeX", max_tokens=17)["choices"][0]
    assert choice["text"] == "one two<END>three", "what was held back comes out at the end"


def test_end_of_sequence_is_no_text(live: Any) -> None:
    server = live(StubEngine(lambda r: Script(list(b"done"), ends_with_eos=True)))
    answer = server.complete(max_tokens=9, return_token_ids=True, skip_special_tokens=False)
    assert answer["choices"][0]["text"] == "done"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["token_ids"] == [*b"done", EOS]
    assert answer["choices"][0]["prompt_token_ids"] == [*b"hi"]
    assert answer["usage"]["completion_tokens"] == 5


def test_logprobs_and_echo(server: Any) -> None:
    choice = server.complete("hé", max_tokens=2, echo=True, logprobs=2)["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "héba"
    assert logprobs["tokens"] == ["h", "�", "�", "b", "a"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][3] == {"b": -0.5, "c": -1.5}
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3]
    for row in logprobs["top_logprobs"][1:]:
        assert max(row.values()) == -0.5, "the likeliest keeps its value when two tokens have one text"


def test_logprobs_zero_shows_the_chosen_token(server: Any) -> None:
    logprobs = server.complete(max_tokens=1, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["b"], "token_logprobs": [-0.5], "top_logprobs": [{"b": -0.5}], "text_offset": [0],
    }  # fmt: skip


def test_scoring_a_prompt_generates_nothing(server: Any) -> None:
    answer = server.complete([104, 105], max_tokens=0, echo=True, logprobs=1)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]
    assert answer["usage"]["completion_tokens"] == 0
    assert server.complete(max_tokens=0)["choices"][0]["text"] == ""
    assert [r.params.max_tokens for r in server.engine.requests] == [0, 0]
    assert server.error(400, prompt="x", max_tokens=0, min_tokens=1)["param"] == "min_tokens"


def test_tokens_as_ids(server: Any) -> None:
    answer = server.complete(max_tokens=1, logprobs=1, return_tokens_as_token_ids=True)
    assert answer["choices"][0]["logprobs"]["tokens"] == ["token_id:98"]


def test_truncation_and_neutral_fields(server: Any) -> None:
    answer = server.complete("abcdef", truncate_prompt_tokens=2, echo=True, max_tokens=1)
    assert answer["choices"][0]["text"] == "efb"
    long = server.complete("x" * 300, truncate_prompt_tokens=-1, max_tokens=30)
    assert long["usage"] == {"prompt_tokens": 170, "completion_tokens": 30, "total_tokens": 200} | FRESH
    assert server.error(400, prompt="x", truncate_prompt_tokens=-1, max_tokens=200)["param"] == "max_tokens"
    server.complete(
        user="u", suffix=None, logit_bias={}, best_of=2, n=2, store=False, metadata={"a": "b"}, use_beam_search=False,
        length_penalty=1.0, temperature=None, stop=None, response_format={"type": "text"}, max_tokens=1,
    )  # fmt: skip


WRONG: list[tuple[str, Any]] = [
    ("prompt", 7), ("prompt", None), ("prompt", []), ("prompt", ""), ("prompt", [[]]), ("prompt", [1, "a"]),
    ("prompt", [True]), ("prompt", [257]), ("prompt", [-1]), ("prompt", [10**30]), ("prompt", "x" * 300),
    ("prompt", {"a": 1}),
    ("max_tokens", "ten"), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", 2.0), ("max_tokens", True),
    ("max_tokens", 200), ("n", 0), ("n", 129), ("n", "2"), ("temperature", "hot"), ("temperature", -1),
    ("temperature", True), ("temperature", 10**400), ("top_p", 0), ("top_p", "x"), ("top_k", -5), ("top_k", 1.5),
    ("min_p", 2),
    ("seed", "s"), ("seed", 2**70), ("seed", 1.0), ("stop", 5), ("stop", ["a"] * 65), ("stop", [1]), ("stop", ""),
    ("logprobs", True), ("logprobs", 50), ("echo", 1), ("stream", "yes"), ("stream_options", 3),
    ("stream_options", {"include_usage": True}), ("task", 3), ("task", ["sql"]), ("model", 3),
    ("presence_penalty", 9), ("frequency_penalty", "x"), ("repetition_penalty", 0), ("min_tokens", -1),
    ("min_tokens", 17), ("ignore_eos", "no"), ("stop_token_ids", "x"), ("stop_token_ids", ["x"]),
    ("stop_token_ids", [999]), ("suffix", "end"), ("best_of", 3), ("logit_bias", {"5": 101}), ("no_such_field", 1),
    ("use_beam_search", True), ("truncate_prompt_tokens", 0), ("response_format", {"type": "xml"}),
    ("user", 5), ("return_token_ids", "x"),
    ("priority", False), ("priority", 1.5), ("priority", 2**31), ("priority", -(2**31) - 1), ("cache_salt", 5),
    ("cache_salt", ""), ("cache_salt", "x" * 257), ("request_id", "a b"), ("request_id", ""),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda v: str(v)[:24])
def test_wrong_fields_are_named(server: Any, field: str, value: Any) -> None:
    text = json.dumps({"prompt": "x", field: value})
    answer = server.send(text)
    error = check_error(answer, 400)
    assert field in error["message"]
    assert " should " not in error["message"], "a sentence of ours, not of the parser's"
    assert error["param"].startswith(field)
    assert server.idle
    assert not server.engine.requests


@pytest.mark.parametrize("field", ["stop_token_ids", "logprob_token_ids"])
def test_lists_of_token_ids_have_a_limit(live: Any, field: str) -> None:
    server = live()
    for given in ([7] * 5000, [7, 9, 7]):
        server.complete(max_tokens=1, logprobs=1, **{field: given})
        assert getattr(server.engine.requests[-1].params, field) == tuple(dict.fromkeys(given))
    error = server.error(400, prompt="x", logprobs=1, **{field: list(range(1025))})
    assert error["param"] == field
    assert error["message"].startswith(f"{field} must hold at most 1024 token ids")
    described = CompletionRequest.model_json_schema()["properties"][field]["anyOf"]
    assert {"type": "array", "items": {"type": "integer"}, "maxItems": 1024} in described


@pytest.mark.parametrize(
    "body",
    [b"", b"no json", b"[1]", b'"text"', b"null", b'{"prompt": "x"', b'{"prompt": "x", "temperature": NaN}',
     b'{"prompt": "x", "temperature": -Infinity}', b'{"prompt": "x", "temperature": 1e999}', b"\xff\xfe{}",
     b"{" * 100_000, b'{"a":' * 5000, b"[" * 5000, b'{"prompt": "\\ud800"}', b'{"prompt": ["\\udc00x"]}',
     b'{"prompt": "x", "stop": "\\ud800"}', b'{"prompt": "x", "user": "\\ud800"}', b'{"\\ud800": 1}',
     b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "\xff"}'],
    ids=lambda b: repr(b[:30]),
)  # fmt: skip
def test_bodies_that_are_no_request(server: Any, body: bytes) -> None:
    check_error(server.send(body), 400)


def test_a_missing_prompt_and_a_misspelt_field(server: Any) -> None:
    assert server.error(400, max_tokens=1)["param"] == "prompt"
    assert "max_tokens" in server.error(400, prompt="x", max_token=1)["message"]


def test_prompt_too_long_names_the_context(server: Any) -> None:
    error = server.error(400, prompt="x" * 190, max_tokens=11)
    assert error["code"] == "context_length_exceeded"
    assert "200" in error["message"]
    server.complete("x" * 190, max_tokens=10)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_priority_and_cache_salt_reach_the_engine(server: Any, path: str) -> None:
    prompt: dict[str, Any] = (
        {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    )
    for given, seen in (
        ({"priority": -(2**31), "cache_salt": "tenant one"}, (-(2**31), "tenant one")),
        ({"priority": 2**31 - 1, "cache_salt": "ü" * 256}, (2**31 - 1, "ü" * 256)),
        ({"priority": None, "cache_salt": None}, (0, "")),
        ({}, (0, "")),
    ):
        assert server.post(path, max_tokens=1, **prompt, **given).status_code == 200
        request = server.engine.requests[-1]
        assert (request.priority, request.cache_salt) == seen


def test_usage_says_how_much_of_the_prompts_was_found_computed(live: Any) -> None:
    server = live(StubEngine(lambda r: Script([65] * 9, cached=int(r.request_id.rpartition("-")[2]) + 1)))
    usage = server.complete(["abcd", "efgh"], n=2, max_tokens=2)["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1 + 3}, "of each prompt's first choice"


def test_the_engines_refusal_reaches_the_client(server: Any) -> None:
    from peqa_runtime.errors import EngineDead, Overloaded

    server.engine.refuse = Overloaded("100 requests wait already", retry_after=3)
    answer = server.post(prompt="x", task="sql")
    assert check_error(answer, 429)["code"] == "overloaded"
    assert answer.headers["retry-after"] == "3"
    server.engine.refuse = EngineDead("the engine has stopped")
    answer = server.post(prompt="x", task="sql")
    check_error(answer, 503)
    assert answer.headers["retry-after"]
    assert server.idle


@pytest.mark.parametrize(
    ("path", "fields", "choices"),
    [
        ("/v1/completions", {"prompt": ["ab", "cd", "ef"], "n": 4}, 12),
        ("/v1/completions", {"prompt": "ab"}, 1),
        ("/v1/completions", {"prompt": ["ab"] * 3, "n": -2}, 1),
        ("/v1/completions", {"prompt": ["ab"] * 3, "n": 10**30}, 1024),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab"}], "n": 5}, 5),
    ],
)
def test_all_choices_are_asked_for_at_the_door(
    server: Any, path: str, fields: dict[str, Any], choices: int
) -> None:
    server.client.post(path, json={"task": "sql", "max_tokens": 2, **fields})
    assert server.engine.reserved == [("sql", choices)]


def test_failures_in_the_engine_are_answers_too(live: Any) -> None:
    server = live(StubEngine(lambda r: Script([1, 2, 3], error="numbers were not finite")))
    assert "not finite" in server.error(500, prompt="x", n=2)["message"]
    server.engine.script = lambda r: Script([1, 2], dies=True)
    assert server.error(503, prompt="x")["code"] == "engine_dead"
    wait_until(lambda: not server.tasks.leases)


def test_a_fault_of_ours_is_a_clean_500(server: Any) -> None:
    server.engine.refuse = RuntimeError("secret detail")
    error = server.error(500, prompt="x", task="sql")
    assert "secret" not in error["message"]
    assert server.idle
    server.engine.refuse = None
    server.complete()


def test_a_client_that_leaves_ends_its_request(live: Any) -> None:
    server = live(StubEngine(lambda r: Script([97] * 150, delay=0.05)))
    server.tasks.upload("sql", b"SET")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + "/v1/completions", json={"prompt": "x", "n": 2, "task": "sql", "max_tokens": 150},
                   timeout=0.2)  # fmt: skip
    wait_until(lambda: len(server.engine.cancelled) == 2, 1.0)
    wait_until(lambda: server.idle, 1.0)


def test_request_ids_are_echoed_and_never_shared(server: Any) -> None:
    for _ in range(2):
        answer = httpx.post(
            server.url + "/v1/completions",
            json={"prompt": "x"},
            headers={"X-Request-Id": "mine-7"},
            timeout=10,
        )
        assert answer.headers["x-request-id"] == "mine-7"
    assert len({r.request_id for r in server.engine.requests}) == 2


def test_a_request_id_is_the_answers(server: Any) -> None:
    assert server.complete(request_id="mine-7")["id"] == "cmpl-mine-7"
    for wrong in (7, "", "a b", "x\n", "x" * 129):
        assert server.error(400, prompt="x", request_id=wrong)["param"] == "request_id"


@pytest.mark.parametrize("bos", [(), (EOS,)])
def test_offsets_of_an_echoed_text_count_its_special_tokens(bos: tuple[int, ...]) -> None:
    prompt = Prompt((*bos, 97, EOS, 98), "a</s>b")
    piece = ShownPrompt(ByteTokenizer(), prompt, TextRules(echo=True)).piece(None)
    assert piece.text == "a</s>b"
    assert [t.offset for t in piece.tokens] == [0] * len(bos) + [0, 1, 5]


def test_a_token_that_shares_its_text_does_not_pass_for_the_likeliest() -> None:
    """Scoring tools take "the chosen value is the largest" for "greedy chose it"."""
    model = ServedModel(MANIFEST, ByteTokenizer(), max_model_len=200, vocab_size=257)
    answer = Answer(model, Lease("base", ""), AnswerStyle(logprobs=1), None)
    half = TokenLogprobs(195, -3.0, ((169, -0.5), (97, -1.0)))  # 195 and 169 are both half a character: "�"
    row = answer.empty_choice(Piece("", (TokenPiece(195, 0, half),)))["logprobs"]
    assert row["token_logprobs"] == [-3.0]
    assert max(row["top_logprobs"][0].values()) == -0.5
    never = TokenLogprobs(98, float("-inf"), ())
    assert answer.empty_choice(Piece("b", (TokenPiece(98, 0, never),)))["logprobs"]["token_logprobs"] == [
        -9999.0
    ]


def test_ranks_of_prompt_tokens_count_the_likelier_ones() -> None:
    model = ServedModel(MANIFEST, ByteTokenizer(), max_model_len=200, vocab_size=257)
    unlikely = TokenLogprobs(98, -9.0, ((97, -0.5), (99, -1.0), (100, -1.0)), rank=41)
    listed = TokenLogprobs(99, -1.0, ((97, -0.5), (99, -1.0), (100, -1.0)), rank=2)
    answer = Answer(model, Lease("base", ""), AnswerStyle(prompt_logprobs=3), None)
    gathered = Gathered(prompt_logprobs=(None, unlikely, listed))
    rows = answer.whole([gathered], [(97, 98, 99)], Usage(3, 0))["choices"][0]["prompt_logprobs"]
    ranks = [row and {name: entry["rank"] for name, entry in row.items()} for row in rows]
    assert ranks == [None, {"97": 1, "99": 2, "100": 2, "98": 41}, {"97": 1, "99": 2, "100": 2}]
