"""Prometheus metrics of one app, in a registry of its own: two apps in one process do not share a counter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from peqa_runtime.core import Lease

OTHER = "other"
BLEND = "blend"

# Seconds. From one fast GPU step to the longest answer that somebody would wait for.
_STEP = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_UPLOAD = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class HasStats(Protocol):
    """An engine that reports numbers by name."""

    def stats(self) -> Mapping[str, float]: ...


class Metrics:
    """Counters and histograms of one app. Task labels are bounded: the first `max_tasks` names, then "other"."""

    def __init__(self, max_tasks: int = 64) -> None:
        self.registry = CollectorRegistry()
        self._max_tasks = max_tasks
        self._tasks: set[str] = set()
        r = self.registry
        self.http_requests = Counter(
            "peqa_http_requests_total", "HTTP requests.", ["route", "method", "status"], registry=r
        )
        self.rejections = Counter("peqa_rejections_total", "Refused requests.", ["code"], registry=r)
        self.prompt_tokens = Counter("peqa_prompt_tokens_total", "Prompt tokens.", ["task"], registry=r)
        self.generated_tokens = Counter(
            "peqa_generation_tokens_total", "Generated tokens.", ["task"], registry=r
        )
        self.finished = Counter(
            "peqa_choices_finished_total", "Finished choices.", ["task", "finish_reason"], registry=r
        )
        self.first_token = Histogram(
            "peqa_time_to_first_token_seconds",
            "Request in to first token.",
            ["task"],
            buckets=_FIRST,
            registry=r,
        )
        self.inter_token = Histogram(
            "peqa_inter_token_seconds", "Between two tokens of a choice.", ["task"], buckets=_STEP, registry=r
        )
        self.end_to_end = Histogram(
            "peqa_request_seconds", "Request in to last token.", ["task"], buckets=_WHOLE, registry=r
        )
        self.task_changes = Counter(
            "peqa_task_changes_total", "Uploads, rollbacks, deletes.", ["action", "outcome"], registry=r
        )
        self.upload_seconds = Histogram(
            "peqa_upload_seconds", "Last byte of an upload to live.", buckets=_UPLOAD, registry=r
        )
        self.disconnects = Counter(
            "peqa_client_disconnects_total", "Clients gone before the end of their answer.", registry=r
        )

    def task_label(self, task: str) -> str:
        """The label of a task that exists: its name, or "other" once enough names are known."""
        if task in self._tasks:
            return task
        if len(self._tasks) < self._max_tasks:
            self._tasks.add(task)
            return task
        return OTHER

    def lease_label(self, lease: Lease) -> str:
        """The label of what a request runs on: all blends, of which there is no end, share one."""
        return self.task_label(lease.task) if lease.blend is None else BLEND

    def watch_engine(self, engine: HasStats) -> None:
        """Report the engine's own numbers at each scrape."""
        self.registry.register(_EngineCollector(engine))

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Turns `stats()` into metrics: gauges, and counters (`…_total`) that say "engine", to tell them from ours."""

    def __init__(self, engine: HasStats) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """All numbers at this moment."""
        for name, value in self._engine.stats().items():
            family: CounterMetricFamily | GaugeMetricFamily
            if name.endswith("_total"):
                family = CounterMetricFamily(f"peqa_engine_{name.removesuffix('_total')}", f"Engine: {name}.")
            else:
                family = GaugeMetricFamily(f"peqa_{name}", f"Engine: {name}.")
            family.add_metric([], float(value))
            yield family

    def describe(self) -> list[Metric]:
        """Nothing is known before the first scrape."""
        return []
