"""`peqa export`: a base and a task's scales become a model, or an adapter, of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from peqa_runtime.commands.options import AsJson, Base, OptionalSet, Quiet
from peqa_runtime.commands.terminal import quiet_libraries, reported, say, size_of, tell
from peqa_runtime.errors import InvalidRequest

Dtype = Literal["float32", "bfloat16", "float16"]


@reported
def export(
    base: Base,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", envvar="PEQA_OUTPUT")],
    output_format: Annotated[
        Literal["hf", "gptq", "ia3"],
        typer.Option(
            "--format",
            help="hf: floats. gptq: codes, for vLLM and transformers. ia3: the set alone, for PEFT.",
            envvar="PEQA_EXPORT_FORMAT",
        ),
    ],
    scale_set: OptionalSet = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of floats. Default: hf float32 (exact), gptq float16.", envvar="PEQA_EXPORT_DTYPE"
        ),
    ] = None,
    gptq_version: Annotated[
        int | None,
        typer.Option(
            help="How gptq stores zeros. Default: 1, which most loaders read, where it can hold them, else 2.",
            envvar="PEQA_GPTQ_VERSION",
            min=1,
            max=2,
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a base, with a task's scales merged into it, for other software.

    Example: peqa export bases/smollm2 --scale-set sql.safetensors --format hf -o smollm2-sql
    """
    quiet_libraries()
    if gptq_version is not None and output_format != "gptq":
        raise InvalidRequest(
            f"--gptq-version belongs to --format gptq; leave it out with --format {output_format}",
            param="gptq-version",
        )
    if output_format == "ia3":
        _adapter(base, scale_set, output, dtype)
    else:
        _folder(base, scale_set, output, output_format, dtype, gptq_version, quiet)
    size = sum(file.stat().st_size for file in output.iterdir())
    report = {"output": str(output), "format": output_format, "bytes": size}
    tell(report, f"{output}: {output_format}, {size_of(size)}", as_json=as_json)


def _adapter(base: Path, scale_set: Path | None, output: Path, dtype: Dtype | None) -> None:
    from peqa_runtime.export.ia3 import export_ia3

    if scale_set is None:
        raise InvalidRequest(
            "an (IA)3 adapter is a scale set alone; name one with --scale-set", param="scale-set"
        )
    if dtype is not None:
        raise InvalidRequest("an (IA)3 adapter keeps the set's own dtype; leave --dtype out", param="dtype")
    export_ia3(base, scale_set, output)


def _folder(
    base: Path,
    scale_set: Path | None,
    output: Path,
    output_format: Literal["hf", "gptq"],
    dtype: Dtype | None,
    gptq_version: int | None,
    quiet: bool,
) -> None:
    from peqa_runtime.export.folder import export_folder

    export_folder(
        base,
        output,
        output_format,
        scale_set=scale_set,
        dtype=dtype,
        gptq_version=gptq_version,
        progress=not quiet,
        say=say,
    )
