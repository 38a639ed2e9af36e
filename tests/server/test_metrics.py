"""What /metrics says: names, meanings, bounded labels, vLLM's names, and what a token costs."""

from __future__ import annotations

import re
import time
import timeit
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_stubs import Script, StubEngine, wait_until

from peqa_runtime.core import Blend, Lease, TokenOutput
from peqa_server.observe.access_log import RequestNote
from peqa_server.observe.meter import ChoiceMeter, RequestMeter
from peqa_server.observe.metrics import Metrics
from peqa_server.settings import ServerSettings


class Scrape:
    """One answer of /metrics, read by Prometheus' own parser."""

    def __init__(self, text: str) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels."""
        found = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(found)

    def names(self) -> set[str]:
        return {sample.name for sample in self.samples}


def scrape(server: Any) -> Scrape:
    answer = server.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return Scrape(answer.text)


@pytest.fixture
def vllm(live: Any) -> Any:
    return live(settings=ServerSettings(metrics_compat="vllm"))


def test_times_of_a_request_add_up(live: Any) -> None:
    server = live(StubEngine(lambda r: Script([97] * 4, delay=0.02, queued=0.05)))
    server.complete(max_tokens=4)
    found = scrape(server)

    def seconds(name: str) -> float:
        assert found(f"peqa_{name}_seconds_count", task="base") == 1, name
        return found(f"peqa_{name}_seconds_sum", task="base")

    queue, prefill, decode = seconds("queue"), seconds("prefill"), seconds("decode")
    assert 0.045 < queue < 0.3
    assert 0.015 < prefill < 0.3
    assert 0.055 < decode < 0.5
    first, whole = seconds("time_to_first_token"), seconds("request")
    assert queue + prefill <= first < queue + prefill + 0.2
    assert first + decode <= whole + 1e-3
    assert found("peqa_inter_token_seconds_count", task="base") == 3
    assert found("peqa_inter_token_seconds_sum", task="base") == pytest.approx(decode, rel=1e-6)
    assert found("peqa_inference_seconds_sum") == pytest.approx(prefill + decode, abs=0.05)
    assert found("peqa_time_per_output_token_seconds_sum") == pytest.approx(decode / 3, rel=1e-6)


def test_sizes_choices_and_blends(server: Any) -> None:
    before = scrape(server)
    server.complete("abc", task="sql", n=3, max_tokens=5)
    server.complete("abcd", task={"sql": 0.5, "qa": 0.5}, max_tokens=2)
    after = scrape(server)

    def grown(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    assert grown("peqa_prompt_tokens_total", task="sql") == 3
    assert grown("peqa_generation_tokens_total", task="sql") == 15
    assert grown("peqa_generation_tokens_total", task="blend") == 2
    assert grown("peqa_choices_finished_total", task="sql", finish_reason="length") == 3
    assert grown("peqa_blends_total") == 1
    assert grown("peqa_request_choices_sum") == 4
    assert grown("peqa_request_max_tokens_sum") == 7
    assert grown("peqa_request_prompt_tokens_sum") == 3 * 3 + 4
    assert grown("peqa_request_generation_tokens_bucket", le="4.0") == 1


def test_how_choices_end_is_counted_once(live: Any) -> None:
    server = live(StubEngine())
    server.engine.script = lambda r: Script([97, 98], error="the stub cannot compute this")
    server.error(500, prompt="x", n=2)
    server.engine.script = lambda r: Script([97] * 100, delay=0.01)
    with server.client.stream(
        "POST", "/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 90}
    ) as s:
        next(s.iter_lines())
    wait_until(lambda: scrape(server)("peqa_choices_finished_total", finish_reason="abort") >= 1)
    wait_until(lambda: server.idle)
    found = scrape(server)
    ends = {
        s.labels["finish_reason"]: s.value for s in found.samples if s.name == "peqa_choices_finished_total"
    }
    # Of the two choices one fails, which ends the request: the other fails too or is cut off.
    assert ends["error"] + ends["abort"] == 3
    assert set(ends) == {"error", "abort"}
    assert found("peqa_request_seconds_count") == 0, "only whole answers have a length"


def test_counters_survive_a_scrape(server: Any) -> None:
    server.complete(task="sql", max_tokens=2)
    first, second = scrape(server), scrape(server)
    for sample in first.samples:
        if sample.name.endswith("_total") and sample.name.startswith("peqa_"):
            assert second(sample.name, **sample.labels) >= sample.value > -1, sample
    assert second("peqa_generation_tokens_total", task="sql") == first(
        "peqa_generation_tokens_total", task="sql"
    )


def test_every_metric_says_what_it_is_in_base_units(vllm: Any) -> None:
    vllm.complete(max_tokens=2)
    for name, family in scrape(vllm).families.items():
        if name.startswith(("process_", "python_")):
            continue
        assert re.fullmatch(r"(peqa|vllm)[_:][a-z0-9_]+", name)
        assert family.documentation.endswith("."), f"{name}: {family.documentation!r}"
        assert not re.search(r"_(ms|millis|milliseconds|us|kb|mb|minutes)(_|$)", name), name
        if family.type == "histogram" and "seconds" not in name:
            assert "tokens" in name or "choices" in name or "params" in name, f"{name} has no unit"


def test_task_labels_are_bounded_everywhere(live: Any) -> None:
    server = live(settings=ServerSettings(metric_tasks=3))
    for i in range(6):
        server.tasks.upload(f"t{i}", b"SET %d" % i)
        server.complete(task=f"t{i}", max_tokens=2)
    server.engine.running = {server.engine.requests[-1].request_id}  # of t5, which has no label of its own
    found = scrape(server)
    labels = {sample.labels["task"] for sample in found.samples if "task" in sample.labels}
    assert labels == {"t0", "t1", "t2", "other"}
    assert found("peqa_task_requests", task="other", state="running") == 1
    assert found("peqa_generation_tokens_total", task="other") == 6


def test_probes_are_no_rejections(run_app: Any) -> None:
    import httpx

    from peqa_server.app import create_loading_app

    url, _ = run_app(create_loading_app())
    client = httpx.Client(base_url=url)
    assert client.get("/ready").status_code == 503
    assert client.get("/v1/models").status_code == 503
    found = Scrape(client.get("/metrics").text)
    assert found("peqa_rejections_total", code="not_ready") == 0
    assert found("peqa_rejections_total", code="starting") == 1


VLLM = {
    "gauge": ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"],
    "counter": ["prompt_tokens", "generation_tokens", "num_preemptions", "prefix_cache_queries",
                "prefix_cache_hits", "request_success", "admission_rejections"],
    "histogram": ["time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
                  "request_queue_time_seconds", "request_inference_time_seconds", "request_prefill_time_seconds",
                  "request_decode_time_seconds", "request_time_per_output_token_seconds",
                  "request_prompt_tokens", "request_generation_tokens", "request_params_n",
                  "request_params_max_tokens"],
}  # fmt: skip


def test_vllm_names_have_its_types_and_labels(vllm: Any) -> None:
    stats = vllm.engine.stats
    vllm.engine.stats = lambda: (
        stats()
        | {
            f"{name}_total": 5.0
            for name in (
                "preemptions",
                "prompt_tokens",
                "generation_tokens",
                "prefix_cache_queries",
                "prefix_cache_hits",
            )
        }
    )
    vllm.tasks.upload("sql", b"SET")
    vllm.complete("abc", task="sql", max_tokens=3)
    vllm.complete("abc", max_tokens=4)
    found = scrape(vllm)
    own = {"model_name": "tiny-base", "engine": "0"}
    for kind, names in VLLM.items():
        for name in names:
            family = found.families[f"vllm:{name}"]
            assert family.type == kind, name
            assert all(own.items() <= sample.labels.items() for sample in family.samples), name
    assert found("vllm:kv_cache_usage_perc") == 3 / 12
    assert found("vllm:admission_rejections_total") == 2
    assert found("vllm:request_success_total", finished_reason="length") == 2
    assert found("vllm:time_to_first_token_seconds_count") == 2, "all tasks together"
    assert found("vllm:time_to_first_token_seconds_bucket", le="+Inf") == 2
    assert found("vllm:inter_token_latency_seconds_count") == 5
    assert found("vllm:e2e_request_latency_seconds_sum") == pytest.approx(found("peqa_request_seconds_sum"))
    assert found("vllm:cache_config_info", block_size="16", num_gpu_blocks="12") == 1


def test_vllm_buckets_are_cumulative_over_tasks(vllm: Any) -> None:
    vllm.engine.script = lambda r: Script([97] * 5, delay=0.03 if r.task == "base" else 0.0)
    vllm.tasks.upload("sql", b"SET")
    vllm.complete(max_tokens=3)
    vllm.complete(task="sql", max_tokens=4)
    buckets = {
        float(s.labels["le"]): s.value
        for s in scrape(vllm).samples
        if s.name == "vllm:inter_token_latency_seconds_bucket"
    }
    values = [buckets[le] for le in sorted(buckets)]
    assert values == sorted(values)
    assert values[-1] == 5
    assert buckets[0.02] >= 3 > buckets[0.02] - 3


def test_vllm_names_the_tasks_in_work(vllm: Any) -> None:
    vllm.engine.tasks_in_work = lambda: ({"sql": 2, "base": 1, "a:0.5+b:0.5": 1}, {"qa": 1, "abc": 4})
    before = time.time()
    (sample,) = scrape(vllm).families["vllm:lora_requests_info"].samples
    assert sample.labels == {
        "max_lora": "8",
        "running_lora_adapters": "sql",
        "waiting_lora_adapters": "abc,qa",
    }
    assert before - 1 <= sample.value <= time.time() + 1, "the value is the time: routers take the newest"


def test_without_the_option_there_are_no_vllm_names(server: Any) -> None:
    assert not [name for name in scrape(server).names() if name.startswith("vllm")]


def test_a_token_costs_microseconds() -> None:
    metrics = Metrics()
    output = TokenOutput("id", token_id=5, started=time.perf_counter())

    def best(call: Callable[[], object], times: int) -> float:
        return min(timeit.repeat(call, number=times, repeat=30)) / times

    def request() -> ChoiceMeter:
        whole = RequestMeter(metrics, Lease("sql", "ab" * 32), RequestNote("id"))
        whole.submitting()
        whole.admitted(5, 1, 16)
        meter = ChoiceMeter(whole, 5)
        meter.took(output)
        meter.end("length")
        return meter

    meter = request()
    token, one = best(lambda: meter.took(output), 1000), best(request, 100)
    print(f"\na token {token * 1e6:.1f} µs, a request {one * 1e6:.1f} µs")
    assert token < 20e-6
    assert one < 400e-6


def test_a_blend_has_one_label() -> None:
    metrics = Metrics(max_tasks=2)
    blend = Blend.of({"a": 0.5, "b": 0.5})
    assert metrics.lease_label(Lease(blend.name, "ab" * 32, "channel", "", blend)) == "blend"
    assert metrics.label_of_name(blend.name) == "blend"
    assert metrics.label_of_name("unseen") == "other"
