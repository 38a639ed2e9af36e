"""Forms of answers and rules for tokens over HTTP, against the real engine on a tiny model."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest
from server_stubs import check_error, wait_until

from peqa_server.app import create_loading_app
from peqa_server.start.loading import ServeOptions, load_services

PERSON = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


@pytest.fixture(scope="module")
def client(run_app: Any, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    store = tmp_path_factory.mktemp("forms") / "store"
    options = ServeOptions(
        tiny_base, home=store.parent, store=store, engine={"num_blocks": 128, "task_rows": 4}
    )
    services, _ = load_services(options, lambda line: None)
    app = create_loading_app()
    url, loop = run_app(app)
    loop.call_soon_threadsafe(app.state.gate.open, services)
    with httpx.Client(base_url=url, timeout=30) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        yield client
    services.engine.stop()


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "the cat", "max_tokens": 120, "seed": 1, **fields}


def events(client: httpx.Client, path: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", path, json=fields) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def texts(client: httpx.Client, **fields: Any) -> list[str]:
    answer = client.post("/v1/completions", json=body(**fields))
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert {c["finish_reason"] for c in choices} == {"stop"}, answer.text
    return [c["text"] for c in choices]


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": AS_SCHEMA}, "person"),
    ({"structured_outputs": {"json": PERSON}}, "person"),
    ({"structured_outputs": {"json": json.dumps(PERSON), "regex": None}}, "person"),
    ({"guided_json": PERSON}, "person"),
    ({"structured_outputs": {"regex": "[a-f]{3}-[0-9]{2}"}}, "[a-f]{3}-[0-9]{2}"),
    ({"guided_regex": "[a-f]{3}-[0-9]{2}", "response_format": {"type": "text"}}, "[a-f]{3}-[0-9]{2}"),
    ({"structured_outputs": {"choice": ["red", "green light"]}}, "red|green light"),
    ({"guided_choice": ["red", "green light"]}, "red|green light"),
    ({"structured_outputs": {"grammar": 'start: "a" ("b" | "c") "!"'}}, "a[bc]!"),
    ({"guided_grammar": 'root ::= "a" ("b" | "c") "!"'}, "a[bc]!"),
]


def check_text(text: str, wanted: str) -> None:
    if wanted == "person":
        jsonschema.validate(json.loads(text), PERSON)
    else:
        assert re.fullmatch(wanted, text), text


@pytest.mark.parametrize(("fields", "wanted"), FORMS)
def test_every_field_keeps_answers_to_its_form(
    client: httpx.Client, fields: dict[str, Any], wanted: str
) -> None:
    for text in texts(client, n=3, **fields):
        check_text(text, wanted)
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 120, "seed": 2, **fields}
    answer = client.post("/v1/chat/completions", json=chat).json()
    check_text(answer["choices"][0]["message"]["content"], wanted)
    streamed: dict[int, str] = {0: "", 1: ""}
    for chunk in events(client, "/v1/completions", body(stream=True, n=2, **fields)):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    for text in streamed.values():
        check_text(text, wanted)
    assert list(streamed.values()) == texts(client, n=2, **fields)


def test_a_json_object_is_one(client: httpx.Client) -> None:
    """The tiny model seldom ends one: what it has written so far begins one."""
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        answer = client.post("/v1/completions", json=body(n=4, max_tokens=40, **fields)).json()
        for choice in answer["choices"]:
            assert choice["text"].startswith("{")
            if choice["finish_reason"] == "stop":
                assert isinstance(json.loads(choice["text"]), dict)


def test_json_without_white_space_or_more_properties(client: httpx.Client) -> None:
    compact = {"disable_any_whitespace": True, "disable_fallback": True}
    for text in texts(client, n=4, structured_outputs={"json": PERSON, **compact}):
        assert text == json.dumps(json.loads(text), separators=(",", ":"))
    spaced = texts(client, n=4, structured_outputs={"json": PERSON, "disable_any_whitespace": False})
    assert any(character in text for text in spaced for character in " \n")
    answer = client.post(
        "/v1/completions", json=body(max_tokens=30, structured_outputs={"json_object": True, **compact})
    ).json()
    assert not re.match(r"\{\s|[^\"]*[,:]\s", answer["choices"][0]["text"])
    opened = {key: value for key, value in PERSON.items() if key != "additionalProperties"}
    for source in (opened, json.dumps(opened)):
        wanted = {"json": source, "disable_additional_properties": True}
        for text in texts(client, n=3, structured_outputs=wanted):
            assert set(json.loads(text)) == {"name", "age"}


def test_forms_go_with_every_other_field(client: httpx.Client) -> None:
    form = {"guided_regex": "[a-f]{6}"}
    whole = client.post(
        "/v1/completions",
        json=body(
            echo=True, logprobs=2, return_token_ids=True, min_tokens=30, ignore_eos=True, top_p=0.9, **form
        ),
    ).json()["choices"][0]
    assert re.fullmatch("the cat[a-f]{6}", whole["text"])
    assert "".join(whole["logprobs"]["tokens"]) == whole["text"]
    assert (whole["finish_reason"], whole["stop_reason"]) == ("stop", None)
    cut = client.post("/v1/completions", json=body(max_tokens=3, **form)).json()
    assert cut["choices"][0]["finish_reason"] == "length"
    stopped = client.post("/v1/completions", json=body(stop=["a", "b", "c", "d", "e", "f"], **form)).json()
    assert stopped["choices"][0]["text"] == ""
    first, second = texts(client, **form), texts(client, **form)
    assert first == second  # also where the prompt's K/V was found


def test_tokens_by_bias_list_and_word(client: httpx.Client) -> None:
    ids = client.post("/tokenize", json={"prompt": "xyz"}).json()["tokens"]
    common = {"max_tokens": 8, "return_token_ids": True, "ignore_eos": True}

    def tokens(**fields: Any) -> list[int]:
        answer = client.post("/v1/completions", json=body(**common, **fields))
        assert answer.status_code == 200, answer.text
        return list(answer.json()["choices"][0]["token_ids"])

    assert set(tokens(allowed_token_ids=ids)) <= set(ids)
    assert tokens(logit_bias={str(ids[1]): 100}) == [ids[1]] * 8
    free = tokens(temperature=0)
    assert free[0] not in tokens(temperature=0, logit_bias={str(free[0]): -100})
    word = client.post("/detokenize", json={"tokens": ids[1:2]}).json()["prompt"]
    assert ids[1] not in tokens(logit_bias={str(ids[1]): 100}, bad_words=[word])


def test_the_openai_client_parses_into_a_class(client: httpx.Client) -> None:
    class Light(pydantic.BaseModel):
        colour: Literal["red", "green"]
        on: bool

    with openai.OpenAI(
        base_url=f"{str(client.base_url).rstrip('/')}/v1", api_key="none", max_retries=0
    ) as api:
        answer = api.chat.completions.parse(
            model="tiny-llama",
            messages=[{"role": "user", "content": "a light"}],
            response_format=Light,
            max_completion_tokens=150,
            seed=4,
        )
    assert isinstance(answer.choices[0].message.parsed, Light)


def as_schema(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": fields}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": AS_SCHEMA | {"type": "json_object"}}, "response_format"),
    (as_schema(name="p"), "response_format.json_schema.schema"),
    (as_schema(name="p", schema=3), "response_format.json_schema.schema"),
    (as_schema(name="p", schema={"type": "x"}), "response_format"),
    (as_schema(name="a b", schema={}), "response_format.json_schema.name"),
    (as_schema(name="p", schema={}, more=1), "response_format.json_schema.more"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "text", "other": 1}}, "response_format.other"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"no_such": 1}}, "structured_outputs.no_such"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"json": {}, "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
    ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
     "structured_outputs.disable_any_whitespace"),
    ({"structured_outputs": {"json_object": True, "disable_additional_properties": True}},
     "structured_outputs.disable_additional_properties"),
    ({"structured_outputs": {"json": "{", "disable_additional_properties": True}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": {"uniqueItems": True}}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": {"type": "object"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "guided_choice"),
    ({"guided_regex": "a" * 140_000}, "guided_regex"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": True}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": 1, "01": 2}}, "logit_bias"),
    ({"logit_bias": {"300": 1}}, "logit_bias"),
    ({"logit_bias": {"99999999999999999999": 1}}, "logit_bias"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [300]}, "allowed_token_ids"),
    ({"allowed_token_ids": [1.5]}, "allowed_token_ids[0]"),
    ({"allowed_token_ids": [1] * 400}, "allowed_token_ids"),
    ({"bad_words": [" "]}, "bad_words"),
    ({"bad_words": ["x" * 300]}, "bad_words"),
    ({"bad_words": "x"}, "bad_words"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_wrong_forms_and_rules_are_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error = check_error(client.post("/v1/completions", json=body(**fields)), 400)
    assert error["param"] == param, error


def test_a_dead_end_in_the_middle_ends_its_request_only(client: httpx.Client) -> None:
    ids = client.post("/tokenize", json={"prompt": "xyz"}).json()["tokens"]
    dead = body(guided_regex="x[a-f]{9}", allowed_token_ids=ids)
    with ThreadPoolExecutor() as threads:
        other = threads.submit(texts, client, guided_regex="[a-f]{40}")
        error = check_error(client.post("/v1/completions", json=dead), 400)
        assert error["code"] == "no_token_left"
        *chunks, last = events(client, "/v1/completions", dead | {"stream": True})
        assert "".join(c["choices"][0]["text"] for c in chunks) == "x"
        assert last["error"]["code"] == "no_token_left"
        assert re.fullmatch("[a-f]{40}", other.result()[0])


def test_a_form_that_takes_long_to_compile_holds_nobody_up(client: httpx.Client) -> None:
    slow = [body(guided_json={"type": "integer", "multipleOf": number}) for number in (999_983, 999_979)]
    known = body(guided_regex="[a-f]{6}")
    assert client.post("/v1/completions", json=known).status_code == 200

    async def ask() -> tuple[list[httpx.Response], float]:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as api:
            refused = asyncio.gather(*(api.post("/v1/completions", json=one) for one in slow))
            longest = 0.0
            while not refused.done():
                begin = time.perf_counter()
                assert (await api.post("/v1/completions", json=known)).status_code == 200
                longest = max(longest, time.perf_counter() - begin)
                await asyncio.sleep(0.05)
            return refused.result(), longest

    answers, longest = asyncio.run(ask())
    assert [check_error(answer, 400)["param"] for answer in answers] == ["guided_json"] * 2
    assert longest < 2, "CPU seconds that the form is given, during which others are answered"
