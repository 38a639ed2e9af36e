"""`peqa import`: a quantized checkpoint becomes a base."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from peqa_runtime.commands.options import AsJson, NewBase, Quiet
from peqa_runtime.commands.terminal import quiet_libraries, reported, say
from peqa_runtime.errors import InvalidRequest


class SourceFormat(str, Enum):
    """What `peqa import` can be told of files that look alike."""

    auto = "auto"
    gptq = "gptq"
    gptq_v2 = "gptq_v2"
    efficientqat = "efficientqat"


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
        SourceFormat,
        typer.Option("--format", help="For checkpoints that do not say it.", envvar="PEQA_SOURCE_FORMAT"),
    ] = SourceFormat.auto,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Import a quantized checkpoint as a base: codes, scales and zeros are kept bit for bit.

    Example: peqa import SmolLM2-135M-Instruct.Q4_1.gguf -o bases/smollm2
    """
    from peqa_runtime.model import import_checkpoint, import_gguf, read_manifest

    quiet_libraries()
    if source.suffix.lower() == ".gguf":
        if source_format is not SourceFormat.auto:
            raise InvalidRequest("a .gguf file says what it is; leave --format out", param="format")
        import_gguf(source, output, progress=not quiet)
        found = "gguf"
    else:
        stated = None if source_format is SourceFormat.auto else source_format.value
        found = import_checkpoint(source, output, format=stated, progress=not quiet)
    manifest = read_manifest(output)
    if as_json:
        report = {
            "output": str(output),
            "format": found,
            "model_id": manifest.model_id,
            "linears": len(manifest.linears),
            "base_digest": manifest.base_digest,
        }
        typer.echo(json.dumps(report))
    else:
        say(
            f"{output}: {manifest.model_id} from {found}, {len(manifest.linears)} linears, "
            f"base {manifest.base_digest[:12]}"
        )
