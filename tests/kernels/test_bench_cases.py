"""The bench's cases with tiny shapes: names, bars and floors; the GPU's run on the CPU under a fake timer."""

from __future__ import annotations

import inspect
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_cases import CPU, CPU_NAMES, CPU_PLAN, FakeTimer, run

from peqa_kernels.bench import attention, cpu, gpu
from peqa_kernels.bench.lora import LoraSets
from peqa_kernels.bench.machine import Machine
from peqa_kernels.bench.timing import GraphReplay
from peqa_kernels.bench.weights import Shape, channel_bank, offered, random_weight, task_rows
from peqa_kernels.quant_matmul import prepare

GPU_PLAN = gpu.GpuPlan(
    (Shape((64, 32), 256),),
    (Shape((64, 32), 256, bits=3),),
    rows=(1, 64),
    prefill=(80,),
    invariant_rows=(8,),
    group_tasks=32,
    span=1,
)
GPU_NAMES = [
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


def test_the_bar_at_32_rows_is_the_lower_one() -> None:
    assert cpu.speedup_bar(1, 1e9, 1e9) == 2.5
    assert cpu.speedup_bar(8, 100e9, 1e9) == 2.5
    assert cpu.speedup_bar(32, 100e9, 600e9) == 2.0
    assert cpu.speedup_bar(32, 300e9, 500e9) == pytest.approx(0.9 * 500 / 300)


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
    assert list(rows) == GPU_NAMES
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


def test_torch_is_probed_for_attention_over_blocks() -> None:
    """A CPU has none: the calls are made, as far as this torch offers them, and refused when one is tried."""
    plain = attention.calls(ATTENTION[0], CPU, 30_000)[0]
    attend = attention.paged_varlen()
    if attend is not None:
        call = attention.over_blocks(ATTENTION[0], plain)[0]
        assert call.func is attend
        inspect.signature(attend).bind(*call.args, **call.keywords)
    with attention.flash_attention_of(CPU), pytest.warns(RuntimeWarning, match="varlen_attn is left out"):
        assert offered("varlen_attn", partial(attention.over_blocks, ATTENTION[0], plain)) == []


def test_an_older_torch_has_no_attention_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "paged_varlen", lambda: None)
    with pytest.warns(RuntimeWarning, match="has no varlen_attn with a block table"):
        assert offered("varlen_attn", partial(attention.over_blocks, ATTENTION[0], [])) == []


@pytest.mark.parametrize("op", ["_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm"])
def test_a_peer_that_does_not_run_costs_its_own_rows_only(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise NotImplementedError("not on this machine")

    monkeypatch.setattr(torch.ops.aten, op, unsupported)
    with pytest.warns(RuntimeWarning, match="is left out: NotImplementedError: not on this machine"):
        rows = run([*cpu.cases(CPU_PLAN), *gpu.cases(GPU_PLAN)[:1]], FakeTimer())
    names = [*CPU_NAMES, *GPU_NAMES[:5]]
    assert list(rows) == [name for name in names if "int4pack" not in name or op == "_weight_int8pack_mm"]


def test_prefill_walks_through_as_many_weights_as_decode() -> None:
    timer = FakeTimer()
    run(gpu.cases(replace(GPU_PLAN, span=60_000))[3:4], timer)
    assert timer.calls["ours"] == -(-60_000 // GPU_PLAN.shapes[0].weight_bytes)
    assert timer.calls["linear"] == 2


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


def test_launches_that_are_compiled_beforehand_are_those_of_the_cases() -> None:
    """Each bucket of rows once for each shape, in both modes; a job's weight is held as the cases' weights are."""
    pytest.importorskip("triton")
    from peqa_kernels.quant_matmul.gpu_compile import _stand_in, example

    small = Shape((256, 256), 512, halves=True)
    plan = gpu.GpuPlan((small,), (replace(small, bits=3),), prefill=(2048, 4096))
    jobs = gpu.jobs(plan)
    asked = [(job.layout.bits, job.layout.groups, job.rows, job.scales, job.invariant) for job in jobs]
    assert len(set(asked)) == len(asked)
    assert {one[2] for one in asked if one[3:] == ("channel", False) and one[0] == 4} == {8, 16, 32, 64, 2048}
    assert {one[2] for one in asked if one[4]} == {8, 32, 2048}
    assert [one for one in asked if one[3] == "group"] == [(4, 4, 32, "group", False)]
    assert {one[2] for one in asked if one[0] == 3} == {8, 16}
    for job in jobs[:1]:
        stand_in = _stand_in(job.layout, job.zeros_mode, job.scales_dtype)
        own = prepare(random_weight(small, CPU), segments=small.segments, backend="gpu").impl
        assert stand_in.layout == own.layout
        assert (stand_in.zeros_mode, stand_in.scales.dtype) == (own.zeros_mode, own.scales.dtype)
        assert example(stand_in, 8, job.dtype, job.scales)[1].out_scale.dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_cases_run_on_a_gpu() -> None:
    device = torch.device("cuda")
    found = Machine(device, torch.cuda.get_device_name(), 4e12, 4e12, 7e14)
    plan = gpu.GpuPlan((Shape((256, 256), 512),), rows=(1, 8, 64), prefill=(512,), span=1)
    rows = run(gpu.cases(plan), GraphReplay(rounds=3), found)
    assert all(math.isfinite(row.value) and row.value > 0 for row in rows.values())
