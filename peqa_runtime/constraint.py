"""What form an answer must have: a JSON schema, a regular expression, some choices or a grammar. Plain values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peqa_runtime.errors import InvalidRequest

ConstraintKind = Literal["json_schema", "regex", "choice", "grammar"]

MAX_SOURCE_BYTES = 128 * 1024
"""UTF-8 bytes of a schema, expression, grammar or of all choices together."""

MAX_DEPTH = 64
"""Objects and lists of a schema within each other."""

MAX_CHOICES = 2048


@dataclass(frozen=True)
class Constraint:
    """A form that every answer keeps to, from its first token to its last. Make it with one of the constructors.

        SamplingParams(max_tokens=64, structured=Constraint.json_schema({"type": "object"}))

    An answer ends (`finish_reason` "stop") where its form is complete and cannot go on; where it is complete and can
    go on, the model may end it. `source` is the schema as JSON, the expression, the choices as a JSON list, or the
    grammar. `compact`: JSON comes without white space between its parts. The constructors check kind and size; whether
    the source means anything is seen when it is compiled, at the latest when a request with it is added. Both raise
    `InvalidRequest` with param "structured".
    """

    kind: ConstraintKind
    source: str
    compact: bool = False

    def __post_init__(self) -> None:
        """Check the size, and that the source can be written as UTF-8."""
        try:
            size = len(self.source.encode("utf-8"))
        except UnicodeEncodeError:
            raise _refused(f"a {_NAMES[self.kind]} must be valid Unicode (lone surrogate found)") from None
        if size > MAX_SOURCE_BYTES:
            raise _refused(
                f"a {_NAMES[self.kind]} may have at most {MAX_SOURCE_BYTES} bytes, this one has {size}"
            )
        if not self.source.strip() and self.kind != "regex":
            raise _refused(f"the {_NAMES[self.kind]} is empty")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str, *, compact: bool = False) -> Constraint:
        """JSON that a schema accepts. Keys come in the order of the schema's `properties`.

        `schema` may be its JSON text. A keyword that cannot be enforced is refused when the schema is compiled; `oneOf`
        can be where no value fits two of its options.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                raise _refused(f"the JSON schema is not valid JSON: {str(error)[:200]}") from None
        if schema is False:
            raise _refused("the JSON schema is false, which nothing fulfils")
        schema = {} if schema is True else schema
        if not isinstance(schema, Mapping):
            raise _refused(f"a JSON schema is an object or a boolean, not {type(schema).__name__}")
        _check_depth(schema)
        try:
            text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise _refused(f"the JSON schema holds what JSON cannot: {str(error)[:200]}") from None
        return cls("json_schema", text, compact)

    @classmethod
    def json_object(cls, *, compact: bool = False) -> Constraint:
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, compact=compact)

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Text that the whole of a regular expression matches (Rust's syntax: no look-around, no references back)."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Iterable[str]) -> Constraint:
        """One of some texts."""
        options = list(choices)
        if not all(isinstance(option, str) for option in options):
            raise _refused("choices must be texts")
        different = list(dict.fromkeys(options))
        if not 1 <= len(different) <= MAX_CHOICES:
            raise _refused(f"choices must be 1 to {MAX_CHOICES} different texts, got {len(different)}")
        return cls("choice", json.dumps(different, ensure_ascii=False))

    @classmethod
    def grammar(cls, grammar: str) -> Constraint:
        """Text of a context-free grammar: Lark's notation with the start rule `start`, or GBNF's with `root`.

        In Lark's a rule may hold `%json {schema}` and special tokens by name (`<|im_end|>`).
        """
        return cls("grammar", grammar)


_NAMES: Mapping[ConstraintKind, str] = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "choice": "list of choices",
    "grammar": "grammar",
}


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="structured")


def _check_depth(schema: object) -> None:
    """Raise `InvalidRequest` when values are nested deeper than `MAX_DEPTH`. Not recursive itself."""
    level: list[object] = [schema]
    for _ in range(MAX_DEPTH + 1):
        values = [
            v.values() if isinstance(v, Mapping) else v
            for v in level
            if isinstance(v, Mapping | list | tuple)
        ]
        if not values:
            return
        level = [v for group in values for v in group]
    raise _refused(f"a JSON schema may be nested at most {MAX_DEPTH} deep")
