"""Any Hugging Face folder -> base folder: round to nearest in a range that is fitted per group.

Every nn.Linear but the output head becomes codes; embeddings, norms, biases and the head stay as they are (so do
mixture-of-experts weights, which are no nn.Linear). Tensors are read one by one from the safetensors files: a float
copy of the model is never held.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from peqa_kernels.packing import pack_codes
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidCheckpoint, InvalidRequest
from peqa_runtime.model.base_checkpoint import (
    PER_CHANNEL,
    Precision,
    QuantizationSpec,
    open_tensors,
    read_config,
)
from peqa_runtime.model.base_writer import BaseWriter, staged_folder
from peqa_runtime.model.threads import one_thread

BITS = (2, 3, 4, 8)
GROUP_SIZES = (PER_CHANNEL, 16, 32, 64, 128, 256)
METHODS = ("rtn",)

# Parts of the min-max range that are tried, widest first. Measured on normal weights: the best range at 2 bits and one
# group per row is near 0.5 of min-max, at 4 bits and groups of 32 near 0.95.
_SHRINK = tuple(1.0 - 0.04 * i for i in range(18))
_REFINE = 6  # least-squares rounds after the search; each can only lower the error
_CHUNK = 1 << 19  # elements at a time: 2 MB of fp32, the second-level cache

_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
)


def quantize_rtn(weight: Tensor, bits: int, group_size: int) -> QuantizedWeight:
    """Codes of a float matrix [N, K]: asymmetric, zero points not rounded, each group's range fitted to least squares.

    `group_size` inputs share a scale and a zero (-1: the whole row) and must divide K. A group of equal values m
    becomes codes 0, scale |m|, zero -sign(m) (scale 1, zero 0 for m = 0). Raises ValueError when the weight is not
    finite.
    """
    rows, columns = weight.shape
    groups = Precision(bits, group_size).groups(columns)
    step = max(1, _CHUNK // columns)
    parts = [_fit(chunk.float().view(-1, groups, columns // groups), bits) for chunk in weight.split(step)]
    codes, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return QuantizedWeight(pack_codes(codes.view(rows, columns), bits), scales, zeros, bits, columns)


def _fit(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight [n, G, k] -> codes uint8 [n, G, k], scales [n, G], zeros [n, G]."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight holds NaN or infinity")
    top = (1 << bits) - 1
    low, high = weight.aminmax(dim=-1)
    flat = low == high
    span = torch.where(flat, torch.ones_like(low), high - low)
    scale, offset = span / top, low  # w = scale * q + offset
    best = torch.full_like(low, float("inf"))
    for part in _SHRINK:
        tried = span * (part / top)
        start = low * part
        error = (weight - _decode(_round(weight, tried, start, top), tried, start)).square().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, tried, scale), torch.where(better, start, offset)
    codes = _round(weight, scale, offset, top)
    for _ in range(_REFINE):
        scale, offset = _least_squares(weight, codes, scale, offset)
        codes = _round(weight, scale, offset, top)
    codes = torch.where(flat[..., None], torch.zeros_like(codes), codes)
    scale = torch.where(flat, torch.where(low == 0, torch.ones_like(low), low.abs()), scale)
    zero = torch.where(flat, -low.sign(), -offset / scale) + 0.0  # no negative zero
    return codes.to(torch.uint8), scale, zero


def _round(weight: Tensor, scale: Tensor, offset: Tensor, top: int) -> Tensor:
    return ((weight - offset[..., None]) / scale[..., None]).round_().clamp_(0, top)


def _decode(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return codes * scale[..., None] + offset[..., None]


def _least_squares(weight: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and offset that fit best for given codes; the old ones where all codes are equal."""
    code_mean, weight_mean = codes.mean(-1), weight.mean(-1)
    centred = codes - code_mean[..., None]
    variance = centred.square().sum(-1)
    fitted = (centred * weight).sum(-1) / variance
    usable = (variance > 0) & (fitted > 0)
    fitted = torch.where(usable, fitted, scale)
    return fitted, torch.where(usable, weight_mean - fitted * code_mean, offset)


def quantize_folder(
    source: Path | str,
    destination: Path | str,
    bits: int = 4,
    group_size: int = 64,
    method: str = "rtn",
    *,
    model_id: str | None = None,
    progress: bool = True,
) -> None:
    """Write the base folder `destination` from the Hugging Face folder `source`.

    `bits` 2, 3, 4 or 8; `group_size` -1 (one scale per row), 16, 32, 64, 128 or 256 and a divisor of every linear's
    inputs. `model_id`: name of the base (default: the folder's name). An interrupted run leaves nothing at
    `destination`, and the next one starts afresh.

    Raises `InvalidRequest` for an option that does not exist, `InvalidCheckpoint` for a folder that cannot be quantized
    or does not fit the group size (the message names the linear and the sizes that fit).
    """
    source = Path(source)
    for param, value, allowed in (
        ("bits", bits, BITS),
        ("group_size", group_size, GROUP_SIZES),
        ("method", method, METHODS),
    ):
        if value not in allowed:
            raise InvalidRequest(f"{param} must be one of {allowed}, not {value!r}", param=param)
    config = read_config(source)
    if config.get("quantization_config"):
        raise InvalidCheckpoint(
            f"{source} is quantized already ({config['quantization_config'].get('quant_method')!r}); "
            "quantize the 16-bit original"
        )
    modules, embeddings = _modules(source)
    _check_sizes(source, modules, bits, group_size)
    spec = QuantizationSpec(
        bits, group_size, model_id or source.resolve().name, embeddings=tuple(sorted(embeddings))
    )
    with one_thread(), staged_folder(Path(destination)) as folder:
        for pattern in _COPIED:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, folder / file.name)
        with BaseWriter(folder, config, spec) as writer:
            _quantize_tensors(source, writer, modules, spec, progress)


def _quantize_tensors(
    source: Path, writer: BaseWriter, modules: dict[str, int], spec: QuantizationSpec, progress: bool
) -> None:
    waiting = set(modules)
    with open_tensors(source) as handles:
        for name in tqdm(sorted(handles), f"quantize {source.name}", disable=not progress):
            tensor = handles[name].get_tensor(name)
            module = name.removesuffix(".weight")
            if module not in waiting:
                writer.add_float(name, tensor)
                continue
            try:
                weight = quantize_rtn(tensor, spec.bits, spec.group_size)
            except ValueError as error:
                raise InvalidCheckpoint(f"{source}: {name}: {error}") from error
            writer.add_codes(module, weight)
            waiting.remove(module)
    if waiting:
        raise InvalidCheckpoint(
            f"{source} holds no weight for {', '.join(sorted(waiting)[:5])}: its tensor names are not those of the "
            "model; load it with transformers and save it again (save_pretrained)"
        )


def _modules(source: Path) -> tuple[dict[str, int], set[str]]:
    """Linears to quantize with their input sizes, and the names of the embedding and the output head."""
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError) as error:
        raise InvalidCheckpoint(
            f"{source} is no causal language model that transformers knows: {error}"
        ) from error
    outside = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = {name for name, module in model.named_modules() if any(module is other for other in outside)}
    linears = {
        name: module.in_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in names
    }
    if not linears:
        raise InvalidCheckpoint(f"{type(model).__name__} has no nn.Linear to quantize")
    return linears, names


def _check_sizes(source: Path, modules: dict[str, int], bits: int, group_size: int) -> None:
    for name, in_features in modules.items():
        if in_features % 8:
            raise InvalidCheckpoint(
                f"{source}: {name} has {in_features} inputs; only multiples of 8 can be packed"
            )
        if group_size != PER_CHANNEL and in_features % group_size:
            fit = [str(g) for g in GROUP_SIZES if g == PER_CHANNEL or in_features % g == 0]
            raise InvalidCheckpoint(
                f"{source}: group size {group_size} does not divide the {in_features} inputs of {name}; "
                f"group sizes that fit it: {', '.join(fit)}"
            )
