"""Quantization that is interrupted, killed or out of disk goes on where it was and ends with the same bits."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_cases import Make, leftovers, quantize_options
from transformers import AutoConfig, AutoModelForCausalLM

from peqa_runtime.errors import DiskFull
from peqa_runtime.model import quantize_folder
from peqa_runtime.model.base_checkpoint import read_spec
from peqa_runtime.model.base_writer import BaseWriter
from peqa_runtime.model.quantizers import run as run_module
from peqa_runtime.model.quantizers import workbench as workbench_module
from peqa_runtime.model.quantizers.blockwise import TrainingOptions
from peqa_runtime.model.quantizers.calibration import CalibrationText
from peqa_runtime.model.quantizers.workbench import Workbench


@pytest.mark.parametrize("method", ["gptq", "blockwise"])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    make_base: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    whole = read_spec(make_base("whole", method)).base_digest
    assert leftovers(tmp_path) == []
    done: list[int] = []
    save = Workbench.save_block

    def stop(self: Workbench, index: int, *args: Any) -> None:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(index)
        save(self, index, *args)

    monkeypatch.setattr(Workbench, "save_block", stop)
    with pytest.raises(KeyboardInterrupt):
        make_base("base", method)
    assert not (tmp_path / "base").exists()
    assert done == [0]
    monkeypatch.setattr(
        Workbench, "save_block", lambda self, index, *a: (done.append(index), save(self, index, *a))
    )
    assert read_spec(make_base("base", method)).base_digest == whole
    assert done == [0, 1]
    assert leftovers(tmp_path) == []


def test_another_request_starts_afresh(
    make_base: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        run_module.BlockRun, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        make_base("base", "gptq", bits=2)
    mark = tmp_path / ".base.unfinished" / "block-00000.safetensors"
    mark.write_bytes(b"of the 2-bit run")
    monkeypatch.undo()
    base = make_base("base", "gptq", bits=4)
    assert read_spec(base).bits == 4
    assert read_spec(base).base_digest == read_spec(make_base("other", "gptq", bits=4)).base_digest


@pytest.mark.slow
def test_killed_and_started_again_it_gives_the_same_bits(
    tiny_hf_folder: Path, calibration_text: Path, tmp_path: Path
) -> None:
    source = tmp_path / "deep"
    shutil.copytree(tiny_hf_folder, source)
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers = 6
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    say = "--bits 2 --group-size 32 --method blockwise --epochs 1 --device cpu -q "
    say += f"--calibration {calibration_text} --calibration-windows 8 --calibration-tokens 32"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "peqa_runtime",
            "quantize",
            str(source),
            "-o",
            str(tmp_path / name),
            *say.split(),
        ]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)

    calibration = CalibrationText(calibration_text, windows=8, tokens=32)
    quantize_folder(
        source, tmp_path / "whole", 2, 32, "blockwise",
        options=quantize_options(
            calibration_text, calibration=calibration, training=TrainingOptions(epochs=1.0)
        ), progress=False,
    )  # fmt: skip
    process = start("base")
    while not (tmp_path / ".base.unfinished" / "block-00002.safetensors").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "base").exists()
    again = start("base")
    _, told = again.communicate()
    assert again.returncode == 0, told
    assert b"going on after" in told
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "base" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert leftovers(tmp_path) == []


def test_full_disks_are_named_and_lose_nothing(
    make_base: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_spec(make_base("whole", "gptq")).base_digest
    write = workbench_module.write_atomic

    def full(path: Path, data: bytes, **_: Any) -> None:
        if path.name == "block-00001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(workbench_module, "write_atomic", full)
    with pytest.raises(DiskFull, match=r"the disk is full at .*run the same command again"):
        make_base("base", "gptq")
    monkeypatch.undo()
    assert (tmp_path / ".base.unfinished" / "block-00000.safetensors").exists()
    with monkeypatch.context() as small:
        usage = shutil.disk_usage(tmp_path)
        small.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(DiskFull, match="needs about"):
            make_base("base", "gptq")
    assert not (tmp_path / "base").exists()
    assert read_spec(make_base("base", "gptq")).base_digest == whole


@pytest.mark.parametrize(("method", "goes_on"), [("rtn", False), ("gptq", True)])
def test_only_a_method_that_goes_on_is_said_to(
    make_base: Make, monkeypatch: pytest.MonkeyPatch, method: str, goes_on: bool
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(BaseWriter, "add_codes", full)
    with pytest.raises(DiskFull, match=r"run the same command again") as caught:
        make_base("base", method, **({} if goes_on else {"calibration": None}))
    assert str(caught.value).endswith("it goes on where it stopped") == goes_on
