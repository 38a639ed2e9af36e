"""Rows, tokens and batch plans of training data, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest

from peqa_runtime.errors import InvalidData
from peqa_runtime.training.batches import BatchPlan, collate, plan_batches
from peqa_runtime.training.data import encode_file, encode_rows, encode_text, split_held_out
from peqa_runtime.training.rows import Row, fill_prompt, read_rows

EOS = 0


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


class Bytes:
    """An encoder of a token a character, without a chat template."""

    eos_token_id = EOS

    def encode(self, text: str) -> list[int]:
        return encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        return encode(text)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        raise InvalidData("this model has none")


class Chatty(Bytes):
    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return encode("".join(f"<{m['role'][0]}>{m['content']}" for m in messages) + "<a>")


BYTES = Bytes()


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_are_read_as_written(tmp_path: Path) -> None:
    file = write(
        tmp_path / "d.jsonl",
        '{"prompt": " a\\n", "completion": "b ", "extra": [1]}',
        "",
        '{"prompt": "c\u2028d", "completion": "é"}',
        '{"prompt": "\\ud83d\\ude00", "completion": "b"}',
    )
    assert read_rows(file) == [Row(" a\n", "b ", 1), Row("c\u2028d", "é", 3), Row("\U0001f600", "b", 4)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ("[1, 2]", "line 2: an object is expected, not list"),
        ('{"prompt": "a"}', "line 2: the key 'completion' is missing"),
        ('{"completion": "a"}', "line 2: the key 'prompt' is missing"),
        ('{"prompt": 3, "completion": "a"}', "line 2: 'prompt' must be a string, not int"),
        ('{"prompt": "a", "completion": null}', "line 2: 'completion' must be a string, not NoneType"),
        ('{"prompt": "a", "completion": ""}', "line 2: 'completion' is empty"),
        ('{"prompt": "", "completion": "a"}', "line 2: 'prompt' is empty"),
        ("[" * 100_000, "line 2: not JSON"),
        (
            '{"prompt": "a\\ud83d", "completion": "b"}',
            r"line 2: 'prompt' holds half a character, \\ud83d; write",
        ),
        (
            '{"prompt": "a", "completion": "\\udc00b"}',
            r"line 2: 'completion' holds half a character, \\udc00",
        ),
        ('{"prompt": "a", "completion": "b", "references": ["\\ud800"]}', "line 2: 'references' holds half"),
        (
            '{"messages": [{"role": "user", "content": "\\udfff"}, {"role": "assistant", "content": "b"}]}',
            "line 2: 'content' holds half a character",
        ),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path / "d.jsonl", '{"prompt": "a", "completion": "b"}', line)
    with pytest.raises(InvalidData, match=message):
        read_rows(file)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="no such file"):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(InvalidData, match="has no rows"):
        read_rows(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(InvalidData, match="UTF-8"):
        read_rows(tmp_path / "latin.jsonl")
    with pytest.raises(
        InvalidData, match=r"a \.jsonl or \.json file of rows, or a \.txt or \.md file of plain text"
    ):
        encode_file(write(tmp_path / "d.csv", "a,b"), BYTES)
    with pytest.raises(InvalidData, match="plain text"):
        encode_file(write(tmp_path / "d.txt", "words"), BYTES, prompt_format="{prompt}!")


def test_tokens_are_prompt_completion_and_end() -> None:
    data = encode_rows([Row("ab", "cd", 1)], BYTES, prompt_format="<{prompt}>")
    (example,) = data.examples
    assert example.token_ids == (*encode("<ab>"), *encode("cd"), EOS)
    assert example.loss_from == 4
    assert data.num_loss_tokens == 3


@pytest.mark.parametrize("bad", ["no place", "{prompt}{prompt}", "{Prompt}"])
def test_a_prompt_format_holds_the_prompt_once(bad: str) -> None:
    with pytest.raises(InvalidData, match="exactly once"):
        encode_rows([Row("a", "b", 1)], BYTES, prompt_format=bad)


def test_a_prompt_that_looks_like_a_format_is_left_alone() -> None:
    assert fill_prompt("{prompt}\n", "{x} {prompt}") == "{x} {prompt}\n"
    assert fill_prompt("", "{prompt}") == "{prompt}"


def test_long_rows_are_dropped_and_reported_or_refused() -> None:
    rows = [Row("a", "b", 1), Row("a" * 9, "b", 2), Row("a", "bb", 3)]
    data = encode_rows(rows, BYTES, max_tokens=4)
    assert data.dropped_lines == (2,)
    assert len(data.examples) == 2
    with pytest.raises(InvalidData, match="line 2: 11 tokens, more than the 4"):
        encode_rows(rows, BYTES, max_tokens=4, too_long="fail")
    with pytest.raises(InvalidData, match="every row"):
        encode_rows(rows, BYTES, max_tokens=2)


def test_text_is_cut_into_windows_that_cover_it(tmp_path: Path) -> None:
    data = encode_text("abcdefgh", encode, window=3)
    assert [bytes(e.token_ids) for e in data.examples] == [b"abc", b"def", b"gh"]
    assert data.num_loss_tokens == 5
    for name in ("d.txt", "d.MD"):
        assert encode_file(write(tmp_path / name, "abcdefg"), BYTES, max_tokens=3).num_loss_tokens == 5
    with pytest.raises(InvalidData, match="fewer than two"):
        encode_text("a", encode, window=3)


def test_targets_are_the_completion_whatever_the_padding() -> None:
    data = encode_rows([Row("abc", "xy", 1), Row("d", "z", 2)], BYTES)
    batch = collate(data.examples, EOS)
    assert batch.input_ids.tolist() == [encode("abcxy"), [*encode("dz"), EOS, EOS, EOS]]
    assert batch.targets.tolist() == [*encode("xy"), EOS, *encode("z"), EOS]
    at = batch.input_ids.flatten()[batch.positions]
    assert at.tolist() == encode("cxydz")  # the token before each target
    assert batch.owners.tolist() == [0, 0, 0, 1, 1]


def test_the_plan_covers_every_example_once_an_epoch_and_is_seeded() -> None:
    lengths = [1 + i % 7 for i in range(50)]
    plan = plan_batches(lengths, rows=4, steps=26, seed=3)
    first, second = plan[:13], plan[13:]
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == list(range(50))
    assert first != second
    assert plan == plan_batches(lengths, rows=4, steps=26, seed=3)
    assert plan != plan_batches(lengths, rows=4, steps=26, seed=4)
    assert plan_batches(lengths, rows=4, steps=5, seed=3) == plan[:5]
    lazy = BatchPlan(lengths, rows=4, steps=26, seed=3)
    assert (lazy[20], lazy[3], lazy[20], lazy[11:14]) == (plan[20], plan[3], plan[20], plan[11:14])
    padding = sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in plan)
    assert padding < 0.2 * sum(lengths) * 2


def test_a_plan_of_a_million_steps_is_made_as_it_goes() -> None:
    tracemalloc.start()
    plan = BatchPlan([1 + i % 7 for i in range(50)], rows=4, steps=1_000_000, seed=3)
    assert len(plan) == 1_000_000
    assert len({plan[step] for step in range(2000)}) > 1000
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2_000_000, "bytes: one epoch at a time"


def test_the_held_out_split_is_disjoint_and_seeded() -> None:
    data = encode_rows([Row(chr(65 + i), "b", i) for i in range(20)], BYTES)
    kept, held = split_held_out(data, 0.1, seed=1)
    assert len(held.examples) == 2
    assert sorted(kept.examples + held.examples, key=lambda e: e.token_ids) == list(data.examples)
    assert (kept, held) == split_held_out(data, 0.1, seed=1)
    with pytest.raises(InvalidData, match="fraction"):
        split_held_out(data, 0.9, seed=1)


def test_shapes_of_rows_are_known_by_their_keys(tmp_path: Path) -> None:
    turns = [
        ("system", "be brief"),
        ("user", "hi"),
        ("assistant", "yes"),
        ("user", "so"),
        ("assistant", "no"),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    file = write(
        tmp_path / "d.jsonl",
        '{"instruction": "add", "input": "1 2", "output": "3"}',
        '{"instruction": "greet", "input": "", "output": "hello"}',
        json.dumps({"messages": messages}),
        '{"prompt": "p", "completion": "a", "references": ["a", "b"], "options": ["a", "c"]}',
    )
    rows = read_rows(file)
    assert rows[:2] == [Row("add\n\n1 2", "3", 1), Row("greet", "hello", 2)]
    assert [(row.line, row.prompt, row.completion) for row in rows[2:4]] == [
        (3, "hi", "yes"),
        (3, "so", "no"),
    ]
    assert rows[3].messages == messages[:4]
    assert (rows[4].good_answers, rows[4].options) == (("a", "b"), ("a", "c"))
    array = tmp_path / "d.json"
    array.write_text(json.dumps([{"instruction": "a", "output": "b"}, {"prompt": "c", "completion": "d"}]))
    assert read_rows(array) == [Row("a", "b", 1), Row("c", "d", 2)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "a"}', "the key 'output' is missing"),
        ('{"instruction": "a", "input": 3, "output": "b"}', "'input' must be a string"),
        ('{"messages": "hi"}', "must be a list of objects"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "one of system, user, assistant, got 'robot'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "must follow one of the user"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no answer of the assistant"),
        ('{"prompt": "a", "completion": "b", "options": [1]}', "'options' must be a list of texts"),
    ],
)
def test_a_row_of_another_shape_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(InvalidData, match=f"line 1: .*{message}"):
        read_rows(write(tmp_path / "d.jsonl", line))


def test_a_binary_file_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(b"\x7fELF\0\0\1")
    with pytest.raises(InvalidData, match="is a binary file; UTF-8 text is expected"):
        read_rows(tmp_path / "d.jsonl")
    (tmp_path / "late.txt").write_bytes(b"words " * 20_000 + b"\0")
    with pytest.raises(InvalidData, match="is a binary file; UTF-8 text is expected"):
        encode_file(tmp_path / "late.txt", BYTES)
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}')
    assert read_rows(tmp_path / "bom.jsonl") == [Row("a", "b", 1)]


def test_conversations_are_written_by_the_chat_template() -> None:
    chat = Row("so", "no", 1, (("user", "hi"), ("assistant", "yes")), chat=True)
    data = encode_rows([chat], Chatty())
    (example,) = data.examples
    assert bytes(example.token_ids) == b"<u>hi<a>yes<u>so<a>no\0"
    assert example.loss_from == len("<u>hi<a>yes<u>so<a>")
    assert data.prompt_format == "{messages}", "so that a server writes its chats the same way"
    plain = encode_rows([Row("so", "no", 1)], Chatty(), prompt_format="chat")
    assert bytes(plain.examples[0].token_ids) == b"<u>so<a>no\0"
    with pytest.raises(InvalidData, match="line 1: messages are written by the chat template"):
        encode_rows([chat], Chatty(), prompt_format="{prompt}:")
    with pytest.raises(InvalidData, match="this model has none"):
        encode_rows([chat], BYTES)
    alpaca = encode_rows([Row("add", "3", 1)], BYTES, prompt_format="alpaca")
    assert alpaca.prompt_format.format(prompt="add") == "### Instruction:\nadd\n\n### Response:\n"
