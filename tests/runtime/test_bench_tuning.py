"""The tuning benchmark: rows that are kept, tables, LoRA over the same integers, data from its origins."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peqa_kernels.bench.row import Row
from peqa_runtime.bench.tuning import bench as bench_module
from peqa_runtime.bench.tuning import commands, convert, cost
from peqa_runtime.bench.tuning.bench import Bench
from peqa_runtime.bench.tuning.cli import main
from peqa_runtime.bench.tuning.commands import Ran, run
from peqa_runtime.bench.tuning.fetch import SOURCES, Source, fetch
from peqa_runtime.bench.tuning.plan import CHOSEN, FULL, REDUCED, TASKS, WAYS, Optimizer
from peqa_runtime.bench.tuning.render import BEGIN, END, render, text_table
from peqa_runtime.bench.tuning.store import RowFile
from peqa_runtime.errors import InvalidData
from peqa_runtime.peak_memory import peak_memory
from peqa_runtime.training.data import encode_file
from peqa_runtime.training.logprobs import token_logprobs
from peqa_runtime.training.settings import TuneConfig
from peqa_runtime.training.tuning import load_tunable


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for task in TASKS.values():
        folder = tmp_path / "data" / task.folder
        folder.mkdir(parents=True)
        for name in ("train.jsonl", "dev.jsonl", "test.jsonl"):
            rows = ({"prompt": f"{i}", "completion": "x"} for i in range(400))
            (folder / name).write_text("\n".join(map(json.dumps, rows)))
    text = tmp_path / "data" / "wikitext-2"
    text.mkdir()
    for name in ("test.raw.txt", "valid.raw.txt"):
        (text / name).write_text("a text " * 5000)
    return tmp_path / "data"


class Scripted:
    """Stands in for the commands: better with every way, LoRA best but for `group`; remembers what was run."""

    values = {"base": 10.0, "channel": 46.0, "channel+input": 49.0, "group": 48.0, "lora": 50.0}  # noqa: RUF012

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __call__(self, module: str, *arguments: object) -> Ran:
        words = [str(a) for a in arguments]
        self.ran.append(" ".join([module, *words]))
        report: dict[str, Any] = {
            "seconds": 10.0,
            "held_out_loss": 1.0,
            "bytes": 1000,
            "parameters": 500,
            "rows": 2,
            "peak_memory_bytes": 2**30,
        }
        report |= {"tokens": 99, "low": 1.0, "high": 2.0}
        report["perplexity"] = 20.0 if "--scale-set" in words else 30.0
        way = (
            "lora"
            if "lora" in module
            else next((w for w in WAYS if any(f"-{w}-0" in x for x in words)), "base")
        )
        report |= dict.fromkeys(("exact_match", "bleu", "final_number"), self.values[way])
        if "--predictions" in words:
            file = Path(words[words.index("--predictions") + 1])
            file.parent.mkdir(parents=True, exist_ok=True)
            right = round(self.values[way])
            file.write_text(
                "".join(json.dumps({"stats": [float(i < right), 1.0]}) + "\n" for i in range(100))
            )
        return Ran("peqa …", report, 12.0)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    found = Scripted()
    monkeypatch.setattr(bench_module, "run", found)
    return found


def test_a_run_measures_what_is_missing_and_keeps_the_rest(
    data: Path, tmp_path: Path, scripted: Scripted
) -> None:
    plan = replace(REDUCED, parts=("perplexity", "tasks"), methods=("rtn",), tasks=("sql",))
    rows = RowFile(tmp_path / "rows.json")
    bench = Bench(data, tmp_path / "work", tmp_path / "base", plan, rows)
    for cell in bench.cells():
        found = cell.rows()
        assert tuple(row.name for row in found) == cell.names
        rows.add(found)
    assert rows.value("tuning/perplexity/4bit/tuned-against-float") == 1.0
    assert rows.value("tuning/task/sql/channel-gain-of-lora") == pytest.approx(36 / 40)
    best = rows.rows["tuning/task/sql/best-gain-of-lora"]
    assert (best["value"], best["kind"], best["ok"]) == (pytest.approx(39 / 40), "channel+input", True)
    assert best["difference"] == pytest.approx(-1.0)
    assert best["low"] <= -1 <= best["high"]
    tuned = rows.rows["tuning/task/sql/lora/seed0"]
    assert {
        "command",
        "train_command",
        "date",
        "device",
        "seed",
        "bytes_per_task",
        "peak_memory_bytes",
    } <= tuned.keys()
    again = RowFile(tmp_path / "rows.json")
    assert all(cell.is_done(again) for cell in replace_rows(bench, again).cells())
    del again.rows["tuning/perplexity/float/before"]
    left = [cell.names for cell in replace_rows(bench, again).cells() if not cell.is_done(again)]
    assert left == [("tuning/perplexity/float/before",)]
    same_rows = [line for line in scripted.ran if "--eval" in line and "sql" in line]
    assert len({line.split("--eval ")[1].split(" ")[0] for line in same_rows}) == 1


def test_other_settings_measure_anew_and_the_goals_with_them(
    data: Path, tmp_path: Path, scripted: Scripted
) -> None:
    plan = replace(REDUCED, parts=("tasks",), tasks=("sql",))
    rows = RowFile(None)
    for cell in Bench(data, tmp_path / "work", tmp_path / "base", plan, rows).cells():
        rows.add(cell.rows())
    scripted.values = {**scripted.values, "lora": 46.0}
    measured = []
    for cell in Bench(data, tmp_path / "w", tmp_path / "b", replace(plan, task_steps=2.0), rows).cells():
        if not cell.is_done(rows):
            measured.append(cell.names)
            rows.add(cell.rows())
    assert ("tuning/task/sql/base",) not in measured, "which no training changes"
    assert {names[0].split("/")[3] for names in measured} == {*WAYS, "channel-gain-of-lora"}
    assert rows.value("tuning/task/sql/channel-gain-of-lora") == 1.0


def replace_rows(bench: Bench, rows: RowFile) -> Bench:
    return Bench(bench.data, bench.work, bench.base, bench.plan, rows)


def test_a_stopped_benchmark_stops_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(real(*arguments, **options))
        return started[0]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.subprocess, "Popen", start, raising=True)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            run("http.server", 0)  # which would go on for ever
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert started[0].returncode == -signal.SIGTERM


def test_the_sweep_decides_the_optimizer(data: Path, tmp_path: Path, scripted: Scripted) -> None:
    rows = RowFile(None)
    bench = Bench(data, tmp_path / "work", tmp_path / "base", replace(FULL, tasks=("intents",)), rows)
    trials = [cell for cell in bench.cells() if "sweep" in cell.names[0]]
    counts = {way: sum(f"/{way}/" in cell.names[0] for cell in trials) for way in WAYS}
    assert len({*counts.values()}) == 1, "as many trials for each way"
    assert len(trials) == sum(counts.values()) >= 4 * len(WAYS)
    for cell in trials:
        (row,) = cell.measure()
        rows.add([replace(row, value=0.5)] if "channel/lr0.03" in row.name else [row])
    assert bench._optimizer(TASKS["intents"], "channel") == Optimizer(0.03)
    assert "--lr 0.03 --schedule cosine --beta2 0.999" in " ".join(scripted.ran)
    assert bench._optimizer(TASKS["sql"], "channel") == CHOSEN["channel"], "recorded, where none was swept"


def test_what_is_missing_or_unknown_is_said(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "restaurant8k-slots" / "test.jsonl").unlink()
    base = str(tmp_path)
    for arguments, message in (
        (["run", str(data), "--base", base, "--work", base], "test.jsonl is missing: `python -m"),
        (["run", str(data), "--base", base, "--work", base, "--only", "speed"], "no part 'speed': use cost,"),
        (["run", str(data), "--base", base, "--work", base, "--bits", "4,x"], "--bits takes numbers"),
        (["render", str(tmp_path / "none.json"), "x.md"], "no such file"),
        (["run", str(data), "--document", str(data / "wikitext-2" / "test.raw.txt")], "must hold the lines"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InvalidData, match="no rows of a benchmark"):
        RowFile(tmp_path / "broken.json")


def test_tables_stand_between_the_marks(data: Path, tmp_path: Path, scripted: Scripted) -> None:
    plan = replace(REDUCED, parts=("perplexity", "sweep", "tasks"), methods=("rtn",), seeds=(0,))
    plan = replace(plan, text_kinds=("channel", "group"), tasks=("sql",))
    rows = RowFile(None)
    for cell in Bench(data, tmp_path / "w", tmp_path / "b", plan, rows).cells():
        rows.add(cell.rows())
    facts = {"date": "2026-01-01", "device": "d", "command": "c"}
    rows.add([Row("tuning/cost/peak-memory-against-lora", 0.5, "x", "<=", 1.0, facts)])
    document = tmp_path / "results.md"
    document.write_text(f"# R\n\nbefore\n{BEGIN}\nold\n{END}\nafter\n")
    render(rows.rows.values(), document)
    text = document.read_text()
    assert text.startswith("# R\n\nbefore\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| float | channel | 30.00 | 20.00 |" in text
    assert "| 3bit-g64-rtn | group | 30.00 | 20.00 |" in text
    assert "`tuning/perplexity/3bit/tuned-against-float-group` | 1 x |" in text
    assert "| sql | lora | 50.0 [1.0, 2.0] | 2 | 1 kB | 500 | 1.07 GB |" in text
    assert text.count("\n### ") == 5
    rows_of_sweep = [
        line for line in text.splitlines() if line.startswith("| sql | channel | 0.001: 1.0000 · ")
    ]
    assert len(rows_of_sweep) == 1
    assert rows_of_sweep[0].count("|") == 8
    assert "| 0 | 2" in rows_of_sweep[0], "seed and date"
    assert "tuning/task/sql/best-gain-of-lora" in text_table(rows.rows.values())
    render(rows.rows.values(), document)
    assert document.read_text() == text, "twice is once"
    document.write_text("no marks")
    with pytest.raises(InvalidData, match="must hold the lines"):
        render([], document)


def test_lora_starts_at_the_same_integers_and_learns(tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peqa_runtime.bench.tuning.lora import merge, tune_lora, with_lora

    tunable = load_tunable(tiny_base, device="cpu")
    ids = tunable.encode("the cat sat on")
    before = token_logprobs(tunable, [ids])[0]
    parameters = with_lora(tunable)
    assert token_logprobs(tunable, [ids])[0] == pytest.approx(before, abs=1e-4)
    linears = tunable.manifest.linears.values()
    assert sum(p.numel() for p in parameters) == sum(16 * (s.in_features + s.out_features) for s in linears)
    assert {p.dtype for p in parameters} == {torch.float32}
    file = tmp_path / "r.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{i} is", "completion": "odd"}) for i in range(24)))
    rows = encode_file(file, tunable)
    config = TuneConfig(
        steps=12, learning_rate=5e-3, warmup_steps=1, batch_rows=4, check_every=4, compute="float32"
    )
    result = tune_lora(tunable, parameters, config, rows, rows, progress=False)
    assert result.held_out_loss is not None
    assert result.held_out_loss < result.train_loss
    assert result.best_step in (4, 8, 12)
    assert all(p.requires_grad == ("lora_" in n) for n, p in tunable.model.named_parameters())
    learned = token_logprobs(tunable, [ids])[0]
    assert learned != pytest.approx(before, abs=1e-2)
    merge(tunable, load_tunable(tiny_base, device="cpu"))
    assert token_logprobs(tunable, [ids])[0] == pytest.approx(learned, abs=1e-4)


def test_the_cost_of_both_ways_is_measured_on_the_same_batch(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    peaks = {"channel": 10, "lora": 20, "lora-our-attention": 20}
    monkeypatch.setattr(cost, "peak_bytes", lambda base, way, **_: peaks[way])
    rows = {row.name: row for row in cost.measure(tiny_base, rows=2, tokens=16, steps=2, device="cpu")}
    seconds = {way: rows[f"tuning/cost/{way}/seconds-per-step"].value for way in cost.WAYS}
    ratio = rows["tuning/cost/steps-per-second-against-lora"]
    assert ratio.value == pytest.approx(seconds["lora"] / seconds["channel"])
    assert (ratio.op, ratio.bar) == (">=", 1.2)
    assert rows["tuning/cost/peak-memory-against-lora"].value == 0.5
    assert 1 << 20 < peak_memory(torch.device("cpu")) < 1 << 40


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on this machine, and the folder that it serves."""
    folder = tmp_path / "origin"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()
    thread.join()


def test_data_is_fetched_once_and_checked(origin: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = origin
    published = b'{"question": "q", "answer": "a #### 1"}\n'
    made = b'{"prompt": "q", "completion": "a #### 1"}\n'
    (folder / "train.jsonl").write_bytes(published)
    digests = [hashlib.sha256(blob).hexdigest() for blob in (published, made)]
    source = Source("gsm8k/train.jsonl", f"{url}/train.jsonl", digests[0], digests[1], convert.gsm8k, "MIT")
    told: list[str] = []
    fetch(tmp_path / "data", sources=[source], say=told.append)
    assert (tmp_path / "data" / "gsm8k" / "train.jsonl").read_bytes() == made
    (folder / "train.jsonl").write_bytes(published + b" ")
    fetch(tmp_path / "data", sources=[source], say=told.append)
    assert told[1] == "gsm8k/train.jsonl: there already"
    with pytest.raises(InvalidData, match="is not the file that was published"):
        fetch(tmp_path / "other", sources=[source])
    (folder / "train.jsonl").write_bytes(published)
    with pytest.raises(InvalidData, match="is not the file that is expected"):
        fetch(tmp_path / "other", sources=[replace(source, made_sha256="0" * 64)])
    with pytest.raises(InvalidData, match=r"cannot be fetched from .*404"):
        fetch(tmp_path / "other", sources=[replace(source, url=f"{url}/none")])
    assert not list((tmp_path / "other").rglob("*"))


def test_every_file_of_the_benchmark_has_an_origin() -> None:
    names = {source.name for source in SOURCES}
    assert {f"{task.folder}/{part}.jsonl" for task in TASKS.values() for part in ("train", "test")} <= names
    assert {"wikitext-2/test.raw.txt", "wikitext-2/valid.raw.txt", "wikisql/dev.jsonl"} <= names
    assert all(len(source.made_sha256) == 64 and source.licence for source in SOURCES)


def test_published_files_become_rows() -> None:
    def rows(made: bytes) -> list[dict[str, Any]]:
        return [json.loads(line) for line in made.splitlines()]

    slots = [
        {
            "userInput": {"text": "for 2 at 8"},
            "context": {"requestedSlots": ["time"]},
            "labels": [
                {"slot": "people", "valueSpan": {"startIndex": 4, "endIndex": 5}},
                {"slot": "time", "valueSpan": {"startIndex": 9, "endIndex": 10}},
            ],
        },
        {"userInput": {"text": "hello"}},
    ]
    assert rows(convert.restaurant8k(json.dumps(slots).encode())) == [
        {"prompt": "for 2 at 8", "requested": ["time"], "completion": '{"people": "2", "time": "8"}'},
        {"prompt": "hello", "requested": [], "completion": "{}"},
    ]
    assert rows(convert.e2e_test(b'mr,ref\n"a[b], c[d]",one\n"a[b], c[d]",two\n')) == [
        {"prompt": "a[b], c[d]", "completion": "one", "references": ["one", "two"]}
    ]
    assert sorted(r["prompt"] for r in rows(convert.banking77(b"text,category\nx,a\ny,b\n"))) == ["x", "y"]
    assert convert.git_blob(json.dumps({"content": base64.b64encode(b"raw").decode()}).encode()) == b"raw"
    query = 'SELECT MAX TABLEalias0.POINTS_FIELD FROM TABLE AS TABLEalias0 WHERE TABLEalias0.NAME_FIELD = "var0" AND '
    query += "TABLEalias0.LOST_FIELD < var1 ;"
    plain = convert.plain_query(query, {"var0": ' "Ann  B" ', "var1": "3"})
    assert plain == 'SELECT MAX(points) FROM t WHERE name = "Ann B" AND lost < 3'


def test_the_selection_of_wikisql_has_every_row() -> None:
    counts = {split: len(convert.read_selection(split)) for split in convert.WIKISQL_SPLITS}
    assert counts == {"train": 7673, "dev": 485, "test": 956}
    assert convert._permuted(["a", "b", "c"], 0) == ["a", "b", "c"]
    assert len({tuple(convert._permuted(["a", "b", "c"], rank)) for rank in range(6)}) == 6
