"""The real engine behind two servers on one store: a push to one is served by the other, and blends bit for bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from server_stubs import check_error

from peqa_runtime.core import BaseManifest
from peqa_runtime.model import read_manifest
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_server.app import create_loading_app
from peqa_server.start.loading import ServeOptions, load_services


def tensors(manifest: BaseManifest, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.out_scale": (1 + 0.3 * torch.rand(shape.out_features, generator=generator)).half()
        for name, shape in manifest.linears.items()
    }


def file_of(manifest: BaseManifest, values: dict[str, torch.Tensor], **options: Any) -> bytes:
    return ScaleSet.build("channel", values, manifest, **options).to_bytes()


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared") / "store"


@pytest.fixture(scope="module")
def pair(run_app: Any, tiny_base: Path, shared_store: Path) -> Iterator[list[httpx.Client]]:
    store = shared_store
    clients, running = [], []
    for _ in range(2):
        options = ServeOptions(
            tiny_base,
            home=store.parent,
            store=store,
            engine={"num_blocks": 64, "task_rows": 3},
            watch_seconds=0.05,
        )
        services, _ = load_services(options, lambda line: None)
        app = create_loading_app()
        url, loop = run_app(app)
        loop.call_soon_threadsafe(app.state.gate.open, services)
        clients.append(httpx.Client(base_url=url, timeout=30))
        running.append(services)
        while clients[-1].get("/ready").status_code != 200:
            time.sleep(0.01)
    yield clients
    for services in running:
        services.engine.stop()
        services.tasks.close()


def values_of(client: httpx.Client, task: Any) -> tuple[list[float], Any, str]:
    """Log-probabilities of a prompt's tokens and of four more; the task and revision that the answer names."""
    body = {
        "prompt": "the cat sat",
        "task": task,
        "max_tokens": 4,
        "temperature": 0,
        "logprobs": 1,
        "echo": True,
    }
    answer = client.post("/v1/completions", json=body | {"ignore_eos": True})
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    return choice["logprobs"]["token_logprobs"][1:], answer.json()["task"], answer.json()["revision"]


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_push_a_rollback_and_a_delete_reach_the_other_server(
    pair: list[httpx.Client], tiny_base: Path
) -> None:
    one, two = pair
    manifest = read_manifest(tiny_base)
    revisions = [
        one.put("/v1/tasks/moving", content=file_of(manifest, tensors(manifest, seed))).json()["revision"]
        for seed in (1, 2)
    ]
    until(lambda: two.get("/v1/tasks/moving").status_code == 200)
    until(lambda: values_of(two, "moving")[2] == revisions[1])
    assert values_of(one, "moving") == values_of(two, "moving")
    two.post("/v1/tasks/moving/rollback")
    until(lambda: values_of(one, "moving")[2] == revisions[0])
    one.delete("/v1/tasks/moving")
    body = {"prompt": "x", "task": "moving"}
    until(lambda: two.post("/v1/completions", json=body).status_code == 404)
    assert "moving" not in [row["id"] for row in two.get("/v1/models").json()["data"]]


def test_blends_are_computed_bit_for_bit(pair: list[httpx.Client], tiny_base: Path) -> None:
    """A blend's answer is that of a set tuned to the very mix; of one task alone, that task's."""
    client = pair[0]
    manifest = read_manifest(tiny_base)
    a, b = tensors(manifest, 3), tensors(manifest, 4)
    for task, values in {"a": a, "b": b}.items():
        client.put(f"/v1/tasks/{task}", content=file_of(manifest, values))
    mixed = {n: 0.25 * a[n].float() + 0.5 * b[n].float() + 0.25 for n in a}  # exact in float32
    client.put("/v1/tasks/mixed", content=file_of(manifest, mixed, dtype=torch.float32))
    weights = {"a": 0.25, "b": 0.5, "base": 0.25}
    found, task, revision = values_of(client, weights)
    assert task == weights
    assert found == values_of(client, "mixed")[0]
    assert found != values_of(client, "a")[0]
    assert values_of(client, {"a": 1.0})[0] == values_of(client, "a")[0]
    assert values_of(client, {"base": 1})[0] == values_of(client, "base")[0]
    assert values_of(client, weights)[2] == revision
    client.put("/v1/tasks/a", content=file_of(manifest, tensors(manifest, 5)))
    changed = values_of(client, weights)
    assert changed[2] != revision
    assert changed[0] != found


def test_only_channel_sets_blend(pair: list[httpx.Client], tiny_base: Path) -> None:
    client = pair[0]
    manifest = read_manifest(tiny_base)
    wide = {
        f"{name}.group_scale": torch.ones(shape.out_features, shape.groups)
        for name, shape in manifest.linears.items()
    }
    client.put("/v1/tasks/wide", content=ScaleSet.build("group", wide, manifest).to_bytes())
    answer = client.post("/v1/completions", json={"prompt": "x", "task": {"wide": 0.5, "base": 0.5}})
    error = check_error(answer, 400)
    assert "'wide' is of kind 'group'" in error["message"]
    assert error["param"] == "task"


def test_a_damaged_set_fails_its_task_by_name_and_no_other(
    pair: list[httpx.Client], shared_store: Path, tiny_base: Path
) -> None:
    client, other = pair
    manifest = read_manifest(tiny_base)
    for task, seed in (("broken", 6), ("sound", 7)):
        client.put(f"/v1/tasks/{task}", content=file_of(manifest, tensors(manifest, seed)))
    until(lambda: other.get("/v1/tasks/sound").status_code == 200)
    (file,) = shared_store.glob("tasks/*/broken/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert values_of(client, "broken"), "in memory since the upload"
    answer = other.post("/v1/completions", json={"prompt": "x", "task": "broken"})
    error = check_error(answer, 409)
    assert error["code"] == "task_unusable"
    assert "'broken' cannot be used: its file is damaged" in error["message"]
    assert values_of(other, "sound") == values_of(client, "sound")
    metrics = dict(row.rsplit(" ", 1) for row in other.get("/metrics").text.splitlines() if row[0] != "#")
    assert float(metrics["peqa_engine_set_load_failures_total"]) >= 1
    assert float(metrics["peqa_host_limit_bytes"]) == 1 << 30
    assert [row["task"] for row in other.get("/v1/tasks").json()["unusable"]] == ["broken"]
    client.put("/v1/tasks/broken", content=file_of(manifest, tensors(manifest, 8)))
    until(lambda: other.get("/v1/tasks/broken").status_code == 200)
    assert values_of(other, "broken") == values_of(client, "broken")
