"""JSON schemas in keywords that llguidance enforces: `oneOf` as `anyOf`, where no value can fit two of its options.

llguidance finds that out by itself for options that stand side by side. Programs write them as references to
definitions (Pydantic's unions with a discriminator), or leave a part of them to the schema around. What is not proven
here stays as it is, so that an answer always fits its schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from peqa_runtime.json_schema import with_parts

_OBJECT = frozenset({"object"})
_TYPES = frozenset({"null", "boolean", "object", "array", "number", "string"})
_DEPTH = 6
"""References and parts within each other that a proof goes through."""
_MOST_PARTS = 200_000
"""Schemas that the proofs of one form look at, all together: some tenths of a second."""
_OLD_DRAFT = re.compile(r"draft-0[3-7]")


def enforceable(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with each `oneOf` whose options exclude each other as an `anyOf`, and without `uniqueItems: false`.

    Both accept the same values as before. The schema itself is not changed.
    """
    proof = _Proof(schema)

    def walk(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        new = with_parts(node, walk)
        if new.get("uniqueItems") is False:
            del new["uniqueItems"]
        options = node.get("oneOf")
        if isinstance(options, list) and "anyOf" not in node and _all_exclude(proof, node, options):
            new["anyOf"] = new.pop("oneOf")
        return new

    found: dict[str, Any] = walk(schema)
    return found


def _all_exclude(proof: _Proof, node: dict[str, Any], options: list[Any]) -> bool:
    around = {key: value for key, value in node.items() if key != "oneOf"}
    return all(
        proof.exclude([around, one], [around, other], _DEPTH) for one, other in combinations(options, 2)
    )


class _Proof:
    """What can be said of the parts of one schema. "Parts" are schemas that all hold together."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._left = _MOST_PARTS
        self._reference_alone = bool(
            _OLD_DRAFT.search(str(root.get("$schema")))
        )  # what stands beside it is ignored

    def exclude(self, one: list[Any], other: list[Any], depth: int) -> bool:
        """True: no value fits both. False: one may, or it was not found out."""
        if depth == 0 or self._left <= 0:
            return False
        a, b = list(self._parts(one, _DEPTH)), list(self._parts(other, _DEPTH))
        types = _types(a) & _types(b)
        if not types or _differ(_values(a), _values(b)):
            return True
        if types == _OBJECT and (self._objects(a, b, depth) or self._objects(b, a, depth)):
            return True
        return self._branches(a, other, depth) or self._branches(b, one, depth)

    def _branches(self, parts: list[dict[str, Any]], other: list[Any], depth: int) -> bool:
        """Whether one of the parts has nothing but options that do not go with `other`."""
        for part in parts:
            for key in ("anyOf", "oneOf"):
                options = part.get(key)
                if isinstance(options, list) and all(self.exclude([o], other, depth - 1) for o in options):
                    return True
        return False

    def _objects(self, a: list[dict[str, Any]], b: list[dict[str, Any]], depth: int) -> bool:
        """Whether `a` needs a property that objects of `b` cannot have, or not with such a value."""
        needed_by_b = set(_required(b))
        for name in _required(a):
            if any(_closed_to(part, name) for part in b):
                return True
            ours, theirs = _property(a, name), _property(b, name)
            if name in needed_by_b and ours and theirs and self.exclude(ours, theirs, depth - 1):
                return True
        return False

    def _parts(self, schemas: list[Any], depth: int) -> Iterator[dict[str, Any]]:
        """The schemas, and what they refer to, as far as they are objects."""
        for schema in schemas:
            self._left -= 1
            if not isinstance(schema, dict) or "$id" in schema:  # a base of its own for references
                continue
            if not (self._reference_alone and "$ref" in schema):
                yield schema
            if depth > 0:
                target = self._target(schema.get("$ref"))
                rest = schema.get("allOf")
                yield from self._parts([target, *(rest if isinstance(rest, list) else [])], depth - 1)

    def _target(self, reference: object) -> Any:
        """What a reference within the schema points to; None for any other."""
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return self._root if reference == "#" else None
        node: Any = self._root
        for part in reference[2:].split("/"):
            if not isinstance(node, dict) or (node is not self._root and "$id" in node):
                return None
            node = node.get(part.replace("~1", "/").replace("~0", "~"))
        return node


def _types(parts: list[dict[str, Any]]) -> frozenset[str]:
    """JSON types that a value of all these parts can have; whole numbers are numbers."""
    found = _TYPES
    for part in parts:
        named = part.get("type")
        names = named if isinstance(named, list) else [named]
        if named is not None and all(isinstance(name, str) for name in names):
            found &= {"number" if name == "integer" else name for name in names}
        for values in _listed(part):
            found &= {_type_of(value) for value in values}
    return found


def _type_of(value: object) -> str:
    """The JSON type of a value."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object" if isinstance(value, dict) else "null"


def _values(parts: list[dict[str, Any]]) -> list[Any] | None:
    """The values that a part lists; None where none does."""
    return next((values for part in parts for values in _listed(part)), None)


def _listed(part: dict[str, Any]) -> Iterator[list[Any]]:
    if "const" in part:
        yield [part["const"]]
    if isinstance(part.get("enum"), list):
        yield part["enum"]


def _differ(a: list[Any] | None, b: list[Any] | None) -> bool:
    return a is not None and b is not None and not any(x == y for x in a for y in b)


def _required(parts: list[dict[str, Any]]) -> Iterator[str]:
    for part in parts:
        names = part.get("required")
        if isinstance(names, list):
            yield from (name for name in names if isinstance(name, str))


def _property(parts: list[dict[str, Any]], name: str) -> list[Any]:
    """The schemas of one property."""
    maps = [part["properties"] for part in parts if isinstance(part.get("properties"), dict)]
    return [properties[name] for properties in maps if name in properties]


def _closed_to(part: dict[str, Any], name: str) -> bool:
    """Whether objects of this part cannot have the property."""
    properties = part.get("properties", {})
    return (
        part.get("additionalProperties") is False
        and not part.get("patternProperties")
        and isinstance(properties, dict)
        and name not in properties
    )
