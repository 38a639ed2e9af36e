"""What an engine has done so far, in numbers for metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from peqa_runtime.core import Request, TokenOutput

_NAMES = (
    "requests_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "finished_total",
    "aborted_total",
    "errors_total",
    "steps_total",
    "step_tokens_total",
    "row_writes_total",
    "step_failures_total",
    "numerical_errors_total",
    "restarts_total",
)

Name = Literal[
    "aborted_total",
    "step_tokens_total",
    "row_writes_total",
    "step_failures_total",
    "numerical_errors_total",
    "restarts_total",
]


class Tally:
    """Counts of requests, tokens, steps and faults since the start."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._step_seconds = 0.0
        self._step_seconds_total = 0.0

    @property
    def step_tokens(self) -> int:
        """Tokens computed in steps."""
        return self._counts["step_tokens_total"]

    def count(self, name: Name, number: int = 1) -> None:
        """It happened again."""
        self._counts[name] += number

    def request(self, request: Request) -> None:
        """A request was taken in."""
        self._counts["requests_total"] += 1
        self._counts["prompt_tokens_total"] += len(request.prompt_token_ids)

    def outputs(self, outputs: Iterable[TokenOutput]) -> None:
        """These were given."""
        for output in outputs:
            if output.token_id is not None:
                self._counts["generation_tokens_total"] += 1
            if output.finish_reason is not None:
                self._counts["finished_total"] += 1
                self._counts["errors_total"] += output.finish_reason == "error"

    def step(self, outputs: Iterable[TokenOutput], seconds: float) -> None:
        """A step gave these outputs."""
        self.outputs(outputs)
        self._counts["steps_total"] += 1
        self._step_seconds = seconds
        self._step_seconds_total += seconds

    def stats(self) -> dict[str, float]:
        """All numbers, by name; counters end in `_total`. Callable from any thread."""
        return {
            "step_seconds": self._step_seconds,
            "step_seconds_total": self._step_seconds_total,
            **{name: self._counts[name] for name in _NAMES},
        }
