"""A base whose scales are multiplied by those of a set, linear by linear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from peqa_kernels.quant_matmul import dequantize
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.core import BaseManifest
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model.base_checkpoint import QuantizationSpec, read_manifest, verify_digest
from peqa_runtime.model.quantizers.float_source import FloatSource, open_source
from peqa_runtime.scales.scale_set import ScaleSet


@dataclass(frozen=True)
class MergedBase:
    """`source`: the base's tensors. `set`: what is merged into its linears; None = the base as it is."""

    source: FloatSource
    spec: QuantizationSpec
    manifest: BaseManifest
    set: ScaleSet | None
    _factors: Mapping[str, Tensor]

    def codes(self, module: str) -> QuantizedWeight | None:
        """The codes of a module with merged scales, fp32 (`in_scale` left out); None where it has no codes."""
        weight = self.source.codes(module)
        if weight is None:
            return None
        scales = weight.scales
        out, group = (self._factors.get(f"{module}.{kind}") for kind in ("out_scale", "group_scale"))
        if out is not None:
            scales = scales * out.float()[:, None]
        if group is not None:
            scales = scales * group.float()
        return replace(weight, scales=scales)

    def in_scale(self, module: str) -> Tensor | None:
        """The factors of a linear's inputs, fp32 [K], where the set has some that are not 1."""
        factor = self._factors.get(f"{module}.in_scale")
        return None if factor is None or bool((factor == 1).all()) else factor.float()

    def tensor(self, name: str) -> Tensor:
        """A parameter with the set merged: fp32 where it was codes, else as it is in the base."""
        module = name.removesuffix(".weight")
        weight = self.codes(module) if name.endswith(".weight") else None
        if weight is None:
            return self.source.tensor(name)
        factor = self.in_scale(module)
        return dequantize(weight) if factor is None else dequantize(weight) * factor

    def origin(self) -> list[str]:
        """Lines that say what the export was made of, for its README."""
        lines = [f"- base: {self.manifest.model_id}, digest `{self.manifest.base_digest}`"]
        if self.set is not None:
            name = f" of task `{self.set.task}`" if self.set.task else ""
            lines.append(f"- scale set{name}: kind `{self.set.kind}`, revision `{self.set.revision}`")
        return lines


@contextmanager
def open_merged(base: Path, scale_set: Path | None) -> Iterator[MergedBase]:
    """Open a base folder, and a set of it.

    Raises `InvalidCheckpoint` when the folder is no base or its tensors are not those of its digest, `InvalidScaleSet`
    or `WrongBase` for the set.
    """
    manifest = read_manifest(base)
    parsed = None if scale_set is None else ScaleSet.parse(scale_set, manifest)
    verify_digest(base)
    with open_source(base) as source:
        if source.spec is None:
            raise InvalidCheckpoint(f"{base} is no base")
        yield MergedBase(source, source.spec, manifest, parsed, {} if parsed is None else parsed.tensors)


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floats as `dtype`; raises `InvalidCheckpoint` when a number does not fit."""
    if not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    if not bool(torch.isfinite(result).all()):
        raise InvalidCheckpoint(
            f"{name} reaches {float(tensor.abs().max()):g}, which {str(dtype).removeprefix('torch.')} cannot hold; "
            "export with --dtype bfloat16 or float32"
        )
    return result
