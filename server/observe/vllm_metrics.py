"""The same numbers under vLLM's metric names, for dashboards and routers that know those; made at a scrape.

A name is here only where its meaning can be given; docs/operating.md lists what is left out. A LoRA adapter of vLLM's
is a task of ours. Buckets are ours.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from peqa_runtime.core import BASE_TASK

if TYPE_CHECKING:
    from prometheus_client import Histogram

    from peqa_server.observe.engine_metrics import WatchedEngine
    from peqa_server.observe.metrics import Metrics

LABELS = ("model_name", "engine")
ENGINE = "0"  # vLLM numbers the engines of a process; there is one

_COUNTERS: Mapping[str, tuple[str, str]] = {
    "num_preemptions": ("preemptions_total", "Running requests sent back to wait."),
    "prompt_tokens": ("prompt_tokens_total", "Prompt tokens handed to the engine."),
    "generation_tokens": ("generation_tokens_total", "Generated tokens."),
    "prefix_cache_queries": ("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_cache_hits_total", "Prompt tokens found in the prefix cache."),
    "admission_rejections": ("rejected_total", "Requests refused because too much waited."),
}


class VllmCollector(Collector):
    """Families `vllm:…` with the labels `model_name` (the base's) and `engine`."""

    def __init__(self, metrics: Metrics, engine: WatchedEngine, model_name: str) -> None:
        self._metrics = metrics
        self._engine = engine
        self._own = [model_name, ENGINE]

    def collect(self) -> Iterator[Metric]:
        """All families at this moment."""
        stats = self._engine.stats()
        running, waiting = self._engine.tasks_in_work()
        yield self._gauge("num_requests_running", "Requests that run.", stats["requests_running"])
        yield self._gauge("num_requests_waiting", "Requests that wait.", stats["requests_waiting"])
        used, blocks = stats["kv_blocks_used"], stats["kv_blocks"]
        yield self._gauge("kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all.", used / blocks)
        for name, (ours, text) in _COUNTERS.items():
            if ours in stats:  # no prefix cache, no numbers of it
                counter = CounterMetricFamily(f"vllm:{name}", text, labels=LABELS)
                counter.add_metric(self._own, stats[ours])
                yield counter
        yield self._successes()
        yield from self._histograms()
        yield self._cache_config(stats)
        yield _adapters(running, waiting, int(stats["task_rows"]))

    def describe(self) -> list[Metric]:
        """Nothing is known before the first scrape."""
        return []

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=LABELS)
        family.add_metric(self._own, value)
        return family

    def _successes(self) -> CounterMetricFamily:
        family = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by reason.", labels=[*LABELS, "finished_reason"]
        )
        counts: Counter[str] = Counter()
        for metric in self._metrics.finished.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total"):
                    counts[sample.labels["finish_reason"]] += int(sample.value)
        for reason, count in sorted(counts.items()):
            family.add_metric([*self._own, reason], count)
        return family

    def _histograms(self) -> Iterator[HistogramMetricFamily]:
        ours = self._metrics
        for name, histogram in (
            ("time_to_first_token_seconds", ours.first_token),
            ("inter_token_latency_seconds", ours.inter_token),
            ("request_time_per_output_token_seconds", ours.per_token),
            ("e2e_request_latency_seconds", ours.end_to_end),
            ("request_queue_time_seconds", ours.queue),
            ("request_inference_time_seconds", ours.inference),
            ("request_prefill_time_seconds", ours.prefill),
            ("request_decode_time_seconds", ours.decode),
            ("request_prompt_tokens", ours.request_prompt_tokens),
            ("request_generation_tokens", ours.request_generation_tokens),
            ("request_params_n", ours.request_choices),
            ("request_params_max_tokens", ours.request_max_tokens),
        ):
            yield self._over_tasks(name, histogram)

    def _over_tasks(self, name: str, histogram: Histogram) -> HistogramMetricFamily:
        """One histogram of all tasks together."""
        buckets: Counter[float] = Counter({math.inf: 0})  # before any task was asked for
        total, text = 0.0, ""
        for metric in histogram.collect():
            text = metric.documentation
            for sample in metric.samples:
                if sample.name.endswith("_bucket"):
                    buckets[float(sample.labels["le"])] += int(sample.value)
                elif sample.name.endswith("_sum"):
                    total += sample.value
        family = HistogramMetricFamily(f"vllm:{name}", text, labels=LABELS)
        family.add_metric(self._own, [(floatToGoString(le), buckets[le]) for le in sorted(buckets)], total)
        return family

    def _cache_config(self, stats: Mapping[str, float]) -> GaugeMetricFamily:
        facts = {
            "block_size": str(int(stats["kv_block_tokens"])),
            "num_gpu_blocks": str(int(stats["kv_blocks"])),
            "enable_prefix_caching": str("prefix_cache_blocks" in stats),
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV cache; always 1.", labels=[*LABELS, *facts]
        )
        family.add_metric([*self._own, *facts.values()], 1)
        return family


def _adapters(running: Mapping[str, int], waiting: Mapping[str, int], rows: int) -> GaugeMetricFamily:
    """Which tasks run and wait, as labels; the value is the time, because routers take the newest series."""
    family = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Tasks that run and wait, and how many fit on the device; the value is Unix time.",
        labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    )
    family.add_metric([str(rows), _listed(running), _listed(waiting)], time.time())
    return family


def _listed(tasks: Iterable[str]) -> str:
    """Names of tuned tasks; a blend is no adapter that another server could be asked for."""
    return ",".join(sorted(task for task in tasks if task != BASE_TASK and ":" not in task))
