"""Calibration text: windows of tokens, drawn by a seed from files of text."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peqa_runtime.errors import InvalidData, InvalidRequest

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".parquet")
_IN_FOLDERS = (".txt", ".jsonl", ".parquet")  # a README.md or a dataset_infos.json beside text is no text
_LARGEST = 256 << 20  # bytes: the text of all files is held at once
_PIECE = (
    8  # characters per token that is asked for: a long document is drawn from in pieces of about one window
)
_FIELDS = (("text",), ("content",), ("prompt", "completion"), ("instruction", "input", "output"))


@dataclass(frozen=True)
class CalibrationText:
    """Where calibration windows come from: `windows` of `tokens` tokens each, drawn by `seed` from `path`."""

    path: Path
    windows: int = 128
    tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `InvalidRequest` for numbers that make no sense."""
        if self.windows < 2:
            raise InvalidRequest(
                f"calibration needs at least 2 windows, not {self.windows}", param="calibration_windows"
            )
        if self.tokens < 8:
            raise InvalidRequest(
                f"a calibration window needs at least 8 tokens, not {self.tokens}", param="calibration_tokens"
            )


@dataclass(frozen=True)
class Calibration:
    """Token windows [1, tokens] int64, and a digest of them that the base records."""

    windows: tuple[Tensor, ...]
    digest: str
    source: str
    seed: int

    def to_json(self) -> dict[str, Any]:
        """What the base's config says about it."""
        shape = {"windows": len(self.windows), "tokens": self.windows[0].shape[1]}
        return {"source": self.source, "sha256": self.digest, "seed": self.seed, **shape}


def read_calibration(
    text: CalibrationText, encode: Callable[[str], Sequence[int]], separator: int | None
) -> Calibration:
    """Draw the windows. `encode` adds no special tokens; `separator` (end of text) stands between documents.

    Documents are taken in an order that the seed gives, long ones in pieces, until there are enough windows. Raises
    `InvalidData` for a file that is missing, empty, binary, of another kind, or too short.
    """
    documents = [document for file in _files(text.path) for document in _documents(file)]
    pieces = [piece for document in documents for piece in _pieces(document, text.tokens * _PIECE)]
    random.Random(f"calibration {text.seed}").shuffle(pieces)
    needed = text.windows * text.tokens
    ids: list[int] = []
    for piece in pieces:
        ids += encode(piece)
        if separator is not None:
            ids.append(separator)
        if len(ids) >= needed:
            break
    count = len(ids) // text.tokens
    if count < text.windows:
        what = f"{count} windows" if count else "not even one window"
        fits = f", or ask for {count} windows" if count > 1 else ""
        raise InvalidData(
            f"{text.path} is too short: its {len(ids)} tokens make {what} of {text.tokens} tokens, {text.windows} are "
            f"asked for; give more text{fits}"
        )
    tokens = torch.tensor(ids[:needed], dtype=torch.int64).view(text.windows, 1, text.tokens)
    digest = hashlib.sha256(tokens.numpy().astype("<i8", copy=False).data).hexdigest()
    return Calibration(tuple(tokens), digest, text.path.name, text.seed)


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise InvalidData(f"{path}: no such file or folder")
    files = [path]
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in _IN_FOLDERS and file.is_file()
        )
        if not files:
            raise InvalidData(f"{path} holds no calibration text: no {', '.join(_IN_FOLDERS)} file")
    size = sum(file.stat().st_size for file in files)
    if size > _LARGEST:
        raise InvalidData(
            f"{path} has {size >> 20} MB, more than the {_LARGEST >> 20} MB that calibration reads; give a part of it"
        )
    return files


def _documents(file: Path) -> list[str]:
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidData(
            f"{file}: calibration text is a {', '.join(SUFFIXES)} file, or a folder of {', '.join(_IN_FOLDERS)} files"
        )
    if suffix == ".parquet":
        found = _parquet(file)
    else:
        text = _text(file)
        found = [text] if suffix in (".txt", ".md") else list(_rows(file, text))
    found = [document for document in found if document.strip()]
    if not found:
        raise InvalidData(f"{file} is empty: it holds no text")
    return found


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidData(f"{file} cannot be read as UTF-8 text: {error}") from error
    if "\0" in text:
        raise InvalidData(f"{file} is binary, not text: it holds zero bytes")
    return text


def _rows(file: Path, content: str) -> Iterator[str]:
    for number, row in _records(file, content):
        text = _row_text(row, f"{file}, line {number}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can name it, and no tokenizer takes it
            raise InvalidData(
                f"{file}, line {number}: half a character, \\u{ord(text[error.start]):04x}; write the whole one, "
                "or take it out"
            ) from None
        yield text


def _records(file: Path, content: str) -> Iterator[tuple[int, Any]]:
    """(number, row): a `.json` file may be one array, everything else is one object a line."""
    if file.suffix.lower() == ".json" and content.lstrip().startswith("["):
        yield from enumerate(_parse(content, str(file)), start=1)
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield number, _parse(line, f"{file}, line {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidData(f"{where}: not JSON ({error})") from None


def _row_text(row: Any, where: str) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for fields in _FIELDS:
            values = [row[field] for field in fields if field in row]
            if values and all(isinstance(value, str) for value in values):
                return "".join(values) if len(fields) == 2 else "\n".join(values)
        messages = row.get("messages")
        if isinstance(messages, list):
            contents = [message.get("content") for message in messages if isinstance(message, dict)]
            return "\n".join(content for content in contents if isinstance(content, str))
    raise InvalidData(
        f"{where}: a row needs a string as text, content, prompt and completion, or instruction and output, or messages"
    )


def _parquet(file: Path) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InvalidData(
            f"{file}: reading parquet needs pyarrow (pip install pyarrow); or give text or JSON lines"
        ) from None
    try:
        table = parquet.read_table(file)
    except (OSError, ArrowException) as error:
        raise InvalidData(f"{file} is no parquet file that can be read: {error}") from None
    return [_row_text(row, f"{file}, row {number}") for number, row in enumerate(table.to_pylist(), start=1)]


def _pieces(document: str, characters: int) -> Iterator[str]:
    """Cut a document where there is white space, in pieces of about so many characters."""
    start = 0
    while len(document) - start > 2 * characters:
        end = start + characters
        cut = max(document.rfind(" ", start + 1, end), document.rfind("\n", start + 1, end))
        cut = cut if cut > start else end
        yield document[start:cut]
        start = cut
    yield document[start:]
