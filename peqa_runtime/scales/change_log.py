"""How processes on one store hear of each other's changes: names of changed tasks, appended to one file.

    <generation, random>\n  sql\n  slots\n  sql\n ...

A name is written *before* its change is committed, by whoever holds the store's lock; who reads it takes the lock
before looking at the task, and so finds the change done, or given up. Asking whether there is news costs one `stat`.
The file is no record of anything: when it grows long, or is gone, a new generation starts and readers look at all
tasks once.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

MAX_BYTES = 1 << 20


class ChangeLog:
    """One reader's (and writer's) place in the file. `note` and `news` need the store's lock; `moved` does not."""

    def __init__(self, path: Path, *, unfinished: Path) -> None:
        self._path = path
        self._unfinished = unfinished
        self._generation = b""
        self._position = 0
        self._seen: tuple[int, int] | None = None  # inode and size at the last look

    def moved(self) -> bool:
        """True when the file is not as it was at the last look. Raises `OSError`."""
        return self._look() != self._seen

    def news(self) -> set[str] | None:
        """Names added since the last call; None: unknown, look at every task. Raises `OSError`."""
        if self._look() == self._seen and self._seen is not None:
            return set()
        try:
            with open(self._path, "rb") as file:
                generation = file.readline()
                fresh = generation != self._generation
                file.seek(0 if fresh else self._position)
                names = file.read()
        except FileNotFoundError:
            self._start_generation()
            return None
        self._generation = generation
        self._position += 0 if fresh else len(names)
        if fresh:
            self._position = len(names)
        self._seen = self._look()
        return None if fresh else set(names.decode("ascii", "replace").split())

    def forget(self) -> None:
        """Have the next `news` say "unknown"."""
        self._generation, self._position, self._seen = b"", 0, None

    def note(self, task: str) -> None:
        """Tell the others that this task is about to change; `news` was called under the same lock."""
        if self._position > MAX_BYTES:
            self._start_generation()
        line = f"{task}\n".encode("ascii")
        with open(self._path, "ab", buffering=0) as file:
            file.write(line)
        self._position += len(line)
        self._seen = self._look()

    def _start_generation(self) -> None:
        generation = secrets.token_hex(8).encode() + b"\n"
        beside = self._unfinished / f"changes.{secrets.token_hex(4)}"
        beside.write_bytes(generation)
        beside.replace(self._path)
        self._generation, self._position = generation, len(generation)
        self._seen = self._look()

    def _look(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size
