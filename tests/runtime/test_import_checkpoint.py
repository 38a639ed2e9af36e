"""Imports of GPTQ, AWQ and EfficientQAT checkpoints: every number kept, the model that comes out, files that lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from checkpoint_writers import (
    Rounded,
    Write,
    awq,
    edit_config,
    edit_tensors,
    efficientqat,
    gptq,
    write_checkpoint,
)
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peqa_kernels.packing import unpack_codes
from peqa_kernels.quant_matmul import dequantize
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model import import_checkpoint, read_manifest, verify_digest
from peqa_runtime.model.base_checkpoint import PER_CHANNEL, Precision, open_tensors, read_spec
from peqa_runtime.model.importers.awq import awq_layout
from peqa_runtime.model.importers.coded_linear import CodedLinear, Layout
from peqa_runtime.model.importers.gptq import EFFICIENT_QAT, gptq_layout

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
GPTQ_V2 = {**GPTQ, "checkpoint_format": "gptq_v2"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
WRITERS: Mapping[str, Write] = {
    "gptq": gptq(1),
    "gptq_v2": gptq(2),
    "awq": awq,
    "efficientqat": efficientqat,
}
DOWN = "model.layers.0.mlp.down_proj"


def tiny(tie: bool = False, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tie,
        attention_bias=bias,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if name.endswith(".bias"):
            value.normal_()
    return model


def all_in(bits: int, group_size: int) -> Callable[[str], tuple[int, int] | None]:
    return lambda name: None if name == "lm_head" else (bits, group_size)


def check_import(folder: Path, base: Path, model: LlamaForCausalLM, parts: Mapping[str, Rounded]) -> None:
    """Codes, scales and zeros equal; logits those of the model that the file describes."""
    verify_digest(base)
    spec = read_spec(base)
    with open_tensors(base) as handles:
        coded = {name.removesuffix(".qweight") for name in handles if name.endswith(".qweight")}
        assert coded == parts.keys()
        for name, part in parts.items():
            qweight, scales, zeros = (
                handles[f"{name}.{leaf}"].get_tensor(f"{name}.{leaf}")
                for leaf in ("qweight", "scales", "zeros")
            )
            assert spec.of(name).bits == part.bits
            assert torch.equal(unpack_codes(qweight, part.bits, part.codes.shape[1]), part.codes), name
            assert torch.equal(scales, part.scales.float()), name
            assert torch.equal(zeros, part.zeros.float()), name
    ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(found, model(ids).logits, atol=4e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("write", "config", "bits", "group_size", "options"),
    [
        *((gptq(1), GPTQ, bits, 32, {}) for bits in (2, 3, 4, 8)),
        *((gptq(2), GPTQ_V2, bits, 32, {}) for bits in (2, 3, 4, 8)),
        (gptq(1), GPTQ, 4, -1, {"symmetric": True}),
        (gptq(2), GPTQ_V2, 4, 16, {"dtype": torch.bfloat16}),
        (awq, AWQ, 4, 32, {}),
        (awq, AWQ, 4, -1, {}),
    ],
    ids=[
        *(f"gptq-{bits}" for bits in (2, 3, 4, 8)),
        *(f"gptq_v2-{bits}" for bits in (2, 3, 4, 8)),
        "gptq-channel-sym",
        "gptq_v2-bf16",
        "awq",
        "awq-channel",
    ],
)
def test_every_number_is_kept(
    tmp_path: Path, write: Write, config: Mapping, bits: int, group_size: int, options: dict
) -> None:
    model = tiny(bias=bits == 4)
    parts = write_checkpoint(
        tmp_path / "src", model, write, {**config, "bits": bits}, all_in(bits, group_size), **options
    )
    kind = import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False)
    assert kind == config.get("checkpoint_format", config["quant_method"])
    check_import(tmp_path / "src", tmp_path / "base", model, parts)
    precision = read_spec(tmp_path / "base").of(DOWN)
    assert precision == Precision(bits, PER_CHANNEL if group_size == -1 else group_size)


def library_layout(name: str) -> Layout:
    kind, _, bits = name.partition("-")
    if kind == "awq":
        return awq_layout({})
    if kind == "efficientqat":
        return EFFICIENT_QAT
    return gptq_layout({"bits": int(bits), "checkpoint_format": kind})


@pytest.mark.parametrize(
    "name",
    [
        *(f"{kind}-{bits}" for kind in ("gptq", "gptq_v2") for bits in (2, 3, 4, 8)),
        *(f"efficientqat-{bits}" for bits in (2, 3, 4)),
        "awq-4",
    ],
)
def test_what_the_libraries_packed(name: str) -> None:
    """One linear [32, 64], packed by GPTQModel, AutoAWQ and EfficientQAT; `reference`: what it decodes to, in fp16.

    Packed again by the writers of the whole checkpoints here, its numbers are the libraries' bytes.
    """
    file = Path(__file__).with_name("written_by_others.safetensors")
    with safe_open(file, framework="pt") as tensors:
        linear = CodedLinear(name, 32, 64, dict.fromkeys(tensors.keys(), tensors))
        weight = library_layout(name).read(linear)
        assert weight.bits == int(name[-1])
        assert weight.group_size == 32
        assert torch.equal(dequantize(weight).half(), linear.tensor("reference"))
        codes = unpack_codes(weight.qweight, weight.bits, 64)
        part = Rounded(codes, weight.scales.half(), weight.zeros.long(), weight.bits)
        for leaf, packed in WRITERS[name.partition("-")[0]](part).items():
            assert torch.equal(packed, linear.tensor(leaf)), leaf


def test_v1_stores_the_middle_of_four_bits_as_seven(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "src", tiny(), gptq(1), GPTQ, all_in(4, 32), symmetric=True)
    edit_tensors(tmp_path / "src", lambda t: t[f"{DOWN}.qzeros"].fill_(0x77777777))
    import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False)
    with open_tensors(tmp_path / "base") as handles:
        assert (handles[f"{DOWN}.zeros"].get_tensor(f"{DOWN}.zeros") == 8).all()


def test_zeros_of_v1_that_borrow(tmp_path: Path) -> None:
    model = tiny()
    weight = model.get_submodule(DOWN).weight
    weight[::3].abs_()
    weight[1::3].abs_().neg_()
    parts = write_checkpoint(tmp_path / "src", model, gptq(1), GPTQ, all_in(4, 32))
    assert {0, 15} <= set(parts[DOWN].zeros.flatten().tolist())
    import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False)
    check_import(tmp_path / "src", tmp_path / "base", model, parts)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_efficientqat_is_taken_at_the_users_word(tmp_path: Path, bits: int) -> None:
    model = tiny()
    parts = write_checkpoint(tmp_path / "src", model, efficientqat, None, all_in(bits, 32))
    with pytest.raises(InvalidCheckpoint, match=r"nothing says how zeros are stored.*--format efficientqat"):
        import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False)
    import_checkpoint(tmp_path / "src", tmp_path / "base", format="efficientqat", progress=False)
    check_import(tmp_path / "src", tmp_path / "base", model, parts)


def test_mixed_precision_keeps_floats_and_bits_apart(tmp_path: Path) -> None:
    """GPTQModel's `dynamic` rules, a quantized output head, and a layer that was left out."""

    def choose(name: str) -> tuple[int, int] | None:
        if name.endswith(("o_proj",)):
            return None
        return (8, 16) if name in (DOWN, "lm_head") else (4, 32)

    model = tiny()
    config = {**GPTQ_V2, "dynamic": {"+:.*down_proj": {"bits": 8, "group_size": 16}}, "lm_head": True}
    parts = write_checkpoint(tmp_path / "src", model, gptq(2), config, choose)
    assert "lm_head" in parts
    import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False)
    check_import(tmp_path / "src", tmp_path / "base", model, parts)
    spec = read_spec(tmp_path / "base")
    assert spec.modules_to_not_convert == ("model.layers.0.self_attn.o_proj",)
    assert spec.of(DOWN) == Precision(8, 16)
    assert "lm_head" not in read_manifest(tmp_path / "base").linears


def test_autogptqs_own_files(tmp_path: Path) -> None:
    """quantize_config.json, one file of another name, zero biases of linears without any, tables of positions."""
    model = tiny(tie=True)
    extra: dict[str, Tensor] = {
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(64, dtype=torch.float16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    parts = write_checkpoint(
        tmp_path / "src",
        model,
        gptq(1),
        None,
        lambda name: None if name == "lm_head" else (4, 32),
        extra=extra,
        file="gptq_model-4bit-32g.safetensors",
    )
    (tmp_path / "src" / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False)
    check_import(tmp_path / "src", tmp_path / "base", model, parts)


def permute_groups(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.g_idx"] = tensors[f"{DOWN}.g_idx"].flip(0)


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (permute_groups, "g_idx is permuted .desc_act.*quantize --method gptq"),
        (
            put("model.norm.weight", torch.ones(63)),
            r"norm.weight' has shape \[63\], LlamaForCausalLM needs \[64\]",
        ),
        (drop(f"{DOWN}.qzeros"), "incomplete: .*down_proj.qzeros is missing"),
        (drop("model.norm.weight"), "incomplete: no tensor for model.norm.weight"),
        (drop(f"{DOWN}.qweight"), "no place for tensor"),
        (put(f"{DOWN}.scales", torch.full((3, 64), float("nan"))), "NaN or infinity"),
        (put("model.norm.weight", torch.full((64,), float("inf"))), "NaN or infinity"),
        (put(f"{DOWN}.scales", torch.ones(5, 64)), "5 groups do not divide 96 inputs"),
        (put(f"{DOWN}.scales", torch.ones(3, 63)), r"scales must be floats \[3, 64\]"),
        (put(f"{DOWN}.scales", torch.ones(())), "0 groups"),
        (put(f"{DOWN}.qweight", torch.ones(11, 64, dtype=torch.int32)), "does not hold 96 inputs of 4 bits"),
        (put(f"{DOWN}.qweight", torch.ones(12, 64, dtype=torch.int64)), "must be I32"),
        (put(f"{DOWN}.bias", torch.ones(64)), "no place for tensor .*down_proj.bias"),
        (
            put("model.extra.qweight", torch.ones(8, 8, dtype=torch.int32)),
            "codes for model.extra, which is no module",
        ),
        (put("model.embed_tokens.qweight", torch.ones(8, 8, dtype=torch.int32)), "which is a Embedding"),
    ],
)
def test_damaged_checkpoints_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], sentence: str
) -> None:
    write_checkpoint(tmp_path / "src", tiny(), gptq(1), GPTQ, all_in(4, 32))
    edit_tensors(tmp_path / "src", change)
    with pytest.raises(InvalidCheckpoint, match=sentence):
        import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False)
    assert not (tmp_path / "base").exists()
    assert not list(tmp_path.glob("base.tmp*"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes', which cannot be imported; what can: GPTQ"),
        ({"checkpoint_format": "marlin"}, "format 'marlin' cannot be imported"),
        ({"checkpoint_format": "gptq_p"}, "format 'gptq_p'"),
        ({"is_marlin_format": True}, "format 'marlin'"),
        ({"bits": 5}, "of 5 bits cannot be imported"),
        ({"bits": "four"}, "of 'four' bits"),
        ({"bits": 8}, "does not hold 96 inputs of 8 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv' cannot be imported; 'gemm' can"),
        ({"quant_method": "awq", "bits": 3}, "AWQ checkpoints of 3 bits"),
        ({"quant_method": "awq"}, r"qweight must be I32 \[96, 8\]"),
        ({"quant_method": "peqa"}, "is a base already"),
    ],
)
def test_what_a_config_may_not_say(tmp_path: Path, changes: dict, sentence: str) -> None:
    write_checkpoint(tmp_path / "src", tiny(), gptq(1), GPTQ, all_in(4, 32))
    edit_config(tmp_path / "src", **changes)
    with pytest.raises(InvalidCheckpoint, match=sentence):
        import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False)


def test_desc_act_in_name_only(tmp_path: Path) -> None:
    """With a g_idx in order it changes nothing; without g_idx nobody can tell."""
    model = tiny()
    config = {**GPTQ, "desc_act": True}
    parts = write_checkpoint(tmp_path / "src", model, gptq(1), config, all_in(4, 32))
    import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False)
    check_import(tmp_path / "src", tmp_path / "base", model, parts)
    edit_tensors(tmp_path / "src", drop(f"{DOWN}.g_idx"))
    with pytest.raises(InvalidCheckpoint, match="says desc_act, and there is no g_idx"):
        import_checkpoint(tmp_path / "src", tmp_path / "other", progress=False)


def test_what_is_stated_may_not_contradict_the_config(tmp_path: Path) -> None:
    """A config without checkpoint_format may be version 2 all the same: some that convert files do not say it."""
    for name, config, sentence in (
        ("v2", GPTQ_V2, "is of format 'gptq_v2', not 'gptq'"),
        ("awq", AWQ, "is 'awq', not 'gptq'"),
    ):
        write_checkpoint(tmp_path / name, tiny(), gptq(2), config, all_in(4, 32))
        with pytest.raises(InvalidCheckpoint, match=sentence):
            import_checkpoint(tmp_path / name, tmp_path / "base", format="gptq", progress=False)
    model = tiny()
    parts = write_checkpoint(tmp_path / "mute", model, gptq(2), GPTQ, all_in(4, 32))
    import_checkpoint(tmp_path / "mute", tmp_path / "base", format="gptq_v2", progress=False)
    check_import(tmp_path / "mute", tmp_path / "base", model, parts)


def test_folders_that_are_no_checkpoint(tmp_path: Path, tiny_hf_folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        tmp_path / "nowhere": "is no folder",
        tiny_hf_folder: "is not quantized; `peqa quantize`",
        empty: "holds no .safetensors file",
    }
    for folder, sentence in cases.items():
        with pytest.raises(InvalidCheckpoint, match=sentence):
            import_checkpoint(folder, tmp_path / "base", progress=False)
    (empty / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InvalidCheckpoint, match=r"pytorch_model.bin, a pickle, which can run code"):
        import_checkpoint(empty, tmp_path / "base", progress=False)
    for name in ("a.safetensors", "b.safetensors"):
        (empty / name).write_bytes(b"")
    with pytest.raises(InvalidCheckpoint, match=r"2 safetensors files and no model.safetensors.index.json"):
        import_checkpoint(empty, tmp_path / "base", progress=False)
    (empty / "b.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"a.safetensors is damaged"):
        import_checkpoint(empty, tmp_path / "base", progress=False)
    with pytest.raises(InvalidCheckpoint, match="format must be one of gptq"):
        import_checkpoint(tiny_hf_folder, tmp_path / "base", format="awq", progress=False)
