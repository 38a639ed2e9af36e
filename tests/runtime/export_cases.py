"""Bases with whole zeros, random sets, and what a merged model must hold and answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from peqa_kernels.packing import unpack_codes
from peqa_runtime.core import ScaleKind
from peqa_runtime.engine.engine import Engine
from peqa_runtime.model import quantize_folder, read_manifest
from peqa_runtime.model.base_checkpoint import compute_digest, open_tensors, read_spec
from peqa_runtime.model.quantize import QuantizeOptions
from peqa_runtime.model.quantizers.plan import Rule
from peqa_runtime.sampling_params import SamplingParams
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.set_layout import expected_shapes

DOWN = "model.layers.1.mlp.down_proj"
TOKENS = 12
PROMPTS = ["the cat and", "over there", "ran into another house, then", "dog"]


def integer_base(source: Path, folder: Path, bits: int = 4, group_size: int = 32, *rules: Rule) -> Path:
    options = QuantizeOptions(integer_zeros=True, rules=rules)
    quantize_folder(source, folder, bits, group_size, options=options, progress=False)
    return folder


def random_set(base: Path, kind: ScaleKind, file: Path) -> Path:
    generator = torch.Generator().manual_seed(5)
    manifest = read_manifest(base)
    tensors = {
        name: 1 + 0.4 * torch.rand(shape, generator=generator)
        for name, shape in expected_shapes(kind, manifest).items()
    }
    ScaleSet.build(kind, tensors, manifest, task="sql").save(file)
    return file


def merged_weights(base: Path, scale_set: Path | None) -> dict[str, Tensor]:
    """By the definition: w = out * s0 * group * (q - z) * in, in double precision."""
    manifest, spec = read_manifest(base), read_spec(base)
    factors = {} if scale_set is None else ScaleSet.parse(scale_set, manifest).tensors
    weights: dict[str, Tensor] = {}
    with open_tensors(base) as handles:
        for name in manifest.linears:
            q, s, z = (
                handles[f"{name}.{n}"].get_tensor(f"{name}.{n}") for n in ("qweight", "scales", "zeros")
            )
            bits = spec.of(name).bits
            codes = unpack_codes(q, bits, q.shape[1] * 8 // bits).double().view(*s.shape, -1)
            scale = s.double()
            if f"{name}.group_scale" in factors:
                scale = scale * factors[f"{name}.group_scale"].double()
            weight = ((codes - z.double()[..., None]) * scale[..., None]).flatten(1)
            if f"{name}.out_scale" in factors:
                weight = weight * factors[f"{name}.out_scale"].double()[:, None]
            if f"{name}.in_scale" in factors:
                weight = weight * factors[f"{name}.in_scale"].double()
            weights[name] = weight
    return weights


def greedy_gap(model: PreTrainedModel, base: Path, task: Path | str) -> None:
    """The engine's greedy tokens are the model's in transformers; where they part, its logits all but tie."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    equal = 0
    with Engine(base) as engine:
        answers = engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=TOKENS), task=task)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = tokenizer(prompt).input_ids
        for token in answer.token_ids:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            assert logits[token] >= logits.max() - 2e-3 * logits.abs().max(), (prompt, token)
            equal += int(logits.argmax()) == token
            ids.append(token)
    assert equal >= 0.95 * sum(len(answer.token_ids) for answer in answers)
    assert len({token for answer in answers for token in answer.token_ids}) > 5, "the check says something"


def published(tensors: dict[str, Tensor], module: str, bits: int, add: int) -> Tensor:
    """The GPTQ formula word by word, in numpy: (code - zero - add) * scale of the input's group."""

    def fields(words: np.ndarray) -> np.ndarray:
        """uint32 [R, W] -> [R, W * 32 / bits], bit by bit."""
        raw = np.unpackbits(words.view(np.uint8).reshape(len(words), -1), axis=1, bitorder="little")
        return (raw.reshape(len(words), -1, bits) << np.arange(bits)).sum(-1)

    qweight = tensors[f"{module}.qweight"].numpy().view(np.uint32)
    codes = fields(np.ascontiguousarray(qweight.T)).T
    zeros = fields(tensors[f"{module}.qzeros"].numpy().view(np.uint32)) + add
    group = tensors[f"{module}.g_idx"].numpy()
    scales = tensors[f"{module}.scales"].float().numpy()
    return torch.from_numpy(((codes - zeros[group]) * scales[group]).T.astype(np.float32))


def edit_base(base: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change tensors of a base, and its digest with them."""
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["base_digest"] = compute_digest(base)
    (base / "config.json").write_text(json.dumps(config))


def middle_zeros(tensors: dict[str, Tensor]) -> None:
    """Make a base symmetric: every zero 8."""
    for name, tensor in tensors.items():
        if name.endswith(".zeros"):
            tensor.fill_(8)
