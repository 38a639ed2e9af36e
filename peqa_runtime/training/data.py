"""Training and evaluation data as tokens.

A row is trained as `prompt_format` filled with the prompt, then the completion, then end-of-sequence, exactly as
written: nothing is stripped or added. The loss is taken on the completion and the end only. Rows of a conversation are
written by the model's chat template. A `.txt` or `.md` file is plain language modelling: one stream of tokens cut into
windows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from peqa_runtime.errors import InvalidData
from peqa_runtime.prompt_format import CHAT_FORMAT
from peqa_runtime.training.rows import (
    Row,
    check_prompt_format,
    fill_prompt,
    read_rows,
    read_utf8,
)

TEXT_SUFFIXES = (".txt", ".md")
TooLong = Literal["drop", "fail"]
Encode = Callable[[str], list[int]]


class Encoder(Protocol):
    """What makes tokens of text, as a server does."""

    @property
    def eos_token_id(self) -> int:
        """The token that ends a completion."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone: what follows a prompt."""

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt: after the begin-of-text token, say."""

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins. `InvalidData` without a template."""


@dataclass(frozen=True)
class Example:
    """Tokens of one row; the loss is taken on `token_ids[loss_from:]`."""

    token_ids: tuple[int, ...]
    loss_from: int


@dataclass(frozen=True)
class EncodedData:
    """Examples of one file, and the lines that were dropped because they are too long."""

    examples: tuple[Example, ...]
    dropped_lines: tuple[int, ...] = ()
    prompt_format: str = ""  # as applied: conversations have their own

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that the loss is taken on."""
        return sum(len(e.token_ids) - e.loss_from for e in self.examples)


def encode_rows(
    rows: Sequence[Row],
    encoder: Encoder,
    *,
    prompt_format: str = "",
    max_tokens: int = 1024,
    too_long: TooLong = "drop",
) -> EncodedData:
    """Tokens of every row. Prompt and completion are encoded apart, as a server sees them.

    A row of more than `max_tokens` is never cut (that would teach broken answers): it is dropped and its line
    reported, or `too_long="fail"` raises `InvalidData`. All rows too long raises too.
    """
    prompt_format = check_prompt_format(prompt_format) or (
        CHAT_FORMAT if any(row.chat for row in rows) else ""
    )
    examples: list[Example] = []
    dropped: list[int] = []
    for row in rows:
        prompt = prompt_ids(row, encoder, prompt_format)
        if not prompt:
            raise InvalidData(f"line {row.line}: the prompt has no tokens")
        token_ids = (*prompt, *encoder.encode(row.completion), encoder.eos_token_id)
        if len(token_ids) <= max_tokens:
            examples.append(Example(token_ids, len(prompt)))
        elif too_long == "fail":
            raise InvalidData(f"line {row.line}: {len(token_ids)} tokens, more than the {max_tokens} allowed")
        else:
            dropped.append(row.line)
    if not examples:
        raise InvalidData(
            f"every row has more than {max_tokens} tokens; give shorter rows, or raise --max-tokens if the model's "
            "context has room"
        )
    return EncodedData(tuple(examples), tuple(dropped), prompt_format)


def prompt_ids(row: Row, encoder: Encoder, prompt_format: str) -> list[int]:
    """Tokens before a row's completion. A conversation under a format with `{prompt}` raises `InvalidData`."""
    if prompt_format == CHAT_FORMAT:
        return encoder.encode_chat(row.messages)
    if row.chat:
        raise InvalidData(
            f"line {row.line}: messages are written by the chat template, not by a prompt format"
        )
    return encoder.encode_prompt(fill_prompt(prompt_format, row.prompt))


def encode_text(text: str, encode: Encode, *, window: int) -> EncodedData:
    """Plain language modelling: non-overlapping windows of `window` tokens, loss on all but the first of each."""
    token_ids = encode(text)
    cuts = (token_ids[i : i + window] for i in range(0, len(token_ids), window))
    examples = tuple(Example(tuple(cut), 1) for cut in cuts if len(cut) > 1)
    if not examples:
        raise InvalidData("the text has fewer than two tokens")
    return EncodedData(examples)


def read_text(path: Path) -> str:
    """Text of a file of plain text, with `InvalidData` where there is none."""
    text = read_utf8(path)
    if not text.strip():
        raise InvalidData(f"{path} is empty")
    return text


def encode_file(
    path: Path,
    encoder: Encoder,
    *,
    prompt_format: str = "",
    max_tokens: int = 1024,
    too_long: TooLong = "drop",
) -> EncodedData:
    """Examples of a `.jsonl`, `.json`, `.txt` or `.md` file; another suffix raises `InvalidData`."""
    suffix = Path(path).suffix.lower()
    if suffix in TEXT_SUFFIXES:
        if prompt_format:
            raise InvalidData(f"a prompt format means nothing for plain text ({path})")
        return encode_text(read_text(path), encoder.encode, window=max_tokens)
    if suffix in (".jsonl", ".json"):
        rows = read_rows(path)
        try:
            return encode_rows(
                rows, encoder, prompt_format=prompt_format, max_tokens=max_tokens, too_long=too_long
            )
        except InvalidData as error:
            raise InvalidData(f"{path}: {error}") from None
    raise InvalidData(
        f"{path}: a .jsonl or .json file of rows, or a .txt or .md file of plain text, is expected"
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else (hashlib.sha256(file.read()).hexdigest())
        )


def split_held_out(data: EncodedData, fraction: float, seed: int) -> tuple[EncodedData, EncodedData]:
    """Split off a seeded `fraction` (0 to 0.5) of the examples: (to train on, held out), at least one in each."""
    count = len(data.examples)
    if not 0 < fraction <= 0.5:
        raise InvalidData(f"the held-out fraction must be above 0 and at most 0.5, got {fraction}")
    if count < 2:
        raise InvalidData("one row cannot be split; give a file of held-out rows instead")
    order = list(range(count))
    random.Random(f"held-out {seed}").shuffle(order)
    held = set(order[: max(1, round(count * fraction))])
    kept = tuple(e for i, e in enumerate(data.examples) if i not in held)
    out = tuple(e for i, e in enumerate(data.examples) if i in held)
    return replace(data, examples=kept), EncodedData(out, (), data.prompt_format)
