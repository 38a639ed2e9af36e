"""What is measured on a CPU: single linears, one whole step of a small model, mixed tasks, prefill.

Activations are fp32, as the engine has them on a CPU; those of the bf16 peers are bf16, as theirs want them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from peqa_kernels import native
from peqa_kernels.bench.case import Case
from peqa_kernels.bench.machine import Machine, rotation_bytes
from peqa_kernels.bench.model_step import Model, ModelStep
from peqa_kernels.bench.row import Row
from peqa_kernels.bench.timing import Timer, Timing, Way
from peqa_kernels.bench.weights import (
    Call,
    Int4Pack,
    Shape,
    channel_bank,
    dense,
    dense_rotation,
    group_bank,
    offered,
    ours,
    random_weight,
    rotation,
    task_rows,
)
from peqa_kernels.quant_matmul import PreparedWeight

SPEEDUP = {1: 2.5, 8: 2.5, 32: 2.0}  # rows -> at least so many times as fast as F.linear in bf16
OF_LINEAR_RATE = 0.9  # … or, at 32 rows, this share of F.linear's own rate at PREFILL_ROWS
CAPPED_ROWS = 32
PREFILL_ROWS = 512
PREFILL_SHARE = 0.95
MIXED_TASKS = 32
MIXED_COST = 1.03
FP32 = 4  # bytes
PANEL, CHAIN = 32, 128  # outputs and inputs of a register tile, at most
TILE_ROUNDS = 20_000
CPU = torch.device("cpu")


@dataclass(frozen=True)
class CpuPlan:
    """Which shapes are measured."""

    linears: tuple[Shape, ...]
    informing: tuple[Shape, ...]  # measured, held against no bar
    model: Model
    rows: tuple[int, ...] = tuple(SPEEDUP)
    span: int = 0  # bytes of a rotation; 0: what this machine's caches ask for


SMOLLM2 = Model(  # as its GGUF file has it: Q4_1 linears, a Q8_0 head
    "smollm2-135m",
    (
        Shape((576, 192, 192), 576, group_size=32, fractional=True, halves=True),
        Shape((576,), 576, group_size=32, fractional=True, halves=True),
        Shape((1536, 1536), 576, group_size=32, fractional=True, halves=True),
        Shape((576,), 1536, group_size=32, fractional=True, halves=True),
    ),
    layers=30,
    kv_heads=3,
    head=Shape((49152,), 576, bits=8, group_size=32, halves=True),
)
PLAN = CpuPlan(
    linears=(Shape((4096,), 4096), Shape((11008,), 4096)),
    informing=(Shape((4096,), 4096, group_size=64), Shape((4096,), 4096, group_size=32)),
    model=SMOLLM2,
)


def cases(plan: CpuPlan) -> list[Case]:
    """Cases of the plan, in the order of the table."""
    span = plan.span or rotation_bytes(CPU)
    single = [
        Case(f"cpu {shape.name} {shape.format}", partial(_linear, plan, shape, span, shape in plan.linears))
        for shape in (*plan.linears, *plan.informing)
    ]
    return [*single, Case(f"cpu {plan.model.name} step", partial(_step, plan, span))]


def _linear(
    plan: CpuPlan, shape: Shape, span: int, barred: bool, machine: Machine, timer: Timer
) -> list[Row]:
    """Prefill, decode and mixed tasks of one linear."""
    weights, bf16 = rotation(shape, CPU, span), dense_rotation(shape, CPU, span)
    pack = Int4Pack(shape, CPU, span)
    banks = [channel_bank(shape, MIXED_TASKS, CPU) for _ in weights]

    def run(rows: int, tasks: int) -> Way:
        x = torch.randn(rows, shape.in_features)
        return Way("ours", ours(x, weights, banks, row=task_rows(rows, tasks, CPU)))

    def linear(rows: int) -> list[Call]:
        return dense(torch.randn(rows, shape.in_features).bfloat16(), bf16)

    what = f"{shape.name}/{shape.format}"
    sizes = _Sizes(shape.flops, lambda rows, tasks: shape.step_bytes(rows, tasks, activation=FP32))
    rows, rate = _prefill(what, sizes, run, linear, _tile(shape), machine, timer)
    for count in plan.rows:
        x = torch.randn(count, shape.in_features).bfloat16()
        ways = [run(count, 1), Way("linear", linear(count)), *offered("int4pack", partial(pack.calls, x))]
        times = timer.compare(f"{count} rows", *ways)
        rows += _decode(what, sizes, count, rate, times, machine)
    rows += _mixed(what, sizes, run, machine, timer)
    if shape.group_size:
        rows.append(_group_tasks(what, shape, weights, machine, timer))
    rows += _coarse(what, sizes, plan.rows, weights, run, linear, machine, timer)
    return rows if barred else [Row(r.name, r.value, r.unit, r.op, None, r.facts) for r in rows]


def _step(plan: CpuPlan, span: int, machine: Machine, timer: Timer) -> list[Row]:
    """The same for all linears of a model and its head, in one step."""
    model = plan.model
    step = ModelStep(model, span, MIXED_TASKS)
    sizes = _Sizes(
        lambda rows: sum(shape.flops(rows) for shape in model.parts),
        lambda rows, tasks: sum(s.step_bytes(rows, tasks, activation=FP32) for s in model.parts),
    )
    blocks = _Sizes(
        lambda rows: sizes.flops(rows) - model.head.flops(rows),
        lambda rows, tasks: sizes.moved(rows, tasks) - model.head.step_bytes(rows, tasks, activation=FP32),
    )
    what = f"{model.name}-step"
    run, linear = partial(step.ours, head=False), partial(step.dense, head=False)
    tile = _tile(model.linears[0])
    # prefill needs the head for its last token only
    rows, _ = _prefill(what, blocks, run, linear, tile, machine, timer)
    whole = timer.compare(f"F.linear at {PREFILL_ROWS} rows", Way("linear", step.dense(PREFILL_ROWS)))
    rate = sizes.flops(PREFILL_ROWS) / whole["linear"].median
    for count in plan.rows:
        ways = [
            step.ours(count, 1),
            Way("linear", step.dense(count)),
            *offered("int4pack", partial(step.int4pack, count, timer)),
        ]
        rows += _decode(what, sizes, count, rate, timer.compare(f"{count} rows", *ways), machine)
    rows += _mixed(what, sizes, step.ours, machine, timer)
    return rows + _coarse(what, sizes, plan.rows, step.weights, step.ours, step.dense, machine, timer)


@dataclass(frozen=True)
class _Sizes:
    flops: Callable[[int], float]  # of so many rows
    moved: Callable[[int, int], int]  # bytes of (rows, tasks)


@dataclass(frozen=True)
class _Tile:
    """A register tile that finds all it reads in the first cache level; `flops`: of a call."""

    call: Call
    flops: float


def _tile(shape: Shape) -> _Tile | None:
    """Of a weight of that format; None where products go another way."""
    ops = native.load()
    if ops is None:
        return None
    inputs = math.lcm(shape.group_size or CHAIN, CHAIN)
    weight = ops.pack(random_weight(replace(shape, segments=(PANEL,), in_features=inputs), CPU))
    products = ops.tile_products(weight, TILE_ROUNDS)
    return _Tile(partial(ops.tile_products, weight, TILE_ROUNDS), 2.0 * products) if products else None


def _prefill(
    what: str,
    sizes: _Sizes,
    run: Callable[[int, int], Way],
    linear: Callable[[int], list[Call]],
    tile: _Tile | None,
    machine: Machine,
    timer: Timer,
) -> tuple[list[Row], float]:
    """The prefill row and what its ratio could be at most, and F.linear's rate there in flop/s."""
    count = PREFILL_ROWS
    ways = [run(count, 1), Way("linear", linear(count))]
    if tile is not None:
        ways.append(Way("tile", [tile.call]))
    times = timer.compare(f"{count} rows", *ways)
    rate = sizes.flops(count) / times["linear"].median
    facts = _facts(sizes, count, 1, times["ours"], machine)
    facts["peer_us"] = times["linear"].median * 1e6
    ratio = times["linear"].median / times["ours"].median
    name = f"cpu/prefill/{what}/{count}-rows/vs-linear-bf16"
    rows = [Row(name, ratio, "x", ">=", PREFILL_SHARE, facts)]
    if tile is not None:
        most = tile.flops / times["tile"].median
        name = f"cpu/ceiling/{what}/tile-in-first-cache/vs-linear-bf16"
        found = {"device": machine.name, "time_us": times["tile"].median * 1e6, "gflops": most / 1e9}
        rows.append(Row(name, most / rate, "x", ">=", None, found))
    return rows, rate


def _decode(
    what: str, sizes: _Sizes, count: int, rate: float, times: dict[str, Timing], machine: Machine
) -> list[Row]:
    """The rows against both peers; `rate`: F.linear's flop/s at PREFILL_ROWS on the same shapes."""
    ours_time, linear = times["ours"].median, times["linear"].median
    rows = []
    for peer, label in (("linear", "linear-bf16"), ("int4pack", "int4pack")):
        if peer not in times:
            continue
        facts = _facts(sizes, count, 1, times["ours"], machine)
        facts["peer_us"] = times[peer].median * 1e6
        bar = 1.0
        if peer == "linear":
            facts |= {"full_bar": SPEEDUP[count], "linear_prefill_gflops": rate / 1e9}
            bar = speedup_bar(count, sizes.flops(count) / linear, rate)
        name = f"cpu/decode/{what}/{count}-rows/vs-{label}"
        rows.append(Row(name, times[peer].median / ours_time, "x", ">=", bar, facts))
    return rows


def speedup_bar(rows: int, linear_rate: float, prefill_rate: float) -> float:
    """How many times as fast as F.linear a decode call must be, given its flop/s now and at PREFILL_ROWS."""
    full = SPEEDUP[rows]
    return min(full, OF_LINEAR_RATE * prefill_rate / linear_rate) if rows == CAPPED_ROWS else full


def _mixed(
    what: str, sizes: _Sizes, run: Callable[[int, int], Way], machine: Machine, timer: Timer
) -> list[Row]:
    """Every row of another task, against all of one."""
    count = MIXED_TASKS
    ways = (replace(run(count, 1), name="one"), replace(run(count, count), name="mixed"))
    times = timer.compare(f"{count} tasks", *ways)
    facts = _facts(sizes, count, count, times["mixed"], machine)
    facts["peer_us"] = times["one"].median * 1e6
    ratio = times["mixed"].median / times["one"].median
    return [Row(f"cpu/tasks/{what}/{count}-tasks/vs-1-task", ratio, "x", "<=", MIXED_COST, facts)]


def _group_tasks(
    what: str, shape: Shape, weights: list[PreparedWeight], machine: Machine, timer: Timer
) -> Row:
    """Every row of another task with group scales of its own, against all of one: codes are read once, scales by all.

    The extra scales are most of what is read; the floor counts them.
    """
    count = MIXED_TASKS
    banks = [group_bank(shape, count, CPU) for _ in weights]
    x = torch.randn(count, shape.in_features)
    none = torch.zeros(count, dtype=torch.int32)
    ways = [
        Way(name, ours(x, weights, banks, row=none, group_row=task_rows(count, tasks, CPU)))
        for name, tasks in (("one", 1), ("mixed", count))
    ]
    times = timer.compare(f"{count} tasks with group scales", *ways)
    moved = shape.step_bytes(count, count, activation=FP32, group_sets=True)
    facts = machine.facts(times["mixed"].median, moved, shape.flops(count))
    facts |= {"rows": count, "tasks": count, "peer_us": times["one"].median * 1e6}
    facts["samples"] = times["mixed"].samples
    ratio = times["mixed"].median / times["one"].median
    return Row(f"cpu/group-tasks/{what}/{count}-tasks/vs-1-task", ratio, "x", "<=", None, facts)


def _coarse(
    what: str,
    sizes: _Sizes,
    counts: tuple[int, ...],
    weights: list[PreparedWeight],
    run: Callable[[int, int], Way],
    linear: Callable[[int], list[Call]],
    machine: Machine,
    timer: Timer,
) -> list[Row]:
    """The same against F.linear with activations of 8 bits, which a server is told to use; they have no bar."""
    if any(weight.backend != "native" for weight in weights):
        return []
    rows = []
    for weight in weights:
        weight.set_activation_bits(8)
    for count in (*counts, PREFILL_ROWS):
        ways = (run(count, 1), Way("linear", linear(count)))
        times = timer.compare(f"{count} rows, 8-bit activations", *ways)
        facts = _facts(sizes, count, 1, times["ours"], machine)
        facts["peer_us"] = times["linear"].median * 1e6
        name = f"cpu/int8-activations/{what}/{count}-rows/vs-linear-bf16"
        rows.append(Row(name, times["linear"].median / times["ours"].median, "x", ">=", None, facts))
    for weight in weights:
        weight.set_activation_bits(16)
    return rows


def _facts(sizes: _Sizes, rows: int, tasks: int, timing: Timing, machine: Machine) -> dict[str, Any]:
    facts = machine.facts(timing.median, sizes.moved(rows, tasks), sizes.flops(rows))
    return {"rows": rows, "tasks": tasks, **facts, "samples": timing.samples}
