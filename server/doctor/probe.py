"""Questions to other programs, each with a limit of time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

SHARE = 0.9  # of a check's time: the program is ended before the check is given up


class ProbeFailed(Exception):
    """The program did not answer; the message says how it ended."""


def answer(command: Sequence[str], seconds: float) -> str:
    """What the program prints. Raises `ProbeFailed`."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, check=False
        )
    except FileNotFoundError:
        raise ProbeFailed(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise ProbeFailed(f"{command[0]} gave no answer within {seconds:g} s") from None
    except OSError as error:
        raise ProbeFailed(f"{command[0]} cannot be run: {error.strerror}") from None
    if done.returncode < 0:
        raise ProbeFailed(f"{command[0]} was killed by signal {-done.returncode}")
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no word why"]
        raise ProbeFailed(f"{command[0]} ended with status {done.returncode}: {lines[-1][:200]}")
    return done.stdout


def facts(*question: str, seconds: float) -> dict[str, Any]:
    """What `peqa_runtime.diagnosis` knows, for a check that has so many seconds. Raises `ProbeFailed`."""
    text = answer([sys.executable, "-m", "peqa_runtime.diagnosis", *question], SHARE * seconds)
    try:
        found: dict[str, Any] = json.loads(text.splitlines()[-1])
    except (ValueError, IndexError):
        raise ProbeFailed("peqa_runtime.diagnosis printed no facts") from None
    return found
