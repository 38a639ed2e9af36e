"""Whether Triton's interpreter works with the NumPy that is here."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version


def fails(triton: str, numpy: str) -> bool:
    """Whether loops with a run-time bound fail under these versions."""
    return Version(triton) < Version("3.9") and Version(numpy) >= Version("2.4")


needs_loops = pytest.mark.skipif(
    fails(version("triton"), version("numpy")),
    reason="the interpreter of Triton before 3.9 fails on loops with a run-time bound under NumPy 2.4",
)
