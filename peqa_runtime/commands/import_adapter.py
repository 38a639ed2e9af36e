"""`peqa import-adapter`: an adapter of others becomes a scale set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peqa_runtime.commands.options import AsJson
from peqa_runtime.commands.terminal import reported, size_of, tell


@reported
def import_adapter(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of a PEFT (IA)3 adapter, in safetensors.", envvar="PEQA_ADAPTER")
    ],
    base: Annotated[Path, typer.Option(help="Base folder that the set is for.", envvar="PEQA_BASE")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Scale set file to write.", envvar="PEQA_OUTPUT")
    ],
    task: Annotated[str, typer.Option(help="Name noted in the set.", envvar="PEQA_TASK")] = "",
    as_json: AsJson = False,
) -> None:
    """Import a PEFT (IA)3 adapter as a scale set, losslessly.

    Example: peqa import-adapter my-ia3 --base bases/smollm2 -o mine.safetensors --task mine
    """
    from peqa_runtime.core import check_task_name
    from peqa_runtime.export.ia3 import import_ia3
    from peqa_runtime.scales.scale_set import check_set_path, refuse_existing_set

    check_set_path(output)
    if task:
        check_task_name(task)
    refuse_existing_set(output)
    result = import_ia3(adapter, base, task=task)
    output.parent.mkdir(parents=True, exist_ok=True)
    result.save(output)
    report = {"output": str(output), "kind": result.kind, "revision": result.revision, "task": task}
    sentence = f"{output}: {result.kind}, {size_of(result.num_bytes)}, revision {result.revision[:12]}"
    tell(report, sentence, as_json=as_json)
