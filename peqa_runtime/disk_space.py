"""Room on disk: asked for before a long run writes, and named in a sentence where it runs out."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from peqa_runtime.errors import DiskFull

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException) -> bool:
    """Whether an error of a write says that there is no room; safetensors and torch.save give no errno."""
    if isinstance(error, SafetensorError):
        return "os error 28" in str(error)
    if isinstance(error, RuntimeError):
        return "inline_container" in str(error)  # torch's archive came out shorter than what was written
    return isinstance(error, OSError) and error.errno in _FULL


def full_at(where: Path) -> str:
    """Half a sentence about a full disk."""
    return f"the disk is full at {where}: {shutil.disk_usage(_existing(where)).free >> 20} MB are free"


@contextmanager
def disk_full_named(where: Path, *, resumes: bool = True) -> Iterator[None]:
    """Turn what a full disk raises into `DiskFull` with a sentence; `resumes`: the same command would go on."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_full(error):
            raise
        goes_on = ", it goes on where it stopped" if resumes else ""
        raise DiskFull(f"{full_at(where)}; make room and run the same command again{goes_on}") from error


def require_space(where: Path, needed: int) -> None:
    """Raise `DiskFull` when a volume has less than `needed` bytes free."""
    free = shutil.disk_usage(_existing(where)).free
    if free < needed:
        raise DiskFull(
            f"{where} needs about {needed >> 20} MB, and only {free >> 20} MB are free there; make room"
        )


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)
