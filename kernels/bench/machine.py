"""Rates of the machine that the run happens on: every floor of the table comes from them."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from peqa_kernels.bench.timing import Timer, Way

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
LEAST_ROTATION = {"cpu": 96 << 20, "cuda": 192 << 20}  # bytes; 192 MiB is three times the L2 of an H200


@dataclass(frozen=True)
class Probe:
    """What a device's rates are measured on."""

    size: int  # bytes that are read and copied
    shape: tuple[int, int]  # of bf16 weights [N, K]
    rows: int
    weights: int


PROBES = {
    "cpu": Probe(256 << 20, (4096, 4096), 512, 4),
    "cuda": Probe(1 << 30, (8192, 8192), 8192, 2),
}


@dataclass(frozen=True)
class Machine:
    """One device with its measured rates."""

    device: torch.device
    name: str
    read_rate: float  # bytes/s of a sum
    copy_rate: float  # bytes/s of a copy, read and written
    bf16_rate: float  # flop/s of torch's own bf16 matmul

    @property
    def memory_rate(self) -> float:
        """Bytes/s that a kernel's reads are held against: on a GPU the copy's, on a CPU the better of the two."""
        return self.copy_rate if self.device.type == "cuda" else max(self.read_rate, self.copy_rate)

    def facts(self, seconds: float, moved_bytes: float, flops: float) -> dict[str, Any]:
        """What a row says of a call of `seconds`: its time, both floors, and the share of the floor it reaches."""
        memory = moved_bytes / self.memory_rate
        compute = flops / self.bf16_rate
        floor = max(memory, compute)
        return {
            "device": self.name,
            "time_us": seconds * 1e6,
            "bytes_floor_us": memory * 1e6,
            "flops_floor_us": compute * 1e6,
            "floor_us": floor * 1e6,
            "of_floor": floor / seconds,
            "gflops": flops / seconds / 1e9,
            "ceiling_gflops": self.bf16_rate / 1e9,
            "ceiling_gbytes": self.memory_rate / 1e9,
        }


def measure_machine(device: torch.device, timer: Timer) -> Machine:
    """Measure the rates of a device."""
    probe = PROBES[device.type]
    read, copy = memory_rates(device, timer, probe.size)
    rate = linear_rate(device, timer, probe.shape, probe.rows, probe.weights)
    return Machine(device, device_name(device), read, copy, rate)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with the number of threads that torch uses.

    A name without a number, as virtual machines have, is followed by the numbers that tell one generation from another.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    parts = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]  # of the first core
    known = {name.strip(): value.strip() for name, _, value in parts}
    model = known.get("model name") or platform.processor() or platform.machine()
    if "model name" in known and not any(letter.isdigit() for letter in model):
        model += f" (family {known.get('cpu family', '?')}, model {known.get('model', '?')})"
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def rotation_bytes(device: torch.device) -> int:
    """Bytes that weights must span so that no cache holds one until its next turn: twice the largest cache or more."""
    least = LEAST_ROTATION[device.type]
    if device.type == "cuda":
        return max(least, 3 * torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [file.read_text().strip() for file in CACHES.glob("index*/size")]
    return max([least, *(2 * 1024 * int(size[:-1]) for size in sizes if size.endswith("K"))])


def memory_rates(device: torch.device, timer: Timer, size: int) -> tuple[float, float]:
    """Bytes/s read by a sum, and read plus written by a copy, over `size` bytes."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    times = timer.compare("memory", Way("read", [source.sum]), Way("copy", [lambda: target.copy_(source)]))
    # A ceiling: what the memory gives at its best, not what neighbours left of it.
    return source.nbytes / times["read"].best, 2 * source.nbytes / times["copy"].best


def linear_rate(device: torch.device, timer: Timer, shape: tuple[int, int], rows: int, copies: int) -> float:
    """Flop/s of F.linear in bf16 at `rows` rows, over `copies` weights of `shape` [N, K]."""
    out_features, in_features = shape
    x = torch.randn(rows, in_features, device=device).bfloat16()
    weights = [torch.randn(shape, device=device).bfloat16() for _ in range(copies)]
    way = Way("linear", [partial(F.linear, x, weight) for weight in weights])
    seconds = timer.compare(f"F.linear bf16 at {rows} rows", way)["linear"].median
    return 2.0 * rows * out_features * in_features / seconds
