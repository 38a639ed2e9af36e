"""kill -9 at any moment: the next start has the old or the new revision, whole; SIGTERM lets running answers finish."""

from __future__ import annotations

import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from peqa_runtime import ScaleSet, read_manifest

pytestmark = pytest.mark.slow

ROUNDS = 5


def test_kill_during_uploads(
    tiny_base: Path, tmp_path: Path, start_server: Callable[[list[str]], Any]
) -> None:
    manifest = read_manifest(tiny_base)
    files: dict[str, bytes] = {}
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"{name}.out_scale": 1 + 0.1 * torch.rand(shape.out_features, generator=generator)
            for name, shape in manifest.linears.items()
        }
        built = ScaleSet.build("channel", tensors, manifest, task="t")
        files[built.revision] = built.to_bytes()
    revisions = list(files)
    store = tmp_path / "store"
    acknowledged: list[str] = []
    sent: list[str] = []

    def upload_on(url: str) -> None:
        for i in range(10_000):
            sent.append(revisions[i % 2])
            try:
                if httpx.put(f"{url}/v1/tasks/t", content=files[sent[-1]], timeout=10).status_code == 200:
                    acknowledged.append(sent[-1])
            except httpx.HTTPError:
                return

    for round_ in range(ROUNDS):
        server = start_server([str(tiny_base), "--store", str(store)])
        if acknowledged:  # the state that the kill left behind
            task = httpx.get(f"{server.url}/v1/tasks/t", timeout=10).json()
            assert task["revision"] in {acknowledged[-1], sent[-1]}, "the old or the new revision"
            assert (
                httpx.get(f"{server.url}/v1/tasks/t/content", timeout=10).content == files[task["revision"]]
            ), "whole"
            assert server.complete([5, 6, 7], "t", max_tokens=2)["revision"] == task["revision"]
        uploader = threading.Thread(target=upload_on, args=(server.url,))
        uploader.start()
        time.sleep(0.3 + random.Random(round_).random() * 0.2)
        server.kill(signal.SIGKILL)
        uploader.join()
    assert len(acknowledged) > ROUNDS, "uploads did go through between the kills"
    server = start_server([str(tiny_base), "--store", str(store)])
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        half.sendall(
            b"PUT /v1/tasks/t HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n" + b"x" * 500
        )
        deadline = time.monotonic() + 20
        while not (left := [p for p in store.rglob("*") if p.is_file() and "tmp" in p.name]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.kill(signal.SIGKILL)
    assert all(path.exists() for path in left)
    start_server([str(tiny_base), "--store", str(store)])
    assert not [p for p in left if p.exists()], "a start cleans what an interrupted upload left"


def test_sigterm_lets_a_running_answer_finish(
    tiny_base: Path, tmp_path: Path, start_server: Callable[[list[str]], Any]
) -> None:
    server = start_server([str(tiny_base), "--store", str(tmp_path / "store")])
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(
        target=lambda: answers.append(
            server.complete([5, 6, 7], max_tokens=400, ignore_eos=True, temperature=0)
        )
    )
    asking.start()
    while asking.is_alive() and httpx.get(f"{server.url}/load").json()["server_load"] == 0:
        time.sleep(0.01)  # until it runs
    assert server.kill(signal.SIGTERM) == 0
    asking.join()
    assert answers[0]["usage"]["completion_tokens"] == 400


@pytest.mark.alone
def test_a_second_start_is_ready_within_15_s(
    smollm2_base: Path, tmp_path: Path, start_server: Callable[[list[str]], Any]
) -> None:
    arguments = [str(smollm2_base), "--store", str(tmp_path / "store")]
    start_server(arguments).kill(signal.SIGTERM)
    started = time.monotonic()
    start_server(arguments)
    seconds = time.monotonic() - started
    print(f"\nfrom start to /ready: {seconds:.1f} s")
    assert seconds < 15
