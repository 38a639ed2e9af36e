"""GPTQ exports: the numbers of the merged weights, what loaders make of them, import of our own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import (
    DOWN,
    edit_base,
    integer_base,
    merged_weights,
    middle_zeros,
    published,
    random_set,
)
from safetensors.torch import load_file

from peqa_kernels.quant_matmul import dequantize
from peqa_kernels.quant_matmul.weight import QuantizedWeight
from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.export.folder import export_folder
from peqa_runtime.model import import_checkpoint, read_manifest
from peqa_runtime.model.base_checkpoint import open_tensors, read_spec
from peqa_runtime.model.quantizers.plan import Rule


@pytest.mark.parametrize(
    ("bits", "group_size", "kind"),
    [(4, 32, None), (4, 32, "channel"), (3, 32, "group"), (2, 16, "channel"), (8, -1, "channel")],
)
def test_gptq_files_hold_the_merged_weights_and_come_back(
    tiny_hf_folder: Path, tmp_path: Path, bits: int, group_size: int, kind: Any
) -> None:
    base = integer_base(tiny_hf_folder, tmp_path / "base", bits, group_size)
    chosen = random_set(base, kind, tmp_path / "s.safetensors") if kind else None
    export_folder(base, tmp_path / "out", "gptq", scale_set=chosen, progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
    said = {key: config[key] for key in ("quant_method", "checkpoint_format", "bits", "group_size", "sym")}
    assert said == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": bits,
        "group_size": group_size,
        "sym": False,
    }
    assert "dynamic" not in config
    for name, weight in merged_weights(base, chosen).items():
        assert tensors[f"{name}.scales"].dtype == torch.float16
        torch.testing.assert_close(
            published(tensors, name, bits, 0).double(), weight, rtol=2**-11 + 1e-6, atol=1e-7
        )
    import_checkpoint(tmp_path / "out", tmp_path / "again", progress=False)
    with open_tensors(base) as before, open_tensors(tmp_path / "again") as after:
        for name in read_manifest(base).linears:
            parts = [
                [h[f"{name}.{n}"].get_tensor(f"{name}.{n}") for n in ("qweight", "zeros", "scales")]
                for h in (before, after)
            ]
            assert torch.equal(parts[0][0], parts[1][0])
            assert torch.equal(parts[0][1], parts[1][1])
            weight = QuantizedWeight(
                parts[1][0], parts[1][2], parts[1][1], bits, parts[1][0].shape[1] * 8 // bits
            )
            assert torch.equal(dequantize(weight), published(tensors, name, bits, 0))


def test_symmetric_bases_are_written_as_version_1(tiny_hf_folder: Path, tmp_path: Path) -> None:
    base = integer_base(tiny_hf_folder, tmp_path / "base")
    edit_base(base, middle_zeros)
    export_folder(base, tmp_path / "out", "gptq", progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["checkpoint_format"], config["sym"]) == ("gptq", True)
    assert (tensors[f"{DOWN}.qzeros"] == 0x77777777).all()
    expected = merged_weights(base, None)[DOWN]
    torch.testing.assert_close(
        published(tensors, DOWN, 4, 1).double(), expected, rtol=2**-11 + 1e-6, atol=1e-7
    )
    import_checkpoint(tmp_path / "out", tmp_path / "again", progress=False)
    with open_tensors(tmp_path / "again") as handles:
        assert (handles[f"{DOWN}.zeros"].get_tensor(f"{DOWN}.zeros") == 8).all()


def test_mixed_precision_is_said_in_dynamic(tiny_hf_folder: Path, tmp_path: Path) -> None:
    rules = (Rule("*.0.mlp.down_proj", {"bits": 8}), Rule("*.o_proj", {"skip": True}))
    base = integer_base(tiny_hf_folder, tmp_path / "base", 4, 32, *rules)
    told: list[str] = []
    export_folder(base, tmp_path / "out", "gptq", progress=False, say=told.append)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["dynamic"] == {
        "-:^model\\.layers\\.0\\.self_attn\\.o_proj$": {},
        "-:^model\\.layers\\.1\\.self_attn\\.o_proj$": {},
        "+:^model\\.layers\\.0\\.mlp\\.down_proj$": {"bits": 8, "group_size": 32},
    }
    assert "linears differ" in told[0]
    import_checkpoint(tmp_path / "out", tmp_path / "again", progress=False)
    before, after = read_spec(base), read_spec(tmp_path / "again")
    assert after.overrides == before.overrides
    assert after.modules_to_not_convert == before.modules_to_not_convert


def test_what_a_gptq_file_cannot_hold(tiny_hf_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = integer_base(tiny_hf_folder, tmp_path / "base")
    inputs = random_set(base, "channel+input", tmp_path / "in.safetensors")
    eights = integer_base(tiny_hf_folder, tmp_path / "eights", 4, 32)
    edit_base(eights, lambda tensors: tensors[f"{DOWN}.scales"][0].fill_(1e-7))
    for folder, scale_set, sentence in (
        (tiny_base, None, "zero points that are no codes.*--format hf, or quantize with --zeros integer"),
        (base, inputs, "scales the inputs of 14 linears .*use --format hf"),
        (eights, None, "down_proj has scales from 1e-07 .*fp16.*--format hf"),
    ):
        with pytest.raises(InvalidCheckpoint, match=sentence):
            export_folder(folder, tmp_path / "out", "gptq", scale_set=scale_set, progress=False)
    assert not (tmp_path / "out").exists()
