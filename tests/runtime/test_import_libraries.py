"""Imports of files that compressed-tensors and hqq wrote themselves, compared with their own load."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_writers import edit_config, edit_tensors, whole_codes
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from peqa_kernels.packing import unpack_codes
from peqa_kernels.quant_matmul import dequantize
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model import import_checkpoint, verify_digest
from peqa_runtime.model.base_checkpoint import PER_CHANNEL, Precision, open_tensors, read_spec

DOWN = "model.layers.0.mlp.down_proj"
HIDDEN, INNER, VOCAB = 64, 96, 96


def tiny(bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        attention_bias=bias,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if name.endswith(".bias"):
            value.normal_()
    return model


def linears(model: nn.Module, skip: tuple[str, ...] = ("lm_head",)) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith(skip)}


def save(folder: Path, model: LlamaForCausalLM, tensors: dict[str, Tensor], quantization: Any) -> None:
    """The model's floats, but for the linears that `tensors` has, and config.json."""
    coded = {name.rpartition(".")[0] for name in tensors}
    floats = {
        name: value
        for name, value in model.state_dict().items()
        if name.rpartition(".")[0] not in coded or name.endswith(".bias")
    }
    folder.mkdir(parents=True, exist_ok=True)
    everything = {name: value.clone().contiguous() for name, value in {**floats, **tensors}.items()}
    save_file(everything, folder / "model.safetensors")
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).logits


def decoded(base: Path, module: str) -> Tensor:
    with open_tensors(base) as handles:
        parts = [handles[f"{module}.{n}"].get_tensor(f"{module}.{n}") for n in ("qweight", "scales", "zeros")]
    bits = read_spec(base).of(module).bits
    return dequantize(QuantizedWeight(*parts, bits, parts[0].shape[1] * 8 // bits))


def write_compressed(
    folder: Path, model: LlamaForCausalLM, **weights: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """What compressed-tensors' own compressor makes; returns scales and zeros of each linear."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    assert scheme.weights is not None
    made: dict[str, tuple[Tensor, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for name, linear in linears(model, ("lm_head", "o_proj")).items():
        weight = linear.weight.detach()
        size = weights.get("group_size") or weight.shape[1]
        grouped = weight.view(len(weight), -1, size)
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
        made[name] = (scale, zero)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        packed = PackedQuantizationCompressor.compress(state, scheme)
        tensors.update({f"{name}.{leaf}": value for leaf, value in packed.items() if value is not None})
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head", "re:.*o_proj"],
    )
    save(folder, model, tensors, json.loads(config.model_dump_json()))
    return made


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("bits", "weights"),
    [
        (4, {"strategy": "group", "group_size": 32}),
        (8, {"strategy": "group", "group_size": 16}),
        (3, {"strategy": "channel"}),
        (2, {"strategy": "group", "group_size": 32}),
        (4, {"strategy": "channel"}),
    ],
    ids=["4-group", "8-group", "3-channel", "2-group", "4-channel"],
)
def test_compressed_tensors_own_files(tmp_path: Path, bits: int, weights: dict, symmetric: bool) -> None:
    model = tiny(bias=symmetric)
    made = write_compressed(tmp_path / "src", model, num_bits=bits, symmetric=symmetric, **weights)
    assert import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False).startswith("compressed")
    verify_digest(tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "src", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    with open_tensors(tmp_path / "base") as handles:
        for name, (scale, zero) in made.items():
            assert torch.equal(handles[f"{name}.scales"].get_tensor(f"{name}.scales"), scale.float())
            zeros = handles[f"{name}.zeros"].get_tensor(f"{name}.zeros")
            assert torch.equal(zeros, zero.float() + (1 << (bits - 1)))
            assert torch.equal(decoded(tmp_path / "base", name), theirs.get_submodule(name).weight)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32))
    torch.testing.assert_close(found, logits(theirs), atol=4e-3, rtol=1e-3)
    spec = read_spec(tmp_path / "base")
    assert spec.of(DOWN) == Precision(bits, weights.get("group_size", PER_CHANNEL))
    assert spec.modules_to_not_convert == ("model.layers.0.self_attn.o_proj",)


def test_words_and_zeros_of_earlier_compressed_tensors(tmp_path: Path) -> None:
    """Ten codes of 3 bits in a word, and zeros as int8."""
    made = write_compressed(
        tmp_path / "src", tiny(), num_bits=3, symmetric=False, strategy="group", group_size=32
    )
    import_checkpoint(tmp_path / "src", tmp_path / "new", progress=False)

    def age(tensors: dict[str, Tensor]) -> None:
        for name, (_, zero) in made.items():
            codes = tensors[f"{name}.weight_packed"].view(torch.uint8)
            inputs = int(tensors[f"{name}.weight_shape"][1])
            codes = unpack_codes(codes[:, : inputs * 3 // 8].contiguous(), 3, inputs)
            tensors[f"{name}.weight_packed"] = whole_codes(codes, 3)
            tensors[f"{name}.weight_zero_point"] = zero.to(torch.int8)

    edit_tensors(tmp_path / "src", age)
    import_checkpoint(tmp_path / "src", tmp_path / "old", progress=False)
    assert read_spec(tmp_path / "old").base_digest == read_spec(tmp_path / "new").base_digest


def group(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    return {"config_groups": {"group_0": {"targets": ["Linear"], **changes, "weights": weights}}}


def weights(**changes: Any) -> dict[str, Any]:
    value = group()
    value["config_groups"]["group_0"]["weights"].update(changes)
    return value


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "float-quantized"}, "format 'float-quantized' cannot be imported; 'pack-quantized' can"),
        ({"format": "int-quantized"}, "format 'int-quantized'"),
        (group(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (group(input_activations={"num_bits": 8}), "quantizes activations too"),
        (weights(strategy="block"), "strategy 'block'; 'group' and 'channel'"),
        (weights(num_bits=6), "int weights of 6 bits"),
        (weights(type="float"), "float weights of 4 bits"),
        (weights(num_bits=8), "does not hold 96 inputs of 8 bits"),
        ({"config_groups": {}}, "config_groups must say"),
        ({"config_groups": {"group_0": {"targets": []}}}, "says nothing of weights"),
        ({"transform_config": {"R1": {}}}, "rotate activations"),
    ],
)
def test_compressed_tensors_that_cannot_be_imported(tmp_path: Path, changes: dict, sentence: str) -> None:
    write_compressed(tmp_path / "src", tiny(), num_bits=4, symmetric=True, strategy="group", group_size=32)
    edit_config(tmp_path / "src", **changes)
    with pytest.raises(InvalidCheckpoint, match=sentence):
        import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False)


@pytest.mark.parametrize(
    ("leaf", "value", "sentence"),
    [
        ("weight_scale", torch.ones(1), "strategies 'group' and 'channel'"),
        ("weight_shape", torch.tensor([64, 95]), r"weight_shape is \[64, 95\]"),
        ("weight_g_idx", (torch.arange(96, dtype=torch.int32) // 32).flip(0), "weight_g_idx is permuted"),
        ("weight_zero_point", torch.zeros(3, 3, dtype=torch.int32), r"must be I32 \[8, 3\]"),
    ],
)
def test_damaged_compressed_tensors(tmp_path: Path, leaf: str, value: Tensor, sentence: str) -> None:
    write_compressed(tmp_path / "src", tiny(), num_bits=4, symmetric=True, strategy="group", group_size=32)
    edit_tensors(tmp_path / "src", lambda tensors: tensors.update({f"{DOWN}.{leaf}": value}))
    with pytest.raises(InvalidCheckpoint, match=sentence):
        import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False)


@pytest.fixture(scope="module", autouse=True)
def library_of_hqq() -> Iterator[None]:
    """`make` puts it into a folder of its own."""
    folder = str(Path(__file__).parents[2] / "build" / "hqq")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


def write_hqq(folder: Path, model: LlamaForCausalLM, dtype: torch.dtype, **options: Any) -> None:
    """hqq's own layers put into `model`, saved as its save_to_safetensors does."""
    pytest.importorskip("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    tensors: dict[str, Tensor] = {}
    for name, linear in linears(model, ("lm_head", "o_proj")).items():
        config = BaseQuantizeConfig(**options)
        config["weight_quant_params"]["optimize"] = False
        bias = None if linear.bias is None else linear.bias.clone()
        layer = HQQLinear(linear, config, compute_dtype=dtype, device="cpu", del_orig=False)
        stored = {leaf: value for leaf, value in layer.state_dict().items() if isinstance(value, Tensor)}
        tensors.update({f"{name}.{leaf}": value for leaf, value in stored.items() if leaf != "bias"})
        restored = nn.Linear(linear.in_features, linear.out_features, bias is not None)
        restored.weight.data = layer.dequantize().float()
        if bias is not None:
            restored.bias.data = bias
        model.set_submodule(name, restored)
    save(folder, model, tensors, None)


@pytest.mark.parametrize(
    ("bits", "group_size", "options"),
    [(8, 32, {}), (4, 32, {}), (3, 32, {}), (2, 16, {}), (4, 32, {"view_as_float": True})],
    ids=["8", "4", "3", "2", "4-view-as-float"],
)
def test_hqqs_own_files(tmp_path: Path, bits: int, group_size: int, options: dict) -> None:
    model = tiny(bias=bits == 4)
    write_hqq(tmp_path / "src", model, torch.float32, nbits=bits, group_size=group_size, axis=1, **options)
    assert import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False) == "hqq"
    verify_digest(tmp_path / "base")
    for name in linears(model, ("lm_head", "o_proj")):
        assert torch.equal(decoded(tmp_path / "base", name), model.get_submodule(name).weight), name
    assert read_spec(tmp_path / "base").of(DOWN) == Precision(bits, group_size)
    with open_tensors(tmp_path / "base") as handles:
        zeros = handles[f"{DOWN}.zeros"].get_tensor(f"{DOWN}.zeros")
    if bits != 4:  # at 4 bits hqq rounds them
        assert not torch.equal(zeros, zeros.round()), "zero points stay fractions"
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32))
    torch.testing.assert_close(found, logits(model), atol=4e-3, rtol=1e-3)


def test_half_precision_scales_of_hqq_are_exact(tmp_path: Path) -> None:
    write_hqq(tmp_path / "src", tiny(), torch.bfloat16, nbits=4, group_size=32, axis=1)
    edit_config(tmp_path / "src", quant_method="hqq", quant_config={}, skip_modules=["lm_head"])
    import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False)
    with open_tensors(tmp_path / "base") as ours, open_tensors(tmp_path / "src") as theirs:
        for leaf, stored in (("scales", "scale"), ("zeros", "zero")):
            expected = theirs[f"{DOWN}.{stored}"].get_tensor(f"{DOWN}.{stored}")
            assert expected.dtype == torch.bfloat16
            assert torch.equal(
                ours[f"{DOWN}.{leaf}"].get_tensor(f"{DOWN}.{leaf}").flatten(), expected.float().flatten()
            )


def without(*leaves: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for leaf in leaves:
            del tensors[f"{DOWN}.{leaf}"]

    return change


def having(leaf: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{DOWN}.{leaf}": value})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("scale"), "quantized scales and zeros .* cannot be imported"),
        (without("axis"), "axis is missing"),
        (having("axis", torch.tensor(0)), "axis 0 groups weights across outputs"),
        (having("axis", torch.tensor([1, 1])), "axis must be one number"),
        (having("axis", torch.tensor(float("nan"))), "axis must be one number"),
        (having("W_q", torch.tensor(3)), "W_q must hold 4-bit codes, not torch.int64"),
        (having("nbits", torch.tensor(1.58)), "0 bits cannot be imported"),
        (having("nbits", torch.tensor(6)), "6 bits cannot be imported; 2, 3, 4, 8 can"),
        (having("scale", torch.ones(7, 1)), "7 groups do not divide into 64 rows"),
        (having("zero", torch.ones(191, 1)), r"zero must be floats \[192, 1\]"),
        (having("shape", torch.tensor([64, 97])), r"its shape is \[64, 97\]"),
        (having("W_q", torch.ones(95, 32, dtype=torch.uint8)), "does not hold 192 x 32 codes of 4 bits"),
        (having("scale", torch.full((192, 1), float("nan"))), "NaN or infinity"),
    ],
)
def test_hqq_files_that_cannot_be_imported(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], sentence: str
) -> None:
    write_hqq(tmp_path / "src", tiny(), torch.float32, nbits=4, group_size=32, axis=1)
    edit_tensors(tmp_path / "src", change)
    with pytest.raises(InvalidCheckpoint, match=sentence):
        import_checkpoint(tmp_path / "src", tmp_path / "base", progress=False)
