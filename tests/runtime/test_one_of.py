"""`oneOf` is enforced where its options are proven to exclude each other, and nowhere else."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pydantic
import pytest

from peqa_runtime import Constraint, Engine, EngineConfig, InvalidRequest, SamplingParams
from peqa_runtime.engine.one_of import enforceable
from peqa_runtime.json_schema import closed

DRAFT = jsonschema.Draft202012Validator


def kinds(*values: object, **more: Any) -> dict[str, Any]:
    """References to objects that differ in a required property."""
    definitions = {
        f"K{i}": {"type": "object", "properties": {"kind": {"const": v}}, "required": ["kind"], **more}
        for i, v in enumerate(values)
    }
    return {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in definitions], "$defs": definitions}


A, B = ({"properties": {"kind": {"const": value}}, "required": ["kind"]} for value in "ab")


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "null"}, {"$ref": "#/$defs/x"}], "$defs": {"x": {"type": "object"}}},
        {"oneOf": [{"const": 1}, {"const": 2}, {"enum": ["a", 3]}]},
        kinds("a", "b", "c"),
        {"type": "object", "oneOf": [A, B]},
        {"oneOf": [{"allOf": [{"type": "object"}, A]}, {"type": "object", "allOf": [B]}]},
        {"oneOf": [{"anyOf": [{"type": "null"}, {"type": "string"}]}, {"type": ["integer", "boolean"]}]},
        {"oneOf": [{"type": "object", "properties": {"a": {}}, "additionalProperties": False},
                   {"type": "object", "required": ["b"]}]},
        {"type": "array", "items": {"oneOf": [{"const": 1}, {"const": 2}]}},
    ],
)  # fmt: skip
def test_options_that_exclude_each_other(schema: dict[str, Any]) -> None:
    before = json.dumps(schema)
    assert '"oneOf"' not in json.dumps(enforceable(schema))
    assert json.dumps(schema) == before


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "number"}, {"type": "integer"}]},
        {"oneOf": [{"const": 1}, {"const": 1.0}]},
        {"oneOf": [A, B]},  # other values than objects fit both
        {"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"type": "object", "oneOf": [A, {"properties": {"kind": {"const": "b"}}}]},  # without kind both fit
        {"oneOf": [{"type": "object", "additionalProperties": False, "patternProperties": {"b": {}}},
                   {"type": "object", "required": ["b"]}]},
        kinds("a", "a"),
        {"oneOf": [{"$ref": "#/$defs/none"}, {"type": "string"}]},
        {"oneOf": [{"$ref": "#"}, {"type": "string"}]},
        {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"x": {}},
         "oneOf": [{"$ref": "#/definitions/x", "type": "string"}, {"type": "integer"}]},
        {"oneOf": [{"$id": "other", "type": "string"}, {"type": "integer"}]},
        {"oneOf": [{}, True]},
    ],
)  # fmt: skip
def test_options_that_may_not(schema: dict[str, Any]) -> None:
    assert enforceable(schema) == schema


def test_names_that_look_like_keywords_stay() -> None:
    schema = {
        "properties": {"oneOf": {"const": {"oneOf": [1]}}, "uniqueItems": {"enum": [False]}},
        "default": {"uniqueItems": False},
    }
    assert enforceable(schema) == schema
    assert enforceable({"type": "array", "uniqueItems": False}) == {"type": "array"}
    assert enforceable({"type": "array", "uniqueItems": True})["uniqueItems"] is True
    named = {"properties": {"properties": {"properties": {}}}}
    assert closed(named) == {
        "properties": {"properties": {"properties": {}, "additionalProperties": False}},
        "additionalProperties": False,
    }


VALUES = [None, True, False, 0, 1, 2.0, "a", "b", [], [1], {}, {"k": "a"}, {"k": "b"}, {"k": 1}, {"m": "a"},
          {"k": "a", "m": "a"}, {"k": "a", "m": 1}, {"k": {"m": "a"}}, {"k": {"m": 1}}]  # fmt: skip


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    kind = rng.choice(["type", "const", "enum", "object", "object", "object", "any", "all", "ref"])
    if depth == 0 and kind in ("object", "any", "all"):
        kind = "const"
    if kind == "object":
        names = rng.sample(["k", "m"], rng.randint(0, 2))
        found: dict[str, Any] = {"properties": {n: random_schema(rng, depth - 1) for n in names}}
        found["required"] = rng.sample(["k", "m"], rng.randint(0, 2))
        if rng.random() < 0.8:
            found["type"] = "object"
        if rng.random() < 0.4:
            found["additionalProperties"] = False
        return found
    if kind in ("any", "all"):
        return {f"{kind}Of": [random_schema(rng, depth - 1) for _ in range(2)]}
    types = ["null", "boolean", "integer", "number", "string", "array", "object"]
    return {
        "type": {"type": rng.choice([rng.choice(types), rng.sample(types, 2)])},
        "const": {"const": rng.choice(VALUES)},
        "enum": {"enum": rng.sample(VALUES, 2)},
        "ref": {"$ref": f"#/$defs/{rng.choice('xy')}"},
    }[kind]


def test_no_value_fits_two_options_that_were_found_to_exclude_each_other() -> None:
    rng, proven = random.Random(3), 0
    for _ in range(600):
        options = [random_schema(rng) for _ in range(2)]
        schema = {"oneOf": options, "$defs": {name: random_schema(rng, 1) for name in "xy"}}
        try:
            fits = [
                [DRAFT({**option, "$defs": schema["$defs"]}).is_valid(v) for v in VALUES]
                for option in options
            ]
        except RecursionError:
            continue
        if "anyOf" in enforceable(schema):
            proven += 1
            assert not any(a and b for a, b in zip(*fits, strict=True)), schema
    assert proven > 100


def test_a_proof_takes_bounded_time() -> None:
    nested: dict[str, Any] = {"$ref": "#/$defs/x"}
    deep = {"anyOf": [nested] * 8, "allOf": [nested] * 8, "type": "object"}
    begin = time.process_time()
    enforceable({"oneOf": [dict(deep) for _ in range(30)], "$defs": {"x": deep}})
    assert time.process_time() - begin < 5


class Closed(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class Circle(Closed):
    kind: Literal["circle"]
    radius: Literal[1, 2]


class Square(Closed):
    kind: Literal["square"]
    side: Literal[1, 2]


class Drawing(Closed):
    shapes: list[Circle | Square] = pydantic.Field(min_length=2, max_length=2)
    first: Circle | Square = pydantic.Field(discriminator="kind")


def test_answers_fit_one_option(tiny_base: Path) -> None:
    schemas: list[dict[str, Any]] = [
        Drawing.model_json_schema(),
        kinds("a", "b", additionalProperties=False),
        {"oneOf": [{"const": 1}, {"const": 2}, {"type": "string", "maxLength": 2}]},
    ]
    assert '"oneOf"' in json.dumps(schemas[0])
    params = [
        SamplingParams(
            max_tokens=300, seed=i, structured=Constraint.json_schema(schemas[i % 3], compact=i % 2 == 0)
        )
        for i in range(18)
    ]
    with Engine(tiny_base, config=EngineConfig(num_blocks=256, task_rows=2), device="cpu") as engine:
        for i, answer in enumerate(engine.generate(["the cat"] * 18, params)):
            assert answer.finish_reason == "stop"
            value = json.loads(answer.text)
            DRAFT(schemas[i % 3]).validate(value)
            if i % 2 == 0:
                assert answer.text == json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        overlapping = {"oneOf": [{"type": "number"}, {"type": "integer"}]}
        for schema in (overlapping, overlapping | {"x-guidance": {"coerce_one_of": True}}):
            with pytest.raises(InvalidRequest, match="oneOf is enforced where no value can fit two"):
                engine.generate(["x"], SamplingParams(structured=Constraint.json_schema(schema)))
