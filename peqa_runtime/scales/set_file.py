"""The bytes of a scale set file: a bounded reader of the header, the content digest and a writer. No torch.

    [ 8 bytes: n, little endian ][ n bytes: JSON header ][ tensors, contiguous, in the header's offsets ]

The file is a safetensors file. Its header is nevertheless read here first, because the library accepts headers
that an upload must not be able to send: up to 100 MB of them, duplicate keys, hundreds of thousands of empty
tensors. Everything here works on counts and bounds that are known before a byte is allocated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from peqa_runtime.errors import InvalidScaleSet

DTYPE_BYTES: Mapping[str, int] = {"F16": 2, "F32": 4}
"""Dtypes that a scale set may have. bf16 is not one: around 1.0 its step is 2^-7 and a tuned scale is lost."""

MAX_HEADER_BYTES = 1 << 20
_MIN_HEADER_LIMIT = 1 << 16
_HEADER_BYTES_PER_TENSOR = 256


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header; its bytes are `[start, end)` counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SetHeader:
    """A header whose JSON, numbers and offsets are sound. `data_start` is the file offset of the first tensor."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    data_start: int


def header_limit(expected_tensors: int) -> int:
    """Most bytes a header may have: 256 per expected tensor plus 64 KiB for the metadata, at most 1 MiB."""
    return min(MAX_HEADER_BYTES, _MIN_HEADER_LIMIT + _HEADER_BYTES_PER_TENSOR * expected_tensors)


def header_end(prefix: bytes, total_bytes: int, limit: int) -> int:
    """Return where the header ends, from the file's first 8 bytes and its size in bytes.

    Raises `InvalidScaleSet` when the file is too short, or the header empty, longer than `limit` or than the file.
    """
    if len(prefix) < 8 or total_bytes < 10:
        raise InvalidScaleSet(
            f"the file has {total_bytes} bytes; a scale set is a safetensors file, which starts with the 8-byte "
            "length of its header"
        )
    length = int.from_bytes(prefix[:8], "little")
    if length > limit:
        raise InvalidScaleSet(
            f"the header claims {length} bytes, at most {limit} are accepted for this base; "
            "is this a safetensors file?"
        )
    if length < 2 or 8 + length > total_bytes:
        raise InvalidScaleSet(
            f"the header claims {length} bytes but {total_bytes - 8} follow its length: "
            "the file is truncated or not a safetensors file"
        )
    return 8 + length


def parse_json_object(text: str, what: str) -> dict[str, Any]:
    """Return the JSON object in `text`; duplicate keys, NaN, deep nesting and non-objects raise `InvalidScaleSet`."""

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise InvalidScaleSet(f"{what} has the key {twice[:80]!r} twice")
        return keys

    def refuse_constant(name: str) -> NoReturn:
        raise InvalidScaleSet(f"{what} contains {name}, which is not JSON")

    try:
        parsed = json.loads(text, object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant)
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: bad JSON, or an integer of thousands of digits
        raise InvalidScaleSet(f"{what} is not a JSON object: {str(error)[:120]}") from None
    if not isinstance(parsed, dict):
        raise InvalidScaleSet(f"{what} must be a JSON object, not {type(parsed).__name__}")
    return parsed


def parse_header(head: bytes, total_bytes: int) -> SetHeader:
    """Parse the header in `head` (the file from its start to `header_end`) of a file of `total_bytes`.

    Accepts only dtypes of `DTYPE_BYTES` and tensors that fill the rest of the file exactly: no overlap, no hole, no
    trailing byte. Raises `InvalidScaleSet`.
    """
    try:
        text = head[8:].decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidScaleSet("the header is not UTF-8 text: is this a safetensors file?") from None
    raw = parse_json_object(text, "the header")
    metadata = raw.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidScaleSet(
            "the header has no usable __metadata__: it must map names to strings, with format 'peqa-scale-set'"
        )
    tensors = {name: _parse_entry(name, entry) for name, entry in raw.items()}
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise InvalidScaleSet(
                f"the bytes of {_short(name)} do not follow the tensor before it without a gap"
            )
        position = entry.end
    if len(head) + position != total_bytes:
        raise InvalidScaleSet(
            f"the header describes a file of {len(head) + position} bytes, the file has {total_bytes}: "
            "it is truncated or has extra bytes"
        )
    return SetHeader(metadata, tensors, len(head))


def _parse_entry(name: str, entry: object) -> TensorEntry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidScaleSet(
            f"the header's entry of {_short(name)} must have dtype, shape and data_offsets, only"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype == "BF16":
        raise InvalidScaleSet(
            f"{_short(name)} is BF16, which cannot hold a scale near 1.0 (its step there is 0.0078); save F16 or F32"
        )
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InvalidScaleSet(f"{_short(name)} has dtype {str(dtype)[:20]!r}; a scale set has F16 or F32")
    if not (isinstance(shape, list) and len(shape) <= 2 and all(_is_count(n) for n in shape)):
        raise InvalidScaleSet(f"the shape of {_short(name)} must be a list of one or two sizes")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_count(n) for n in offsets)):
        raise InvalidScaleSet(f"the data_offsets of {_short(name)} must be two positions in the file")
    if offsets[1] - offsets[0] != prod(shape) * DTYPE_BYTES[dtype]:
        raise InvalidScaleSet(
            f"the data_offsets of {_short(name)} do not match its shape {shape} and dtype {dtype}"
        )
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def content_digest(header: SetHeader, data: bytes) -> str:
    """Return the revision: SHA-256 (hex) over sorted names, dtypes, shapes and little-endian bytes of the file `data`.

    Neither the order in the file nor the metadata takes part, so the same scales are always the same revision.
    """
    digest = hashlib.sha256()
    view = memoryview(data)
    for name in sorted(header.tensors):
        entry = header.tensors[name]
        line = json.dumps([name, entry.dtype, list(entry.shape)], separators=(",", ":"))
        digest.update(line.encode() + b"\n")
        digest.update(view[header.data_start + entry.start : header.data_start + entry.end])
    return digest.hexdigest()


def write_set_file(
    metadata: Mapping[str, str], tensors: Iterable[tuple[str, str, tuple[int, ...], bytes]]
) -> bytes:
    """Return the file's bytes for `(name, dtype, shape, bytes)` tensors: the same input gives the same bytes.

    (The library's own writer orders the metadata at random, so that saving twice gives two files.)
    """
    ordered = sorted(
        tensors, key=lambda t: (-DTYPE_BYTES[t[1]], t[0])
    )  # widest first keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, dtype, shape, raw in ordered:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(raw)]}
        position += len(raw)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(raw for *_, raw in ordered)])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _short(name: str) -> str:
    return repr(name if len(name) <= 120 else name[:117] + "...")
