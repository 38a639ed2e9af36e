"""Files to tune on and files held out, made from the data where it brings none; the same ones every time."""

from __future__ import annotations

import random
from pathlib import Path

from peqa_runtime.bench.tuning.plan import TEXT, TaskPlan

HELD_OUT = 200
CHARACTERS_A_TOKEN = 4.2  # of wikitext under SmolLM2's tokenizer; the rows say how many tokens there were


def split_text(data: Path, work: Path, tokens: int) -> tuple[Path, Path]:
    """(to tune on, held out): about so many tokens of the raw validation text, and its last 5 %."""
    text = (data / TEXT / "valid.raw.txt").read_text(encoding="utf-8")
    held_from = int(0.95 * len(text))
    end = min(held_from, int(tokens * CHARACTERS_A_TOKEN))
    folder = work / f"text-{end}"
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "train.txt", folder / "held_out.txt"
    train.write_text(text[:end], encoding="utf-8")
    held_out.write_text(text[held_from:], encoding="utf-8")
    return train, held_out


def split_rows(data: Path, work: Path, task: TaskPlan) -> tuple[Path, Path]:
    """(to tune on, held out) of a task: its own held-out file, or some rows of the training file."""
    folder = data / task.folder
    if task.held_out:
        return folder / "train.jsonl", folder / task.held_out
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    held = set(random.Random("held-out").sample(range(len(lines)), HELD_OUT))
    made = work / "data" / task.name
    made.mkdir(parents=True, exist_ok=True)
    parts = (made / "train.jsonl", made / "held_out.jsonl")
    for part, wanted in zip(parts, (False, True), strict=True):
        chosen = [line for i, line in enumerate(lines) if (i in held) == wanted]
        part.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return parts
