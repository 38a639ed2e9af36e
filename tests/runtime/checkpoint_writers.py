"""Writers of other projects' checkpoint formats, made from their published layouts and not from our reader.

A tiny Llama is rounded linear by linear; what a writer stores and what the model computes are the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

Write = Callable[["Rounded"], Mapping[str, Tensor]]


@dataclass
class Rounded:
    """w = (codes - zeros) * scales by group; codes and zeros are integers, uint8 [N, K] and int64 [N, G]."""

    codes: Tensor
    scales: Tensor  # [N, G]
    zeros: Tensor
    bits: int

    @property
    def groups(self) -> int:
        return self.scales.shape[1]

    def floats(self) -> Tensor:
        codes = self.codes.float().view(len(self.codes), self.groups, -1)
        return ((codes - self.zeros[..., None]) * self.scales.float()[..., None]).flatten(1)


def round_weight(
    weight: Tensor, bits: int, group_size: int, symmetric: bool = False, dtype: torch.dtype = torch.float16
) -> Rounded:
    grouped = weight.float().view(len(weight), -1, weight.shape[1] if group_size == -1 else group_size)
    top = (1 << bits) - 1
    if symmetric:
        scales = (grouped.abs().amax(-1) * 2 / top).to(dtype)
        zeros = torch.full(scales.shape, 1 << (bits - 1))
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scales = ((high - low) / top).to(dtype)
        zeros = (-low / scales.float()).round().long().clamp(0, top)
    codes = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top)
    return Rounded(codes.flatten(1).to(torch.uint8), scales, zeros, bits)


def stream(codes: Tensor, bits: int) -> Tensor:
    """Rows [R, count] as dense streams of bits, the lowest first, in int32 words."""
    fields = (codes.numpy().astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(fields.reshape(len(codes), -1), axis=1, bitorder="little")
    packed = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(packed.view("<i4").copy())


def whole_codes(codes: Tensor, bits: int) -> Tensor:
    """Rows [R, count] with 32 // bits codes in each word."""
    per = 32 // bits
    rows = codes.numpy().astype(np.uint32)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % per))).reshape(len(rows), -1, per)
    words = np.bitwise_or.reduce(rows << (bits * np.arange(per, dtype=np.uint32)), axis=2)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def gptq(version: int) -> Write:
    """AutoGPTQ's and GPTQModel's tensors; v1 takes one from each zero, in whole words where fields lie in words."""

    def write(part: Rounded) -> dict[str, Tensor]:
        zeros = part.zeros.t()
        if version == 1 and part.bits == 3:
            qzeros = stream((zeros - 1) & 7, 3)
        else:
            qzeros = stream(zeros, part.bits)
            if version == 1:
                ones = sum(1 << shift for shift in range(0, 32, part.bits))
                qzeros = torch.from_numpy(qzeros.numpy().view(np.uint32) - np.uint32(ones)).view(torch.int32)
        size = part.codes.shape[1] // part.groups
        return {
            "qweight": stream(part.codes, part.bits).t(),
            "qzeros": qzeros,
            "scales": part.scales.t(),
            "g_idx": torch.arange(part.codes.shape[1], dtype=torch.int32) // size,
        }

    return write


def efficientqat(part: Rounded) -> dict[str, Tensor]:
    size = part.codes.shape[1] // part.groups
    return {
        "qweight": whole_codes(part.codes, part.bits).t(),
        "qzeros": whole_codes(part.zeros.t(), part.bits),
        "scales": part.scales.t(),
        "g_idx": torch.arange(part.codes.shape[1], dtype=torch.int32) // size,
    }


def awq(part: Rounded) -> dict[str, Tensor]:
    """AutoAWQ's WQLinear_GEMM.from_linear, loop by loop."""

    def pack(columns: Tensor) -> Tensor:
        values = columns.numpy().astype(np.uint32)
        words = np.zeros((len(values), values.shape[1] // 8), np.uint32)
        for column in range(words.shape[1]):
            for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                words[:, column] |= values[:, 8 * column + place] << np.uint32(4 * i)
        return torch.from_numpy(words.view(np.int32))

    return {"qweight": pack(part.codes.t()), "qzeros": pack(part.zeros.t()), "scales": part.scales.t()}


def write_checkpoint(
    folder: Path,
    model: LlamaForCausalLM,
    write: Write,
    quantization: Mapping[str, Any] | None,
    choose: Callable[[str], tuple[int, int] | None],
    *,
    symmetric: bool = False,
    dtype: torch.dtype = torch.float16,
    extra: Mapping[str, Tensor] | None = None,
    file: str = "model.safetensors",
) -> dict[str, Rounded]:
    """Write `model` as a quantized checkpoint and set its linears to what the file says.

    `choose`: bits and group size of a linear by name, None for one that stays floats. `dtype`: of the scales.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Rounded] = {}
    tensors: dict[str, Tensor] = {}
    state = model.state_dict()
    for name, value in state.items():
        module = name.removesuffix(".weight")
        chosen = choose(module) if "_proj" in name and name.endswith(".weight") else None
        if module == "lm_head" and (model.config.tie_word_embeddings or choose("lm_head")):
            chosen = choose("lm_head")
            if chosen is None:
                continue
        if chosen is None:
            tensors[name] = value.clone()
            continue
        parts[module] = round_weight(value, *chosen, symmetric=symmetric, dtype=dtype)
        value.copy_(parts[module].floats())
        tensors.update({f"{module}.{leaf}": part for leaf, part in write(parts[module]).items()})
    tensors.update(extra or {})
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / file)
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (folder / "config.json").write_text(json.dumps(config))
    return parts


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a written checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")


def edit_config(folder: Path, **quantization: Any) -> None:
    """Change keys of quantization_config; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    values = {**config.get("quantization_config", {}), **quantization}
    config["quantization_config"] = {key: value for key, value in values.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
