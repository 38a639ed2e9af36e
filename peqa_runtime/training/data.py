"""Training and evaluation data: rows of a file, their tokens, and the plan of batches.

A `.jsonl` file holds one object a line, `{"prompt": str, "completion": str}`; other keys are ignored. A row is
trained as `prompt_format` filled with the prompt, then the completion, then end-of-sequence, exactly as written:
nothing is stripped or added. The loss is taken on the completion and the end only. A `.txt` file is plain
language modelling: one stream of tokens cut into windows.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from peqa_runtime.errors import InvalidData

TooLong = Literal["drop", "fail"]
PLACEHOLDER = "{prompt}"
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Row:
    """One line of a `.jsonl` file. `line` counts from 1."""

    prompt: str
    completion: str
    line: int


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

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that the loss is taken on."""
        return sum(len(e.token_ids) - e.loss_from for e in self.examples)


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded rows. Causal attention needs no mask: no real token looks at the padding behind it.

    `positions` index the flattened `[rows * tokens]` places whose next token is in the loss.
    """

    input_ids: Tensor  # int64 [rows, tokens]
    positions: Tensor  # int64 [loss tokens]
    targets: Tensor  # int64 [loss tokens]
    owners: Tensor  # int64 [loss tokens], row of each


def read_rows(path: Path) -> list[Row]:
    """Read a `.jsonl` file. Anything that is not such a row raises `InvalidData` with its line number."""
    rows: list[Row] = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidData(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidData(f"{path} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_parse_row(line, number, f"{path}, line {number}"))
    if not rows:
        raise InvalidData(f'{path} has no rows: one {{"prompt": …, "completion": …}} a line is expected')
    return rows


def _parse_row(line: str, number: int, where: str) -> Row:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidData(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise InvalidData(f"{where}: an object is expected, not {type(record).__name__}")
    for key in ("prompt", "completion"):
        if key not in record:
            raise InvalidData(f"{where}: the key {key!r} is missing (keys: {sorted(record)[:8]})")
        if not isinstance(record[key], str):
            raise InvalidData(f"{where}: {key!r} must be a string, not {type(record[key]).__name__}")
        if not record[key]:
            raise InvalidData(f"{where}: {key!r} is empty")
    return Row(record["prompt"], record["completion"], number)


def check_prompt_format(prompt_format: str) -> str:
    """Return a format that can be filled: empty (the prompt alone) or text with one `{prompt}` in it."""
    if prompt_format and prompt_format.count(PLACEHOLDER) != 1:
        raise InvalidData(f"the prompt format must hold {PLACEHOLDER} exactly once, got {prompt_format!r}")
    return prompt_format


def fill_prompt(prompt_format: str, prompt: str) -> str:
    """The text that stands before the completion."""
    return prompt_format.replace(PLACEHOLDER, prompt) if prompt_format else prompt


def encode_rows(
    rows: Sequence[Row],
    encode: Encode,
    eos_token_id: int,
    *,
    encode_prompt: Encode | None = None,
    prompt_format: str = "",
    max_tokens: int = 1024,
    too_long: TooLong = "drop",
) -> EncodedData:
    """Tokens of every row. Prompt and completion are encoded apart, as a server sees them.

    `encode_prompt`: how a server encodes a prompt (with a begin-of-text token, say); None: like the completion.
    A row of more than `max_tokens` is never cut (that would teach broken answers): it is dropped and its line
    reported, or `too_long="fail"` raises `InvalidData`. All rows too long raises too.
    """
    check_prompt_format(prompt_format)
    examples: list[Example] = []
    dropped: list[int] = []
    for row in rows:
        prompt = (encode_prompt or encode)(fill_prompt(prompt_format, row.prompt))
        if not prompt:
            raise InvalidData(f"line {row.line}: the prompt has no tokens")
        token_ids = (*prompt, *encode(row.completion), eos_token_id)
        if len(token_ids) <= max_tokens:
            examples.append(Example(token_ids, len(prompt)))
        elif too_long == "fail":
            raise InvalidData(f"line {row.line}: {len(token_ids)} tokens, more than the {max_tokens} allowed")
        else:
            dropped.append(row.line)
    if not examples:
        raise InvalidData(f"every row has more than {max_tokens} tokens; allow more")
    return EncodedData(tuple(examples), tuple(dropped))


def encode_text(text: str, encode: Encode, *, window: int) -> EncodedData:
    """Plain language modelling: non-overlapping windows of `window` tokens, loss on all but the first of each."""
    token_ids = encode(text)
    cuts = (token_ids[i : i + window] for i in range(0, len(token_ids), window))
    examples = tuple(Example(tuple(cut), 1) for cut in cuts if len(cut) > 1)
    if not examples:
        raise InvalidData("the text has fewer than two tokens")
    return EncodedData(examples)


def read_text(path: Path) -> str:
    """Text of a `.txt` file, with `InvalidData` where there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidData(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidData(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise InvalidData(f"{path} is empty")
    return text


def encode_file(
    path: Path,
    encode: Encode,
    eos_token_id: int,
    *,
    encode_prompt: Encode | None = None,
    prompt_format: str = "",
    max_tokens: int = 1024,
    too_long: TooLong = "drop",
) -> EncodedData:
    """Examples of a `.jsonl` or `.txt` file; another suffix raises `InvalidData`."""
    suffix = Path(path).suffix.lower()
    if suffix == ".txt":
        if prompt_format:
            raise InvalidData(f"a prompt format means nothing for plain text ({path})")
        return encode_text(read_text(path), encode, window=max_tokens)
    if suffix in (".jsonl", ".json"):
        return encode_rows(
            read_rows(path),
            encode,
            eos_token_id,
            encode_prompt=encode_prompt,
            prompt_format=prompt_format,
            max_tokens=max_tokens,
            too_long=too_long,
        )
    raise InvalidData(f"{path}: a .jsonl file of rows or a .txt file is expected")


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
    return EncodedData(kept, data.dropped_lines), EncodedData(out)


def plan_batches(lengths: Sequence[int], *, rows: int, steps: int, seed: int) -> list[tuple[int, ...]]:
    """Which examples each of `steps` batches holds: every epoch shuffled anew, like lengths together.

    Examples are shuffled, sorted by length within pools of 32 batches (so that little is padding), cut into batches of
    `rows`, and the batches shuffled. The plan depends on the arguments only, so a resumed run goes on with it.
    """
    assert rows > 0
    assert lengths
    rng = random.Random(f"batches {seed}")
    plan: list[tuple[int, ...]] = []
    while len(plan) < steps:
        plan.extend(_plan_epoch(lengths, rows, rng))
    return plan[:steps]


def _plan_epoch(lengths: Sequence[int], rows: int, rng: random.Random) -> Iterator[tuple[int, ...]]:
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[tuple[int, ...]] = []
    pool = rows * 32
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lengths.__getitem__)
        batches += [tuple(part[i : i + rows]) for i in range(0, len(part), rows)]
    rng.shuffle(batches)
    yield from batches


def collate(examples: Sequence[Example], pad_token_id: int) -> TokenBatch:
    """Right-pad examples into one batch; the last token of each is only ever a target."""
    width = max(len(e.token_ids) for e in examples) - 1
    input_ids = torch.full((len(examples), width), pad_token_id)
    positions: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for row, example in enumerate(examples):
        ids = example.token_ids
        input_ids[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        positions += range(row * width + example.loss_from - 1, row * width + len(ids) - 1)
        targets += ids[example.loss_from :]
        owners += [row] * (len(ids) - example.loss_from)
    return TokenBatch(input_ids, torch.tensor(positions), torch.tensor(targets), torch.tensor(owners))
