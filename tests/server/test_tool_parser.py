"""Function calls found in text: every format, whatever the pieces, and what only looks like a call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peqa_server.tools.parser import NamedCall, Parsed, ToolCallParser

NAMES = ("look", "add_2")
LOOK = '{"name": "look", "arguments": {"at": "}{\\" [x]", "n": [1, {"a": null}]}}'
LOOK_ARGUMENTS = '{"at": "}{\\" [x]", "n": [1, {"a": null}]}'
ADD = '{"name": "add_2", "arguments": {}}'

Read = tuple[str, list[tuple[str, str]], bool]


def joined(parts: list[Parsed]) -> tuple[str, list[tuple[str, str]]]:
    """Content, and (name, arguments) of the calls; checks that deltas are as OpenAI's clients need them."""
    content, names, arguments, ids = "", [], [], []
    for part in parts:
        content += part.content
        for delta in part.calls:
            if delta.name is not None:
                assert delta.index == len(names), "a new call has the next index"
                assert delta.id is not None
                names.append(delta.name)
                arguments.append("")
                ids.append(delta.id)
            else:
                assert delta.id is None
                assert delta.index == len(names) - 1, "only the last call grows"
            arguments[delta.index] += delta.arguments
    assert len(set(ids)) == len(ids)
    return content, list(zip(names, arguments, strict=True))


def read(text: str, size: int = 1, **options: Any) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser(NAMES, **options)
    parts = [parser.push(text[i : i + size]) for i in range(0, len(text), size)]
    return joined([*parts, parser.finish()])


CALLS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (f"<tool_call>\n{LOOK}\n</tool_call>", "", [("look", LOOK_ARGUMENTS)]),
    (f"I look.\n<tool_call>{LOOK}</tool_call>\n<tool_call>\n{ADD}</tool_call>\n", "I look.",
     [("look", LOOK_ARGUMENTS), ("add_2", "{}")]),
    (f"<tool_call>{ADD}</tool_call> done", " done", [("add_2", "{}")]),
    (f"<tool_call>{ADD}<tool_call>{ADD}", "", [("add_2", "{}"), ("add_2", "{}")]),
    (LOOK, "", [("look", LOOK_ARGUMENTS)]),
    (f" \n{LOOK.replace('arguments', 'parameters')} ", "", [("look", LOOK_ARGUMENTS)]),
    (f"{LOOK}; {ADD}", "", [("look", LOOK_ARGUMENTS), ("add_2", "{}")]),
    (f"{LOOK}\n{ADD}", "", [("look", LOOK_ARGUMENTS), ("add_2", "{}")]),
    (f"[{LOOK} , {ADD}]", "", [("look", LOOK_ARGUMENTS), ("add_2", "{}")]),
    (f"<|python_tag|>{LOOK}", "", [("look", LOOK_ARGUMENTS)]),
    (f"[TOOL_CALLS] [{LOOK}, {ADD}]", "", [("look", LOOK_ARGUMENTS), ("add_2", "{}")]),
    ('Well. [TOOL_CALLS]look{"at": 1}[TOOL_CALLS]add_2[ARGS]{}', "Well.", [("look", '{"at": 1}'), ("add_2", "{}")]),
    ('[TOOL_CALLS]look[CALL_ID]x9[ARGS]{"at": 1}', "", [("look", '{"at": 1}')]),
    ('{"arguments": {"a": 1}, "type": "function", "id": "7", "name": "look"}', "", [("look", '{"a": 1}')]),
    ('{"name": "look", "arguments": "{\\"a\\": 1}"}', "", [("look", '{"a": 1}')]),
    ('{"name": "look", "arguments": null}', "", [("look", "{}")]),
    ('{"name": "look"}', "", [("look", "{}")]),
    ('{"name": "l\\u006fok", "arguments": {}}', "", [("look", "{}")]),
    # broken off, or broken, after the call had begun
    ('{"name": "look", "arguments": {"a": [1, ', "", [("look", '{"a": [1, ')]),
    ('<tool_call>{"name": "look", "arguments": {"a": 1}}</tool_', "", [("look", '{"a": 1}')]),
    ('{"name": "look", "arguments": {"a": 1}, ?', "", [("look", '{"a": 1}')]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "content", "calls"), CALLS, ids=range(len(CALLS)))
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_found(text: str, content: str, calls: list[tuple[str, str]], size: int) -> None:
    assert read(text, size) == (content, calls)


CONTENT = [
    "", " ", "\n\nplain text \n", "a < b, c <tool", "<tool_call> is a tag", "[1, 2]", "[]", "{}", '{"a": 1}',
    "[TOOL_CALLS]",
    '{"name": "other", "arguments": {}}', '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
    '{"name": 5, "arguments": {}}', '{"name": "look", "arguments": 5}', '{"name": "look", "arguments": [1]}',
    '{"name": "look", "argu', '{"arguments": {"a": 1}}', '{"name": "look", "more": 1}', '[TOOL_CALLS]other{"a": 1}',
    f"The call is {LOOK}", '{"name": "look" "arguments": {}}', '{"name": "\\x"}', "[TOOL_CALLS]look",
    "[TOOL_CALLS]look[AR",
]  # fmt: skip


@pytest.mark.parametrize("text", CONTENT)
@pytest.mark.parametrize("size", [1, 1000])
def test_what_only_looks_like_a_call_is_content_as_it_stands(text: str, size: int) -> None:
    assert read(text, size) == (text, [])


PIECES = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]", LOOK, ADD, LOOK[:30], LOOK[30:],
         "look", "{", "}", "[", "]", '"name"', ":", '"look"', ",", '"', "\\", " ", "\n", "text",
         '{"arguments":', "null"]
    ),
    max_size=8,
).map("".join)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(text=PIECES, cuts=st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_the_pieces_that_text_comes_in_change_nothing(text: str, cuts: list[int]) -> None:
    parser = ToolCallParser(NAMES)
    parts, at = [], 0
    while at < len(text):
        size = cuts[len(parts) % len(cuts)]
        parts.append(parser.push(text[at : at + size]))
        at += size
    found = joined([*parts, parser.finish()])
    assert found == read(text, 10_000)
    if not found[1]:
        assert found[0] == text, "without a call, nothing is lost"


@settings(max_examples=100, deadline=None)
@given(
    arguments=st.dictionaries(
        st.text(max_size=8),
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=8), st.lists, max_leaves=6),
        max_size=4,
    ),
    indent=st.sampled_from([None, 1]),
)
def test_any_arguments_come_through_letter_by_letter(arguments: dict[str, Any], indent: int | None) -> None:
    text = json.dumps(arguments, indent=indent, ensure_ascii=False)
    content, calls = read(f'<tool_call>{{"name": "look", "arguments": {text}}}</tool_call>')
    assert (content, calls) == ("", [("look", text)])


def test_arguments_are_handed_on_as_they_come() -> None:
    parser = ToolCallParser(NAMES)
    begin = parser.push('{"name": "look", "arguments": {"a')
    assert [(d.name, d.arguments) for d in begin.calls] == [("look", '{"a')]
    assert [(d.name, d.arguments) for d in parser.push('": 1').calls] == [(None, '": 1')]
    assert parser.finish_reason("stop") == "tool_calls"
    assert parser.finish_reason("length") == "length"
    assert parser.finish_reason(None) is None


def test_only_the_first_call_where_one_is_allowed() -> None:
    for text in (f"{LOOK};{ADD} more", f"<tool_call>{LOOK}</tool_call><tool_call>{ADD}</tool_call>"):
        assert read(text, parallel=False) == ("", [("look", LOOK_ARGUMENTS)])


def test_a_named_call_is_all_of_the_text() -> None:
    reader = NamedCall("look")
    parts = [reader.push(""), reader.push('{"a":'), reader.push("1}"), reader.finish()]
    assert joined(parts) == ("", [("look", '{"a":1}')])
    assert reader.finish_reason("stop") == "stop"
