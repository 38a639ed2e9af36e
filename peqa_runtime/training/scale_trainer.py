"""transformers' `Trainer` that trains, saves and restores scales only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainerControl

from peqa_runtime.disk_space import full_at, is_full
from peqa_runtime.errors import StoreError, TrainingDiverged
from peqa_runtime.training.batches import TokenBatch
from peqa_runtime.training.callbacks import base_at_fault
from peqa_runtime.training.checkpoints import MASTERS, BestScales, last_checkpoint, load_masters
from peqa_runtime.training.distill import Teacher, divergence
from peqa_runtime.training.settings import TuneConfig
from peqa_runtime.training.token_losses import token_losses
from peqa_runtime.training.tuning import TunableModel, logits_at, set_scales, tuned_scales


class ScaleTrainer(Trainer):
    """`transformers.Trainer` that takes the planned batches in order, and trains, saves and restores scales only."""

    control: TrainerControl

    def __init__(
        self,
        *,
        tunable: TunableModel,
        config: TuneConfig,
        held_out: Sequence[tuple[str, Sequence[TokenBatch]]],
        best: BestScales,
        teacher: Teacher | None = None,
        tasks: int = 1,
        **kwargs: Any,
    ) -> None:
        """`held_out` has (name, batches) of every task, or of none."""
        super().__init__(model=tunable.model, **kwargs)
        self.tunable, self.config, self.held_out, self.best, self.teacher = (
            tunable,
            config,
            held_out,
            best,
            teacher,
        )
        self.tasks = tasks
        self.tokens_seen = 0

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Sum over the tasks of the mean loss over their loss tokens; this process's and part's share of it."""
        self.tokens_seen += inputs["input_ids"].numel()
        parts = tuple((int(task), int(count)) for task, count in inputs["parts"].tolist())
        self.tunable.parts.parts = parts if self.tasks > 1 else ()
        losses = self._losses(model, inputs)
        # The loop divides by the parts of a step and the processes' gradients are averaged; the weights are whole.
        return (
            (losses * inputs["weights"]).sum()
            * self.args.world_size
            * self.current_gradient_accumulation_steps
        )

    def _losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """[loss tokens]."""
        share = self.config.distill
        ids, positions, targets = inputs["input_ids"], inputs["positions"], inputs["targets"]
        if self.teacher is None or not share:
            return token_losses(self.tunable, model, ids, positions, targets, inputs.get("position_ids"))
        teacher = self.teacher.logits(inputs)
        logits = logits_at(model, ids, positions, inputs.get("position_ids"))
        losses = functional.cross_entropy(logits, targets, reduction="none")
        return (1 - share) * losses + share * divergence(logits, teacher, self.config.temperature)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out cross-entropy per token of each task, in the dtype of the training; the best scales are kept."""
        self.model.eval()
        metrics: dict[str, float] = {}
        for task, (name, batches) in enumerate(self.held_out):
            loss = self._held_out_loss(task, batches)
            if self.state.global_step == 0 and not math.isfinite(loss):
                raise TrainingDiverged(
                    f"{name}: the held-out loss is NaN or infinite {base_at_fault(self.args)}"
                )
            metrics[f"eval_loss_{name}"] = loss
            scales = detached(tuned_scales(self.model, task))
            self.best.offer(task, loss, self.state.global_step, scales, write=self.args.process_index == 0)
        metrics["eval_loss"] = sum(metrics.values()) / len(self.held_out)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        waited = self.state.global_step - max(self.best.steps)
        if self.config.patience and waited >= self.config.patience * self.args.eval_steps:
            self.control.should_training_stop = True
        return metrics

    def _held_out_loss(self, task: int, batches: Sequence[TokenBatch]) -> float:
        totals = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), self.compute_loss_context_manager():
            for given in batches[self.args.process_index :: self.args.world_size]:
                batch = given.to(self.args.device)
                self.tunable.parts.parts = ((task, batch.input_ids.numel()),)
                where = (batch.input_ids, batch.positions, batch.targets, batch.position_ids)
                totals[0] += token_losses(self.tunable, self.model, *where).sum().item()
                totals[1] += len(batch.targets)
        loss, count = self.accelerator.reduce(totals.to(self.args.device), "sum").tolist()
        return float(loss / count)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The training loss is shown as the mean over the tasks."""
        if "loss" in logs:
            logs = {**logs, "loss": logs["loss"] / self.tasks}
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted."""
        return 0

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, SafetensorError, RuntimeError) as error:
            folder = Path(self.args.output_dir)
            reason = full_at(folder) if is_full(error) else error
            raise StoreError(
                f"the checkpoint of step {self.state.global_step} could not be written ({reason}); "
                f"{kept_checkpoint(folder)}; make room, and the same command goes on"
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        scales = {
            f"{task}.{name}": scale
            for task in range(self.tasks)
            for name, scale in detached(tuned_scales(self.model, task)).items()
        }
        save_file(scales, folder / MASTERS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        for task in range(self.tasks):
            set_scales(self.model, load_masters(Path(resume_from_checkpoint), task), task)


def detached(scales: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies on the host, fp32."""
    return {name: p.detach().to("cpu", torch.float32, copy=True).contiguous() for name, p in scales.items()}


def kept_checkpoint(folder: Path) -> str:
    """Half a sentence that says what of a run is safe."""
    kept = last_checkpoint(folder)
    return f"{kept} is kept" if kept else "no checkpoint had been written yet"
