"""Function calls in what a model writes, found while it is written, whatever the pieces it comes in.

    <tool_call>{"name": …, "arguments": {…}}</tool_call>            Hermes, Qwen
    {"name": …, "parameters": {…}}                                  bare JSON, Llama 3; several with ";" between them
    [{"name": …, "arguments": {…}}, …]                              a bare array
    <|python_tag|>{"name": …, "parameters": {…}}                    Llama 3
    [TOOL_CALLS][{"name": …, "arguments": {…}}, …]                  Mistral
    [TOOL_CALLS]name{…}, [TOOL_CALLS]name[ARGS]{…}                  Mistral, newer

Bare JSON is a call only at the beginning of an answer. What looks like a call but is none (a function that was not
offered, JSON of another shape) is content, as it stands. Arguments are handed on as they come, so that what the
model then breaks off stays in pieces, as it does at OpenAI.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from peqa_server.tools.call_object import CallObject

HERMES, HERMES_END = "<tool_call>", "</tool_call>"
MISTRAL, MISTRAL_ARGS, MISTRAL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
PYTHON_TAG = "<|python_tag|>"
MARKERS = (HERMES, MISTRAL, PYTHON_TAG)
"""What begins a call in the middle of an answer."""

_PLAIN = re.compile(r"[^<\[]+")
"""Text in which no marker begins."""

_AFTER_BARE = " \t\r\n;,]"
_NAME_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


@dataclass
class CallDelta:
    """What is new of one call. `name` and `id` stand in its first delta only."""

    index: int
    arguments: str = ""
    name: str | None = None
    id: str | None = None


@dataclass
class Parsed:
    """What a piece of text has given: content, and news of calls in their order."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class CallReader(Protocol):
    """Takes an answer's text in pieces and says what is content in it and what are calls."""

    num_calls: int

    def push(self, text: str) -> Parsed:
        """Take text; return what is certain now."""

    def finish(self) -> Parsed:
        """The rest, when the answer has ended."""

    def finish_reason(self, reason: str | None) -> str | None:
        """The choice's `finish_reason`, where the engine's is `reason`."""


class NamedCall:
    """The answer is the arguments of one function, which the client has named.

    Its `finish_reason` stays "stop", as it does at OpenAI.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.num_calls = 0

    def push(self, text: str) -> Parsed:
        """Take text: it is arguments."""
        if not text:
            return Parsed()
        if self.num_calls:
            return Parsed(calls=[CallDelta(0, text)])
        self.num_calls = 1
        return Parsed(calls=[CallDelta(0, text, self._name, _new_id())])

    def finish(self) -> Parsed:
        """Nothing waits."""
        return Parsed()

    def finish_reason(self, reason: str | None) -> str | None:
        """As it is."""
        return reason


class ToolCallParser:
    """Takes an answer's text in pieces. `parallel` false: what follows the first call is dropped."""

    def __init__(self, names: Collection[str], *, parallel: bool = True) -> None:
        self._names = names
        self._parallel = parallel
        self._state = self._beginning
        self._held = ""  # taken, but neither content nor call yet
        self._opened = ""  # the characters before a call's object, should it turn out to be none
        self._object: CallObject | None = None
        self._in_hermes = False
        self._out = Parsed()
        self.num_calls = 0

    def push(self, text: str) -> Parsed:
        """Take text; return what is certain now."""
        at = 0
        while at < len(text):
            plain = _PLAIN.match(text, at) if self._state == self._text and not self._held.strip() else None
            if plain is not None:
                self._content(plain[0])  # in one go: long answers have little else
                at = plain.end()
            else:
                self._state(text[at])
                at += 1
        return self._taken()

    def finish(self) -> Parsed:
        """The rest, when the answer has ended. A call that was not recognised by now is content."""
        if self._object is not None:
            self._held = "" if self._object.begun else self._object.raw
        elif self._state == self._after_hermes:
            self._held = ""  # the beginning of an end tag
        left = self._opened + self._held
        if left.strip() or not self.num_calls:  # white space after a call is no content
            self._out.content += left
        self._object, self._opened, self._held, self._state = None, "", "", self._muted
        return self._taken()

    def finish_reason(self, reason: str | None) -> str | None:
        """As it is, but "tool_calls" for an answer that is complete and has calls."""
        return "tool_calls" if reason == "stop" and self.num_calls else reason

    def _taken(self) -> Parsed:
        taken, self._out = self._out, Parsed()
        return taken

    # States: each takes one character.

    def _beginning(self, letter: str) -> None:
        """Nothing but white space has come."""
        if letter.isspace():
            self._held += letter
        elif letter == "{":
            self._open(self._held, letter)
        elif letter == "[":
            self._held += letter
            self._state = self._array_or_marker
        else:
            self._state = self._text
            self._text(letter)

    def _array_or_marker(self, letter: str) -> None:
        """After a bracket: an array of calls, or Mistral's marker, or neither."""
        if letter == "{":
            self._open(self._held, letter)
        elif letter.isspace():
            self._held += letter
        else:
            self._state = self._text
            self._text(letter)

    def _text(self, letter: str) -> None:
        """Content, in which a marker begins a call."""
        self._held += letter
        for marker in MARKERS:
            if self._held.endswith(marker):
                before = self._held.removesuffix(marker)
                self._out.content += before.rstrip()
                self._held, self._opened = "", before[len(before.rstrip()) :] + marker
                self._in_hermes = marker == HERMES
                self._state = self._mistral if marker == MISTRAL else self._object_expected
                return
        kept = self._possible_marker()
        if kept < len(self._held):
            certain = self._held[: len(self._held) - kept].rstrip()
            self._out.content += certain
            self._held = self._held[len(certain) :]

    def _object_expected(self, letter: str) -> None:
        """After a marker: the call's object, or the bracket of an array of them."""
        if letter == "{":
            self._open(self._opened, letter)
        elif letter.isspace() or (letter == "[" and not self._in_hermes):
            self._opened += letter
        else:
            self._no_call(letter)

    def _mistral(self, letter: str) -> None:
        """After Mistral's marker: an array, an object, or a function's name."""
        if letter in _NAME_LETTERS:
            self._held = letter
            self._state = self._mistral_name
        else:
            self._object_expected(letter)

    def _mistral_name(self, letter: str) -> None:
        """A function's name, its call's id where there is one, then the object of its arguments."""
        name, _, rest = self._held.partition("[")
        if letter == "{" and (not rest or rest.endswith(MISTRAL_ARGS[1:])):
            name = name.strip()
            if name in self._names:
                self._object = CallObject(self._names, name=name)
                self._opened, self._held = self._opened + self._held, ""
                self._state = self._inside
                self._inside(letter)
                return
        elif len(self._held) < 200 and (rest or letter in _NAME_LETTERS or letter == "["):
            self._held += letter
            return
        self._opened, self._held = self._opened + self._held, ""
        self._no_call(letter)

    def _inside(self, letter: str) -> None:
        """Within a call's object."""
        reader = self._object
        assert reader is not None
        begun = reader.begun
        arguments = reader.push(letter)
        if reader.refused:
            raw = self._opened + reader.raw
            self._object, self._opened, self._state = None, "", self._text
            self._content(raw)
            return
        if reader.begun and not begun:
            self._opened = ""
            self._out.calls.append(CallDelta(self.num_calls, arguments, reader.name, _new_id()))
            self.num_calls += 1
        elif arguments:
            self._more(arguments)
        if reader.closed:
            self._object, self._opened = None, ""
            self._state = self._after_hermes if self._in_hermes else self._after_bare
            if not self._parallel:
                self._state = self._muted

    def _after_hermes(self, letter: str) -> None:
        """After a call's object: its end tag."""
        self._held += letter
        tag = self._held.lstrip()
        if tag == HERMES_END:
            self._held, self._state = "", self._text
        elif not HERMES_END.startswith(tag):
            held, self._held, self._state = self._held, "", self._text
            for again in held:
                self._text(again)

    def _after_bare(self, letter: str) -> None:
        """After a call that needs no tags: separators, another one, or content."""
        if letter == "{":
            self._open("", letter)
        elif letter not in _AFTER_BARE:
            self._state = self._text
            self._text(letter)

    def _muted(self, letter: str) -> None:
        """Nothing more is wanted."""

    # What the states share.

    def _open(self, before: str, letter: str) -> None:
        self._opened, self._held = before, ""
        self._object = CallObject(self._names)
        self._state = self._inside
        self._inside(letter)

    def _no_call(self, letter: str) -> None:
        """A marker that begins no call is content, and so is what follows."""
        opened, self._opened, self._state = self._opened, "", self._text
        self._content(opened)
        self._text(letter)

    def _content(self, text: str) -> None:
        """Content for certain, but for white space at its end, which a call may follow."""
        text, self._held = self._held + text, ""
        kept = len(text) - len(text.rstrip())
        self._out.content += text[: len(text) - kept]
        self._held = text[len(text) - kept :]

    def _more(self, arguments: str) -> None:
        last = self._out.calls[-1] if self._out.calls else None
        if last is not None and last.index == self.num_calls - 1:
            last.arguments += arguments
        else:
            self._out.calls.append(CallDelta(self.num_calls - 1, arguments))

    def _possible_marker(self) -> int:
        """Length of the longest end of what is held that may become a marker."""
        longest = max(map(len, MARKERS)) - 1
        for length in range(min(len(self._held), longest), 0, -1):
            if any(marker.startswith(self._held[-length:]) for marker in MARKERS):
                return length
        return 0


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
