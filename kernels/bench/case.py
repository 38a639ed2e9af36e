"""A case: a few related figures that share their weights, measured together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peqa_kernels.bench.machine import Machine
from peqa_kernels.bench.row import Row
from peqa_kernels.bench.timing import Timer


@dataclass(frozen=True)
class Case:
    """`run` makes its weights, measures and forgets them."""

    name: str
    run: Callable[[Machine, Timer], list[Row]]
