"""A tiny base for the tests of tuning: two layers, 4-bit codes in groups of 32, a tokenizer of single bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peqa_runtime.model.base_checkpoint import BaseWriter, QuantizationSpec, staged_folder

END = "<end>"
GROUP = 32


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {END: 0}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def write_base(folder: Path) -> Path:
    """A random model of 4-bit codes; the same on every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    spec = QuantizationSpec(
        bits=4,
        group_size=GROUP,
        model_id="tiny",
        modules_to_not_convert=("lm_head",),
        embeddings=("model.embed_tokens", "lm_head"),
    )
    with staged_folder(folder) as staging:
        byte_tokenizer().save_pretrained(staging)
        values = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
        with BaseWriter(staging, values, spec) as writer:
            for name, tensor in model.state_dict().items():
                if "_proj" in name:
                    grouped = tensor.view(tensor.shape[0], -1, GROUP)
                    low, high = grouped.amin(-1), grouped.amax(-1)
                    scales = (high - low) / 15
                    zeros = -low / scales
                    codes = (grouped / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
                    writer.add_codes(
                        name.removesuffix(".weight"), codes.to(torch.uint8).view_as(tensor), scales, zeros, 4
                    )
                elif name != "lm_head.weight":
                    writer.add_float(name, tensor)
    return folder


@pytest.fixture(scope="session")
def tuning_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny base. Nobody writes into it."""
    return write_base(tmp_path_factory.mktemp("tuning") / "base")
