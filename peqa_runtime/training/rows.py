"""Rows of a training or evaluation file: which shapes are read, and what each becomes.

A `.jsonl` file holds one object a line, a `.json` file one array of them. Three shapes are known by their keys; other
keys are ignored:

    {"prompt": str, "completion": str}
    {"instruction": str, "input": str or missing, "output": str}       instruction, blank line, input are the prompt
    {"messages": [{"role": "system" | "user" | "assistant", "content": str}, …]}   a row for each assistant's answer

For evaluation, `references` (all good answers) and `options` (of which `completion` is the right one) are read too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peqa_runtime.errors import InvalidData
from peqa_runtime.prompt_format import CHAT_FORMAT, PLACEHOLDER, prompt_format_fault

NAMED_FORMATS = {"alpaca": "### Instruction:\n{prompt}\n\n### Response:\n", "chat": CHAT_FORMAT}
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """One prompt and its answer. `line` counts from 1; `history` is the conversation before the prompt's message."""

    prompt: str
    completion: str
    line: int
    history: tuple[tuple[str, str], ...] = ()  # (role, content)
    chat: bool = False
    references: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation that is answered: the prompt is its last message, of the user."""
        return [{"role": role, "content": text} for role, text in (*self.history, ("user", self.prompt))]

    @property
    def good_answers(self) -> tuple[str, ...]:
        """All texts that count as right."""
        return self.references or (self.completion,)


def read_rows(path: Path) -> list[Row]:
    """Read a `.jsonl` (or `.json`) file. Anything that is not such a row raises `InvalidData` with its line number."""
    text = read_utf8(path)
    rows: list[Row] = []
    for number, record in _records(path, text):
        rows += _parse_row(record, number, f"{path}, line {number}")
    if not rows:
        raise InvalidData(f'{path} has no rows: one {{"prompt": …, "completion": …}} a line is expected')
    return rows


def read_utf8(path: Path) -> str:
    """Text of a file. A file that is missing, binary or not UTF-8 raises `InvalidData`."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InvalidData(f"{path}: no such file") from None
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {error}") from error
    if b"\0" in data:
        raise InvalidData(f"{path} is a binary file; UTF-8 text is expected")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidData(f"{path} cannot be read as UTF-8 text: {error}") from None


def _records(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    if Path(path).suffix.lower() == ".json" and text.lstrip().startswith("["):
        yield from enumerate(_parse(text, str(path)), start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _parse(line, f"{path}, line {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidData(f"{where}: not JSON ({error})") from None


def _parse_row(record: Any, number: int, where: str) -> list[Row]:
    if not isinstance(record, dict):
        raise InvalidData(f"{where}: an object is expected, not {type(record).__name__}")
    if "messages" in record and "prompt" not in record:
        return _conversation(record["messages"], number, where)
    if "instruction" in record and "prompt" not in record:
        extra = record.get("input")
        record = {
            "prompt": _text(record, "instruction", where),
            "completion": _text(record, "output", where),
        }
        if extra:
            record["prompt"] += "\n\n" + _text({"input": extra}, "input", where)
    return [
        Row(
            _text(record, "prompt", where),
            _text(record, "completion", where),
            number,
            references=_texts(record, "references", where),
            options=_texts(record, "options", where),
        )
    ]


def _conversation(messages: Any, number: int, where: str) -> list[Row]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InvalidData(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    turns: list[tuple[str, str]] = []
    rows: list[Row] = []
    for message in messages:
        role = _text(message, "role", where)
        if role not in ROLES:
            raise InvalidData(
                f"{where}: the role of a message must be one of {', '.join(ROLES)}, got {role!r}"
            )
        turns.append((role, _text(message, "content", where)))
        if role != "assistant":
            continue
        if len(turns) < 2 or turns[-2][0] != "user":
            raise InvalidData(f"{where}: each message of the assistant must follow one of the user")
        rows.append(Row(turns[-2][1], turns[-1][1], number, tuple(turns[:-2]), chat=True))
    if not rows:
        raise InvalidData(f"{where}: 'messages' holds no answer of the assistant")
    return rows


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise InvalidData(f"{where}: the key {key!r} is missing (keys: {sorted(record)[:8]})")
    if not isinstance(record[key], str):
        raise InvalidData(f"{where}: {key!r} must be a string, not {type(record[key]).__name__}")
    if not record[key]:
        raise InvalidData(f"{where}: {key!r} is empty")
    return _whole(record[key], key, where)


def _whole(text: str, key: str, where: str) -> str:
    """`text`, unless it holds half a character: JSON can name one, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidData(
            f"{where}: {key!r} holds half a character, \\u{ord(text[error.start]):04x}; write the whole one, "
            "or take it out"
        ) from None
    return text


def _texts(record: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    found = record.get(key)
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise InvalidData(f"{where}: {key!r} must be a list of texts")
    return tuple(_whole(text, key, where) for text in found)


def check_prompt_format(prompt_format: str) -> str:
    """Return a format that can be filled; a name (`alpaca`, `chat`) becomes the format that it stands for.

    Raises `InvalidData`.
    """
    prompt_format = NAMED_FORMATS.get(prompt_format, prompt_format)
    if (fault := prompt_format_fault(prompt_format)) is not None:
        raise InvalidData(f"the prompt format {fault}")
    return prompt_format


def fill_prompt(prompt_format: str, prompt: str) -> str:
    """The text that stands before the completion; for a format with `{prompt}` in it, or none."""
    return prompt_format.replace(PLACEHOLDER, prompt) if prompt_format else prompt
