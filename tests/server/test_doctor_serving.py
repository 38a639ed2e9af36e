"""The doctor's look at the port, at who has it, and at keys: whole, and with something broken."""

from __future__ import annotations

import dataclasses
import http.server
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from findings import free_port, is_broken

from peqa_server.app import create_loading_app
from peqa_server.doctor import serving
from peqa_server.doctor.finding import Asked


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
