"""Sending spans to a collector, and saying so once a minute when it is away. Needs the extra `peqa-serve[otel]`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from peqa_server.observe.log_format import event

log = logging.getLogger("peqa.server")

REMIND_SECONDS = 60.0


class ToldExporter(SpanExporter):
    """An exporter whose failures are told in one line a minute, with the number of spans lost since the last.

    The library's own exporters would log each try.
    """

    def __init__(self, exporter: SpanExporter, clock: Callable[[], float] = time.monotonic) -> None:
        self._exporter = exporter
        self._clock = clock
        self._lost = 0
        self._told: float | None = None
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send the spans; those that cannot be sent are lost."""
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._lost += len(spans)
            now = self._clock()
            if self._told is None or now - self._told >= REMIND_SECONDS:
                advice = "is the collector there? requests are served all the same"
                event(log, logging.WARNING, f"traces cannot be sent: {advice}", lost_spans=self._lost)
                self._told, self._lost = now, 0
        return result

    def shutdown(self) -> None:
        """Send nothing more."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Send what is held back."""
        return self._exporter.force_flush(timeout_millis)
