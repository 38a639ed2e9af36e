"""What one request adds to the metrics, and when things happened to it; per token two calls of a counter."""

from __future__ import annotations

import time

from peqa_runtime.core import Lease, TokenOutput
from peqa_server.observe.access_log import RequestNote
from peqa_server.observe.metrics import Metrics


class RequestMeter:
    """Books the choices of one request under the label of their task. Times are `time.perf_counter`'s."""

    def __init__(self, metrics: Metrics, lease: Lease, note: RequestNote) -> None:
        label = metrics.lease_label(lease)
        self.metrics = metrics
        self.note = note
        self.label = label
        self.blend = lease.blend is not None
        self.submitted = note.received
        self.generated = metrics.generated_tokens.labels(label)
        self.inter_token = metrics.inter_token.labels(label)

    def submitting(self) -> None:
        """The choices are handed to the engine now."""
        self.submitted = self.note.submitted = time.perf_counter()

    def admitted(self, num_prompt_tokens: int, n: int, max_tokens: int) -> None:
        """The engine has taken every choice. `num_prompt_tokens`: of all prompts; `n`: choices per prompt."""
        metrics = self.metrics
        metrics.prompt_tokens.labels(self.label).inc(num_prompt_tokens)
        metrics.request_choices.observe(n)
        metrics.request_max_tokens.observe(max_tokens)
        if self.blend:
            metrics.blends.inc()


class ChoiceMeter:
    """One choice's times, from its outputs in the order in which they come."""

    __slots__ = ("_ended", "_first", "_last", "_prompt_tokens", "_request", "_started", "_tokens")

    def __init__(self, request: RequestMeter, num_prompt_tokens: int) -> None:
        self._request = request
        self._prompt_tokens = num_prompt_tokens
        self._started: float | None = None
        self._first: float | None = None
        self._last = 0.0
        self._tokens = 0
        self._ended = False

    def took(self, output: TokenOutput) -> None:
        """An output has come; its token counts, and the time since the one before."""
        if self._started is None and output.started is not None:
            self._start(output.started)
        if output.token_id is None:
            return
        now = time.perf_counter()
        request = self._request
        request.generated.inc()
        self._tokens += 1
        if self._first is None:
            self._first = now
            self._see_first(now)
        else:
            request.inter_token.observe(now - self._last)
        self._last = request.note.last_token = now

    def end(self, reason: str) -> None:
        """The choice has ended: "stop", "length", "abort" or "error". Only the first call counts."""
        if self._ended:
            return
        self._ended = True
        request, now = self._request, time.perf_counter()
        metrics, label = request.metrics, request.label
        metrics.finished.labels(label, reason).inc()
        if reason not in ("abort", "error"):
            metrics.end_to_end.labels(label).observe(now - request.note.received)
            metrics.request_prompt_tokens.observe(self._prompt_tokens)
            metrics.request_generation_tokens.observe(self._tokens)
            if self._started is not None:
                metrics.inference.observe(now - self._started)
            if self._first is not None:
                metrics.decode.labels(label).observe(self._last - self._first)
                if self._tokens > 1:
                    metrics.per_token.observe((self._last - self._first) / (self._tokens - 1))
        if reason not in request.note.finish_reasons:
            request.note.finish_reasons += (reason,)

    def _start(self, started: float) -> None:
        request = self._request
        self._started = started
        request.metrics.queue.labels(request.label).observe(started - request.submitted)
        note = request.note
        note.started = started if note.started is None else min(note.started, started)

    def _see_first(self, now: float) -> None:
        request, note = self._request, self._request.note
        request.metrics.first_token.labels(request.label).observe(now - note.received)
        if self._started is not None:
            request.metrics.prefill.labels(request.label).observe(now - self._started)
        if note.first_token is None:
            note.first_token = now
