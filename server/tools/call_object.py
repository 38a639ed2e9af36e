"""One function call as JSON, {"name": …, "arguments": {…}}, read a character at a time while it is written."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Literal

ARGUMENTS = ("arguments", "parameters")
_KNOWN = frozenset({"name", "type", "id", *ARGUMENTS})
_SPACE = " \t\r\n"

Place = Literal["start", "key", "colon", "value", "next"]


class CallObject:
    """A call that comes in. Once `begun`, its name is known to be a function's and its arguments are handed on.

    `refused`: it is no call (another function, another key, another shape); `raw` is then all that it took. With a
    `name` given, the object is the arguments alone.
    """

    def __init__(self, names: Collection[str], name: str | None = None) -> None:
        self.name = name
        self.begun = False
        self.refused = False
        self.closed = False
        self.raw = ""
        self._names = names
        self._bare = name is not None
        self._place: Place = "value" if self._bare else "start"
        self._key = ARGUMENTS[0] if self._bare else ""
        self._value = ""
        self._waiting = ""  # arguments that came before the name
        self._complete = False  # they are all there
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, letter: str) -> str:
        """Take one character; return what it adds to the arguments that are handed on."""
        assert not self.closed
        if not self.begun:
            self.raw += letter
        if self._in_string or self._depth or self._place == "value":
            return self._in_value(letter)
        if letter in _SPACE:
            return ""
        if self._place == "start" and letter == "{":
            self._place = "key"
        elif self._place == "key" and letter == '"':
            self._begin_value("key", letter)
        elif self._place == "colon" and letter == ":":
            self._place, self._value = "value", ""
        elif self._place == "next" and letter == ",":
            self._place = "key"
        elif self._place in ("next", "key") and letter == "}":
            return self._end()
        else:
            return self._broken()
        return ""

    def _begin_value(self, place: Place, letter: str) -> None:
        self._place, self._value = place, letter
        self._in_string = True

    def _in_value(self, letter: str) -> str:
        """Within a key or a value; its end is where its strings and brackets are closed."""
        if not self._value and letter in _SPACE:
            return ""
        whole = self._depth == 0 and not self._in_string
        if whole and self._value and letter in ",}" + _SPACE:  # the end of a number or a word
            added = self._take_value()
            self._place = "next"
            return added + (self.push_again(letter) if not (self.refused or self.closed) else "")
        self._value += letter
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif letter == "\\":
                self._escaped = True
            elif letter == '"':
                self._in_string = False
        elif letter == '"':
            self._in_string = True
        elif letter in "{[":
            self._depth += 1
        elif letter in "}]":
            self._depth -= 1
        added = self._streamed(letter)
        closes = letter in '"}]' and not self._in_string and self._depth == 0
        return added + (self._closed_value() if closes else "")

    def push_again(self, letter: str) -> str:
        """Take a character that `raw` has already."""
        raw = self.raw
        added = self.push(letter)
        self.raw = raw
        return added

    def _closed_value(self) -> str:
        if self._place == "key":
            try:
                self._key = json.loads(self._value)
            except ValueError:
                return self._broken()
            if self._key not in _KNOWN and not self.begun:
                return self._refuse()
            self._place, self._value = "colon", ""
            return ""
        added = self._take_value()
        if not self.closed:
            self._place = "next"
        return added

    def _streamed(self, letter: str) -> str:
        """Arguments that are an object are handed on as they come, if the name is known."""
        if self._place != "value" or self._key not in ARGUMENTS or self._complete or self._value[0] != "{":
            return ""
        if self.name is None:
            return ""
        if not self.begun:
            self.begun = True
            return self._value
        return letter

    def _take_value(self) -> str:
        """A value has ended: keep what it says."""
        value, self._value = self._value, ""
        if self._key == "name" and not self.begun:
            return self._take_name(value)
        if self._key not in ARGUMENTS or self._complete:
            return ""
        self._complete = True
        if value.startswith("{"):
            if self._bare:
                self.closed = True
            elif not self.begun:
                self._waiting = value
            return ""
        try:  # some models write the object as a string, or null for none
            inner = json.loads(value)
        except ValueError:
            return self._broken()
        if inner is None or isinstance(inner, str):
            self._waiting = inner or "{}"
            return self._begin()
        return self._broken()

    def _take_name(self, value: str) -> str:
        try:
            name = json.loads(value)
        except ValueError:
            return self._refuse()
        if not isinstance(name, str) or name not in self._names:
            return self._refuse()
        self.name = name
        return self._begin()

    def _begin(self) -> str:
        """Hand on what waited, once the name is known and the arguments are all there."""
        if self.name is None or not self._complete or self.begun:
            return ""
        self.begun = True
        return self._waiting

    def _end(self) -> str:
        """The closing brace. A call without arguments has none."""
        if self.name is None:
            return self._refuse()
        self.closed = True
        if self.begun:
            return ""
        self._complete, self._waiting = True, self._waiting or "{}"
        return self._begin()

    def _broken(self) -> str:
        """No JSON: no call, unless it has begun, which cannot be taken back."""
        if not self.begun:
            return self._refuse()
        self.closed = True
        return ""

    def _refuse(self) -> str:
        self.refused = self.closed = True
        return ""
