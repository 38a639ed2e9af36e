"""Steps per second and peak memory of tuning: a `channel` set and LoRA on the same base, batch and machine.

`python -m peqa_runtime.bench.tuning.cost BASE` measures both ways: speed by taking turns in one process, memory by a
process of its own for each. LoRA's frozen weights lie in the dtype that is multiplied: the least it can do with.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from peqa_kernels.bench.machine import device_name
from peqa_kernels.bench.row import Row
from peqa_runtime.bench.tuning.lora import with_lora
from peqa_runtime.peak_memory import peak_memory
from peqa_runtime.training.attention import tuning_attention
from peqa_runtime.training.batches import StepBatches
from peqa_runtime.training.data import Example
from peqa_runtime.training.elementwise import fused_elementwise
from peqa_runtime.training.token_losses import token_losses
from peqa_runtime.training.tuning import (
    TunableModel,
    fast_compute_dtype,
    load_tunable,
    logits_at,
    start_tuning,
)

OURS, LORA = "channel", "lora"
LORA_OUR_ATTENTION = "lora-our-attention"
WAYS = (OURS, LORA, LORA_OUR_ATTENTION)
Step = Callable[[], float]


def prepare(base: Path, way: str, inside: ExitStack, *, rows: int, tokens: int, device: str = "auto") -> Step:
    """A call that makes one optimizer step on a fixed batch of random tokens, a quarter of each row in the loss.

    It is to be made while `inside` is open, which holds what a whole training runs in.

    LoRA runs on transformers' own forwards, as PEFT's users have them, or on the trainer's attention
    (`LORA_OUR_ATTENTION`).
    """
    tunable = load_tunable(base, device=device)
    dtype = fast_compute_dtype(tunable.model.device)
    if way == OURS:
        parameters: list[nn.Parameter] = list(start_tuning(tunable, "channel").values())
    else:
        parameters = with_lora(tunable, dtype=dtype)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    batch = _batch(tunable, rows, tokens)
    tunable.model.train()
    if way != LORA:
        inside.enter_context(tuning_attention(tunable.model))
    if way == OURS:
        inside.enter_context(fused_elementwise(tunable.model))

    def step() -> float:
        amp = torch.autocast(tunable.model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        with amp:
            where = (batch["input_ids"], batch["positions"])
            if way == OURS:
                losses = token_losses(tunable, tunable.model, *where, batch["targets"])
            else:
                losses = functional.cross_entropy(
                    logits_at(tunable.model, *where), batch["targets"], reduction="none"
                )
        loss = (losses * batch["weights"]).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _batch(tunable: TunableModel, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    rng = random.Random(0)
    vocab = tunable.model.get_input_embeddings().num_embeddings
    examples = [
        Example(tuple(rng.randrange(vocab) for _ in range(tokens + 1)), tokens // 2) for _ in range(rows)
    ]
    batch = StepBatches([examples], [[tuple(range(rows))]], 0)[0]
    return {name: tensor.to(tunable.model.device) for name, tensor in batch.items()}


def seconds_per_step(
    base: Path, *, rows: int, tokens: int, steps: int, device: str = "auto"
) -> dict[str, list[float]]:
    """Seconds of each timed step of each way, taken in turns after one that warms up."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as inside:
        ways = {way: prepare(base, way, inside, rows=rows, tokens=tokens, device=device) for way in WAYS}
        for turn in range(steps + 1):
            for way, step in ways.items():
                start = time.perf_counter()
                step()  # gives a number of the host, so a GPU has finished
                if turn:
                    found[way].append(time.perf_counter() - start)
    return found


def peak_bytes(base: Path, way: str, *, rows: int, tokens: int, device: str = "auto") -> int:
    """Largest memory of a process that makes three steps this way: of the GPU where it runs there, else resident."""
    command = [sys.executable, "-m", "peqa_runtime.bench.tuning.cost", str(base), "--way", way]
    command += ["--rows", str(rows), "--tokens", str(tokens), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {way} failed: {done.stderr.strip()[-500:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def measure(base: Path, *, rows: int, tokens: int, steps: int, device: str = "auto") -> list[Row]:
    """The rows of the table: both ways' figures, and the ratios that are held against bars."""
    seconds = seconds_per_step(base, rows=rows, tokens=tokens, steps=steps, device=device)
    peaks = {way: peak_bytes(base, way, rows=rows, tokens=tokens, device=device) for way in WAYS}
    place = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    facts = {"device": device_name(place), "rows": rows, "tokens": tokens, "steps": steps}
    found: list[Row] = []
    for way in WAYS:
        least = min(seconds[way])
        more = facts | {"median_s": statistics.median(seconds[way])}
        found.append(Row(f"tuning/cost/{way}/seconds-per-step", least, "s", "<=", None, more))
        found.append(Row(f"tuning/cost/{way}/peak-memory", float(peaks[way]), "bytes", "<=", None, facts))
    for way, bar in ((LORA, 1.2), (LORA_OUR_ATTENTION, None)):
        ratio = min(seconds[way]) / min(seconds[OURS])
        found.append(Row(f"tuning/cost/steps-per-second-against-{way}", ratio, "x", ">=", bar, facts))
    memory = peaks[OURS] / peaks[LORA]
    found.append(Row("tuning/cost/peak-memory-against-lora", memory, "x", "<=", 1.0, facts))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m peqa_runtime.bench.tuning.cost", description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument(
        "--way", choices=WAYS, help="only make three steps this way and print the peak memory"
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    if given.way is None:
        for row in measure(
            given.base, rows=given.rows, tokens=given.tokens, steps=given.steps, device=given.device
        ):
            sys.stdout.write(json.dumps(row.to_dict()) + "\n")
        return 0
    with ExitStack() as inside:
        options = {"rows": given.rows, "tokens": given.tokens, "device": given.device}
        step = prepare(given.base, given.way, inside, **options)
        for _ in range(3):
            step()
    place = torch.device("cuda" if torch.cuda.is_available() and given.device != "cpu" else "cpu")
    sys.stdout.write(json.dumps({"peak_bytes": peak_memory(place)}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
