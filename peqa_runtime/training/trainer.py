"""Tune scales on a frozen base: transformers' training loop over the runtime's own quantized linears.

AdamW without weight decay on fp32 scales relative to the base, warm-up, decay, gradient clipping. Checkpoints hold
scales and optimizer only (a few MB). Everything that decides the result is in `TuneConfig` and the data, so a run
that was interrupted goes on to the same set. Several tasks share each forward and nothing else: each has its own rows,
its own loss and its own clipping. Several processes (`accelerate launch`) share the rows of each step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from peqa_runtime.errors import InvalidData
from peqa_runtime.training.attention import tuning_attention
from peqa_runtime.training.batches import BatchPlan, StepBatches, held_out_batches
from peqa_runtime.training.callbacks import ClipEachTask, KeepPositive, ProgressBar, StopOnSignal
from peqa_runtime.training.checkpoints import BestScales
from peqa_runtime.training.data import EncodedData
from peqa_runtime.training.distill import Teacher
from peqa_runtime.training.elementwise import fused_elementwise
from peqa_runtime.training.packing import check_packing
from peqa_runtime.training.scale_trainer import ScaleTrainer, detached, kept_checkpoint
from peqa_runtime.training.settings import TuneConfig
from peqa_runtime.training.tensorboard import tensorboard_callback
from peqa_runtime.training.tuning import (
    TunableModel,
    fast_compute_dtype,
    start_tuning,
    tuned_scales,
)


class TrainingInterrupted(Exception):
    """The run was stopped by the user; its checkpoint is written and the same command goes on."""


@dataclass(frozen=True)
class TaskData:
    """One task's examples."""

    name: str
    train: EncodedData
    held_out: EncodedData | None = None


@dataclass(frozen=True)
class TuneResult:
    """Outcome for one task: its scales (fp32, by their name in a file) and what is noted about them.

    `base_loss` is the held-out loss before the first step. Tokens and seconds are those of the whole run.
    """

    scales: dict[str, Tensor]
    train_loss: float
    held_out_loss: float | None
    base_loss: float | None
    best_step: int
    last_step: int
    tokens: int
    seconds: float


def tune(
    tunable: TunableModel,
    config: TuneConfig,
    tasks: Sequence[TaskData],
    *,
    folder: Path,
    resume_from: Path | None = None,
    teacher: Teacher | None = None,
    tensorboard: Path | None = None,
    progress: bool = True,
) -> list[TuneResult]:
    """Tune scales of `config.kind` for every task at once; checkpoints go to `folder`. Gives each task's last, or best
    held-out, scales, in the order of `tasks`.

    All tasks or none have held-out rows. Raises `TrainingInterrupted` after a signal, with a checkpoint written,
    `TrainingDiverged` at a loss that is no number, `StoreError` where a checkpoint cannot be written.
    """
    torch.manual_seed(config.seed)
    start_tuning(tunable, config.kind, len(tasks))
    if config.pack:
        check_packing(tunable)
    with_held_out = tasks[0].held_out is not None
    assert all((task.held_out is not None) == with_held_out for task in tasks)
    arguments = _arguments(config, folder, tunable.model.device, with_held_out, resume_from is None)
    if config.batch_rows < arguments.world_size * config.accumulate:
        raise InvalidData(
            f"a step of {config.batch_rows} rows cannot be shared by {arguments.world_size} processes "
            f"in {config.accumulate} parts each; take more rows"
        )
    trainer = _trainer(tunable, config, tasks, arguments, teacher)
    stop = StopOnSignal(_agree if arguments.world_size > 1 else bool)
    trainer.add_callback(stop)
    if tensorboard is not None and arguments.process_index == 0:
        trainer.add_callback(tensorboard_callback(tensorboard))
    trainer.add_callback(
        ProgressBar(lambda: trainer.tokens_seen, show=progress and arguments.process_index == 0)
    )
    if arguments.world_size > 1:
        _keep_frozen_at_home(tunable.model)
    if config.checkpoint_activations:
        _checkpoint_activations(tunable.model, True)
    stop.install()
    start = time.monotonic()
    try:
        with (
            tuning_attention(tunable.model),
            fused_elementwise(tunable.model),
            _as_it_was(tunable.model),
        ):
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        stop.restore()
        tunable.parts.parts = ()
        if config.checkpoint_activations:
            _checkpoint_activations(tunable.model, False)
    if stop.stopped and trainer.state.global_step < config.steps:
        raise TrainingInterrupted(f"stopped after step {trainer.state.global_step} of {config.steps}")
    PartialState().wait_for_everyone()  # the best scales are written by one process and read by all
    return [_result(trainer, task, time.monotonic() - start) for task in range(len(tasks))]


def _trainer(
    tunable: TunableModel,
    config: TuneConfig,
    tasks: Sequence[TaskData],
    arguments: TrainingArguments,
    teacher: Teacher | None,
) -> ScaleTrainer:
    pad = tunable.eos_token_id
    pack = max(_longest(tasks), 512) if config.pack else 0
    plans = [
        BatchPlan(
            [len(e.token_ids) for e in task.train.examples],
            rows=config.batch_rows,
            steps=config.steps,
            seed=config.seed,
        )
        for task in tasks
    ]
    held_out = [
        (
            task.name,
            held_out_batches(task.held_out.examples, rows=2 * config.batch_rows, pad_token_id=pad, pack=pack),
        )
        for task in tasks
        if task.held_out is not None
    ]
    scales = [list(tuned_scales(tunable.model, task).values()) for task in range(len(tasks))]
    folder = Path(arguments.output_dir)
    trainer = ScaleTrainer(
        tunable=tunable,
        config=config,
        held_out=held_out,
        best=BestScales(folder, len(tasks)),
        teacher=teacher,
        tasks=len(tasks),
        args=arguments,
        train_dataset=StepBatches(
            [task.train.examples for task in tasks],
            plans,
            pad,
            shares=config.accumulate * arguments.world_size,
            pack=pack,
        ),
        eval_dataset=[] if held_out else None,
        data_collator=lambda items: items[0],
        callbacks=[
            ClipEachTask(scales, config.clip, lambda: kept_checkpoint(folder)),
            KeepPositive([scale for own in scales for scale in own]),
        ],
    )
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    return trainer


def _checkpoint_activations(model: PreTrainedModel, on: bool) -> None:
    """By the name that this transformers has for it: the old one is deprecated in 5.23, the new one not in 5.17."""
    verb = "enable" if on else "disable"
    settings = [{"use_reentrant": False}] if on else []
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{prefix}_checkpointing_{verb}")(*settings)


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Take from the model what accelerate leaves on it: a forward under autocast, which evaluation in fp32 must not
    have, and a mark for which the next run would get no such forward.
    """
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: model.__dict__[name] for name in names if name in model.__dict__}
    try:
        yield
    finally:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)


def _longest(tasks: Sequence[TaskData]) -> int:
    return max(len(e.token_ids) - 1 for task in tasks for e in task.train.examples)


def _agree(stopped: bool) -> bool:
    """Whether any process was told to stop."""
    flag = torch.tensor([float(stopped)], device=PartialState().device)
    torch.distributed.all_reduce(flag)
    return bool(flag.item())


def _keep_frozen_at_home(model: nn.Module) -> None:
    """Codes, scales of the base and buffers are equal in all processes: only gradients of task scales travel."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, frozen + [name for name, _ in model.named_buffers()]
    )


def _result(trainer: ScaleTrainer, task: int, seconds: float) -> TuneResult:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    step = trainer.state.global_step
    held_out = bool(trainer.held_out)
    key = f"eval_loss_{trainer.held_out[task][0]}" if held_out else ""
    before = [entry[key] for entry in history if key in entry and entry["step"] == 0]
    return TuneResult(
        scales=trainer.best.load(task) if held_out else detached(tuned_scales(trainer.model, task)),
        train_loss=losses[-1] if losses else float("nan"),
        held_out_loss=trainer.best.losses[task] if held_out else None,
        base_loss=before[0] if before else None,
        best_step=trainer.best.steps[task] if held_out else step,
        last_step=step,
        tokens=trainer.train_dataset.num_tokens(step),
        seconds=seconds,
    )


def _arguments(
    config: TuneConfig, folder: Path, device: torch.device, with_held_out: bool, new: bool
) -> TrainingArguments:
    every = min(config.check_every, config.steps)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=min(config.warmup_steps, config.steps),
        weight_decay=0.0,
        adam_beta2=config.beta2,
        max_grad_norm=0.0,  # each task's own: `ClipEachTask`
        optim="adamw_torch",
        bf16=fast_compute_dtype(device, config.compute) == torch.bfloat16,
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,
        seed=config.seed,
        logging_steps=min(10, every),  # a run that stops early has logged a loss
        logging_nan_inf_filter=False,
        eval_strategy="steps" if with_held_out else "no",
        eval_steps=every,
        eval_on_start=with_held_out and new,  # the base's own loss: a set that is worse is never kept
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
