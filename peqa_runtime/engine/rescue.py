"""When a step raises: find the requests that make it raise, and compute the others all the same.

    run(batch) raises  ->  run(first half), run(second half), ... down to single requests

Running requests again is safe: a step changes nothing but the K/V slots of its own tokens and rows of the bank, which
get the same values again, and random numbers depend on seed and position only.

    one request raises, others do not                  that request is to blame
    nothing at all can be computed, not even a token   the step is: `StepCrash`
    of the base in the place of a request that raised
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from peqa_runtime.core import Request
from peqa_runtime.engine.batch import BankWrite, Batch, ScheduledSequence, StepResult
from peqa_runtime.engine.sequence import Sequence
from peqa_runtime.errors import EngineDead
from peqa_runtime.sampling_params import SamplingParams

logger = logging.getLogger(__name__)


class StepCrash(Exception):
    """A step cannot be computed, and no single request is to blame; `__cause__` is what it raised."""


class RowLost(StepCrash):
    """A bank row holds another set than its owner's. Nothing is wrong with any request, but none may go on with it."""


class CrashLimit:
    """How many crashes in how many seconds are too many."""

    def __init__(self, max_crashes: int, window: float) -> None:
        self._window = window
        self._times: deque[float] = deque(maxlen=max_crashes)  # time.monotonic()

    def note(self, error: Exception) -> None:
        """Count a crash now. Raises `EngineDead` when it is one too many, or the device is lost."""
        if isinstance(error, torch.AcceleratorError):
            raise EngineDead(f"the device fails: {error}") from error
        self._times.append(time.monotonic())
        seconds = self._times[-1] - self._times[0]
        if len(self._times) == self._times.maxlen and seconds <= self._window:
            cause = error.__cause__ or error
            raise EngineDead(
                f"{len(self._times)} crashes within {seconds:.1f} s, the last of {type(cause).__name__}: {cause}"
            ) from error
        logger.error("the engine crashed within a step and starts anew", exc_info=error)


@dataclass
class Outcome:
    """What became of a batch. `batch` and `results`: what was computed, and the bank writes that are done."""

    batch: Batch
    results: list[StepResult]
    failed: list[tuple[ScheduledSequence, Exception]] = field(default_factory=list)


def run_step(run: Callable[[Batch], list[StepResult]], batch: Batch) -> Outcome:
    """Run the batch; what raises is narrowed down to single requests.

    Raises `StepCrash`, and `torch.AcceleratorError`, after which a device computes nothing more.
    """
    try:
        return Outcome(batch, run(batch))
    except (torch.AcceleratorError, StepCrash):
        raise
    except Exception as error:
        logger.warning(
            "a step of %d requests raised; looking for the one", len(batch.scheduled), exc_info=error
        )
        return _narrow_down(run, batch, error)


def _narrow_down(run: Callable[[Batch], list[StepResult]], batch: Batch, first_error: Exception) -> Outcome:
    """Run halves of what raised until all is computed or known to raise alone."""
    results: dict[ScheduledSequence, StepResult] = {}
    written: dict[BankWrite, None] = {}
    failed: list[tuple[ScheduledSequence, Exception]] = []
    works = False  # anything could be computed since the step raised
    to_split: list[tuple[tuple[ScheduledSequence, ...], Exception]] = [(batch.scheduled, first_error)]
    while to_split:
        items, error = to_split.pop()
        if len(items) == 1:
            if not works:
                _probe(run, items[0], error)
                works = True
            failed.append((items[0], error))
            continue
        for half in (items[len(items) // 2 :], items[: len(items) // 2]):
            part = Batch(half, tuple(_writes_of(half, batch.bank_writes)))
            try:
                part_results = run(part)
            except (torch.AcceleratorError, StepCrash):
                raise
            except Exception as again:  # noqa: BLE001  see above
                to_split.append((half, again))
            else:
                works = True
                results.update(zip(half, part_results, strict=True))
                written.update(dict.fromkeys(part.bank_writes))
    computed = tuple(item for item in batch.scheduled if item in results)
    return Outcome(Batch(computed, tuple(written)), [results[item] for item in computed], failed)


def _writes_of(items: tuple[ScheduledSequence, ...], writes: tuple[BankWrite, ...]) -> Iterator[BankWrite]:
    """The bank writes that these requests need."""
    users = {(item.sequence.row, item.sequence.request.revision) for item in items}
    return (write for write in writes if (write.row, write.revision) in users)


def _probe(run: Callable[[Batch], list[StepResult]], failed: ScheduledSequence, error: Exception) -> None:
    """Compute one token of the base in the place of a request that raised. Raises `StepCrash` when that raises too.

    It takes the request's last block, which nobody shares and nobody will read: the request ends.
    """
    request = Request("probe", (0,), SamplingParams(max_tokens=1, temperature=0.0))
    sequence = Sequence(request, [0], block_table=failed.sequence.block_table[-1:])
    try:
        run(Batch((ScheduledSequence(sequence, 0, 1),)))
    except (torch.AcceleratorError, StepCrash):
        raise
    except Exception:  # noqa: BLE001  the request's own error says more
        raise StepCrash("nothing can be computed") from error
