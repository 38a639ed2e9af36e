"""The commands that a benchmark runs: each a process of its own, as a user would start it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peqa_runtime.errors import PeqaError


class CommandFailed(PeqaError):
    """A command of the benchmark ended with an error; the message holds its last lines."""


@dataclass(frozen=True)
class Ran:
    """What a command printed last (one JSON object), and how long it took."""

    command: str
    report: dict[str, Any]
    seconds: float


def run(module: str, *arguments: object) -> Ran:
    """Run `python -m module …` and read the object that it prints; its progress goes to stderr.

    Raises `CommandFailed` when it does not end well.
    """
    words = [str(argument) for argument in arguments]
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", module, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        output = process.stdout.read()
        process.wait()
    except BaseException:
        process.terminate()  # whoever stops the benchmark alone stops its command too, which keeps its checkpoints
        process.wait()
        raise
    shown = shown_as(module, *arguments)
    if process.returncode:
        raise CommandFailed(f"`{shown}` ended with status {process.returncode}")
    lines = [line for line in output.splitlines() if line.startswith("{")]
    report = json.loads(lines[-1]) if lines else {}
    return Ran(shown, report, time.monotonic() - start)


def shown_as(module: str, *arguments: object) -> str:
    """A command as a table has it."""
    program = "peqa" if module == "peqa_runtime" else f"python -m {module}"
    return " ".join([program, *(_short(str(argument)) for argument in arguments)])


def _short(word: str) -> str:
    """Paths by their last two names: a table tells which file, not where it lay."""
    path = Path(word)
    return "/".join(path.parts[-2:]) if path.is_absolute() else word
