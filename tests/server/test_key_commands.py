"""`peqa keys`: what it shows once, what it writes, and one sentence for every wrong input."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from peqa_server.access import key_file
from peqa_server.cli import app
from peqa_server.start.entrance import Entrance


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def keys(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(app, ["keys", *arguments], env=environment)


def made(file: Path, *arguments: str) -> dict[str, Any]:
    done = keys("make", *arguments, "--file", str(file), "--json")
    assert done.exit_code == 0, done.stderr
    return dict(json.loads(done.stdout))


def listed(file: Path) -> dict[str, dict[str, Any]]:
    return {
        row["name"]: row for row in json.loads(keys("list", "--file", str(file), "--json").stdout)["keys"]
    }


def test_a_key_is_shown_once_and_kept_as_a_digest(file: Path) -> None:
    done = keys("make", "alice", "--file", str(file), "--tasks", "acme-*")
    assert done.exit_code == 0
    text = done.stdout.strip()
    assert text.startswith("peqa_")
    assert len(text.split()) == 1, "standard output is the key alone: KEY=$(peqa keys make …)"
    assert "once" in done.stderr
    kept, _, _ = key_file.read(file)
    found = kept.find(text.encode())
    assert found is not None
    assert found.name == "alice"
    assert text not in file.read_text()
    for shown in (
        keys("list", "--file", str(file)).output,
        keys("list", "--file", str(file), "--json").output,
    ):
        assert "alice" in shown
        assert text not in shown
        assert found.digest not in shown


def test_all_options_arrive(file: Path) -> None:
    row = made(
        file, "bob", "--role", "uploader", "--tenant", "acme", "--tasks", "acme-*", "--tasks", "sql", "--no-base",
        "--tokens-per-minute", "60000", "--requests-per-minute", "30", "--concurrent", "4", "--disk", "2GiB",
        "--highest-priority", "-3", "--expires", "90d",
    )  # fmt: skip
    row.pop("key")
    assert row == listed(file)["bob"]
    until = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 90 * 86400))
    assert row.pop("expires").startswith(until)
    assert row.pop("created")
    assert len(row.pop("id")) == 12
    assert row == {
        "name": "bob", "tenant": "acme", "role": "uploader", "tasks": ["acme-*", "sql"], "base": False,
        "tokens_per_minute": 60000, "requests_per_minute": 30, "concurrent": 4, "disk_bytes": 2 << 30,
        "highest_priority": -3, "revoked": None, "state": "valid",
    }  # fmt: skip


def test_change_touches_what_is_named_alone(file: Path) -> None:
    text = made(file, "bob", "--tasks", "acme-*", "--concurrent", "4", "--disk", "500MB")["key"]
    before = listed(file)["bob"]
    done = keys(
        "change",
        "bob",
        "--file",
        str(file),
        "--concurrent",
        "none",
        "--requests-per-minute",
        "9",
        "--no-base",
    )
    assert (done.exit_code, "is changed" in done.stdout) == (0, True)
    assert listed(file)["bob"] == before | {"concurrent": None, "requests_per_minute": 9, "base": False}
    assert before["disk_bytes"] == 500_000_000
    keys("change", "bob", "--file", str(file), "--role", "admin", "--expires", "2099-01-01T00:00:00Z")
    admin = listed(file)["bob"]
    assert (admin["role"], admin["tasks"], admin["expires"]) == ("admin", [], "2099-01-01T00:00:00Z")
    keys("change", before["id"], "--file", str(file), "--role", "user", "--tasks", "x", "--expires", "never")
    assert (listed(file)["bob"]["tasks"], listed(file)["bob"]["expires"]) == (["x"], None)
    kept, _, _ = key_file.read(file)
    assert kept.find(text.encode()) is not None, "the key itself stays"


def test_revoke(file: Path) -> None:
    first = made(file, "alice", "--tasks", "*")
    assert keys("revoke", "alice", "--file", str(file)).exit_code == 0
    row = listed(file)["alice"]
    assert (row["state"], row["revoked"] is None) == ("revoked", False)
    again = made(file, "alice", "--tasks", "*")
    assert again["id"] != first["id"], "the name is free again; the old key stays known as revoked"
    for which in (first["id"], "nobody"):
        refused = keys("revoke", which, "--file", str(file))
        assert refused.exit_code == 1
    by_key = keys("revoke", again["key"], "--file", str(file))
    assert "never by the key itself" in by_key.stderr
    assert again["key"] not in by_key.stderr
    assert json.loads(keys("revoke", again["id"], "--file", str(file), "--json").stdout)["state"] == "revoked"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["bob"], "--tasks"), (["a b", "--tasks", "x"], "a key's name must"), (["bob", "--tasks", "A*"], "glob"),
     (["bob", "--tasks", ""], "glob"), (["bob", "--tasks", "x", "--role", "root"], "role must be"),
     (["bob", "--tasks", "x", "--tenant", "a/b"], "a tenant must"),
     (["bob", "--role", "admin", "--tasks", "x"], "every task"),
     (["bob", "--role", "admin", "--no-base"], "every task"),
     (["bob", "--tasks", "x", "--concurrent", "0"], "concurrent must"),
     (["bob", "--tasks", "x", "--concurrent", "many"], "--concurrent must"),
     (["bob", "--tasks", "x", "--tokens-per-minute", "1.5"], "--tokens-per-minute must"),
     (["bob", "--tasks", "x", "--requests-per-minute", "-1"], "--requests-per-minute must"),
     (["bob", "--tasks", "x", "--disk", "2 XB"], "--disk must"),
     (["bob", "--tasks", "x", "--disk", "9999TB9"], "--disk must"),
     (["bob", "--tasks", "x", "--disk", "999999999999999TB"], "disk_bytes must"),
     (["bob", "--tasks", "x", "--highest-priority", "1"], "highest_priority must"),
     (["bob", "--tasks", "x", "--expires", "1s"], "--expires must be 90d, 12h, 30m, a time"),
     (["bob", "--tasks", "x", "--expires", "2001-01-01T00:00:00Z"], "future"),
     (["bob", "--tasks", "x", "--expires", "0m"], "future"),
     (["taken", "--tasks", "x"], "there is a key named 'taken'")],
    ids=str,
)  # fmt: skip
def test_wrong_input_is_one_sentence_and_changes_nothing(file: Path, arguments: list[str], said: str) -> None:
    made(file, "taken", "--tasks", "x")
    before = file.read_bytes()
    done = keys("make", *arguments, "--file", str(file))
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "peqa_" not in done.output
    assert file.read_bytes() == before


def test_wrong_files(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("one\n")
    done = keys("make", "bob", "--tasks", "x", "--file", str(plain))
    assert (done.exit_code, "name another file" in done.stderr) == (1, True)
    assert plain.read_text() == "one\n"
    broken = tmp_path / "broken"
    broken.write_text("{")
    for command in (
        ["list"],
        ["make", "bob", "--tasks", "x"],
        ["revoke", "bob"],
        ["change", "bob", "--no-base"],
    ):
        done = keys(*command, "--file", str(broken))
        assert (done.exit_code, "no JSON" in done.stderr) == (1, True), command
    assert broken.read_text() == "{"
    missing = keys("list", "--file", str(tmp_path / "none"))
    assert (missing.exit_code, "cannot be read" in missing.stderr) == (1, True)
    for command in (["revoke", "bob"], ["change", "bob", "--no-base"]):
        assert "no key that is in force" in keys(*command, "--file", str(tmp_path / "none")).stderr
    assert not (tmp_path / "none").exists()
    below_a_file = keys("make", "bob", "--tasks", "x", "--file", str(plain / "keys.json"))
    assert (below_a_file.exit_code, "cannot be changed" in below_a_file.stderr) == (1, True)
    nothing = keys("change", "bob", "--file", str(plain))
    assert (nothing.exit_code, "name what is to be changed" in nothing.stderr) == (1, True)


def test_the_table_says_what_matters(file: Path) -> None:
    made(file, "bob", "--tasks", "acme-*", "--tokens-per-minute", "60000")
    made(file, "root", "--role", "admin")
    text = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["keys", "list", "--file", str(file)]).stdout
    assert "acme-*, base" in text
    assert "60000 tokens/min" in text
    assert "all" in text
    narrow = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["keys", "list", "--file", str(file)]).stdout
    rows = json.loads(keys("list", "--file", str(file), "--json").stdout)["keys"]
    assert all(row["id"] in narrow for row in rows), "revoke asks for a whole id"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_keys_only_loopback_is_listened_on(tmp_path: Path, host: str) -> None:
    from peqa_server.start.run import CannotBind

    with pytest.raises(CannotBind, match="insecure-open-to-network"):
        Entrance(host, 0).listen()
    keys_file = tmp_path / "keys.json"
    made(keys_file, "root", "--role", "admin")
    for entrance in (Entrance(host, 0, keys_file), Entrance(host, 0, insecure_open_to_network=True)):
        listener = entrance.listen()
        assert entrance.open_without_keys(listener) is entrance.insecure_open_to_network
        listener.close()
    with pytest.raises(CannotBind, match="contradict"):
        Entrance(host, 0, keys_file, insecure_open_to_network=True).listen()
    Entrance("127.0.0.1", 0).listen().close()


def test_serve_says_why_it_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peqa_server.observe.log_format.set_up_logging", lambda *_: None)
    done = CliRunner().invoke(app, ["serve", "--host", "0.0.0.0", "--port", "0"])
    assert (done.exit_code, "insecure-open-to-network" in done.stderr) == (1, True)
    done = CliRunner().invoke(app, ["serve", "--port", "0", "--api-key-file", str(tmp_path / "none")])
    assert (done.exit_code, "cannot be read" in done.stderr) == (1, True)
