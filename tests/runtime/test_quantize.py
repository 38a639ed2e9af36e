"""Round-to-nearest quantizer: the fitted range, and whole folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peqa_kernels.quant_matmul import dequantize
from peqa_runtime.errors import InvalidCheckpoint, InvalidRequest
from peqa_runtime.model import quantize_folder, quantize_rtn, read_manifest, verify_digest
from peqa_runtime.model.base_checkpoint import open_tensors, read_spec
from peqa_runtime.model.quantizers import rounding as module


def min_max(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Plain asymmetric rounding over each group's whole range: what a fitted range must beat."""
    grouped = weight.view(weight.shape[0], -1, weight.shape[1] if group_size == -1 else group_size)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (((grouped - low) / step).round() * step + low).view_as(weight)


def errors(found: Tensor, weight: Tensor, group_size: int) -> Tensor:
    size = weight.shape[1] if group_size == -1 else group_size
    return (found - weight).view(weight.shape[0], -1, size).square().sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_no_group_is_worse_than_min_max(bits: int, group_size: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(37, 384) * torch.rand(37, 1)
    weight[:, ::50] *= 5  # outliers
    quantized = quantize_rtn(weight, bits, group_size)
    assert quantized.groups == (1 if group_size == -1 else 384 // group_size)
    fitted = errors(dequantize(quantized), weight, group_size)
    plain = errors(min_max(weight, bits, group_size), weight, group_size)
    assert (fitted <= plain * 1.0001).all()
    assert fitted.sum() < plain.sum() * (0.95 if bits == 4 else 0.85)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_on_a_grid_come_back(bits: int) -> None:
    """Every code used, steps and fractional zeros of all sizes: nothing is lost but fp32 rounding."""
    torch.manual_seed(0)
    codes = torch.randint(0, 1 << bits, (9, 4, 256)).float()
    codes[..., 0], codes[..., 1] = 0, (1 << bits) - 1
    step, zero = torch.rand(9, 4, 1) + 1e-3, torch.rand(9, 4, 1) * 30 - 10
    weight = (step * (codes - zero)).view(9, 1024)
    found = dequantize(quantize_rtn(weight, bits, 256))
    torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-4)


def test_groups_of_one_value_are_exact() -> None:
    weight = torch.tensor([[0.0] * 16, [0.3] * 16, [-7.5] * 16]).repeat(1, 2)
    weight[0, 16:] = torch.linspace(-1, 1, 16)
    quantized = quantize_rtn(weight, 4, 16)
    assert (dequantize(quantized)[:, :16] == weight[:, :16]).all()
    assert quantized.scales[:, 0].tolist() == [1.0, pytest.approx(0.3), 7.5]
    assert quantized.zeros[:, 0].tolist() == [0.0, -1.0, 1.0]
    assert not torch.signbit(quantized.zeros[0, 0])


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    whole = quantize_rtn(weight, 3, 32)
    monkeypatch.setattr(module, "_CHUNK", 3 * 64)
    parts = quantize_rtn(weight, 3, 32)
    for name in ("qweight", "scales", "zeros"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


def test_not_a_number_is_refused() -> None:
    weight = torch.zeros(2, 32)
    weight[1, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        quantize_rtn(weight, 4, 32)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, -1), (3, 64), (2, 16), (8, 64)])
def test_folder(tiny_hf_folder: Path, tmp_path: Path, bits: int, group_size: int) -> None:
    quantize_folder(tiny_hf_folder, tmp_path / "base", bits, group_size, progress=False)
    verify_digest(tmp_path / "base")
    manifest = read_manifest(tmp_path / "base")
    assert manifest.model_id == "tiny-llama"
    assert len(manifest.linears) == 14
    original = load_file(tiny_hf_folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    kept = {name for name in original if name.removesuffix(".weight") not in manifest.linears}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= kept
    for name, tensor in original.items():
        if name in kept:
            assert torch.equal(model.get_parameter(name), tensor)
            continue
        linear = model.get_submodule(name.removesuffix(".weight"))
        expected = quantize_rtn(tensor, bits, group_size)
        for leaf in ("qweight", "scales", "zeros"):
            assert torch.equal(getattr(linear, leaf), getattr(expected, leaf))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert (
        tokenizer("the cat").input_ids == AutoTokenizer.from_pretrained(tiny_hf_folder)("the cat").input_ids
    )


def test_more_bits_are_closer(tiny_hf_folder: Path, tmp_path: Path) -> None:
    ids = torch.randint(0, 300, (1, 32), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tiny_hf_folder)
    differences = []
    with torch.no_grad():
        expected = model(ids).logits
        for bits in (2, 3, 4, 8):
            quantize_folder(tiny_hf_folder, tmp_path / str(bits), bits, 32, progress=False)
            found = AutoModelForCausalLM.from_pretrained(tmp_path / str(bits))(ids).logits
            differences.append(((found - expected).square().mean() / expected.square().mean()).item())
    assert differences == sorted(differences, reverse=True)
    assert differences[-1] < 2e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits must be one of"),
        ({"group_size": 48}, "group_size must be one of"),
        ({"method": "magic"}, "method must be one of"),
    ],
)
def test_options_that_do_not_exist(tiny_hf_folder: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        quantize_folder(tiny_hf_folder, tmp_path / "base", **options)
    assert not (tmp_path / "base").exists()


def test_group_size_that_does_not_divide_names_what_fits(tiny_hf_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint) as error:
        quantize_folder(tiny_hf_folder, tmp_path / "base", 4, 128)
    assert "the 64 inputs of model.layers.0.self_attn.q_proj" in str(error.value)
    assert str(error.value).endswith("fit it: -1, 16, 32, 64")


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_folders_that_cannot_be_quantized(tiny_hf_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InvalidCheckpoint, match="is no model folder"):
        quantize_folder(tmp_path / "nothing", out)
    foreign = copy(tiny_hf_folder, tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "awq"}})
    )
    with pytest.raises(InvalidCheckpoint, match="quantized already \\('awq'\\)"):
        quantize_folder(foreign, out)
    pickled = copy(tiny_hf_folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InvalidCheckpoint, match=r"pytorch_model.bin, a pickle"):
        quantize_folder(pickled, out)
    renamed = copy(tiny_hf_folder, tmp_path / "renamed")
    tensors = load_file(renamed / "model.safetensors")
    save_file(
        {name.replace("q_proj", "query"): t for name, t in tensors.items()}, renamed / "model.safetensors"
    )
    with pytest.raises(InvalidCheckpoint, match=r"no weight for model.layers.0.self_attn.q_proj"):
        quantize_folder(renamed, out, progress=False)
    unknown = copy(tiny_hf_folder, tmp_path / "unknown")
    (unknown / "config.json").write_text(json.dumps({**config, "model_type": "martian"}))
    with pytest.raises(InvalidCheckpoint, match="no causal language model"):
        quantize_folder(unknown, out)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("inf")
    broken = copy(tiny_hf_folder, tmp_path / "broken")
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match=r"up_proj.weight: the weight holds NaN or infinity"):
        quantize_folder(broken, out, progress=False)
    assert not out.exists()
    assert not [p for p in tmp_path.iterdir() if ".tmp-" in p.name]


def test_same_folder_same_digest(tiny_hf_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    quantize_folder(tiny_hf_folder, tmp_path / "again", 4, 32, model_id="other-name", progress=False)
    assert read_spec(tmp_path / "again").base_digest == read_spec(tiny_base).base_digest
    quantize_folder(tiny_hf_folder, tmp_path / "other", 4, 64, progress=False)
    assert read_spec(tmp_path / "other").base_digest != read_spec(tiny_base).base_digest
    with open_tensors(tiny_base) as handles:
        assert "model.layers.0.self_attn.q_proj.weight" not in handles
