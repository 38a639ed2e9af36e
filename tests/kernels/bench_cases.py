"""Tiny plans for the bench, the names of their rows, and a timer that says what it was told."""

from __future__ import annotations

from typing import Any

import torch

from peqa_kernels import native
from peqa_kernels.bench import cpu
from peqa_kernels.bench.case import Case
from peqa_kernels.bench.machine import Machine
from peqa_kernels.bench.row import Row
from peqa_kernels.bench.timing import Timing, Way
from peqa_kernels.bench.weights import Shape

CPU = torch.device("cpu")
MACHINE = Machine(CPU, "test", read_rate=1e9, copy_rate=0.5e9, bf16_rate=1e12)
TINY = cpu.Model(
    "tiny",
    (
        Shape((64, 32, 32), 64, group_size=32, fractional=True),
        Shape((64,), 64, group_size=32, fractional=True),
        Shape((96, 96), 64, group_size=32, fractional=True),
        Shape((64,), 96, group_size=32, fractional=True),
    ),
    layers=2,
    kv_heads=1,
    head=Shape((96,), 64, bits=8, group_size=32),
)
CPU_PLAN = cpu.CpuPlan((Shape((64,), 256),), (Shape((64,), 256, group_size=64),), TINY, span=1)


class FakeTimer:
    """Makes every call once and says what it was told: seconds by the name of the way."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.compared: list[tuple[str, ...]] = []
        self.calls: dict[str, int] = {}

    def compare(self, label: str, *ways: Way) -> dict[str, Timing]:
        for way in ways:
            for call in way.calls:
                call()
            self.calls[way.name] = len(way.calls)
        self.compared.append(tuple(way.name for way in ways))
        found = {
            way.name: self.seconds.get(way.name.replace(" ", "_").replace("-", "_"), 1e-3) for way in ways
        }
        return {name: Timing(value, value, 7) for name, value in found.items()}


def run(cases: list[Case], timer: Any, machine: Machine = MACHINE) -> dict[str, Row]:
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [row for case in cases for row in case.run(machine, timer)]
    assert len({row.name for row in rows}) == len(rows), "two rows share a name"
    return {row.name: row for row in rows}


_ops = native.load()
HAS_TILE = _ops is not None and _ops.isa.name != "amx"

CPU_NAMES = [
    *(
        f"cpu/{kind}"
        for what in ("64x256/int4-channel", "64x256/int4-g64", "tiny-step")
        for kind in (
            f"prefill/{what}/512-rows/vs-linear-bf16",
            *((f"ceiling/{what}/tile-in-first-cache/vs-linear-bf16",) if HAS_TILE else ()),
            *(
                f"decode/{what}/{rows}-rows/vs-{peer}"
                for rows in (1, 8, 32)
                for peer in ("linear-bf16", "int4pack")
            ),
            f"tasks/{what}/32-tasks/vs-1-task",
            *((f"group-tasks/{what}/32-tasks/vs-1-task",) if "g64" in what else ()),
            *(f"int8-activations/{what}/{rows}-rows/vs-linear-bf16" for rows in (1, 8, 32, 512)),
        )
    )
]
