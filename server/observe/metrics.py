"""Prometheus metrics of one app, in a registry of its own: two apps in one process do not share a counter.

Everything is in base units (seconds, bytes, tokens). Only what is known to exist becomes a label: routes by their
pattern, error codes, and the first `max_tasks` names of tasks; what comes later counts as "other".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from peqa_runtime.core import Lease
from peqa_server.observe.engine_metrics import EngineCollector, WatchedEngine, WatchedTasks
from peqa_server.observe.vllm_metrics import VllmCollector

OTHER = "other"
BLEND = "blend"

Compat = Literal["vllm"]

# Seconds. From one fast GPU step to the longest answer that somebody would wait for.
_STEP = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_QUEUE = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_UPLOAD = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_CHOICES = (1, 2, 4, 8, 16, 64, 256, 1024)


class Metrics:
    """Counters and histograms of one app; a scrape adds the numbers of the engine and the tasks.

    `compat` "vllm": the same numbers once more under vLLM's names.
    """

    def __init__(self, max_tasks: int = 64, compat: Compat | None = None) -> None:
        self.registry = CollectorRegistry()
        self._max_tasks = max_tasks
        self._compat = compat
        self._tasks: set[str] = set()
        ProcessCollector(registry=self.registry)
        self._count_requests()
        self._time_requests()
        self._size_requests()

    def _count_requests(self) -> None:
        counter = self._counter
        self.http_requests = counter(
            "peqa_http_requests_total",
            "HTTP requests answered, by route pattern, method and status; what was refused before it was one: OTHER.",
            ["route", "method", "status"],
        )
        self.rejections = counter(
            "peqa_rejections_total", "Refused requests, by the error code that the client saw.", ["code"]
        )
        self.disconnects = counter(
            "peqa_client_disconnects_total", "Clients that were gone before the end of their answer."
        )
        self.prompt_tokens = counter(
            "peqa_prompt_tokens_total", "Tokens of admitted prompts, a prompt with n choices once.", ["task"]
        )
        self.generated_tokens = counter(
            "peqa_generation_tokens_total", "Tokens generated, all choices.", ["task"]
        )
        self.finished = counter(
            "peqa_choices_finished_total",
            "Choices that ended: stop, length, abort (client gone, or server ending) or error.",
            ["task", "finish_reason"],
        )
        self.blends = counter("peqa_blends_total", "Admitted requests that blend tasks.")
        self.task_changes = counter(
            "peqa_task_changes_total",
            "Changes of tasks over HTTP: upload, rollback, delete; done or refused.",
            ["action", "outcome"],
        )
        self.upload_seconds = self._histogram(
            "peqa_upload_seconds", "From an upload's last byte until the revision is live.", _UPLOAD
        )

    def _time_requests(self) -> None:
        by_task, plain = ["task"], self._histogram
        self.first_token = plain(
            "peqa_time_to_first_token_seconds",
            "From the request's first byte to a choice's first token.",
            _FIRST,
            by_task,
        )
        self.inter_token = plain(
            "peqa_inter_token_seconds", "Between two tokens of a choice.", _STEP, by_task
        )
        self.queue = plain(
            "peqa_queue_seconds",
            "From handing a choice to the engine until it first runs.",
            _QUEUE,
            by_task,
        )
        self.prefill = plain(
            "peqa_prefill_seconds",
            "From the moment a choice first runs to its first token.",
            _FIRST,
            by_task,
        )
        self.decode = plain(
            "peqa_decode_seconds", "From a choice's first token to its last.", _WHOLE, by_task
        )
        self.end_to_end = plain(
            "peqa_request_seconds", "From the request's first byte to a choice's end.", _WHOLE, by_task
        )
        self.inference = plain(
            "peqa_inference_seconds", "From the moment a choice first runs to its end.", _WHOLE
        )
        self.per_token = plain(
            "peqa_time_per_output_token_seconds",
            "Mean time between two tokens of a finished choice.",
            _STEP,
        )

    def _size_requests(self) -> None:
        plain = self._histogram
        self.request_prompt_tokens = plain(
            "peqa_request_prompt_tokens", "Prompt tokens of a finished choice.", _TOKENS
        )
        self.request_generation_tokens = plain(
            "peqa_request_generation_tokens", "Generated tokens of a finished choice.", _TOKENS
        )
        self.request_choices = plain(
            "peqa_request_choices", "Choices asked for per prompt (n) of admitted requests.", _CHOICES
        )
        self.request_max_tokens = plain(
            "peqa_request_max_tokens", "Longest answer that admitted requests allow, in tokens.", _TOKENS
        )

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

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

    def label_of_name(self, name: str) -> str:
        """The label of a task or blend by its name, without making a new one."""
        return name if name in self._tasks else BLEND if ":" in name else OTHER

    def watch(self, engine: WatchedEngine, tasks: WatchedTasks, model_name: str) -> None:
        """Report the engine's and the tasks' own numbers at each scrape. `model_name`: the base, for vLLM's label."""
        self.registry.register(EngineCollector(engine, tasks, self.label_of_name))
        if self._compat == "vllm":
            self.registry.register(VllmCollector(self, engine, model_name))

    def render(self) -> bytes:
        """Prometheus' text format. Thread-safe."""
        return generate_latest(_WithoutBirths(self.registry))


class _WithoutBirths(Collector):
    """What a registry has but for the moments when its series began, which the text format shows as gauges: a series
    more for each, and nothing that anybody asks for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """The families, without their `_created` samples."""
        for family in self._registry.collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family
