"""One measured figure, the bar it is held against, and the facts that belong to it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, Literal

Op = Literal[">=", "<="]
_HOLDS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Row:
    """A figure of the table. `name` is stable from run to run; a row without a bar informs only."""

    name: str
    value: float
    unit: str  # "x" for a ratio
    op: Op  # which side of the bar is good; without a bar, which direction is
    bar: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # device, rows, tasks, time_us, floor_us …

    @property
    def ok(self) -> bool | None:
        """Whether the bar is met; None where there is none. A value that is no number meets no bar."""
        return None if self.bar is None else bool(_HOLDS[self.op](self.value, self.bar))

    def to_dict(self) -> dict[str, Any]:
        """The row as the JSON file has it."""
        head = {"name": self.name, "value": self.value, "unit": self.unit}
        return {**head, "op": self.op, "bar": self.bar, "ok": self.ok, **self.facts}
