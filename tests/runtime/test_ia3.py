"""(IA)3 adapters: what PEFT saves becomes a set that computes the same, and goes back without a changed bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from peqa_runtime.cli import app
from peqa_runtime.errors import InvalidCheckpoint, InvalidRequest, InvalidScaleSet
from peqa_runtime.export.folder import export_folder
from peqa_runtime.export.ia3 import export_ia3, import_ia3
from peqa_runtime.model import quantize_folder, read_manifest
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.set_layout import expected_shapes

DOWN = "model.layers.1.mlp.down_proj"
VECTOR = f"base_model.model.{DOWN}.ia3_l"


@pytest.fixture(scope="module")
def floats(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base's own weights as floats: what an adapter is trained on."""
    folder = tmp_path_factory.mktemp("ia3") / "floats"
    export_folder(tiny_base, folder, "hf", progress=False)
    return folder


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 300, (2, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).logits


def make_adapter(
    folder: Path, floats: Path, feedforward: list[str], targets: Any = "all-linear", **options: Any
) -> Tensor:
    """An adapter with random vectors, saved by PEFT; returns its logits."""
    model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=feedforward, **options
    )
    adapted = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(6)
    for name, value in adapted.named_parameters():
        if "ia3_l" in name:
            value.data = 0.5 + torch.rand(value.shape, generator=generator)
    adapted.save_pretrained(folder)
    return logits(adapted)


@pytest.mark.parametrize(
    ("feedforward", "targets", "kind"),
    [
        ([], "all-linear", "channel"),
        (["down_proj"], "all-linear", "channel+input"),
        (["up_proj", "down_proj"], ["k_proj", "v_proj", "up_proj", "down_proj"], "channel+input"),
    ],
    ids=["all-outputs", "feedforward", "some-linears"],
)
def test_an_adapter_of_pefts_computes_the_same_as_a_set_and_goes_back(
    floats: Path, tiny_base: Path, tmp_path: Path, feedforward: list[str], targets: Any, kind: str
) -> None:
    expected = make_adapter(tmp_path / "adapter", floats, feedforward, targets)
    result = import_ia3(tmp_path / "adapter", tiny_base, task="mine")
    assert (result.kind, result.task) == (kind, "mine")
    result.save(tmp_path / "set.safetensors")
    export_folder(
        tiny_base, tmp_path / "merged", "hf", scale_set=tmp_path / "set.safetensors", progress=False
    )
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert float((merged - logits(AutoModelForCausalLM.from_pretrained(floats))).abs().max()) > 0.1

    export_ia3(tiny_base, tmp_path / "set.safetensors", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back"))
    assert before.keys() <= after.keys()
    for name, vector in after.items():
        assert torch.equal(vector, before[name] if name in before else torch.ones_like(vector)), name
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(floats), tmp_path / "back")
    torch.testing.assert_close(logits(again), expected, rtol=1e-6, atol=1e-6)
    assert import_ia3(tmp_path / "back", tiny_base).revision == result.revision


def test_the_commands(floats: Path, tiny_base: Path, tmp_path: Path) -> None:
    def peqa(*args: object, status: int = 0) -> str:
        result = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
        assert result.exit_code == status, result.output
        return result.stderr if status else result.stdout

    make_adapter(tmp_path / "adapter", floats, [])
    file = tmp_path / "out" / "set.safetensors"
    options = ("--base", tiny_base, "-o", file, "--task", "mine", "--json")
    report = json.loads(peqa("import-adapter", tmp_path / "adapter", *options))
    saved = ScaleSet.parse(file, read_manifest(tiny_base))
    assert report["revision"] == saved.revision
    assert "exists already" in peqa("import-adapter", tmp_path / "adapter", *options, status=1)
    assert "task name" in peqa(
        "import-adapter", tmp_path, "--base", tiny_base, "-o", file, "--task", "A b", status=1
    )
    adapter = ("import-adapter", tmp_path / "adapter", "--base", tiny_base, "-o")
    assert "is a .safetensors file, not 'set.bin'" in peqa(*adapter, "set.bin", status=1)
    export = ("export", tiny_base, "--format", "ia3", "-o", tmp_path / "back")
    assert "--scale-set" in peqa(*export, status=1)
    assert "--dtype" in peqa(*export, "--scale-set", file, "--dtype", "float16", status=1)
    peqa(*export, "--scale-set", file)
    assert saved.revision in (tmp_path / "back" / "README.md").read_text()


def config_with(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def tensors_with(**changes: Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file({**load_file(path), **changes}, path)

    return change


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (config_with(peft_type="LORA"), InvalidCheckpoint, "adapter of type 'LORA'; only .IA.3"),
        (config_with(modules_to_save=["lm_head"]), InvalidCheckpoint, "modules_to_save"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), InvalidCheckpoint, "is no JSON"),
        (lambda folder: (folder / "adapter_config.json").unlink(), InvalidCheckpoint, "is no PEFT adapter"),
        (pickled, InvalidCheckpoint, "a pickle, which can run code"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), InvalidCheckpoint, "is missing"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 20),
            InvalidCheckpoint,
            "is damaged",
        ),
        (tensors_with(other=torch.ones(2)), InvalidCheckpoint, "'other' is no .IA.3 vector"),
        (
            tensors_with(**{"base_model.model.lm_head.ia3_l": torch.ones(300, 1)}),
            InvalidCheckpoint,
            "scales lm_head, which is no quantized linear",
        ),
        (tensors_with(**{VECTOR: torch.ones(64)}), InvalidCheckpoint, r"\[64, 1\] or \[1, 128\] fits"),
        (tensors_with(**{VECTOR: torch.zeros(64, 1)}), InvalidScaleSet, "down_proj.out_scale has 0"),
        (tensors_with(**{VECTOR: -torch.ones(64, 1)}), InvalidScaleSet, "down_proj.out_scale has -1"),
        (tensors_with(**{VECTOR: torch.full((64, 1), 99.0)}), InvalidScaleSet, "reaches from 99"),
    ],
)
def test_adapters_that_are_no_scale_set(
    floats: Path,
    tiny_base: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    error: type[Exception],
    sentence: str,
) -> None:
    make_adapter(tmp_path / "adapter", floats, [])
    change(tmp_path / "adapter")
    with pytest.raises(error, match=sentence):
        import_ia3(tmp_path / "adapter", tiny_base)


def random_set(base: Path, kind: Any, file: Path) -> Path:
    manifest = read_manifest(base)
    tensors = {name: 0.5 + torch.rand(shape) for name, shape in expected_shapes(kind, manifest).items()}
    ScaleSet.build(kind, tensors, manifest).save(file)
    return file


def test_sets_that_are_no_adapter(tiny_base: Path, tmp_path: Path) -> None:
    for kind, sentence in (
        ("group", "kind 'group' scales groups"),
        ("channel+input", "does one or the other"),
    ):
        file = random_set(tiny_base, kind, tmp_path / "s.safetensors")
        with pytest.raises(InvalidRequest, match=sentence):
            export_ia3(tiny_base, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_biases_are_refused(tiny_hf_folder: Path, tmp_path: Path) -> None:
    """PEFT multiplies a bias too. Inputs, and outputs without a bias, may be scaled in such a model."""
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "floats")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "floats" / file).write_bytes((tiny_hf_folder / file).read_bytes())
    quantize_folder(tmp_path / "floats", tmp_path / "base", 4, 32, progress=False)
    make_adapter(tmp_path / "biased", tmp_path / "floats", [])
    with pytest.raises(InvalidScaleSet, match=r"k_proj has a bias, which .IA.3 multiplies"):
        import_ia3(tmp_path / "biased", tmp_path / "base")
    make_adapter(tmp_path / "other", tmp_path / "floats", ["q_proj"], ["q_proj", "o_proj"])
    assert import_ia3(tmp_path / "other", tmp_path / "base").kind == "channel+input"
    file = random_set(tmp_path / "base", "channel", tmp_path / "s.safetensors")
    with pytest.raises(InvalidScaleSet, match="has a bias"):
        export_ia3(tmp_path / "base", file, tmp_path / "out")
