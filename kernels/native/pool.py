"""Torch's OpenMP pool, as addresses that C can call: no second pool of threads, and no OpenMP runtime to link."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


class Pool(ctypes.Structure):
    """peqa_pool of pool.h; all zero means: work in the calling thread."""

    _fields_ = (
        ("parallel", ctypes.c_void_p),
        ("thread_num", ctypes.c_void_p),
        ("num_threads", ctypes.c_void_p),
    )


_SYMBOLS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
_RUNTIMES = ("libgomp", "libiomp5", "libomp")  # each of them has GOMP_parallel


def find_pool() -> Pool:
    """Addresses in the OpenMP runtime that torch has loaded; an empty pool where there is none."""
    for path in _loaded_runtimes():
        try:
            library = ctypes.CDLL(path)  # already loaded: this only takes another handle
            return Pool(*(ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in _SYMBOLS))
        except (OSError, AttributeError):
            continue
    return Pool()


def _loaded_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes mapped into this process, torch's own first."""
    home = str(Path(torch.__file__).parent)
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    paths = {line.partition("/")[2] for line in lines if "/" in line}
    found = ["/" + path for path in paths if path.rpartition("/")[2].startswith(_RUNTIMES)]
    return sorted(found, key=lambda path: (not path.startswith(home), path))
