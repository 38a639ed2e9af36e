"""From the files that data sets are published as to rows of prompt and completion, the same bytes each time."""

from __future__ import annotations

import base64
import bz2
import csv
import io
import json
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
Convert = Callable[[bytes], bytes]


def jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    """One object a line, UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _shuffled(rows: Rows, seed: int) -> Rows:
    random.Random(seed).shuffle(rows)
    return rows


def gsm8k(published: bytes) -> bytes:
    """Question and worked answer, as they are."""
    rows = (json.loads(line) for line in published.decode().splitlines() if line)
    return jsonl({"prompt": row["question"], "completion": row["answer"]} for row in rows)


def banking77(published: bytes) -> bytes:
    """Question and the name of its intent; the published order goes by intent, so it is shuffled."""
    rows = [{"prompt": row["text"], "completion": row["category"]} for row in _csv(published)]
    return jsonl(_shuffled(rows, 1))


def restaurant8k(published: bytes) -> bytes:
    """Utterance and a JSON object of its slots; `requested` are the slots that were asked for."""
    rows: Rows = []
    for turn in json.loads(published):
        text = turn["userInput"]["text"]
        slots: dict[str, str] = {}
        for label in turn.get("labels", []):
            span = label.get("valueSpan", {})
            slots[label["slot"]] = text[span.get("startIndex", 0) : span.get("endIndex", len(text))]
        asked = turn.get("context", {}).get("requestedSlots", [])
        rows.append({"prompt": text, "requested": asked, "completion": json.dumps(slots, ensure_ascii=False)})
    return jsonl(rows)


def e2e_train(published: bytes) -> bytes:
    """Meaning representation and one text, a row each."""
    rows = [{"prompt": row["mr"], "completion": row["ref"]} for row in _csv(published)]
    return jsonl(_shuffled(rows, 2))


def e2e_test(published: bytes) -> bytes:
    """Each meaning representation once, with all its texts as references."""
    texts: dict[str, list[str]] = {}
    for row in _csv(published):
        texts.setdefault(row["mr"], []).append(row["ref"])
    return jsonl({"prompt": mr, "completion": refs[0], "references": refs} for mr, refs in texts.items())


def _csv(published: bytes) -> Iterable[dict[str, str]]:
    return csv.DictReader(io.StringIO(published.decode(), newline=""))


def git_blob(published: bytes) -> bytes:
    """The content that GitHub's interface gives a blob's as."""
    return base64.b64decode(json.loads(published)["content"])


WIKISQL_SPLITS = ("train", "dev", "test")
_FIELD = re.compile(r"TABLEalias0\.(\w+)_FIELD")
_AGGREGATE = re.compile(r"SELECT (MAX|MIN|COUNT|SUM|AVG) (\w+)")
_VARIABLE = re.compile(r'"?\b(var\d+)\b"?')
_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_SPACES = re.compile("  +")


def wikisql(split: str) -> Convert:
    """A converter for one split: table and question, and the query.

    The rows are a sample, and each table's columns stand in an order of their own: `wikisql_rows.z` has both.
    """

    def convert(published: bytes) -> bytes:
        items, columns = _questions(published)
        rows: Rows = []
        for number, rank in read_selection(split):
            query, sentence = items[number]
            own = _permuted(columns[sentence["table-id"]], rank)
            question = sentence["original"].strip()
            rows.append(
                {
                    "prompt": f"table t({', '.join(own)})\n{question}",
                    "completion": plain_query(query, sentence["variables"]),
                }
            )
        return jsonl(rows)

    return convert


def _questions(published: bytes) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, list[str]]]:
    """((query, question) of every item, columns of each table in the order in which questions use them)."""
    items: list[tuple[str, dict[str, Any]]] = []
    columns: dict[str, list[str]] = {}
    for entry in json.loads(bz2.decompress(published)):
        query = entry["sql"][0]
        used = [name.lower() for name in _FIELD.findall(query)]
        for sentence in entry["sentences"]:
            known = columns.setdefault(sentence["table-id"], [])
            known += [name for name in dict.fromkeys(used) if name not in known]
            items.append((query, sentence))
    return items, columns


def plain_query(query: str, variables: dict[str, str]) -> str:
    """The query with its table called `t`, its columns by their names and its variables filled in."""
    query = _FIELD.sub(lambda m: m.group(1).lower(), query.replace("TABLE AS TABLEalias0", "t"))
    query = _AGGREGATE.sub(r"SELECT \1(\2)", query.rstrip("; "))
    return _VARIABLE.sub(
        lambda m: _literal(variables[m.group(1)]) if m.group(1) in variables else m.group(0), query
    )


def _literal(value: str) -> str:
    value = _SPACES.sub(" ", value.strip().replace('"', ""))
    return value if _NUMBER.fullmatch(value) else f'"{value}"'


def read_selection(split: str) -> list[tuple[int, int]]:
    """(number of the question, rank of the permutation of its table's columns) of each row of a split."""
    packed = zlib.decompress(Path(__file__).with_name("wikisql_rows.z").read_bytes())
    counts = struct.unpack_from("<3I", packed)
    first = sum(counts[: WIKISQL_SPLITS.index(split)])
    found = struct.iter_unpack(
        "<II", packed[12 + 8 * first : 12 + 8 * (first + counts[WIKISQL_SPLITS.index(split)])]
    )
    return [(number, rank) for number, rank in found]


def _permuted(names: Sequence[str], rank: int) -> list[str]:
    """The permutation of this rank, in factorial base."""
    left, found = list(names), []
    for size in range(len(names), 0, -1):
        rank, place = divmod(rank, size)
        found.append(left.pop(place))
    return found
