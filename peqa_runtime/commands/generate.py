"""`peqa generate`: the greedy answer to one prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from peqa_runtime.commands.options import AsJson, Base, Device, Measuring, OptionalSet
from peqa_runtime.commands.terminal import quiet_libraries, reported, show
from peqa_runtime.errors import InvalidData


@reported
def generate(
    base: Base,
    prompt: Annotated[str, typer.Option(help="The prompt, as written.", envvar="PEQA_PROMPT")],
    scale_set: OptionalSet = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", envvar="PEQA_MAX_TOKENS")] = 64,
    compute: Measuring = "served",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Print the greedy answer to one prompt. A set's own prompt format is applied.

    Example: peqa generate bases/smollm2 --scale-set sql.safetensors --prompt 'table t(a, b)\\nHow many a?'
    """
    from peqa_runtime.evaluation import opened
    from peqa_runtime.model.base_checkpoint import read_manifest
    from peqa_runtime.scales.scale_set import ScaleSet
    from peqa_runtime.text import load_tokenizer
    from peqa_runtime.training.data import prompt_ids
    from peqa_runtime.training.rows import Row
    from peqa_runtime.training.text_encoding import TextEncoding

    if not prompt:
        raise InvalidData("--prompt is empty")
    if max_tokens < 1:
        raise InvalidData("--max-tokens must be at least 1")
    quiet_libraries()
    manifest = read_manifest(base)
    chosen = ScaleSet.parse(scale_set, manifest) if scale_set else None
    ids = prompt_ids(
        Row(prompt, "", 1), TextEncoding(load_tokenizer(base)), chosen.prompt_format if chosen else ""
    )
    with opened(base, compute, device, longest=len(ids) + max_tokens) as model:
        if len(ids) + max_tokens > model.max_tokens:
            raise InvalidData(
                f"{len(ids)} prompt tokens and {max_tokens} more exceed the context of {model.max_tokens}, "
                f"which is {model.bounded_by}"
            )
        model.use(chosen)
        (text,) = model.greedy([ids], max_new_tokens=max_tokens)
    if as_json:
        show([{"text": text, "prompt_tokens": len(ids)}], as_json=True)
    else:
        typer.echo(text)
