"""What of a base fits a GPTQ checkpoint, and its tensors. The layout: see `peqa_runtime.model.importers.gptq`.

Version 1 stores each zero minus one, version 2 ("gptq_v2") as it is. Version 1 is written where it can hold the zeros,
none of them being 0: most loaders know it alone. Only GPTQModel's own refuses it where zeros are not all
2 ** (bits - 1) (`sym: false`) and another wrote the file; version 2 is for that loader, and for zeros of 0. Merged
scales are rounded to fp16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidCheckpoint, InvalidRequest
from peqa_runtime.export.merged import MergedBase
from peqa_runtime.model.base_checkpoint import PER_CHANNEL, Precision
from peqa_runtime.model.importers.words import pack_words

GptqVersion = Literal[1, 2]
GROUP_SIZES = (PER_CHANNEL, 16, 32, 64, 128, 256, 512, 1024)
"""What loaders know."""
_WAY_OUT = "use --format hf"
_LARGEST_LOSS = 2.0**-10
"""Of a scale in fp16, relative: more is lost only where fp16 has no more digits, below 6e-5."""


@dataclass(frozen=True)
class GptqPlan:
    """`linears`: those that stay codes. `version`: how zeros are stored. `config`: quantization_config. `remarks`:
    which loaders take that, and what is rounded.
    """

    linears: Mapping[str, Precision]
    version: GptqVersion
    config: Mapping[str, Any]
    remarks: tuple[str, ...]

    def tensors(self, merged: MergedBase, module: str) -> dict[str, Tensor]:
        """qweight, qzeros, scales and g_idx of a linear."""
        weight = merged.codes(module)
        assert weight is not None, module
        zeros = weight.zeros.to(torch.uint8) - (1 if self.version == 1 else 0)
        return {
            "qweight": weight.qweight.view(torch.int32).t(),
            "qzeros": pack_words(zeros.t().contiguous(), weight.bits),
            "scales": weight.scales.half().t(),
            "g_idx": torch.arange(weight.in_features, dtype=torch.int32) // weight.group_size,
        }


def plan_gptq(merged: MergedBase, version: int | None = None, *, progress: bool) -> GptqPlan:
    """Check every linear; `version` None is 1 where it can hold every zero, else 2.

    Raises `InvalidCheckpoint` with the way out for what a GPTQ file cannot hold, `InvalidRequest` for a version that
    does not exist.
    """
    if version not in (None, 1, 2):
        raise InvalidRequest(f"the GPTQ format has versions 1 and 2, not {version!r}", param="gptq-version")
    linears: dict[str, Precision] = {}
    fractions: list[str] = []
    inputs: list[str] = []
    at_zero: list[str] = []
    symmetric, loss = True, 0.0
    for module in tqdm(merged.manifest.linears, "check", disable=not progress):
        weight = merged.codes(module)
        assert weight is not None, module
        if merged.in_scale(module) is not None:
            inputs.append(module)
        if _has_other_zeros(weight):
            fractions.append(module)
        if bool((weight.zeros == 0).any()):
            at_zero.append(module)
        _check_shape(module, weight)
        loss = max(loss, _loss_of_scales(module, weight))
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
    if version == 1 and at_zero:
        raise InvalidCheckpoint(
            f"{len(at_zero)} linears ({at_zero[0]}, …) have zero points of 0, which version 1 of the GPTQ format "
            f"cannot hold; leave --gptq-version out, or {_WAY_OUT}"
        )
    chosen: GptqVersion = 2 if version == 2 or at_zero else 1
    remarks = _remarks(chosen, symmetric, at_zero, loss)
    return _plan(merged, linears, chosen, symmetric, remarks)


def _remarks(version: GptqVersion, symmetric: bool, at_zero: list[str], loss: float) -> list[str]:
    """What to know of the zeros and scales before a loader is chosen."""
    remarks: list[str] = []
    if version == 2:
        why = f"{len(at_zero)} linears ({at_zero[0]}, …) have zero points of 0, so " if at_zero else ""
        remarks.append(
            f"{why}zeros are stored as they are (checkpoint_format gptq_v2): GPTQModel reads that, transformers "
            "through it, and vLLM since November 2025; an earlier vLLM takes each for one more and answers nonsense, "
            "AutoGPTQ refuses the file"
        )
    elif not symmetric:
        remarks.append(
            "zeros are not symmetric (sym false), and stored minus one (checkpoint_format gptq): vLLM, AutoGPTQ and "
            "transformers read that; GPTQModel.load refuses it in files that are not its own: --gptq-version 2 makes "
            "one for it"
        )
    if loss:
        remarks.append(
            f"scales are rounded to fp16, by up to {loss:.2%}: tokens may differ from the server's where two are all "
            "but equally likely; --format hf rounds nothing"
        )
    return remarks


def _plan(
    merged: MergedBase,
    linears: Mapping[str, Precision],
    version: GptqVersion,
    symmetric: bool,
    remarks: list[str],
) -> GptqPlan:
    default = Counter(linears.values()).most_common(1)[0][0]
    others = {name: p for name, p in linears.items() if p != default}
    floats = [name for name in merged.spec.modules_to_not_convert if name not in merged.spec.embeddings]
    dynamic: dict[str, Any] = {f"-:^{_escaped(name)}$": {} for name in floats}
    dynamic |= {
        f"+:^{_escaped(name)}$": {"bits": p.bits, "group_size": p.group_size} for name, p in others.items()
    }
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"peqa-serve:{_version()}"]},
    }
    if dynamic:
        config["dynamic"] = dynamic
        remarks.append("linears differ in bits or groups (`dynamic`): GPTQModel and vLLM read that")
    if default.bits == 3:
        remarks.append("3 bits: not every loader has kernels for it (vLLM's Marlin has not)")
    return GptqPlan(linears, version, config, tuple(remarks))


def _has_other_zeros(weight: QuantizedWeight) -> bool:
    zeros = weight.zeros
    return bool(((zeros != zeros.round()) | (zeros < 0) | (zeros >= 1 << weight.bits)).any())


def _check_shape(module: str, weight: QuantizedWeight) -> None:
    for what, count in (("inputs", weight.in_features), ("outputs", weight.out_features)):
        if count % 32:
            raise InvalidCheckpoint(
                f"{module} has {count} {what}, and loaders of GPTQ files need a multiple of 32; {_WAY_OUT}"
            )
    if weight.groups > 1 and weight.group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise InvalidCheckpoint(
            f"{module} has groups of {weight.group_size}; loaders of GPTQ files know {sizes}; {_WAY_OUT}"
        )


def _loss_of_scales(module: str, weight: QuantizedWeight) -> float:
    """What fp16 takes from the scale that loses most, relative; raises `InvalidCheckpoint` where it is too much."""
    sizes = weight.scales.abs()
    halves = weight.scales.half().float()
    lost = (halves - weight.scales).abs()
    if not bool(torch.isfinite(halves).all()) or bool((lost > sizes * _LARGEST_LOSS).any()):
        raise InvalidCheckpoint(
            f"{module} has scales from {float(sizes.min()):g} to {float(sizes.max()):g}, "
            f"which fp16, the scales of a GPTQ file, cannot hold; {_WAY_OUT}"
        )
    return float(torch.where(lost > 0, lost / sizes, lost).max())


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
