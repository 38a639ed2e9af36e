"""Keys for tests: a file of them, and the headers that carry one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from peqa_server.access import key_file
from peqa_server.access.api_key import ApiKey, KeySet, Limits, Role, digest_of

DAY = 86400.0


def text_of(name: str) -> str:
    """The key that a test's key named `name` has."""
    return f"peqa_test_{name}"


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text_of(name)}"}


def key(name: str, role: str = "user", *tasks: str, base: bool = True, **more: Any) -> ApiKey:
    """A key whose text is `text_of(name)`; what is no field of a key is one of its limits."""
    fields = {name: more.pop(name) for name in ("tenant", "expires", "revoked") if name in more}
    return ApiKey(
        id=digest_of(name)[:12],
        name=name,
        tenant=fields.pop("tenant", name),
        role=Role.of(role),
        digest=digest_of(text_of(name)),
        tasks=tasks or (() if role == "admin" else ("acme-*",)),
        base=base,
        limits=Limits(**more),
        created=time.time() - DAY,
        **fields,
    )


def write_keys(path: Path, *keys: ApiKey) -> Path:
    key_file.replace(path, KeySet(keys))
    return path


EVERYBODY = (
    key("user", "user"),
    key("uploader", "uploader"),
    key("admin", "admin"),
    key("revoked", "admin", revoked=time.time() - DAY),
    key("expired", "admin", expires=time.time() - DAY),
)
