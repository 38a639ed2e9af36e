"""Every bad input gets the right status and a sentence that says what would be right; nothing changes."""

from __future__ import annotations

import http.client
import json
import struct
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch

from peqa_runtime import ScaleSet

pytestmark = pytest.mark.slow


def completion(server: Any, content: bytes | None = None, **body: Any) -> httpx.Response:
    data = content if content is not None else json.dumps(body).encode()
    return httpx.post(
        f"{server.url}/v1/completions", content=data, headers={"content-type": "application/json"}, timeout=60
    )


def check_error(response: httpx.Response, status: int, *words: str) -> None:
    assert response.status_code == status, f"{response.status_code}: {response.text[:500]}"
    error = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert len(error["message"]) > 15, "a sentence"
    for word in words:
        assert word.lower() in error["message"].lower(), f"{word!r} is not in {error['message']!r}"


BAD_FIELDS = [
    ("prompt", 7), ("prompt", {"text": "x"}), ("prompt", [["a"]]), ("prompt", [1, "a"]), ("prompt", [10**9]),
    ("prompt", [-1]),
    ("max_tokens", "ten"), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", True),
    ("n", 0), ("n", "2"), ("n", 10_000), ("temperature", "hot"), ("temperature", -0.5),
    ("temperature", True),
    ("top_p", 0), ("top_p", 1.5), ("top_p", "x"), ("top_k", -5), ("top_k", 2.5), ("min_p", 2), ("min_p", "x"),
    ("seed", "s"), ("seed", 2**70), ("stop", 5), ("stop", ["a"] * 65), ("stop", [1]), ("logprobs", "yes"),
    ("logprobs", 50),
    ("echo", "yes"), ("stream", "yes"), ("stream_options", 3), ("task", 3), ("task", ["sql"]), ("model", 3),
    ("presence_penalty", 9), ("frequency_penalty", "x"),
    ("repetition_penalty", 0), ("min_tokens", -1), ("min_tokens", "x"),
    ("ignore_eos", "no"), ("stop_token_ids", "x"), ("stop_token_ids", ["x"]), ("suffix", "end"), ("no_such_field", 1),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=lambda v: str(v)[:24])
def test_wrong_type_or_value_is_a_400(demo_server: Any, field: str, value: Any) -> None:
    check_error(completion(demo_server, **({"prompt": "x", "max_tokens": 2} | {field: value})), 400, field)


@pytest.mark.parametrize(
    "body",
    [b"", b"no json", b"[1, 2]", b'"text"', b"null", b'{"prompt": "x"', b'{"prompt": "x", "temperature": NaN}',
     b'{"prompt": "x", "temperature": Infinity}', b"\xff\xfe{}", b"{" * 100_000],
    ids=lambda b: repr(b[:20]),
)  # fmt: skip
def test_a_body_that_is_no_request_is_a_400(demo_server: Any, body: bytes) -> None:
    check_error(completion(demo_server, content=body), 400)


def test_prompt_too_long_and_contradictions(demo_server: Any) -> None:
    check_error(completion(demo_server, prompt="word " * 9000, max_tokens=4), 400, "8192")
    check_error(completion(demo_server, prompt=[5] * 8190, max_tokens=100), 400, "8192")
    check_error(completion(demo_server, prompt="x", task="sql", model="slots"), 400, "task")
    check_error(completion(demo_server, prompt="x", stream_options={"include_usage": True}), 400, "stream")
    check_error(completion(demo_server, max_tokens=4), 400, "prompt")


def test_unknown_task_and_model_are_404(demo_server: Any) -> None:
    check_error(completion(demo_server, prompt="x", task="nope"), 404, "nope")
    check_error(completion(demo_server, prompt="x", model="nope"), 404, "nope")
    for method, path in (
        ("GET", ""),
        ("DELETE", ""),
        ("GET", "/content"),
        ("GET", "/revisions"),
        ("POST", "/rollback"),
    ):
        check_error(httpx.request(method, f"{demo_server.url}/v1/tasks/nope{path}", timeout=30), 404, "nope")
    check_error(httpx.get(f"{demo_server.url}/no/such/route", timeout=30), 404)
    check_error(httpx.put(f"{demo_server.url}/v1/completions", timeout=30), 405)


def good_tensors(manifest: Any) -> dict[str, torch.Tensor]:
    return {f"{name}.out_scale": torch.ones(shape.out_features) for name, shape in manifest.linears.items()}


def good_bytes(manifest: Any) -> bytes:
    return bytes(ScaleSet.build("channel", good_tensors(manifest), manifest, task="fine").to_bytes())


def edit(data: bytes, change: Callable[[dict[str, Any], bytearray], None]) -> bytes:
    """Change header and body of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = bytearray(data[8 + length :])
    change(header, body)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def rename_last(header: dict[str, Any], body: bytearray) -> None:
    name = sorted(k for k in header if k != "__metadata__")[-1]
    header["model.no.such_layer.out_scale"] = header.pop(name)


def reshape_one(header: dict[str, Any], body: bytearray) -> None:
    entry = next(v for k, v in header.items() if k != "__metadata__")
    entry["shape"] = [entry["shape"][0] // 2, 2]


def set_value(value: float) -> Callable[[dict[str, Any], bytearray], None]:
    def change(header: dict[str, Any], body: bytearray) -> None:
        body[0:2] = torch.tensor([value], dtype=torch.float16).numpy().tobytes()

    return change


def set_metadata(key: str, value: str) -> Callable[[dict[str, Any], bytearray], None]:
    def change(header: dict[str, Any], body: bytearray) -> None:
        header["__metadata__"][key] = value

    return change


def drop_one(header: dict[str, Any], body: bytearray) -> None:
    """Remove the tensor that lies last in the body, so that the file stays well formed."""
    name = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"][1])
    start, _ = header.pop(name)["data_offsets"]
    del body[start:]


def add_one(header: dict[str, Any], body: bytearray) -> None:
    header["extra.out_scale"] = {"dtype": "F16", "shape": [2], "data_offsets": [len(body), len(body) + 4]}
    body += b"\0\x3c\0\x3c"


def as_bfloat16(header: dict[str, Any], body: bytearray) -> None:
    for key, entry in header.items():
        if key != "__metadata__":
            entry["dtype"] = "BF16"


BAD_SETS: list[tuple[str, Callable[[dict[str, Any], bytearray], None], int, str]] = [
    ("other base", set_metadata("base_digest", "0" * 64), 409, "base"),
    ("missing tensor", drop_one, 422, "lacks"),
    ("extra tensor", add_one, 422, "extra.out_scale"),
    ("renamed tensor", rename_last, 422, "lacks"),
    ("misshapen tensor", reshape_one, 422, "shape"),
    ("bf16", as_bfloat16, 422, "bf16"),
    ("NaN", set_value(float("nan")), 422, "finite"),
    ("inf", set_value(float("inf")), 422, "finite"),
    ("zero", set_value(0.0), 422, "greater than 0"),
    ("negative", set_value(-1.0), 422, "greater than 0"),
    ("unknown kind", set_metadata("kind", "lora"), 422, "channel"),
    ("other format", set_metadata("format", "lora"), 422, "peqa-scale-set"),
]


@pytest.mark.parametrize(("name", "change", "status", "word"), BAD_SETS, ids=[b[0] for b in BAD_SETS])
def test_a_set_that_does_not_fit_is_refused(
    demo_server: Any, demo_manifest: Any, name: str, change: Any, status: int, word: str
) -> None:
    before = httpx.get(f"{demo_server.url}/v1/tasks", timeout=30).json()
    bad = edit(good_bytes(demo_manifest), change)
    check_error(httpx.put(f"{demo_server.url}/v1/tasks/sql", content=bad, timeout=60), status, word)
    assert httpx.get(f"{demo_server.url}/v1/tasks", timeout=30).json() == before, "nothing changed"


def damaged(data: bytes) -> dict[str, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return {
        "empty": b"",
        "not safetensors": b"PK\x03\x04" + b"x" * 500,
        "truncated": data[:-100],
        "truncated in the header": data[: 8 + length // 2],
        "trailing bytes": data + b"x",
        "header longer than the file": struct.pack("<Q", 2**40) + data[8:],
        "header length lies": struct.pack("<Q", length - 7) + data[8:],
        "overlapping offsets": edit(data, lambda h, b: next(v for k, v in h.items() if k != "__metadata__").update(
            data_offsets=[4, 4 + 2 * next(v for k, v in h.items() if k != "__metadata__")["shape"][0]])),
        "huge header of spaces": struct.pack("<Q", 9_000_000) + b" " * 9_000_000,
    }  # fmt: skip


def test_a_damaged_file_is_refused(demo_server: Any, demo_manifest: Any) -> None:
    before = httpx.get(f"{demo_server.url}/v1/tasks", timeout=30).json()
    for name, bad in damaged(good_bytes(demo_manifest)).items():
        response = httpx.put(f"{demo_server.url}/v1/tasks/sql", content=bad, timeout=60)
        assert response.status_code in (413, 422), f"{name}: {response.status_code} {response.text[:300]}"
        check_error(response, response.status_code)
    assert httpx.get(f"{demo_server.url}/v1/tasks", timeout=30).json() == before, "nothing changed"


def test_a_file_that_is_too_large_is_a_413(demo_server: Any) -> None:
    check_error(httpx.put(f"{demo_server.url}/v1/tasks/sql", content=b"\0" * 200_000_000, timeout=60), 413)

    def endless() -> Any:
        for _ in range(200):
            yield b"\0" * 1_000_000

    check_error(httpx.put(f"{demo_server.url}/v1/tasks/sql", content=endless(), timeout=60), 413)


@pytest.mark.parametrize(
    "name",
    ["../x", "..%2fx", "%2e%2e%2fx", "a%00b", "UPPER", "-x", ".hidden", "caf%C3%A9", "x" * 65, "x" * 5000, "a%20b",
     "base", "a%5Cb"],
    ids=lambda n: n[:16],
)  # fmt: skip
def test_a_name_that_cannot_be_is_a_422(demo_server: Any, demo_manifest: Any, name: str) -> None:
    # A client library would tidy the path: send it as it is.
    body = good_bytes(demo_manifest)
    connection = http.client.HTTPConnection("127.0.0.1", demo_server.port, timeout=30)
    connection.request("PUT", f"/v1/tasks/{name}", body=body)
    answer = connection.getresponse()
    check_error(httpx.Response(answer.status, content=answer.read()), 422)
    connection.close()


def test_if_match_of_another_revision_is_a_412(demo_server: Any, demo_manifest: Any) -> None:
    response = httpx.put(
        f"{demo_server.url}/v1/tasks/sql",
        content=good_bytes(demo_manifest),
        headers={"If-Match": '"' + "0" * 64 + '"'},
        timeout=30,
    )
    check_error(response, 412)


def test_the_server_serves_on(demo_server: Any) -> None:
    answer = demo_server.complete("I lost my card", "intents", max_tokens=8)
    assert answer["task"] == "intents"
    assert answer["usage"]["completion_tokens"] > 0
