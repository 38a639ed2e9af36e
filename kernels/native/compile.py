"""Compile the C sources of this folder, one library per instruction set, beside them.

setup.py runs this when the package is installed; `python -m peqa_kernels.native.compile` runs it again after the C
code has changed. A plain C compiler is enough, and one from PyPI (ziglang) will do: no header of Python, torch, libc
or OpenMP is used and nothing is linked, so a library built on one Linux runs on another, old or musl-based.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

SOURCES = (
    "pack_rows.c",
    "quant_matmul.c",
    "tile_rate.c",
    "paged_attention.c",
    "block_tables.c",
    "decoder.c",
    "dequantize.c",
    "sampling.c",
    "training.c",
)
# -ffp-contract=off: the compiler must not choose where a multiply-add is fused, the source says it (vec.h).
FLAGS = (
    "-O3",
    "-std=c11",
    "-Wall",
    "-Wextra",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-stack-protector",
    "-fvisibility=hidden",
    "-fPIC",
    "-ffreestanding",  # a compiler without the C library's headers will do
)
# -nostdlib: the only symbols left open are memcpy and memset, which the process already has.
LINK_FLAGS = ("-shared", "-nostdlib", "-s")  # -s: ziglang adds debug information
_MAKERS = ("compile.py", "isa.py")
_TIMEOUT = 600.0  # seconds of one file; ziglang takes under a minute on a slow core
_JOBS = 16  # at once, and no more than there are cores; each takes up to 0.3 GB


def compilers() -> Iterator[list[str]]:
    """Commands of the C compilers at hand: $CC, cc, gcc, clang, then the ziglang package."""
    named = os.environ.get("CC")
    if named:
        yield named.split()
    for name in ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path:
            yield [path]
    if importlib.util.find_spec("ziglang") is not None:
        libc = "gnu" if platform.libc_ver()[0] == "glibc" else "musl"
        # A named target, or zig would compile for the very CPU it runs on.
        yield [sys.executable, "-m", "ziglang", "cc", "-target", f"{platform.machine()}-linux-{libc}"]


def compile_all(folder: Path | None = None, output: Path | None = None) -> list[Path]:
    """Compile every build for this machine type from `folder` (default: this file's) into `output` (default: the same).

    Returns the libraries made. Raises RuntimeError with the compilers' own words when none could make all of them.
    """
    folder = Path(__file__).parent if folder is None else folder
    output = folder if output is None else output
    builds = _isa(folder).builds()
    if not builds:
        raise RuntimeError(f"there is no build for {platform.machine()}")
    failures = []
    for compiler in compilers():
        errors = _compile(compiler, {output / isa.file_name: isa.compiler_flags for isa in builds}, folder)
        missed = [
            errors[output / isa.file_name] for isa in builds if isa.wanted and errors[output / isa.file_name]
        ]
        if missed:
            failures.append(f"{' '.join(compiler)}: {missed[0]}")
            continue
        for target, error in errors.items():
            if error:
                target.unlink(missing_ok=True)  # one of earlier sources would be found stale
        return [target for target, error in errors.items() if not error]
    raise RuntimeError("\n".join(failures) or "no C compiler (cc, gcc, clang) and no ziglang package")


def is_current(folder: Path | None = None) -> bool:
    """Whether `folder` (default: this file's) has every wanted library, made after the last change of what makes it."""
    folder = Path(__file__).parent if folder is None else folder
    made = [folder / isa.file_name for isa in _isa(folder).builds() if isa.wanted]
    sources = [path for path in folder.iterdir() if path.suffix in (".c", ".h") or path.name in _MAKERS]
    changed = max(path.stat().st_mtime for path in sources)
    return bool(made) and all(path.is_file() and path.stat().st_mtime > changed for path in made)


def _compile(compiler: list[str], builds: dict[Path, tuple[str, ...]], folder: Path) -> dict[Path, str]:
    """Compile libraries, each with flags of its own; for each the empty string, or what went wrong.

    One file of one build is a job, so that a machine with many cores waits for the longest of them alone.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with (
        tempfile.TemporaryDirectory(prefix="peqa-build-") as scratch,
        ThreadPoolExecutor(min(cores, _JOBS)) as pool,
    ):
        jobs: dict[Path, list[tuple[Path, Future[str]]]] = {target: [] for target in builds}
        for name in SOURCES:
            for number, (target, flags) in enumerate(builds.items()):
                made = Path(scratch, f"{number}-{name}.o")
                command = [*compiler, *FLAGS, *flags, "-c", str(folder / name), "-o", str(made)]
                jobs[target].append((made, pool.submit(_run, command, scratch)))
        try:
            return {
                target: _link(compiler, builds[target], jobs[target], target, scratch) for target in builds
            }
        except BaseException:  # Ctrl-C: what has not begun need not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _link(
    compiler: list[str],
    flags: tuple[str, ...],
    jobs: list[tuple[Path, Future[str]]],
    target: Path,
    scratch: str,
) -> str:
    """Make a library of what the jobs make; the empty string, or what went wrong first."""
    errors = [job.result() for _, job in jobs]
    if failed := next(filter(None, errors), ""):
        return failed
    # Renamed at the end, so that a process that has the old library open, or an interruption, does no harm.
    made = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        command = [*compiler, *FLAGS, *flags, *LINK_FLAGS, *(str(path) for path, _ in jobs), "-o", str(made)]
        if not (error := _run(command, scratch)):
            made.replace(target)
    except OSError as problem:
        error = str(problem)
    finally:
        made.unlink(missing_ok=True)
    return error


def _run(command: list[str], scratch: str) -> str:
    """Run a compiler; the empty string, or what went wrong."""
    environment = dict(os.environ)
    cache = tempfile.mkdtemp(
        prefix="cache-", dir=scratch
    )  # its own: ziglang's do not bear many writers at once
    environment.setdefault("ZIG_GLOBAL_CACHE_DIR", cache)
    environment.setdefault("ZIG_LOCAL_CACHE_DIR", cache)
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT, env=environment, cwd=scratch
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode:
        return (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
    return ""


def _isa(folder: Path) -> ModuleType:
    """isa.py, by its path: while the package is being installed it cannot be imported by name."""
    spec = importlib.util.spec_from_file_location("peqa_native_isa", folder / "isa.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks its module up
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    for path in compile_all():
        sys.stdout.write(f"{path}\n")
