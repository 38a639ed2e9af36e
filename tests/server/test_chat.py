"""Chats: calls in answers whole and streamed, logprobs, echo, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_stubs import EOS, Script, StubEngine

from peqa_server.tools.use import moved

CHAT = "/v1/chat/completions"
SAY = [{"role": "user", "content": "hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "description": "Looks", "parameters": {"type": "object"}},
    },
    {"type": "function", "function": {"name": "add_2"}},
]


def answering(text: str, *, eos: bool = True) -> StubEngine:
    return StubEngine(lambda r: Script(list(text.encode()), ends_with_eos=eos))


ANSWER = 'So: <tool_call>{"name": "look", "arguments": {"at": "<é>"}}</tool_call>\n'
ANSWER += '<tool_call>{"name": "add_2"}</tool_call>'


def streamed(server: Any, **body: Any) -> tuple[dict[str, Any], str, int]:
    """The message that a client puts together from the deltas, the finish reason, and the number of chunks."""
    message: dict[str, Any] = {}
    reason = ""
    with server.client.stream("POST", CHAT, json={"messages": SAY, "stream": True} | body) as answer:
        assert answer.status_code == 200, answer.read()
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    for event in events:
        (choice,) = event["choices"]
        delta = choice["delta"]
        message["role"] = delta.get("role", message.get("role"))
        message["content"] = message.get("content", "") + (delta.get("content") or "")
        for part in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if part["index"] == len(calls):
                assert part["type"] == "function"
                calls.append(
                    {
                        "id": part["id"],
                        "type": "function",
                        "function": {"name": part["function"]["name"], "arguments": ""},
                    }
                )
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return message, reason, len(events)


@pytest.mark.parametrize("eos", [True, False])
def test_calls_whole_and_streamed_are_the_same(live: Any, eos: bool) -> None:
    server = live(answering(ANSWER, eos=eos), max_model_len=2000)
    body = {"tools": TOOLS, "max_tokens": len(ANSWER.encode()) + (1 if eos else 0)}
    whole = server.post(CHAT, messages=SAY, **body).json()["choices"][0]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in whole["message"]["tool_calls"]]
    assert calls == [("look", '{"at": "<é>"}'), ("add_2", "{}")]
    assert whole["message"]["content"] == "So:"
    assert whole["finish_reason"] == ("tool_calls" if eos else "length")
    message, reason, count = streamed(server, **body)
    assert reason == whole["finish_reason"]
    assert count > 10, "arguments come in pieces"
    for part in (message, whole["message"]):
        for tool_call in part["tool_calls"]:
            assert tool_call.pop("id").startswith("call_")
    assert message == whole["message"]
    first = server.post(CHAT, messages=SAY, parallel_tool_calls=False, **body).json()["choices"][0]["message"]
    assert [c["function"]["name"] for c in first["tool_calls"]] == ["look"]


def test_without_tools_nothing_is_looked_for(live: Any) -> None:
    server = live(answering(ANSWER), max_model_len=2000)
    for body in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}):
        choice = server.post(CHAT, messages=SAY, max_tokens=150, **body).json()["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": ANSWER}
        assert choice["finish_reason"] == "stop"


def test_calls_that_must_be_made_are_a_form_of_the_answer(live: Any) -> None:
    server = live(answering('[{"name": "look", "arguments": {"at": 1}}]'), max_model_len=2000)
    body = {"tools": TOOLS, "max_tokens": 60}
    choice = server.post(CHAT, messages=SAY, tool_choice="required", **body).json()["choices"][0]
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"
    schema = json.loads(server.engine.requests[-1].params.structured.source)
    assert (schema["type"], schema["minItems"]) == ("array", 1)
    assert [c["properties"]["name"]["const"] for c in schema["items"]["anyOf"]] == ["look", "add_2"]
    server.post(CHAT, messages=SAY, tool_choice="required", parallel_tool_calls=False, **body)
    assert "anyOf" in json.loads(server.engine.requests[-1].params.structured.source)

    server.engine.script = lambda r: Script(list(b'{"at": 1}'), ends_with_eos=True)
    named = {"type": "function", "function": {"name": "look"}}
    choice = server.post(CHAT, messages=SAY, tool_choice=named, **body).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": 1}'}
    assert choice["finish_reason"] == "stop"
    assert json.loads(server.engine.requests[-1].params.structured.source) == {"type": "object"}
    message, reason, _ = streamed(server, tool_choice=named, **body)
    assert (message["tool_calls"][0]["function"]["arguments"], reason) == ('{"at": 1}', "stop")


def allowing(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_calls_of_allowed_tools_alone_are_calls(live: Any) -> None:
    server = live(answering(ANSWER), max_model_len=2000)
    body = {"tools": TOOLS, "max_tokens": 200}
    for choice in (allowing("auto", "look"), allowing("auto", "look", "look")):
        message = server.post(CHAT, messages=SAY, tool_choice=choice, **body).json()["choices"][0]["message"]
        assert [c["function"]["name"] for c in message["tool_calls"]] == ["look"]
        assert message["content"].endswith('<tool_call>{"name": "add_2"}</tool_call>')
        assert server.engine.requests[-1].params.structured is None
    for names, wanted in ((["add_2"], ["add_2"]), (["add_2", "look"], ["look", "add_2"])):
        server.post(CHAT, messages=SAY, tool_choice=allowing("required", *names), **body)
        items = json.loads(server.engine.requests[-1].params.structured.source)["items"]
        calls = items.get("anyOf", [items])
        assert [call["properties"]["name"]["const"] for call in calls] == wanted


def test_references_of_parameters_hold_where_the_schema_has_become_a_part() -> None:
    place = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Place"}}}
    schema = {
        "properties": {"at": {"$ref": "#/$defs/Place"}, "all": {"$ref": "#"}},
        "$defs": {"Place": place},
    }
    definitions: dict[str, Any] = {}
    assert moved(schema, "7", definitions) == {
        "properties": {"at": {"$ref": "#/$defs/7.Place"}, "all": {"$ref": "#/$defs/7"}}
    }
    assert definitions["7.Place"]["properties"]["next"] == {"$ref": "#/$defs/7.Place"}
    assert definitions["7"]["properties"]["at"] == {"$ref": "#/$defs/7.Place"}
    assert schema["$defs"] == {"Place": place}, "the client's own is as it was"


def test_logprobs_stay_whole_where_text_is_held_back(live: Any) -> None:
    server = live(answering(ANSWER), max_model_len=2000)
    body = {"messages": SAY, "tools": TOOLS, "logprobs": True, "max_tokens": 150, "stream": True}
    lines = [line for line in server.post(CHAT, **body).text.split("\n\n") if line.startswith("data: {")]
    rows = [json.loads(line[6:])["choices"][0] for line in lines]
    spelt = [bytes(e["bytes"]) for row in rows if row["logprobs"] for e in row["logprobs"]["content"]]
    assert b"".join(spelt) == ANSWER.encode() + b"</s>", "one entry per token, and bytes that make the text"


def test_echo_and_the_prompts_ids_stand_where_vllm_has_them(live: Any) -> None:
    server = live(answering("go on"))
    begun = [*SAY, {"role": "assistant", "content": "well "}]
    body = {"messages": begun, "echo": True, "max_tokens": 20, "return_token_ids": True}
    answer = server.post(CHAT, prompt_logprobs=1, **body).json()
    assert answer["choices"][0]["message"]["content"] == "well go on"
    assert answer["prompt_token_ids"] == list(server.engine.requests[0].prompt_token_ids)
    assert answer["choices"][0]["token_ids"] == [*b"go on", EOS]
    assert answer["prompt_logprobs"][0] is None
    first = answer["prompt_logprobs"][1]
    assert first == {str(ord("u")): {"logprob": -0.5, "rank": 1, "decoded_token": "u"}}
    assert "prompt_token_ids" not in answer["choices"][0]
    message, _, _ = streamed(server, **body)
    assert message["content"] == "well go on"
    alone = server.post(CHAT, messages=SAY, echo=True, max_tokens=20).json()
    assert alone["choices"][0]["message"]["content"] == "go on", "the last message is not the assistant's"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", "x"), ("tools", [{"type": "function"}]),
        ("tools", [{"type": "retrieval", "function": {"name": "x"}}]),
        ("tools", [TOOLS[0], TOOLS[0]]), ("tools", [{"type": "function", "function": {"name": "a b"}}]),
        ("tools", [{"type": "function", "function": {"name": "a", "parameters": []}}]),
        ("tools", [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]),
        ("tool_choice", "auto"), ("tool_choice", "any"), ("tool_choice", 3), ("tool_choice", {"type": "function"}),
        ("tool_choice", {"type": "function", "function": {"name": "look"}}), ("tool_choice", allowing("auto", "look")),
        ("tool_choice", allowing("none", "look")), ("tool_choice", allowing("auto")),
        ("tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": []}),
        ("tool_choice", {"type": "custom", "custom": {"name": "x"}}), ("verbosity", "low"),
        ("moderation", {"model": "x"}),
        ("messages", [{"role": "admin", "content": "x"}]), ("messages", [{"role": "User", "content": "x"}]),
        ("messages", [{"role": 5, "content": "x"}]), ("messages", [{"content": "x"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": "x", "other": 1}]}]),
        ("messages", [{"role": "user", "content": [{"type": "text", "text": 5}]}]),
        ("parallel_tool_calls", "no"),
        ("chat_template", 5), ("chat_template", "{{ messages }}"), ("chat_template_kwargs", []), ("documents", "x"),
        ("documents", ["x"]), ("documents", [{"text": "x"}]), ("reasoning_effort", "huge"), ("echo", "yes"),
        ("add_special_tokens", 1), ("functions", [{"name": "f"}]), ("function_call", "auto"), ("modalities", ["audio"]),
        ("lora_path", "/etc/passwd"),
        ("audio", {"voice": "x"}), ("mm_processor_kwargs", {"a": 1}), ("prompt_embeds", "x"), ("vllm_xargs", {"a": 1}),
        ("prompt_logprobs", -1), ("prompt_logprobs", 21), ("stream_interval", 2), ("truncation_side", "middle"),
        ("spaces_between_special_tokens", "x"), ("logprob_token_ids", [5]),
        ("logprob_token_ids", "x"),
        ("messages", [{"role": "user", "content": 5}]), ("messages", [{"role": "user", "content": ["x"]}]),
        ("messages", [{"role": "assistant", "tool_calls": [{"id": 5}]}]),
        ("messages", [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}]),
        ("messages", [{"role": "user", "content": "\ud800"}]),
    ],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_wrong_fields_are_named(server: Any, field: str, value: Any) -> None:
    body = json.dumps({"messages": SAY, "max_tokens": 2, field: value})
    answer = server.send(body, CHAT)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == "invalid_json" or error["param"].startswith(field), error
    assert not server.engine.requests
    assert server.idle


def test_the_length_by_both_of_its_names(server: Any) -> None:
    both = {"max_tokens": 3, "max_completion_tokens": 3}
    assert server.post(CHAT, messages=SAY, **both).json()["usage"]["completion_tokens"] == 3
    error = server.error(400, path=CHAT, messages=SAY, **(both | {"max_tokens": 4}))
    assert error["param"] == "max_completion_tokens"


def test_no_alternatives_need_no_logprobs(server: Any) -> None:
    choice = server.post(CHAT, messages=SAY, max_tokens=1, top_logprobs=0).json()["choices"][0]
    assert choice["logprobs"] is None


def test_the_tokenizers_routes_know_fields_of_other_servers(server: Any) -> None:
    assert server.post("/tokenize", messages=SAY, mm_processor_kwargs=None).status_code == 200
    error = server.error(400, path="/tokenize", messages=SAY, mm_processor_kwargs={"a": 1})
    assert (error["param"], error["code"]) == ("mm_processor_kwargs", "unsupported_field")


def test_an_unknown_role_is_told_the_known_ones(server: Any) -> None:
    error = server.error(400, path=CHAT, messages=[*SAY, {"role": "bot", "content": "x"}])
    assert error["param"] == "messages[1].role"
    for role in ("system", "developer", "user", "assistant", "tool", "function"):
        assert repr(role) in error["message"]
    assert (
        server.error(400, path="/tokenize", messages=[{"role": "bot", "content": "x"}])["param"]
        == "messages[0].role"
    )


def test_fields_of_other_servers_that_change_nothing_are_taken(server: Any) -> None:
    neutral = {
        "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "session_id": "s", "safety_identifier": "x",
        "prompt_cache_key": "k", "use_beam_search": False, "length_penalty": 1.0, "mm_processor_kwargs": {},
        "vllm_xargs": {}, "kv_transfer_params": None, "thinking_token_budget": None, "repetition_detection": None,
        "prompt_embeds": None, "modalities": ["text"], "functions": [], "function_call": "none", "verbosity": "medium",
        "include_reasoning": True, "suffix": "", "user": "u", "tools": None, "tool_choice": "none", "documents": [],
        "chat_template_kwargs": {}, "reasoning_effort": "low", "truncation_side": "left", "lora_path": None,
    }  # fmt: skip
    answer = server.post(CHAT, messages=SAY, max_tokens=2, **neutral)
    assert answer.status_code == 200, answer.text


def test_stream_options_that_do_not_go_together(server: Any) -> None:
    for fields, param in (
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"stream": True, "stream_interval": 0}, "stream_interval"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"stream_interval": 2}, "stream_interval"),
    ):
        assert server.error(400, path=CHAT, messages=SAY, **fields)["param"] == param


def test_stream_interval_counts_tokens(server: Any) -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 10, "stream_interval": 4, "return_token_ids": True}
    lines = [x for x in server.post("/v1/completions", **body).text.split("\n\n") if x.startswith("data: {")]
    rows = [json.loads(line[6:])["choices"][0] for line in lines]
    assert [len(row["token_ids"]) for row in rows] == [1, 4, 4, 1]
    assert "".join(row["text"] for row in rows) == server.complete("x", max_tokens=10)["choices"][0]["text"]


def test_tokenize_writes_a_chat_as_the_chat_route_does(live: Any) -> None:
    server = live(max_model_len=2000)
    server.tasks.upload("sql", b"SET sql one")
    for fields in (
        {},
        {"tools": TOOLS},
        {"add_generation_prompt": False},
        {"task": "sql"},
        {"model": "tiny-base:sql"},
    ):
        shown = server.post("/tokenize", messages=SAY, **fields).json()["tokens"]
        server.post(CHAT, messages=SAY, max_tokens=1, **fields)
        assert tuple(shown) == server.engine.requests[-1].prompt_token_ids
    assert not server.tasks.leases
    for wrong, status, param in (
        ({"messages": SAY, "prompt": "x"}, 400, "messages"),
        ({"messages": SAY, "task": "nope"}, 404, "task"),
        ({"prompt": "x", "adapter_id": "nope"}, 404, "adapter_id"),
        ({"messages": SAY, "tools": TOOLS, "task": "sql"}, 400, "tools"),
        ({"messages": []}, 400, "messages"),
        ({}, 400, "prompt"),
    ):
        error = server.error(status, path="/tokenize", **wrong)
        assert error["param"] == param
        assert "unknown field" not in error["message"]
        assert " should " not in error["message"], "a sentence of ours, not of the parser's"
    assert server.post("/tokenize", prompt=None, messages=SAY).status_code == 200
    assert server.post("/tokenize", prompt="x", messages=None).status_code == 200


def test_small_routes(server: Any) -> None:
    for method in ("GET", "POST"):
        answer = server.client.request(method, "/ping")
        assert (answer.status_code, answer.content) == (200, b"")
    assert server.client.get("/load").json() == {"server_load": 0}
    info = server.client.get("/tokenizer_info").json()
    assert "eos_token" in info
    assert info["vocab_size"] == 257
    tokens = [104, EOS]
    assert server.post("/detokenize", tokens=tokens).json() == {"prompt": "h</s>"}
    assert server.post("/detokenize", tokens=tokens, skip_special_tokens=True).json() == {"prompt": "h"}


def test_load_counts_what_runs(live: Any) -> None:
    server = live(StubEngine(lambda r: Script([97] * 50, delay=0.05)))
    with server.client.stream(
        "POST", "/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 50}
    ) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()  # kept: an iterator that goes takes the connection with it
        next(lines)
        assert server.client.get("/load").json() == {"server_load": 1}
