"""The keys of a running server: as the file says now, or as it said last when it cannot be read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from peqa_server.access import key_file
from peqa_server.access.api_key import ApiKey, KeySet
from peqa_server.access.key_file import Stamp
from peqa_server.access.key_json import KeyFileError

log = logging.getLogger("peqa.server")

LOOK_SECONDS = 0.5  # a revoked key works no longer than this; one stat() in it costs nothing


class KeyRing:
    """Finds keys; looks at the file when it is asked, at most every `LOOK_SECONDS`.

    A file that is damaged, gone or unreadable changes nothing: the keys read last stay, and the log says so once
    per reason. A file that began as JSON is never read as plain keys. Raises `KeyFileError` when the
    file cannot be used at the start.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self.damaged = False
        self._clock = clock
        self._keys, self._form, stamp = key_file.read(path)
        if not self._keys.keys:
            raise KeyFileError(
                f"{path} holds no key; make one with: peqa keys make NAME --role admin --file {path}"
            )
        self._seen: Stamp | str = stamp
        self._complaint = ""
        self._look_at = clock() + LOOK_SECONDS

    @property
    def keys(self) -> KeySet:
        """The keys that are valid now."""
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._look()
        return self._keys

    def find(self, text: bytes) -> ApiKey | None:
        """The key whose text this is, revoked and expired ones included."""
        return self.keys.find(text)

    def _look(self) -> None:
        try:
            seen: Stamp | str = key_file.stamp_of(self.path)
        except OSError as error:
            seen = error.strerror or "it is gone"
        if seen == self._seen and not self.damaged:
            return
        self._seen = seen
        try:
            keys, form, self._seen = key_file.read(self.path)
            if self._form == "json" and form != "json":
                raise KeyFileError(f"{self.path} was JSON and is no longer")
        except KeyFileError as error:
            self.damaged = True
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("the keys read before stay valid: %s", error)
            return
        self._keys, self._form, self.damaged, self._complaint = keys, form, False, ""
        log.info("%s was read again: %d keys", self.path, len(keys.keys))
