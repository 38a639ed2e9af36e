"""Scale set files named by their content: written once, checked against their name, moved aside when damaged."""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from peqa_runtime.core import BaseManifest
from peqa_runtime.errors import InvalidScaleSet
from peqa_runtime.scales.atomic_file import write_atomic
from peqa_runtime.scales.scale_set import read_set_file
from peqa_runtime.scales.set_file import content_digest

logger = logging.getLogger(__name__)

_BLOB_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


class BlobFolder:
    """Files `<revision>.safetensors`. Its owner sees to it that one writer works at a time.

    `unfinished` and `quarantine` are folders on the same volume. Methods raise `OSError` as it comes.
    """

    def __init__(self, folder: Path, *, unfinished: Path, quarantine: Path, manifest: BaseManifest) -> None:
        self._folder = folder
        self._unfinished = unfinished
        self._quarantine = quarantine
        self._manifest = manifest

    def read(self, revision: str) -> bytes:
        """Return the file. Raises `InvalidScaleSet` unless it fits the base and the digest that it is named by."""
        data, header = read_set_file(self._path(revision), self._manifest)
        if content_digest(header, data) != revision:
            raise InvalidScaleSet("the content does not have the digest that it is named by")
        return data

    def has_size(self, revision: str, num_bytes: int) -> bool:
        """Return whether the file has this size, without reading it. Raises `FileNotFoundError`."""
        return self._path(revision).stat().st_size == num_bytes

    def write(self, revision: str, data: bytes) -> None:
        """Put the file there, durably, unless a sound one is there already."""
        try:
            self.read(revision)
        except (FileNotFoundError, InvalidScaleSet):
            write_atomic(self._path(revision), data, temporary=self._unfinished)

    def remove(self, revisions: Iterable[str]) -> None:
        """Remove the files that are there."""
        for revision in revisions:
            self._path(revision).unlink(missing_ok=True)

    def revisions(self) -> set[str]:
        """Return the revisions that have a file."""
        return {path.stem for path in self._folder.iterdir() if _BLOB_NAME.fullmatch(path.name)}

    def set_aside(self, revision: str) -> None:
        """Move a damaged file to quarantine."""
        self.quarantine(self._path(revision))

    def quarantine(self, path: Path) -> None:
        """Move any damaged file of the store to quarantine."""
        logger.warning("%s is damaged; moved to quarantine", path)
        os.replace(path, self._quarantine / f"{path.name}.{secrets.token_hex(4)}")

    def _path(self, revision: str) -> Path:
        assert _BLOB_NAME.fullmatch(f"{revision}.safetensors"), revision
        return self._folder / f"{revision}.safetensors"
