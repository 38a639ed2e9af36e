"""What is measured on a GPU: decode and prefill of fused 7B and 65B shapes, many tasks, and the rivals of both.

Every case runs on any device, so that it can be proven with small shapes where there is no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from peqa_kernels.bench.case import Case
from peqa_kernels.bench.lora import LoraSets, lora_ways
from peqa_kernels.bench.machine import Machine, rotation_bytes
from peqa_kernels.bench.row import Row
from peqa_kernels.bench.timing import Call, Timer, Timing, Way
from peqa_kernels.bench.weights import (
    Int4Pack,
    Shape,
    channel_bank,
    dense,
    dense_rotation,
    group_bank,
    layout,
    offered,
    ours,
    rotation,
    task_rows,
)
from peqa_kernels.quant_matmul.tuning import Scales, bucket

if TYPE_CHECKING:
    from peqa_kernels.quant_matmul.gpu_compile import Job

SMALL_SHARE, LARGE_SHARE = 0.80, 0.90  # of the floor, below and from LARGE_IN inputs on
LARGE_IN = 8192
FLOOR_ROWS = (
    32  # decode is held against its floor up to here, against the peers up to the last of GpuPlan.rows
)
MIXED_COST = 1.02
GROUP_COST = 1.25
LORA_SPEEDUP = 1.5
LORA_RANK = 16
PREFILL_SHARE = 0.85
BF16 = 2  # bytes
MIDDLE = 0  # how the kernel holds zero points that are all the middle code, as these weights' are


@dataclass(frozen=True)
class GpuPlan:
    """Which shapes are measured, and with how many rows and tasks."""

    shapes: tuple[Shape, ...]
    informing: tuple[Shape, ...] = ()  # decode of other formats, held against no bar
    informing_rows: tuple[int, ...] = (1, 16)
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    prefill: tuple[int, ...] = (2048, 4096, 8192)
    invariant_rows: tuple[int, ...] = (1, 32, 2048)
    tasks: int = 64  # as many rows
    group_tasks: int = 32
    lora_tasks: int = 32
    group_size: int = 128
    span: int = 0  # bytes of a rotation; 0: what this machine's caches ask for


PLAN = GpuPlan(
    shapes=(
        Shape((4096,) * 3, 4096, halves=True),
        Shape((11008,) * 2, 4096, halves=True),
        Shape((8192,) * 3, 8192, halves=True),
        Shape((22016,) * 2, 8192, halves=True),
    ),
    informing=(
        Shape((8192,) * 3, 8192, bits=3, halves=True),
        Shape((8192,) * 3, 8192, bits=2, halves=True),
        Shape((8192,) * 3, 8192, group_size=128, halves=True),
    ),
)


def cases(plan: GpuPlan) -> list[Case]:
    """Cases of the plan, in the order of the table."""
    made = []
    for shape in plan.shapes:
        grouped = replace(shape, group_size=plan.group_size)
        made += [
            Case(f"gpu {shape.name} decode", partial(_decode, plan, shape)),
            Case(f"gpu {shape.name} tasks", partial(_tasks, plan, shape)),
            Case(f"gpu {shape.name} group sets", partial(_group_sets, plan, grouped)),
            Case(f"gpu {shape.name} prefill", partial(_prefill, plan, shape)),
            Case(f"gpu {shape.name} equal bits", partial(_equal_bits, plan, shape)),
        ]
    return made + [
        Case(f"gpu {shape.name} {shape.format} decode", partial(_formats, plan, shape))
        for shape in plan.informing
    ]


def jobs(plan: GpuPlan) -> list[Job]:
    """The kinds of launches of quant_matmul in the cases of the plan, each once: what can be compiled beforehand."""
    from peqa_kernels.quant_matmul.gpu_compile import Job

    asked: list[tuple[Shape, int, Scales, bool]] = []
    for shape in plan.shapes:
        for rows in (*plan.rows, plan.tasks, plan.lora_tasks, *plan.prefill[:1]):
            asked.append((shape, rows, "channel", False))
        asked += [(shape, rows, "channel", True) for rows in plan.invariant_rows]
        asked.append((replace(shape, group_size=plan.group_size), plan.group_tasks, "group", False))
    asked += [(shape, rows, "channel", False) for shape in plan.informing for rows in plan.informing_rows]
    made = [
        Job(layout(shape), MIDDLE, torch.float16, bucket(rows), torch.bfloat16, scales, None, invariant)
        for shape, rows, scales, invariant in asked
    ]
    return list(dict.fromkeys(made))


def _formats(plan: GpuPlan, shape: Shape, machine: Machine, timer: Timer) -> list[Row]:
    """Other widths and groups against their own floors."""
    device = machine.device
    weights = rotation(shape, device, _span(plan, machine))
    banks = [channel_bank(shape, 1, device) for _ in weights]
    rows = []
    for count in plan.informing_rows:
        row = task_rows(count, 1, device)
        way = Way("ours", ours(_inputs(count, shape, device), weights, banks, row=row))
        facts = _facts(shape, count, 1, timer.compare(f"{count} rows", way)["ours"], machine)
        name = f"gpu/decode/{shape.name}/{shape.format}/{count}-rows/of-floor"
        rows.append(Row(name, facts["of_floor"], "x", ">=", None, facts))
    return rows


def _decode(plan: GpuPlan, shape: Shape, machine: Machine, timer: Timer) -> list[Row]:
    """Against the floor, cuBLAS and torch's int4 op."""
    device, span = machine.device, _span(plan, machine)
    weights, bf16 = rotation(shape, device, span), dense_rotation(shape, device, span)
    pack = Int4Pack(shape, device, span)
    banks = [channel_bank(shape, 1, device) for _ in weights]
    share = LARGE_SHARE if shape.in_features >= LARGE_IN else SMALL_SHARE
    rows = []
    for count in plan.rows:
        x = _inputs(count, shape, device)
        ways = [
            Way("ours", ours(x, weights, banks, row=task_rows(count, 1, device))),
            Way("linear-bf16", dense(x, bf16)),
            *offered("int4pack", partial(pack.calls, x)),
        ]
        times = timer.compare(f"{count} rows", *ways)
        facts = _facts(shape, count, 1, times["ours"], machine)
        name = f"gpu/decode/{shape.name}/{shape.format}/{count}-rows"
        if count <= FLOOR_ROWS:
            rows.append(Row(f"{name}/of-floor", facts["of_floor"], "x", ">=", share, facts))
        for peer in ways[1:]:
            rows.append(_against(f"{name}/vs-{peer.name}", times["ours"], times[peer.name], 1.0, facts))
    return rows


def _tasks(plan: GpuPlan, shape: Shape, machine: Machine, timer: Timer) -> list[Row]:
    """As many tasks as rows against one task, and against adapters on the same int4 matmul."""
    device = machine.device
    weights = rotation(shape, device, _span(plan, machine))
    banks = [channel_bank(shape, plan.tasks, device) for _ in weights]

    def run(rows: int, tasks: int) -> list[Call]:
        return ours(_inputs(rows, shape, device), weights, banks, row=task_rows(rows, tasks, device))

    count = plan.tasks
    times = timer.compare(f"{count} tasks", Way("one", run(count, 1)), Way("mixed", run(count, count)))
    extra = (
        shape.scale_bytes * shape.out_features * (count - 1) / machine.memory_rate
    )  # the other tasks' scales
    facts = _facts(shape, count, count, times["mixed"], machine)
    one = times["one"].median
    facts |= {"peer_us": one * 1e6, "scale_bytes_us": extra * 1e6, "ratio": times["mixed"].median / one}
    name = f"gpu/tasks/{shape.name}/{shape.format}/{count}-tasks/vs-1-task"
    rows = [Row(name, (times["mixed"].median - extra) / one, "x", "<=", MIXED_COST, facts)]

    count = plan.lora_tasks
    sets = [LoraSets(shape, count, LORA_RANK, device, torch.bfloat16) for _ in weights]
    x = _inputs(count, shape, device)
    adapters = lora_ways(x, weights, sets, task_rows(count, count, device) - 1)
    times = timer.compare(f"{count} adapters", Way("ours", run(count, count)), *adapters)
    rival = min((times[way.name] for way in adapters), key=lambda timing: timing.median)
    facts = _facts(shape, count, count, times["ours"], machine)
    facts |= {f"{way.name.replace(' ', '_')}_us": times[way.name].median * 1e6 for way in adapters}
    name = f"gpu/tasks/{shape.name}/{shape.format}/{count}-tasks/vs-lora-r{LORA_RANK}"
    return [*rows, _against(name, times["ours"], rival, LORA_SPEEDUP, facts)]


def _group_sets(plan: GpuPlan, shape: Shape, machine: Machine, timer: Timer) -> list[Row]:
    """Sets with a scale per group, every row of another task, against the bytes that they take."""
    device, count = machine.device, plan.group_tasks
    weights = rotation(shape, device, _span(plan, machine))
    banks = [group_bank(shape, count, device) for _ in weights]
    row = task_rows(count, count, device)
    calls = ours(_inputs(count, shape, device), weights, banks, group_row=row)
    timing = timer.compare(f"{count} group sets", Way("ours", calls))["ours"]
    facts = _facts(shape, count, count, timing, machine, group_sets=True)
    ratio = facts["time_us"] / facts["bytes_floor_us"]
    name = f"gpu/tasks/{shape.name}/{shape.format}/{count}-group-sets/vs-bytes"
    return [Row(name, ratio, "x", "<=", GROUP_COST, facts)]


def _prefill(plan: GpuPlan, shape: Shape, machine: Machine, timer: Timer) -> list[Row]:
    """Long inputs against cuBLAS."""
    device, span = machine.device, _span(plan, machine)
    weights, bf16 = rotation(shape, device, span), dense_rotation(shape, device, span)
    banks = [channel_bank(shape, 1, device) for _ in weights]
    rows = []
    for count in plan.prefill:
        x = _inputs(count, shape, device)
        own = ours(x, weights, banks, row=task_rows(count, 1, device))
        times = timer.compare(f"{count} rows", Way("ours", own), Way("linear", dense(x, bf16)))
        facts = _facts(shape, count, 1, times["ours"], machine)
        name = f"gpu/prefill/{shape.name}/{shape.format}/{count}-rows/vs-linear-bf16"
        rows.append(_against(name, times["ours"], times["linear"], PREFILL_SHARE, facts))
    return rows


def _equal_bits(plan: GpuPlan, shape: Shape, machine: Machine, timer: Timer) -> list[Row]:
    """What the mode costs in which a row's bits do not depend on the batch."""
    device, span = machine.device, _span(plan, machine)
    plain, invariant = rotation(shape, device, span), rotation(shape, device, span)
    for weight in invariant:
        weight.set_row_invariant(True)
    banks = [channel_bank(shape, 1, device) for _ in plain]
    rows = []
    for count in plan.invariant_rows:
        x, row = _inputs(count, shape, device), task_rows(count, 1, device)
        ways = (
            Way("plain", ours(x, plain, banks, row=row)),
            Way("invariant", ours(x, invariant, banks, row=row)),
        )
        times = timer.compare(f"{count} rows, equal bits", *ways)
        facts = _facts(shape, count, 1, times["invariant"], machine)
        facts["peer_us"] = times["plain"].median * 1e6
        cost = times["invariant"].median / times["plain"].median
        name = f"gpu/equal-bits/{shape.name}/{shape.format}/{count}-rows/cost"
        rows.append(Row(name, cost, "x", "<=", None, facts))
    return rows


def _against(name: str, own: Timing, peer: Timing, bar: float, facts: dict[str, Any]) -> Row:
    """How many times as fast as the peer."""
    return Row(name, peer.median / own.median, "x", ">=", bar, {**facts, "peer_us": peer.median * 1e6})


def _facts(
    shape: Shape, rows: int, tasks: int, timing: Timing, machine: Machine, *, group_sets: bool = False
) -> dict[str, Any]:
    moved = shape.step_bytes(rows, tasks, activation=BF16, group_sets=group_sets)
    facts = machine.facts(timing.median, moved, shape.flops(rows))
    return {"rows": rows, "tasks": tasks, **facts, "samples": timing.samples}


def _inputs(rows: int, shape: Shape, device: torch.device) -> torch.Tensor:
    """Random activations, bf16 [rows, K]."""
    return torch.randn(rows, shape.in_features, device=device).bfloat16()


def _span(plan: GpuPlan, machine: Machine) -> int:
    return plan.span or rotation_bytes(machine.device)
