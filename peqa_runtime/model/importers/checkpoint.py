"""A quantized Hugging Face checkpoint -> base folder, every code, scale and zero kept bit for bit.

What the checkpoint holds as floats (norms, biases, embeddings, linears that were left out) stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from peqa_runtime.disk_space import disk_full_named
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model.base_checkpoint import Precision, QuantizationSpec, open_files, read_config
from peqa_runtime.model.base_writer import BaseWriter, staged_folder
from peqa_runtime.model.importers.coded_linear import CodedLinear, Layout
from peqa_runtime.model.importers.recognition import checkpoint_files, layout_of
from peqa_runtime.model.quantizers.float_source import FloatSource
from peqa_runtime.model.quantizers.skeleton import Skeleton, load_skeleton
from peqa_runtime.model.threads import one_thread

_RECOMPUTED = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
"""Tensors of old checkpoints that models compute by themselves."""


@dataclass(frozen=True)
class _Contents:
    """A checkpoint sorted: its coded linears with their precision, its float tensors, what is left out."""

    coded: Mapping[str, tuple[CodedLinear, Precision]]
    floats: list[str]


def import_checkpoint(
    source: Path | str,
    destination: Path | str,
    *,
    format: str | None = None,
    model_id: str | None = None,
    progress: bool = True,
) -> str:
    """Write the base folder `destination` from the quantized checkpoint `source`; returns what it was recognized as.

    `format`: gptq, gptq_v2 or efficientqat, for files that nothing tells apart. `model_id`: name of the base (default:
    the folder's). An interrupted run leaves nothing at `destination`. Raises `InvalidCheckpoint` for what is damaged or
    cannot be imported, `DiskFull` when there is no room.
    """
    source, destination = Path(source), Path(destination)
    files = checkpoint_files(source)
    with disk_full_named(destination, resumes=False), one_thread(), open_files(files) as handles:
        layout = layout_of(source, handles, format)
        config = {key: value for key, value in read_config(source).items() if key != "quantization_config"}
        floats = FloatSource(source, config, None, handles)
        skeleton = load_skeleton(floats)
        contents = _sort(source, handles, layout, skeleton)
        spec = _spec(contents, skeleton, layout, model_id or source.resolve().name)
        with staged_folder(destination) as folder:
            floats.copy_companions(folder)
            with BaseWriter(folder, config, spec) as writer:
                for name in tqdm(
                    [*contents.coded, *contents.floats], f"import {source.name}", disable=not progress
                ):
                    if name in contents.coded:
                        writer.add_codes(name, layout.read(contents.coded[name][0]))
                    else:
                        writer.add_float(name, _float(source, floats, name))
    return layout.label


def _float(source: Path, floats: FloatSource, name: str) -> torch.Tensor:
    values = floats.tensor(name)
    if values.is_floating_point() and not bool(torch.isfinite(values).all()):
        raise InvalidCheckpoint(f"{source}: tensor {name!r} holds NaN or infinity")
    return values


def _sort(source: Path, handles: Mapping[str, Any], layout: Layout, skeleton: Skeleton) -> _Contents:
    """What each tensor is; raises `InvalidCheckpoint` for one that the model has no place for, or lacks."""
    model = skeleton.model
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    coded: dict[str, tuple[CodedLinear, Precision]] = {}
    for name in handles:
        module, _, leaf = name.rpartition(".")
        if leaf == layout.marker:
            linear = _linear(source, module, handles, skeleton, tied)
            coded[module] = (linear, layout.precision(linear))
    if not coded.keys() - skeleton.heads:
        raise InvalidCheckpoint(f"{source} holds no linear in the layout of {layout.label}")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    floats: list[str] = []
    for name in handles:
        module, _, leaf = name.rpartition(".")
        if module in coded and leaf in layout.leaves:
            continue
        if name in known and not (module in coded and leaf == "weight"):
            found = tuple(handles[name].get_slice(name).get_shape())
            if found != known[name]:
                raise InvalidCheckpoint(
                    f"{source}: tensor {name!r} has shape {list(found)}, {type(model).__name__} needs "
                    f"{list(known[name])}"
                )
            floats.append(name)
        elif not _may_be_left_out(name, handles, module in coded):
            raise InvalidCheckpoint(
                f"{source}: {type(model).__name__} has no place for tensor {name!r}; the checkpoint is of another "
                "model, or of one that transformers builds otherwise (mixtures of experts)"
            )
    held = {*floats, *(f"{module}.weight" for module in coded)}
    output = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
    missing = sorted(parameters - held - ({f"{output}.weight"} if tied else set()))
    if missing:
        raise InvalidCheckpoint(f"{source} is incomplete: no tensor for {', '.join(missing[:5])}")
    return _Contents(coded, floats)


def _linear(
    source: Path, module: str, handles: Mapping[str, Any], skeleton: Skeleton, tied: bool
) -> CodedLinear:
    """The linear of the model that codes are for."""
    try:
        found = skeleton.model.get_submodule(module)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear):
        what = "no module" if found is None else f"a {type(found).__name__}"
        raise InvalidCheckpoint(
            f"{source} holds codes for {module}, which is {what} of {type(skeleton.model).__name__}; codes of linears "
            "and of the output head can be imported"
        )
    if found.in_features % 8:
        raise InvalidCheckpoint(f"{module} has {found.in_features} inputs; only multiples of 8 can be packed")
    if module in skeleton.heads and tied:
        raise InvalidCheckpoint(
            f"{source} holds codes for {module}, which its config ties to the embedding (tie_word_embeddings); the two "
            "contradict each other"
        )
    return CodedLinear(module, found.out_features, found.in_features, handles)


def _may_be_left_out(name: str, handles: Mapping[str, Any], of_coded: bool) -> bool:
    """Tensors that change nothing: tables that models compute, and the zero biases that AutoGPTQ writes."""
    if name.endswith(_RECOMPUTED):
        return True
    if of_coded and name.endswith(".bias"):
        return not bool(handles[name].get_tensor(name).any())
    return False


def _spec(contents: _Contents, skeleton: Skeleton, layout: Layout, model_id: str) -> QuantizationSpec:
    """The commonest precision of the linears is the default; others are overrides or stay floats."""
    precisions = {name: precision for name, (_, precision) in contents.coded.items()}
    default = Counter(p for name, p in precisions.items() if name in skeleton.linears).most_common(1)[0][0]
    return QuantizationSpec(
        default.bits,
        default.group_size,
        model_id,
        overrides={name: p for name, p in precisions.items() if p != default or name in skeleton.heads},
        modules_to_not_convert=tuple(name for name in skeleton.linears if name not in precisions),
        embeddings=tuple(sorted(skeleton.heads)),
        quantizer={"imported_from": layout.label},
    )
