"""The bench's rows, table, JSON and progress, and the command that writes them."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import CPU_NAMES, CPU_PLAN

from peqa_kernels.bench import cli, cpu, machine
from peqa_kernels.bench.case import Case
from peqa_kernels.bench.machine import Machine
from peqa_kernels.bench.report import Progress, print_table, write_json
from peqa_kernels.bench.row import Row


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
        **dict.fromkeys(("device", "tasks", "time_us", "floor_us")),
    }
    assert (second["bar"], second["ok"]) == (None, None)
    assert [entry.name for entry in file.parent.iterdir()] == ["rows.json"]


def test_table_prints_both_bars_and_the_count() -> None:
    out = io.StringIO()
    facts = {"full_bar": 2.0, "time_us": 12.34, "peer_us": 20.0}
    facts |= {"floor_us": 6.17, "bytes_floor_us": 6.17, "flops_floor_us": 3.0, "of_floor": 0.5}
    facts |= {"ceiling_gbytes": 4312.0, "ceiling_gflops": 788e3}
    rows = [Row("a", 1.7, "x", ">=", 1.6, facts), Row("b", 0.5, "x", ">=", 1.0), Row("c", 7.0, "GB/s", ">=")]
    print_table(rows, out)
    lines = out.getvalue().splitlines()
    assert ">= 1.6 (of 2)" in lines[1]
    assert lines[1].split()[-6:] == ["12.3", "20.0", "6.2", "4312", "GB/s", "0.50"]
    assert "missed" in lines[2]
    assert "1 of 2 bars met" in out.getvalue()
    bound_by_products = Row("d", 1.0, "x", ">=", None, facts | {"flops_floor_us": 7.0})
    print_table([bound_by_products], out)
    assert "788000 GF/s" in out.getvalue()


def test_table_has_150_columns_whatever_a_row_is_called() -> None:
    facts = dict.fromkeys(("time_us", "peer_us", "floor_us", "bytes_floor_us"), 99999.0)
    facts |= {"flops_floor_us": 0.0, "ceiling_gbytes": 4312.0, "of_floor": 0.5, "full_bar": 2.0}
    out = io.StringIO()
    print_table(
        [Row("n" * 72, 999.0, "x", ">=", 1.73, facts), Row("m" * 90, 1.0, "x", "<=", 1.0, facts)], out
    )
    lines = out.getvalue().splitlines()
    assert max(map(len, lines[:4])) <= 150
    assert lines[2] == "m" * 90
    assert lines[3].startswith(" " * 72)
    assert len(lines[1]) == len(lines[3])


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
        assert row.keys() >= {
            "name",
            "value",
            "unit",
            "op",
            "bar",
            "ok",
            "device",
            "rows",
            "tasks",
            "time_us",
            "floor_us",
        }
        assert row["device"]
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


@pytest.mark.parametrize("only", ["", "good"])
def test_on_a_gpu_kernels_are_compiled_before_anything_is_measured(
    only: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def good(*_: object) -> list[Row]:
        events.append("measured")
        return [Row("good", 1.0, "x", ">=")]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "GraphReplay", lambda **_: None)
    monkeypatch.setattr(
        cli, "measure_machine", lambda *_: Machine(torch.device("cuda"), "test", 1.0, 1.0, 1.0)
    )
    monkeypatch.setattr(cli, "_cases", lambda _: [Case("good", good)])
    monkeypatch.setattr(cli, "compile_beforehand", lambda jobs: events.append("compiled"))
    assert cli.main(["--device", "cuda", "--only", only]) == 0
    assert events == (["measured"] if only else ["compiled", "measured"])


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


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nmodel name\t: x\n",
            "AMD EPYC (family 25, model 17)",
        ),
        ("model name\t: AMD EPYC 9R14 96-Core Processor\n\n", "AMD EPYC 9R14 96-Core Processor"),
    ],
    ids=["a virtual machine", "a named one"],
)
def test_the_name_of_a_cpu_tells_its_generation(
    cpuinfo: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    threads = torch.get_num_threads()
    assert machine.device_name(torch.device("cpu")) == f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    assert machine.device_name(torch.device("cpu")).endswith(
        f", {threads} thread{'s' if threads > 1 else ''}"
    )
