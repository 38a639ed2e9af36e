"""A thread that looks every so often whether other processes changed the store: off the step's path, one `stat`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from peqa_runtime.errors import StoreError

logger = logging.getLogger(__name__)


class StoreWatch:
    """Calls `refresh` every `seconds` until `stop`. What fails is tried again, and logged once."""

    def __init__(self, refresh: Callable[[], None], seconds: float) -> None:
        assert seconds > 0
        self._refresh = refresh
        self._seconds = seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peqa-store-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after a look that is under way."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        failed = False
        while not self._ended.wait(self._seconds):
            try:
                self._refresh()
                failed = False
            except Exception as error:
                if not failed:
                    unforeseen = None if isinstance(error, StoreError) else error
                    logger.warning(
                        "changes by other processes cannot be seen: %s", error, exc_info=unforeseen
                    )
                failed = True
