"""What a key is and what it may do. A key's text is known to its owner alone: here and on disk it is a digest.

A digest of one round of SHA-256 is enough: a key is 256 random bits, which no speed of guessing finds. Slow hashes
protect passwords that people make up, and would cost every request their time.
"""

from __future__ import annotations

import enum
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from peqa_runtime.core import BASE_TASK

PREFIX = "peqa_"


class Role(enum.IntEnum):
    """What a key is for; each may do what those before it may."""

    USER = 1  # generates, and lists what it may use
    UPLOADER = 2  # also puts, downloads, rolls back and deletes the tasks that its globs name
    ADMIN = 3  # everything, on every task

    @property
    def word(self) -> str:
        """As files and options spell it."""
        return self.name.lower()

    @classmethod
    def of(cls, word: str) -> Role:
        """The role that `word` spells. Raises `ValueError`."""
        for role in cls:
            if role.word == word:
                return role
        raise ValueError(f"role must be {', '.join(r.word for r in cls)}, got {word[:40]!r}")


@dataclass(frozen=True)
class Limits:
    """What a key may use; None: without a limit of its own.

    `concurrent` counts choices and uploads in work. `disk_bytes` bounds what its tenant's uploads take in the store.
    `highest_priority` is the lowest number that the field `priority` may have: 0 lets a client only go behind others.
    """

    tokens_per_minute: int | None = None
    requests_per_minute: int | None = None
    concurrent: int | None = None
    disk_bytes: int | None = None
    highest_priority: int = 0


@dataclass(frozen=True)
class ApiKey:
    """One key. `digest` is the SHA-256 of its text in hex; times are seconds since 1970.

    `tasks` are globs over task names; an admin has none and may use all. `base` is the right to the base alone, or
    in a blend. Keys of one `tenant` share cached prompt beginnings and the disk.
    """

    id: str
    name: str
    tenant: str
    role: Role
    digest: str
    tasks: tuple[str, ...] = ()
    base: bool = True
    limits: Limits = field(default_factory=Limits)
    created: float = 0.0
    expires: float | None = None
    revoked: float | None = None

    def may_use(self, task: str) -> bool:
        """Whether this key may generate with `task`, and see that it exists."""
        if self.role is Role.ADMIN:
            return True
        if task == BASE_TASK:
            return self.base
        return any(fnmatchcase(task, glob) for glob in self.tasks)

    def state(self, now: float) -> str:
        """ "valid", "revoked" or "expired"."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "valid"

    def salt(self, text: str) -> str:
        """The prefix cache's salt of this key's requests: its tenant's own, with the body's `text` inside of it."""
        return hashlib.sha256(
            f"{len(self.tenant)}:{self.tenant}:{text}".encode("utf-8", "replace")
        ).hexdigest()


class KeySet:
    """Keys, found by the digest of their text."""

    def __init__(self, keys: tuple[ApiKey, ...]) -> None:
        self.keys = keys
        self._by_digest: Mapping[str, ApiKey] = {key.digest: key for key in keys}

    def find(self, text: bytes) -> ApiKey | None:
        """The key whose text this is, revoked or not.

        The lookup goes by a digest that no client can steer, and the whole digest is compared in constant time, so
        time tells nothing of any key.
        """
        digest = hashlib.sha256(text).hexdigest()
        found = self._by_digest.get(digest)
        return found if found is not None and secrets.compare_digest(found.digest, digest) else None


def new_key() -> str:
    """The text of a new key: 256 random bits."""
    return PREFIX + secrets.token_hex(32)


def digest_of(text: str) -> str:
    """What is kept of a key's text."""
    return hashlib.sha256(text.encode()).hexdigest()
