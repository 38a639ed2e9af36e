"""A base folder of any size with random codes, for speed alone: a model that nobody has to download."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from peqa_kernels.packing import packed_width
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.model.base_checkpoint import PER_CHANNEL, QuantizationSpec
from peqa_runtime.model.base_writer import BaseWriter, staged_folder

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "generation_config.json")
BITS = 4
SPREAD = 0.02  # standard deviation of the weights, as trained models begin with


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama; the defaults are those of the 7B one."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    vocab: int = 49152  # that of the tokenizer it borrows, half again as large as the 7B's own

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each linear of a layer."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }


def write_random_base(folder: Path, shape: LlamaShape, tokenizer_of: Path, seed: int = 0) -> None:
    """Write a 4-bit base, one scale per output, with the tokenizer of another base.

    Raises `InvalidCheckpoint` when `folder` exists and is not empty.
    """
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    spec = QuantizationSpec(
        BITS,
        PER_CHANNEL,
        "random-llama",
        embeddings=("model.embed_tokens", "lm_head"),
        modules_to_not_convert=("lm_head",),
    )
    draw = torch.Generator().manual_seed(seed)
    with staged_folder(folder) as staging:
        for pattern in TOKENIZER_FILES:
            for file in tokenizer_of.glob(pattern):
                shutil.copyfile(file, staging / file.name)
        with BaseWriter(staging, config.to_dict(), spec) as writer:
            writer.add_float("model.embed_tokens.weight", _floats(shape.vocab, shape.hidden, draw))
            for layer in range(shape.layers):
                where = f"model.layers.{layer}"
                for name, (n, k) in shape.linears.items():
                    writer.add_codes(f"{where}.{name}", _codes(n, k, draw))
                for name in ("input_layernorm", "post_attention_layernorm"):
                    writer.add_float(f"{where}.{name}.weight", torch.ones(shape.hidden, dtype=torch.bfloat16))
            writer.add_float("model.norm.weight", torch.ones(shape.hidden, dtype=torch.bfloat16))
            writer.add_float("lm_head.weight", _floats(shape.vocab, shape.hidden, draw))


def _floats(n: int, k: int, draw: torch.Generator) -> Tensor:
    return (torch.randn(n, k, generator=draw) * SPREAD).bfloat16()


def _codes(n: int, k: int, draw: torch.Generator) -> QuantizedWeight:
    packed = torch.randint(0, 256, (n, packed_width(k, BITS)), dtype=torch.uint8, generator=draw)
    uniform = (4**BITS - 1) / 12  # variance of codes that are all equally likely
    scales = torch.full((n, 1), SPREAD / uniform**0.5) * (0.9 + 0.2 * torch.rand(n, 1, generator=draw))
    return QuantizedWeight(packed, scales, torch.full((n, 1), float(1 << (BITS - 1))), BITS, k)
