"""Keys as JSON: read strictly, because a field that is misread could open a door.

    {"format": "peqa-keys", "format_version": 1, "keys": [{
        "id": "3f9ab12c4d5e", "name": "alice", "tenant": "acme", "role": "user", "sha256": "…64 hex digits…",
        "tasks": ["acme-*"], "base": true,
        "tokens_per_minute": 60000, "requests_per_minute": null, "concurrent": 8, "disk_bytes": null,
        "highest_priority": 0,
        "created": "2026-01-31T12:00:00Z", "expires": null, "revoked": null}]}

Every field but `id`, `name`, `role`, `sha256` and `tasks` may be left out. Times are ISO 8601 with an offset.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from peqa_server.access.api_key import ApiKey, KeySet, Limits, Role

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
GLOB = re.compile(r"[a-z0-9._*?-]{1,64}")
_ID = re.compile(r"[a-z0-9]{4,32}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_LIMIT = 10**15
MAX_PRIORITY = 2**31
_COUNTS = ("tokens_per_minute", "requests_per_minute", "concurrent", "disk_bytes")
_FIELDS = frozenset(
    {"id", "name", "tenant", "role", "sha256", "tasks", "base", *_COUNTS, "highest_priority"}
    | {"created", "expires", "revoked"}
)


class KeyFileError(ValueError):
    """A key file, or a change to it, that cannot be accepted. The message says why, and shows no key."""


def dump(keys: KeySet) -> bytes:
    """The file of `keys`."""
    rows = [_row(key) for key in keys.keys]
    document = {"format": "peqa-keys", "format_version": 1, "keys": rows}
    return (json.dumps(document, indent=1) + "\n").encode()


def parse(data: bytes) -> KeySet:
    """The keys of a file. Raises `KeyFileError` for anything that is not exactly right."""
    try:
        document = json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, KeyFileError) else "it is no JSON"
        raise KeyFileError(f"{reason}; was it cut off while it was written?") from None
    if not isinstance(document, dict) or document.get("format") != "peqa-keys":
        raise KeyFileError('it is no file of keys: "format" must be "peqa-keys"')
    if document.get("format_version") != 1:
        raise KeyFileError("its format_version is not 1, the only one that this version reads")
    rows = document.get("keys")
    if set(document) != {"format", "format_version", "keys"} or not isinstance(rows, list):
        raise KeyFileError('it must have "format", "format_version" and the list "keys", and nothing else')
    keys = tuple(_key(row, f"key {number}") for number, row in enumerate(rows, 1))
    for what, values in (("id", [k.id for k in keys]), ("sha256", [k.digest for k in keys])):
        if len(set(values)) < len(values):
            raise KeyFileError(f"two keys have the same {what}")
    return KeySet(keys)


def check_name(text: Any, what: str) -> str:
    """A key's or tenant's name. Raises `KeyFileError`."""
    if not isinstance(text, str) or not NAME.fullmatch(text):
        raise KeyFileError(
            f"{what} must be 1 to 64 of A-Z, a-z, 0-9, '.', '_', '@', '-', and begin with a letter or digit"
        )
    return text


def check_rights(role: Role, tasks: tuple[str, ...]) -> None:
    """Globs that fit the role. Raises `KeyFileError`."""
    for glob in tasks:
        if not isinstance(glob, str) or not GLOB.fullmatch(glob):
            raise KeyFileError("a task glob must be 1 to 64 of a-z, 0-9, '.', '_', '-', '*', '?'")
    if role is Role.ADMIN and tasks:
        raise KeyFileError("an admin may use every task; give no tasks, or another role")


def check_limit(value: Any, what: str) -> int | None:
    """A limit: null or a whole number from 1. Raises `KeyFileError`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_LIMIT:
        raise KeyFileError(f"{what} must be a whole number from 1 to 10^15, or none")
    return value


def check_priority(value: Any) -> int:
    """The lowest `priority` that a key may ask for. Raises `KeyFileError`."""
    if isinstance(value, bool) or not isinstance(value, int) or not -MAX_PRIORITY <= value <= 0:
        raise KeyFileError(
            f"highest_priority must be a whole number from {-MAX_PRIORITY} to 0 (lower runs earlier)"
        )
    return value


def time_of(text: Any, what: str) -> float | None:
    """Seconds since 1970 of an ISO 8601 time with its offset; null is None. Raises `KeyFileError`."""
    if text is None:
        return None
    try:
        when = datetime.fromisoformat(re.sub("Z$", "+00:00", text))
    except (TypeError, ValueError):
        when = None
    if when is None or when.tzinfo is None:
        raise KeyFileError(f"{what} must be a time such as 2027-01-31T12:00:00Z, or null")
    return when.timestamp()


def time_text(when: float | None) -> str | None:
    """The inverse of `time_of`, to the second."""
    if when is None:
        return None
    return datetime.fromtimestamp(int(when), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise KeyFileError("an object has one field twice")
    return found


def _key(row: Any, where: str) -> ApiKey:
    if not isinstance(row, dict):
        raise KeyFileError(f"{where} must be an object")
    try:
        return _checked_key(row)
    except ValueError as error:
        raise KeyFileError(f"{where}: {error}") from None


def _checked_key(row: Mapping[str, Any]) -> ApiKey:
    unknown = sorted(set(row) - _FIELDS)
    missing = [name for name in ("id", "name", "role", "sha256", "tasks") if name not in row]
    if unknown or missing:
        raise KeyFileError(f"unknown field {unknown[0][:40]!r}" if unknown else f"{missing[0]} is missing")
    for name, pattern in (("id", _ID), ("sha256", _DIGEST)):
        if not isinstance(row[name], str) or not pattern.fullmatch(row[name]):
            raise KeyFileError(f"{name} must match {pattern.pattern}")
    if not isinstance(row["role"], str) or not isinstance(row["tasks"], list):
        raise KeyFileError("role must be a string, and tasks a list")
    if not isinstance(row.get("base", True), bool):
        raise KeyFileError("base must be true or false")
    role, tasks = Role.of(row["role"]), tuple(row["tasks"])
    check_rights(role, tasks)
    counts = {name: check_limit(row.get(name), name) for name in _COUNTS}
    return ApiKey(
        id=row["id"],
        name=check_name(row["name"], "name"),
        tenant=check_name(row.get("tenant", row["name"]), "tenant"),
        role=role,
        digest=row["sha256"],
        tasks=tasks,
        base=row.get("base", True),
        limits=Limits(**counts, highest_priority=check_priority(row.get("highest_priority", 0))),
        created=time_of(row.get("created"), "created") or 0.0,
        expires=time_of(row.get("expires"), "expires"),
        revoked=time_of(row.get("revoked"), "revoked"),
    )


def _row(key: ApiKey) -> dict[str, Any]:
    return {"id": key.id, "sha256": key.digest, **describe(key)}


def describe(key: ApiKey) -> dict[str, Any]:
    """What may be shown of a key: all but its digest, and its id, which the caller puts first."""
    limits = key.limits
    return {
        "name": key.name,
        "tenant": key.tenant,
        "role": key.role.word,
        "tasks": list(key.tasks),
        "base": key.base,
        **{name: getattr(limits, name) for name in _COUNTS},
        "highest_priority": limits.highest_priority,
        "created": time_text(key.created),
        "expires": time_text(key.expires),
        "revoked": time_text(key.revoked),
    }
