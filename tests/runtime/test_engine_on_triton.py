"""Base folder to answers on the Triton kernels: under Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from peqa_runtime.model import quantize_folder

pytest.importorskip("triton")
CHECKS = Path(__file__).with_name("engine_triton_checks.py")


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tiny_hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """4 bits in groups; biases, an untied head and 3 bits with one scale per row; 2 bits in groups of 16."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_hf_folder)
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "floats")
    tokenizer.save_pretrained(folder / "floats")
    quantize_folder(folder / "floats", folder / "3bit", 3, -1, progress=False)
    quantize_folder(folder / "floats", folder / "2bit", 2, 16, progress=False)
    return [tiny_base, folder / "3bit", folder / "2bit"]


def run(device: str, bases: list[Path], **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, str(CHECKS), device, *map(str, bases)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "checks passed" in done.stdout


@pytest.mark.skipif(
    version("triton") < "3.9" and int(version("numpy").split(".")[1]) >= 4,
    reason="the interpreter of Triton before 3.9 fails on loops with a run-time bound under NumPy 2.4",
)
def test_under_the_interpreter(bases: list[Path]) -> None:
    run("cpu", bases, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu(bases: list[Path]) -> None:
    run("cuda", bases)
