"""JSON to a schema against free text: output tokens per second of the same load, in turn, on one server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import mean
from typing import Any

from peqa_loadtest.bench.figure import Figure, figure
from peqa_loadtest.bench.session import Session, failures, rate
from peqa_loadtest.client import Answer, CompletionClient, LoadTestError
from peqa_loadtest.run import run_plan
from peqa_loadtest.workload import plan_requests

STREAMS = 8
OF_FREE_TEXT = 0.9
FASTEST = 4  # of so many loads one is judged: what else the machine does only ever slows a load down

RECORD: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
        "note": {"type": "string", "maxLength": 60},
    },
    "required": ["name", "age", "tags", "note"],
    "additionalProperties": False,
}
SCHEMA: Mapping[str, Any] = {"type": "array", "items": RECORD, "minItems": 1000}
"""It outlasts every answer, so that both kinds have the same number of tokens."""

FORM: Mapping[str, Any] = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "records", "schema": SCHEMA}}
}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
}
"""How tokens are chosen: forms are kept in another way in each."""


async def structured(session: Session, rounds: int) -> list[Figure]:
    """For each way of choosing: the fastest of `rounds` loads to the schema against the fastest of free text."""
    rows = []
    for way, fields in WAYS.items():
        rates: dict[str, list[float]] = {"free": [], "schema": []}
        await _load(session, {**fields, **FORM})  # warm-up: the schema is compiled, connections are open
        for number in range(rounds):
            for kind in ("free", "schema") if number % 2 else ("schema", "free"):
                form = FORM if kind == "schema" else {}
                rates[kind].append(rate(await _load(session, {**fields, **form})))
        free, kept = _fastest(rates["free"]), _fastest(rates["schema"])
        facts = {
            "streams": STREAMS,
            "rounds": rounds,
            "free_tokens_per_s": free,
            "schema_tokens_per_s": kept,
            "all_loads": mean(rates["schema"]) / mean(rates["free"]),
        }
        name = f"served/structured/{way}/vs-free-text"
        rows.append(figure(name, kept / free, "x", ">=", OF_FREE_TEXT, **facts))
    return rows


def _fastest(rates: list[float]) -> float:
    """Mean of the fastest one in FASTEST."""
    return mean(sorted(rates, reverse=True)[: max(1, len(rates) // FASTEST)])


async def _load(session: Session, fields: Mapping[str, Any]) -> list[Answer]:
    """STREAMS answers of the base at once, to prompts that no load has used."""
    first = session.take_numbers(STREAMS)
    plan = plan_requests(
        ["base"], mix="uniform", count=STREAMS, words=session.words, seed=first, first_number=first
    )
    async with CompletionClient(replace(session.client.target, fields=fields)) as client:
        answers = await run_plan(client, plan, session.output_tokens, STREAMS)
    if failed := failures(answers):
        reason = next(a.failure.message for a in answers if a.failure is not None)
        raise LoadTestError(f"{failed} of {STREAMS} requests failed: {reason}")
    return answers
