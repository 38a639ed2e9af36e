"""Quantization that cannot be: options, calibration text, folders in use, models that are no chain of blocks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quantize_cases import Make, leftovers, save_random_model

from peqa_runtime.errors import InvalidCheckpoint, InvalidData, InvalidRequest, UnsupportedModel
from peqa_runtime.model import read_manifest
from peqa_runtime.model.quantizers.calibration import CalibrationText
from peqa_runtime.model.quantizers.gptq import GptqOptions
from peqa_runtime.model.quantizers.plan import Rule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": None}, "needs calibration text: a .txt"),
        (
            {"gptq": GptqOptions(act_order=True, static_groups=False)},
            "act-order without static groups scatters",
        ),
        ({"rules": (Rule("*.nothing", {"bits": 4}),)}, "fits no linear"),
    ],
)
def test_options_that_cannot_be(
    make_base: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make_base("base", "gptq", **changes)
    assert not (tmp_path / "base").exists()
    assert leftovers(tmp_path) == []


def test_what_cannot_be_calibrated(
    make_base: Make, tiny_hf_folder: Path, tmp_path: Path, calibration_text: Path
) -> None:
    with pytest.raises(InvalidRequest, match="reads no calibration text"):
        make_base("base", "rtn")
    with pytest.raises(InvalidData, match="no such file"):
        make_base("base", "gptq", calibration=CalibrationText(tmp_path / "none.txt"))
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(tiny_hf_folder / file, bare / file)
    with pytest.raises(InvalidCheckpoint, match="no tokenizer"):
        make_base("base", "gptq", source=bare)
    make_base("base", "gptq")
    with pytest.raises(InvalidCheckpoint, match="exists already"):
        make_base("base", "gptq")
    process = subprocess.Popen(
        [sys.executable, "-c", f"""
import sys, time
from filelock import FileLock
with FileLock({str(tmp_path / '.busy.unfinished.lock')!r}):
    print("locked", flush=True)
    time.sleep(60)
"""], stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(InvalidCheckpoint, match="another process is making"):
        make_base("busy", "gptq")
    process.kill()
    process.wait()


def test_models_that_do_more_between_their_blocks_are_refused(
    make_base: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def between(self: Any, *args: Any, **kwargs: Any) -> Any:
        first = self.layers[0].forward
        self.layers[0].forward = lambda *a, **k: first(*a, **k) * 2
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", between)
    with pytest.raises(UnsupportedModel, match=r"something happens between its blocks.*--method rtn"):
        make_base("base", "gptq")


def test_mixtures_of_experts_can_only_be_rounded(
    make_base: Make, tiny_hf_folder: Path, tmp_path: Path
) -> None:
    """Experts are stored under other names than modules have; their floats stay as they are."""
    source = tmp_path / "experts"
    shutil.copytree(tiny_hf_folder, source)
    save_random_model(source, "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2})
    with pytest.raises(InvalidCheckpoint, match=r"mixtures of experts are stored otherwise.*--method rtn"):
        make_base("base", "gptq", source=source)
    shutil.rmtree(tmp_path / ".base.unfinished")
    assert len(read_manifest(make_base("base", "rtn", source=source, calibration=None)).linears) == 8
