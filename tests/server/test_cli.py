"""The `peqa` command: tasks against a live server, help for people, and one sentence for what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from server_stubs import MANIFEST, ByteTokenizer, Live, StubEngine, StubTasks, revision_of, wait_until
from typer.testing import CliRunner

from peqa_runtime.engine.config import EngineConfig
from peqa_server.app import create_loading_app
from peqa_server.cli import app
from peqa_server.services import ServedModel, Services
from peqa_server.settings import ServerSettings
from peqa_server.start.run import DrainingServer


def peqa(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env=environment)


def file_noting(task: str) -> bytes:
    """The start of a file that notes its task, as the stub library never looks at it."""
    header = json.dumps({"__metadata__": {"task": task}}).encode()
    return struct.pack("<Q", len(header)) + header


def commands() -> list[tuple[str, Any]]:
    found = []

    def walk(name: str, command: Any) -> None:
        for child, sub in getattr(command, "commands", {}).items():
            walk(f"{name} {child}", sub)
        if not getattr(command, "commands", None):
            found.append((name, command))

    walk("peqa", typer.main.get_command(app))
    return found


@pytest.mark.parametrize(("name", "command"), commands(), ids=lambda v: v if isinstance(v, str) else "")
def test_every_command_explains_itself(name: str, command: Any) -> None:
    done = peqa(*name.split()[1:], "--help")
    assert done.exit_code == 0
    text = re.sub(r"\s+", " ", done.output)
    assert f"Example: {name}" in text
    for parameter in command.params:
        if parameter.name != "help":
            variable = parameter.envvar
            assert variable, f"{parameter.name} has no variable"
            assert str(variable).startswith("PEQA_")


def test_verbs_are_all_there() -> None:
    names = {name for name, _ in commands()}
    verbs = {"serve", "import", "quantize", "train", "eval", "generate"}
    tasks = {f"tasks {verb}" for verb in ("ls", "push", "rm", "rollback", "pull")}
    assert names >= {f"peqa {verb}" for verb in verbs | tasks}


def test_help_tells_the_defaults_that_the_engine_has() -> None:
    serve = next(command for name, command in commands() if name == "peqa serve")
    config = EngineConfig()
    for parameter in serve.params:
        default = getattr(config, parameter.name, None)
        if parameter.default is None and default is not None:
            assert f"Default: {int(default)}." in parameter.help, parameter.name


def test_tasks_push_ls_pull_rollback_rm(server: Live, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"SET mine")
    at = ("--server", server.url)
    pushed = peqa("tasks", "push", str(file), *at)
    assert (pushed.exit_code, pushed.output) == (0, f"mine is at revision {revision_of(b'SET mine')}\n")
    file.write_bytes(b"SET mine 2")
    again = peqa("tasks", "push", str(file), "--name", "mine", "--json", PEQA_SERVER=server.url)
    assert json.loads(again.output)["revision"] == revision_of(b"SET mine 2")
    listed = peqa("tasks", "ls", *at)
    assert revision_of(b"SET mine 2")[:12] in listed.output
    assert "unusable: foreign" in listed.stderr
    server.tasks.set_aside["mine"] = "task 'mine' is in quarantine"
    assert "quarantined: task 'mine' is in quarantine" in peqa("tasks", "ls", *at).stderr
    server.tasks.set_aside.clear()
    assert {t["task"] for t in json.loads(peqa("tasks", "ls", "--json", *at).stdout)["data"]} == {
        "sql",
        "qa",
        "mine",
    }
    out = tmp_path / "out.safetensors"
    assert peqa("tasks", "pull", "mine", "-o", str(out), *at).exit_code == 0
    assert out.read_bytes() == b"SET mine 2"
    assert peqa("tasks", "rollback", "mine", *at).exit_code == 0
    peqa("tasks", "pull", "mine", "-o", str(out), *at)
    assert out.read_bytes() == b"SET mine"
    assert peqa("tasks", "rm", "mine", *at).output == "mine is removed\n"
    gone = peqa("tasks", "rm", "mine", *at)
    assert gone.exit_code == 1
    assert "no task 'mine'" in gone.stderr
    assert peqa("tasks", "rm", "../sql", *at).exit_code == 1
    conflict = peqa("tasks", "rm", "sql", "--if-match", "0000", *at)
    assert conflict.exit_code == 1
    assert server.tasks.info("sql")


def test_push_takes_the_noted_name(live: Any, tmp_path: Path) -> None:
    server = live()
    server.tasks.upload = lambda task, data, if_match=None: (
        server.tasks.history.setdefault(task, []) or _stop(task)
    )

    def _stop(task: str) -> None:
        from peqa_runtime.errors import InvalidScaleSet

        raise InvalidScaleSet(f"seen as {task}")

    file = tmp_path / "other.safetensors"
    file.write_bytes(file_noting("noted"))
    assert "seen as noted" in peqa("tasks", "push", str(file), "--server", server.url).stderr


def test_tasks_say_what_is_wrong(live: Any, tmp_path: Path) -> None:
    nobody = peqa("tasks", "ls", "--server", "http://127.0.0.1:9")
    assert nobody.exit_code == 1
    assert "no server answers" in nobody.stderr
    missing = peqa("tasks", "push", str(tmp_path / "no-file"))
    assert (missing.exit_code, "cannot be read" in missing.stderr) == (1, True)
    (tmp_path / "keys").write_text("k\n")
    locked = live(settings=ServerSettings(key_file=tmp_path / "keys"))
    assert "API key" in peqa("tasks", "ls", "--server", locked.url).stderr
    assert peqa("tasks", "ls", "--server", locked.url, PEQA_API_KEY="k").exit_code == 0


@pytest.mark.parametrize(
    ("given", "environment"),
    [
        (
            [
                "--no-prefix-cache",
                "--max-waiting-tokens",
                "99",
                "--activation-bits",
                "8",
                "--kv-cache-dtype",
                "float32",
            ],
            {},
        ),
        (
            [],
            {"PEQA_PREFIX_CACHE": "0", "PEQA_MAX_WAITING_TOKENS": "99", "PEQA_ACTIVATION_BITS": "8"}
            | {"PEQA_KV_CACHE_DTYPE": "float32"},
        ),
        (
            *(["--no-prefix-cache", "--max-waiting-tokens", "99", "--enforce-eager", "--row-invariant"],),
            {"PEQA_ACTIVATION_BITS": "8", "PEQA_KV_CACHE_DTYPE": "float32"},
        ),
    ],
)
def test_serve_hands_settings_to_the_engine(
    monkeypatch: pytest.MonkeyPatch, given: list[str], environment: dict[str, str]
) -> None:
    seen: list[EngineConfig] = []

    def serve(options: Any, *_: object) -> int:
        seen.append(EngineConfig(**options.engine))
        return 0

    monkeypatch.setattr("peqa_server.cli._serve", serve)
    assert peqa("serve").exit_code == 0
    assert peqa("serve", *given, **environment).exit_code == 0
    assert (seen[0].prefix_cache, seen[0].max_waiting_tokens) == (True, EngineConfig().max_waiting_tokens)
    assert (seen[1].prefix_cache, seen[1].max_waiting_tokens) == (False, 99)
    assert not seen[0].enforce_eager
    assert not seen[0].row_invariant
    assert seen[1].enforce_eager == seen[1].row_invariant == ("--enforce-eager" in given)
    assert [config.activation_bits for config in seen] == [16, 8]
    assert [config.kv_cache_dtype for config in seen] == ["auto", "float32"]
    for name in ("fp16", "bfloat16"):
        refused = peqa("serve", "--kv-cache-dtype", name)
        assert (refused.exit_code, "float32" in refused.stderr) == (2, True)
    assert len(seen) == 2


def test_serve_names_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = peqa("serve", "--port", str(taken.getsockname()[1]), "--home", str(tmp_path))
    assert done.exit_code == 1
    assert done.stderr.startswith("error: cannot listen on 127.0.0.1:")
    assert "--port" in done.stderr


def test_serve_refuses_a_key_file_without_keys(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n")
    done = peqa("serve", "--port", "0", "--api-key-file", str(tmp_path / "keys"))
    assert (done.exit_code, "no key" in done.stderr) == (1, True)
    done = peqa("serve", "--port", "0", "--api-key-file", str(tmp_path / "absent"))
    assert done.exit_code == 1


def bad_bases(folder: Path) -> list[tuple[str, str]]:
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("x")
    (folder / "damaged.gguf").write_bytes(b"GGUF" + b"\xff" * 50)
    (folder / "half").mkdir()
    (folder / "half" / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "peqa"}})
    )
    return [
        ("nowhere", "does not exist"),
        ("empty", "config.json"),
        ("text.txt", "not a .gguf"),
        ("damaged.gguf", "damaged.gguf"),
        ("half", "format_version"),
    ]


def test_serve_names_what_is_wrong_with_a_base(tmp_path: Path) -> None:
    for name, word in bad_bases(tmp_path):
        begin = time.monotonic()
        done = peqa("serve", str(tmp_path / name), "--port", "0", "--home", str(tmp_path / "home"))
        assert done.exit_code == 1, name
        (line,) = [row for row in done.stderr.splitlines() if row.startswith("error: ")]
        assert word in line
        assert "Traceback" not in done.stderr
        assert time.monotonic() - begin < 20


SERVE_STUB = """
import asyncio, sys, time
sys.path.insert(0, {folder!r})
from pathlib import Path
from server_stubs import *
from peqa_server.app import create_loading_app
from peqa_server.start.run import listen, run
from peqa_server.services import ServedModel, Services

def load():
    time.sleep({load_seconds})
    engine = StubEngine(lambda r: Script([97] * 20, delay=0.05))
    tasks = StubTasks(upload_seconds={upload_seconds})
    for call in {hanging!r}:
        owner, name = call.split(".")
        setattr(locals()[owner], name, lambda *_: time.sleep(60))
    model = ServedModel(MANIFEST, ByteTokenizer(), max_model_len=200, vocab_size=257)
    return Services(engine, tasks, model, Path({spool!r}))

listener = listen("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
sys.exit(run(create_loading_app(), listener, load, {drain_seconds}))
"""


class Process:
    def __init__(
        self,
        spool: Path,
        *,
        load_seconds: float = 0.0,
        drain_seconds: float = 10.0,
        upload_seconds: float = 0.0,
        hanging: tuple[str, ...] = (),
    ) -> None:
        code = SERVE_STUB.format(
            folder=str(Path(__file__).parent),
            load_seconds=load_seconds,
            drain_seconds=drain_seconds,
            upload_seconds=upload_seconds,
            hanging=hanging,
            spool=str(spool),
        )
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{self.process.stdout.readline().strip()}"

    def wait_ready(self) -> None:
        wait_until(lambda: self.get("/ready") == 200, 10)

    def get(self, path: str) -> int:
        return httpx.get(self.url + path, timeout=5).status_code

    def stream(self) -> Any:
        body = {"prompt": "x", "max_tokens": 20, "stream": True}
        return httpx.stream("POST", self.url + "/v1/completions", json=body, timeout=10)


def open_request(url: str, path: str) -> socket.socket:
    """A connection on which somebody waits for an answer."""
    address = httpx.URL(url)
    connection = socket.create_connection((address.host, address.port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {address.host}\r\n\r\n".encode())
    return connection


def test_sigterm_drains_and_exits_cleanly(tmp_path: Path) -> None:
    server = Process(tmp_path)
    server.wait_ready()
    with server.stream() as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.get("/ready") == 503)
        assert server.get("/health") == 200
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert len(rest) == 20, "the running answer came to its end"
    assert server.process.wait(5) == 0


def test_an_answer_that_outlasts_the_drain_says_so(tmp_path: Path) -> None:
    server = Process(tmp_path, drain_seconds=0.1)
    server.wait_ready()
    with server.stream() as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert '"error"' in rest[-2]
    assert server.process.wait(10) == 0


def test_an_upload_that_hangs_does_not_outlast_the_drain(tmp_path: Path) -> None:
    """It waits for the store's lock, say, in a thread that nothing can end."""
    server = Process(tmp_path, drain_seconds=0.2, upload_seconds=60)
    server.wait_ready()

    def upload() -> None:
        with contextlib.suppress(httpx.TransportError):
            httpx.put(f"{server.url}/v1/tasks/sql", content=b"SET", timeout=30)

    thread = threading.Thread(target=upload)
    thread.start()
    wait_until(lambda: httpx.get(f"{server.url}/load").json() == {"server_load": 1})
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(12) == 0
    thread.join()


@pytest.mark.parametrize("hanging", [("engine.stop", "tasks.close"), ("tasks.info",)])
def test_what_hangs_does_not_outlast_the_drain(tmp_path: Path, hanging: tuple[str, ...]) -> None:
    """A step without end, a disk that does not answer, and more who ask for what is on it than there are threads."""
    server = Process(tmp_path, drain_seconds=0.2, hanging=hanging)
    server.wait_ready()
    asking = [open_request(server.url, "/v1/tasks/sql") for _ in range(40)] if "tasks.info" in hanging else []
    with server.stream() as answer:
        next(answer.iter_lines())
    server.process.send_signal(signal.SIGTERM)
    try:
        assert server.process.wait(9) == 0, "6 s, and what a busy machine adds"
    finally:
        server.process.kill()
        for connection in asking:
            connection.close()


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    server = Process(tmp_path, drain_seconds=60)
    server.wait_ready()
    with server.stream() as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.get("/ready") == 503)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.HTTPError):
            list(lines)
    assert server.process.wait(5) == 0


def test_what_was_loaded_is_not_looked_through_for_garbage_again(tmp_path: Path) -> None:
    model = ServedModel(MANIFEST, ByteTokenizer(), max_model_len=200, vocab_size=257)

    async def serve() -> int:
        server = DrainingServer(create_loading_app(), 1)
        server.load_in_thread(lambda: Services(StubEngine(), StubTasks(), model, tmp_path))
        while not server.opened:
            await asyncio.sleep(0.01)
        return gc.get_freeze_count()

    try:
        assert asyncio.run(serve()) > 10_000
    finally:
        gc.unfreeze()


def test_a_signal_while_loading_ends_at_once(tmp_path: Path) -> None:
    server = Process(tmp_path, load_seconds=60)
    wait_until(lambda: server.get("/health") == 200, 10)
    assert server.get("/ready") == 503
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(5) == 0


def test_the_command_line_imports_no_torch_and_no_web_server() -> None:
    code = "import sys, peqa_server.cli; print({'torch', 'fastapi', 'uvicorn', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
