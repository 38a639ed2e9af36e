"""Which kind of quantized checkpoint a folder is, by its config, and by its tensors where no config says it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model.base_checkpoint import INDEX_FILE, SINGLE_FILE, read_config, tensor_files
from peqa_runtime.model.importers.awq import awq_layout
from peqa_runtime.model.importers.coded_linear import Layout
from peqa_runtime.model.importers.compressed_tensors import compressed_layout
from peqa_runtime.model.importers.gptq import EFFICIENT_QAT, GptqLayout, gptq_layout
from peqa_runtime.model.importers.hqq import HqqLayout

SUPPORTED = (
    "GPTQ (gptq, gptq_v2), AWQ (gemm), compressed-tensors (pack-quantized), HQQ (axis 1), EfficientQAT; "
    "and GGUF (Q4_0, Q4_1, Q8_0)"
)
STATED = ("gptq", "gptq_v2", "efficientqat")
"""What `stated` may be: the layouts that look alike."""
_METHODS: Mapping[str, Callable[[Mapping[str, Any]], Layout]] = {
    "gptq": gptq_layout,
    "awq": awq_layout,
    "compressed-tensors": compressed_layout,
    "hqq": lambda config: HqqLayout(),
}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; raises `InvalidCheckpoint` when there are none, or one is missing."""
    if not folder.is_dir():
        raise InvalidCheckpoint(
            f"{folder} is no folder; give the checkpoint's folder (config.json beside its .safetensors files), "
            "or a .gguf file"
        )
    if (folder / INDEX_FILE).exists() or (folder / SINGLE_FILE).exists():
        return tensor_files(folder)
    found = sorted(folder.glob("*.safetensors"))  # AutoGPTQ: gptq_model-4bit-128g.safetensors
    if len(found) == 1:
        return found
    if found:
        raise InvalidCheckpoint(
            f"{folder} holds {len(found)} safetensors files and no {INDEX_FILE} that says what belongs together"
        )
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        raise InvalidCheckpoint(
            f"{folder} holds {pickled[0]}, a pickle, which can run code when it is opened; take or make the checkpoint "
            "in safetensors"
        )
    raise InvalidCheckpoint(f"{folder} holds no .safetensors file")


def quantization_of(folder: Path) -> dict[str, Any]:
    """How the folder says that it is quantized: config.json, else AutoGPTQ's or AutoAWQ's file; empty when nowhere."""
    value = read_config(folder).get("quantization_config")
    if isinstance(value, dict) and value:
        return value
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        path = folder / name
        if path.is_file():
            try:
                value = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise InvalidCheckpoint(f"{path} cannot be read: {error}") from None
            if not isinstance(value, dict):
                raise InvalidCheckpoint(f"{path} must hold a JSON object")
            return {"quant_method": value.get("method") or method, **value}
    return {}


def layout_of(folder: Path, names: Mapping[str, Any], stated: str | None = None) -> Layout:
    """The layout of a checkpoint whose tensors have these names. `stated`: what the user says it is, of `STATED`.

    Raises `InvalidCheckpoint` for a kind that cannot be imported, or one that nothing tells from another.
    """
    config = quantization_of(folder)
    method = str(config.get("quant_method") or "").lower()
    if stated is not None:
        return _stated(
            folder, stated, method, str(config.get("checkpoint_format") or config.get("format") or "")
        )
    if method == "peqa":
        raise InvalidCheckpoint(f"{folder} is a base already")
    if method:
        if method not in _METHODS:
            raise InvalidCheckpoint(
                f"{folder} is quantized by {method!r}, which cannot be imported; what can: {SUPPORTED}"
            )
        return _METHODS[method](config)
    leaves = {name.rpartition(".")[2] for name in names}
    if "W_q" in leaves:
        return HqqLayout()
    if {"qweight", "qzeros"} <= leaves:
        raise InvalidCheckpoint(
            f"{folder} holds GPTQ-like tensors, and nothing says how zeros are stored; say it with --format "
            "efficientqat (its own files have no config), gptq (zeros minus one) or gptq_v2"
        )
    if leaves & {"qweight", "weight_packed", "weight_scale"}:
        raise InvalidCheckpoint(
            f"{folder} is quantized, but its config.json does not say how (quantization_config); what can be imported: "
            f"{SUPPORTED}"
        )
    raise InvalidCheckpoint(f"{folder} is not quantized; `peqa quantize` makes a base of floats")


def is_quantized(folder: Path) -> bool:
    """Whether a model folder says that it holds codes of some kind; raises `InvalidCheckpoint` for a damaged config."""
    return bool(quantization_of(folder))


def _stated(folder: Path, stated: str, method: str, kind: str) -> Layout:
    if stated not in STATED:
        raise InvalidCheckpoint(f"format must be one of {', '.join(STATED)}, not {stated!r}")
    if method not in ("", "gptq"):
        raise InvalidCheckpoint(f"{folder} says that it is {method!r}, not {stated!r}; leave --format out")
    if kind and kind != stated:
        raise InvalidCheckpoint(
            f"{folder} says that it is of format {kind!r}, not {stated!r}; leave --format out"
        )
    return EFFICIENT_QAT if stated == "efficientqat" else GptqLayout(stated, stated == "gptq", dense=True)
