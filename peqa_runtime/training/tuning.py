"""The base as training sees it: the very same quantized linears, with one task's scales on them.

Scales are named as in a scale set file: `<linear>.out_scale`, `.in_scale`, `.group_scale`, all relative to the
base (1 = base), held as fp32 masters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from peqa_runtime.core import BaseManifest, ScaleKind
from peqa_runtime.errors import InvalidCheckpoint, InvalidData
from peqa_runtime.model.base_checkpoint import read_manifest
from peqa_runtime.model.loader import context_limit, pick_device, refuse_missing
from peqa_runtime.model.quantized_linear import QuantizedLinear, TunedParts
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.text import load_tokenizer
from peqa_runtime.training.settings import Compute
from peqa_runtime.training.text_encoding import TextEncoding

SMALLEST_SCALE, LARGEST_SCALE = 1 / 16, 16.0
"""Tuned scales stay in this range: the one that servers accept, and never zero or negative."""


@dataclass(frozen=True)
class TunableModel(TextEncoding):
    """A base loaded for training, or evaluation in fp32 (dense attention, gradients possible), with what it needs."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: BaseManifest
    parts: TunedParts = field(default_factory=TunedParts)  # under which set each row of the next forward is

    @property
    def max_tokens(self) -> int:
        """Context of the model, in tokens: the same that a server has."""
        return context_limit(self.model)


def load_tunable(base: Path, *, device: str = "auto") -> TunableModel:
    """Load a base folder with fp32 activations; parameters are frozen until `start_tuning`.

    `device`: auto, cpu or cuda. Raises `InvalidCheckpoint` for a folder that is no whole base, `UnsupportedModel` for
    a device that is not there.
    """
    manifest = read_manifest(base)
    place = pick_device(device)
    tokenizer = load_tokenizer(base)
    model, info = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    refuse_missing(base, info)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.to(place)
    model.eval()
    return TunableModel(model, tokenizer, manifest)


def quantized_linears(model: nn.Module, manifest: BaseManifest) -> dict[str, QuantizedLinear]:
    """The linears that scale sets name, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and name in manifest.linears
    }


def refuse_groups(tunable: TunableModel) -> None:
    """Raise `InvalidData` unless every row of the base has one scale."""
    linears = quantized_linears(tunable.model, tunable.manifest)
    grouped = next((name for name, linear in linears.items() if linear.scales.shape[1] > 1), None)
    if grouped is not None:
        raise InvalidData(
            f"the recipe is for a base with one scale a row, and {grouped} has groups: "
            "make one with `peqa quantize … --group-size -1`"
        )


def start_tuning(tunable: TunableModel, kind: ScaleKind, sets: int = 1) -> dict[str, nn.Parameter]:
    """Give every quantized linear `sets` sets of trainable scales of `kind`, all one.

    Returns the first set's by their name in a file; `tuned_scales` gives the others'.
    """
    tunable.parts.parts = ()
    for linear in quantized_linears(tunable.model, tunable.manifest).values():
        linear.tune(kind, sets, tunable.parts)
    return tuned_scales(tunable.model)


def drop_scales(tunable: TunableModel) -> None:
    """Make the model the base again."""
    tunable.parts.parts = ()
    for linear in quantized_linears(tunable.model, tunable.manifest).values():
        linear.tune(None)


def tuned_scales(model: nn.Module, index: int = 0) -> dict[str, nn.Parameter]:
    """The scales of set `index` that are being tuned, by their name in a scale set file."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        linear, _, leaf = name.partition(f".tuned.{index}.")
        if leaf:
            found[f"{linear}.{leaf}"] = parameter
    return found


def set_scales(model: nn.Module, tensors: Mapping[str, Tensor], index: int = 0) -> None:
    """Copy scales into a model on which `start_tuning` was called with the same kind; names must be equal."""
    scales = tuned_scales(model, index)
    if scales.keys() != tensors.keys():
        raise InvalidCheckpoint(f"scales do not fit: {sorted(scales.keys() ^ tensors.keys())[:5]} …")
    with torch.no_grad():
        for name, parameter in scales.items():
            parameter.copy_(tensors[name])


@contextmanager
def as_base(tunable: TunableModel, tokens: int) -> Iterator[None]:
    """Within it a forward of `tokens` tokens (rows times width) is the base's, whatever is being tuned."""
    before, tunable.parts.parts = tunable.parts.parts, ((None, tokens),)
    try:
        yield
    finally:
        tunable.parts.parts = before


def apply_scale_set(tunable: TunableModel, scale_set: ScaleSet | Path) -> ScaleSet:
    """Put a saved set on the model, exactly as stored (fp16 values in fp32). Raises as `ScaleSet.parse` does."""
    if not isinstance(scale_set, ScaleSet):
        scale_set = ScaleSet.parse(Path(scale_set), tunable.manifest)
    start_tuning(tunable, scale_set.kind)
    set_scales(tunable.model, scale_set.tensors)
    return scale_set


def logits_at(
    model: nn.Module, input_ids: Tensor, positions: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Logits [len(positions), vocab], fp32, at `positions` of the flattened `input_ids` [rows, tokens].

    Only these places go through the head, which is most of the work of a small model with a large vocabulary.
    The selection is a hook in front of the head, so whatever a model does after its head still happens.
    `position_ids` [rows, tokens] begin anew with each example where rows are packed. `model` may be wrapped for
    several processes.
    """

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[positions][None], *args[1:])

    inner = model.module if isinstance(model, DistributedDataParallel) else model
    head = cast(PreTrainedModel, inner).get_output_embeddings()
    packed = {} if position_ids is None else {"position_ids": position_ids}
    handle = head.register_forward_pre_hook(select)
    try:
        logits: Tensor = model(input_ids=input_ids, use_cache=False, **packed).logits
    finally:
        handle.remove()
    return logits[0].float()


def fast_compute_dtype(device: torch.device, compute: Compute = "auto") -> torch.dtype:
    """Dtype of the matmuls in training: bf16 where the hardware multiplies it (AMX, AVX-512 BF16, GPU), else fp32."""
    if compute != "auto":
        return torch.float32 if compute == "float32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
