"""`peqa quantize`: a float model becomes a base."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from peqa_runtime.commands.options import NewBase
from peqa_runtime.commands.terminal import reported, say
from peqa_runtime.errors import InvalidData


class Method(str, Enum):
    """How `peqa quantize` rounds."""

    rtn = "rtn"
    gptq = "gptq"


@reported
def quantize(
    source: Annotated[
        Path, typer.Argument(help="A Hugging Face model folder of floats.", envvar="PEQA_SOURCE")
    ],
    output: NewBase,
    bits: Annotated[int, typer.Option(help="Bits of a code: 2, 3, 4 or 8.", envvar="PEQA_BITS")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Inputs that share a scale; -1 = the whole row.", envvar="PEQA_GROUP_SIZE")
    ] = 64,
    method: Annotated[Method, typer.Option(help="How to round.", envvar="PEQA_METHOD")] = Method.rtn,
) -> None:
    """Quantize a float model into a base.

    Example: peqa quantize models/SmolLM2-135M -o bases/smollm2-g64 --bits 4 --group-size 64
    """
    from peqa_runtime.model import read_manifest
    from peqa_runtime.model.quantize import quantize_folder

    if method is Method.gptq:
        raise InvalidData("--method gptq is not there yet; use rtn")
    quantize_folder(source, output, bits, group_size, method=method.value)
    manifest = read_manifest(output)
    say(f"{output}: {manifest.model_id}, {len(manifest.linears)} linears, base {manifest.base_digest[:12]}")
