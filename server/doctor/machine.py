"""The processor and its kernels, GPUs and their driver, memory, limits of the process, and the clock."""

from __future__ import annotations

import importlib.util
import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peqa_server.doctor import probe
from peqa_server.doctor.finding import Asked, Finding, State, gib

GPU_SECONDS = 15.0
LEAST_MEMORY = 1 << 30
LEAST_FILES = 1024
OLDEST_GPU = 8.0  # the kernels are compiled and tested for this compute capability and newer ones
CGROUP = Path("/sys/fs/cgroup")


def processor_and_devices(asked: Asked) -> list[Finding]:
    """What computes here: CPU, compiled kernels, GPUs."""
    try:
        facts = probe.facts("machine", seconds=asked.timeout)
    except probe.ProbeFailed as error:
        advice = "run python -m peqa_runtime.diagnosis machine, and install the packages anew if it crashes"
        return [Finding("processor", "problem", f"torch or the kernels cannot be loaded: {error}", advice)]
    return [processor(facts), kernels(facts), gpu(facts, asked.device, driver())]


def processor(facts: Mapping[str, Any]) -> Finding:
    """CPUs, how busy they are, and the best instructions that they have for our kernels."""
    cpus, quota = len(os.sched_getaffinity(0)), cpu_quota()
    best = next(iter(facts["builds_usable"]), "none")
    busy = os.getloadavg()[0]
    found = f"{cpus} CPUs, load {busy:.1f}, best instructions: {best}"
    if quota is not None and quota < cpus:
        advice = "threads that wait for their share slow each step: give the container whole CPUs (cpuset)"
        return Finding("processor", "warning", f"{found}, of which this container gets {quota:g}", advice)
    if busy > 1.5 * cpus:
        return Finding("processor", "warning", found, "other work takes the CPUs: steps will be slow")
    return Finding("processor", "ok", found)


def cpu_quota(root: Path = CGROUP) -> float | None:
    """CPUs that the container may use at once; None: no limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def kernels(facts: Mapping[str, Any]) -> Finding:
    """The compiled kernels that a server would load."""
    build, usable, compilers = facts["build"], facts["builds_usable"], facts["compilers"]
    compiler = compilers[0] if compilers else "no C compiler"
    rebuild = "python -m peqa_kernels.native.compile"
    if not compilers:
        rebuild = f"pip install ziglang && {rebuild}"
    if not usable:
        return Finding("kernels", "note", "there is no build for this kind of CPU: torch's own kernels serve")
    if build is None:
        found = "the compiled CPU kernels are missing or stale: torch's slower ones would serve"
        return Finding("kernels", "warning", f"{found} ({compiler})", rebuild)
    if build != usable[0]:
        found = f"{build} is used, though this CPU can run {usable[0]}"
        return Finding("kernels", "warning", f"{found} ({compiler})", rebuild)
    return Finding("kernels", "ok", f"native, {build} ({compiler})")


def driver() -> str | None:
    """GPUs and driver as NVIDIA's tool names them; None: it finds none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = probe.answer(query, GPU_SECONDS).strip().splitlines()
    except probe.ProbeFailed:
        return None
    return "; ".join(line.replace(", ", ", driver ", 1) for line in lines) or None


def gpu(facts: Mapping[str, Any], device: str, smi: str | None) -> Finding:
    """Whether the GPU that is there, or that was asked for, can be used."""
    stops: State = "problem" if device == "cuda" else "warning"
    torch, cuda, devices = facts["torch"], facts["torch_cuda"], facts["devices"]
    if not devices and smi is None:
        if device == "cuda":
            return Finding(
                "device", "problem", "no GPU is found, but --device cuda is asked for", "--device auto"
            )
        return Finding("device", "ok", "cpu; no NVIDIA GPU is found")
    if cuda is None:
        advice = "pip install torch from an index with CUDA builds, in this environment"
        return Finding("device", stops, f"{smi}, but torch {torch} is a build for the CPU", advice)
    if not devices:
        reason = facts["device_problem"] or f"torch {torch} sees no device"
        advice = f"the driver must know CUDA {cuda}; in a container: --gpus all; and see CUDA_VISIBLE_DEVICES"
        return Finding("device", stops, f"{smi}, but {reason}", advice)
    listed = ", ".join(
        f"{row['name']} (sm {row['capability']}, {gib(row['free_bytes'])} of {gib(row['total_bytes'])} free)"
        for row in devices
    )
    found = f"cuda: {listed}; torch for CUDA {cuda}" + (f"; {smi}" if smi else "")
    if device == "cpu":
        return Finding("device", "note", f"{found}; not used: --device cpu")
    if importlib.util.find_spec("triton") is None:
        return Finding("device", "problem", f"{found}; triton is missing", "pip install 'peqa-serve[gpu]'")
    if float(devices[0]["capability"]) < OLDEST_GPU:
        return Finding("device", "warning", found, f"tested from compute capability {OLDEST_GPU} on")
    return Finding("device", "ok", found)


def memory(asked: Asked) -> list[Finding]:
    """Host memory that can be had, within the container's limit."""
    try:
        total, available = host_memory()
    except (OSError, ValueError, KeyError):
        return [Finding("memory", "note", "this system does not say how much memory there is")]
    found = f"{gib(available)} of {gib(total)} free"
    weights = 0
    if asked.base is not None:
        files = asked.base.glob("*.safetensors") if asked.base.is_dir() else [asked.base]
        weights = sum(path.stat().st_size for path in files if path.is_file())
    if weights > available:
        advice = (
            f"the model alone takes {gib(weights)}: end other programs, or take a smaller model or fewer bits"
        )
        return [Finding("memory", "problem", found, advice)]
    if available - weights < LEAST_MEMORY:
        advice = "little is left for the KV cache: end other programs, or raise the container's limit"
        return [Finding("memory", "warning", found, advice)]
    return [Finding("memory", "ok", found)]


def host_memory(proc: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> tuple[int, int]:
    """Bytes in all and available. Raises `OSError`, `ValueError`, `KeyError`."""
    rows = dict(line.split(":", 1) for line in proc.read_text().splitlines() if ":" in line)
    total, available = (1024 * int(rows[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no limit ("max")
        return total, available
    return min(total, limit), min(available, max(0, limit - used))


def limits(asked: Asked) -> list[Finding]:
    """Open files that the process may have: each stream takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < LEAST_FILES:
        advice = f"ulimit -n {LEAST_FILES * 16}, or LimitNOFILE= in the unit"
        return [Finding("limits", "warning", f"at most {soft} open files (of {hard})", advice)]
    return [Finding("limits", "ok", f"{soft} open files")]


def clock(asked: Asked) -> list[Finding]:
    """The system's time, which keys, logs and certificates go by: not before anything that is installed here."""
    now = time.time()
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.rglob("*.py"))
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < newest - 60:
        advice = "set the clock (timedatectl set-ntp true): keys expire and logs are dated by it"
        return [Finding("clock", "problem", f"{found} is before this program was installed", advice)]
    try:
        synchronized = probe.answer(["timedatectl", "show", "-p", "NTPSynchronized", "--value"], 3.0).strip()
    except probe.ProbeFailed:
        synchronized = ""
    if synchronized == "no":
        return [Finding("clock", "note", f"{found}, not synchronized", "timedatectl set-ntp true")]
    return [Finding("clock", "ok", found)]
