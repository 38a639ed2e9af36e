"""`peqa import`: a quantized checkpoint becomes a base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peqa_runtime.commands.options import NewBase
from peqa_runtime.commands.terminal import reported, say
from peqa_runtime.errors import InvalidData


@reported
def import_base(
    source: Annotated[Path, typer.Argument(help="A .gguf file (Q4_0, Q4_1, Q8_0).", envvar="PEQA_SOURCE")],
    output: NewBase,
) -> None:
    """Import a quantized checkpoint as a base, its codes kept bit for bit.

    Example: peqa import SmolLM2-135M-Instruct.Q4_1.gguf -o bases/smollm2
    """
    from peqa_runtime.model import import_gguf, read_manifest

    if source.suffix.lower() != ".gguf":
        raise InvalidData(f"{source}: only .gguf files can be imported so far; a float model: peqa quantize")
    import_gguf(source, output)
    manifest = read_manifest(output)
    say(f"{output}: {manifest.model_id}, {len(manifest.linears)} linears, base {manifest.base_digest[:12]}")
