"""Options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Base = Annotated[
    Path, typer.Argument(help="Base folder, from `peqa import` or `peqa quantize`.", envvar="PEQA_BASE")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", envvar="PEQA_DEVICE")]
OptionalSet = Annotated[
    Path | None,
    typer.Option("--scale-set", help="A scale set file; without it the base.", envvar="PEQA_SCALE_SET"),
]
Measuring = Annotated[
    Literal["served", "float32"],
    typer.Option(
        help="By the engine, as a server answers; or by transformers' model in fp32, many times slower.",
        envvar="PEQA_EVAL_COMPUTE",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.", envvar="PEQA_JSON")]
Seed = Annotated[
    int,
    typer.Option(help="Seed of every random choice.", envvar="PEQA_SEED", min=0, max=2**32 - 1),
]
NewBase = Annotated[Path, typer.Option("--output", "-o", help="Base folder to write.", envvar="PEQA_OUTPUT")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.", envvar="PEQA_QUIET")]
