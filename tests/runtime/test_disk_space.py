"""A full disk is named whatever writes to it; other failures stay what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from peqa_runtime.disk_space import disk_full_named
from peqa_runtime.errors import DiskFull

FULL = Path("/dev/full")  # every write to it fails as on a full disk


@pytest.mark.skipif(not FULL.is_char_device(), reason="this system has no /dev/full")
def test_writes_to_a_full_disk_are_named() -> None:
    named = pytest.raises(DiskFull, match=r"full at /dev/full: \d+ MB are free; make room.*goes on")
    with named, disk_full_named(FULL), open(FULL, "w") as file:
        file.write("words")
    with pytest.raises(DiskFull, match=r"same command again$"), disk_full_named(FULL, resumes=False):
        torch.save(torch.zeros(1000), FULL)


def test_safetensors_says_it_in_words_and_other_failures_pass(tmp_path: Path) -> None:
    with pytest.raises(DiskFull), disk_full_named(tmp_path / "not" / "there"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    for other in (PermissionError(13, "no"), SafetensorError("bad header"), RuntimeError("shapes differ")):
        with pytest.raises(type(other)), disk_full_named(tmp_path):
            raise other
