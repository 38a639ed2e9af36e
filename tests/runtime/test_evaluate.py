"""Metrics and log-probabilities, each against a plain computation of its own; and how an evaluation goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peqa_runtime.core import ScaleKind
from peqa_runtime.engine import allocation
from peqa_runtime.engine.engine import Engine
from peqa_runtime.engine.offline import Completion
from peqa_runtime.errors import InvalidCheckpoint, InvalidData, InvalidScaleSet, UnsupportedModel
from peqa_runtime.evaluation.answers import sample_rows
from peqa_runtime.evaluation.compare import interval, paired
from peqa_runtime.evaluation.measured import Measured
from peqa_runtime.evaluation.metrics import final_number, metric_named
from peqa_runtime.evaluation.reference import Reference
from peqa_runtime.evaluation.run import Question, evaluate
from peqa_runtime.evaluation.served import Served
from peqa_runtime.evaluation.ways import opened
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.set_layout import expected_shapes
from peqa_runtime.training.data import Example
from peqa_runtime.training.logprobs import completion_logprobs, token_logprobs
from peqa_runtime.training.rows import Row
from peqa_runtime.training.tuning import TunableModel, apply_scale_set, load_tunable

TEXT = "The cat sat on the mat. " * 12


@pytest.fixture
def tunable(tiny_base: Path) -> TunableModel:
    torch.set_num_threads(1)
    return load_tunable(tiny_base, device="cpu")


@pytest.fixture(params=["float32", "served"])
def model(request: pytest.FixtureRequest, tunable: TunableModel, tiny_base: Path) -> Iterator[Measured]:
    """The base as it is measured, in both ways."""
    if request.param == "float32":
        yield Reference(tunable)
        return
    with Served(tiny_base, device="cpu") as served:
        yield served


def plain_logprobs(tunable: TunableModel, token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocab], from the whole model without any shortcut."""
    with torch.no_grad():
        return tunable.model(input_ids=torch.tensor([token_ids])).logits[0].float().log_softmax(-1)


def random_set(tunable: TunableModel, kind: ScaleKind) -> ScaleSet:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: 0.5 + torch.rand(shape, generator=generator)
        for name, shape in expected_shapes(kind, tunable.manifest).items()
    }
    return ScaleSet.build(kind, tensors, tunable.manifest)


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_perplexity_is_over_windows_that_do_not_overlap(
    model: Measured, tunable: TunableModel, tmp_path: Path
) -> None:
    ids = tunable.encode(TEXT)
    losses: list[float] = []
    for start in range(0, len(ids), 40):
        window = ids[start : start + 40]
        logprobs = plain_logprobs(tunable, window)
        losses += [-logprobs[i - 1, window[i]].item() for i in range(1, len(window))]
    file = tmp_path / "t.txt"
    file.write_text(TEXT)
    question = Question(file, metric_named("perplexity"), context=40)
    found = evaluate(model, question)
    assert found["rows"] == math.ceil(len(ids) / 40) > 2
    assert found["tokens"] == len(losses) == len(ids) - found["rows"]
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert found["low"] <= found["perplexity"] <= found["high"]
    assert evaluate(model, replace(question, limit=1))["tokens"] == 39
    with pytest.raises(InvalidData, match="context must be between 2 and 512, which is the model's"):
        evaluate(model, replace(question, context=600))


@pytest.mark.parametrize("kind", [None, "channel", "channel+input", "group"])
def test_token_logprobs_are_the_models_own(tunable: TunableModel, kind: ScaleKind | None) -> None:
    sequences = [tunable.encode("select a from t"), tunable.encode("xy")]
    base = [plain_logprobs(tunable, ids) for ids in sequences]
    if kind is not None:
        apply_scale_set(tunable, random_set(tunable, kind))
    for ids, found, unscaled in zip(sequences, token_logprobs(tunable, sequences), base, strict=True):
        logprobs = plain_logprobs(tunable, ids)
        expected = [logprobs[i - 1, ids[i]].item() for i in range(1, len(ids))]
        assert found == pytest.approx(expected, abs=1e-5)
        if kind is not None:
            assert (logprobs - unscaled).abs().max() > 0.1, "the set changes the model"
    with pytest.raises(InvalidData, match="two tokens"):
        token_logprobs(tunable, [[5]])


def test_completion_logprobs_are_those_of_a_saved_set(
    tunable: TunableModel, tiny_base: Path, tmp_path: Path
) -> None:
    scale_set = random_set(tunable, "channel")
    file = tmp_path / "s.safetensors"
    replace(scale_set, prompt_format="Q {prompt} A ").save(file)
    (row,) = completion_logprobs(tiny_base, file, [{"prompt": "the", "completion": "cat"}])
    assert list(row.token_ids) == [*tunable.encode("Q the A "), *tunable.encode("cat"), tunable.eos_token_id]
    apply_scale_set(tunable, scale_set)
    expected = token_logprobs(tunable, [row.token_ids])[0]
    assert list(row.logprobs) == expected[-len(tunable.encode("cat")) - 1 :]
    (base,) = completion_logprobs(tiny_base, None, [{"prompt": "the", "completion": "cat"}])
    assert base.logprobs != row.logprobs
    assert len(base.logprobs) == len(row.logprobs)


def test_greedy_takes_the_most_likely_token_whatever_is_in_the_batch(
    model: Measured, tunable: TunableModel
) -> None:
    prompts = [tunable.encode(text) for text in ("a", "a longer one", "and the longest of all prompts")]
    together = model.greedy(prompts, max_new_tokens=6)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(plain_logprobs(tunable, ids)[-1].argmax()))
            if ids[-1] == tunable.eos_token_id:
                break
        new = [i for i in ids[len(prompt) :] if i != tunable.eos_token_id]
        assert answer == tunable.tokenizer.decode(new)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `greedy` answers to each prompt."""
    answers: dict[str, str] = {}

    def answer(model: Measured, prompts: list[list[int]], *, max_new_tokens: int) -> list[str]:
        return [answers[str(model.tokenizer.decode(p)).removeprefix("Q: ")] for p in prompts]

    for way in (Reference, Served):
        monkeypatch.setattr(way, "greedy", answer)
    return answers


@pytest.mark.parametrize(
    ("ignore_case", "right"), [(False, [False, True, True, False]), (True, [False, True, True, True])]
)
def test_exact_match_counts_equal_answers_only(
    model: Measured,
    tunable: TunableModel,
    tmp_path: Path,
    scripted: dict[str, str],
    ignore_case: bool,
    right: list[bool],
) -> None:
    scripted |= {"ab": "yes", "cd": " no\n", "longer prompt": "yes!", "up": "YES"}
    wanted = {"longer prompt": "yes", "ab": "yes", "cd": "no", "up": "yes"}
    file = write_rows(tmp_path / "r.jsonl", *({"prompt": p, "completion": c} for p, c in wanted.items()))
    out = tmp_path / "answers.jsonl"
    metric = metric_named("exact-match", ignore_case=ignore_case)
    question = Question(file, metric, prompt_format="Q: {prompt}", batch_rows=2)
    report = evaluate(model, question, predictions=out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["correct"] for row in rows] == right
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    assert report["exact_match"] == pytest.approx(25 * sum(right))
    assert report["correct"] == sum(right)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so\n#### 1,234", "1234"),
        ("#### $-3.50", "-3.50"),
        ("it is 7 or 8.", "8"),
        ("none", None),
        ("####", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    found = final_number(text)
    assert (None if found is None else str(found)) == number
    stats = metric_named("final-number").stats
    assert stats(Row("p", "#### 18", 1), "is 18.00") == (1.0, 1.0)
    assert stats(Row("p", "#### 18", 1), "is 18 or 19") == (0.0, 1.0)
    with pytest.raises(InvalidData, match="line 3: final-number needs a number"):
        stats(Row("p", "eighteen", 3), "18")


def test_slots_are_keys_with_their_values() -> None:
    metric = metric_named("slot-f1")
    pairs = [
        ('{"a": "1", "b": "2"}', '{"a": "1", "b": "3"}'),  # 1 right of 2 found, 2 wanted
        ('{"c": 1}', "no object"),
        ("{}", "{}"),
    ]
    stats = np.array([metric.stats(Row("p", wanted, 1), found) for wanted, found in pairs])
    assert stats.tolist() == [[1, 2, 2], [0, 0, 1], [0, 0, 0]]
    assert metric.value(stats.sum(0)) == pytest.approx(200 * 1 / 5)
    assert metric.value(stats[2]) == 100
    with pytest.raises(InvalidData, match="JSON object"):
        metric.stats(Row("p", "text", 1), "{}")


def test_bleu_is_sacrebleus_over_the_whole_corpus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    metric = metric_named("bleu")
    answers = ["the cat sat on the mat", "a dog ran home fast", "nothing of it is there"]
    references = [
        ("the cat sat on a mat", "a cat sat on the mat"),
        ("the dog ran home",),
        ("something else is here now",),
    ]
    stats = np.array(
        [metric.stats(Row("p", r[0], 1, references=r), a) for a, r in zip(answers, references, strict=True)]
    )
    streams = [[r[min(i, len(r) - 1)] for r in references] for i in range(2)]
    assert metric.value(stats.sum(0)) == pytest.approx(sacrebleu.corpus_bleu(answers, streams).score)


def test_the_likeliest_option_per_token_is_chosen(
    model: Measured, tunable: TunableModel, tmp_path: Path
) -> None:
    options = ["cat", "a much longer option", "xy"]
    row = {"prompt": "the", "completion": "cat", "options": options}
    file = write_rows(tmp_path / "r.jsonl", row)
    out = tmp_path / "answers.jsonl"
    evaluate(model, Question(file, metric_named("multiple-choice")), predictions=out)
    means = []
    for option in options:
        ids = [*tunable.encode("the"), *tunable.encode(option)]
        own = token_logprobs(tunable, [ids])[0][-len(tunable.encode(option)) :]
        means.append(sum(own) / len(own))
    (answer,) = (json.loads(line)["answer"] for line in out.read_text().splitlines())
    assert answer == options[means.index(max(means))]
    for change in ({"options": ["cat"]}, {"completion": "dog"}):
        bad = write_rows(tmp_path / "bad.jsonl", row | change)
        with pytest.raises(InvalidData, match="line 1: multiple-choice needs 'options'"):
            evaluate(model, Question(bad, metric_named("multiple-choice")))


def test_a_difference_is_paired_and_its_interval_covers_it() -> None:
    rng = np.random.default_rng(0)
    metric = metric_named("exact-match")
    hard = rng.random(400) < 0.5  # rows differ much from each other, sets little
    first = np.stack([hard & (rng.random(400) < 0.95), np.ones(400)], 1).astype(float)
    second = np.stack([hard, np.ones(400)], 1).astype(float)
    found = paired(first, second, metric)
    assert found.difference == pytest.approx(100 * (second[:, 0].mean() - first[:, 0].mean()))
    assert 0 < found.low <= found.difference <= found.high
    assert found.better > 0.99
    alone = interval(second, metric)
    assert alone.high - alone.low > 2 * (found.high - found.low), "the rows' own spread does not enter"
    assert paired(second, first, metric).difference == -found.difference
    nothing = paired(first, first, metric)
    assert (nothing.low, nothing.high, nothing.better) == (0, 0, 0)


def test_two_sets_on_the_same_rows(model: Measured, tunable: TunableModel, tmp_path: Path) -> None:
    file, out = tmp_path / "t.txt", tmp_path / "w.jsonl"
    file.write_text(TEXT)
    random_set(tunable, "channel").save(tmp_path / "s.safetensors")
    question = Question(file, metric_named("perplexity"), context=40)
    base = evaluate(model, question)
    seen: list[tuple[int, int]] = []
    report = evaluate(
        model,
        question,
        tmp_path / "s.safetensors",
        against="base",
        predictions=out,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert report["against"]["perplexity"] == base["perplexity"]
    assert report["against"]["difference"] == pytest.approx(report["perplexity"] - base["perplexity"])
    better = report["perplexity"] < base["perplexity"]
    assert report["against"]["better"] == pytest.approx(float(better), abs=0.3)
    assert report["revision"] is not None
    assert report["against"]["revision"] is None
    assert seen[-1] == (2 * base["rows"], 2 * base["rows"])
    assert all("against" in json.loads(line) for line in out.read_text().splitlines())


def test_an_interrupted_evaluation_goes_on(
    model: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ({"prompt": "p" * (i + 1), "completion": "c"} for i in range(9))
    file, out = write_rows(tmp_path / "r.jsonl", *rows), tmp_path / "out" / "answers.jsonl"
    asked: list[int] = []

    def answer(model: Measured, prompts: list[list[int]], *, max_new_tokens: int) -> list[str]:
        if len(asked) == 6 and not out.with_name("answers.jsonl.partial.torn").exists():
            out.with_name("answers.jsonl.partial.torn").touch()
            raise KeyboardInterrupt
        asked.extend(len(p) for p in prompts)
        return ["c"] * len(prompts)

    for way in (Reference, Served):
        monkeypatch.setattr(way, "greedy", answer)
    question = Question(file, metric_named("exact-match"), batch_rows=3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, question, predictions=out)
    partial = out.with_name("answers.jsonl.partial")
    with open(partial, "a") as torn:
        torn.write('{"number": 8, "li')  # cut short by a kill
    assert evaluate(model, question, predictions=out)["correct"] == 9
    assert sorted(asked) == sorted(range(1, 10)), "no row was asked twice"
    assert not partial.exists()
    assert evaluate(model, replace(question, limit=3), predictions=out)["rows"] == 3
    assert len(asked) == 12


def test_a_text_without_tokens_is_named_before_the_first_answer(
    model: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tokenizers make nothing of white space."""
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda text: encode(text) if text.strip() else [])
    row = {"prompt": "a", "completion": "b", "options": ["b", " "]}
    file = write_rows(tmp_path / "r.jsonl", row | {"options": ["b", "c"]}, row)
    with pytest.raises(InvalidData, match="line 2: the prompt, or an option, has no tokens"):
        evaluate(model, Question(file, metric_named("multiple-choice")))
    monkeypatch.setattr(model, "encode_prompt", lambda text: [])
    with pytest.raises(InvalidData, match="line 1: the prompt, or an option, has no tokens"):
        evaluate(model, Question(file, metric_named("exact-match")))


def test_what_was_computed_in_another_way_is_asked_again(
    tunable: TunableModel, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ({"prompt": "p" * (i + 1), "completion": "c"} for i in range(4))
    file, out = write_rows(tmp_path / "r.jsonl", *rows), tmp_path / "answers.jsonl"
    asked: list[str] = []

    def answer(model: Measured, prompts: list[list[int]], *, max_new_tokens: int) -> list[str]:
        asked.append(model.computes)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ["c"] * len(prompts)

    for way in (Reference, Served):
        monkeypatch.setattr(way, "greedy", answer)
    question = Question(file, metric_named("exact-match"), batch_rows=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Reference(tunable), question, predictions=out)
    with Served(tiny_base, device="cpu") as served:
        assert evaluate(served, question, predictions=out)["computes"] == served.computes
    assert asked == ["float32", "float32", *["served, cpu, float32"] * 2]


def test_an_answer_that_cannot_be_computed_ends_the_evaluation(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Engine, prompts: list[list[int]], *_: object, **__: object) -> list[Completion]:
        return [Completion((1,), (), "", "error", "base", "", error="NaN or infinity")] * len(prompts)

    monkeypatch.setattr(Engine, "generate", failing)
    with (
        Served(tiny_base, device="cpu") as served,
        pytest.raises(InvalidCheckpoint, match="the base cannot be measured: NaN or infinity"),
    ):
        served.greedy([[1, 2]], max_new_tokens=4)


@pytest.mark.parametrize(
    "ask",
    [
        lambda served: served.greedy([[5, 6]], max_new_tokens=4),
        lambda served: served.logprobs([Example((5, 6, 7), 1)]),
    ],
    ids=["greedy", "logprobs"],
)
def test_a_set_that_gives_infinity_is_named(
    tiny_base: Path, tunable: TunableModel, ask: Callable[[Served], object]
) -> None:
    broken = random_set(tunable, "channel")
    for tensor in broken.tensors.values():
        tensor.fill_(float("inf"))  # no file could bring it
    with Served(tiny_base, device="cpu") as served:
        served.use(broken)
        with pytest.raises(InvalidCheckpoint, match="the set cannot be measured: the model produced NaN"):
            ask(served)
        served.use(None)
        assert len(served.greedy([[5, 6]], max_new_tokens=4)) == 1, "nothing is left of it"


def test_what_is_measured_may_have_less_room_than_the_model(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Served(tiny_base, device="cpu", longest=20) as served:
        assert served.max_tokens == 20
        assert len(served.logprobs([Example(tuple(range(1, 21)), 1)])[0]) == 19
    monkeypatch.setattr(allocation, "available_memory", lambda _: 200_000)
    with Served(tiny_base, device="cpu") as served:
        assert 2 <= served.max_tokens < 512
        (logprobs,) = served.logprobs([Example((1,) * served.max_tokens, 1)])
        assert len(logprobs) == served.max_tokens - 1
        rows = write_rows(tmp_path / "r.jsonl", {"prompt": "a b " * 200, "completion": "c"})
        question = Question(rows, metric_named("exact-match"))
        with pytest.raises(
            InvalidData, match=rf"of {served.max_tokens}, which is as much as fits into memory; "
        ):
            evaluate(served, question)
    monkeypatch.setattr(allocation, "available_memory", lambda _: 1000)
    with (
        pytest.raises(
            UnsupportedModel, match="too little for keys and values; --compute float32 may do without"
        ),
        opened(tiny_base, "served", "cpu"),
    ):
        pass


def test_a_prompt_that_does_not_fit_the_context_is_named(model: Measured, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "r.jsonl", {"prompt": "a b " * 300, "completion": "c"})
    with pytest.raises(
        InvalidData, match=r"line 1: \d+ prompt tokens and \d+ of the answer exceed the context of 512"
    ):
        evaluate(model, Question(file, metric_named("exact-match")))


def test_rows_that_cannot_be_asked_or_measured_are_named_before_the_first_answer(
    model: Measured, tunable: TunableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for way in (Reference, Served):
        monkeypatch.setattr(way, "greedy", lambda *_, **__: pytest.fail("a row was answered"))
        monkeypatch.setattr(way, "logprobs", lambda *_, **__: pytest.fail("a row was answered"))
    good = {"prompt": "a", "completion": "1", "options": ["1", "2"]}
    long = good | {"prompt": "a b " * 300}
    random_set(tunable, "channel").save(tmp_path / "s.safetensors")
    wordy = replace(random_set(tunable, "channel"), prompt_format="a b " * 300 + "{prompt}")
    wordy.save(tmp_path / "wordy.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    for name, bad, against, message in (
        (
            "exact-match",
            long,
            None,
            r"line 2: \d+ prompt tokens and 1 of the answer exceed the context of 512, which is the model's; short",
        ),
        (
            "multiple-choice",
            long,
            None,
            r"line 2: \d+ prompt tokens and 1 of the answer exceed the context of 512",
        ),
        ("multiple-choice", good | {"options": ["1"]}, None, "line 2: multiple-choice needs 'options'"),
        ("final-number", good | {"completion": "one"}, None, "line 2: final-number needs a number"),
        ("slot-f1", good, None, "line 1: slot-f1 needs a JSON object"),
        (
            "exact-match",
            good,
            "wordy.safetensors",
            r"line 1: \d+ prompt tokens .* 512, which is the model's, and 1 more rows do \(lines 2\)",
        ),
    ):
        file = write_rows(tmp_path / "r.jsonl", good, bad)
        with pytest.raises(InvalidData, match=rf"r\.jsonl, {message}"):
            evaluate(
                model,
                Question(file, metric_named(name), batch_rows=1),
                tmp_path / "s.safetensors",
                against=against and tmp_path / against,
            )
    with pytest.raises(InvalidScaleSet):
        evaluate(model, Question(file, metric_named("exact-match")), against=tmp_path / "broken.safetensors")


def test_a_long_prompt_and_a_long_answer_are_not_asked_together(
    model: Measured, tunable: TunableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fits the context; in one batch the long prompt would leave too little room for the long answer."""
    rows = ({"prompt": "p", "completion": "~" * 400}, {"prompt": "~" * 400, "completion": "c"})
    asked: list[tuple[int, int]] = []

    def answer(model: Measured, prompts: list[list[int]], *, max_new_tokens: int) -> list[str]:
        asked.append((max(map(len, prompts)), max_new_tokens))
        return ["c"] * len(prompts)

    for way in (Reference, Served):
        monkeypatch.setattr(way, "greedy", answer)
    file = write_rows(tmp_path / "r.jsonl", *rows)
    assert evaluate(model, Question(file, metric_named("exact-match")))["correct"] == 1
    (short, much), (long, little) = asked
    assert much >= len(tunable.encode("~" * 400))
    assert little < much
    assert short + much <= 512
    assert long + little <= 512


def test_what_cannot_be_measured_is_said(model: Measured, tmp_path: Path) -> None:
    text, file = tmp_path / "t.txt", write_rows(tmp_path / "r.jsonl", {"prompt": "a", "completion": "b"})
    text.write_text(TEXT)
    perplexity, exact = metric_named("perplexity"), metric_named("exact-match")
    for question, message in (
        (Question(file, perplexity), "perplexity is of plain text"),
        (Question(text, exact), "exact-match is of rows"),
        (Question(text, perplexity, -3), "limit must be at least 1, got -3"),
        (Question(text, perplexity, context=513), "between 2 and 512, which is the model's"),
    ):
        with pytest.raises(InvalidData, match=message):
            evaluate(model, question)
    assert evaluate(model, Question(text, perplexity))["context"] == 512


def test_what_a_metric_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(InvalidData, match="pip install sacrebleu"):
        metric_named("bleu")
    with pytest.raises(InvalidData, match="must be bleu or one of exact-match"):
        metric_named("accuracy")


def test_the_sample_is_seeded_and_may_leave_out_empty_answers() -> None:
    rows = [Row(f"p{i}", "{}" if i % 2 else f'{{"n": {i}}}', i + 1) for i in range(100)]
    picked = sample_rows(rows, 20, seed=3)
    assert picked == sample_rows(rows, 20, seed=3)
    assert picked != sample_rows(rows, 20, seed=4)
    assert len(set(picked)) == 20
    assert all(row.completion != "{}" for row in sample_rows(rows, 20, seed=3, skip_empty=True))
    assert sample_rows(rows, None, seed=3) == rows
    assert sample_rows(rows, 1000, seed=3) == rows
    with pytest.raises(InvalidData, match="no rows are left"):
        sample_rows(rows[1:2], 5, seed=0, skip_empty=True)
