"""Which builds of the C library exist, and which of them this CPU and this operating system can run.

Imports nothing but the standard library: setup.py loads this file before anything is installed.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Isa:
    """One build of the library: its name, what the compiler is told, and what /proc/cpuinfo must list."""

    name: str
    compiler_flags: tuple[str, ...]
    cpu_flags: frozenset[str]
    wanted: bool = True  # False: older compilers do not know its instructions, and the others do without it

    @property
    def file_name(self) -> str:
        """Name of the built library, beside this file."""
        return f"_peqa_{self.name}.so"


_VNNI_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma")
_VNNI_CPU = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx2", "fma"})
_X86 = (  # best first
    Isa(
        "amx",
        (*_VNNI_FLAGS, "-mamx-tile", "-mamx-int8"),
        _VNNI_CPU | {"amx_tile", "amx_int8"},
        wanted=False,
    ),
    Isa("avx512vnni", _VNNI_FLAGS, _VNNI_CPU),
    Isa(
        "avx512",
        ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
        frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"}),
    ),
    Isa("avx2", ("-mavx2", "-mfma", "-mf16c"), frozenset({"avx2", "fma", "f16c"})),
    Isa("generic", (), frozenset()),
)
_ARM = (Isa("arm64", (), frozenset()),)


def builds(machine: str | None = None) -> tuple[Isa, ...]:
    """Builds for a machine type (default: this one's, as platform.machine() names it), best first."""
    machine = platform.machine() if machine is None else machine
    if machine.lower() in ("x86_64", "amd64"):
        return _X86
    if machine.lower() in ("aarch64", "arm64"):
        return _ARM
    return ()


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """CPU features that can be used; empty where the file is missing.

    Linux leaves a feature out whose registers it does not save, so what is listed needs no check of XCR0.
    """
    try:
        text = cpuinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    listed = [line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")]
    return frozenset.intersection(*map(frozenset, listed)) if listed else frozenset()


def usable(machine: str | None = None, flags: frozenset[str] | None = None) -> tuple[Isa, ...]:
    """Builds that run here without an illegal instruction, best first."""
    flags = cpu_flags() if flags is None else flags
    return tuple(isa for isa in builds(machine) if isa.cpu_flags <= flags)
