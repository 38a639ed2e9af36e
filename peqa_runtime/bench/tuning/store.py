"""Measured rows in a JSON file: kept from run to run, so that an interrupted benchmark goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peqa_kernels.bench.row import Row
from peqa_runtime.errors import InvalidData


class RowFile:
    """One JSON array of rows, known by their names. Without a path rows are kept in memory only."""

    def __init__(self, path: Path | None) -> None:
        """Read what is there. Raises `InvalidData` for a file that is no array of rows."""
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path is None or not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            self.rows = {row["name"]: row for row in found}
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidData(f"{path} holds no rows of a benchmark ({error}); name another --out") from None

    def has(self, names: Sequence[str], settings: Mapping[str, Any] | None = None) -> bool:
        """Whether all of these were measured, with these settings where some are named."""
        found = [self.rows.get(name) for name in names]
        return all(row is not None and settings in (None, row.get("settings", {})) for row in found)

    def value(self, name: str) -> float:
        """A measured value."""
        return float(self.rows[name]["value"])

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows, in place of those with the same names; the file is whole or as it was."""
        self.rows |= {row.name: row.to_dict() for row in rows}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        staged = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        staged.write_text(json.dumps(list(self.rows.values()), indent=1) + "\n", encoding="utf-8")
        staged.replace(self.path)
