"""Requests made up from /openapi.json, well-formed and malformed: no 5xx, and every answer is as the document says.

PEQA_FUZZ_SEED and PEQA_FUZZ_EXAMPLES look further than the tests do every time.
"""

from __future__ import annotations

import importlib
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from server_stubs import wait_until

from peqa_runtime.model import read_manifest
from peqa_runtime.scales.synthetic import synthetic_sets
from peqa_server.app import create_loading_app
from peqa_server.settings import ServerSettings
from peqa_server.start.loading import ServeOptions, load_services

schemathesis = pytest.importorskip("schemathesis")
CHECKS = [
    getattr(importlib.import_module(module), name)
    for module, name in (
        ("schemathesis.checks", "not_a_server_error"),
        ("schemathesis.specs.openapi.checks", "status_code_conformance"),
        ("schemathesis.specs.openapi.checks", "content_type_conformance"),
        ("schemathesis.specs.openapi.checks", "response_headers_conformance"),
        ("schemathesis.specs.openapi.checks", "response_schema_conformance"),
    )
]
FailureGroup = importlib.import_module("schemathesis.core.failures").FailureGroup
Failure = importlib.import_module("schemathesis.core.failures").Failure

EXAMPLES = int(os.environ.get("PEQA_FUZZ_EXAMPLES", "1000"))
SEED = int(os.environ.get("PEQA_FUZZ_SEED", "0"))
HEAVY = 4  # an operation with a body gets so many times the examples of one without
TASK = "one"
VOCABULARY = 300
FEW = 4
SOUND = {"prompt": "the cat", "messages": [{"role": "user", "content": "the cat"}]}


@dataclass
class Fuzzed:
    """A live server with a tiny model, and what its document says."""

    url: str
    schema: Any
    sets: list[bytes]
    client: httpx.Client
    session: Any = field(default_factory=requests.Session)  # of the library that schemathesis calls with
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)

    streams: Counter[str] = field(default_factory=Counter)

    def upload(self) -> None:
        for content in self.sets:
            answer = self.client.put(f"/v1/tasks/{TASK}", content=content)
            assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def fuzzed(run_app: Any, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    store = tmp_path_factory.mktemp("fuzz") / "store"
    engine = {"num_blocks": 64, "task_rows": 4, "max_model_len": 96}
    options = ServeOptions(tiny_base, home=store.parent, store=store, engine=engine)
    services, _ = load_services(options, lambda line: None)
    app = create_loading_app(ServerSettings(max_request_bytes=1 << 16))
    url, loop = run_app(app)
    loop.call_soon_threadsafe(app.state.gate.open, services)
    client = httpx.Client(base_url=url, timeout=30)
    wait_until(lambda: client.get("/ready").status_code == 200)
    manifest = read_manifest(tiny_base)
    sets = [content for _, _, content in synthetic_sets(manifest, 2)]
    fuzzed = Fuzzed(url, schemathesis.openapi.from_url(f"{url}/openapi.json"), sets, client)
    fuzzed.upload()
    yield fuzzed
    services.engine.stop()


def steer(case: Any, content: bytes) -> None:
    """Half of the requests name a task and tokens that exist, else hardly one would get beyond the first check."""
    choice = zlib.crc32(repr((case.path_parameters, case.query, case.body)).encode()) % 6
    if choice % 2:
        return
    path = case.path_parameters or {}
    for name in {"task", "model"} & set(path):
        path[name] = TASK
    if case.method == "PUT":
        case.body = content
    elif isinstance(case.body, dict) and not path:
        most = None if choice == 0 else FEW  # of many fields one is nearly always refused
        body = {name: plain(value) for name, value in list(case.body.items())[:most]}
        for name in ("model", "task", "adapter_id"):
            body.pop(name, None)
        for name, bound in (("max_tokens", 8), ("max_completion_tokens", 8), ("n", 3)):
            if isinstance(body.get(name), int):
                body[name] = min(body[name], bound)
        if choice:
            body["task"] = TASK
            field = "messages" if "chat" in case.path else "prompt"
            body |= {field: SOUND[field]} if field in case.body else {}
            body |= {"stream": True} if "completions" in case.path else {}
        case.body = body


def plain(value: Any) -> Any:
    """Numbers in lists as ids of the tiny vocabulary; 2.0, which the document's integers allow, as 2."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [v % VOCABULARY if type(v) is int else plain(v) for v in map(plain, value)]
    return value


def fuzz(fuzzed: Fuzzed, operation: Any, mode: Any, examples: int) -> None:
    @seed(SEED)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        steer(case, fuzzed.sets[0])
        response = case.call(session=fuzzed.session, timeout=60)
        fuzzed.statuses[operation.label, response.status_code] += 1
        fuzzed.streams[operation.label] += b"data: [DONE]" in response.content
        if operation.label.startswith(("DELETE", "POST /v1/tasks")) and response.status_code == 200:
            fuzzed.upload()
        case.validate_response(response, checks=CHECKS)

    run()


@pytest.mark.slow
def test_every_answer_is_as_the_document_says(fuzzed: Fuzzed) -> None:
    modes = list(schemathesis.GenerationMode)
    operations = [result.ok() for result in fuzzed.schema.get_all_operations()]
    shares = [(HEAVY if o.body else 1) * bool(o.body or o.path_parameters or o.query) for o in operations]
    each = -(
        -EXAMPLES * 11 // (10 * sum(shares) * len(modes))
    )  # a tenth more: small spaces of queries run out
    wrong: list[str] = []
    for operation, share in zip(operations, shares, strict=True):
        begin = time.monotonic()
        for mode in modes:
            try:
                fuzz(fuzzed, operation, mode, max(1, each * share))
            except (
                FailureGroup,
                Failure,
            ) as failure:  # all operations are tried, then all that is wrong is told
                wrong.append(f"{operation.label} ({mode.value}): {failure}")
            except Unsatisfiable:
                assert (
                    mode is schemathesis.GenerationMode.NEGATIVE
                )  # nothing is sent, so nothing can be wrong in it
        seen = {s: n for (label, s), n in sorted(fuzzed.statuses.items()) if label == operation.label}
        print(f"{operation.label:40} {time.monotonic() - begin:5.1f} s  {seen}")
    assert not wrong, "\n\n".join(wrong)
    assert sum(fuzzed.statuses.values()) >= EXAMPLES
    for operation in operations:
        assert fuzzed.statuses[operation.label, 200], f"{operation.label} was never answered well"
        assert fuzzed.streams[operation.label] or "completions" not in operation.label
    assert fuzzed.client.get("/health").status_code == 200
