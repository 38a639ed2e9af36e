"""`peqa tasks fill`: generated tasks in a store, for a server that runs on it or will."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from peqa_runtime.model import read_manifest
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_server.cli import app


def test_fill_puts_tasks_into_a_store(tiny_base: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    arguments = ["tasks", "fill", str(tiny_base), "--count", "3", "--store", str(store), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"store": str(store), "added": 3, "tasks": 3}
    opened = ScaleStore(store, read_manifest(tiny_base))
    assert opened.tasks() == ["synthetic-00000", "synthetic-00001", "synthetic-00002"]
    assert len({opened.load(task).revision for task in opened.tasks()}) == 3


def test_what_is_no_base_is_one_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["tasks", "fill", str(tmp_path), "--count", "3", "--store", str(tmp_path / "store")]
    )
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.output
