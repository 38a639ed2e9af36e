"""A run that is killed and a run of several processes, each as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from peqa_runtime.cli import app
from peqa_runtime.model import read_manifest
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.training.checkpoints import last_checkpoint

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
OPTIONS = ["--task", "t", "--steps", "24", "--batch", "4", "--warmup", "2", "--check-every", "3", "-q"]
OPTIONS += ["--lr", "2e-2", "--eval-fraction", "0.2", "--compute", "float32"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    pairs = ({"prompt": f"{i} is", "completion": f"t {i % 3}"} for i in range(40))
    file.write_text("\n".join(map(json.dumps, pairs)))
    return file


def train(base: Path, rows: Path, output: Path) -> list[str]:
    return ["train", str(base), str(rows), "-o", str(output), *OPTIONS]


def train_here(base: Path, rows: Path, output: Path) -> str:
    """In this process; what it said."""
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, train(base, rows, output), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stderr


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    train_here(tiny_base, rows, whole)
    process = subprocess.Popen(
        [sys.executable, "-m", "peqa_runtime", *train(tiny_base, rows, cut)], env=ENVIRONMENT
    )
    folder = tmp_path / "cut.safetensors.checkpoints"
    while process.poll() is None and last_checkpoint(folder) is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed in the middle"
    assert not cut.exists()
    assert "going on from" in train_here(tiny_base, rows, cut)
    manifest = read_manifest(tiny_base)
    expected, found = ScaleSet.parse(whole, manifest), ScaleSet.parse(cut, manifest)
    assert found.revision == expected.revision
    assert found.note["held_out_loss"] == expected.note["held_out_loss"]


WATCHED = """
import json, os, sys
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as Parallel
from peqa_runtime.cli import main

travelled = {"bytes": 0, "steps": 0}
init = Parallel.__init__

def watch(self, *args, **kwargs):
    init(self, *args, **kwargs)
    def count(state, bucket):
        travelled["bytes"] += bucket.buffer().nbytes
        travelled["steps"] += bucket.is_last()
        done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return done.then(lambda f: f.value()[0] / dist.get_world_size())
    self.register_comm_hook(None, count)
    own = [p for n, p in self.module.named_parameters() if n not in self.parameters_to_ignore]
    travelled["synced"] = sum(p.numel() for p in own)

Parallel.__init__ = watch
try:
    main()
finally:
    if os.environ["RANK"] == "0":
        open(sys.argv[0] + ".json", "w").write(json.dumps(travelled))
"""


@pytest.mark.slow
def test_two_processes_exchange_gradients_of_scales_only(tiny_base: Path, rows: Path, tmp_path: Path) -> None:
    one, two, script = tmp_path / "one.safetensors", tmp_path / "two.safetensors", tmp_path / "watched.py"
    train_here(tiny_base, rows, one)
    script.write_text(WATCHED)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    done = subprocess.run(
        [*launch, str(script), *train(tiny_base, rows, two), "--json"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    manifest = read_manifest(tiny_base)
    expected, found = ScaleSet.parse(one, manifest), ScaleSet.parse(two, manifest)
    assert report["revision"] == found.revision, "one process reports"
    worst = max(
        (found.tensors[n].float() - expected.tensors[n].float()).abs().max() for n in expected.tensors
    )
    assert worst < 2e-3 < max((t.float() - 1).abs().max() for t in expected.tensors.values())
    assert found.note["held_out_loss"] == pytest.approx(expected.note["held_out_loss"], rel=1e-3)
    travelled = json.loads((tmp_path / "watched.py.json").read_text())
    scales = sum(t.numel() for t in expected.tensors.values())
    assert travelled["synced"] == scales, "nothing frozen is sent at the start either"
    assert travelled["steps"] == 24
    assert travelled["bytes"] == 24 * scales * torch.float32.itemsize
