"""One writer of a store at a time, across threads and processes, and what a client hears when the disk fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from peqa_runtime.errors import StoreError

logger = logging.getLogger(__name__)


class StoreLock:
    """The lock of the store in `directory`. `timeout`: seconds to wait for another process."""

    def __init__(self, directory: Path, timeout: float) -> None:
        self._directory = directory
        self._among_threads = threading.Lock()
        self._among_processes = filelock.FileLock(directory / "lock", timeout=timeout, thread_local=False)

    @contextmanager
    def held(self, done: str) -> Iterator[None]:
        """Nobody else writes meanwhile. Raises `StoreError`, as `faults` does."""
        with self._among_threads, self.faults(done), self._among_processes:
            yield

    @contextmanager
    def faults(self, done: str) -> Iterator[None]:
        """Turn a fault of the disk into `StoreError`: it could not be `done`, as in "written".

        The folder's path is for the log, not for a client.
        """
        try:
            yield
        except filelock.Timeout:
            raise StoreError("the scale store is in use by another process; try again") from None
        except OSError as error:
            logger.error("scale store %s: %s", self._directory, error)
            reason = error.strerror or type(error).__name__
            raise StoreError(f"the scale store cannot be {done} ({reason}); nothing was changed") from error
