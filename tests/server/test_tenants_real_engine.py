"""Tenants over the real engine and store: cached prompts, uploads counted beyond a restart, names kept back."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from key_stubs import bearer, key, write_keys
from server_stubs import check_error, wait_until

from peqa_runtime.model import read_manifest
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.task_folder import TaskFolders
from peqa_server.app import create_loading_app
from peqa_server.settings import ServerSettings
from peqa_server.start.loading import ServeOptions, load_services

PROMPT = list(range(3, 3 + 100))


def scale_set(base: Path, seed: int) -> bytes:
    manifest = read_manifest(base)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{name}.out_scale": 1 + 0.3 * torch.rand(shape.out_features, generator=generator)
        for name, shape in manifest.linears.items()
    }
    return bytes(
        ScaleSet.build("channel", tensors, manifest, task="noted", prompt_format="{prompt}").to_bytes()
    )


@pytest.fixture(scope="module")
def serve(run_app: Any, tiny_base: Path) -> Iterator[Callable[[Path], httpx.Client]]:
    """Serve a store with keys; the same store again is a restart."""
    started: list[Any] = []
    size = len(scale_set(tiny_base, 0))

    def serve(folder: Path) -> httpx.Client:
        keys = write_keys(
            folder / "keys.json",
            key("alice", "uploader", "acme-*", tenant="acme", disk_bytes=3 * size),
            key("amy", "user", "acme-*", tenant="acme"),
            key("bob", "user", "*"),
            key("root", "admin"),
        )
        options = ServeOptions(
            tiny_base, home=folder, store=folder / "store", engine={"num_blocks": 64, "task_rows": 4}
        )
        services, _ = load_services(options, lambda line: None)
        started.append(services)
        app = create_loading_app(ServerSettings(key_file=keys))
        url, loop = run_app(app)
        loop.call_soon_threadsafe(app.state.gate.open, services)
        client = httpx.Client(base_url=url, timeout=30)
        wait_until(lambda: client.get("/ready").status_code == 200)
        return client

    yield serve
    for services in started:
        services.engine.stop()
        services.tasks.close()


@pytest.fixture(scope="module")
def client(serve: Any, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> httpx.Client:
    client: httpx.Client = serve(tmp_path_factory.mktemp("tenants"))
    for seed, task in enumerate(("acme-sql", "zeta-secret")):
        put = client.put(f"/v1/tasks/{task}", content=scale_set(tiny_base, seed), headers=bearer("root"))
        assert put.status_code == 200, put.text
    return client


def cached(client: httpx.Client, who: str, **body: Any) -> int:
    body = {"prompt": PROMPT, "max_tokens": 2, "task": "acme-sql"} | body
    answer = client.post("/v1/completions", json=body, headers=bearer(who))
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_nobody_finds_out_what_another_tenant_has_asked(client: httpx.Client) -> None:
    assert cached(client, "alice") == 0
    own = cached(client, "alice")
    assert own > 50
    assert cached(client, "amy") == own, "keys of one tenant share"
    assert cached(client, "bob") == 0
    assert cached(client, "bob") == own
    assert cached(client, "root") == 0
    assert cached(client, "alice", cache_salt="mine") == 0
    assert cached(client, "amy", cache_salt="mine") == own
    assert cached(client, "bob", cache_salt="mine") == 0


def test_the_real_library_tells_no_names(client: httpx.Client) -> None:
    choices = [
        "acme-no",
        "zeta-secret",
        {"acme-no": 0.5, "acme-sql": 0.5},
        {"acme-sql": 0.5, "zeta-secret": 0.5},
    ]
    bodies = [{"prompt": "x", "max_tokens": 1, "task": choice} for choice in choices]
    answers = [
        client.get("/v1/tasks/acme-no", headers=bearer("amy")),
        client.get("/v1/tasks/zeta-secret", headers=bearer("amy")),
        client.get("/v1/models/acme-no", headers=bearer("amy")),
        client.delete("/v1/tasks/acme-no", headers=bearer("alice")),
        *(client.post("/v1/completions", json=body, headers=bearer("amy")) for body in bodies),
    ]
    for answer in answers:
        check_error(answer, 404)
        assert "secret" not in answer.text.replace("'zeta-secret'", "")
    assert client.post("/v1/completions", json=bodies[3], headers=bearer("bob")).status_code == 200


def test_an_absent_member_of_a_blend_is_told_without_the_disk(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop says it: a disk that hangs would hold up every request."""
    back = threading.Event()
    history = TaskFolders.history

    def hang(self: TaskFolders, task: str) -> Any:
        back.wait(20)
        return history(self, task)

    monkeypatch.setattr(TaskFolders, "history", hang)
    body = {"prompt": "x", "max_tokens": 1, "task": {"acme-sql": 0.5, "acme-zzz": 0.5}}
    try:
        answer = client.post("/v1/completions", json=body, headers=bearer("amy"), timeout=5)
    finally:
        back.set()
    assert "acme-zzz" in check_error(answer, 404)["message"]


def with_note(data: bytes, note: str) -> bytes:
    """The same tensors, and so the same revision, under a header of another length."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["note"] = json.dumps({"by": note})
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def test_what_is_kept_already_is_taken_however_full_the_disk(
    serve: Any, tiny_base: Path, tmp_path: Path
) -> None:
    client = serve(tmp_path)

    def put(task: str, data: bytes, announced: bool = True, **headers: str) -> httpx.Response:
        content = data if announced else iter([data[:1000], data[1000:]])
        headers = {name.replace("_", "-"): value for name, value in headers.items()} | bearer("alice")
        answer: httpx.Response = client.put(f"/v1/tasks/{task}", content=content, headers=headers)
        return answer

    old, now, other = (scale_set(tiny_base, seed) for seed in range(3))
    assert [put("acme-a", data).status_code for data in (old, now)] == [200, 200]
    revision = put("acme-b", other).json()["revision"]  # three sets: no byte is left
    for announced in (True, False):
        check_error(put("acme-a", scale_set(tiny_base, 9), announced), 413)
        check_error(put("acme-c", now, announced), 413)
        again = put("acme-b", other, announced, if_match=f'"{revision}"')
        assert (again.status_code, again.json()["revision"]) == (200, revision)
        assert put("acme-b", with_note(other, "somebody else"), announced).json()["note"]
        assert put("acme-b", other, announced, if_match="*").status_code == 200
        for stale in ({"if_match": '"' + "0" * 64 + '"'}, {"if_none_match": "*"}):
            assert check_error(put("acme-b", other, announced, **stale), 412)["code"] == "revision_conflict"
            check_error(put("acme-b", scale_set(tiny_base, 9), announced, **stale), 412)
        check_error(put("acme-c", now, announced, if_match="*"), 412)
        check_error(put("acme-c", now, announced, if_none_match="*"), 413)
        for data in (old, now):  # back and forth between kept revisions
            assert put("acme-a", data, announced).status_code == 200
        check_error(put("acme-a", b"x" * len(now), announced), 413)
    assert client.delete("/v1/tasks/acme-b", headers=bearer("alice")).status_code == 200
    assert put("acme-c", other).status_code == 200, "none of all this was counted"
    check_error(put("acme-d", other), 413)


def test_the_disk_is_counted_beyond_a_restart(serve: Any, tiny_base: Path, tmp_path: Path) -> None:
    client = serve(tmp_path)

    def put(task: str, seed: int) -> httpx.Response:
        answer: httpx.Response = client.put(
            f"/v1/tasks/{task}", content=scale_set(tiny_base, seed), headers=bearer("alice")
        )
        return answer

    assert [put("acme-a", seed).status_code for seed in (1, 2)] == [200, 200]
    assert put("acme-a", 2).status_code == 200, "what is current already takes no more"
    client = serve(tmp_path)
    assert put("acme-b", 3).status_code == 200
    refused = check_error(put("acme-b", 4), 413)
    assert refused["code"] == "disk_quota_exceeded"
    assert client.delete("/v1/tasks/acme-a", headers=bearer("root")).status_code == 200
    assert put("acme-b", 4).status_code == 200
    assert put("acme-b", 5).status_code == 200
    check_error(put("acme-b", 6), 413)
