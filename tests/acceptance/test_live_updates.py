"""Tasks change while they are served: every answer is one revision's answer, and an upload is live at its 200."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from peqa_runtime import ScaleSet

pytestmark = pytest.mark.slow

PROMPTS = ("table t(name, age)\nHow old is Ann?", "I lost my card", "a table for six at noon please")
TOKENS = 12


def two_revisions(manifest: Any) -> list[bytes]:
    """Two scale sets that change the greedy answers, of the same kind."""
    out = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"{name}.out_scale": 1 + 0.06 * torch.randn(shape.out_features, generator=generator)
            for name, shape in manifest.linears.items()
        }
        out.append(ScaleSet.build("channel", tensors, manifest, task="swing").to_bytes())
    return out


def answer(server: Any, prompt: str) -> tuple[str, tuple[int, ...]]:
    got = server.complete(prompt, "swing", max_tokens=TOKENS, ignore_eos=True)
    return got["revision"], tuple(got["choices"][0]["token_ids"])


def test_answers_during_200_uploads_are_whole(demo_server: Any, demo_manifest: Any) -> None:
    files = two_revisions(demo_manifest)
    revisions: list[str] = []
    reference: dict[tuple[str, str], tuple[int, ...]] = {}
    for data in files:
        put = httpx.put(f"{demo_server.url}/v1/tasks/swing", content=data, timeout=30)
        assert put.status_code == 200, put.text
        revisions.append(put.json()["revision"])
        for prompt in PROMPTS:
            revision, tokens = answer(demo_server, prompt)
            assert revision == revisions[-1]
            reference[prompt, revision] = tokens
    assert all(reference[p, revisions[0]] != reference[p, revisions[1]] for p in PROMPTS), (
        "the revisions differ"
    )

    stop = threading.Event()
    seen: list[
        tuple[float, float, str, str, tuple[int, ...]]
    ] = []  # started, ended, prompt, revision, tokens
    failures: list[str] = []

    def ask_on(prompt: str) -> None:
        while not stop.is_set():
            started = time.perf_counter()
            try:
                revision, tokens = answer(demo_server, prompt)
            except (AssertionError, httpx.HTTPError) as error:
                failures.append(repr(error))
                return
            seen.append((started, time.perf_counter(), prompt, revision, tokens))

    threads = [threading.Thread(target=ask_on, args=(p,)) for p in PROMPTS * 2]
    for thread in threads:
        thread.start()
    uploads: list[tuple[float, float, str]] = []  # sent, answered, revision
    for i in range(200):
        sent = time.perf_counter()
        put = httpx.put(f"{demo_server.url}/v1/tasks/swing", content=files[i % 2], timeout=30)
        assert put.status_code == 200, put.text
        uploads.append((sent, time.perf_counter(), put.json()["revision"]))
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()

    assert not failures, failures[:3]
    assert len(seen) >= 50
    for started, ended, prompt, revision, tokens in seen:
        assert tokens == reference[prompt, revision], "an answer is one revision's answer, whole"
        done = [u for u in uploads if u[1] <= started]
        live = done[-1][2] if done else revisions[-1]
        in_flight = {u[2] for u in uploads if u[1] > started and u[0] < ended}
        assert revision in {live} | in_flight, "after an upload's 200 no new request sees the old revision"
    assert {s[3] for s in seen} == set(revisions), "both revisions were seen"


def test_replace_rollback_delete_and_download_while_running(
    demo_server: Any, demo_manifest: Any, tmp_path: Path
) -> None:
    first, second = two_revisions(demo_manifest)
    url = f"{demo_server.url}/v1/tasks/turn"
    one = httpx.put(url, content=first, timeout=30).json()["revision"]
    long_answer: dict[str, Any] = {}

    def ask() -> None:
        long_answer.update(demo_server.complete(PROMPTS[0], "turn", max_tokens=96, ignore_eos=True))

    expected = demo_server.complete(PROMPTS[0], "turn", max_tokens=96, ignore_eos=True)
    running = threading.Thread(target=ask)
    running.start()
    time.sleep(0.3)
    two = httpx.put(url, content=second, timeout=30).json()["revision"]
    assert two != one
    assert httpx.get(f"{url}/content", timeout=30).content == second
    rolled = httpx.post(f"{url}/rollback", timeout=30)
    assert rolled.status_code == 200, rolled.text
    assert rolled.json()["revision"] == one
    assert httpx.delete(url, timeout=30).status_code in (200, 204)
    assert (
        httpx.post(
            f"{demo_server.url}/v1/completions", json={"prompt": "x", "task": "turn"}, timeout=30
        ).status_code
        == 404
    )
    running.join()
    assert long_answer["revision"] == one
    assert long_answer["choices"][0]["token_ids"] == expected["choices"][0]["token_ids"], (
        "a running request is untouched"
    )


def test_client_gone_frees_its_blocks(demo_server: Any) -> None:
    deadline = time.monotonic() + 10
    while demo_server.metric("peqa_requests_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    before = demo_server.metric("peqa_kv_blocks_used")
    body = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{demo_server.url}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert demo_server.metric("peqa_kv_blocks_used") > before
    deadline = time.monotonic() + 2
    while demo_server.metric("peqa_kv_blocks_used") > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert demo_server.metric("peqa_kv_blocks_used") == before
    assert demo_server.metric("peqa_requests_running") == 0
