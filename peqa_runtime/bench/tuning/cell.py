"""One thing that the benchmark measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from peqa_kernels.bench.row import Row
from peqa_runtime.bench.tuning.store import RowFile


@dataclass(frozen=True)
class Cell:
    """Something to measure: the rows that it will give, how to get them, and what else they depend on by now."""

    names: tuple[str, ...]
    measure: Callable[[], list[Row]]
    settings: Callable[[], dict[str, Any]] = dict

    def is_done(self, rows: RowFile) -> bool:
        """Whether `rows` have it, measured with these settings."""
        return rows.has(self.names) and rows.has(self.names, self.settings())

    def rows(self) -> list[Row]:
        """Measured now; each row notes the settings, so that a run with others measures anew."""
        settings = self.settings()
        return [replace(row, facts={**row.facts, "settings": settings}) for row in self.measure()]
