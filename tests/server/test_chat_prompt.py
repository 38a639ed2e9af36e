"""Prompts of chats: by templates with and without tools, by tasks, and what no prompt can be made of."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from server_stubs import MANIFEST
from transformers import AutoTokenizer

from peqa_runtime.core import Lease
from peqa_runtime.errors import InvalidRequest
from peqa_server.fields.chat_schemas import ChatCompletionRequest
from peqa_server.http.errors import ApiError
from peqa_server.openai.chat_prompt import ChatTemplate, chat_prompt
from peqa_server.services import ServedModel
from peqa_server.settings import ServerSettings
from peqa_server.tools.use import tool_use

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
    thought = "{% for m in messages %}{{ m.reasoning_content }}{% endfor %}"
    for name in ("reasoning", "reasoning_content"):
        messages = [{"role": "assistant", "content": "x", name: "so"}]
        assert written(thought, messages=messages) == "so"
    begun = [*SAY, {"role": "assistant", "content": "well"}]
    assert written(PLAIN, messages=begun, continue_final_message=True).endswith("<assistant>well")
    assert written(PLAIN, add_generation_prompt=False) == "<user>hi"


def test_calls_and_results_of_the_older_kind(written: Any) -> None:
    """Before there were tool_calls, the assistant's message had function_call, and its result the role "function"."""
    history = [
        *SAY,
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "look", "content": "a door"},
    ]
    assert written(KNOWING, messages=history) == "<user>hi<assistant>(look é)<tool>a door"
    ids = "{% for m in messages %}{{ m.tool_call_id or (m.tool_calls or [{}])[0].id }};{% endfor %}"
    assert written(ids, messages=history) == ";look;look;"
    assert "<tool_response>\na door\n</tool_response>" in written(PLAIN, messages=history)


def test_an_assistants_message_may_have_no_content(written: Any) -> None:
    for message, text in (
        ({"content": None, "tool_calls": [CALL]}, "<assistant>(look é)"),
        ({"content": None, "refusal": "No."}, "<assistant>No."),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "<assistant>No."),
        ({"content": ""}, "<assistant>"),
        ({"content": "{}", "parsed": {}, "reasoning": "so"}, "<assistant>{}"),
        (
            {"tool_calls": [CALL | {"function": CALL["function"] | {"parsed_arguments": {"at": 1}}}]},
            "<assistant>(look é)",
        ),
    ):
        assert written(KNOWING, messages=[*SAY, {"role": "assistant", **message}]) == "<user>hi" + text


def test_marks_for_other_servers_caches_are_taken(written: Any) -> None:
    marks = ({"cache_control": {"type": "ephemeral"}}, {"prompt_cache_breakpoint": {"mode": "explicit"}})
    parts = [{"type": "text", "text": "hi", **mark} for mark in marks]
    assert written(PLAIN, messages=[{"role": "user", "content": parts}]) == "<user>hihi<a>"


def allowing(mode: str, *functions: dict[str, Any]) -> dict[str, Any]:
    tools = [{"type": "function", "function": function} for function in functions]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_the_model_is_told_of_allowed_tools_only(written: Any) -> None:
    for function in ({"name": "look"}, TOOLS[0]["function"]):
        text = written(KNOWING, tools=TOOLS, tool_choice=allowing("auto", function))
        assert text == '[look:{"type": "object"};]<user>hi'


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template": "x"}, "chat_template"),
        ({"tools": TOOLS, "tool_choice": allowing("auto", {"name": "other"})}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowing("auto", {"name": "look", "description": "Other"})}, "tool_choice"),
        ({"tool_choice": allowing("required", {"name": "look"})}, "tool_choice"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"documents": [{"text": "x"}]}, "documents"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "function_call": CALL["function"]}]},
         "messages[0].function_call"),
        ({"messages": [{"role": "system", "content": "x", "refusal": "no"}]}, "messages[0].refusal"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].name"),
        *[({"messages": [*SAY, {"role": role, "content": None}]}, "messages[1].content")
          for role in ("system", "developer", "user", "assistant")],
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "tool_call_id": "1", "content": None}]}, "messages[0].content"),
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


def test_what_a_template_reads_is_in_its_code() -> None:
    template = ChatTemplate("{# tools #}documents{{ messages[0]['tool_calls'] }}{% set x = 'a word' %}")
    for name in ("messages", "tool_calls", "x"):
        assert template.reads(name)
    assert template.reads("tools", "tool_calls")
    assert not template.reads("tools", "documents", "word")


def test_a_task_tuned_on_conversations_takes_the_template(written: Any) -> None:
    tuned = Lease("mine", "revision", "channel", "{messages}")
    assert written(PLAIN, messages=[*SAY, {"role": "assistant", "content": "yes"}, *SAY], lease=tuned) == (
        "<user>hi<assistant>yes<user>hi<a>"
    )
