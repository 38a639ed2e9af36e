"""The two ways to measure a base, by the names that commands have for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from peqa_runtime.errors import UnsupportedModel
from peqa_runtime.evaluation.measured import Measured
from peqa_runtime.evaluation.reference import Reference
from peqa_runtime.evaluation.served import Served
from peqa_runtime.training.tuning import load_tunable


@contextmanager
def opened(
    base: Path, compute: Literal["served", "float32"], device: str, *, longest: int | None = None
) -> Iterator[Measured]:
    """A base in an engine, or as transformers' model in fp32. `longest`: see `Served`.

    Raises `InvalidCheckpoint`, `UnsupportedModel`.
    """
    if compute == "float32":
        yield Reference(load_tunable(base, device=device))
        return
    try:
        served = Served(base, device=device, longest=longest)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error}; --compute float32 may do without the engine") from error
    with served:
        yield served
