"""The doctor's look at CPUs, kernels, GPUs, memory, limits and the clock: whole, and with something broken."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from findings import is_broken

from peqa_server.doctor import machine
from peqa_server.doctor.finding import Asked

FACTS: dict[str, Any] = {
    "torch": "2.13.0+cpu", "torch_cuda": None, "devices": [], "device_problem": None,
    "builds_usable": ["avx512", "avx2"], "build": "avx512", "compilers": ["/usr/bin/cc"],
}  # fmt: skip
H100 = {"name": "H100", "capability": "9.0", "free_bytes": 70 << 30, "total_bytes": 80 << 30}
ON_GPU = FACTS | {"torch": "2.13.0", "torch_cuda": "13.0", "devices": [H100]}
SMI = "NVIDIA H100, driver 580.1"


def test_the_machine_that_the_tests_run_on() -> None:
    findings = machine.processor_and_devices(Asked(Path()))
    assert [finding.name for finding in findings] == ["processor", "kernels", "device"]
    assert all(finding.state != "problem" for finding in findings)


def test_torch_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = machine.processor_and_devices(Asked(Path()))
    is_broken(finding, "problem", "signal 4")


def test_a_container_with_less_than_its_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.cpu_quota(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_quota(tmp_path) is None
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.5)
    is_broken(machine.processor(FACTS), "warning", "gets 0.5")


def test_busy_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    is_broken(machine.processor(FACTS), "warning", "load 1000")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.0, 0.0))
    assert machine.processor(FACTS).state == "ok"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"build": None}, ("missing or stale", "native.compile")),
        ({"build": None, "compilers": []}, ("no C compiler", "ziglang")),
        ({"build": "avx2"}, ("avx2 is used", "avx512")),
    ],
)
def test_kernels_that_are_not_the_best(facts: dict[str, Any], words: tuple[str, ...]) -> None:
    is_broken(machine.kernels(FACTS | facts), "warning", *words)
    assert machine.kernels(FACTS).state == "ok"


@pytest.mark.parametrize(
    ("facts", "device", "smi", "state", "words"),
    [
        (FACTS, "cuda", None, "problem", ("no GPU",)),
        (FACTS, "auto", SMI, "warning", ("build for the CPU", "CUDA builds")),
        (FACTS, "cuda", SMI, "problem", ("build for the CPU",)),
        (ON_GPU | {"devices": []}, "auto", SMI, "warning", ("sees no device", "CUDA 13.0")),
        (
            ON_GPU | {"devices": [], "device_problem": "driver too old"},
            "cuda",
            SMI,
            "problem",
            ("driver too old",),
        ),
        (ON_GPU | {"devices": [H100 | {"capability": "7.5"}]}, "auto", SMI, "warning", ("sm 7.5", "8.0")),
    ],
)
def test_gpus_that_cannot_be_used(
    facts: dict[str, Any], device: str, smi: str | None, state: str, words: tuple[str, ...]
) -> None:
    is_broken(machine.gpu(facts, device, smi), state, *words)


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.gpu(ON_GPU, "auto", SMI).state == "ok"
    assert machine.gpu(ON_GPU, "cpu", SMI).state == "note"
    assert machine.gpu(FACTS, "auto", None).state == "ok"
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    is_broken(machine.gpu(ON_GPU, "auto", SMI), "problem", "triton", "gpu")


def test_a_driver_tool_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(machine, "GPU_SECONDS", 0.3)
    began = time.monotonic()
    assert machine.driver() is None
    assert time.monotonic() - began < 5
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 580.1'\n")
    monkeypatch.setattr(machine, "GPU_SECONDS", 5.0)
    assert machine.driver() == SMI


def test_memory_within_the_containers_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    assert machine.host_memory(meminfo, tmp_path) == (16 << 30, 8 << 30)
    (tmp_path / "memory.max").write_text(f"{4 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 30}\n")
    assert machine.host_memory(meminfo, tmp_path) == (4 << 30, 3 << 30)


def test_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(3 << 30)  # sparse
    for available, state in ((2 << 30, "problem"), (7 << 29, "warning"), (8 << 30, "ok")):
        monkeypatch.setattr(machine, "host_memory", lambda n=available: (8 << 30, n))
        (finding,) = machine.memory(Asked(Path(), base=tmp_path))
        assert finding.state == state
    monkeypatch.setattr(machine, "host_memory", lambda: (8 << 30, 2 << 30))
    is_broken(machine.memory(Asked(Path(), base=tmp_path))[0], "problem", "3.0 GiB")


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 4096))
    is_broken(machine.limits(Asked(Path()))[0], "warning", "256", "LimitNOFILE")


def test_a_clock_that_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.clock(Asked(Path()))[0].state in ("ok", "note")
    monkeypatch.setattr(machine.time, "time", lambda: 1_000_000_000.0)
    is_broken(machine.clock(Asked(Path()))[0], "problem", "2001-09-09", "timedatectl")
