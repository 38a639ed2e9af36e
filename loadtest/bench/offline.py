"""The offline half of the bench, as the command that it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from peqa_loadtest.bench.figure import Figure
from peqa_loadtest.client import LoadTestError


class OfflineBench:
    """`python -m peqa_runtime.bench` on one base."""

    def __init__(self, base: Path | None, device: str, work: Path, options: list[str]) -> None:
        """`base` None: the demo's. `work`: a folder for its files. `options`: passed on to every run."""
        self._base = [] if base is None else [str(base)]
        self._device = device
        self._work = work
        self._options = options

    def figures(self, *parts: str) -> list[Figure]:
        """Measure some parts. Raises LoadTestError when the command fails."""
        file = self._work / "offline.json"
        self._run(
            [
                "--only",
                ",".join(parts),
                "--quiet",
                "--out",
                str(file),
                "--device",
                self._device,
                *self._options,
            ]
        )
        figures: list[Figure] = json.loads(file.read_text())
        return figures

    def scale_sets(self, count: int) -> list[Path]:
        """Random scale set files for the base."""
        folder = self._work / "sets"
        self._run(["--sets", str(folder), "--count", str(count)])
        return sorted(folder.glob("*.safetensors"))

    def _run(self, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "peqa_runtime.bench", *self._base, *arguments]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise LoadTestError(f"{' '.join(command[1:4])} failed:\n{done.stderr[-2000:]}")


def value_of(figures: list[Figure], name: str) -> float:
    """The value of the row with this name."""
    return float(next(row["value"] for row in figures if row["name"] == name))
