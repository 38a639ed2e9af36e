"""What happens between the steps of a run: gradients checked, scales kept in range, a clean stop, a progress bar."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peqa_runtime.errors import TrainingDiverged
from peqa_runtime.training.tuning import LARGEST_SCALE, SMALLEST_SCALE


def base_at_fault(args: TrainingArguments) -> str:
    """Half a sentence about NaN before the first step."""
    other = "try --compute float32, or " if args.bf16 else ""
    return f"under the base's own scales, so no --lr helps: {other}look for what is wrong with the base or the rows"


class ClipEachTask(TrainerCallback):
    """Clip each task's gradient by its own norm, as if it were tuned alone; end the run at one that is no number."""

    def __init__(self, tasks: Sequence[Sequence[nn.Parameter]], clip: float, kept: Callable[[], str]) -> None:
        self.tasks, self.clip, self.kept = tasks, clip, kept

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Raises `TrainingDiverged` before the scales are touched."""
        for parameters in self.tasks:
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip).item()
            if not math.isfinite(norm):
                what = "the loss or its gradient became NaN or infinite at step"
                if state.global_step == 0:
                    raise TrainingDiverged(f"{what} 1, {base_at_fault(args)}")
                raise TrainingDiverged(
                    f"{what} {state.global_step + 1}; a lower --lr with --no-resume begins anew; {self.kept()}"
                )


class KeepPositive(TrainerCallback):
    """Clamp the scales into the range that servers accept, after every optimizer step."""

    def __init__(self, scales: Sequence[nn.Parameter]) -> None:
        self.scales: list[Tensor] = list(scales)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One fused clamp."""
        with torch.no_grad():
            torch._foreach_clamp_min_(self.scales, SMALLEST_SCALE)
            torch._foreach_clamp_max_(self.scales, LARGEST_SCALE)


class StopOnSignal(TrainerCallback):
    """Ctrl-C (or SIGTERM) ends the run after the current step, with a checkpoint; a second one ends it at once."""

    def __init__(self, agree: Callable[[bool], bool]) -> None:
        """`agree` makes one answer of those of all processes: they stop at the same step."""
        self.stopped = False
        self._agree = agree
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def install(self) -> None:
        """Take the signals over (main thread only; elsewhere nothing happens)."""
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:
                return

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint and the end."""
        self.stopped = self._agree(self.stopped)
        if self.stopped and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True


class ProgressBar(TrainerCallback):
    """Steps, loss, held-out loss and tokens per second on stderr."""

    def __init__(self, tokens_seen: Callable[[], int], *, show: bool) -> None:
        self.tokens_seen, self.show = tokens_seen, show
        self.bar: tqdm | None = None
        self.start = time.monotonic()
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Open the bar at the resumed step."""
        self.start = time.monotonic()
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            desc="tuning",
            disable=not self.show,
        )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move on."""
        assert self.bar is not None
        self.bar.update(1)
        self.shown["tok/s"] = f"{self.tokens_seen() / max(time.monotonic() - self.start, 1e-9):.0f}"

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Show the newest losses."""
        for key, label in (("loss", "loss"), ("eval_loss", "held-out")):
            if logs and key in logs:
                self.shown[label] = f"{logs[key]:.4f}"
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
