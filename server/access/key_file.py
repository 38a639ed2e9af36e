"""A file of keys: JSON, as `peqa keys` writes it, or plain keys, one per line, each of them an admin.

A change replaces the file whole (temporary file, fsync, rename), under a lock, readable by its owner alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import filelock

from peqa_runtime.scales.atomic_file import sync_folder
from peqa_server.access import key_json
from peqa_server.access.api_key import ApiKey, KeySet, Role
from peqa_server.access.key_json import KeyFileError

MAX_BYTES = 16 << 20
LOCK_SECONDS = 10.0

Form = Literal["json", "plain"]
Stamp = tuple[int, int, int, int]

# What a bearer token may consist of, without what JSON is made of: a damaged JSON file never reads as plain keys.
_PLAIN_KEY = re.compile(rb"[!#-+\--9;-Z\\^-z|~]+")


def stamp_of(path: Path) -> Stamp:
    """What changes whenever the file does. Raises `OSError`."""
    return _stamp(os.stat(path))


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read(path: Path) -> tuple[KeySet, Form, Stamp]:
    """The keys of a file, its form, and the stamp of what was read. Raises `KeyFileError`."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise KeyFileError(f"{path} is no file")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"{path} cannot be read: {error.strerror}") from None
    if found.st_mode & stat.S_IWOTH:
        raise KeyFileError(f"{path} can be written by everybody on this machine; chmod 600 {path}")
    if len(data) > MAX_BYTES:
        raise KeyFileError(f"{path} has more than {MAX_BYTES >> 20} MiB")
    form: Form = "json" if data.lstrip().startswith(b"{") else "plain"
    try:
        keys = key_json.parse(data) if form == "json" else _plain(data)
    except KeyFileError as error:
        raise KeyFileError(f"{path}: {error}") from None
    return keys, form, _stamp(found)


def _plain(data: bytes) -> KeySet:
    """One key per line; empty lines and lines that start with '#' are skipped."""
    keys: dict[str, ApiKey] = {}
    for number, raw in enumerate(data.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith(b"#"):
            continue
        if not _PLAIN_KEY.fullmatch(line):
            raise KeyFileError(
                f"line {number} is no key: it has a space, a quote, a bracket, or a byte beyond ASCII"
            )
        digest = hashlib.sha256(line).hexdigest()
        name = digest[:12]
        keys[digest] = ApiKey(id=name, name=name, tenant=name, role=Role.ADMIN, digest=digest)
    if not keys:
        raise KeyFileError("it holds no key; write one per line, or make them with: peqa keys make")
    return KeySet(tuple(keys.values()))


@contextmanager
def locked(path: Path) -> Iterator[Path]:
    """The file to replace (links followed), while nobody else changes it. Raises `KeyFileError`."""
    target = path.resolve()
    lock = filelock.FileLock(target.with_name(f".{target.name}.lock"), timeout=LOCK_SECONDS, mode=0o600)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            for left in target.parent.glob(f".{target.name}.*.tmp"):  # of a process that was killed
                left.unlink(missing_ok=True)
            yield target
    except filelock.Timeout:
        raise KeyFileError(f"{path} is being changed by another process; try again") from None
    except OSError as error:
        raise KeyFileError(f"{path} cannot be changed: {error.strerror}; the old file is as it was") from None


def read_for_change(target: Path) -> KeySet:
    """The keys of a file that is to be changed; none when there is no file yet. Raises `KeyFileError`."""
    if not target.exists():
        return KeySet(())
    keys, form, _ = read(target)
    if form == "plain":
        raise KeyFileError(
            f"{target} holds plain keys, one per line, without rights or limits; name another file"
        )
    return keys


def replace(target: Path, keys: KeySet) -> None:
    """Put `keys` at `target`, whole or not at all. Raises `OSError`; the old file is then as it was."""
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if target.exists():
                _keep_owner(target.stat(), descriptor)
            file.write(key_json.dump(keys))
            file.flush()
            os.fsync(descriptor)
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def _keep_owner(old: os.stat_result, descriptor: int) -> None:
    """What root changes stays readable by the server's own user, and by a group that was let in."""
    if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
        try:
            os.fchown(descriptor, old.st_uid, old.st_gid)
        except PermissionError:
            return
    os.fchmod(descriptor, 0o600 | (old.st_mode & stat.S_IRGRP))
