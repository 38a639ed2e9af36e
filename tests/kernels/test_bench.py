"""The bench: bars, names, timers and JSON, with tiny shapes; the GPU's cases run on the CPU under a fake timer."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peqa_kernels.bench import attention, cli, cpu, gpu, machine
from peqa_kernels.bench.case import Case
from peqa_kernels.bench.lora import LoraSets
from peqa_kernels.bench.machine import Machine
from peqa_kernels.bench.report import Progress, print_table, write_json
from peqa_kernels.bench.row import Row
from peqa_kernels.bench.timing import Clock, GraphReplay, Timing, Way
from peqa_kernels.bench.weights import Shape, channel_bank, random_weight, task_rows

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
GPU_PLAN = gpu.GpuPlan(
    (Shape((64, 32), 256),),
    (Shape((64, 32), 256, bits=3),),
    rows=(1, 64),
    prefill=(80,),
    invariant_rows=(8,),
    group_tasks=32,
    span=1,
)


class FakeTimer:
    """Makes every call once and says what it was told: seconds by the name of the way."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self.compared: list[tuple[str, ...]] = []

    def compare(self, label: str, *ways: Way) -> dict[str, Timing]:
        for way in ways:
            for call in way.calls:
                call()
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


def test_a_row_is_judged_by_its_op_and_bar() -> None:
    assert Row("a", 2.0, "x", ">=", 2.0).ok is True
    assert Row("a", 1.99, "x", ">=", 2.0).ok is False
    assert Row("a", 1.03, "x", "<=", 1.03).ok is True
    assert Row("a", 1.04, "x", "<=", 1.03).ok is False
    assert Row("a", math.nan, "x", "<=", 1.0).ok is False
    assert Row("a", 1.0, "x", ">=").ok is None


def test_json_holds_what_programs_read(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.json"
    write_json(file, [Row("cpu/a", 2.5, "x", ">=", 2.0, {"rows": 8}), Row("cpu/b", 1.0, "GB/s", ">=")])
    first, second = json.loads(file.read_text())
    assert first == {
        "name": "cpu/a",
        "value": 2.5,
        "unit": "x",
        "op": ">=",
        "bar": 2.0,
        "ok": True,
        "rows": 8,
    }
    assert (second["bar"], second["ok"]) == (None, None)
    assert [entry.name for entry in file.parent.iterdir()] == ["rows.json"]


def test_the_bar_at_32_rows_is_the_lower_one() -> None:
    assert cpu.speedup_bar(1, 1e9, 1e9) == 2.5
    assert cpu.speedup_bar(8, 100e9, 1e9) == 2.5
    assert cpu.speedup_bar(32, 100e9, 600e9) == 2.0
    assert cpu.speedup_bar(32, 300e9, 500e9) == pytest.approx(0.9 * 500 / 300)


def test_table_prints_both_bars_and_the_count() -> None:
    out = io.StringIO()
    facts = {"full_bar": 2.0, "time_us": 12.34, "peer_us": 20.0, "of_floor": 0.5}
    rows = [Row("a", 1.7, "x", ">=", 1.6, facts), Row("b", 0.5, "x", ">=", 1.0), Row("c", 7.0, "GB/s", ">=")]
    print_table(rows, out)
    lines = out.getvalue().splitlines()
    assert ">= 1.6 (of 2)" in lines[1]
    assert lines[1].split()[-3:] == ["12.3", "20.0", "0.50"]
    assert "missed" in lines[2]
    assert "1 of 2 bars met" in out.getvalue()


CPU_NAMES = [
    *(
        f"cpu/{kind}"
        for what in ("64x256/int4-channel", "64x256/int4-g64", "tiny-step")
        for kind in (
            f"prefill/{what}/512-rows/vs-linear-bf16",
            *(
                f"decode/{what}/{rows}-rows/vs-{peer}"
                for rows in (1, 8, 32)
                for peer in ("linear-bf16", "int4pack")
            ),
            f"tasks/{what}/32-tasks/vs-1-task",
            *(f"int8-activations/{what}/{rows}-rows/vs-linear-bf16" for rows in (1, 8, 32, 512)),
        )
    )
]


def test_cpu_rows_have_their_names_and_bars() -> None:
    timer = FakeTimer(ours=1e-3, linear=2.2e-3, int4pack=0.9e-3, one=1e-3, mixed=1.02e-3, int8pack=5.0)
    rows = run(cpu.cases(CPU_PLAN), timer)
    assert list(rows) == CPU_NAMES
    barred = {name: row for name, row in rows.items() if row.bar is not None}
    assert all("g64" not in name for name in barred)
    assert len(barred) == 16
    assert barred["cpu/prefill/64x256/int4-channel/512-rows/vs-linear-bf16"].bar == 0.95
    eight = barred["cpu/decode/64x256/int4-channel/8-rows/vs-linear-bf16"]
    assert (eight.value, eight.bar, eight.ok) == (pytest.approx(2.2), 2.5, False)
    # 512 rows took as long as 32, so F.linear's rate there is 16 times the one at 32 rows and limits nothing
    full = barred["cpu/decode/64x256/int4-channel/32-rows/vs-linear-bf16"]
    assert (full.bar, full.facts["full_bar"], full.ok) == (2.0, 2.0, True)
    assert barred["cpu/decode/tiny-step/1-rows/vs-int4pack"].ok is False
    mixed = barred["cpu/tasks/tiny-step/32-tasks/vs-1-task"]
    assert (mixed.value, mixed.bar, mixed.ok) == (pytest.approx(1.02), 1.03, True)


def test_floor_counts_the_bytes_and_flops_of_a_call() -> None:
    rows = run(cpu.cases(CPU_PLAN), FakeTimer())
    facts = rows["cpu/decode/64x256/int4-channel/8-rows/vs-int4pack"].facts
    moved = 64 * 128 + 64 * 4 + 64 * 4 + 8 * (64 + 256) * 4  # codes, base scales, one task, activations
    assert facts["bytes_floor_us"] == pytest.approx(moved / 1e9 * 1e6)
    assert facts["flops_floor_us"] == pytest.approx(2 * 8 * 64 * 256 / 1e12 * 1e6)
    assert facts["floor_us"] == max(facts["bytes_floor_us"], facts["flops_floor_us"])
    assert facts["of_floor"] == pytest.approx(facts["floor_us"] / 1000)
    assert (facts["rows"], facts["tasks"], facts["device"]) == (8, 1, "test")


def test_gpu_rows_have_their_names_and_bars() -> None:
    timer = FakeTimer(ours=1e-3, linear_bf16=2e-3, int4pack=0.5e-3, linear=0.9e-3, one=1e-3, mixed=1.1e-3)
    timer.seconds |= {"lora_gathered": 1.6e-3, "plain": 1e-3, "invariant": 1.2e-3}
    rows = run(gpu.cases(GPU_PLAN), timer)
    assert list(rows) == [
        "gpu/decode/96x256/int4-channel/1-rows/of-floor",
        "gpu/decode/96x256/int4-channel/1-rows/vs-linear-bf16",
        "gpu/decode/96x256/int4-channel/1-rows/vs-int4pack",
        "gpu/decode/96x256/int4-channel/64-rows/vs-linear-bf16",
        "gpu/decode/96x256/int4-channel/64-rows/vs-int4pack",
        "gpu/tasks/96x256/int4-channel/64-tasks/vs-1-task",
        "gpu/tasks/96x256/int4-channel/32-tasks/vs-lora-r16",
        "gpu/tasks/96x256/int4-g128/32-group-sets/vs-bytes",
        "gpu/prefill/96x256/int4-channel/80-rows/vs-linear-bf16",
        "gpu/equal-bits/96x256/int4-channel/8-rows/cost",
        "gpu/decode/96x256/int3-channel/1-rows/of-floor",
        "gpu/decode/96x256/int3-channel/16-rows/of-floor",
    ]
    assert [name for name, row in rows.items() if row.bar is None] == [*rows][-3:]
    assert rows["gpu/equal-bits/96x256/int4-channel/8-rows/cost"].value == pytest.approx(1.2)
    assert rows["gpu/decode/96x256/int4-channel/1-rows/of-floor"].bar == 0.8
    assert rows["gpu/decode/96x256/int4-channel/1-rows/vs-int4pack"].ok is False
    tasks = rows["gpu/tasks/96x256/int4-channel/64-tasks/vs-1-task"]
    assert tasks.value == pytest.approx(
        1.1 - 63 * 96 * 4 / 1e9 / 1e-3
    )  # less the time of the other tasks' scales
    lora = rows["gpu/tasks/96x256/int4-channel/32-tasks/vs-lora-r16"]
    assert (lora.value, lora.bar, lora.ok) == (pytest.approx(1.6), 1.5, True)
    group = rows["gpu/tasks/96x256/int4-g128/32-group-sets/vs-bytes"]
    moved = 96 * 128 + 96 * 2 * 4 + 32 * 96 * 2 * 4 + 32 * (96 + 256) * 2
    assert group.value == pytest.approx(1e-3 / (moved / 1e9))
    assert rows["gpu/prefill/96x256/int4-channel/80-rows/vs-linear-bf16"].bar == 0.85


ATTENTION = [
    attention.AttentionShape(*counts, heads=4, kv_heads=2, d=16)
    for counts in ((2, 1, 40), (1, 24, 24), (2, 3, 33))
]


def test_attention_is_held_against_its_floor_and_torch() -> None:
    timer = FakeTimer(plain=2e-3, invariant=3e-3, torch=5e-3)
    rows = run(attention.cases(tuple(ATTENTION), span=30_000), timer)
    assert [name.removeprefix("gpu/attention/") for name in rows] == [
        "decode/4-2-heads/2-sequences-40-keys/of-floor",
        "decode/4-2-heads/2-sequences-40-keys/cost-of-equal-bits",
        "decode/4-2-heads/2-sequences-40-keys/vs-torch-side-by-side",
        "prefill-24-tokens/4-2-heads/1-sequences-24-keys/of-floor",
        "prefill-24-tokens/4-2-heads/1-sequences-24-keys/cost-of-equal-bits",
        "prefill-24-tokens/4-2-heads/1-sequences-24-keys/vs-torch-side-by-side",
        "prefill-3-tokens/4-2-heads/2-sequences-33-keys/of-floor",
        "prefill-3-tokens/4-2-heads/2-sequences-33-keys/cost-of-equal-bits",
    ]
    floor, cost, peer = list(rows.values())[:3]
    moved = 2 * (2 * 2 * 40 * 2 * 16 + 2 * 2 * 4 * 16)
    assert floor.facts["bytes_floor_us"] == pytest.approx(moved / 1e9 * 1e6)
    assert (cost.value, peer.value) == (pytest.approx(1.5), pytest.approx(2.5))
    assert ATTENTION[1].flops() == 4 * 4 * 16 * 24 * 25 / 2


@pytest.mark.parametrize("counts", [(2, 1, 48), (1, 32, 32)])
def test_torch_computes_the_same_attention(counts: tuple[int, int, int]) -> None:
    """With the blocks in order, so that the cache itself is what lies side by side."""
    shape = attention.AttentionShape(*counts, heads=4, kv_heads=2, d=16)
    plain, invariant, torch_calls = attention.calls(shape, CPU, 30_000)
    assert (
        len(plain)
        == len(invariant)
        == len(torch_calls)
        == -(-30_000 // (2 * 2 * shape.sequences * shape.keys * 32))
    )
    q, keys, values, table, *rest = plain[0].args
    in_order = torch.arange(table.numel(), dtype=torch.int32).view(table.shape)
    got = plain[0].func(q, keys, values, in_order, *rest, **plain[0].keywords)
    torch.testing.assert_close(got, torch_calls[0]().transpose(1, 2).reshape(got.shape), rtol=0.05, atol=0.02)


def test_the_large_shapes_have_the_higher_bar() -> None:
    plan = gpu.GpuPlan((Shape((32,), 8192),), rows=(1,), span=1)
    rows = run(gpu.cases(plan)[:1], FakeTimer())
    assert rows["gpu/decode/32x8192/int4-channel/1-rows/of-floor"].bar == 0.9


def test_the_real_plans_are_those_of_the_table() -> None:
    assert [shape.name for shape in gpu.PLAN.shapes] == [
        "12288x4096",
        "22016x4096",
        "24576x8192",
        "44032x8192",
    ]
    assert [shape.name for shape in cpu.PLAN.linears] == ["4096x4096", "11008x4096"]
    sizes = [shape.name for shape in cpu.SMOLLM2.linears]
    assert sizes == ["960x576", "576x576", "3072x576", "576x1536"]
    assert len(cpu.SMOLLM2.parts) == 4 * 30 + 1


def test_clock_interleaves_and_takes_turns() -> None:
    ticks = itertools.count()
    made: list[str] = []
    ways = [
        Way("a", [lambda: made.append("a0"), lambda: made.append("a1")]),
        Way("b", [lambda: made.append("b0")]),
    ]
    pauses: list[float] = []
    clock = Clock(
        0.0,
        least_rounds=3,
        sample_seconds=0.0,
        settle_seconds=0.5,
        now=lambda: float(next(ticks)),
        sleep=pauses.append,
    )
    times = clock.compare("label", *ways)
    # In each turn one call that wakes the threads, then the one that is timed.
    assert made[-8:] == ["a1", "a0", "b0", "b0"] * 2
    assert pauses == [0.5] * 6
    assert times["a"] == Timing(1.0, 1.0, 3)


def test_clock_fills_a_sample_with_short_calls() -> None:
    now, made = [0.0], [0]

    def call() -> None:
        made[0] += 1
        now[0] += 1e-4

    times = Clock(0.0, least_rounds=1, sample_seconds=1e-3, now=lambda: now[0]).compare("", Way("a", [call]))
    assert made[0] >= 10
    assert times["a"].median == pytest.approx(1e-4)


def test_a_way_may_bring_its_own_clock() -> None:
    now, booked = [0.0], [0.0]

    def call() -> None:
        now[0] += 1.0  # a whole step ...
        booked[0] += 0.25  # ... of which this is compared

    clock = Clock(0.0, least_rounds=3, now=lambda: now[0], sleep=lambda _: None)
    times = clock.compare("", Way("part", [call], lambda: booked[0]), Way("whole", [call]))
    assert (times["part"].median, times["whole"].median) == (0.25, 1.0)


class FakeCuda:
    """The parts of torch.cuda that GraphReplay uses; a call takes one second of its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.capturing: list[Any] | None = None
        self.replayed: list[int] = []
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = math.nan

            def record(self) -> None:
                self.at = fake.now

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class CUDAGraph:
            def __init__(self) -> None:
                self.calls: list[Any] = []

            def replay(self) -> None:
                fake.replayed.append(len(self.calls))
                fake.now += len(self.calls)

            def reset(self) -> None:
                self.calls = []

        class Stream:
            def wait_stream(self, _: Stream) -> None: ...

        self.Event, self.CUDAGraph, self.Stream = Event, CUDAGraph, Stream

    def current_stream(self) -> Any:
        return self.Stream()

    def stream(self, _: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.capturing = graph.calls
        yield
        self.capturing = None

    def synchronize(self) -> None: ...

    def call(self) -> None:
        if self.capturing is not None:
            self.capturing.append(1)
        else:
            self.now += 1


def test_graph_replay_times_whole_rotations() -> None:
    fake = FakeCuda()
    timer = GraphReplay(rounds=4, pass_seconds=5.0, cuda=fake)
    times = timer.compare("", Way("a", [fake.call] * 2), Way("b", [fake.call] * 6))
    assert times["a"] == Timing(1.0, 1.0, 4)  # 3 rotations of 2 calls fill 5 seconds
    assert fake.replayed[2:] == [6, 6] * 4
    assert times["b"] == Timing(1.0, 1.0, 4)


def test_gathered_adapters_follow_the_formula() -> None:
    torch.manual_seed(0)
    sets = LoraSets(Shape((32, 16), 24), 3, 4, CPU, torch.float32)
    x, row = torch.randn(2, 24), torch.tensor([2, 1], dtype=torch.int32)
    y = torch.ones(2, 48)
    sets.add_gathered(y, x, row)
    first = sets.b[2, :32] @ (sets.a[2, 0] @ x[0])
    second = sets.b[1, 32:] @ (sets.a[1, 1] @ x[1])
    torch.testing.assert_close(y[0, :32] - 1, first)
    torch.testing.assert_close(y[1, 32:] - 1, second)


def test_fused_adapters_equal_gathered_ones() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("lora_triton_checks.py")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, script, "cpu"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["shrink_kernel", "expand_kernel"])
def test_adapter_kernels_compile_for_hopper(name: str) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from peqa_kernels.bench import lora_triton

    kernel = getattr(lora_triton, name)
    constants = {"SEGMENTS": 3, "RANK": 16, "SPLITS": lora_triton.SPLITS, "BK": 256, "BN": 256}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = {**dict.fromkeys("xaby", "*bf16"), "row": "*i32", "segment_of": "*i32", "part": "*fp32"}
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_every_task_of_a_mixed_batch_has_a_row() -> None:
    shape = Shape((8,), 32)
    bank, row = channel_bank(shape, 3, CPU), task_rows(5, 3, CPU)
    assert row.tolist() == [1, 2, 3, 1, 2]
    assert bank.out_scale.shape == (4, 8)
    assert torch.equal(bank.out_scale[0], torch.ones(8))
    assert len({tuple(r.tolist()) for r in bank.out_scale}) == 4
    halves = Shape((8,), 64, group_size=32, halves=True)
    assert (shape.step_bytes(0, 3, activation=2), halves.step_bytes(0, 3, activation=2, group_sets=True)) == (
        8 * 16 + 4 * 8 * 4,
        8 * 32 + 4 * 8 * 2 * 2,
    )
    assert channel_bank(halves, 3, CPU).out_scale.dtype == torch.float16
    scales = random_weight(halves, CPU).scales
    assert torch.equal(scales, scales.half().float())
    assert random_weight(Shape((8,), 32, group_size=32, fractional=True), CPU).zeros.frac().any()


def test_the_command_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROBES", {"cpu": machine.Probe(1 << 16, (32, 32), 8, 2)})
    monkeypatch.setattr(cpu, "PLAN", CPU_PLAN)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path / "rows.json")])
    assert code == 0, err.getvalue()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in rows[3:]] == CPU_NAMES
    assert all(row["name"] in out.getvalue() for row in rows)
    for row in rows:
        assert row.keys() >= {"name", "value", "unit", "op", "bar", "ok", "device"}
        assert row["value"] > 0
    assert f"[{1 + len(cpu.cases(CPU_PLAN))}/" in err.getvalue()


def test_a_case_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(machine: Machine, timer: Any) -> list[Row]:
        raise RuntimeError("out of luck")

    def good(machine: Machine, timer: Any) -> list[Row]:
        return [Row("cpu/good", 1.0, "x", ">=", 1.0, {"device": machine.name})]

    monkeypatch.setattr(machine, "PROBES", {"cpu": machine.Probe(1 << 16, (32, 32), 8, 2)})
    monkeypatch.setattr(cpu, "cases", lambda plan: [Case("bad", broken), Case("good", good)])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path / "rows.json")])
    assert code == 1
    assert "not measured: bad" in err.getvalue()
    assert "out of luck" in err.getvalue()
    assert json.loads((tmp_path / "rows.json").read_text())[-1]["name"] == "cpu/good"


def test_without_a_gpu_only_cpu_rows_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    assert cli.main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_progress_is_one_line_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    progress = Progress(2, out)
    progress.case("one")
    progress.detail("8 rows")
    progress.end()
    assert "\n" not in out.getvalue()
    assert "one 8 rows" in out.getvalue()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_cases_run_on_a_gpu() -> None:
    device = torch.device("cuda")
    found = Machine(device, torch.cuda.get_device_name(), 4e12, 4e12, 7e14)
    plan = gpu.GpuPlan((Shape((256, 256), 512),), rows=(1, 8, 64), prefill=(512,), span=1)
    rows = run(gpu.cases(plan), GraphReplay(rounds=3), found)
    assert all(math.isfinite(row.value) and row.value > 0 for row in rows.values())
