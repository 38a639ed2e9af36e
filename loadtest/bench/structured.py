"""JSON to a schema against free text: output tokens per second of the same load, in turn, on one server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any

from peqa_loadtest.bench.figure import Figure, figure
from peqa_loadtest.bench.session import Session, failures, rate
from peqa_loadtest.client import Answer, CompletionClient, LoadTestError
from peqa_loadtest.run import run_plan
from peqa_loadtest.workload import plan_requests

STREAMS = 8
REQUESTS = 16
OF_FREE_TEXT = 0.9

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
    """For each way of choosing: the median of `rounds` ratios, each of two loads that follow one another."""
    rows = []
    for way, fields in WAYS.items():
        ratios, free_rates, kept_rates = [], [], []
        await _load(session, {**fields, **FORM})  # warm-up: the schema is compiled, connections are open
        for number in range(rounds):
            order = (FORM, {}) if number % 2 else ({}, FORM)
            first, second = [rate(await _load(session, {**fields, **form})) for form in order]
            kept, free = (first, second) if number % 2 else (second, first)
            ratios.append(kept / free)
            free_rates.append(free)
            kept_rates.append(kept)
        facts = {
            "streams": STREAMS,
            "free_tokens_per_s": median(free_rates),
            "schema_tokens_per_s": median(kept_rates),
            "best_of_each": max(kept_rates) / max(free_rates),
            "rounds": rounds,
        }
        rows.append(
            figure(f"served/structured/{way}/vs-free-text", median(ratios), "x", ">=", OF_FREE_TEXT, **facts)
        )
    return rows


async def _load(session: Session, fields: Mapping[str, Any]) -> list[Answer]:
    """REQUESTS answers of the base to prompts that no load has used, STREAMS at a time."""
    first = session.take_numbers(REQUESTS)
    plan = plan_requests(
        ["base"], mix="uniform", count=REQUESTS, words=session.words, seed=first, first_number=first
    )
    async with CompletionClient(replace(session.client.target, fields=fields)) as client:
        answers = await run_plan(client, plan, session.output_tokens, STREAMS)
    if failed := failures(answers):
        reason = next(a.failure.message for a in answers if a.failure is not None)
        raise LoadTestError(f"{failed} of {REQUESTS} requests failed: {reason}")
    return answers
