"""`peqa import`: a quantized checkpoint becomes a base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from peqa_runtime.commands.options import AsJson, NewBase, Quiet
from peqa_runtime.commands.terminal import base_said, quiet_libraries, reported, tell
from peqa_runtime.errors import InvalidRequest


@reported
def import_base(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .gguf file (Q4_0, Q4_1, Q8_0), or the folder of a GPTQ, AWQ, compressed-tensors, HQQ or "
            "EfficientQAT checkpoint in safetensors.",
            envvar="PEQA_SOURCE",
        ),
    ],
    output: NewBase,
    source_format: Annotated[
        Literal["auto", "gptq", "gptq_v2", "efficientqat"],
        typer.Option("--format", help="For checkpoints that do not say it.", envvar="PEQA_SOURCE_FORMAT"),
    ] = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Import a quantized checkpoint as a base: codes, scales and zeros are kept bit for bit.

    Example: peqa import SmolLM2-135M-Instruct.Q4_1.gguf -o bases/smollm2
    """
    from peqa_runtime.model import import_checkpoint, import_gguf, read_manifest

    quiet_libraries()
    if source.suffix.lower() == ".gguf":
        if source_format != "auto":
            raise InvalidRequest("a .gguf file says what it is; leave --format out", param="format")
        import_gguf(source, output, progress=not quiet)
        found = "gguf"
    else:
        stated = None if source_format == "auto" else source_format
        found = import_checkpoint(source, output, format=stated, progress=not quiet)
    manifest = read_manifest(output)
    report = {
        "output": str(output),
        "format": found,
        "model_id": manifest.model_id,
        "linears": len(manifest.linears),
        "base_digest": manifest.base_digest,
    }
    tell(report, base_said(output, manifest, f" from {found}"), as_json=as_json)
