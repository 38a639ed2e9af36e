"""The threads of the C library: started when first asked for, asleep between calls, gone with the process."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable


class _State(ctypes.Structure):
    """peqa_pool of pool.h; all zero is its right beginning."""

    _fields_ = (
        ("ticket", ctypes.c_uint64),
        ("work", ctypes.c_void_p),
        ("data", ctypes.c_void_p),
        ("parts", ctypes.c_int32),
        ("left", ctypes.c_int32),
        ("jobs", ctypes.c_int32),
        ("asleep", ctypes.c_int32),
        ("waiting", ctypes.c_int32),
        ("busy", ctypes.c_int32),
        ("workers", ctypes.c_int32),
        ("thread", ctypes.c_int32 * 256),
        ("barred", ctypes.c_int32 * 256),
        ("allowed", ctypes.c_uint64 * 16),
    )


class Pool:
    """Threads that take parts of a call's work. A forked child has none of them and starts its own."""

    def __init__(self, serve: Callable[[int], None]) -> None:
        """`serve(address of the state)` is the C function that a thread lives in."""
        self._serve = serve
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()  # a fork may have copied one that another thread held
        self._state = _State()
        self.address = ctypes.addressof(self._state)
        self._helpers = 0
        self._process = os.getpid()

    def at_least(self, threads: int) -> int:
        """Address of the state, once `threads` threads, the caller's included, can work on a call."""
        if threads - 1 > self._helpers or self._process != os.getpid():
            with self._lock:
                if self._process != os.getpid():
                    self._begin()
                while self._helpers < threads - 1:
                    # The closure keeps the state alive as long as a thread reads it: for ever.
                    state = self._state
                    helper = threading.Thread(
                        target=lambda state=state: self._serve(ctypes.addressof(state)),
                        name="peqa-kernel",
                        daemon=True,
                    )
                    try:
                        helper.start()
                    except RuntimeError:  # no more threads may be had: the caller does their parts, too
                        break
                    self._helpers += 1
        return self.address
