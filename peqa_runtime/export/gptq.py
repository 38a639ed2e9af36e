"""What of a base fits a GPTQ checkpoint, and its tensors. The layout: see `peqa_runtime.model.importers.gptq`.

Zeros that are all 2 ** (bits - 1) are written as version 1 (sym), which every loader takes; others as "gptq_v2", since
version 1 cannot hold a zero of 0 and GPTQModel refuses to guess. Merged scales are rounded to fp16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.export.merged import MergedBase
from peqa_runtime.model.base_checkpoint import PER_CHANNEL, Precision
from peqa_runtime.model.importers.words import pack_words

GROUP_SIZES = (PER_CHANNEL, 16, 32, 64, 128, 256, 512, 1024)
"""What loaders know."""
_WAY_OUT = "use --format hf"
_LARGEST_LOSS = 2.0**-10
"""Of a scale in fp16, relative: more is lost only where fp16 has no more digits, below 6e-5."""


@dataclass(frozen=True)
class GptqPlan:
    """`linears`: those that stay codes. `config`: quantization_config. `remarks`: what not every loader takes."""

    linears: Mapping[str, Precision]
    symmetric: bool
    config: Mapping[str, Any]
    remarks: tuple[str, ...]

    def tensors(self, merged: MergedBase, module: str) -> dict[str, Tensor]:
        """qweight, qzeros, scales and g_idx of a linear."""
        weight = merged.codes(module)
        assert weight is not None, module
        zeros = weight.zeros.to(torch.uint8) - (1 if self.symmetric else 0)
        return {
            "qweight": weight.qweight.view(torch.int32).t(),
            "qzeros": pack_words(zeros.t().contiguous(), weight.bits),
            "scales": weight.scales.half().t(),
            "g_idx": torch.arange(weight.in_features, dtype=torch.int32) // weight.group_size,
        }


def plan_gptq(merged: MergedBase, *, progress: bool) -> GptqPlan:
    """Check every linear; raises `InvalidCheckpoint` with the way out for what a GPTQ file cannot hold."""
    linears: dict[str, Precision] = {}
    fractions: list[str] = []
    inputs: list[str] = []
    symmetric = True
    for module in tqdm(merged.manifest.linears, "check", disable=not progress):
        weight = merged.codes(module)
        assert weight is not None, module
        if merged.in_scale(module) is not None:
            inputs.append(module)
        if _has_other_zeros(weight):
            fractions.append(module)
        _check_shape(module, weight)
        symmetric = symmetric and bool((weight.zeros == 1 << (weight.bits - 1)).all())
        linears[module] = _precision(weight, merged.spec)
    if inputs:
        raise InvalidCheckpoint(
            f"the set scales the inputs of {len(inputs)} linears ({inputs[0]}, …), which a GPTQ file cannot hold; "
            f"{_WAY_OUT}, or tune a set of kind channel or group"
        )
    if fractions:
        raise InvalidCheckpoint(
            f"{len(fractions)} linears ({fractions[0]}, …) have zero points that are no codes, which a GPTQ file "
            f"cannot hold; {_WAY_OUT}, or quantize with --zeros integer"
        )
    return _plan(merged, linears, symmetric)


def _plan(merged: MergedBase, linears: Mapping[str, Precision], symmetric: bool) -> GptqPlan:
    default = Counter(linears.values()).most_common(1)[0][0]
    others = {name: p for name, p in linears.items() if p != default}
    floats = [name for name in merged.spec.modules_to_not_convert if name not in merged.spec.embeddings]
    dynamic: dict[str, Any] = {f"-:^{_escaped(name)}$": {} for name in floats}
    dynamic |= {
        f"+:^{_escaped(name)}$": {"bits": p.bits, "group_size": p.group_size} for name, p in others.items()
    }
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"peqa-serve:{_version()}"]},
    }
    remarks: list[str] = []
    if dynamic:
        config["dynamic"] = dynamic
        remarks.append("linears differ in bits or groups (`dynamic`): GPTQModel and vLLM read that")
    if default.bits == 3:
        remarks.append("3 bits: not every loader has kernels for it (vLLM's Marlin has not)")
    return GptqPlan(linears, symmetric, config, tuple(remarks))


def _has_other_zeros(weight: QuantizedWeight) -> bool:
    zeros = weight.zeros
    return bool(((zeros != zeros.round()) | (zeros < 0) | (zeros >= 1 << weight.bits)).any())


def _check_shape(module: str, weight: QuantizedWeight) -> None:
    for what, count in (("inputs", weight.in_features), ("outputs", weight.out_features)):
        if count % 32:
            raise InvalidCheckpoint(
                f"{module} has {count} {what}, and loaders of GPTQ files need a multiple of 32; {_WAY_OUT}"
            )
    halves = weight.scales.half().float()
    loss = (halves - weight.scales).abs() > weight.scales.abs() * _LARGEST_LOSS
    if not bool(torch.isfinite(halves).all()) or bool(loss.any()):
        raise InvalidCheckpoint(
            f"{module} has scales from {float(weight.scales.abs().min()):g} to {float(weight.scales.abs().max()):g}, "
            f"which fp16, the scales of a GPTQ file, cannot hold; {_WAY_OUT}"
        )
    if weight.groups > 1 and weight.group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise InvalidCheckpoint(
            f"{module} has groups of {weight.group_size}; loaders of GPTQ files know {sizes}; {_WAY_OUT}"
        )


def _precision(weight: QuantizedWeight, spec: Any) -> Precision:
    """The base's own group size where it says the same, so that few linears differ."""
    default = Precision(spec.bits, spec.group_size)
    size = weight.in_features if default.group_size == PER_CHANNEL else default.group_size
    if weight.bits == default.bits and size == weight.group_size:
        return default
    return Precision(weight.bits, PER_CHANNEL if weight.groups == 1 else weight.group_size)


def _escaped(name: str) -> str:
    return name.replace(".", "\\.")


def _version() -> str:
    try:
        return version("peqa-serve")
    except PackageNotFoundError:
        return "0"
