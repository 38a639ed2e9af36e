"""Files that are either the old ones or the new ones, also after a power cut or SIGKILL at any instant."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomic(path: Path, data: bytes, *, temporary: Path | None = None, durable: bool = True) -> None:
    """Put `data` at `path`: temporary file, fsync, rename, fsync of the folder. Not `durable`: without the syncs.

    `temporary` is a folder on the same volume for the unfinished file (default: beside `path`). When an `OSError`
    (a full disk, say) is raised before the rename, `path` is untouched and no unfinished file is left.
    """
    unfinished = (temporary or path.parent) / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        with open(unfinished, "xb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a renamed or deleted file stays so after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
