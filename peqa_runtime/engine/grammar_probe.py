"""Compiles a form in a process of its own first, which may take little time and memory, and ends either way.

llguidance limits much of what it does, but not all: sixty patterns under an `allOf` were seen to take minutes and
20 GB. A thread cannot be ended, a process can: `python -m peqa_runtime.engine.grammar_probe` reads a constraint's
values as JSON.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

from peqa_runtime.constraint import Constraint
from peqa_runtime.engine.grammar import check_installed, llguidance, new_matcher
from peqa_runtime.errors import InvalidRequest

CPU_SECONDS = 2.0
MEMORY_BYTES = 128 << 20
"""For the form alone; forms are kept."""
WALL_SECONDS = 30.0
"""For those CPU_SECONDS on a machine that is busy with other things."""


def check(constraint: Constraint) -> None:
    """Raise `InvalidRequest` when the constraint cannot be compiled within the limits, or at all. Blocks meanwhile.

    `RuntimeError`, `OSError`: the process could not do its work.
    """
    check_installed()
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__],
            input=json.dumps(astuple(constraint)).encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InvalidRequest(_TOO_LONG, param="structured") from None
    if done.returncode == -signal.SIGPROF:
        raise InvalidRequest(_TOO_LONG, param="structured")
    if done.returncode < 0 or b"MemoryError" in done.stderr:
        raise InvalidRequest(
            f"compiling it fails within {MEMORY_BYTES >> 20} MiB of memory; make it simpler",
            param="structured",
        )
    if done.returncode != 0:
        raise RuntimeError(f"{__name__} failed: {done.stderr.decode(errors='replace')[-500:]}")
    problem = json.loads(done.stdout)
    if problem is not None:
        raise InvalidRequest(problem, param="structured")


_TOO_LONG = f"it takes longer than {CPU_SECONDS:g} seconds to compile; make it simpler"


class _Bytes:
    """A tokenizer of 256 bytes and an end: what takes time and memory does not depend on the vocabulary."""

    def __init__(self) -> None:
        self.tokens = [bytes([i]) for i in range(256)] + [b"<end>"]
        self.special_token_ids = [256]
        self.eos_token_id = 256
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def main() -> None:
    """Read a constraint from stdin, write null or what is wrong with it to stdout, as JSON."""
    constraint = Constraint(*json.load(sys.stdin))
    wrapper: Any = llguidance.TokenizerWrapper(_Bytes())
    tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=257)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    problem = None
    try:
        new_matcher(tokenizer, constraint)
    except InvalidRequest as error:
        problem = str(error)
    json.dump(problem, sys.stdout)


if __name__ == "__main__":
    main()
