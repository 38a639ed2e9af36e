"""Exports as floats: the numbers of the merged weights, the tokens of our own engine; refusals, the command."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import DOWN, greedy_gap, integer_base, merged_weights, random_set
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from peqa_runtime.cli import app
from peqa_runtime.errors import DiskFull, InvalidCheckpoint, InvalidRequest, WrongBase
from peqa_runtime.export.folder import export_folder
from peqa_runtime.model import import_checkpoint, read_manifest, shard_writer
from peqa_runtime.scales.scale_set import ScaleSet


@pytest.mark.parametrize("kind", ["base", "channel", "channel+input", "group"])
def test_a_folder_of_floats_computes_what_the_engine_does(tiny_base: Path, tmp_path: Path, kind: Any) -> None:
    task = "base" if kind == "base" else random_set(tiny_base, kind, tmp_path / "s.safetensors")
    chosen = None if kind == "base" else tmp_path / "s.safetensors"
    export_folder(tiny_base, tmp_path / "out", "hf", scale_set=chosen, progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in merged_weights(tiny_base, chosen).items():
        torch.testing.assert_close(tensors[f"{name}.weight"].double(), weight, rtol=4e-7, atol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    greedy_gap(model, tiny_base, task)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_a_folder_of_floats(tiny_base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    export_folder(tiny_base, tmp_path / "out", "hf", dtype=name, progress=False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    expected = merged_weights(tiny_base, None)[DOWN].float().to(dtype)
    assert torch.equal(tensors[f"{DOWN}.weight"], expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name


def test_sets_and_folders_that_do_not_fit(tiny_hf_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    other = integer_base(tiny_hf_folder, tmp_path / "other")
    foreign = random_set(other, "channel", tmp_path / "s.safetensors")
    with pytest.raises(WrongBase, match="tuned on base"):
        export_folder(tiny_base, tmp_path / "out", "hf", scale_set=foreign, progress=False)
    with pytest.raises(InvalidCheckpoint, match="no peqa base"):
        export_folder(tiny_hf_folder, tmp_path / "out", "hf", progress=False)
    with pytest.raises(InvalidRequest, match="dtype must be one of float32, bfloat16, float16, not 'int8'"):
        export_folder(tiny_base, tmp_path / "out", "hf", dtype="int8", progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InvalidCheckpoint, match="exists already"):
        export_folder(tiny_base, tmp_path / "full", "hf", progress=False)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match="is damaged: its contents have digest"):
        export_folder(other, tmp_path / "out", "hf", progress=False)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.tmp-*"))


@pytest.mark.parametrize(
    ("fault", "error"),
    [(OSError(errno.ENOSPC, "No space left on device"), DiskFull), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["disk-full", "interrupted"],
)
def test_what_breaks_off_leaves_nothing(
    tiny_base: Path,
    tiny_hf_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: BaseException,
    error: type[BaseException],
) -> None:
    base = integer_base(tiny_hf_folder, tmp_path / "base")
    export_folder(base, tmp_path / "gptq", "gptq", progress=False)
    before = sorted(tmp_path.iterdir())

    def save(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        path.write_bytes(b"half of it")
        raise fault

    monkeypatch.setattr(shard_writer, "save_file", save)
    for run in (
        lambda: export_folder(tiny_base, tmp_path / "out", "hf", progress=False),
        lambda: export_folder(base, tmp_path / "out", "gptq", progress=False),
        lambda: import_checkpoint(tmp_path / "gptq", tmp_path / "out", progress=False),
    ):
        with pytest.raises(error) as caught:
            run()
        assert "goes on" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before


def test_the_command(tiny_base: Path, tmp_path: Path) -> None:
    file = random_set(tiny_base, "channel", tmp_path / "s.safetensors")
    options = ["--scale-set", str(file), "--format", "hf", "-o", str(tmp_path / "out"), "-q", "--json"]
    result = CliRunner().invoke(app, ["export", str(tiny_base), *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert report["bytes"] == sum((tmp_path / "out" / name).stat().st_size for name in files)
    card = (tmp_path / "out" / "README.md").read_text()
    manifest = read_manifest(tiny_base)
    assert manifest.base_digest in card
    assert ScaleSet.parse(file, manifest).revision in card
    again = CliRunner().invoke(app, ["export", str(tiny_base), *options], catch_exceptions=False)
    assert again.exit_code == 1
    assert "exists already" in again.stderr
