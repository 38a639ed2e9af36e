"""The Triton kernel: under Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CHECKS = Path(__file__).with_name("quant_matmul_triton_checks.py")


@pytest.mark.parametrize("widths", [["4"], pytest.param(["2", "3", "8"], marks=pytest.mark.slow)], ids=str)
def test_under_the_interpreter(widths: list[str]) -> None:
    # Triton reads the switch when it is imported: a process of its own.
    done = subprocess.run(
        [sys.executable, str(CHECKS), "cpu", *widths],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "checks passed" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu() -> None:
    done = subprocess.run([sys.executable, str(CHECKS), "cuda"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
