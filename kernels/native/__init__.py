"""The CPU kernels in C, compiled when the package is installed and called through ctypes."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from peqa_kernels.native import isa as _isa
from peqa_kernels.native.ops import NativeOps, NoRegisters, StaleLibrary
from peqa_kernels.native.packed import PackedWeight
from peqa_kernels.native.tile_check import tiles_agree

__all__ = ["NativeOps", "PackedWeight", "load"]

_log = logging.getLogger(__name__)


@functools.cache
def load(isa: str | None = None, folder: Path | None = None) -> NativeOps | None:
    """Load the best build that this CPU can run, or None where there is none (said once, in the log).

    `isa` asks for one build by name ("amx", "avx512", "avx2", "generic", "arm64"), `folder` for another place than this
    package's. Never loads a build whose instructions this CPU or operating system lacks.
    """
    folder = Path(__file__).parent if folder is None else folder
    problems = []
    for build in _isa.usable():
        if isa is not None and build.name != isa:
            continue
        path = folder / build.file_name
        if not path.is_file():
            problems.append(f"{path.name} is missing")
            continue
        try:
            ops = NativeOps(path, build)
        except (OSError, StaleLibrary, NoRegisters) as error:
            problems.append(str(error))
            continue
        if build.name == "amx" and not tiles_agree(ops, load("avx512vnni", folder)):
            problems.append(f"{path.name} computes wrongly on this machine")
            _log.warning("the matrix tiles (AMX) of this machine compute wrongly and are not used")
            continue
        return ops
    if isa is None:
        _log.warning(
            "the compiled CPU kernels are not to be had (%s), so torch's own, slower ones are used. To build them: "
            "`python -m peqa_kernels.native.compile` with a C compiler or `pip install ziglang`",
            "; ".join(problems) or "no build for this kind of CPU",
        )
    return None
