"""2 000 damaged uploads, drawn from a seed: nothing gets in that an independent checker refuses, and nothing breaks.

The checker reads with the safetensors library and numpy alone. Times are those of a shared machine: the median and the
99th percentile have bars of their own, and the slowest one is printed.
"""

from __future__ import annotations

import http.client
import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

from peqa_runtime import ScaleSet, read_manifest
from peqa_runtime.core import BaseManifest
from peqa_runtime.scales.set_layout import expected_shapes

pytestmark = [pytest.mark.slow, pytest.mark.alone]

MUTATIONS = 2000
WARM_UP = 100
GROWTH_BYTES = 32e6
KINDS = ("channel", "channel+input", "group")
METADATA = {"format", "format_version", "kind", "task", "base_digest", "prompt_format", "note"}

Header = dict[str, Any]


def acceptable(data: bytes, shapes: dict[str, dict[str, tuple[int, ...]]], digest: str) -> bool:
    """What a server may take at most: the reference."""
    try:
        tensors = dict(safetensors.deserialize(data))
        (length,) = struct.unpack("<Q", data[:8])
        pairs = json.loads(data[8 : 8 + length], object_pairs_hook=list)
    except Exception:  # noqa: BLE001  whatever the library says, it is no
        return False
    names = [name for name, _ in pairs]
    metadata = dict(dict(pairs).get("__metadata__", []))
    kind = metadata.get("kind")
    if (
        len(set(names)) != len(names)
        or length > 1 << 20
        or not metadata.keys() <= METADATA
        or kind not in shapes
    ):
        return False
    if (metadata.get("format"), metadata.get("format_version")) != ("peqa-scale-set", "1"):
        return False
    if (
        metadata.get("base_digest") != digest
        or {n: tuple(t["shape"]) for n, t in tensors.items()} != shapes[kind]
    ):
        return False
    dtypes = {tensor["dtype"] for tensor in tensors.values()}
    if dtypes not in ({"F16"}, {"F32"}):
        return False
    for tensor in tensors.values():
        values = np.frombuffer(tensor["data"], dtype={"F16": "<f2", "F32": "<f4"}[tensor["dtype"]])
        if not np.isfinite(values).all() or values.min() < 1 / 16 or values.max() > 16:
            return False
    return True


class Mutator:
    """Each call damages one of the sound files in one or several ways; some of these do no harm."""

    def __init__(self, files: list[bytes], seed: int) -> None:
        self.rng = random.Random(seed)
        self.files = files

    def __call__(self) -> bytes:
        data = self.rng.choice(self.files)
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            data = self.rng.choice((self.of_bytes, self.of_header, self.of_header, self.of_values))(data)
        return data

    def of_bytes(self, data: bytes) -> bytes:
        rng, damaged = self.rng, bytearray(data)
        at, size = rng.randrange(len(damaged) + 1), rng.choice((1, 2, 7, 64, 500))
        match rng.randrange(6):
            case 0:
                for _ in range(size):
                    if damaged:
                        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            case 1:
                del damaged[at : at + size]
            case 2:
                damaged[at:at] = rng.randbytes(size)
            case 3:
                del damaged[at:]
            case 4:
                damaged += rng.randbytes(size)
            case 5:
                claimed = rng.choice(
                    (0, 1, 2, len(damaged), 1 << 20, 1 << 40, (1 << 64) - 1, rng.getrandbits(64))
                )
                damaged[:8] = struct.pack("<Q", claimed)
        return bytes(damaged)

    def of_header(self, data: bytes) -> bytes:
        rng = self.rng
        try:
            (length,) = struct.unpack("<Q", data[:8])
            header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
            entries = [name for name in header if name != "__metadata__"]
            entry, metadata = header[rng.choice(entries)], header["__metadata__"]
            text = self.edited(header, entries, entry, metadata)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error):
            return self.of_bytes(data)
        return struct.pack("<Q", len(text.encode())) + text.encode() + body

    def edited(self, header: Header, names: list[str], entry: Header, metadata: Header) -> str:
        rng, name = self.rng, self.rng.choice(names)
        start, end = entry["data_offsets"]
        odd: list[Any] = [
            0,
            1,
            -1,
            64.0,
            True,
            None,
            "64",
            1 << 62,
            1 << 70,
            [],
            {},
            "\ud800",
            "x" * 1000,
            [[1]] * 50,
        ]
        match rng.randrange(12):
            case 0:
                header["".join(rng.choice("ab./\\\0é") for _ in range(rng.randrange(1, 9)))] = header.pop(
                    name
                )
            case 1:
                del header[name]
            case 2:
                header[f"x{rng.random()}"] = dict(entry, shape=[0, 1 << 62], data_offsets=[end, end])
            case 3:
                text = json.dumps(header)
                return f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}"
            case 4:
                entry["dtype"] = rng.choice(
                    ["F16", "F32", "F64", "BF16", "I8", "F4", "F8_E4M3", rng.choice(odd)]
                )
            case 5:
                entry["shape"] = rng.choice(
                    [entry["shape"][::-1], [*entry["shape"], 1], [rng.choice(odd)], rng.choice(odd)]
                )
            case 6:
                entry["data_offsets"] = rng.choice(
                    [
                        [start + 2, end + 2],
                        [start, end - 2],
                        [end, start],
                        [start],
                        [rng.choice(odd), end],
                        [0, end - start],
                    ]
                )
            case 7:
                one, two = rng.choice(names), rng.choice(names)
                header[one]["data_offsets"], header[two]["data_offsets"] = (
                    header[two]["data_offsets"], header[one]["data_offsets"]
                )  # fmt: skip
            case 8:
                metadata[rng.choice(sorted(METADATA))] = rng.choice(
                    [*KINDS, "", "{}", "{", '{"a": NaN}', rng.choice(odd)]
                )
            case 9:
                metadata[rng.choice(("note", "prompt_format"))] = rng.choice(
                    ('{"loss": 1.5}', "{prompt}", "[1]")
                )
            case 10:
                shuffled = list(header)
                rng.shuffle(shuffled)
                header = {key: header[key] for key in shuffled}
            case 11:
                return json.dumps(header) + " " * rng.choice((1, 100, 70_000, 1_100_000))
        return json.dumps(header)

    def of_values(self, data: bytes) -> bytes:
        rng, damaged = self.rng, bytearray(data)
        value = rng.choice(
            (0.5, 1.0, 2.0, 15.9, 0.07, 0.0, -1.0, 17.0, 0.05, 6e4, 1e-7, float("nan"), float("inf"))
        )
        at = max(8, len(damaged) - 2 * rng.randrange(1, 400))
        damaged[at : at + 2] = np.float16(value).tobytes()
        return bytes(damaged)


def sound_files(manifest: BaseManifest) -> list[bytes]:
    files = []
    for seed, kind in enumerate(KINDS):
        for dtype in (torch.float16, torch.float32):
            generator = torch.Generator().manual_seed(seed)
            shapes = expected_shapes(kind, manifest)  # type: ignore[arg-type]
            tensors = {n: 0.7 + 0.6 * torch.rand(shape, generator=generator) for n, shape in shapes.items()}
            files.append(ScaleSet.build(kind, tensors, manifest, dtype=dtype).to_bytes())  # type: ignore[arg-type]
    return files


def test_2000_mutated_uploads(
    tiny_base: Path, tmp_path: Path, start_server: Callable[[list[str]], Any]
) -> None:
    manifest = read_manifest(tiny_base)
    shapes = {kind: dict(expected_shapes(kind, manifest)) for kind in KINDS}  # type: ignore[arg-type]
    files = sound_files(manifest)
    assert all(acceptable(data, shapes, manifest.base_digest) for data in files)
    mutate = Mutator(files, seed=5)
    server = start_server([str(tiny_base), "--store", str(tmp_path / "store")])
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)

    def put(data: bytes) -> tuple[int, bytes, float]:
        connection.request("PUT", "/v1/tasks/t", body=data)
        begin = time.perf_counter()
        answer = connection.getresponse()
        return answer.status, answer.read(), time.perf_counter() - begin

    def resident() -> int:
        return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096

    assert [put(data)[0] for data in files] == [200] * len(files)
    before, seconds, statuses, wrong = 0, [], {}, []
    allowed = 0
    for number in range(WARM_UP + MUTATIONS):
        data = mutate()
        status, body, took = put(data)
        may = acceptable(data, shapes, manifest.base_digest)
        allowed += may
        if status not in (200, 409, 413, 422) or (status == 200 and not may):
            wrong.append((number, status, body[:300], data[:300]))
        seconds.append(took)
        statuses[status] = statuses.get(status, 0) + 1
        if number == WARM_UP - 1:
            before = resident()
    grown = resident() - before
    median, p99 = np.percentile(seconds, [50, 99])
    print(
        f"\n{statuses}, {allowed} of which the reference allows; median {median * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, "
        f"slowest {max(seconds) * 1e3:.0f} ms; {grown / 1e6:+.1f} MB"
    )
    assert not wrong, f"{len(wrong)}: {wrong[:3]}"
    assert statuses[422] > 0.7 * MUTATIONS
    assert statuses[200] > 0.02 * MUTATIONS, "some did no harm, so the checker had something to say"
    assert grown < GROWTH_BYTES
    assert median < 0.1
    assert p99 < 0.2
    assert server.complete([5, 6, 7], "t", max_tokens=2)["task"] == "t"
