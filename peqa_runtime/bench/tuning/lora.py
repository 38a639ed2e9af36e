"""LoRA (PEFT) over the very same dequantized integers: what scale sets are compared with.

`python -m peqa_runtime.bench.tuning.lora BASE DATA --eval FILE …` tunes, measures and prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import get_scheduler

from peqa_kernels.quant_matmul import dequantize
from peqa_runtime.errors import InvalidData, PeqaError, TrainingDiverged
from peqa_runtime.evaluation.answers import Scored, answer_rows, check_rows, sample_rows
from peqa_runtime.evaluation.compare import interval
from peqa_runtime.evaluation.metrics import metric_named
from peqa_runtime.evaluation.reference import Reference
from peqa_runtime.peak_memory import peak_memory
from peqa_runtime.training.batches import StepBatches, held_out_batches, plan_batches
from peqa_runtime.training.data import EncodedData, encode_file
from peqa_runtime.training.rows import read_rows
from peqa_runtime.training.settings import TuneConfig
from peqa_runtime.training.tuning import (
    TunableModel,
    fast_compute_dtype,
    load_tunable,
    logits_at,
    quantized_linears,
)

RANK = 16
ALPHA = 32


@dataclass(frozen=True)
class LoraResult:
    """What tuning found. `held_out_loss` is the lowest, whose adapters are on the model now."""

    parameters: int
    bytes: int  # of a saved adapter in 16 bits
    train_loss: float
    held_out_loss: float | None
    best_step: int
    seconds: float


def with_lora(tunable: TunableModel, *, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Replace the quantized linears by floats in `dtype`, put LoRA on each; gives what is trained.

    Raises `InvalidData` where PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InvalidData(
            "the comparison with LoRA needs a package that is not here: pip install peft"
        ) from None
    names = list(quantized_linears(tunable.model, tunable.manifest))
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(tunable.model.get_submodule(parent), leaf, _dense(tunable, name, dtype))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=names)
    inject_adapter_in_model(config, tunable.model)
    trained: list[nn.Parameter] = []
    for name, parameter in tunable.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()
            trained.append(parameter)
    return trained


def _dense(tunable: TunableModel, name: str, dtype: torch.dtype) -> nn.Linear:
    linear = quantized_linears(tunable.model, tunable.manifest)[name]
    weight = dequantize(linear.weight_codes()).to(dtype)
    made = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.data.to(dtype), requires_grad=False)
    return made


def tune_lora(
    tunable: TunableModel,
    parameters: list[nn.Parameter],
    config: TuneConfig,
    data: EncodedData,
    held_out: EncodedData | None,
    *,
    progress: bool = True,
) -> LoraResult:
    """The same rows in the same batches, schedule, clipping and choice of the best step as scale sets have."""
    torch.manual_seed(config.seed)
    plan = plan_batches(
        [len(e.token_ids) for e in data.examples],
        rows=config.batch_rows,
        steps=config.steps,
        seed=config.seed,
    )
    batches = StepBatches([data.examples], [plan], tunable.eos_token_id)
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, config.beta2), weight_decay=0.0
    )
    schedule = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    scheduler = get_scheduler(
        schedule,
        optimizer,
        num_warmup_steps=min(config.warmup_steps, config.steps),
        num_training_steps=config.steps,
    )
    best, best_step, kept = math.inf, 0, [p.detach().clone() for p in parameters]
    losses: list[float] = []
    start = time.monotonic()
    for step in tqdm(range(config.steps), desc="LoRA", unit="step", disable=not progress):
        loss = lora_step(tunable, batches[step], config)
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        losses.append(loss)
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss became NaN or infinite at step {step + 1}")
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if held_out is not None and ((step + 1) % config.check_every == 0 or step + 1 == config.steps):
            found = held_out_loss(tunable, held_out, config)
            if found < best:
                best, best_step = found, step + 1
                kept = [p.detach().clone() for p in parameters]
    if held_out is not None:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)
    count = sum(p.numel() for p in parameters)
    last = losses[-10:]
    return LoraResult(
        count,
        2 * count,
        sum(last) / len(last),
        best if held_out is not None else None,
        best_step,
        time.monotonic() - start,
    )


def lora_step(tunable: TunableModel, batch: dict[str, Tensor], config: TuneConfig) -> float:
    """Forward and backward of one batch; its mean loss."""
    device = tunable.model.device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    tunable.model.train()
    with _autocast(tunable, config):
        logits = logits_at(tunable.model, batch["input_ids"], batch["positions"])
    losses = functional.cross_entropy(logits, batch["targets"], reduction="none")
    loss = (losses * batch["weights"]).sum()
    loss.backward()
    return loss.item()


def held_out_loss(tunable: TunableModel, data: EncodedData, config: TuneConfig) -> float:
    """Mean cross-entropy per token, in the dtype of the training."""
    tunable.model.eval()
    total = count = 0.0
    batches = held_out_batches(data.examples, rows=2 * config.batch_rows, pad_token_id=tunable.eos_token_id)
    with torch.no_grad(), _autocast(tunable, config):
        for given in batches:
            batch = given.to(tunable.model.device)
            logits = logits_at(tunable.model, batch.input_ids, batch.positions)
            total += functional.cross_entropy(logits, batch.targets, reduction="sum").item()
            count += len(batch.targets)
    return total / count


def _autocast(tunable: TunableModel, config: TuneConfig) -> torch.autocast:
    dtype = fast_compute_dtype(tunable.model.device, config.compute)
    return torch.autocast(tunable.model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def _measure(tunable: TunableModel, given: argparse.Namespace) -> dict[str, Any]:
    metric = metric_named(given.metric, ignore_case=given.ignore_case)
    rows = sample_rows(read_rows(given.test), given.limit, 0, skip_empty=given.filter_nonempty)
    tunable.model.eval()
    merge(tunable, load_tunable(given.base, device=given.device))
    model = Reference(tunable)
    check_rows(model, rows, metric)
    scored: list[Scored] = []
    with tqdm(total=len(rows), desc="evaluating", unit="rows", disable=given.quiet) as bar:
        for batch in answer_rows(model, rows, metric):
            scored += batch
            bar.update(len(batch))
    scored.sort(key=lambda one: one.number)
    found = interval(np.array([one.stats for one in scored]), metric, seed=given.seed)
    if given.predictions:
        lines = [json.dumps(asdict(one), ensure_ascii=False) for one in scored]
        given.predictions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        given.metric.replace("-", "_"): found.value,
        "low": found.low,
        "high": found.high,
        "rows": len(rows),
    }


def merge(tunable: TunableModel, untuned: TunableModel) -> None:
    """Make `with_lora`'s linears plain fp32 ones, adapters added: the same answers but for rounding, sooner.

    The weights in 16 bits that were trained beside are not added to, but those that `untuned` has codes of.
    """
    for name, linear in quantized_linears(untuned.model, untuned.manifest).items():
        tuned: Any = tunable.model.get_submodule(name)
        plain = tuned.get_base_layer()
        plain.weight.data = dequantize(linear.weight_codes())
        if linear.bias is not None:
            plain.bias.data = linear.bias.data.float()
        tuned.merge()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 1 for an error that is the caller's."""
    given = _parser().parse_args(arguments)
    try:
        tunable = load_tunable(given.base, device=given.device)
        data = encode_file(given.data, tunable, max_tokens=given.max_tokens)
        held_out = encode_file(given.eval, tunable, max_tokens=given.max_tokens) if given.eval else None
        config = TuneConfig(
            steps=given.steps,
            learning_rate=given.lr,
            schedule=given.schedule,
            beta2=given.beta2,
            batch_rows=given.batch,
            warmup_steps=given.warmup,
            check_every=given.check_every,
            seed=given.seed,
        )
        device = tunable.model.device
        parameters = with_lora(tunable, dtype=fast_compute_dtype(device, config.compute))
        result = tune_lora(tunable, parameters, config, data, held_out, progress=not given.quiet)
        settings = ("steps", "learning_rate", "schedule", "beta2")
        report = asdict(result) | {name: getattr(config, name) for name in settings}
        report["peak_memory_bytes"] = peak_memory(device)  # of tuning: to answer takes more
        if given.test:
            report |= _measure(tunable, given)
    except (PeqaError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m peqa_runtime.bench.tuning.lora", description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path, help="rows to train on")
    parser.add_argument("--eval", type=Path, help="held-out rows: the best step on them is kept")
    parser.add_argument("--test", type=Path, help="rows to measure on")
    parser.add_argument("--metric", default="exact-match")
    parser.add_argument("--ignore-case", action="store_true")
    parser.add_argument("--filter-nonempty", action="store_true")
    parser.add_argument("--limit", type=int, default=None, help="sampled test rows")
    parser.add_argument("--predictions", type=Path, help="write every answer here")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--check-every", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine")
    parser.add_argument("--beta2", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quiet", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
