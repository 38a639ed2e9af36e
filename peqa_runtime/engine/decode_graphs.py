"""Decode steps as CUDA graphs: launched in one call, where Python would launch some hundred kernels one by one.

A graph is captured per bucket (`graph_plan`) before the first request, on padded inputs that never move
(`static_inputs`), and replayed for each step in which every sequence brings one token. Which task a row belongs to is
an input like its token id, and a new task is written into its bank row in place: no task ever makes a graph stale.
Steps with prompt chunks run eagerly, as do all where the model cannot be captured (it waits for the device, as some
rotary scalings do; see `cuda_recorder`).

What a graph holds the addresses of: the weights, the caches, the bank's tensors, the inputs, the logits. All of them
are allocated before the capture and never again, but for the bank's input and group scales, which come with the first
set that needs them (`ScaleBank.allocated`). Graphs that read group scales are captured when a step first has some; when
input scales come, which every row reads from then on, all graphs are captured anew, each at its first use.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from peqa_runtime.engine.batch import Batch
from peqa_runtime.engine.graph_plan import Bucket, GraphPlan
from peqa_runtime.engine.static_inputs import StaticInputs
from peqa_runtime.engine.step_inputs import StepInputs

logger = logging.getLogger(__name__)

_EQUAL = (
    1e-2  # of the largest logit: a replay runs the kernels that ran eagerly, so more than rounding is a fault
)


class Recorder(Protocol):
    """Records work on a device (`CudaRecorder`)."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run it (more than once, perhaps), record what it launches, and return what launches the same again.

        `run` reads and writes tensors that outlive it. Raises RuntimeError for work that cannot be recorded.
        """

    def forget(self) -> None:
        """Nothing of what was captured so far is kept any more."""


class Kinds(Protocol):
    """What is to be known of the bank (the ScaleBank)."""

    @property
    def allocated(self) -> Collection[str]:
        """Kinds of sets that have their tensors."""


class DecodeGraphs:
    """The graphs of one engine; used by its thread only, once they are captured."""

    def __init__(
        self,
        plan: GraphPlan,
        recorder: Recorder,
        forward: Callable[[StepInputs], Tensor],
        bank: Kinds,
        *,
        block_size: int,
        scratch_block: int,
        vocab_size: int,
        device: torch.device,
        row_invariant: bool,
    ) -> None:
        """Allocate inputs and logits. `forward`: one pass of the model, float32 [rows, vocab]."""
        self.plan = plan
        self.replays = 0
        self._recorder = recorder
        self._forward = forward
        self._bank = bank
        self._inputs = {
            reach: StaticInputs(
                plan.sizes[-1],
                reach,
                block_size=block_size,
                scratch_block=scratch_block,
                vocab_size=vocab_size,
                device=device,
                row_invariant=row_invariant,
            )
            for reach in plan.reaches
        }
        self._logits = torch.zeros(plan.sizes[-1], vocab_size, dtype=torch.float32, device=device)
        self._graphs: dict[Bucket, Callable[[], None] | None] = {}  # None: cannot be captured
        self._with_input_scales = self._has_input_scales

    def capture(self) -> bool:
        """Capture the plan's buckets; False, with a warning, when one cannot be: then nothing is kept."""
        started = time.perf_counter()
        if not all(self._captured(bucket) for bucket in self.plan.buckets):
            self._graphs.clear()
            return False
        logger.info(
            "CUDA graphs for decode steps: batches of %s, contexts to %s tokens, %d graphs in %.1f s",
            ", ".join(map(str, self.plan.sizes)),
            ", ".join(map(str, self.plan.reaches)),
            len(self._graphs),
            time.perf_counter() - started,
        )
        return True

    def prepare(self, batch: Batch) -> Callable[[], Tensor] | None:
        """Write a decode step's inputs, and return what computes it; None for a step that no graph can compute.

        Its logits are float32 [rows, vocab] as `logit_positions` lists them, and valid until the next call. Bank rows
        that the step is the first to use must have been written.
        """
        bucket = self._bucket(batch)
        if bucket is None:
            return None
        if self._with_input_scales != self._has_input_scales:
            self._graphs.clear()
            self._recorder.forget()
            self._with_input_scales = self._has_input_scales
        if bucket not in self._graphs:
            self._captured(bucket)
        replay = self._graphs[bucket]
        if replay is None:
            return None
        self._inputs[bucket.reach].fill(batch.scheduled, bucket.sequences)
        return partial(self._computed, replay, len(batch.scheduled))

    def _computed(self, replay: Callable[[], None], rows: int) -> Tensor:
        replay()
        self.replays += 1
        return self._logits[:rows]

    def _bucket(self, batch: Batch) -> Bucket | None:
        """The graph for a step in which each sequence computes one token; None for another."""
        items = batch.scheduled
        if any(item.num_tokens != 1 for item in items):
            return None
        longest = max(item.start for item in items) + 1
        return self.plan.find(len(items), longest, grouped=any(item.sequence.group_row for item in items))

    def _captured(self, bucket: Bucket) -> bool:
        """Capture a bucket on padding alone, and try the graph; False when that does not work."""
        buffers = self._inputs[bucket.reach]
        inputs = buffers.of(bucket.sequences, grouped=bucket.grouped)
        logits = self._logits[: bucket.sequences]

        def run() -> None:
            logits.copy_(self._forward(inputs))

        self._graphs[bucket] = None
        buffers.fill((), bucket.sequences)
        with torch.inference_mode():
            try:
                replay = self._recorder.capture(run)
                run()
                expected = logits.clone()
                logits.zero_()
                replay()
            except RuntimeError as error:
                logger.warning("no CUDA graph for %s, these steps run eagerly: %s", bucket, error)
                return False
            limit = _EQUAL * float(expected.nan_to_num(0.0, 0.0, 0.0).abs().amax())  # padding may read NaN
            if not torch.allclose(logits, expected, rtol=0.0, atol=limit, equal_nan=True):
                logger.warning("the CUDA graph for %s gives other logits: these steps run eagerly", bucket)
                return False
        self._graphs[bucket] = replay
        return True

    @property
    def _has_input_scales(self) -> bool:
        return "channel+input" in self._bank.allocated
