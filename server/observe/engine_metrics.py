"""What the engine and the tasks say of themselves, as metrics: read at a scrape, nothing is kept here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

Work = tuple[Mapping[str, int], Mapping[str, int]]

HELP: Mapping[str, str] = {
    "requests_running": "Choices that hold KV blocks at this moment.",
    "requests_waiting": "Choices that wait for a place, blocks or a bank row.",
    "expected_wait_seconds": "How long a choice that came now would wait for a place, as far as can be foreseen.",
    "kv_blocks_used": "Blocks of the KV cache that running choices own (cached ones that nobody owns are free).",
    "kv_blocks": "Blocks of the KV cache.",
    "kv_block_tokens": "Tokens of one block of the KV cache.",
    "task_rows_used": "Rows of the scale bank that hold a revision (tasks resident on the device).",
    "task_rows": "Rows of the scale bank, the base's not counted.",
    "group_rows_used": "Rows for sets of kind 'group' that hold a revision.",
    "group_rows": "Rows for sets of kind 'group', the base's not counted.",
    "step_seconds": "Duration of the last step.",
    "step_seconds_total": "Time spent in steps, in seconds.",
    "step_tokens_total": "Tokens computed in steps, prompts and generated ones, recomputed ones again.",
    "steps_total": "Steps computed.",
    "step_failures_total": "Steps in which something raised.",
    "row_writes_total": "Scale sets copied into a bank row (swaps).",
    "preemptions_total": "Running choices sent back to wait for lack of blocks or places.",
    "tasks_quarantined": "Tasks set aside because their answers were NaN or infinite.",
    "prefix_cache_blocks": "Blocks that can be found by their content.",
    "prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits_total": "Prompt tokens found in the prefix cache.",
    "tasks": "Tasks that can be asked for, the base not counted.",
    "host_sets": "Scale sets in host memory.",
    "host_bytes": "Bytes of the scale sets in host memory.",
    "host_limit_bytes": "Bytes of scale sets that host memory keeps beyond those in use.",
    "set_hits_total": "Admissions whose scale set was in host memory.",
    "set_loads_total": "Scale sets read from disk (blends: mixed) because host memory had none.",
    "set_load_failures_total": "Loads of scale sets that failed.",
    "set_load_seconds_total": "Time spent in loads of scale sets, in seconds.",
    "requests_total": "Choices handed to the engine.",
    "prompt_tokens_total": "Prompt tokens handed to the engine, each choice's.",
    "generation_tokens_total": "Tokens that the engine generated.",
    "finished_total": "Choices that the engine ended.",
    "aborted_total": "Choices ended from outside: client gone, stop string found, server ending.",
    "errors_total": "Choices that ended with an error.",
    "numerical_errors_total": "Choices that ended because of NaN or infinity.",
    "restarts_total": "Times the engine began anew after a crashed step.",
    "rejected_total": "Choices refused because too much waited.",
}
"""Every number that the engine reports, by its name there; those in `…_total` are counters."""


class WatchedEngine(Protocol):
    """An engine that reports numbers by name."""

    def stats(self) -> Mapping[str, float]: ...

    def tasks_in_work(self) -> Work: ...


class WatchedTasks(Protocol):
    """Tasks of which some may be unusable."""

    def unusable(self) -> Mapping[str, str]: ...


class EngineCollector(Collector):
    """Gauges `peqa_<name>`; counters as `peqa_engine_<name>_total`, to tell them from those counted at the HTTP edge.

    `label_of` turns a task's name into a bounded label.
    """

    def __init__(self, engine: WatchedEngine, tasks: WatchedTasks, label_of: Callable[[str], str]) -> None:
        self._engine = engine
        self._tasks = tasks
        self._label_of = label_of

    def collect(self) -> Iterator[Metric]:
        """All numbers at this moment."""
        for name, value in self._engine.stats().items():
            text = HELP.get(name, f"Engine: {name.replace('_', ' ')}.")
            family: CounterMetricFamily | GaugeMetricFamily
            if name.endswith("_total"):
                family = CounterMetricFamily(f"peqa_engine_{name.removesuffix('_total')}", text)
            else:
                family = GaugeMetricFamily(f"peqa_{name}", text)
            family.add_metric([], float(value))
            yield family
        unusable = GaugeMetricFamily(
            "peqa_tasks_unusable", "Tasks in the store that this server cannot use; GET /v1/tasks says why."
        )
        unusable.add_metric([], len(self._tasks.unusable()))
        yield unusable
        yield self._by_task()

    def describe(self) -> list[Metric]:
        """Nothing is known before the first scrape."""
        return []

    def _by_task(self) -> GaugeMetricFamily:
        family = GaugeMetricFamily(
            "peqa_task_requests",
            "Choices of a task that run or wait at this moment.",
            labels=["task", "state"],
        )
        for state, work in zip(("running", "waiting"), self._engine.tasks_in_work(), strict=True):
            counts: Counter[str] = Counter()
            for task, number in work.items():
                counts[self._label_of(task)] += number
            for label, number in sorted(counts.items()):
                family.add_metric([label, state], number)
        return family
