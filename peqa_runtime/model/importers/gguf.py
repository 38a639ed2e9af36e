"""GGUF (Q4_0, Q4_1, Q8_0) -> base folder, every code kept bit for bit. Architecture "llama" (and what shares it).

A block of 32 weights is a group: w = d * q + m becomes scale s = d and zero z = -m / d, a fraction that is kept as a
float. A block with d = 0 (all weights equal m) becomes codes 0, s = |m|, z = -sign(m), and s = 1, z = 0 for m = 0.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig

from peqa_kernels.packing import pack_codes
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model.base_checkpoint import Precision, QuantizationSpec
from peqa_runtime.model.base_writer import BaseWriter, staged_folder
from peqa_runtime.model.importers.gguf_file import BLOCK, Blocks, GgufFile, GgufTensor, metadata_value
from peqa_runtime.model.importers.gguf_tokenizer import build_tokenizer
from peqa_runtime.model.threads import one_thread

_BLOCK_TYPES = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_EMBEDDINGS = ("model.embed_tokens", "lm_head")
_SUFFIX = re.compile(r"[.-](I?Q\d\w*|F16|F32|BF16)$", re.IGNORECASE)


def import_gguf(
    source: Path | str,
    destination: Path | str,
    *,
    model_id: str | None = None,
    tokenizer_from: Path | str | None = None,
    progress: bool = True,
) -> None:
    """Write the base folder `destination` from the GGUF file `source`; nothing is re-quantized.

    `model_id`: name of the base (default: the file's name without its type). `tokenizer_from`: a Hugging Face folder
    whose tokenizer is used instead of the file's. An interrupted run leaves nothing at `destination`, and the next one
    starts afresh. Raises `InvalidCheckpoint` for a damaged file or one that holds what cannot be imported.
    """
    source, destination = Path(source), Path(destination)
    with one_thread(), GgufFile(source) as file:
        config = llama_config(file.metadata, {name: t.shape for name, t in file.tensors.items()})
        names = _hf_names(file, config)
        if tokenizer_from is None:
            tokenizer = build_tokenizer(file.metadata, config.max_position_embeddings)
        else:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
        if len(tokenizer) > config.vocab_size:
            raise InvalidCheckpoint(
                f"the tokenizer has {len(tokenizer)} tokens, the embedding of {source} only {config.vocab_size}"
            )
        spec = _spec(file, names, model_id or _SUFFIX.sub("", source.stem))
        with staged_folder(destination) as folder:
            tokenizer.save_pretrained(folder)
            with BaseWriter(folder, _config_json(config, tokenizer), spec) as writer:
                for tensor in tqdm(file.tensors.values(), f"import {source.name}", disable=not progress):
                    _write(file, tensor, names[tensor.name], config, writer)


def llama_config(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> LlamaConfig:
    """The transformers config of a llama-architecture GGUF.

    Raises `InvalidCheckpoint` for another architecture or a variant that `LlamaForCausalLM` would compute wrongly.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InvalidCheckpoint(
            f"GGUF architecture {architecture!r} cannot be imported ('llama' can); quantize the model's original "
            "Hugging Face folder with `peqa quantize`"
        )

    def integer(key: str, default: int | None = None) -> int:
        return metadata_value(
            metadata,
            f"llama.{key}",
            lambda v: type(v) is int and 0 < v < 1 << 31,
            "a positive integer",
            default,
        )

    def number(key: str, default: float | None = None) -> float:
        return metadata_value(
            metadata,
            f"llama.{key}",
            lambda v: type(v) is float and 0 < v < 1e12,
            "a positive number",
            default,
        )

    if metadata.get("llama.expert_count"):
        raise InvalidCheckpoint("GGUF mixture-of-experts models cannot be imported")
    heads, hidden = integer("attention.head_count"), integer("embedding_length")
    head_dim = integer("attention.key_length", hidden // heads)
    if integer("rope.dimension_count", head_dim) != head_dim:
        raise InvalidCheckpoint("GGUF models that rotate only a part of each head cannot be imported")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": number("rope.freq_base", 10000.0)}
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling == "linear":
        rope.update(rope_type="linear", factor=number("rope.scaling.factor"))
    elif scaling != "none" or "rope_freqs.weight" in shapes:
        name = "llama3 (rope_freqs.weight)" if scaling == "none" else scaling
        raise InvalidCheckpoint(
            f"GGUF rope scaling {name!r} cannot be imported (none and linear can); quantize the model's original "
            "Hugging Face folder with `peqa quantize`"
        )
    if len(shapes.get("token_embd.weight", ())) != 2:
        raise InvalidCheckpoint("GGUF file has no token_embd.weight matrix")
    return LlamaConfig(
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=hidden,
        intermediate_size=integer("feed_forward_length"),
        num_hidden_layers=integer("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=integer("context_length"),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_parameters=rope,
        attention_bias="blk.0.attn_q.bias" in shapes,
        mlp_bias="blk.0.ffn_down.bias" in shapes,
        tie_word_embeddings="output.weight" not in shapes,
    )


def _config_json(config: LlamaConfig, tokenizer: Any) -> dict[str, Any]:
    value = config.to_dict()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value[key] = getattr(tokenizer, key)
    value.update(architectures=["LlamaForCausalLM"], dtype="float32")
    value.pop("_name_or_path", None)
    return value


def _hf_names(file: GgufFile, config: LlamaConfig) -> dict[str, str]:
    """GGUF tensor name -> parameter name, after checking that exactly the model's tensors are there, in shape."""
    expected = _expected_shapes(config)
    names: dict[str, str] = {}
    for tensor in file.tensors.values():
        stem, _, leaf = tensor.name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if layer and layer[2] in _PARTS:
            module: str | None = f"model.layers.{layer[1]}.{_PARTS[layer[2]]}"
        else:
            module = _TOP.get(stem)
        name = f"{module}.{leaf}"
        if module is None or name not in expected:
            raise InvalidCheckpoint(f"{file.path}: tensor {tensor.name!r} does not belong to a llama model")
        if tensor.shape != expected[name]:
            raise InvalidCheckpoint(
                f"{file.path}: tensor {tensor.name!r} must have shape {expected[name]}, not {tensor.shape}"
            )
        names[tensor.name] = name
    missing = sorted(expected.keys() - names.values())
    if missing:
        raise InvalidCheckpoint(f"{file.path} is incomplete: no tensor for {', '.join(missing[:5])}")
    return names


def _expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        expected["lm_head.weight"] = (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        for name, shape in linears.items():
            expected[f"model.layers.{i}.{name}.weight"] = shape
            if config.mlp_bias if name.startswith("mlp") else config.attention_bias:
                expected[f"model.layers.{i}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            expected[f"model.layers.{i}.{name}.weight"] = (hidden,)
    return expected


def _spec(file: GgufFile, names: dict[str, str], model_id: str) -> QuantizationSpec:
    """The commonest block type of the linears is the default; other modules are overrides or stay floats."""
    types = {
        names[t.name].removesuffix(".weight"): t.type for t in file.tensors.values() if len(t.shape) == 2
    }
    bits = [_BLOCK_TYPES[t] for name, t in types.items() if t in _BLOCK_TYPES and name not in _EMBEDDINGS]
    if not bits:
        raise InvalidCheckpoint(
            f"{file.path} holds no Q4_0, Q4_1 or Q8_0 linear; quantize the model with `peqa quantize`"
        )
    default = Precision(max(set(bits), key=bits.count), BLOCK)
    overrides: dict[str, Precision] = {}
    floats: list[str] = []
    for name, kind in types.items():
        if kind not in _BLOCK_TYPES:
            floats.append(name)
        elif name in _EMBEDDINGS or _BLOCK_TYPES[kind] != default.bits:
            overrides[name] = Precision(_BLOCK_TYPES[kind], BLOCK)
    return QuantizationSpec(
        default.bits,
        default.group_size,
        model_id,
        overrides=overrides,
        modules_to_not_convert=tuple(floats),
        embeddings=_EMBEDDINGS,
    )


def _write(file: GgufFile, tensor: GgufTensor, name: str, config: LlamaConfig, writer: BaseWriter) -> None:
    order = _row_order(name, config)
    if tensor.type in _BLOCK_TYPES:
        if len(tensor.shape) != 2:
            raise InvalidCheckpoint(f"{file.path}: {tensor.name!r} must be floats, not {tensor.type}")
        weight = to_weight(file.blocks(tensor.name), f"{file.path}: tensor {tensor.name!r}", order)
        writer.add_codes(name.removesuffix(".weight"), weight)
    else:
        values = torch.from_numpy(file.floats(tensor.name))
        if not bool(torch.isfinite(values).all()):
            raise InvalidCheckpoint(f"{file.path}: tensor {tensor.name!r} holds NaN or infinity")
        writer.add_float(name, values if order is None else values[order])


def to_weight(blocks: Blocks, where: str, order: Tensor | None = None) -> QuantizedWeight:
    """Codes, scales and zeros in our form, rows in `order`; see the module's docstring for blocks whose step is 0.

    Raises `InvalidCheckpoint` when a block constant is not finite; `where` names the tensor.
    """
    offset = blocks.m if blocks.m is not None else np.zeros_like(blocks.d)
    if not (np.isfinite(blocks.d).all() and np.isfinite(offset).all()):
        raise InvalidCheckpoint(f"{where} holds NaN or infinity in its block scales")
    flat = blocks.d == 0
    step = np.where(flat, 1.0, blocks.d).astype(np.float32)
    zeros = np.full_like(step, blocks.zero) if blocks.m is None else -offset / step
    scales = np.where(flat & (offset != 0), np.abs(offset), step)
    zeros = np.where(flat, -np.sign(offset), zeros) + np.float32(0)  # no negative zero
    codes = blocks.codes
    if flat.any():
        codes = np.where(np.repeat(flat, BLOCK, axis=1), np.uint8(0), codes)
    parts = [torch.from_numpy(part) for part in (codes, scales, zeros)]
    codes_, scales_, zeros_ = parts if order is None else [part[order] for part in parts]
    return QuantizedWeight(pack_codes(codes_, blocks.bits), scales_, zeros_, blocks.bits, codes.shape[1])


def _row_order(name: str, config: LlamaConfig) -> Tensor | None:
    """Rows of q and k in the order of `LlamaForCausalLM`, whose rotary pairs are halves: GGUF interleaves them."""
    if ".q_proj." in name:
        heads = config.num_attention_heads
    elif ".k_proj." in name:
        heads = config.num_key_value_heads
    else:
        return None
    rows = torch.arange(heads * config.head_dim).view(heads, config.head_dim // 2, 2)
    return rows.transpose(1, 2).reshape(-1)
