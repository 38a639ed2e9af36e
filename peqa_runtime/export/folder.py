"""`peqa export --format hf` and `gptq`: a model folder, all of it or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from peqa_runtime.disk_space import disk_full_named
from peqa_runtime.errors import InvalidRequest
from peqa_runtime.export.gptq import GptqPlan, plan_gptq
from peqa_runtime.export.merged import MergedBase, cast, open_merged
from peqa_runtime.model.base_writer import staged_folder
from peqa_runtime.model.shard_writer import ShardWriter
from peqa_runtime.model.threads import one_thread

FolderFormat = Literal["hf", "gptq"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_folder(
    base: Path | str,
    destination: Path | str,
    format: FolderFormat,
    *,
    scale_set: Path | str | None = None,
    dtype: str | None = None,
    gptq_version: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write `base`, with `scale_set` merged into it, as the model folder `destination`.

    `hf`: floats, decoded from the codes; `dtype` float32 (the default: exact), bfloat16 or float16. `gptq`: the codes
    with merged scales in fp16, as transformers, vLLM and GPTQModel load them; `dtype` of the other tensors, float16 by
    default; `gptq_version` 1 or 2, by default 1 where it can hold the zeros. `say` is told which loaders take the files
    and what was rounded. An interrupted run leaves nothing at `destination`.

    Raises `InvalidRequest` for a dtype or version that does not exist, `InvalidCheckpoint` for a base that the format
    cannot hold or a `destination` that is there already, `InvalidScaleSet` or `WrongBase` for the set, `DiskFull`.
    """
    name = dtype or ("float32" if format == "hf" else "float16")
    if name not in DTYPES:
        raise InvalidRequest(f"dtype must be one of {', '.join(DTYPES)}, not {name!r}", param="dtype")
    destination = Path(destination)
    with one_thread(), open_merged(Path(base), Path(scale_set) if scale_set else None) as merged:
        plan = plan_gptq(merged, gptq_version, progress=progress) if format == "gptq" else None
        for line in plan.remarks if plan else ():
            say(line)
        with disk_full_named(destination, resumes=False), staged_folder(destination) as folder:
            merged.source.copy_companions(folder)
            _write_tensors(merged, folder, DTYPES[name], plan, progress)
            _write_config(merged, folder, name, plan.config if plan else None)
            (folder / "README.md").write_text(_card(merged, format, name), encoding="utf-8")


def _write_tensors(
    merged: MergedBase, folder: Path, dtype: torch.dtype, plan: GptqPlan | None, progress: bool
) -> None:
    writer = ShardWriter(folder)
    for name in tqdm(merged.source.names, f"export {merged.manifest.model_id}", disable=not progress):
        module = name.removesuffix(".weight")
        if plan is not None and module in plan.linears:
            for leaf, tensor in plan.tensors(merged, module).items():
                writer.add(f"{module}.{leaf}", tensor)
        else:
            writer.add(name, cast(name, merged.tensor(name), dtype))
    writer.finish()


def _write_config(
    merged: MergedBase, folder: Path, dtype: str, quantization: Mapping[str, Any] | None
) -> None:
    config = {key: value for key, value in merged.source.config.items() if key != "torch_dtype"}
    config["dtype"] = dtype
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
        (folder / "quantize_config.json").write_text(
            json.dumps(quantization, indent=2, sort_keys=True) + "\n"
        )
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _card(merged: MergedBase, format: FolderFormat, dtype: str) -> str:
    what = {
        "hf": f"The weights are the base's integers and scales, decoded to {dtype}.",
        "gptq": "The weights are the base's integers with the task's scales merged, in GPTQ's layout.",
    }[format]
    lines = [
        f"# {merged.manifest.model_id}{f', task {merged.set.task}' if merged.set and merged.set.task else ''}",
        "",
        f"Exported by peqa-serve (`peqa export --format {format}`). {what}",
        "",
        *merged.origin(),
        "",
        "The licence is that of the original model, and of what the task was tuned on.",
    ]
    return "\n".join(lines) + "\n"
