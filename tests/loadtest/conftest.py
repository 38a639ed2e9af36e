"""A running stub server for the tests of this folder, which share modules by name: tests are no package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from completion_stub import Stub, serve


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serve(Stub()) as running:
        yield running
