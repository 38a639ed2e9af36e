"""The file of keys: written whole, read strictly, followed without a restart, and never a reason to open a door."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from key_stubs import bearer, key, text_of, write_keys
from server_stubs import check_error, wait_until

from peqa_server.access import key_file, key_json
from peqa_server.access.api_key import ApiKey, KeySet, Limits, Role, digest_of, new_key
from peqa_server.access.key_json import KeyFileError
from peqa_server.access.key_ring import LOOK_SECONDS, KeyRing
from peqa_server.settings import ServerSettings

FULL = ApiKey(
    id="0123456789ab",
    name="alice",
    tenant="acme",
    role=Role.UPLOADER,
    digest=digest_of("x"),
    tasks=("acme-*", "sql"),
    base=False,
    limits=Limits(1000, 20, 3, 4_000_000, -5),
    created=1e9,
    expires=2e9,
    revoked=1.5e9,
)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def document(**changes: Any) -> bytes:
    row = json.loads(key_json.dump(KeySet((FULL,))))["keys"][0] | changes
    rows = [{name: value for name, value in row.items() if value is not ...}]
    return json.dumps({"format": "peqa-keys", "format_version": 1, "keys": rows}).encode()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.json", FULL, key("bob"))
    keys, form, stamp = key_file.read(path)
    assert keys.keys[0] == FULL
    assert form == "json"
    assert stamp == key_file.stamp_of(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.find(text_of("bob").encode()) is keys.keys[1]
    assert keys.find(b"") is None
    assert text_of("bob") not in path.read_text()


def test_a_group_that_was_let_in_stays_in_and_nobody_else(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.json", FULL)
    for before, after in ((0o644, 0o640), (0o660, 0o640), (0o600, 0o600), (0o400, 0o600)):
        path.chmod(before)
        write_keys(path, FULL)
        assert stat.S_IMODE(path.stat().st_mode) == after


def test_least_file_has_careful_defaults() -> None:
    data = document(tenant=..., base=..., created=..., expires=..., revoked=..., highest_priority=...,
                    tokens_per_minute=..., requests_per_minute=..., concurrent=..., disk_bytes=...)  # fmt: skip
    (found,) = key_json.parse(data).keys
    assert (found.tenant, found.expires, found.revoked) == ("alice", None, None)
    assert found.limits == Limits()
    assert found.limits.highest_priority == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"role": "root"}, "role must be user, uploader, admin"), ({"role": 3}, "role must be"), ({"id": ""}, "id must"),
     ({"id": "x/y"}, "id must"), ({"sha256": "00"}, "sha256 must"), ({"sha256": None}, "sha256 must"),
     ({"name": "a b"}, "name must"), ({"name": 5}, "name must"), ({"tenant": ""}, "tenant must"),
     ({"tasks": "acme-*"}, "tasks a list"), ({"tasks": ["A"]}, "glob"), ({"tasks": [""]}, "glob"),
     ({"tasks": [5]}, "glob"),
     ({"tasks": ["[a-z]"]}, "glob"), ({"role": "admin"}, "every task"), ({"base": 1}, "base must"),
     ({"concurrent": 0}, "concurrent must"), ({"concurrent": True}, "concurrent must"),
     ({"disk_bytes": -1}, "disk_bytes"),
     ({"tokens_per_minute": 1.5}, "tokens_per_minute"), ({"requests_per_minute": 10**16}, "requests_per_minute"),
     ({"highest_priority": 1}, "highest_priority"), ({"highest_priority": None}, "highest_priority"),
     ({"expires": "soon"}, "expires must"), ({"expires": "2027-01-01T00:00:00"}, "expires must"),
     ({"expires": 5}, "expires"),
     ({"revoked": False}, "revoked must"), ({"admin": True}, "unknown field 'admin'"),
     ({"sha256": ...}, "sha256 is missing"),
     ({"role": ...}, "role is missing"), ({"tasks": ...}, "tasks is missing")],
    ids=str,
)  # fmt: skip
def test_a_wrong_field_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(KeyFileError, match=r"^key 1: ") as caught:
        key_json.parse(document(**changes))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"{", b"{}", b"[]", b'{"format": "peqa-keys"}', b'{"format": "peqa-keys", "format_version": 2, "keys": []}',
     b'{"format": "peqa-keys", "format_version": 1, "keys": {}}',
     b'{"format": "peqa-keys", "format_version": 1, "keys": [5]}',
     b'{"format": "peqa-keys", "format_version": 1, "keys": [], "more": 1}',
     b'{"format": "peqa-keys", "format_version": 1, "keys": [], "keys": []}', b"\xff\xfe{", b'{"a":' * 100_000,
     document()[:-3], document() + b"}"],
    ids=lambda data: repr(data[:60]),
)  # fmt: skip
def test_what_is_no_file_of_keys_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(data)
    with pytest.raises(KeyFileError, match=r"keys\.json"):
        key_file.read(path)


def test_two_keys_of_one_id_or_digest_are_refused() -> None:
    rows = json.loads(document())["keys"]
    for other in ({"id": "ffff"}, {"sha256": "0" * 64}):
        two = {"format": "peqa-keys", "format_version": 1, "keys": [rows[0], rows[0] | other]}
        with pytest.raises(KeyFileError, match="two keys have the same"):
            key_json.parse(json.dumps(two).encode())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_cut_or_flipped_byte_makes_a_key(data: st.DataObject) -> None:
    """A damaged file is refused, or means what the whole one meant but for the value that was hit."""
    whole = key_json.dump(KeySet((FULL, key("bob"))))
    cut = data.draw(st.integers(0, len(whole) - 3))
    with pytest.raises(KeyFileError):
        key_json.parse(whole[:cut])
    at, byte = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    try:
        found = key_json.parse(whole[:at] + bytes([byte]) + whole[at + 1 :])
    except KeyFileError:
        return
    assert len(found.keys) == 2


@pytest.mark.parametrize("drop", range(0, 12))
def test_json_with_its_head_cut_off_is_not_read_as_plain_keys(tmp_path: Path, drop: int) -> None:
    path = tmp_path / "keys.json"
    lines = key_json.dump(KeySet((FULL,))).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[drop:]))
    if drop == 0:
        key_file.read(path)
    else:
        with pytest.raises(KeyFileError):
            key_file.read(path)


def test_plain_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\none\n\n  two \n")
    keys, form, _ = key_file.read(path)
    assert (form, [k.role for k in keys.keys]) == ("plain", [Role.ADMIN] * 2)
    assert keys.find(b"one") == keys.keys[0]
    assert keys.keys[0].tenant != keys.keys[1].tenant
    assert "one" not in keys.keys[0].id
    for text, said in (("# none\n", "no key"), ("", "no key"), ("fine\na b\n", "line 2"), ("ké\n", "line 1")):
        path.write_text(text)
        with pytest.raises(KeyFileError, match=said) as caught:
            key_file.read(path)
        assert "fine" not in str(caught.value)


def test_what_cannot_be_trusted_is_not_read(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.json", FULL)
    path.chmod(0o602)
    with pytest.raises(KeyFileError, match="chmod 600"):
        key_file.read(path)
    with pytest.raises(KeyFileError, match="cannot be read"):
        key_file.read(tmp_path / "none")
    with pytest.raises(KeyFileError, match=r"cannot be read|no file"):
        key_file.read(tmp_path)
    path.chmod(0o600)
    path.write_bytes(b"{" + bytes(key_file.MAX_BYTES))
    with pytest.raises(KeyFileError, match="more than 16 MiB"):
        key_file.read(path)
    with pytest.raises(KeyFileError, match="no file"):
        key_file.read(Path("/dev/null"))


def test_a_ring_follows_its_file(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    path = write_keys(tmp_path / "keys.json", key("alice"))
    ring = KeyRing(path, clock=clock)
    alice, bob = text_of("alice").encode(), text_of("bob").encode()
    write_keys(path, key("bob"))
    assert ring.find(alice) is not None, "the file is looked at twice a second, not at every request"
    clock.now += LOOK_SECONDS
    assert ring.find(alice) is None
    assert ring.find(bob) is not None
    os.utime(path, ns=(1, 1))
    clock.now += LOOK_SECONDS
    assert ring.find(bob) is not None


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "plain", "loose", "folder", "binary"])
def test_a_damaged_file_changes_nothing(
    tmp_path: Path, clock: Clock, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_keys(tmp_path / "keys.json", key("alice"))
    ring = KeyRing(path, clock=clock)
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage in ("empty", "binary"):
        path.write_bytes(b"" if damage == "empty" else bytes(range(256)))
    elif damage == "plain":
        path.write_text("mallory\n")
    elif damage == "loose":
        path.chmod(0o666)
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    with caplog.at_level(logging.ERROR, logger="peqa.server"):
        for _ in range(3):
            clock.now += LOOK_SECONDS
            assert ring.find(text_of("alice").encode()) is not None
            assert ring.find(b"mallory") is None
            assert ring.find(b"") is None
    assert ring.damaged
    assert len(caplog.records) == 1, "once per reason, not at every look"
    assert "stay valid" in caplog.text
    if damage == "folder":
        path.rmdir()
    path.unlink(missing_ok=True)
    write_keys(path, key("bob"))
    clock.now += LOOK_SECONDS
    assert ring.find(text_of("bob").encode()) is not None
    assert ring.find(text_of("alice").encode()) is None
    assert not ring.damaged


def test_a_server_does_not_start_on_a_file_that_it_cannot_use(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    write_keys(path)
    with pytest.raises(KeyFileError, match="peqa keys make"):
        KeyRing(path)
    path.write_text("{")
    with pytest.raises(KeyFileError, match="no JSON"):
        KeyRing(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_keys(tmp_path / "keys.json", key("alice"))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as broken:
            broken.setattr(os, name, full)
            with pytest.raises(KeyFileError, match="No space left"), key_file.locked(path) as target:
                key_file.replace(target, KeySet((key("bob"),)))
        assert path.read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == [".keys.json.lock", "keys.json"]


@pytest.mark.parametrize(
    "error", [OSError(30, "Read-only file system"), PermissionError(13, "Permission denied")]
)
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    path = write_keys(tmp_path / "keys.json", key("alice"))
    opened = os.open

    def refuse(name: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise error
        return opened(name, flags, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(KeyFileError, match="cannot be changed"), key_file.locked(path) as target:
        key_file.replace(target, KeySet(()))
    assert [k.name for k in key_file.read(path)[0].keys] == ["alice"]


def test_whoever_is_killed_in_a_change_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    program = """if True:
        import sys
        from dataclasses import replace
        from pathlib import Path
        from peqa_server.access import key_file
        from peqa_server.access.api_key import ApiKey, KeySet, Role
        one = ApiKey(id="aaaa", name="n", tenant="t", role=Role.ADMIN, digest="0" * 64)
        target = Path(sys.argv[1])
        for i in range(1_000_000):
            count = 1 + i % 300
            rows = [replace(one, id=f"{k:012x}", digest=f"{k:064x}", name=f"of-{count}") for k in range(count)]
            key_file.replace(target, KeySet(tuple(rows)))
            print(i, flush=True)
    """
    for pause in (0.0, 0.003, 0.011, 0.03):
        with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(pause)
            child.kill()
        keys, _, _ = key_file.read(path)
        assert {k.name for k in keys.keys} == {f"of-{len(keys.keys)}"}
    with key_file.locked(path) as target:
        key_file.replace(target, KeySet((key("alice"),)))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".keys.json.lock", "keys.json"]


def test_changes_at_once_lose_nothing(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.json", key("first"))

    def add(number: int) -> None:
        with key_file.locked(path) as target:
            keys = key_file.read_for_change(target)
            key_file.replace(target, KeySet((*keys.keys, key(f"k{number}"))))

    threads = [threading.Thread(target=add, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys, _, _ = key_file.read(path)
    assert sorted(k.name for k in keys.keys) == ["first", *(f"k{n}" for n in range(8))]


def test_a_link_stays_a_link(tmp_path: Path, clock: Clock) -> None:
    """As mounted secrets are: the name points to a folder that is exchanged."""
    real = write_keys(tmp_path / "real.json", key("alice"))
    link = tmp_path / "keys.json"
    link.symlink_to(real)
    ring = KeyRing(link, clock=clock)
    with key_file.locked(link) as target:
        key_file.replace(target, KeySet((key("bob"),)))
    assert link.is_symlink()
    clock.now += LOOK_SECONDS
    assert ring.find(text_of("bob").encode()) is not None
    other = write_keys(tmp_path / "other.json", key("carol"))
    link.unlink()
    link.symlink_to(other)
    clock.now += LOOK_SECONDS
    assert ring.find(text_of("carol").encode()) is not None


def test_new_keys_are_long_and_different() -> None:
    texts = {new_key() for _ in range(100)}
    assert len(texts) == 100
    assert all(text.startswith("peqa_") and len(text) == 5 + 64 for text in texts)


def test_a_key_is_valid_until_it_is_not() -> None:
    one = key("alice", expires=5.0)
    assert [one.state(now) for now in (4.9, 5.0, 9.0)] == ["valid", "expired", "expired"]
    assert key("alice", expires=5.0, revoked=4.0).state(4.5) == "revoked"


def test_a_running_server_follows(live: Any, tmp_path: Path) -> None:
    path = write_keys(tmp_path / "keys.json", key("alice"), key("root", "admin"))
    server = live(settings=ServerSettings(key_file=path))
    get = server.client.get
    assert get("/v1/models", headers=bearer("alice")).status_code == 200
    write_keys(path, key("alice", revoked=1.0), key("root", "admin"), key("bob", "uploader"))
    wait_until(lambda: get("/v1/models", headers=bearer("bob")).status_code == 200, 2.0)
    assert check_error(get("/v1/models", headers=bearer("alice")), 401)["code"] == "api_key_revoked"
    path.write_bytes(path.read_bytes()[:-5])
    wait_until(lambda: "peqa_key_file_damaged 1.0" in get("/metrics", headers=bearer("root")).text, 2.0)
    assert get("/v1/models", headers=bearer("bob")).status_code == 200
    assert get("/v1/models", headers=bearer("alice")).status_code == 401
    assert get("/v1/models").status_code == 401
