"""The order of a step's sequences: by task where tasks have group scales, and as scheduled otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from peqa_runtime.engine.batch import Batch


def batch(*group_rows: int) -> Any:
    items = [
        SimpleNamespace(sequence=SimpleNamespace(group_row=g), number=i) for i, g in enumerate(group_rows)
    ]
    return Batch(tuple(items), ("a write",))  # type: ignore[arg-type]


def test_sequences_of_one_task_become_neighbours() -> None:
    ordered = batch(2, 0, 1, 2, 0).by_group_row()
    assert [item.number for item in ordered.scheduled] == [1, 4, 2, 0, 3]
    assert ordered.bank_writes == ("a write",)


def test_without_group_scales_nothing_moves() -> None:
    step = batch(0, 0, 0)
    assert step.by_group_row() is step
