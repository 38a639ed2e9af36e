"""Every configuration of the Triton kernel that ships, compiled for GPUs that need not be there."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from peqa_kernels.packing import packed_width
from peqa_kernels.quant_matmul import QuantizedWeight

triton = pytest.importorskip("triton")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED = {80: 163, 90: 227}  # KiB that one program may have


class Case(NamedTuple):
    """A launch: K = 4096 in groups of `group` (-1: one), fused siblings of 12288 outputs."""

    arch: int
    bits: int
    group: int
    rows: int
    scales: str = "channel"
    dtype: str = "bf16"
    zeros: int = 1  # integers
    segments: tuple[int, ...] = (12288,)
    invariant: bool = False


def layout_of_case(case: Case, k: int = 4096) -> Any:
    """How the case's weight is cut up."""
    from peqa_kernels.quant_matmul import gpu_layout

    n = sum(case.segments)
    groups = 1 if case.group == -1 else k // case.group
    empty = partial(torch.empty, device="meta")
    qweight = empty((n, packed_width(k, case.bits)), dtype=torch.uint8)
    weight = QuantizedWeight(qweight, empty((n, groups)), empty((n, groups)), case.bits, k)
    return gpu_layout.layout_of(weight, case.segments)


def gpu_of(arch: int) -> Any:
    """An A100 or an H100."""
    from peqa_kernels.quant_matmul.tile_rule import Gpu

    hopper = arch == 90
    processors, shared = (132, 228 << 10) if hopper else (108, 164 << 10)
    return Gpu("any", processors, register_products=hopper, early_launch=hopper, shared=shared)


def choices(case: Case) -> list[Any]:
    """Tiles that the rule has for a decode step of these rows, alone and with the most splits that it gives them."""
    from peqa_kernels.quant_matmul import tile_rule

    layout, fractional = layout_of_case(case), case.zeros == 2
    tiles = tile_rule.decode_tiles(layout, case.rows, case.scales, gpu_of(case.arch), fractional=fractional)
    splits = range(tile_rule.MOST_SPLITS, 1, -1)
    return [
        tile._replace(splits=number, ahead=4 if case.arch == 90 else 0)
        for tile in tiles
        for number in (1, next(n for n in splits if tile_rule.may_split(tile, n, case.rows)))
    ]


def compile_case(case: Case, tile: Any = None) -> tuple[Any, Any]:
    """The compiled kernel, and its tile: the rule's, unless another one is given."""
    from peqa_kernels.quant_matmul import gpu, gpu_kernel, tile_rule
    from peqa_kernels.quant_matmul.gpu_inputs import needs_copies

    layout, device = layout_of_case(case), gpu_of(case.arch)
    dtype = DTYPES[case.dtype]
    if tile is None:
        tile = tile_rule.tile_for(
            layout,
            case.rows,
            dtype,
            case.scales,
            device,
            invariant=case.invariant,
            fractional=case.zeros == 2,
        )
    assert not tile.dense, case
    copied = needs_copies(case.rows, totals=case.zeros == 2)
    inputs = "none" if case.scales != "channel+input" else "copies" if copied else "by row"
    constants = gpu.constants(
        layout, tile, case.zeros, dtype != torch.float32,
        inputs=inputs, has_out=True, has_group=case.scales == "group", has_bias=True,
    )  # fmt: skip
    types = dict.fromkeys(("words", "panels", "row", "group_row", "counters"), "*i32")
    types |= dict.fromkeys(("x", "y", "bias"), f"*{case.dtype}") | dict.fromkeys(("parts", "totals"), "*fp32")
    types |= {"scales": "*fp16", "zeros": "*fp32" if case.zeros == 2 else "*u8"}
    kernel = gpu_kernel.quant_matmul_kernel
    return compile_for(case.arch, kernel, constants, types, gpu.options(tile)), tile


def compile_for(
    arch: int, kernel: Any, constants: dict[str, Any], types: dict[str, str], options: dict[str, Any]
) -> Any:
    """A kernel's machine code; arguments without a type are scales of tasks if they are scales, else integers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        other = "*fp16" if name in ("out", "into", "group") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, other)
        if signature[name] != "constexpr" and name not in ("M", "count", "bank_rows", "group_rows"):
            aligned[(i,)] = [["tt.divisibility", 16]]  # as a launcher would see
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def tool(name: str, *arguments: str | Path) -> str:
    """What one of Triton's own binary tools prints."""
    import triton.backends.nvidia

    program = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def machine_code(compiled: Any, folder: Path) -> tuple[str, int]:
    """The kernel's SASS, and the bytes of stack that it takes: registers that did not suffice end there."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = tool("cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:\d+ STACK:(\d+) ", usage)
    assert found, usage
    return tool("nvdisasm", "-c", cubin), int(found[1])


def loop_instructions(sass: str) -> Counter[str]:
    """Instructions of the shortest loop with a matrix product: the loop over K."""
    lines = sass.splitlines()
    labels = {line.strip()[:-1]: i for i, line in enumerate(lines) if re.match(r"\s*\.L_x_\d+:", line)}
    jumps = [
        (labels.get(m[1], i), i) for i, s in enumerate(lines) if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", s))
    ]
    loops = [lines[a:b] for a, b in jumps if any("HGMMA" in line or "HMMA" in line for line in lines[a:b])]
    assert loops
    operation = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
    return Counter(found[1] for line in min(loops, key=len) if (found := operation.search(line)))


def check(case: Case, folder: Path, tile: Any = None) -> None:
    """No spills, and on Hopper every product takes its weights from registers."""
    compiled, tile = compile_case(case, tile)
    sass, stack = machine_code(compiled, folder)
    assert stack == 0, f"{case} {tile}: {stack} bytes of registers spilled"
    assert compiled.metadata.shared <= SHARED[case.arch] * 1024, (case, tile)
    if case.arch == 90 and case.dtype != "fp32":
        products = [line for line in compiled.asm["ttgir"].splitlines() if "warp_group_dot " in line]
        if tile.rows >= 16:
            assert "wgmma.mma_async" in compiled.asm["ptx"], (case, tile)
            assert "HGMMA" in sass, (case, tile)
        assert all("dot_op<{opIdx = 0" in line for line in products), (case, tile, products)


DECODE = [Case(arch, 4, -1, rows) for arch in (80, 90) for rows in (8, 16, 32, 64)]
QUICK = [Case(90, 4, -1, 1), Case(90, 4, 128, 512), Case(90, 3, -1, 512), Case(80, 4, 128, 16, "group")]
SHIPPED = [
    *(Case(90, bits, -1, rows) for bits in (2, 3, 4) for rows in (8, 32, 64, 512)),
    *(Case(80, bits, -1, rows) for bits in (3, 4) for rows in (16, 64, 512)),
    *(Case(90, 4, group, rows) for group in (32, 64, 128) for rows in (16, 64)),
    *(Case(90, 4, group, rows, "group") for group in (32, 64, 128) for rows in (16, 512)),
    *(Case(80, bits, 32, rows, "group") for bits in (3, 4) for rows in (16, 512)),
    *(Case(90, 4, group, rows, "channel+input") for group in (-1, 64) for rows in (16, 64)),
    *(
        Case(80, bits, group, rows, "group", zeros=2)
        for bits, group, rows in ((3, 64, 64), (3, 32, 8), (2, 64, 512))
    ),
    *(Case(80, bits, 128, 512, "group", invariant=True) for bits in (2, 3)),
    Case(80, 4, 128, 64, "channel+input"),
    *(Case(90, bits, 128, rows) for bits in (2, 3) for rows in (64, 512)),
    *(Case(arch, 8, 32, rows) for arch in (80, 90) for rows in (16, 512)),
    *(Case(90, bits, -1, rows, dtype="fp16") for bits in (2, 3, 4) for rows in (64, 512)),
    *(Case(90, 4, group, rows, zeros=2) for group in (-1, 128, 32) for rows in (16, 64, 512)),
    *(Case(arch, 4, 32, rows, "group", zeros=2) for arch in (80, 90) for rows in (8, 16, 512)),
    *(Case(90, 4, 32, rows, zeros=0) for rows in (16, 512)),
    Case(90, 4, -1, 16, "channel+input", segments=(576, 192, 192)),
    *(Case(arch, 4, group, 512, "group", invariant=True) for arch in (80, 90) for group in (-1, 128, 32)),
    *(Case(arch, 4, 32, 16, "group", dtype="fp32") for arch in (80, 90)),
]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_quick_ones_compile_without_spills(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in SHIPPED if case not in QUICK], ids=str)
def test_all_compile_without_spills(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    dict.fromkeys(
        [
            *DECODE,
            *(Case(90, 4, -1, 32, **more) for more in ({"dtype": "fp16"}, {"zeros": 2})),
            *(case for case in SHIPPED if case.rows <= 64 and not case.invariant and case.dtype != "fp32"),
        ]
    ),
    ids=str,
)
def test_whatever_the_rule_chooses_compiles_without_spills(case: Case, tmp_path: Path) -> None:
    for tile in choices(case):
        check(case, tmp_path, tile)


def test_the_rule_chooses_nothing_else() -> None:
    from peqa_kernels.quant_matmul.tile_rule import tile_for

    for case in DECODE:
        compiled = {tile._replace(splits=1) for tile in choices(case)}
        most = {tile._replace(splits=1): tile.splits for tile in choices(case)}
        for n, k in itertools.product((128, 1024, 4096, 6144, 12288, 22016, 44032), (512, 4096, 8192, 22016)):
            layout = layout_of_case(case._replace(segments=(n,)), k)
            tile = tile_for(layout, case.rows, DTYPES[case.dtype], "channel", gpu_of(case.arch))
            assert tile._replace(splits=1) in compiled, (case, n, k)
            assert tile.splits <= most[tile._replace(splits=1)], (case, n, k)


def test_two_programs_of_256_outputs_by_32_rows_share_a_processor(tmp_path: Path) -> None:
    """64 Ki registers: 128 for each of 512 threads."""
    from peqa_kernels.quant_matmul.tuning import Tile

    compiled, _ = compile_case(Case(90, 4, -1, 32), Tile(32, 256, 8, 4, 2, ahead=4))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:0 ", tool("cuobjdump", "-res-usage", cubin))
    assert found
    assert int(found[1]) <= 128
    assert 2 * (compiled.metadata.shared + 1024) <= SHARED[90] * 1024 + 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "group", "zeros"), [(4, -1, 0), (4, 32, 1), (3, 128, 1), (2, 64, 2), (8, 32, 1)]
)
@pytest.mark.parametrize("arch", [80, 90])
def test_unpacking_for_long_batches_compiles_without_spills(
    arch: int, bits: int, group: int, zeros: int, tmp_path: Path
) -> None:
    from peqa_kernels.quant_matmul import gpu_dense

    layout = layout_of_case(Case(arch, bits, group, 2048))
    constants = gpu_dense.unpack_constants(layout, zeros, assembly=True)
    types = {"words": "*i32", "scales": "*fp16", "zeros": "*fp32" if zeros == 2 else "*u8", "floats": "*bf16"}
    compiled = compile_for(arch, gpu_dense.unpack_kernel, constants, types, {"num_warps": 4})
    sass, stack = machine_code(compiled, tmp_path)
    assert stack == 0
    assert re.search(r"STG\.E\.128", sass), "whole runs of floats are written at a time"


def test_a_launch_waits_for_the_one_before_it(tmp_path: Path) -> None:
    """It may begin early, but all that it reads or writes then is the prefetch of weights."""
    compiled, tile = compile_case(Case(90, 4, -1, 16))
    assert tile.ahead == 4
    sass = machine_code(compiled, tmp_path)[0]
    before, after = sass.split("ACQBULK", 1)
    assert before.count("UBLKPF.L2") == tile.ahead
    memory = re.compile(r"\b(LDG|LDGSTS|STG|ATOMG|RED|UBLKCP)\b")
    assert not memory.search(before)
    assert memory.search(after)
    assert "PREEXIT" in after, "the launch after it may begin once this one need not wait any more"
    assert "ACQBULK" not in machine_code(compile_case(Case(80, 4, -1, 16))[0], tmp_path)[0]


@pytest.mark.parametrize(
    ("bits", "rows", "dtype", "most"),
    [
        (4, 16, "bf16", 2.45),
        (4, 32, "bf16", 2.6),
        (4, 16, "fp16", 2.25),
        (3, 16, "bf16", 2.65),
        (2, 16, "bf16", 2.5),
    ],
)
def test_instructions_per_weight(bits: int, rows: int, dtype: str, most: float, tmp_path: Path) -> None:
    """At 4.3 TB/s an H200 has 3.89 issue slots for a weight of 4 bits, 2.92 at 3 bits and 1.94 at 2 bits."""
    compiled, tile = compile_case(Case(90, bits, -1, rows, dtype=dtype))
    instructions = loop_instructions(machine_code(compiled, tmp_path)[0])
    lanes = 32 * tile.warps
    assert instructions.total() * lanes / (tile.outputs * 128) <= most, instructions
    assert instructions["I2F"] + instructions["I2FP"] == 0, "codes become floats without conversions"


@pytest.mark.parametrize("rows", [16, 64, 512])
def test_products_run_asynchronously(rows: int, tmp_path: Path) -> None:
    """The assembler waits after every single wgmma, and says so, when it cannot see that the loop runs at all."""
    compiled, _ = compile_case(Case(90, 4, -1, rows))
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    from triton.backends.nvidia.compiler import get_ptxas

    found = get_ptxas(90)
    done = subprocess.run(
        [found.path, "-arch=sm_90a", ptx, "-o", tmp_path / "again"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "serialized" not in done.stdout + done.stderr
