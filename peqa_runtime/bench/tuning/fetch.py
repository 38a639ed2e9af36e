"""Public data from its origins, each file known by its SHA-256, as published and as converted."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peqa_runtime.bench.tuning import convert
from peqa_runtime.errors import InvalidData

Say = Callable[[str], None]
RAW = "https://raw.githubusercontent.com"
BLOBS = "https://api.github.com/repos"
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Source:
    """One file: where it is published, its digest there, and what is made of it. `licence` is of the published data."""

    name: str  # path in the data folder
    url: str
    sha256: str  # of what is downloaded; "" where only the result is known
    made_sha256: str
    convert: convert.Convert
    licence: str


def fetch(folder: Path, *, sources: Sequence[Source] | None = None, say: Say = lambda line: None) -> None:
    """Make `folder` hold every file; those that are there with the right digest are left alone.

    A download is kept in memory until it is checked, and a file is renamed into place when it is whole. Raises
    `InvalidData` where a file cannot be had or is another one than was published.
    """
    downloads: dict[str, bytes] = {}
    for source in SOURCES if sources is None else sources:
        target = folder / source.name
        if target.is_file() and _digest(target.read_bytes()) == source.made_sha256:
            say(f"{source.name}: there already")
            continue
        if source.url not in downloads:
            downloads[source.url] = _download(source)
        made = source.convert(downloads[source.url])
        if _digest(made) != source.made_sha256:
            raise InvalidData(f"{source.name}: what {source.url} became is not the file that is expected")
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.{os.getpid()}")
        staged.write_bytes(made)
        os.replace(staged, target)
        say(f"{source.name}: {len(made):,} bytes ({source.licence})")


def _download(source: Source) -> bytes:
    try:
        with urllib.request.urlopen(source.url, timeout=_TIMEOUT_S) as answer:
            data: bytes = answer.read()
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise InvalidData(f"{source.name} cannot be fetched from {source.url}: {error}") from error
    if source.sha256 and _digest(data) != source.sha256:
        raise InvalidData(f"{source.url} is not the file that was published: its SHA-256 is {_digest(data)}")
    return data


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class _Repository:
    """A state of a repository on GitHub."""

    name: str
    commit: str
    licence: str

    def file(self, name: str, path: str, sha256: str, made: str, how: convert.Convert) -> Source:
        url = f"{RAW}/{self.name}/{self.commit}/{path}"
        return Source(name, url, sha256, made, how, self.licence)


_TEXT2SQL = _Repository(
    "jkkummerfeld/text2sql-data", "5050bad2309a93636ea4788d3660c9202bf11e0e", "BSD-3, Salesforce"
)
_POLYAI = _Repository(
    "PolyAI-LDN/task-specific-datasets", "57ec275d8078af65b7731c2a98be812d844a6d6b", "CC BY 4.0"
)
_E2E = _Repository("tuetschek/e2e-dataset", "ab0d967dd5729ce455ef14ba9ffafc456a335264", "CC BY-SA 4.0")
_GSM8K = _Repository("openai/grade-school-math", "3101c7d5072418e28b9008a6636bde82a006892c", "MIT")


def _wikitext(name: str, blob: str, sha256: str) -> Source:
    """The raw text, which stood in this repository until 2017-12-05; a blob is asked for by its name."""
    url = f"{BLOBS}/pytorch/examples/git/blobs/{blob}"
    return Source(f"wikitext-2/{name}", url, "", sha256, convert.git_blob, "CC BY-SA 3.0")


SOURCES = (
    _TEXT2SQL.file(
        "wikisql/train.jsonl",
        "data/wikisql.json.bz2",
        "f63b68f12c3ffe810d986347e03f3858d00cf6672f82cc10c062cae3da326946",
        "8d86513fae18c897223e18b1ec95cb73b2d0f707aaa91bd8774632ca73c11dfe",
        convert.wikisql("train"),
    ),
    _TEXT2SQL.file(
        "wikisql/dev.jsonl",
        "data/wikisql.json.bz2",
        "f63b68f12c3ffe810d986347e03f3858d00cf6672f82cc10c062cae3da326946",
        "7cde8a1c5bb3108253ca71ce1bcd0311da78582e7e691966de4014bacf9f438d",
        convert.wikisql("dev"),
    ),
    _TEXT2SQL.file(
        "wikisql/test.jsonl",
        "data/wikisql.json.bz2",
        "f63b68f12c3ffe810d986347e03f3858d00cf6672f82cc10c062cae3da326946",
        "ca83ed6c4079bbcbf2afde09d73bd12759f1d1f7270780ff7a035b4542019e30",
        convert.wikisql("test"),
    ),
    _POLYAI.file(
        "banking77/train.jsonl",
        "banking_data/train.csv",
        "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
        "1c803a4469cde0a35bb943b5ff75b37ba7b28a826a2c5465a563592cef054909",
        convert.banking77,
    ),
    _POLYAI.file(
        "banking77/test.jsonl",
        "banking_data/test.csv",
        "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
        "8e9c19aed0d1dbe4320cfe99a22ec354b0cf078bb1f67c8d1875350017994147",
        convert.banking77,
    ),
    _POLYAI.file(
        "restaurant8k-slots/train.jsonl",
        "span_extraction/restaurant8k/train_0.json",
        "90cb03e1cdd3ee141829605955a54d946308e1558250ca1e7413f260443bc6a4",
        "11b782848ec3b2dfa3a3798e8fc1d01f95dd21dec8d131ff7310718299902db2",
        convert.restaurant8k,
    ),
    _POLYAI.file(
        "restaurant8k-slots/test.jsonl",
        "span_extraction/restaurant8k/test.json",
        "31dbbb2fa36319f9f1f2c3ed441619ebf6e081f82aefd484b98caf86cd826ab0",
        "d556802a743748d15f867cb4ab9455a5d65230c4a1e7c04d556a94997d71fc28",
        convert.restaurant8k,
    ),
    _E2E.file(
        "e2e-nlg/train.jsonl",
        "devset.csv",
        "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
        "9690c7e3d6bc239b8c19561558de9f24f624c69b73a17b6bb10e3aabb124f1f7",
        convert.e2e_train,
    ),
    _E2E.file(
        "e2e-nlg/test.jsonl",
        "testset_w_refs.csv",
        "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
        "55be9d6a98e7e331e3611aac20942de09374488d477e0e74e283729105f6d040",
        convert.e2e_test,
    ),
    _GSM8K.file(
        "gsm8k/train.jsonl",
        "grade_school_math/data/train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        "3bdf540eb7977098d752b926d48d53a926df1e144eaf6d090a9ba551edc8f779",
        convert.gsm8k,
    ),
    _GSM8K.file(
        "gsm8k/test.jsonl",
        "grade_school_math/data/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        "1058cd1e2e8df43ce40f5bfce11cacb1378922c9c4c688e087d089b0158a27fe",
        convert.gsm8k,
    ),
    _wikitext(
        "test.raw.txt",
        "d9d791581935032220e10e28a04cfbd6460b72f5",
        "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
    ),
    _wikitext(
        "valid.raw.txt",
        "7760d2e69e8038dc8332ca34cfc238c36f7e47df",
        "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7",
    ),
)
"""Every file of the benchmark, as `make bench-tuning` wants it."""
