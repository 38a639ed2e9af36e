"""What a check says: how it stands, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

State = Literal["ok", "note", "warning", "problem"]
"""A "problem" stops serving; a "warning" makes it slower, riskier or poorer; a "note" is worth knowing."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. `advice` says what to do; "" where there is nothing to do."""

    name: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Asked:
    """What is to be examined: what `peqa serve` would be started with. `base` None: the demo.

    `known_variables`: every PEQA_… variable that a command reads. `api_key`: for the server that runs already.
    `timeout`: seconds after which a check counts as hanging.
    """

    home: Path
    base: Path | None = None
    store: Path | None = None
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    api_key: str | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    known_variables: frozenset[str] = frozenset()
    timeout: float = 90.0


Check = Callable[[Asked], list[Finding]]


def gib(size: float) -> str:
    """A number of bytes for people."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
