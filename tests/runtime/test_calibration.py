"""Calibration windows from files of every kind, and every file that cannot be used."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from peqa_runtime.errors import InvalidData, InvalidRequest
from peqa_runtime.model.quantizers import calibration as module
from peqa_runtime.model.quantizers.calibration import Calibration, CalibrationText, read_calibration

END = 999
WORDS = " ".join(f"word{i}" for i in range(3000))


def read(path: Path, windows: int = 4, tokens: int = 16, seed: int = 0) -> Calibration:
    """One token per character."""
    text = CalibrationText(path, windows, tokens, seed)
    return read_calibration(text, lambda piece: [ord(c) for c in piece], END)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_windows_are_drawn_by_the_seed_from_all_over_the_text(tmp_path: Path) -> None:
    file = written(tmp_path / "t.txt", WORDS)
    found = read(file)
    assert [window.shape for window in found.windows] == [(1, 16)] * 4
    text = "".join(chr(int(i)) for window in found.windows for i in window[0] if int(i) != END)
    assert text[:40] in WORDS
    assert read(file).digest == found.digest
    assert read(file, seed=1).digest != found.digest
    assert len({read(file, seed=seed).digest for seed in range(8)}) == 8
    assert found.to_json() == {
        "source": "t.txt", "sha256": found.digest, "seed": 0, "windows": 4, "tokens": 16
    }  # fmt: skip
    firsts = {WORDS.index("".join(chr(int(i)) for i in read(file, seed=s).windows[0][0])) for s in range(8)}
    assert max(firsts) > len(WORDS) // 4


def test_rows_are_joined_with_the_end_of_text_between_them(tmp_path: Path) -> None:
    rows = [
        {"text": "aaaa"},
        {"prompt": "bb", "completion": "bb"},
        {"instruction": "c", "input": "", "output": "cc"},
        {"messages": [{"role": "user", "content": "dd"}, {"role": "assistant", "content": "d"}]},
        "eeee",
    ]
    file = written(tmp_path / "rows.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    ids = [int(i) for window in read(file, 3, 8).windows for i in window[0]]
    assert set("aaaabbbbc\nccdd\ndeeee") >= {chr(i) for i in ids if i != END}
    assert ids.count(END) in (4, 5)


def test_a_folder_is_all_of_its_text(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", "a" * 40)
    (tmp_path / "inside").mkdir()
    written(tmp_path / "inside" / "b.jsonl", json.dumps({"text": "b" * 40}))
    written(tmp_path / "c.csv", "no")
    written(tmp_path / "README.md", "no")
    written(tmp_path / "inside" / "dataset_infos.json", '{"rows": 1}')
    ids = {int(i) for window in read(tmp_path, 2, 40).windows for i in window[0]}
    assert ids == {ord("a"), ord("b"), END}


def test_markdown_is_text_and_json_is_rows(tmp_path: Path) -> None:
    text = read(written(tmp_path / "t.txt", WORDS))
    assert read(written(tmp_path / "t.md", WORDS)).digest == text.digest
    rows = [{"text": "a" * 40}, {"prompt": "b" * 20, "completion": "b" * 20}]
    lines = read(written(tmp_path / "r.jsonl", "\n".join(map(json.dumps, rows))))
    assert read(written(tmp_path / "array.json", json.dumps(rows, indent=1))).digest == lines.digest
    assert read(written(tmp_path / "lines.json", "\n".join(map(json.dumps, rows)))).digest == lines.digest


def test_parquet_where_pyarrow_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "t.parquet"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyarrow", None)
        file.write_bytes(b"PAR1")
        with pytest.raises(InvalidData, match="needs pyarrow"):
            read(file)
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    with pytest.raises(InvalidData, match="no parquet file"):
        read(file)
    parquet.write_table(arrow.table({"text": ["a" * 50, "b" * 50], "n": [1, 2]}), file)
    assert {int(i) for window in read(file).windows for i in window[0]} <= {ord("a"), ord("b"), END}


def test_files_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(InvalidData, match=message):
            read(path)

    refused(tmp_path / "none.txt", "no such file")
    refused(written(tmp_path / "empty.txt", " \n"), "is empty")
    refused(
        written(tmp_path / "short.txt", "a" * 40),
        r"2 windows of 16 tokens, 4 are asked for.*ask for 2 windows",
    )
    refused(written(tmp_path / "tiny.txt", "abc"), "not even one window of 16")
    refused(written(tmp_path / "t.pdf", "abc"), r"is a \.txt, \.md, \.jsonl, \.json, \.parquet file")
    refused(written(tmp_path / "zero.txt", "a\0" * 99), "is binary")
    refused(written(tmp_path / "bad.jsonl", '{"text": "a"}\n{"text": '), "line 2: not JSON")
    refused(written(tmp_path / "bad.json", '[{"text": "a"}, '), "bad.json: not JSON")
    refused(written(tmp_path / "odd.jsonl", '{"question": "a"}'), "line 1: a row needs a string as text")
    refused(written(tmp_path / "number.jsonl", '{"text": 3}'), "line 1: a row needs a string as text")
    refused(written(tmp_path / "half.jsonl", '{"text": "a\\ud800"}'), r"line 1: half a character, \\ud800")
    refused(written(tmp_path / "null.jsonl", '{"text": ""}'), "is empty")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00" * 50)
    refused(tmp_path / "binary.txt", "cannot be read as UTF-8")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "holds no calibration text")
    monkeypatch.setattr(module, "_LARGEST", 100)
    refused(written(tmp_path / "large.txt", WORDS), "give a part of it")


@pytest.mark.parametrize("options", [{"windows": 1}, {"windows": 0}, {"tokens": 7}, {"tokens": -5}])
def test_numbers_that_make_no_sense(options: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="at least"):
        CalibrationText(tmp_path, **options)
