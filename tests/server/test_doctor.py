"""Every check of `peqa doctor`, whole and with something broken."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import shutil
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from peqa_server.app import create_loading_app
from peqa_server.doctor import examination, machine, probe, serving, software, storage
from peqa_server.doctor.finding import Asked, Finding

FACTS: dict[str, Any] = {
    "torch": "2.13.0+cpu", "torch_cuda": None, "devices": [], "device_problem": None,
    "builds_usable": ["avx512", "avx2"], "build": "avx512", "compilers": ["/usr/bin/cc"],
}  # fmt: skip
H100 = {"name": "H100", "capability": "9.0", "free_bytes": 70 << 30, "total_bytes": 80 << 30}
ON_GPU = FACTS | {"torch": "2.13.0", "torch_cuda": "13.0", "devices": [H100]}
SMI = "NVIDIA H100, driver 580.1"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def is_broken(finding: Finding, state: str, *words: str) -> None:
    """The finding has this state, says these words, and says what to do."""
    assert finding.state == state, finding
    text = f"{finding.found} {finding.advice}"
    assert all(word in text for word in words), finding
    assert finding.advice, finding


# software


def test_packages_of_this_installation_are_fine() -> None:
    python, *packages = software.packages(Asked(Path()))
    assert python.state == "ok"
    assert [finding.state for finding in packages] == ["ok"]
    assert "torch 2." in packages[0].found


@pytest.mark.parametrize(
    ("versions", "state", "words"),
    [
        ({"transformers": "4.9", "torch": "2.13.0+cpu"}, "warning", ("transformers is 4.9", ">=5.17")),
        ({"torch": "2.13.0+cpu"}, "problem", ("transformers is missing", "pip install 'transformers")),
        ({"transformers": "5.20", "torch": "2.13.0", "triton": "4.1"}, "warning", ("triton is 4.1",)),
    ],
)
def test_wrong_packages(versions: dict[str, str], state: str, words: tuple[str, ...]) -> None:
    wanted = [
        "torch<3,>=2.11",
        "transformers<6,>=5.17",
        'triton<4,>=3.6; extra == "gpu"',
        'pytest; extra == "dev"',
    ]
    (finding,) = software.compared(wanted, versions.get)
    is_broken(finding, state, *words)


def test_a_misspelt_variable() -> None:
    known = frozenset({"PEQA_PORT", "PEQA_TASK_ROWS"})
    asked = Asked(
        Path(), environ={"PEQA_TASKROWS": "9", "PEQA_PORT": "1", "PATH": "/"}, known_variables=known
    )
    (finding,) = software.environment(asked)
    is_broken(finding, "warning", "PEQA_TASKROWS", "PEQA_TASK_ROWS?")


def test_traces_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(Path(), environ={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"})
    assert software.traces(asked)[0].state == "ok"
    assert software.traces(Asked(Path()))[0].found == "not asked for"
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda name: None)
    is_broken(software.traces(asked)[0], "problem", "otel")


# machine


def test_the_machine_that_the_tests_run_on() -> None:
    findings = machine.processor_and_devices(Asked(Path()))
    assert [finding.name for finding in findings] == ["processor", "kernels", "device"]
    assert all(finding.state != "problem" for finding in findings)


def test_torch_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = machine.processor_and_devices(Asked(Path()))
    is_broken(finding, "problem", "signal 4")


def test_a_container_with_less_than_its_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.cpu_quota(tmp_path) == 0.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cpu_quota(tmp_path) is None
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.5)
    is_broken(machine.processor(FACTS), "warning", "gets 0.5")


def test_busy_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    monkeypatch.setattr(os, "getloadavg", lambda: (1000.0, 0.0, 0.0))
    is_broken(machine.processor(FACTS), "warning", "load 1000")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.0, 0.0))
    assert machine.processor(FACTS).state == "ok"


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"build": None}, ("missing or stale", "native.compile")),
        ({"build": None, "compilers": []}, ("no C compiler", "ziglang")),
        ({"build": "avx2"}, ("avx2 is used", "avx512")),
    ],
)
def test_kernels_that_are_not_the_best(facts: dict[str, Any], words: tuple[str, ...]) -> None:
    is_broken(machine.kernels(FACTS | facts), "warning", *words)
    assert machine.kernels(FACTS).state == "ok"


@pytest.mark.parametrize(
    ("facts", "device", "smi", "state", "words"),
    [
        (FACTS, "cuda", None, "problem", ("no GPU",)),
        (FACTS, "auto", SMI, "warning", ("build for the CPU", "CUDA builds")),
        (FACTS, "cuda", SMI, "problem", ("build for the CPU",)),
        (ON_GPU | {"devices": []}, "auto", SMI, "warning", ("sees no device", "CUDA 13.0")),
        (
            ON_GPU | {"devices": [], "device_problem": "driver too old"},
            "cuda",
            SMI,
            "problem",
            ("driver too old",),
        ),
        (ON_GPU | {"devices": [H100 | {"capability": "7.5"}]}, "auto", SMI, "warning", ("sm 7.5", "8.0")),
    ],
)
def test_gpus_that_cannot_be_used(
    facts: dict[str, Any], device: str, smi: str | None, state: str, words: tuple[str, ...]
) -> None:
    is_broken(machine.gpu(facts, device, smi), state, *words)


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.gpu(ON_GPU, "auto", SMI).state == "ok"
    assert machine.gpu(ON_GPU, "cpu", SMI).state == "note"
    assert machine.gpu(FACTS, "auto", None).state == "ok"
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    is_broken(machine.gpu(ON_GPU, "auto", SMI), "problem", "triton", "gpu")


def test_a_driver_tool_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(machine, "GPU_SECONDS", 0.3)
    began = time.monotonic()
    assert machine.driver() is None
    assert time.monotonic() - began < 5
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 580.1'\n")
    monkeypatch.setattr(machine, "GPU_SECONDS", 5.0)
    assert machine.driver() == SMI


def test_memory_within_the_containers_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    assert machine.host_memory(meminfo, tmp_path) == (16 << 30, 8 << 30)
    (tmp_path / "memory.max").write_text(f"{4 << 30}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 30}\n")
    assert machine.host_memory(meminfo, tmp_path) == (4 << 30, 3 << 30)


def test_a_model_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(3 << 30)  # sparse
    for available, state in ((2 << 30, "problem"), (7 << 29, "warning"), (8 << 30, "ok")):
        monkeypatch.setattr(machine, "host_memory", lambda n=available: (8 << 30, n))
        (finding,) = machine.memory(Asked(Path(), base=tmp_path))
        assert finding.state == state
    monkeypatch.setattr(machine, "host_memory", lambda: (8 << 30, 2 << 30))
    is_broken(machine.memory(Asked(Path(), base=tmp_path))[0], "problem", "3.0 GiB")


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (256, 4096))
    is_broken(machine.limits(Asked(Path()))[0], "warning", "256", "LimitNOFILE")


def test_a_clock_that_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.clock(Asked(Path()))[0].state in ("ok", "note")
    monkeypatch.setattr(machine.time, "time", lambda: 1_000_000_000.0)
    is_broken(machine.clock(Asked(Path()))[0], "problem", "2001-09-09", "timedatectl")


# storage


def test_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fine,) = storage.home(Asked(tmp_path / "a" / "b"))
    assert fine.state == "ok"
    assert "will be made" in fine.found
    assert not (tmp_path / "a").exists()
    file = tmp_path / "file"
    file.touch()
    is_broken(storage.home(Asked(file))[0], "problem", "no folder")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
        is_broken(storage.home(Asked(tmp_path))[0], "problem", "cannot be written", "chown")
    usage = storage.shutil.disk_usage(tmp_path)
    for free, state in ((1 << 20, "problem"), (200 << 20, "warning")):
        monkeypatch.setattr(storage.shutil, "disk_usage", lambda _, n=free: usage._replace(free=n))
        is_broken(storage.home(Asked(tmp_path))[0], state, "make room")


def test_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(
        _: str, home: str, base: str, store: str, *, seconds: float
    ) -> dict[str, Any]:  # the same without a process
        from peqa_runtime.diagnosis import served_facts

        return served_facts(Path(home), Path(base) if base else None, Path(store) if store else None)

    monkeypatch.setattr(probe, "facts", here)
    (demo,) = storage.base_and_store(Asked(tmp_path))
    assert demo.state == "note"
    assert "98 MB" in demo.found
    (missing,) = storage.base_and_store(Asked(tmp_path, base=tmp_path / "nope"))
    is_broken(missing, "problem", "does not exist", "base folder")
    floats = tmp_path / "floats"
    floats.mkdir()
    is_broken(
        storage.base_and_store(Asked(tmp_path, base=floats))[0], "problem", "config.json", "base folder"
    )
    (floats / "config.json").write_text("{}")
    (made,) = storage.base_and_store(Asked(tmp_path, base=floats))
    assert (made.state, "makes a base of it" in made.found) == ("note", True)
    usage = storage.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    is_broken(storage._demo(tmp_path), "problem", "make room")


@pytest.fixture
def filled(tiny_base: Path, tmp_path: Path) -> Path:
    """A store with two tasks."""
    from peqa_runtime.model import read_manifest
    from peqa_runtime.scales.scale_store import ScaleStore
    from peqa_runtime.scales.synthetic import fill_store

    store = ScaleStore(tmp_path / "store", read_manifest(tiny_base), durable=False)
    assert len(list(fill_store(store, 2))) == 2
    store.close()
    return tmp_path / "store"


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_whole_store_is_read_and_not_touched(filled: Path, tiny_base: Path) -> None:
    from peqa_runtime.diagnosis import served_facts

    before = tree(filled)
    facts = served_facts(filled.parent, tiny_base, filled)
    assert tree(filled) == before
    assert (facts["store"]["tasks"], facts["store"]["read"], facts["store"]["num_unusable"]) == (2, 2, 0)
    (finding,) = storage.store(filled, facts["store"])
    assert (finding.state, "2 tasks" in finding.found) == ("ok", True)


def test_a_copy_of_the_tasks_is_a_backup(filled: Path, tiny_base: Path, tmp_path: Path) -> None:
    from peqa_runtime import diagnosis
    from peqa_runtime.model import read_manifest
    from peqa_runtime.scales.scale_store import ScaleStore

    shutil.copytree(filled / "tasks", tmp_path / "copy" / "tasks")
    facts = diagnosis.store_facts(tmp_path / "copy", tiny_base)
    assert (facts["tasks"], facts["num_unusable"]) == (2, 0)
    restored = ScaleStore(tmp_path / "copy", read_manifest(tiny_base))
    before = ScaleStore(filled, read_manifest(tiny_base))
    assert [restored.load(task).revision for task in restored.tasks()] == [
        before.load(task).revision for task in before.tasks()
    ]


def test_a_store_with_everything_wrong(
    filled: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peqa_runtime import diagnosis

    one, two = sorted(filled.rglob("*.safetensors"))
    data = bytearray(one.read_bytes())
    data[-1] ^= 1
    one.write_bytes(data)
    two.unlink()
    (filled / "quarantine" / "old.safetensors").touch()
    facts = diagnosis.store_facts(filled, tiny_base)
    assert facts["num_unusable"] == 2
    reasons = " ".join(facts["unusable"].values())
    assert "damaged" in reasons
    assert "missing" in reasons
    counted, *faults = storage.store(filled, facts)
    assert counted.state == "ok"
    for fault in faults:
        is_broken(fault, "warning", "again")
    assert "1 damaged files" in faults[-1].found
    quick = diagnosis.store_facts(filled, tiny_base, read_seconds=-1)  # sizes only
    assert (quick["read"], quick["num_unusable"]) == (0, 1)
    many = facts | {"unusable": {f"t{i}": "gone" for i in range(20)}, "num_unusable": 500}
    assert any("480 more" in finding.found for finding in storage.store(filled, many))
    future = storage.store(filled, facts | {"latest": time.time() + 1e6})[0]
    is_broken(future, "warning", "future", "clock")
    is_broken(storage.store(filled, {"error": "input/output error"})[0], "problem", "backup")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "lock")
    is_broken(storage.store(filled, facts)[0], "problem", "lock cannot be written", "chown")


def test_a_store_of_another_base(filled: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peqa_runtime import diagnosis, model

    manifest = model.read_manifest(tiny_base)
    other = dataclasses.replace(manifest, base_digest="ff" * 32)
    monkeypatch.setattr(model, "read_manifest", lambda _: other)
    facts = diagnosis.store_facts(filled, tiny_base)
    assert facts["num_unusable"] == 2
    assert manifest.base_digest[:12] in next(iter(facts["unusable"].values()))


# serving


def test_a_free_port() -> None:
    (finding,) = serving.port(Asked(Path(), port=free_port()))
    assert finding.state == "ok"


def test_a_port_of_somebody_else() -> None:
    with socket.socket() as silent:  # accepts, and never says a word
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        (finding,) = serving.port(Asked(Path(), port=silent.getsockname()[1]))
        assert time.monotonic() - began < 3 * serving.SECONDS
    is_broken(finding, "problem", "in use", "--port")
    (finding,) = serving.port(Asked(Path(), host="192.0.2.1"))
    is_broken(finding, "problem", "cannot listen")


@pytest.fixture
def stranger() -> Iterator[int]:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_a_port_of_another_web_server(stranger: int) -> None:
    (finding,) = serving.port(Asked(Path(), port=stranger))
    is_broken(finding, "problem", "not as a peqa server")


def test_a_peqa_server_that_runs(server: Any) -> None:
    port = int(server.url.rpartition(":")[2])
    found = serving.port(Asked(Path(), port=port))
    assert (found[0].state, found[0].found.endswith(": ready")) == ("ok", True)
    is_broken(found[1], "warning", "foreign", "another base")
    server.tasks.set_aside["sql"] = "its answers were NaN"
    aside = serving.port(Asked(Path(), port=port))[1]
    is_broken(aside, "warning", "sql is in quarantine", "NaN", "rollback sql")


def test_peqa_servers_that_do_not_serve(live: Any, run_app: Any) -> None:
    dead = live()
    dead.engine.alive = False
    (finding,) = serving.port(Asked(Path(), port=int(dead.url.rpartition(":")[2])))
    is_broken(finding, "problem", "broken", "restart")
    url, _ = run_app(create_loading_app())
    found = serving.port(Asked(Path(), port=int(url.rpartition(":")[2])))
    assert [finding.state for finding in found] == ["ok", "note"]
    assert "starting" in found[0].found


def test_keys(tmp_path: Path) -> None:
    assert serving.keys(Asked(Path()))[0].state == "ok"
    open_to_all = Asked(Path(), host="0.0.0.0")
    is_broken(serving.keys(open_to_all)[0], "problem", "other machines", "--api-key-file")
    accepted = dataclasses.replace(open_to_all, environ={"PEQA_INSECURE_OPEN_TO_NETWORK": "true"})
    is_broken(serving.keys(accepted)[0], "warning", "may do everything")
    path = tmp_path / "keys"
    is_broken(serving.keys(Asked(Path(), key_file=path))[0], "problem", "cannot be read")
    path.write_text("a-key-of-some-length-0123456789\n")
    path.chmod(0o600)
    (fine,) = serving.keys(Asked(Path(), key_file=path))
    assert (fine.state, "1 keys" in fine.found) == ("ok", True)
    path.chmod(0o644)
    is_broken(serving.keys(Asked(Path(), key_file=path))[0], "warning", "644", "chmod 600")
    path.write_text("{ damaged")
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    is_broken(serving.keys(Asked(Path(), key_file=path))[0], "problem", "peqa keys make")


# all together


def test_a_check_that_hangs_or_fails_takes_nothing_with_it() -> None:
    def hang(asked: Asked) -> list[Finding]:
        threading.Event().wait(30)
        return []

    def fail(asked: Asked) -> list[Finding]:
        raise KeyError("gone")

    began = time.monotonic()
    found = examination.examine(
        Asked(Path(), timeout=0.3),
        {"slow": hang, "bad": fail, "good": lambda _: [Finding("good", "ok", "fine")]},
    )
    assert time.monotonic() - began < 3
    assert [(finding.name, finding.state) for finding in found] == [
        ("slow", "problem"), ("bad", "problem"), ("good", "ok"),
    ]  # fmt: skip
    assert "0.3 s" in found[0].found
    assert "KeyError" in found[1].found


def test_probes_end_in_time() -> None:
    began = time.monotonic()
    with pytest.raises(probe.ProbeFailed, match=r"within 0\.2 s"):
        probe.answer(["sleep", "30"], 0.2)
    assert time.monotonic() - began < 5
    with pytest.raises(probe.ProbeFailed, match="not installed"):
        probe.answer(["no-such-program-here"], 1)
    with pytest.raises(probe.ProbeFailed, match="status 3: boo"):
        probe.answer(["sh", "-c", "echo boo >&2; exit 3"], 5)


def doctor(*arguments: str, **environ: str) -> Any:
    from peqa_server.cli import app

    return CliRunner().invoke(app, ["doctor", *arguments], env=environ)


def test_the_command_ends_with_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Asked] = []
    answer = [Finding("a", "ok", "fine"), Finding("b", "warning", "odd", "look at it")]

    def examine(asked: Asked) -> list[Finding]:
        seen.append(asked)
        return answer

    monkeypatch.setattr(examination, "examine", examine)
    done = doctor("--home", str(tmp_path), "--port", "81", PEQA_STORE="tasks", PEQA_STOER="x")
    assert done.exit_code == 0, done.output
    assert "→ look at it" in done.stdout
    assert "Nothing stops serving. 1 to look at." in done.stdout
    (asked,) = seen
    assert (asked.home, asked.port, asked.store) == (tmp_path, 81, Path("tasks"))
    assert {"PEQA_TASK_ROWS", "PEQA_SERVER", "PEQA_HOME"} <= asked.known_variables
    assert "PEQA_STOER" not in asked.known_variables
    answer.append(Finding("c", "problem", "broken", "mend it"))
    done = doctor("--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["ok"] is False
    assert told["findings"][2] == {"name": "c", "state": "problem", "found": "broken", "advice": "mend it"}


@pytest.mark.slow
def test_the_whole_doctor(filled: Path, tiny_base: Path) -> None:
    done = doctor(str(tiny_base), "--store", str(filled), "--home", str(filled.parent), "--json",
                  "--port", str(free_port()))  # fmt: skip
    told = json.loads(done.stdout)
    names = {finding["name"] for finding in told["findings"]}
    assert {
        "python",
        "processor",
        "device",
        "memory",
        "home",
        "base",
        "store",
        "port",
        "keys",
        "clock",
    } <= names
    assert done.exit_code == 0, [finding for finding in told["findings"] if finding["state"] == "problem"]
