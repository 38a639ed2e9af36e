"""Chats: prompts by templates with and without tools, calls in answers whole and streamed, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from server_stubs import EOS, MANIFEST, Script, StubEngine
from transformers import AutoTokenizer

from peqa_runtime.core import Lease
from peqa_runtime.errors import InvalidRequest
from peqa_server.chat_prompt import chat_prompt, template_names
from peqa_server.chat_schemas import ChatCompletionRequest
from peqa_server.errors import ApiError
from peqa_server.services import ServedModel
from peqa_server.settings import ServerSettings
from peqa_server.tool_use import tool_use

CHAT = "/v1/chat/completions"
SAY = [{"role": "user", "content": "hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "description": "Looks", "parameters": {"type": "object"}},
    },
    {"type": "function", "function": {"name": "add_2"}},
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "é"}'}}
HISTORY = [
    *SAY,
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "annotations": [], "audio": None},
    {"role": "tool", "tool_call_id": "call_1", "content": "a door"},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "a "},
                                                               {"type": "text", "text": "cat"}]},
]  # fmt: skip

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
KNOWING = (
    "{# documents enable_thinking #}{% if tools %}[{% for t in tools %}{{ t.function.name }}:"
    "{{ t.function.parameters | tojson }};{% endfor %}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "({{ c.function.name }} {{ c.function.arguments.at }}){% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_hf_folder: Path) -> Any:
    """A tokenizer of transformers, whose templates run as in a real server."""
    return AutoTokenizer.from_pretrained(tiny_hf_folder)


@pytest.fixture
def written(tokenizer: Any) -> Any:
    """`written(template, **fields)`: the prompt of a chat on the base."""

    def write(
        template: Any, *, lease: Lease = Lease("base", ""), trusted: bool = False, **fields: Any
    ) -> str:
        own = copy.copy(tokenizer)
        own.chat_template = template
        model = ServedModel(MANIFEST, own, max_model_len=200, vocab_size=len(own))
        wanted = ChatCompletionRequest.model_validate({"messages": SAY, **fields})
        settings = ServerSettings(client_chat_templates=trusted)
        prompt = chat_prompt(model, lease, wanted, tool_use(wanted), settings)
        assert prompt.text is not None
        return prompt.text

    return write


def test_a_template_that_knows_tools_gets_them(written: Any) -> None:
    assert written(KNOWING) == "<user>hi"
    text = written(KNOWING, messages=HISTORY, tools=TOOLS)
    shown = '[look:{"type": "object"};add_2:{"type": "object", "properties": {}};]'
    assert text == shown + "<user>hi<assistant>(look é)<tool>a door<tool>a cat"
    assert written(KNOWING, tools=TOOLS, tool_choice="none") == "<user>hi"
    by_name = {"default": PLAIN, "tool_use": KNOWING}
    assert written(by_name) == "<user>hi<a>"
    assert written(by_name, tools=TOOLS).startswith("[look:")


def test_a_template_that_does_not_gets_them_as_text(written: Any) -> None:
    text = written(PLAIN, messages=HISTORY, tools=TOOLS)
    head, rest = text.split("<user>", 1)
    assert head.startswith("<system>You can call functions.")
    tools = [json.loads(line) for line in head.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()]
    assert [tool["function"]["name"] for tool in tools] == ["look", "add_2"]
    assert rest == (
        'hi<assistant><tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>'
        "<user><tool_response>\na door\n</tool_response>\n<tool_response>\na cat\n</tool_response><a>"
    )
    own = written(PLAIN, messages=[{"role": "system", "content": "Be brief."}, *SAY], tools=TOOLS)
    assert own.startswith("<system>Be brief.\n\nYou can call functions.")
    assert written(PLAIN, messages=HISTORY).startswith("<user>hi<assistant><tool_call>"), (
        "history needs no tools"
    )


def test_roles_kwargs_and_documents(written: Any) -> None:
    developer = [{"role": "developer", "content": "Be brief."}, *SAY]
    assert written(PLAIN, messages=developer) == "<system>Be brief.<user>hi<a>"
    assert written(PLAIN + "{{ 'developer' }}", messages=developer).startswith("<developer>")
    thinking = PLAIN + "{% if enable_thinking %}T{% endif %}{{ reasoning_effort }}"
    assert written(thinking, chat_template_kwargs={"enable_thinking": True}) == "<user>hi<a>T"
    assert written(thinking, reasoning_effort="high") == "<user>hi<a>high"
    assert written(PLAIN, reasoning_effort="high") == "<user>hi<a>"
    documents = PLAIN + "{% for d in documents or [] %}{{ d.text }}{% endfor %}"
    assert written(documents, documents=[{"text": "one"}, {"text": "two"}]) == "<user>hi<a>onetwo"
    begun = [*SAY, {"role": "assistant", "content": "well"}]
    assert written(PLAIN, messages=begun, continue_final_message=True).endswith("<assistant>well")
    assert written(PLAIN, add_generation_prompt=False) == "<user>hi"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"documents": [{"text": "x"}]}, "documents"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages"),
        (
            {"messages": [*SAY, {"role": "assistant",
                                 "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}]}]},
            "messages",
        ),
    ],
    ids=lambda v: str(v)[:40],
)  # fmt: skip
def test_what_a_prompt_cannot_be_made_of(written: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises((InvalidRequest, ApiError)) as refusal:
        written(PLAIN, **fields)
    assert refusal.value.param == param
    assert len(str(refusal.value)) > 20


def test_a_clients_template_runs_where_the_operator_lets_it_and_cannot_break_out(written: Any) -> None:
    assert written(PLAIN, trusted=True, chat_template="{{ messages[0].content | upper }}") == "HI"
    for template in (
        "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}", "{{ messages[9].content + 1 }}",
        "{% if %}", "{{ raise_exception('no') }}", "{% for i in range(10**9) %}{% endfor %}",
        "{{ namespace.__init__.__globals__ }}",
    ):  # fmt: skip
        with pytest.raises(InvalidRequest, match="chat template"):
            written(PLAIN, trusted=True, chat_template=template)


def test_a_tuned_task_takes_one_message_and_nothing_that_it_does_not_know(written: Any) -> None:
    lease = Lease("sql", "r" * 64, "channel", "Q: {prompt}\nA:")
    assert written(PLAIN, lease=lease) == "Q: hi\nA:"
    for field, value in {
        "tools": TOOLS, "documents": [{"text": "x"}], "chat_template_kwargs": {"a": 1}, "continue_final_message": True,
    }.items():  # fmt: skip
        with pytest.raises(InvalidRequest) as refusal:
            written(PLAIN, lease=lease, **{field: value})
        assert refusal.value.param == field


def test_names_of_a_template_are_those_of_its_code() -> None:
    names = template_names("{# tools #}documents{{ messages[0]['tool_calls'] }}{% set x = 'a word' %}")
    assert {"messages", "tool_calls", "x"} <= names
    assert not {"tools", "documents", "word"} & names


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
        ("tool_choice", {"type": "function", "function": {"name": "look"}}), ("parallel_tool_calls", "no"),
        ("chat_template", 5), ("chat_template", "{{ messages }}"), ("chat_template_kwargs", []), ("documents", "x"),
        ("documents", ["x"]), ("documents", [{"text": "x"}]), ("reasoning_effort", "huge"), ("echo", "yes"),
        ("add_special_tokens", 1), ("functions", [{"name": "f"}]), ("function_call", "auto"), ("modalities", ["audio"]),
        ("audio", {"voice": "x"}), ("mm_processor_kwargs", {"a": 1}), ("prompt_embeds", "x"), ("vllm_xargs", {"a": 1}),
        ("prompt_logprobs", -1), ("prompt_logprobs", 21), ("stream_interval", 2), ("truncation_side", "middle"),
        ("truncation_side", "left"), ("spaces_between_special_tokens", "x"), ("logprob_token_ids", [5]),
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
        assert server.error(status, path="/tokenize", **wrong)["param"] == param


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
        next(answer.iter_lines())
        assert server.client.get("/load").json() == {"server_load": 1}
