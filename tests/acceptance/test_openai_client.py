"""The newest `openai` client against a live server: every route and field, sync, async and streaming."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

pytestmark = pytest.mark.slow

MODEL = "SmolLM2-135M-Instruct"
PROMPT = "The capital of France is"  # " Paris."
QUESTION = "table t(country, score, place, player)\nWhich player has a score of 70?"
SQL = "SELECT player FROM t WHERE score = 70"
MESSAGES = [{"role": "user", "content": "Say hello."}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": what,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name, what in (("weather", "Weather of a city"), ("time", "Time in a city"))
]
EXAMPLE = '{% for m in messages %}{{ m["content"] }}{% endfor %}'


@pytest.fixture(scope="module")
def client(demo_server: Any) -> OpenAI:
    return OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0, timeout=60)


def ids(client: OpenAI, text: str) -> list[int]:
    answer = client.post("/../tokenize", body={"prompt": text}, cast_to=httpx.Response).json()
    return list(answer["tokens"])


def call(create: Any, **fields: Any) -> Any:
    """`create` with the client's own parameters as such, and the rest as `extra_body`."""
    known = inspect.signature(create).parameters
    own = {name: value for name, value in fields.items() if name in known}
    rest = {name: value for name, value in fields.items() if name not in known}
    return create(**own, extra_body=rest or None)


def complete(client: OpenAI, **fields: Any) -> Any:
    defaults = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    return call(client.completions.create, **{**defaults, **fields})


def chat(client: OpenAI, **fields: Any) -> Any:
    length = {} if {"max_tokens", "max_completion_tokens"} & fields.keys() else {"max_tokens": 4}
    defaults = {"model": MODEL, "messages": MESSAGES, "temperature": 0, **length}
    return call(client.chat.completions.create, **{**defaults, **fields})


def text(answer: Any) -> str:
    choice = answer.choices[0]
    return str(choice.text if hasattr(choice, "text") else choice.message.content)


Check = Callable[[Any], object]

SAMPLED = {"temperature": 1.0, "seed": 5}

SHARED: list[tuple[dict[str, Any], Check]] = [
    ({"model": f"{MODEL}:sql", "user": "u-1"}, lambda a: a.task == "sql" and len(a.revision) == 64),
    ({"task": "sql", "priority": 5, "cache_salt": "tenant"}, lambda a: a.task == "sql"),
    ({"adapter_id": "intents"}, lambda a: a.task == "intents"),
    ({"request_id": "mine-1"}, lambda a: a.id.endswith("-mine-1")),
    ({"max_tokens": 3, "min_tokens": 3}, lambda a: a.usage.completion_tokens == 3),
    ({"ignore_eos": True, "max_tokens": 20, "skip_special_tokens": False, "spaces_between_special_tokens": True},
     lambda a: a.usage.completion_tokens == 20),
    ({**SAMPLED, "top_p": 0.9, "top_k": 20, "min_p": 0.01}, text),
    ({**SAMPLED, "presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.2}, text),
    ({**SAMPLED, "n": 3}, lambda a: [c.index for c in a.choices] == [0, 1, 2]),
    ({"stop": ["l", "aris"], "include_stop_str_in_output": True},
     lambda a: text(a).endswith(("l", "aris")) and a.choices[0].stop_reason in ("l", "aris")),
    ({"return_token_ids": True}, lambda a: len(a.choices[0].token_ids) == a.usage.completion_tokens),
    ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, lambda a: a.usage.prompt_tokens == 2),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}, "max_tokens": 60},
     lambda a: set(json.loads(text(a))) == {"name", "age"}),
    ({"structured_outputs": {"choice": ["left", "right"]}}, lambda a: text(a) in ("left", "right")),
    ({"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}, "max_tokens": 60},
     lambda a: text(a) == json.dumps(json.loads(text(a)), separators=(",", ":"), ensure_ascii=False)),
    ({"guided_json": PERSON, "max_tokens": 60}, lambda a: isinstance(json.loads(text(a))["age"], int)),
    ({"guided_regex": "[0-9]{3}"}, lambda a: len(text(a)) == 3 and text(a).isdigit()),
    ({"guided_choice": ["yes", "no"]}, lambda a: text(a) in ("yes", "no")),
    ({"guided_grammar": 'start: "a" "b"'}, lambda a: text(a) == "ab"),
    ({"bad_words": ["Paris", "Hello", "Hi"]}, lambda a: not {"Paris", "Hello", "Hi"} & set(text(a).split())),
    ({"allowed_token_ids": [28, 30]}, lambda a: set(text(a)) <= set(",.:;!<>")),
    ({"logit_bias": {"28": 100}}, lambda a: len(set(text(a))) == 1),
    ({"stop_token_ids": list(range(3, 1027))}, lambda a: a.choices[0].finish_reason == "stop"),
]  # fmt: skip
"""Fields that completions and chats share, and what their answers must show."""


@pytest.mark.parametrize("make", [complete, chat])
def test_shared_fields(client: OpenAI, make: Callable[..., Any]) -> None:
    for fields, check in SHARED:
        first = make(client, **fields)
        assert check(first), (fields, text(first))
        if "seed" in fields:
            assert text(make(client, **fields)) == text(first)


def test_completions_own_fields(client: OpenAI) -> None:
    answer = complete(client, echo=True, logprobs=2, max_tokens=2)
    choice = answer.choices[0]
    assert choice.text == PROMPT + " Paris."
    assert choice.logprobs.tokens == ["The", " capital", " of", " France", " is", " Paris", "."]
    assert choice.logprobs.text_offset[5] == len(PROMPT)
    assert choice.logprobs.token_logprobs[0] is None
    assert all(len(top) in (2, 3) for top in choice.logprobs.top_logprobs[1:])
    scored = complete(client, prompt=[ids(client, PROMPT)], echo=True, logprobs=0, max_tokens=0)
    assert scored.choices[0].logprobs.token_logprobs[1:] == choice.logprobs.token_logprobs[1:5]
    batch = complete(client, prompt=[PROMPT, "2 + 2 ="], n=2, best_of=2, temperature=1.0, seed=1)
    assert len(batch.choices) == 4
    assert complete(client, add_special_tokens=False, return_token_ids=True).choices[
        0
    ].prompt_token_ids == ids(client, PROMPT)
    named = complete(client, logprobs=1, return_tokens_as_token_ids=True, max_tokens=1).choices[0].logprobs
    assert named.tokens[0].startswith("token_id:")
    asked = ids(client, " London")[0]
    chosen = complete(client, logprobs=1, logprob_token_ids=[asked], max_tokens=1).choices[0].logprobs
    assert list(chosen.top_logprobs[0]) == [" Paris", " London"]
    reported = complete(client, prompt_logprobs=1, max_tokens=1).choices[0].prompt_logprobs
    assert reported[0] is None
    assert reported[1][str(ids(client, " capital")[0])]["decoded_token"] == " capital"
    tokens = ids(client, PROMPT)
    assert [entry[str(token)]["rank"] for entry, token in zip(reported[1:], tokens[1:], strict=True)][1:] == [
        1,
        2,
        1,
    ]
    with pytest.raises(openai.BadRequestError, match="cannot fill in before a suffix"):
        complete(client, suffix="the end")


def test_scores_as_lm_eval_reads_them(client: OpenAI) -> None:
    """Float equality of the token's value with the likeliest one's says "greedy", at every position."""
    context, target = ids(client, PROMPT), ids(client, " Paris.")
    for tail, greedy in ((target, True), (ids(client, " Rome."), False)):
        row = complete(
            client, prompt=[context + tail], max_tokens=1, logprobs=1, echo=True, seed=1234
        ).choices[0]
        values = row.logprobs.token_logprobs[len(context) : -1]
        tops = row.logprobs.top_logprobs[len(context) : -1]
        assert len(values) == len(tail)
        assert all(value == max(top.values()) for value, top in zip(values, tops, strict=True)) is greedy


def test_chats_own_fields(client: OpenAI) -> None:
    plain = chat(client, max_completion_tokens=5, reasoning_effort="low", add_special_tokens=False)
    assert plain.usage.completion_tokens == 5
    harmless = {"verbosity": "medium", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"}
    harmless |= {
        "prompt_cache_key": "k",
        "prompt_cache_options": {"mode": "implicit"},
        "safety_identifier": "s",
    }
    guess = {"type": "content", "content": "Hello"}
    assert text(chat(client, max_tokens=5, modalities=["text"], prediction=guess, **harmless)) == text(plain)
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]}
    ]
    assert text(chat(client, messages=parts, max_tokens=5)) == text(plain)
    assert text(chat(client, messages=[{"role": "developer", "content": "Be brief."}, *MESSAGES]))
    begun = [*MESSAGES, {"role": "assistant", "content": "Hello, my"}]
    goes_on = chat(
        client, messages=begun, continue_final_message=True, add_generation_prompt=False, echo=True
    )
    assert text(goes_on).startswith("Hello, my")
    seen = chat(client, logprobs=True, top_logprobs=2, max_tokens=3).choices[0].logprobs.content
    assert len(seen) == 3
    for entry in seen:
        assert bytes(entry.bytes).decode() == entry.token
        assert entry.logprob == max(other.logprob for other in entry.top_logprobs)
    answer = chat(client, prompt_logprobs=0, return_token_ids=True)
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids) == answer.usage.prompt_tokens
    for field, value, reason in (
        ("chat_template", EXAMPLE, "program"),
        ("chat_template_kwargs", {"enable_thinking": True}, "no variable 'enable_thinking'"),
        ("documents", [{"text": "x"}], "no place for documents"),
        ("verbosity", "low", "does not know it"),
        ("moderation", {"model": "omni-moderation-latest"}, "no model that moderates"),
        ("web_search_options", {}, "reaches no other"),
    ):
        with pytest.raises(openai.BadRequestError, match=reason) as refusal:
            chat(client, **{field: value})
        assert refusal.value.param == field


def test_tools(client: OpenAI) -> None:
    def calls(answer: Any) -> list[tuple[str, Any]]:
        found = answer.choices[0].message.tool_calls or []
        return [(c.function.name, json.loads(c.function.arguments)) for c in found]

    def ask(**fields: Any) -> Any:
        return chat(client, tools=TOOLS, max_tokens=120, **fields)

    required = ask(tool_choice="required", parallel_tool_calls=False)
    assert required.choices[0].finish_reason == "tool_calls"
    assert required.choices[0].message.content is None
    ((name, arguments),) = calls(required)
    assert name in ("weather", "time")
    assert arguments["city"] in ("Rome", "Oslo")
    assert calls(ask(tool_choice="required"))
    named = ask(tool_choice={"type": "function", "function": {"name": "time"}})
    assert (calls(named)[0][0], named.choices[0].finish_reason) == ("time", "stop")
    assert not calls(ask(tool_choice="none"))
    assert ask(tool_choice="auto").choices[0].finish_reason in ("stop", "length", "tool_calls")

    second = [{"type": "function", "function": {"name": "time"}}]
    for mode in ("required", "auto"):
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": second}}
        names = [name for name, _ in calls(ask(tool_choice=allowed))]
        assert set(names) == {"time"} if mode == "required" else set(names) <= {"time"}

    class Place(BaseModel):
        city: Literal["Rome", "Oslo"]

    class Trip(BaseModel):
        start: Place
        end: Place

    typed = chat(client, tools=[openai.pydantic_function_tool(Trip)], tool_choice="required", max_tokens=120)
    assert Trip.model_validate(calls(typed)[0][1])
    parsed = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, tools=[openai.pydantic_function_tool(Trip)], tool_choice="required",
        max_tokens=120, temperature=0,
    ).choices[0].message  # fmt: skip
    assert isinstance(parsed.tool_calls[0].function.parsed_arguments, Trip)
    result = {"role": "tool", "tool_call_id": parsed.tool_calls[0].id, "content": "booked"}
    assert text(chat(client, messages=[*MESSAGES, parsed, result]))
    broken = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "nothing"}}}}
    with pytest.raises(openai.BadRequestError) as refusal:
        chat(client, tools=[{"type": "function", "function": broken}], tool_choice="required")
    assert refusal.value.param == "tools"

    history = [*MESSAGES, required.choices[0].message.model_dump()]
    call_id = required.choices[0].message.tool_calls[0].id
    history.append({"role": "tool", "tool_call_id": call_id, "content": "18 degrees"})
    assert text(ask(messages=history, tool_choice="none"))

    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice="required", temperature=0, max_tokens=120
    ) as stream:
        whole = stream.get_final_completion()
    assert calls(whole) == calls(ask(tool_choice="required"))
    assert whole.choices[0].finish_reason == "tool_calls"


def test_streams(client: OpenAI) -> None:
    whole = complete(client, max_tokens=9, ignore_eos=True, logprobs=1)
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        complete(
            client,
            max_tokens=9,
            ignore_eos=True,
            stream=True,
            stream_options=options,
            stream_interval=4,
            logprobs=1,
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == text(whole)
    assert [len(c.choices[0].logprobs.tokens) for c in chunks[:-1]] == [1, 4, 4]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 9
    words = list(
        chat(client, stream=True, task="sql", messages=[{"role": "user", "content": QUESTION}], max_tokens=40)
    )
    assert "".join(c.choices[0].delta.content or "" for c in words) == SQL
    assert words[0].choices[0].delta.role == "assistant"
    assert {c.task for c in words} == {"sql"}


def test_async_requests_of_several_tasks_at_once(demo_server: Any) -> None:
    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:

            async def whole(task: str, prompt: str) -> str:
                answer = await client.completions.create(
                    model=task, prompt=prompt, max_tokens=40, temperature=0
                )
                return answer.choices[0].text

            async def streamed(task: str, prompt: str) -> str:
                message: Any = [{"role": "user", "content": prompt}]
                stream = await client.chat.completions.create(
                    model=task, messages=message, max_tokens=40, temperature=0, stream=True
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            asked = ("sql", QUESTION), ("intents", "I lost my card, what now?")
            return await asyncio.gather(*(f(*a) for f in (whole, streamed) for a in asked))

    assert asyncio.run(run()) == [SQL, "lost_or_stolen_card"] * 2


def test_models_and_revisions(client: OpenAI) -> None:
    rows = {row.id: row for row in client.models.list()}
    assert rows["sql"].parent == rows["sql"].root == MODEL
    assert rows[MODEL].permission[0]["object"] == "model_permission"
    revision = client.models.retrieve("sql").revision
    assert client.models.retrieve(f"sql@{revision[:8]}").revision == revision
    for name in (f"sql@{revision[:4]}", f"{MODEL}:sql@{revision}"):
        assert complete(client, model=name).revision == revision
    for field in ("task", "adapter_id"):
        answer = complete(client, **{field: f"sql@{revision[:6]}"})
        assert (answer.task, answer.revision) == ("sql", revision)
    wrong = "0000" if not revision.startswith("0000") else "ffff"
    with pytest.raises(openai.NotFoundError, match=revision[:12]):
        complete(client, model=f"sql@{wrong}")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
    with pytest.raises(openai.BadRequestError, match="at least 4"):
        complete(client, model="sql@123")
    with pytest.raises(openai.BadRequestError, match="different tasks"):
        complete(client, model="intents", task=f"sql@{revision[:4]}")


def test_the_other_routes(demo_server: Any) -> None:
    with httpx.Client(base_url=demo_server.url) as http:
        tokens = http.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
        assert tokens["token_strs"] == ["The", " capital", " of", " France", " is"]
        assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": PROMPT}
        spoken = http.post("/tokenize", json={"messages": MESSAGES, "tools": TOOLS}).json()
        assert spoken["count"] > http.post("/tokenize", json={"messages": MESSAGES}).json()["count"] > 10
        asked = http.post(
            "/v1/chat/completions", json={"messages": MESSAGES, "tools": TOOLS, "max_tokens": 1}
        ).json()
        assert asked["usage"]["prompt_tokens"] == spoken["count"]
        assert http.get("/tokenizer_info").json()["eos_token"] == "<|im_end|>"
        for method in ("GET", "POST"):
            assert (http.request(method, "/ping").status_code, http.request(method, "/ping").content) == (
                200,
                b"",
            )
        assert http.get("/load").json() == {"server_load": 0}
        assert http.get("/version").json()["model"] == MODEL
        assert http.get("/health").json() == {"status": "ready"}


def test_no_field_is_forgotten(demo_server: Any) -> None:
    """Each field of the bodies that /openapi.json describes stands in this file."""
    document = httpx.get(f"{demo_server.url}/openapi.json").json()
    source = inspect.getsource(inspect.getmodule(chat))  # type: ignore[arg-type]
    for route in ("/v1/completions", "/v1/chat/completions"):
        body = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
        fields = (
            body.get("properties")
            or document["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]["properties"]
        )
        missing = [name for name in fields if f'"{name}"' not in source and f"{name}=" not in source]
        assert not missing, f"{route}: {missing}"
