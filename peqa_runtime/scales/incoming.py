"""Where uploads lie while they come: a folder for each process that takes any, gone when that process is.

    <root>/<random>/lock           held by its process; the kernel frees it when the process ends, however that is
    <root>/<random>/...            what is being uploaded to it

A folder whose lock is free belongs to nobody. All methods need the store's lock, so that no folder is looked at
between its making and its locking; they raise `OSError`.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from pathlib import Path

import filelock

logger = logging.getLogger(__name__)


class Incoming:
    """One process's view of `root`, which exists."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._own: tuple[Path, filelock.BaseFileLock] | None = None

    @property
    def in_use(self) -> bool:
        """True while this process has a folder."""
        return self._own is not None

    def own(self) -> Path:
        """This process's folder; made at the first call, and at the first after `leave`."""
        if self._own is None:
            folder = self._root / secrets.token_hex(8)
            folder.mkdir()
            lock = _lock_in(folder)
            lock.acquire()
            self._own = folder, lock
        return self._own[0]

    def leave(self) -> None:
        """Remove this process's folder and what is in it, if there is one."""
        if self._own is not None:
            (folder, lock), self._own = self._own, None
            try:
                shutil.rmtree(folder)
            finally:
                lock.release()

    def sweep(self) -> None:
        """Remove what processes left that have ended. What cannot be removed stays, with a warning."""
        for entry in self._root.iterdir():
            try:
                if entry.is_dir() and not entry.is_symlink():
                    with _lock_in(entry):
                        shutil.rmtree(entry)
                else:
                    entry.unlink()
            except filelock.Timeout:
                continue  # its process lives
            except OSError as error:
                logger.warning("%s is left over from an upload and cannot be removed: %s", entry, error)


def _lock_in(folder: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(folder / "lock", blocking=False, thread_local=False)
