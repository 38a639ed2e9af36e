"""GET /v1/access: what the page asks to know what it may offer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from key_stubs import bearer, key, write_keys
from server_stubs import check_error

from peqa_server.settings import ServerSettings


def test_a_key_is_told_what_it_may_do(live: Any, tmp_path: Path) -> None:
    keys = (
        key("ann", "user", "acme-*", base=False),
        key("bob", "uploader", "a", "b"),
        key("eve", "admin", base=False),
    )
    server = live(settings=ServerSettings(key_file=write_keys(tmp_path / "keys.json", *keys)))
    for name, role, tasks, base in (
        ("ann", "user", ["acme-*"], False),
        ("bob", "uploader", ["a", "b"], True),
        ("eve", "admin", ["*"], True),
    ):
        answer = server.client.get("/v1/access", headers=bearer(name))
        assert answer.json() == {"keys": True, "name": name, "role": role, "tasks": tasks, "base": base}
    check_error(server.client.get("/v1/access"), 401)


def test_without_keys_everybody_is_the_admin(server: Any) -> None:
    told = server.client.get("/v1/access").json()
    assert told == {"keys": False, "name": None, "role": "admin", "tasks": ["*"], "base": True}
