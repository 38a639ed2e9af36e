"""(IA)3 adapters of PEFT, in and out: a vector per linear that multiplies its outputs, or its inputs (feedforward).

That is what a set's `out_scale` and `in_scale` do, so nothing is lost either way. A bias parts them: PEFT multiplies it
with the output, a set does not.

    adapter_model.safetensors   base_model.model.<linear>.ia3_l  [N, 1] outputs, [1, K] inputs
    adapter_config.json         peft_type "IA3", target_modules, feedforward_modules
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from peqa_runtime.core import BaseManifest, ScaleKind
from peqa_runtime.disk_space import disk_full_named
from peqa_runtime.errors import InvalidCheckpoint, InvalidRequest, InvalidScaleSet
from peqa_runtime.export.merged import open_merged
from peqa_runtime.model.base_checkpoint import open_files, open_tensors, read_manifest
from peqa_runtime.model.base_writer import staged_folder
from peqa_runtime.scales.scale_set import ScaleSet

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIX = ".ia3_l"


def import_ia3(adapter: Path | str, base: Path | str, *, task: str = "") -> ScaleSet:
    """The scale set of `base` that does what the (IA)3 adapter in the folder `adapter` does.

    Kind `channel`, or `channel+input` when there are feedforward modules; fp16 where the adapter is, else fp32.
    Linears that the adapter leaves alone get ones. Raises `InvalidCheckpoint` for a folder that is no such adapter, or
    does more than scale linears of the base; `InvalidScaleSet` for factors that are no scales (0, negative).
    """
    adapter, base = Path(adapter), Path(base)
    manifest = read_manifest(base)
    config = _read_config(adapter)
    with open_files([_tensor_file(adapter)]) as handles:
        vectors = {name: handles[name].get_tensor(name) for name in sorted(handles)}
    factors = _factors(adapter, vectors, manifest)
    _refuse_biases(base, factors)
    kind: ScaleKind = "channel+input" if any(name.endswith(".in_scale") for name in factors) else "channel"
    tensors: dict[str, Tensor] = {}
    for linear, shape in manifest.linears.items():
        sizes = {"out_scale": shape.out_features, "in_scale": shape.in_features}
        for leaf in ("out_scale", "in_scale") if kind == "channel+input" else ("out_scale",):
            name = f"{linear}.{leaf}"
            tensors[name] = factors[name] if name in factors else torch.ones(sizes[leaf])
    halves = all(vector.dtype == torch.float16 for vector in vectors.values())
    note = {"imported_from": "peft (IA)3", "base_model": str(config.get("base_model_name_or_path") or "")}
    dtype = torch.float16 if halves else torch.float32
    return ScaleSet.build(kind, tensors, manifest, task=task, note=note, dtype=dtype)


def export_ia3(base: Path | str, scale_set: Path | str, destination: Path | str) -> None:
    """Write a set of kind `channel`, or `channel+input`, as an (IA)3 adapter folder that PEFT loads.

    A linear whose inputs are scaled becomes a feedforward module, which must leave its outputs alone. An interrupted
    run leaves nothing at `destination`. Raises `InvalidScaleSet`, `WrongBase`, `DiskFull`, and `InvalidRequest` for a
    set that an adapter cannot hold.
    """
    base, destination = Path(base), Path(destination)
    with open_merged(base, Path(scale_set)) as merged:
        assert merged.set is not None
        if merged.set.kind == "group":
            raise InvalidRequest(
                "a set of kind 'group' scales groups of inputs, which (IA)3 does not; 'channel' and 'channel+input' "
                "can be exported (or --format hf)",
                param="scale-set",
            )
        tensors = merged.set.tensors
        factors = {name: tensor for name, tensor in tensors.items() if bool((tensor != 1).any())}
        _refuse_biases(base, factors)
        vectors: dict[str, Tensor] = {}
        feedforward: list[str] = []
        for linear in merged.manifest.linears:
            out, inputs = f"{linear}.out_scale", f"{linear}.in_scale"
            if inputs in factors and out in factors:
                raise InvalidRequest(
                    f"{linear} has its inputs and its outputs scaled, and (IA)3 does one or the other; use --format hf",
                    param="scale-set",
                )
            if inputs in factors:
                feedforward.append(linear)
                vectors[f"{_PREFIX}{linear}{_SUFFIX}"] = tensors[inputs][None, :].contiguous()
            else:
                vectors[f"{_PREFIX}{linear}{_SUFFIX}"] = tensors[out][:, None].contiguous()
        config = _config(merged.manifest, feedforward)
        with disk_full_named(destination, resumes=False), staged_folder(destination) as folder:
            save_file(vectors, folder / TENSOR_FILE, metadata={"format": "pt"})
            (folder / TENSOR_FILE).chmod(0o644)
            (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            lines = ["# (IA)3 adapter", "", "Exported by peqa-serve (`peqa export --format ia3`).", ""]
            (folder / "README.md").write_text("\n".join([*lines, *merged.origin()]) + "\n", encoding="utf-8")


def _config(manifest: BaseManifest, feedforward: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": manifest.model_id,
        "target_modules": list(manifest.linears),
        "feedforward_modules": feedforward,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_ia3_weights": True,
        "inference_mode": True,
    }


def _read_config(adapter: Path) -> dict[str, Any]:
    path = adapter / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidCheckpoint(f"{adapter} is no PEFT adapter: {CONFIG_FILE}: {error.strerror}") from None
    except ValueError as error:
        raise InvalidCheckpoint(f"{path} is no JSON: {error}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "IA3":
        raise InvalidCheckpoint(
            f"{adapter} is a PEFT adapter of type {kind!r}; only (IA)3 ('IA3') scales rows, as a scale set does"
        )
    if config.get("modules_to_save"):
        raise InvalidCheckpoint(
            f"{adapter} brings whole modules of its own (modules_to_save: {config['modules_to_save']}), which a scale "
            "set cannot hold"
        )
    return dict(config)


def _tensor_file(adapter: Path) -> Path:
    path = adapter / TENSOR_FILE
    if path.is_file():
        return path
    if (adapter / "adapter_model.bin").is_file():
        raise InvalidCheckpoint(
            f"{adapter} holds adapter_model.bin, a pickle, which can run code when it is opened; save the adapter with "
            "PEFT's save_pretrained again, as safetensors"
        )
    raise InvalidCheckpoint(f"{adapter} is incomplete: {TENSOR_FILE} is missing")


def _factors(adapter: Path, vectors: Mapping[str, Tensor], manifest: BaseManifest) -> dict[str, Tensor]:
    """`<linear>.out_scale` or `.in_scale` of each vector, in its own dtype."""
    factors: dict[str, Tensor] = {}
    for name, vector in vectors.items():
        linear = name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        if name != f"{_PREFIX}{linear}{_SUFFIX}":
            raise InvalidCheckpoint(
                f"{adapter}: tensor {name!r} is no (IA)3 vector ({_PREFIX}<linear>{_SUFFIX})"
            )
        shape = manifest.linears.get(linear)
        if shape is None:
            raise InvalidCheckpoint(
                f"{adapter} scales {linear}, which is no quantized linear of {manifest.model_id}; embeddings, the "
                "output head and linears that stay floats carry no scales"
            )
        if tuple(vector.shape) == (shape.out_features, 1):
            factors[f"{linear}.out_scale"] = vector.flatten()
        elif tuple(vector.shape) == (1, shape.in_features):
            factors[f"{linear}.in_scale"] = vector.flatten()
        else:
            raise InvalidCheckpoint(
                f"{adapter}: {name} has shape {list(vector.shape)}; {linear} has {shape.out_features} outputs and "
                f"{shape.in_features} inputs, so [{shape.out_features}, 1] or [1, {shape.in_features}] fits"
            )
    if not factors:
        raise InvalidCheckpoint(f"{adapter} holds no vector")
    return factors


def _refuse_biases(base: Path, factors: Mapping[str, Tensor]) -> None:
    """Raise `InvalidScaleSet` where a scaled output has a bias."""
    with open_tensors(base) as handles:
        for name, factor in factors.items():
            linear, _, leaf = name.rpartition(".")
            if leaf == "out_scale" and f"{linear}.bias" in handles and bool((factor != 1).any()):
                raise InvalidScaleSet(
                    f"{linear} has a bias, which (IA)3 multiplies with the output and a scale set does not; only "
                    "linears without one can have their outputs scaled by both"
                )
