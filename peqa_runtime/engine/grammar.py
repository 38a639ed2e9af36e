"""From a `Constraint` to what llguidance compiles, and the limits under which it does. No torch, no tokenizer."""

from __future__ import annotations

import json
import re
from typing import Any

from peqa_runtime.constraint import Constraint
from peqa_runtime.engine.one_of import enforceable
from peqa_runtime.errors import InvalidRequest

llguidance: Any
try:
    import llguidance
except ImportError:  # without it everything but forms works
    llguidance = None

WHITESPACE = r"\x20|\n\x20{0,16}"
"""Between the parts of JSON: a space, or a line break and its indentation. Without a bound a model may never get on."""

_STRICT = {"lenient": False, "coerce_one_of": False}
"""Above what a schema says of itself under `x-guidance`: either would pass over keywords without enforcing them."""
_SPACED = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE, **_STRICT}
_COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":", **_STRICT}

_UNKNOWN = re.compile(r"Unimplemented keys: \[(.{1,200}?)\]")

_MESSAGE = 300
"""Characters of llguidance's message that a client sees."""


def check_installed() -> None:
    """Raise `InvalidRequest` where llguidance is not installed."""
    if llguidance is None:
        raise InvalidRequest(
            "this installation cannot keep answers to a form: llguidance is missing (pip install llguidance)",
            param="structured",
        )


def grammar_text(constraint: Constraint) -> str:
    """llguidance's own notation of a constraint. Raises `InvalidRequest` where that is found to be impossible."""
    source, matcher = constraint.source, llguidance.LLMatcher
    if constraint.kind == "json_schema":
        try:
            options = _COMPACT if constraint.compact else _SPACED
            text: str = matcher.grammar_from_json_schema(_enforceable(source), overrides=options)
        except ValueError as error:
            raise InvalidRequest(str(error)[:_MESSAGE], param="structured") from None
    elif constraint.kind == "regex":
        text = matcher.grammar_from_regex(source)
    elif constraint.kind == "choice":
        text = matcher.grammar_from_regex("|".join(map(_literal, json.loads(source))))
    else:
        text = matcher.grammar_from_lark(_lark(source))
    return text


def new_matcher(tokenizer: Any, constraint: Constraint) -> Any:
    """An `LLMatcher` at the start of the form. Raises `InvalidRequest` with llguidance's reason.

    Compiling may take any time and memory: whoever compiles for strangers asks `grammar_probe` first.
    """
    # States of the lexer take up to 2 kB each, and stay as long as the form is kept.
    limits = llguidance.LLParserLimits(max_lexer_states=20_000, verbose_errors=False)
    matcher = llguidance.LLMatcher(tokenizer, grammar_text(constraint), log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # the first takes longest
    if matcher.is_error():
        raise InvalidRequest(problem(matcher), param="structured")
    return matcher


def problem(matcher: Any) -> str:
    """What is wrong with a matcher that is in error, in few words."""
    text: str = matcher.get_error()
    if text.startswith("NoExtension"):
        return "no text has this form"
    if "oneOf constraints are not supported" in text:
        return (
            "oneOf is enforced where no value can fit two of its options, and that is not certain here: give them "
            "different types, or a required property with different values, or use anyOf"
        )
    if (found := _UNKNOWN.search(text)) is not None:
        return f"keywords that cannot be enforced: {found[1]}; leave them out"
    for noise in ("\n<", "<non-verbose/>", "<state>", "<backtrace>"):
        text = text.split(noise)[0]
    return " ".join(text.split())[:_MESSAGE] or "unknown error"


def _enforceable(source: str) -> str:
    """A schema in keywords that llguidance knows, as far as it can be said in them."""
    if not any(word in source for word in ('"oneOf"', '"uniqueItems"')):
        return source
    return json.dumps(enforceable(json.loads(source)), ensure_ascii=False)


def _lark(source: str) -> str:
    """A grammar in Lark's notation; GBNF's is translated."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        text: str = any_to_lark(source)
    except RecursionError:
        raise InvalidRequest("the grammar is nested too deeply", param="structured") from None
    except Exception as error:  # noqa: BLE001  the translator raises of many kinds
        raise InvalidRequest(
            f"the grammar cannot be read as GBNF: {str(error)[:_MESSAGE]}", param="structured"
        ) from None
    return text


def _literal(text: str) -> str:
    """A regular expression for exactly this text."""
    return "(?:" + "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text) + ")"
