"""What safetensors itself accepts and a server must not, and what it refuses and we rely on: each is a 413 or a 422."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors
import torch
from server_stubs import check_error, wait_until

from peqa_runtime.core import BaseManifest
from peqa_runtime.model import read_manifest
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_server.app import create_loading_app
from peqa_server.settings import MIB, ServerSettings
from peqa_server.start.loading import ServeOptions, load_services

PART = 256 * 1024


@pytest.fixture(scope="module")
def server(
    run_app: Any, tiny_base: Path, good: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """With a task "t", and room for 200 MB, so that what is larger than any set still comes as far as its header."""
    store = tmp_path_factory.mktemp("hostile") / "store"
    options = ServeOptions(
        tiny_base, home=store.parent, store=store, engine={"num_blocks": 16, "task_rows": 4}
    )
    services, _ = load_services(options, lambda line: None)
    app = create_loading_app(ServerSettings(max_upload_bytes=200 * MIB))
    url, loop = run_app(app)
    loop.call_soon_threadsafe(app.state.gate.open, services)
    client = httpx.Client(base_url=url, timeout=60)
    wait_until(lambda: client.get("/ready").status_code == 200)
    client.put("/v1/tasks/t", content=good).raise_for_status()
    yield client
    services.engine.stop()
    services.tasks.close()


@pytest.fixture(scope="module")
def manifest(tiny_base: Path) -> BaseManifest:
    return read_manifest(tiny_base)


@pytest.fixture(scope="module")
def good(manifest: BaseManifest) -> bytes:
    tensors = {f"{n}.out_scale": torch.full((s.out_features,), 1.25) for n, s in manifest.linears.items()}
    return ScaleSet.build("channel", tensors, manifest).to_bytes()


Header = dict[str, Any]


def taken_apart(data: bytes) -> tuple[Header, bytearray]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])


def put_together(header: Header | str, body: bytes) -> bytes:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensors_of(header: Header) -> list[tuple[str, Header]]:
    """By place in the file."""
    found = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    return sorted(found, key=lambda item: item[1]["data_offsets"])


def longer_than_the_file(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data[8:]


def overlap(data: bytes) -> bytes:
    header, body = taken_apart(data)
    (_, first), (_, second) = tensors_of(header)[:2]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + size]
    return put_together(header, body)


def hole(data: bytes) -> bytes:
    header, body = taken_apart(data)
    for _, entry in tensors_of(header)[1:]:
        entry["data_offsets"] = [at + 8 for at in entry["data_offsets"]]
    return put_together(header, bytes(body) + bytes(8))


def changed(**fields: Any) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        header, body = taken_apart(data)
        tensors_of(header)[0][1].update(fields)
        return put_together(header, body)

    return change


def deep(data: bytes) -> bytes:
    text = json.dumps(taken_apart(data)[0])
    return put_together(text[:-1] + ', "x": ' + "[" * 10_000 + "]" * 10_000 + "}", taken_apart(data)[1])


def more_tensors(name: str, **fields: Any) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        header, body = taken_apart(data)
        entry = {"dtype": "F16", "shape": [0], "data_offsets": [len(body), len(body)], **fields}
        return put_together({**header, name: entry}, body)

    return change


def many_more_tensors(data: bytes) -> bytes:
    header, body = taken_apart(data)
    empty = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    return put_together({**header, **{str(i): empty for i in range(999)}}, body)


def twice(data: bytes) -> bytes:
    """The second one wins in most parsers, the library's included."""
    header, body = taken_apart(data)
    name, entry = tensors_of(header)[0]
    text = json.dumps(header)
    return put_together(text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}", body)


def with_value(value: float) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        header, body = taken_apart(data)
        body[2:4] = torch.tensor([value], dtype=torch.float16).numpy().tobytes()
        return put_together(header, body)

    return change


def with_values_of_32_bits(value: float) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        header, body = taken_apart(data)
        wide = torch.frombuffer(body, dtype=torch.float16).float()
        wide[3] = value
        for _, entry in tensors_of(header):
            entry.update(dtype="F32", data_offsets=[2 * at for at in entry["data_offsets"]])
        return put_together(header, wide.numpy().tobytes())

    return change


ROWS: dict[str, Callable[[bytes], bytes]] = {
    "header longer than the file": longer_than_the_file,
    "overlap": overlap,
    "hole": hole,
    "trailing bytes": lambda data: data + b"\0",
    "shape times dtype overflows": changed(shape=[1 << 62, 8]),
    "unknown dtype": changed(dtype="Q8"),
    "deep JSON": deep,
    "duplicate key": twice,
    "shape [0, 2^62]": more_tensors("x.out_scale", shape=[0, 1 << 62]),
    "rank 30 000": changed(shape=[1] * 30_000),
    "name that is a path": more_tensors("../../x"),
    "dtype F4": more_tensors("x.out_scale", dtype="F4"),
    "bfloat16": changed(dtype="BF16"),
    "float64": changed(dtype="F64"),
    "an empty tensor too many": more_tensors("model.extra.out_scale"),
    "999 empty tensors too many": many_more_tensors,
    "negative shape": changed(shape=[-1, -64]),
    "shape of floats": changed(shape=[64.0]),
    "shape of booleans": changed(shape=[True]),
    "offsets of floats": changed(data_offsets=[0.0, 128.0]),
    "offsets beyond 2^64": changed(data_offsets=[1 << 64, (1 << 64) + 128]),
    "NaN": with_value(float("nan")),
    "infinity": with_value(float("inf")),
    "60 000, which sixteen times is no fp16": with_value(60_000.0),
    "zero": with_value(0.0),
    "minus zero": with_value(-0.0),
    "negative": with_value(-1.0),
    "beyond the ratio": with_value(16.1),
    "below the ratio": with_value(1 / 16.5),
    "1e-8, which is no fp16": with_values_of_32_bits(1e-8),
    "1e38": with_values_of_32_bits(1e38),
    "an fp32 just beyond the ratio": with_values_of_32_bits(16.001),
}  # fmt: skip

ACCEPTED_BY_THE_LIBRARY = (
    "duplicate key", "shape [0, 2^62]", "name that is a path", "NaN", "infinity", "zero", "negative",
    "an empty tensor too many", "1e-8, which is no fp16",
)  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_file_that_must_not_get_in(server: httpx.Client, good: bytes, name: str) -> None:
    before = server.get("/v1/tasks").json()
    assert [row["task"] for row in before["data"]] == ["t"]
    bad = ROWS[name](good)
    error = check_error(server.put("/v1/tasks/t", content=bad), 422)
    assert error["code"] == "invalid_scale_set"
    assert len(error["message"]) < 1000
    check_error(server.put("/v1/tasks/new", content=bad), 422)
    assert server.get("/v1/tasks").json() == before


@pytest.mark.parametrize("name", ACCEPTED_BY_THE_LIBRARY)
def test_the_library_lets_these_in(good: bytes, name: str) -> None:
    """Where this fails, the library has become stricter, and the row above may rely on it."""
    safetensors.deserialize(ROWS[name](good))


def spaces(good: bytes) -> Iterator[bytes]:
    yield struct.pack("<Q", 99_000_000)
    for _ in range(99_000_000 // PART):
        yield b" " * PART


def long_metadata(good: bytes) -> Iterator[bytes]:
    text = json.dumps(taken_apart(good)[0])
    size = 90 * MIB
    head = text[:-1] + ', "__metadata__": {"note": "'
    tail = b'"}}'
    yield struct.pack("<Q", len(head) + size + len(tail)) + head.encode()
    for _ in range(size // PART):
        yield b"x" * PART
    yield tail + bytes(taken_apart(good)[1])


def many_empty_tensors(good: bytes) -> Iterator[bytes]:
    entry = ':{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
    length = sum(len(f',"{i}"') + len(entry) for i in range(700_000)) + 1
    yield struct.pack("<Q", length) + b"{"
    for start in range(0, 700_000, 10_000):
        text = ",".join(f'"{i}"{entry}' for i in range(start, start + 10_000))
        yield (text if start == 0 else "," + text).encode()
    yield b"}"


@pytest.mark.parametrize("bomb", [spaces, long_metadata, many_empty_tensors])
def test_a_header_bomb_is_not_even_read(
    server: httpx.Client, good: bytes, bomb: Callable[[bytes], Iterator[bytes]]
) -> None:
    before = resident_bytes()
    error = check_error(server.put("/v1/tasks/t", content=bomb(good)), 422)
    assert "the header claims" in error["message"]
    assert resident_bytes() - before < 32e6
    assert server.get("/ready").status_code == 200


def test_without_that_room_they_are_not_even_received(live: Any) -> None:
    """413 by Content-Length, before a byte of the body; and by count, where there is none."""
    server = live(settings=ServerSettings(discard_bytes=MIB, discard_seconds=0.5))
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"PUT /v1/tasks/t HTTP/1.1\r\nHost: x\r\nContent-Length: {99 * MIB}\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 "), "and no 100 before it"
    check_error(server.client.put("/v1/tasks/t", content=(b" " * PART for _ in range(12))), 413)
    assert not list(server.spool.iterdir())


def test_the_same_bytes_again_are_the_same_revision(server: httpx.Client, good: bytes) -> None:
    first = server.put("/v1/tasks/again", content=good)
    second = server.put("/v1/tasks/again", content=good)
    assert first.status_code == second.status_code == 200
    assert first.json() == second.json()
    assert first.headers["etag"] == second.headers["etag"] == f'"{first.json()["revision"]}"'
    assert len(server.get("/v1/tasks/again/revisions").json()["data"]) == 1
    moved = put_together(json.dumps(taken_apart(good)[0]) + "  ", taken_apart(good)[1])
    assert server.put("/v1/tasks/again", content=moved).json()["revision"] == first.json()["revision"]
    other = with_value(1.5)(good)
    stale = server.put("/v1/tasks/again", content=other, headers={"If-Match": '"' + "0" * 64 + '"'})
    assert check_error(stale, 412)["code"] == "revision_conflict"
    assert (
        server.put("/v1/tasks/again", content=other, headers={"If-Match": first.headers["etag"]}).status_code
        == 200
    )
    check_error(server.put("/v1/tasks/again", content=good, headers={"If-None-Match": "*"}), 412)
    digest = taken_apart(good)[0]["__metadata__"]["base_digest"].encode()
    assert (
        check_error(server.put("/v1/tasks/x", content=good.replace(digest, b"f" * 64)), 409)["code"]
        == "wrong_base"
    )

    server.delete("/v1/tasks/again")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
