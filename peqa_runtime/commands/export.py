"""`peqa export`: a base and a task's scales become a model, or an adapter, of others."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from peqa_runtime.commands.options import AsJson, Base, OptionalSet, Quiet
from peqa_runtime.commands.terminal import quiet_libraries, reported, say


class Format(str, Enum):
    """What `peqa export` writes."""

    hf = "hf"
    gptq = "gptq"


class Dtype(str, Enum):
    """Of the floats that are written."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@reported
def export(
    base: Base,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", envvar="PEQA_OUTPUT")],
    output_format: Annotated[
        Format,
        typer.Option(
            "--format", help="hf: floats. gptq: codes, for vLLM and transformers.", envvar="PEQA_FORMAT"
        ),
    ],
    scale_set: OptionalSet = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of floats. Default: hf float32 (exact), gptq float16.", envvar="PEQA_DTYPE"),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a base, with a task's scales merged into it, for other software.

    Example: peqa export bases/smollm2 --scale-set sql.safetensors --format hf -o smollm2-sql
    """
    from peqa_runtime.export.folder import export_folder

    quiet_libraries()
    export_folder(
        base,
        output,
        output_format.value,
        scale_set=scale_set,
        dtype=dtype.value if dtype else None,
        progress=not quiet,
        say=say,
    )
    size = sum(file.stat().st_size for file in output.iterdir())
    if as_json:
        typer.echo(json.dumps({"output": str(output), "format": output_format.value, "bytes": size}))
    else:
        say(f"{output}: {output_format.value}, {size / 1e6:.1f} MB")
