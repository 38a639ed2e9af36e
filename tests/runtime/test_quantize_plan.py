"""Rules that mix bits, and files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peqa_runtime.errors import InvalidCheckpoint, InvalidData, InvalidRequest
from peqa_runtime.model.quantizers.plan import LinearPlan, Rule, plan_linears, read_rules

DEFAULT = LinearPlan(3, 64, "gptq")
LINEARS = {f"model.layers.{i}.{leaf}": k for i in range(3) for leaf, k in (("q", 64), ("down", 192))}


def plan(*rules: tuple[str, dict[str, Any]]) -> dict[str, LinearPlan | None]:
    return plan_linears(LINEARS, DEFAULT, [Rule(match, settings) for match, settings in rules])


def test_rules_change_what_they_name_and_nothing_else() -> None:
    found = plan(
        ("*.down", {"bits": 4}),
        (r"re:model\.layers\.[01]\.down", {"method": "rtn", "group_size": 32}),
        ("model.layers.2.q", {"skip": True}),
    )
    assert found["model.layers.0.down"] == found["model.layers.1.down"] == LinearPlan(4, 32, "rtn")
    assert found["model.layers.2.down"] == LinearPlan(4, 64, "gptq")
    assert found["model.layers.0.q"] == DEFAULT
    assert found["model.layers.2.q"] is None


def test_rules_may_agree() -> None:
    found = plan(("*.down", {"bits": 4}), ("model.layers.0.*", {"bits": 4}))
    assert found["model.layers.0.down"] == LinearPlan(4, 64, "gptq")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("*.up", {"bits": 4})], "'\\*.up' fits no linear; names are like"),
        ([("lm_head", {"bits": 8})], "embeddings and the output head stay"),
        (
            [("*.down", {"bits": 4}), ("*layers.0.*", {"bits": 2})],
            "contradict each other for model.layers.0.down",
        ),
        (
            [("*.down", {"bits": 4}), ("*layers.0.*", {"skip": True})],
            "'\\*.down' and '\\*layers.0.\\*' contradict",
        ),
        (
            [("*layers.0.*", {"skip": True}), ("*.down", {"bits": 4})],
            "contradict each other for model.layers.0.down",
        ),
        ([("*", {"skip": True})], "skip every linear"),
        ([("re:(", {"bits": 4})], "no regular expression"),
        ([("*", {"bits": 5})], "the rule '\\*': bits must be one of"),
        ([("*", {"bits": True})], "bits must be one of"),
        ([("*", {"bits": "4"})], "bits must be one of"),
        ([("*", {"group_size": 48})], "group_size must be one of"),
        ([("*", {"method": "magic"})], "method must be one of"),
        ([("*", {"bit": 4})], "sets 'bit'; it can set bits, group_size, method or skip"),
        ([("*", {})], "sets nothing"),
        ([("*", {"skip": True, "bits": 4})], "stands alone"),
        ([("*", {"skip": False})], "stands alone"),
    ],
)
def test_rules_that_cannot_be(rules: list[tuple[str, dict[str, Any]]], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        plan(*rules)


def test_a_group_size_that_does_not_divide_names_what_fits() -> None:
    with pytest.raises(
        InvalidCheckpoint, match=r"128 does not divide the 64 inputs of model.layers.0.q.*-1, 16, 32, 64"
    ):
        plan(("*.q", {"group_size": 128}))
    with pytest.raises(InvalidCheckpoint, match="has 12 inputs; only multiples of 8"):
        plan_linears({"odd": 12}, LinearPlan(4, -1, "rtn"), [])


def test_files_of_rules(tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    file.write_text('{"rules": [{"match": "*.q", "bits": 4}, {"match": "*.down", "skip": true}]}')
    assert read_rules(file) == (Rule("*.q", {"bits": 4}), Rule("*.down", {"skip": True}))
    with pytest.raises(InvalidData, match="cannot be read"):
        read_rules(tmp_path / "nothing.json")
    for broken in (
        "{",
        "\xff\xfe",
        '{"rules": 3}',
        '{"rules": [{"bits": 4}]}',
        '{"rules": [], "bits": 4}',
        "[]",
    ):
        file.write_bytes(broken.encode("latin-1"))
        with pytest.raises(InvalidData, match=r"is no JSON|must hold"):
            read_rules(file)
    file.write_text(json.dumps({"rules": [{"match": "*", "bits": 7}]}))
    with pytest.raises(InvalidRequest, match="bits must be one of"):
        read_rules(file)
