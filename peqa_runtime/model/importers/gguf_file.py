"""Reader of the GGUF container: metadata, tensor table and blocks. Trusts no number in the file.

Layout (versions 2 and 3, little endian): magic "GGUF", u32 version, u64 tensors, u64 metadata entries; the entries
(string key, u32 type, value); the tensor table (string name, u32 dims, u64 each, u32 type, u64 offset); padding to
`general.alignment`; the data. Every count and length is checked against what is left of the file before it is used.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from peqa_runtime.errors import InvalidCheckpoint

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 16  # metadata entries and tensors; the largest published models have some 3 000
_MAX_NAME = 256

BLOCK = 32
# name, elements per block, bytes per block; only these can be read. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_READABLE = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", BLOCK, 18),
    3: ("Q4_1", BLOCK, 20),
    8: ("Q8_0", BLOCK, 34),
}
# fmt: off
_KNOWN = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}
# fmt: on


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table. `shape` in torch order: the last dimension is contiguous."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int  # from the start of the file
    num_bytes: int


@dataclass(frozen=True)
class Blocks:
    """Codes of a quantized tensor, bit for bit, and each block's step d and offset m: w = d * q + m in exact terms.

    codes uint8 [N, K]; d and m float32 [N, K / 32]. For Q4_0 and Q8_0 (symmetric) `m` is None and `zero` is the code
    that stands for 0.
    """

    codes: np.ndarray
    d: np.ndarray
    m: np.ndarray | None
    zero: float
    bits: int


class GgufFile:
    """An open GGUF file: `metadata`, `tensors` by name. Use as a context manager.

    Raises `InvalidCheckpoint` when the file is no GGUF, truncated, or says things that cannot be.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._data: mmap.mmap | bytes = (
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.path.stat().st_size else b""
                )
        except OSError as error:
            raise InvalidCheckpoint(f"{self.path} cannot be read: {error}") from error
        self._size = len(self._data)
        self._at = 0
        try:
            self.metadata, self.tensors = self._parse()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the mapping."""
        if isinstance(self._data, mmap.mmap):
            self._data.close()

    def floats(self, name: str) -> np.ndarray:
        """A copy of an F32, F16 or BF16 tensor; BF16 comes as float32 (exact)."""
        tensor = self.tensors[name]
        raw = self._raw(tensor)
        if tensor.type == "BF16":
            values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw.view("<f4" if tensor.type == "F32" else "<f2").copy()
        return values.reshape(tensor.shape)

    def blocks(self, name: str) -> Blocks:
        """Codes and block constants of a Q4_0, Q4_1 or Q8_0 tensor [N, K]."""
        tensor = self.tensors[name]
        rows, columns = tensor.shape
        raw = self._raw(tensor).reshape(rows, columns // BLOCK, -1)
        d = raw[..., :2].copy().view("<f2")[..., 0].astype(np.float32)
        m = None
        if tensor.type == "Q8_0":
            codes = raw[..., 2:] ^ 0x80  # int8 to offset binary: q + 128
            zero, bits = 128.0, 8
        else:
            head = 2 if tensor.type == "Q4_0" else 4
            if tensor.type == "Q4_1":
                m = raw[..., 2:4].copy().view("<f2")[..., 0].astype(np.float32)
            nibbles = raw[..., head:]  # low nibbles are the block's first half, high nibbles its second
            codes = np.concatenate((nibbles & 0x0F, nibbles >> 4), axis=-1)
            zero, bits = 8.0, 4
        return Blocks(np.ascontiguousarray(codes.reshape(rows, columns)), d, m, zero, bits)

    def _raw(self, tensor: GgufTensor) -> np.ndarray:
        # A copy: no array may outlive the mapping that it looks into.
        data = self._data[tensor.offset : tensor.offset + tensor.num_bytes]
        return np.frombuffer(data, np.uint8)

    def _parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._size < 24 or self._data[:4] != b"GGUF":
            raise InvalidCheckpoint(f"{self.path} is no GGUF file: it does not start with GGUF and a header")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            swapped = version != 0 and version & 0xFFFF == 0
            raise InvalidCheckpoint(
                f"{self.path} has GGUF version {version}"
                f"{' (a big-endian file?)' if swapped else ''}; versions 2 and 3, little endian, can be read"
            )
        num_tensors = self._count(self._scalar("Q"), 24, "tensors")
        num_entries = self._count(self._scalar("Q"), 12, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._string(_MAX_NAME)
            if key in metadata:
                raise InvalidCheckpoint(f"{self.path} gives the metadata key {key!r} twice")
            metadata[key] = self._value(self._scalar("I"))
        table = [self._table_entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise InvalidCheckpoint(
                f"{self.path}: general.alignment must be a power of two, not {alignment!r}"
            )
        start = -(-self._at // alignment) * alignment
        return metadata, self._check_table(table, start)

    def _table_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(_MAX_NAME)
        rank = self._scalar("I")
        if not 1 <= rank <= 4:
            raise InvalidCheckpoint(
                f"{self.path}: tensor {name!r} has {rank} dimensions; 1 to 4 are possible"
            )
        shape = tuple(reversed([self._scalar("Q") for _ in range(rank)]))
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _check_table(
        self, table: list[tuple[str, tuple[int, ...], int, int]], start: int
    ) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in table:
            if kind not in _READABLE:
                raise InvalidCheckpoint(
                    f"{self.path}: tensor {name!r} is stored as {_KNOWN.get(kind, f'type {kind}')}; importing keeps "
                    "the codes of Q4_0, Q4_1 and Q8_0 (and F32, F16, BF16): convert the model to one of these "
                    "(llama-quantize --pure MODEL-f16.gguf OUT.gguf Q4_1), or quantize its original Hugging Face "
                    "folder with `peqa quantize`"
                )
            label, per_block, block_bytes = _READABLE[kind]
            count = prod(shape)
            if min(shape) < 1 or shape[-1] % per_block:
                raise InvalidCheckpoint(f"{self.path}: tensor {name!r} cannot be {label} of shape {shape}")
            num_bytes = count // per_block * block_bytes
            if offset > self._size or start + offset + num_bytes > self._size:
                raise InvalidCheckpoint(
                    f"{self.path} is truncated: tensor {name!r} ends at byte {start + offset + num_bytes}, "
                    f"the file has {self._size}; fetch it again"
                )
            if name in tensors:
                raise InvalidCheckpoint(f"{self.path} holds the tensor {name!r} twice")
            tensors[name] = GgufTensor(name, shape, label, start + offset, num_bytes)
        return tensors

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise InvalidCheckpoint(f"{self.path}: metadata value of unknown type {kind} at byte {self._at}")
        inner, length = self._scalar("I"), self._scalar("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            width = struct.calcsize("<" + code)
            self._count(length, width, "array elements", limited=False)
            return list(struct.unpack(f"<{length}{code}", self._take(length * width)))
        if inner != _STRING:
            raise InvalidCheckpoint(f"{self.path}: metadata array of type {inner} at byte {self._at}")
        self._count(length, 8, "array elements", limited=False)
        return [self._string() for _ in range(length)]

    def _count(self, count: int, at_least: int, what: str, *, limited: bool = True) -> int:
        """`count` items of `at_least` bytes each must fit into what is left of the file."""
        if count * at_least > self._size - self._at or (limited and count > _MAX_ENTRIES):
            raise InvalidCheckpoint(f"{self.path} is truncated or damaged: it announces {count} {what}")
        return count

    def _string(self, longest: int | None = None) -> str:
        length = self._scalar("Q")
        if longest is not None and length > longest:
            raise InvalidCheckpoint(f"{self.path} is damaged: a name of {length} bytes at byte {self._at}")
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise InvalidCheckpoint(f"{self.path}: text at byte {self._at - length} is not UTF-8") from error

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _take(self, length: int) -> bytes:
        if length > self._size - self._at:
            raise InvalidCheckpoint(
                f"{self.path} is truncated: {length} bytes expected at byte {self._at}, "
                f"{self._size - self._at} left; fetch it again"
            )
        data = self._data[self._at : self._at + length]
        self._at += length
        return data


def metadata_value(
    metadata: dict[str, Any], key: str, check: Callable[[Any], bool], expected: str, default: Any = None
) -> Any:
    """`metadata[key]` when `check` holds; `default` when the key is absent and a default is given.

    Raises `InvalidCheckpoint` saying what was `expected`.
    """
    if key not in metadata and default is not None:
        return default
    value = metadata.get(key)
    if value is None or not check(value):
        raise InvalidCheckpoint(f"GGUF metadata {key!r} must be {expected}, not {str(value)[:80]!r}")
    return value
