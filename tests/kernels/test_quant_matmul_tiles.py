"""The choice of tiles: the rule, the tables of measured ones, the trial of each; and what the layout costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import interpreter
import pytest
import torch

from peqa_kernels.quant_matmul import QuantizedWeight

pytest.importorskip("triton")
from peqa_kernels.packing import packed_width
from peqa_kernels.quant_matmul.gpu_device import GpuDevice
from peqa_kernels.quant_matmul.gpu_layout import Layout, layout_of, padded_outputs
from peqa_kernels.quant_matmul.tile_rule import Gpu, cost, may_split, tile_for
from peqa_kernels.quant_matmul.tuning import (
    BUCKETS,
    TABLES,
    Measured,
    Scales,
    Tile,
    TileTable,
    line_of,
    table_path,
)

H200 = Gpu("NVIDIA H200", 132, register_products=True, early_launch=True)
KINDS: tuple[Scales, ...] = ("base", "channel", "channel+input", "group")


def layout(n: int, k: int, bits: int = 4, group: int = -1, segments: tuple[int, ...] = ()) -> Layout:
    groups = 1 if group == -1 else k // group
    scales = torch.empty((n, groups), device="meta")
    qweight = torch.empty((n, packed_width(k, bits)), dtype=torch.uint8, device="meta")
    return layout_of(QuantizedWeight(qweight, scales, scales, bits, k), segments or (n,))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("n", "k", "group"), [(12288, 4096, -1), (4096, 11008, 128), (576, 1536, 32), (576, 576, 64)]
)
def test_a_weight_takes_its_bits_and_no_more(n: int, k: int, group: int, bits: int) -> None:
    assert layout(n, k, bits, group).num_bytes * 8 == bits * n * k


@pytest.mark.parametrize("k", [4096, 11008, 576, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_a_split_has_a_step(k: int, kind: Scales) -> None:
    for n, rows in ((128, 1), (12288, 1), (4096, 33), (44032, 64), (576, 8192), (4096, 8192)):
        for invariant in (False, True):
            cut = layout(n, k)
            tile = tile_for(cut, rows, torch.bfloat16, kind, H200, invariant=invariant)
            assert (tile.splits - 1) * -(-cut.tiles // tile.splits) < cut.tiles, (tile, cut)
            assert tile.outputs in cut.widths


def test_few_panels_split_k_to_fill_the_processors() -> None:
    """4096 outputs are 32 panels for 132 processors."""
    assert tile_for(layout(4096, 4096), 8, torch.bfloat16, "channel", H200).splits >= 4
    assert tile_for(layout(44032, 8192), 8, torch.bfloat16, "channel", H200).splits <= 4
    assert tile_for(layout(44032, 8192), 4096, torch.bfloat16, "channel", H200).splits == 1


def test_a_processor_loads_what_it_has_under_way_however_few_the_others_are() -> None:
    """96 programs, two loads of 8 KiB each: a third of what the memory could deliver is asked for."""
    cut = layout(12288, 4096)
    floor = 12288 * 4096 / 2 / H200.processors
    shallow = Tile(8, 128, 4, 3)
    assert floor / cost(shallow, cut, 8, H200) < 0.4
    for deeper in (shallow._replace(stages=4), shallow._replace(splits=4)):
        assert cost(deeper, cut, 8, H200) < 0.75 * cost(shallow, cut, 8, H200)
    assert tile_for(cut, 32, torch.bfloat16, "channel", H200).stages >= 4


@pytest.mark.parametrize(
    ("n", "k", "rows", "least"),
    [
        *((12288, 4096, rows, least) for rows, least in ((8, 0.79), (16, 0.70), (32, 0.56))),
        *((22016, 4096, rows, least) for rows, least in ((8, 0.92), (16, 0.84), (32, 0.74))),
        *((24576, 8192, rows, least) for rows, least in ((8, 0.98), (16, 0.93), (32, 0.88))),
        *((44032, 8192, rows, least) for rows, least in ((8, 0.99), (16, 0.99), (32, 0.91))),
    ],
)
def test_what_the_rule_expects_of_its_choices(n: int, k: int, rows: int, least: float) -> None:
    """Bytes over cost, by the rule's own figures, none of them measured: the bars are 0.8 at 4096 and 0.9 at 8192."""
    tile = tile_for(layout(n, k), rows, torch.bfloat16, "channel", H200)
    assert n * k / 2 / H200.processors / cost(tile, layout(n, k), rows, H200) >= least, tile


def test_no_program_adds_up_more_sums_than_its_registers_hold() -> None:
    assert may_split(Tile(32, 256, 8, 4), 4, 32)
    assert not may_split(Tile(32, 256, 8, 4), 5, 32)
    assert not may_split(Tile(8, 128, 4, 4), 2, 72), "there are counters for eight row tiles"
    assert may_split(Tile(64, 256, 8, 4), 1, 4096)
    assert not may_split(Tile(64, 128, 4, 4), 4, 64), "40 bytes spilled"


def test_shared_memory_bounds_the_programs_of_a_processor() -> None:
    """Four programs of 8 rows fit, but not on a GPU with 100 KiB of it."""
    from peqa_kernels.quant_matmul.tile_rule import programs_per_processor

    small = Gpu("NVIDIA L4", 58, register_products=False, early_launch=False, shared=100 << 10)
    assert programs_per_processor(Tile(8, 128, 4, 4), layout(4096, 4096), H200) == 4
    assert programs_per_processor(Tile(8, 128, 4, 4), layout(4096, 4096), small) == 3


def test_launches_begin_early_where_the_gpu_can() -> None:
    cut = layout(12288, 4096)
    older = Gpu("NVIDIA A100", 108, register_products=False, early_launch=False)
    for kind in KINDS:
        assert tile_for(cut, 8, torch.bfloat16, kind, H200).ahead > 0
        assert tile_for(cut, 8, torch.bfloat16, kind, older).ahead == 0
    assert tile_for(cut, 512, torch.bfloat16, "channel", H200).ahead == 0
    assert tile_for(cut, 8, torch.float32, "channel", H200).ahead == 0


def test_wide_tiles_read_the_inputs_of_many_activations_half_as_often() -> None:
    assert tile_for(layout(44032, 8192), 64, torch.bfloat16, "channel", H200).outputs == 256
    assert tile_for(layout(44032 + 128, 8192), 64, torch.bfloat16, "channel", H200).outputs == 128
    assert tile_for(layout(44032, 8192, 4, 128), 64, torch.bfloat16, "channel", H200).outputs == 128
    assert tile_for(layout(44032, 8192), 1, torch.bfloat16, "channel", H200).outputs == 128


def test_zero_points_that_are_no_integers_take_a_smaller_tile_where_there_are_groups() -> None:
    """Triton 3.6 spills 24 bytes of the larger one, and 8 of a decode step's four groups a tile."""
    device = GpuDevice(H200, TileTable([]), assembly=True)
    for cut, rows, kind, usual, smaller in (
        (layout(12288, 4096, 4, 128), 512, "channel", (128, 128), (64, 128)),
        (layout(12288, 4096, 4, 32), 8, "group", (8, 128), (16, 64)),
        (layout(12288, 4096), 512, "channel", (128, 128), (128, 128)),
    ):
        for fractional, want in ((False, usual), (True, smaller)):
            tile = device.choose(cut, rows, torch.bfloat16, kind, fractional=fractional)  # type: ignore[arg-type]
            assert (tile.rows, tile.outputs) == want


def test_long_batches_make_floats_once() -> None:
    cut = layout(4096, 4096)
    for kind in KINDS:
        assert tile_for(cut, 4096, torch.bfloat16, kind, H200).dense == (kind != "group")
        assert not tile_for(cut, 512, torch.bfloat16, kind, H200).dense
        assert not tile_for(cut, 4096, torch.bfloat16, kind, H200, invariant=True).dense
    assert not tile_for(cut, 4096, torch.float32, "channel", H200).dense, "fp32 keeps its 22 bits"


@pytest.mark.parametrize("by_segment", [False, True])
@pytest.mark.parametrize("segments", [(4096, 1024, 1024), (22016, 22016), (70, 10, 33), (128,)])
def test_panels_of_floats_cover_all_outputs(segments: tuple[int, ...], by_segment: bool) -> None:
    from peqa_kernels.quant_matmul.gpu_dense import PANEL, dense_panels

    n, k = sum(segments), 8192
    scales = torch.empty((n, 1), device="meta")
    qweight = torch.empty((n, packed_width(k, 4)), dtype=torch.uint8, device="meta")
    cut = layout_of(QuantizedWeight(qweight, scales, scales, 4, k), segments)
    source = padded_outputs(cut).tolist()
    seen = []
    for at, first, count, segment in dense_panels(cut, by_segment=by_segment):
        assert count * k <= PANEL
        assert at % 64 == 0
        assert source[at : at + count] == list(range(first, first + count))
        if by_segment:
            assert sum(segments[:segment]) <= first
            assert first + count <= sum(segments[: segment + 1])
        seen += range(first, first + count)
    assert seen == list(range(n))


@pytest.mark.parametrize("group", [-1, 32, 128])
def test_the_invariant_mode_has_one_tile(group: int) -> None:
    tiles = {
        tile_for(layout(4096, 4096, 4, group), rows, torch.bfloat16, kind, H200, invariant=True)._replace(
            in_turn=False, ahead=0
        )
        for rows in BUCKETS
        for kind in KINDS
    }
    assert len(tiles) == 1, tiles


def test_a_measured_tile_comes_before_the_rule(tmp_path: Path) -> None:
    cut, measured = layout(12288, 4096), Tile(16, 128, 4, 5, 3)
    line = line_of(cut, 13, torch.bfloat16, "channel", measured, 12.5)
    path = TileTable([line]).save(H200.name, tmp_path)
    assert path == table_path(H200.name, tmp_path) == tmp_path / "nvidia-h200.json"
    assert json.loads(path.read_text())["tiles"][0]["us"] == 12.5
    device = GpuDevice(H200, TileTable.load(H200.name, tmp_path), assembly=True)
    assert device.choose(cut, 16, torch.bfloat16, "base") == measured
    for other in (
        device.choose(cut, 17, torch.bfloat16, "channel"),
        device.choose(cut, 16, torch.float16, "channel"),
        device.choose(cut, 16, torch.bfloat16, "group"),
        device.choose(layout(12288, 4096, 3), 16, torch.bfloat16, "channel"),
        device.choose(cut, 16, torch.bfloat16, "channel", invariant=True),
    ):
        assert other != measured
    assert TileTable.load("another GPU", tmp_path).lines == []


@pytest.mark.parametrize(
    ("segments", "measured"),
    [
        ((832, 64, 64), Tile(16, 128, 4, 4)),  # panels of 64: filling up to 128 would cost a fifth
        ((640, 192, 128), Tile(16, 256, 8, 4)),  # a sibling ends within two panels
    ],
)
def test_a_measured_tile_that_does_not_fit_the_siblings_is_passed_over(
    segments: tuple[int, ...], measured: Tile
) -> None:
    """The table's key has the outputs of a whole launch, not where its siblings end."""
    line = line_of(layout(960, 4096), 16, torch.bfloat16, "channel", measured, 5.0)
    device = GpuDevice(H200, TileTable([line]), assembly=True)
    cut = layout(960, 4096, segments=segments)
    assert measured.outputs not in cut.widths
    assert device.choose(cut, 16, torch.bfloat16, "channel") == tile_for(
        cut, 16, torch.bfloat16, "channel", H200
    )
    single = layout(1024, 4096)
    line = line_of(single, 16, torch.bfloat16, "channel", measured, 5.0)
    device = GpuDevice(H200, TileTable([line]), assembly=True)
    assert device.choose(single, 16, torch.bfloat16, "channel") == measured


def test_a_new_measurement_replaces_the_old_one() -> None:
    cut = layout(12288, 4096)
    lines = [
        line_of(cut, 16, torch.bfloat16, "channel", Tile(16, 128, 4, stages, 3), 9.0) for stages in (3, 4)
    ]
    other = line_of(cut, 64, torch.bfloat16, "channel", Tile(64, 128, 4, 3), 9.0)
    table = TileTable([lines[0], other]).with_line(lines[1])
    assert len(table.lines) == 2
    found = table.find(cut, 16, torch.bfloat16, "channel")
    assert found is not None
    assert found.stages == 4


def test_tuning_wants_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from peqa_kernels.quant_matmul import prepare
    from peqa_kernels.quant_matmul.cli import main, random_weight
    from peqa_kernels.quant_matmul.gpu_compile import Compilers
    from peqa_kernels.quant_matmul.gpu_tune import Wanted, candidates, neighbours, tune

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--shapes", "64x64"]) == 2
    assert "torch sees none" in capsys.readouterr().err
    prepared = prepare(random_weight(256, 512, 4, 128, "cpu"), backend="gpu")
    with pytest.raises(ValueError, match="CUDA device"):
        tune(prepared, [Wanted(16)], Compilers(), Measured())
    weight = prepared.impl
    for rows, least in ((16, 6), (2048, 4)):
        first = weight.tile(rows, torch.bfloat16, "channel")  # type: ignore[attr-defined]
        tried = candidates(weight, first, rows)  # type: ignore[arg-type]
        assert tried[0] == first
        assert len(set(tried)) >= least
        assert {tile.dense for tile in tried} == {False, rows == 2048} | {first.dense}
        assert all((tile.splits - 1) * -(-4 // tile.splits) < 4 for tile in tried), "every part has a step"
    assert neighbours(first) == []
    assert {tile.stages for tile in neighbours(Tile(16, 128, 4, 3, ahead=4))} == {2, 3, 4, 5}
    assert {tile.ahead for tile in neighbours(Tile(16, 128, 4, 3, ahead=4))} == {0, 2, 4, 8}


def test_times_outlast_an_interruption(tmp_path: Path) -> None:
    """But for the line that was being written, and not for another compiler."""
    path, cut = tmp_path / "tables" / "measured.jsonl", layout(12288, 4096)
    launch = (cut, 16, torch.bfloat16, "channel")
    measured = Measured(path, "triton 3.6.0")
    measured.add(*launch, Tile(16, 128, 4, 4), 7.25)
    measured.add(*launch, Tile(16, 256, 8, 9), None)
    path.write_text(path.read_text() + '{"bits": 4, "gro')
    known = Measured(path, "triton 3.6.0")
    assert known.of(*launch) == {Tile(16, 128, 4, 4): 7.25, Tile(16, 256, 8, 9): None}
    assert known.of(cut, 32, torch.bfloat16, "channel") == {}
    assert Measured(path, "triton 3.8.0").of(*launch) == {}
    known.forget()
    assert not path.exists()
    assert known.of(*launch) == {}


@pytest.mark.slow
def test_processes_compile_each_job_once() -> None:
    """Here the work is a function of Python's that gives its argument back as the reason of a failure."""
    from peqa_kernels.quant_matmul.gpu_compile import Compilers

    with Compilers(1, work=repr) as compilers:
        assert compilers.compile([3, 4, 3]) == ["3", "4"]  # type: ignore[list-item]
        assert compilers.compile([4, 5]) == ["5"]  # type: ignore[list-item]


@pytest.mark.slow
def test_a_process_that_dies_costs_time_only() -> None:
    import os

    from peqa_kernels.quant_matmul.gpu_compile import Compilers

    with Compilers(1, work=os._exit) as compilers:  # type: ignore[arg-type]
        with pytest.warns(RuntimeWarning, match="has died"):
            assert compilers.compile([3]) == []  # type: ignore[list-item]
        assert compilers.compile([4]) == []  # type: ignore[list-item]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tuning_on_the_gpu(tmp_path: Path) -> None:
    from peqa_kernels.quant_matmul.cli import main

    assert main(["--shapes", "1024x512", "--rows", "16", "--folder", str(tmp_path)]) == 0
    assert TileTable.load(torch.cuda.get_device_name(), tmp_path).lines[0]["us"] > 0


@pytest.mark.parametrize(
    ("triton", "numpy", "fails"),
    [("3.8.1", "2.4.0", True), ("3.8.1", "1.26.4", False), ("3.10.0", "2.5", False)],
)
def test_versions_are_compared_as_numbers(triton: str, numpy: str, fails: bool) -> None:
    assert interpreter.fails(triton, numpy) == fails


@pytest.mark.parametrize("text", ["", "[]", '{"tiles": [{"bits": 4}]}', '{"tiles": 3}'])
def test_a_damaged_table_is_named(text: str, tmp_path: Path) -> None:
    table_path("x", tmp_path).write_text(text)
    with pytest.raises(ValueError, match="is no table of tiles"):
        TileTable.load("x", tmp_path)


def test_a_tile_that_computes_wrongly_is_replaced_with_a_warning() -> None:
    device = GpuDevice(H200, TileTable([]), assembly=True)
    tile = Tile(64, 128, 4, 3, 2)
    tried: list[Tile] = []

    def wrong(one: Tile) -> bool:
        tried.append(one)
        return one.stages == 1

    with pytest.warns(RuntimeWarning, match="computes wrong results on NVIDIA H200"):
        chosen = device.proven("shape", tile, wrong)
    assert (chosen.rows, chosen.stages, chosen.splits) == (8, 1, 1)
    assert device.proven("shape", tile, wrong) == chosen
    assert len(tried) == 2, "each shape is tried once, and its replacement"
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="another version of Triton"):
        device.proven("other", tile, lambda one: False)


def faults(folder: Path) -> list[str]:
    """What is wrong with the tables of a folder: files that no GPU's name leads to, tiles that no launch can have."""
    found = []
    for path in folder.glob("*.json"):
        name = json.loads(path.read_text())["gpu"]
        if table_path(name, folder) != path:
            found.append(f"{path.name} is not where {name} looks")
        table = TileTable.load(path.stem, folder)
        if not table.lines:
            found.append(f"{path.name} is empty")
        device = GpuDevice(replace(H200, name=name), table, assembly=True)
        for line in table.lines:
            cut = layout(line["n"], line["k"], line["bits"], line["group"])
            dtype = getattr(torch, line["dtype"])
            if device.choose(cut, line["rows"], dtype, line["scales"]) != Tile(*line["tile"]):
                found.append(f"{path.name}: {line}")
    return found


def test_shipped_tables_can_be_used() -> None:
    assert faults(TABLES) == []


def test_faults_of_tables_are_found(tmp_path: Path) -> None:
    cut = layout(12288, 4096, 4, 128)
    good = line_of(cut, 64, torch.bfloat16, "channel", Tile(32, 128, 4, 3, 2, ahead=4), 9.0)
    path = TileTable([good]).save(H200.name, tmp_path)
    assert faults(tmp_path) == []
    for tile in (Tile(32, 512, 8, 3), Tile(32, 128, 4, 3, splits=33)):
        bad = good | {"tile": list(tile)}
        TileTable([good, bad | {"rows": 16}]).save(H200.name, tmp_path)
        assert faults(tmp_path) == [f"{path.name}: {bad | {'rows': 16}}"]
    TileTable([]).save(H200.name, tmp_path)
    assert faults(tmp_path) == [f"{path.name} is empty"]
    TileTable([good]).save(H200.name, tmp_path)
    path.rename(tmp_path / "h200.json")
    assert faults(tmp_path) == ["h200.json is not where NVIDIA H200 looks"]
