"""Perplexity, exact match and log-probabilities, each against a plain computation of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peqa_runtime.core import ScaleKind
from peqa_runtime.errors import InvalidData
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.set_layout import expected_shapes
from peqa_runtime.training.evaluate import (
    ExactMatch,
    Prediction,
    completion_logprobs,
    exact_match,
    greedy,
    perplexity,
    sample_rows,
    token_logprobs,
)
from peqa_runtime.training.rows import Row
from peqa_runtime.training.tuning import TunableModel, apply_scale_set, load_tunable

TEXT = "The cat sat on the mat. " * 12


@pytest.fixture
def tunable(tiny_base: Path) -> TunableModel:
    torch.set_num_threads(1)
    return load_tunable(tiny_base, device="cpu")


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


def test_perplexity_is_over_windows_that_do_not_overlap(tunable: TunableModel) -> None:
    ids = tunable.encode(TEXT)
    losses: list[float] = []
    for start in range(0, len(ids), 40):
        window = ids[start : start + 40]
        logprobs = plain_logprobs(tunable, window)
        losses += [-logprobs[i - 1, window[i]].item() for i in range(1, len(window))]
    found = perplexity(tunable, TEXT, context=40)
    assert found.windows == math.ceil(len(ids) / 40) > 2
    assert found.tokens == len(losses) == len(ids) - found.windows
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert perplexity(tunable, TEXT, context=40, limit=1).tokens == 39
    with pytest.raises(InvalidData, match="context must be between 2 and the model's 512"):
        perplexity(tunable, TEXT, context=600)


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


def test_greedy_takes_the_most_likely_token_whatever_is_in_the_batch(tunable: TunableModel) -> None:
    prompts = [tunable.encode(text) for text in ("a", "a longer one", "and the longest of all prompts")]
    together = greedy(tunable, prompts, max_new_tokens=6)
    for prompt, answer in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(plain_logprobs(tunable, ids)[-1].argmax()))
            if ids[-1] == tunable.eos_token_id:
                break
        new = [i for i in ids[len(prompt) :] if i != tunable.eos_token_id]
        assert answer == tunable.tokenizer.decode(new)


def test_exact_match_counts_equal_answers_only(
    tunable: TunableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"ab": "yes", "cd": "no\n", "longer prompt": "yes!"}

    def scripted(model: TunableModel, prompts: list[list[int]], *, max_new_tokens: int) -> list[str]:
        assert max_new_tokens > len("yes")
        return [answers[str(model.tokenizer.decode(p)).removeprefix("Q: ")] for p in prompts]

    monkeypatch.setattr("peqa_runtime.training.evaluate.greedy", scripted)
    rows = [Row("longer prompt", "yes", 3), Row("ab", "yes", 4), Row("cd", "no", 5)]
    match = exact_match(tunable, rows, prompt_format="Q: {prompt}", batch_rows=2)
    assert [(p.line, p.correct) for p in match.predictions] == [(3, False), (4, True), (5, True)]
    assert match.percent == pytest.approx(200 / 3)


def test_white_space_around_an_answer_does_not_count() -> None:
    pairs = [("a b", " a b\n"), ("a b", "a  b"), ("A", "a")]
    match = ExactMatch(tuple(Prediction(i, "p", want, got) for i, (want, got) in enumerate(pairs)))
    assert [p.correct for p in match.predictions] == [True, False, False]
    assert match.percent == pytest.approx(100 / 3)


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
