"""Tune one task's scales on a frozen base: transformers' training loop over the runtime's own quantized linears.

AdamW without weight decay on fp32 scales relative to the base, warm-up, decay, gradient clipping. Checkpoints hold
scales and optimizer only (a few MB). Everything that decides the result is in `TuneConfig` and the data, so a run
that was interrupted goes on to the same set.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from peqa_runtime.core import SCALE_KINDS, ScaleKind, check_task_name
from peqa_runtime.errors import InvalidData
from peqa_runtime.training.callbacks import KeepPositive, ProgressBar, StopOnSignal
from peqa_runtime.training.data import EncodedData, Example, TokenBatch, collate, plan_batches
from peqa_runtime.training.tuning import (
    Compute,
    TunableModel,
    batch_to,
    fast_compute_dtype,
    logits_at,
    set_scales,
    start_tuning,
    tuned_scales,
)

MASTERS = "scales.safetensors"
RUN_FILE = "run.json"


class TrainingInterrupted(Exception):
    """The run was stopped by the user; its checkpoint is written and the same command goes on."""


@dataclass(frozen=True)
class TuneConfig:
    """What decides a run's result, the data aside. The learning rate is per step on the relative scale."""

    task: str
    kind: ScaleKind = "channel"
    steps: int = 500
    learning_rate: float = 1e-2
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 20
    batch_rows: int = 16
    clip: float = 1.0
    seed: int = 0
    compute: Compute = "auto"
    check_every: int = 100  # steps between held-out losses and checkpoints

    def __post_init__(self) -> None:
        """Refuse values that cannot be meant."""
        check_task_name(self.task)
        checks = (
            ("kind", self.kind in SCALE_KINDS, f"one of {', '.join(SCALE_KINDS)}"),
            ("steps", self.steps >= 1, "at least 1"),
            ("learning_rate", 0 < self.learning_rate <= 1, "above 0 and at most 1"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("batch_rows", self.batch_rows >= 1, "at least 1"),
            ("clip", self.clip > 0, "above 0"),
            ("check_every", self.check_every >= 1, "at least 1"),
        )
        for name, ok, allowed in checks:
            if not ok:
                raise InvalidData(f"{name} must be {allowed}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class TuneResult:
    """Outcome of a run: the scales (fp32, by their name in a file) and what is noted about it."""

    scales: dict[str, Tensor]
    train_loss: float
    held_out_loss: float | None
    best_step: int
    tokens: int
    seconds: float


class ScaleTrainer(Trainer):
    """`transformers.Trainer` that trains, saves and restores the scales only."""

    control: TrainerControl

    def __init__(self, *, tunable: TunableModel, held_out: Sequence[TokenBatch], **kwargs: Any) -> None:
        super().__init__(model=tunable.model, **kwargs)
        self.held_out = held_out
        self.tokens_seen = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mean cross-entropy over the batch's loss tokens."""
        self.tokens_seen += inputs["input_ids"].numel()
        logits = logits_at(self.accelerator.unwrap_model(model), inputs["input_ids"], inputs["positions"])
        return functional.cross_entropy(logits, inputs["targets"])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss per token, in the dtype of the training."""
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.held_out:
                batch = batch_to(batch, self.args.device)
                logits = logits_at(self.model, batch.input_ids, batch.positions)
                total += functional.cross_entropy(logits, batch.targets, reduction="sum").item()
                count += len(batch.targets)
        metrics = {"eval_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(detached(tuned_scales(self.model)), folder / MASTERS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        set_scales(model or self.model, load_file(Path(resume_from_checkpoint) / MASTERS))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def detached(scales: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies on the host, fp32."""
    return {name: p.detach().to("cpu", torch.float32, copy=True).contiguous() for name, p in scales.items()}


class PlannedBatches(torch.utils.data.Dataset):
    """Item i is the batch of step i, so resuming means going on at another index."""

    def __init__(self, data: EncodedData, plan: Sequence[tuple[int, ...]], pad_token_id: int) -> None:
        self.data, self.plan, self.pad_token_id = data, plan, pad_token_id

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole run, padding included."""
        lengths = [len(example.token_ids) - 1 for example in self.data.examples]
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in self.plan)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        batch = collate([self.data.examples[i] for i in self.plan[step]], self.pad_token_id)
        return {"input_ids": batch.input_ids, "positions": batch.positions, "targets": batch.targets}


class InOrderTrainer(ScaleTrainer):
    """Takes the planned batches one after the other."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def held_out_batches(data: EncodedData, *, rows: int, pad_token_id: int) -> list[TokenBatch]:
    """Batches of like lengths that cover `data` once."""
    ordered: list[Example] = sorted(data.examples, key=lambda e: len(e.token_ids))
    return [collate(ordered[i : i + rows], pad_token_id) for i in range(0, len(ordered), rows)]


def last_checkpoint(folder: Path) -> Path | None:
    """Newest complete checkpoint (the state file is written last, so one that was cut short is passed over)."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            found.append((int(json.loads((path / "trainer_state.json").read_text())["global_step"]), path))
        except (OSError, ValueError, KeyError):
            continue
    return max(found)[1] if found else None


def prepare_folder(folder: Path, fingerprint: dict[str, Any], *, resume: bool | None) -> Path | None:
    """Checkpoint to go on from, or None for a new run. `resume`: True must, False must not, None if there is one.

    A folder of a run with other settings or data raises `InvalidData` rather than mixing two runs.
    """
    wanted = json.loads(json.dumps(fingerprint))
    if resume is False and folder.exists():
        shutil.rmtree(folder)
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        try:
            before = json.loads((folder / RUN_FILE).read_text())
        except (OSError, ValueError):
            before = {}
        changed = sorted(key for key in wanted.keys() | before.keys() if wanted.get(key) != before.get(key))
        if changed:
            raise InvalidData(
                f"{folder} holds a run with other settings ({', '.join(changed)}); "
                "use the same ones to go on, or --no-resume to start anew"
            )
        return checkpoint
    if resume:
        raise InvalidData(f"nothing to resume: {folder} holds no complete checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f"{RUN_FILE}.tmp"
    staged.write_text(json.dumps(wanted, indent=1))
    os.replace(staged, folder / RUN_FILE)
    return None


def tune(
    tunable: TunableModel,
    config: TuneConfig,
    data: EncodedData,
    held_out: EncodedData | None,
    *,
    folder: Path,
    resume_from: Path | None = None,
    progress: bool = True,
    on_log: Callable[[dict[str, float]], None] | None = None,
) -> TuneResult:
    """Tune scales of `config.kind`; checkpoints go to `folder`. Returns the last, or best held-out, scales.

    Raises `TrainingInterrupted` after a signal, with a checkpoint written.
    """
    torch.manual_seed(config.seed)
    scales = start_tuning(tunable, config.kind)
    pad = tunable.eos_token_id
    plan = plan_batches(
        [len(e.token_ids) for e in data.examples],
        rows=config.batch_rows,
        steps=config.steps,
        seed=config.seed,
    )
    stop = StopOnSignal()
    trainer = InOrderTrainer(
        tunable=tunable,
        held_out=held_out_batches(held_out, rows=2 * config.batch_rows, pad_token_id=pad) if held_out else (),
        args=_arguments(config, folder, tunable.model.device, with_held_out=held_out is not None),
        train_dataset=PlannedBatches(data, plan, pad),
        eval_dataset=[] if held_out else None,
        data_collator=lambda items: items[0],
        callbacks=[KeepPositive(list(scales.values())), stop],
    )
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    trainer.add_callback(ProgressBar(lambda: trainer.tokens_seen, show=progress))
    stop.install()
    start = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        stop.restore()
    if stop.stopped and trainer.state.global_step < config.steps:
        raise TrainingInterrupted(f"stopped after step {trainer.state.global_step} of {config.steps}")
    return _result(trainer, held_out is not None, time.monotonic() - start)


def _result(trainer: ScaleTrainer, with_held_out: bool, seconds: float) -> TuneResult:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    state = trainer.state
    return TuneResult(
        scales=detached(tuned_scales(trainer.model)),
        train_loss=losses[-1] if losses else float("nan"),
        held_out_loss=state.best_metric if with_held_out else None,
        best_step=state.best_global_step or state.global_step if with_held_out else state.global_step,
        tokens=trainer.train_dataset.num_tokens,
        seconds=seconds,
    )


def _arguments(
    config: TuneConfig, folder: Path, device: torch.device, *, with_held_out: bool
) -> TrainingArguments:
    every = min(config.check_every, config.steps)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=min(config.warmup_steps, config.steps),
        weight_decay=0.0,
        max_grad_norm=config.clip,
        optim="adamw_torch",
        bf16=fast_compute_dtype(device, config.compute) == torch.bfloat16,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        logging_steps=min(10, config.steps),
        eval_strategy="steps" if with_held_out else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=with_held_out,
        metric_for_best_model="eval_loss" if with_held_out else None,
        greater_is_better=False if with_held_out else None,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def run_fingerprint(config: TuneConfig, **data: Any) -> dict[str, Any]:
    """What must be equal for a checkpoint to be gone on with."""
    return {**asdict(replace(config)), **data}
