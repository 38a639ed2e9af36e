"""Biases, allowed tokens, bad words and forms on rows of logits: each row by itself, log-probabilities untouched."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from peqa_runtime.constraint import Constraint
from peqa_runtime.core import Request
from peqa_runtime.engine.batch import Batch, ScheduledSequence, StepResult
from peqa_runtime.engine.grammar_probe import CPU_SECONDS, check
from peqa_runtime.engine.guidance import Guidance
from peqa_runtime.engine.request_check import check_request
from peqa_runtime.engine.sampler import Sampler, uniform
from peqa_runtime.engine.sequence import Sequence
from peqa_runtime.errors import InvalidRequest
from peqa_runtime.sampling_params import SamplingParams

VOCAB = 300
EOS = 0


def share(generated: tuple[int, ...] = (), seed: int = 0, **params: Any) -> ScheduledSequence:
    request = Request("r", (5, 6, 7), SamplingParams(**{"max_tokens": 50, "temperature": 0.0, **params}))
    sequence = Sequence(request, [5, 6, 7, *generated], seed=seed)
    return ScheduledSequence(sequence, sequence.num_tokens - 1, 1)


def run(logits: Tensor, *items: ScheduledSequence, guidance: Guidance | None = None) -> list[StepResult]:
    return Sampler((EOS,), guidance).sample(Batch(tuple(items)), logits.clone())


def random_logits(rows: int) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3)) * 2


@pytest.fixture(scope="module")
def guidance(tiny_base: Any) -> Guidance:
    return Guidance(AutoTokenizer.from_pretrained(tiny_base), VOCAB, (EOS,))


def test_a_bias_is_added_before_penalties() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 9], logits[0, 8] = 3.0, 2.5
    assert run(logits, share(logit_bias=((8, 1.0),)))[0].token_id == 8
    assert run(logits, share(logit_bias=((9, -100.0),)))[0].token_id == 8
    # 5 stands in the prompt: (0 + 4) / 2 = 2 is less than 9's 3, but 4 would not be.
    assert run(logits, share(logit_bias=((5, 4.0),), repetition_penalty=2.0))[0].token_id == 9
    drawn = Counter(
        run(torch.zeros(1, VOCAB), share(seed=i, temperature=1.0, logit_bias=((8, math.log(299)),)))[
            0
        ].token_id
        for i in range(400)
    )
    assert 150 < drawn[8] < 250  # as likely as all others together


def test_only_allowed_tokens_are_chosen() -> None:
    logits = random_logits(1)
    best = int(logits[0, [20, 30, 40]].argmax())
    assert run(logits, share(allowed_token_ids=(20, 30, 40)))[0].token_id == (20, 30, 40)[best]
    ways: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 3.0, "top_p": 0.9},
        {"temperature": 3.0, "top_k": 2},
    ]
    for way in ways:
        seen = {run(logits, share(seed=i, allowed_token_ids=(20, 30), **way))[0].token_id for i in range(30)}
        assert seen <= {20, 30}


def test_a_bad_word_is_broken_off_at_its_last_token() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [9, 8, 4]] = torch.tensor([3.0, 2.0, 1.0])
    assert run(logits, share(bad_words=((9,),)))[0].token_id == 8
    assert run(logits, share((1, 2), bad_words=((1, 2, 9),)))[0].token_id == 8
    assert run(logits, share((2, 1), bad_words=((1, 2, 9), (1, 8))))[0].token_id == 9
    assert run(logits, share((1, 2), bad_words=((1, 2, 9), (2, 8), (4,))))[0].token_id not in (9, 8, 4)
    assert run(logits, share((), bad_words=((7, 9),)))[0].token_id == 9  # 7 is the prompt's


def test_logprobs_are_those_before_the_rules() -> None:
    logits = random_logits(1)
    want = torch.log_softmax(logits[0], -1)
    for rules in ({"logit_bias": ((33, 50.0),)}, {"allowed_token_ids": (33,)}):
        result = run(logits, share(logprobs=4, **rules))[0]
        assert result.logprobs is not None
        assert result.token_id == 33
        assert result.logprobs.logprob == pytest.approx(float(want[33]), abs=1e-5)
        assert [t for t, _ in result.logprobs.top] == want.topk(4).indices.tolist()


def test_what_the_rules_leave_empty_is_no_fault_of_the_model() -> None:
    logits = random_logits(2)
    refused, free = run(logits, share(allowed_token_ids=(9,), bad_words=((7, 9), (9,))), share())
    assert refused.token_id is None
    assert refused.finite
    assert "no token is left" in str(refused.refusal)
    assert free == run(logits[1:], share())[0]
    spoiled = logits.clone()
    spoiled[0] = float("nan")
    assert not run(spoiled, share(allowed_token_ids=(9,)), share())[0].finite


def test_rows_without_rules_keep_their_bits_beside_rows_with_them(guidance: Guidance) -> None:
    logits = random_logits(12)
    free = [share(seed=i, temperature=(i % 3) * 0.7, logprobs=i % 2 or None) for i in range(6)]
    ruled = [
        share(seed=i, temperature=(i % 3) * 0.7, structured=Constraint.regex("[a-f]+"), bad_words=((70,),))
        for i in range(6)
    ]
    mixed = run(logits, *(item for pair in zip(free, ruled, strict=True) for item in pair), guidance=guidance)
    assert mixed[::2] == run(logits[::2], *free)
    assert mixed[1::2] == [run(logits[2 * i + 1 :][:1], r, guidance=guidance)[0] for i, r in enumerate(ruled)]


@pytest.mark.parametrize("params", [{}, {"top_k": 250}])
def test_the_distribution_is_that_of_the_allowed_tokens(guidance: Guidance, params: dict[str, Any]) -> None:
    """Free choice with a second one behind it (no top_k), and a mask from the start, give the same distribution."""
    logits = torch.linspace(1.0, -1.0, VOCAB)[
        torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))
    ]
    letters = [guidance._tokenizer(c)["input_ids"][0] for c in "abcd"]
    want = torch.softmax(logits[letters].double(), -1)
    form, n = Constraint.regex("[a-d]"), 1500
    items = [share(seed=i, temperature=1.0, structured=form, **params) for i in range(n)]
    seen = Counter(r.token_id for r in run(logits.expand(n, -1), *items, guidance=guidance))
    assert set(seen) == set(letters)
    for letter, p in zip(letters, want.tolist(), strict=True):
        assert abs(seen[letter] / n - p) < 4.5 * math.sqrt(p * (1 - p) / n), letter


def test_a_second_attempt_has_a_number_of_its_own() -> None:
    pairs = [(uniform(seed, 7), uniform(seed, 7, 1)) for seed in range(500)]
    assert len({number for pair in pairs for number in pair}) == 1000
    mean = [sum(column) / 500 for column in zip(*pairs, strict=True)]
    assert (
        abs(sum((a - mean[0]) * (b - mean[1]) for a, b in pairs) / 500) < 0.015
    )  # 1/12 where they were equal


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"logit_bias": ((1, 101.0),)}, "logit_bias"),
        ({"logit_bias": ((1, float("nan")),)}, "logit_bias"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "logit_bias"),
        ({"logit_bias": tuple((i, 1.0) for i in range(1025))}, "logit_bias"),
        ({"allowed_token_ids": ()}, "allowed_token_ids"),
        ({"bad_words": ((),)}, "bad_words"),
        ({"bad_words": (tuple(range(65)),)}, "bad_words"),
        ({"bad_words": tuple((i,) for i in range(1025))}, "bad_words"),
        ({"logit_bias": ((VOCAB, 1.0),)}, "logit_bias"),
        ({"allowed_token_ids": (1, -1)}, "allowed_token_ids"),
        ({"bad_words": ((1, VOCAB),)}, "bad_words"),
        ({"allowed_token_ids": (4,), "bad_words": ((4,),)}, "allowed_token_ids"),
        ({"allowed_token_ids": (EOS, 4), "min_tokens": 1, "stop_token_ids": (4,)}, "allowed_token_ids"),
    ],
)
def test_wrong_rules_are_refused_by_name(params: dict[str, Any], field: str) -> None:
    model = SimpleNamespace(vocab_size=VOCAB, eos_token_ids=(EOS,))
    with pytest.raises(InvalidRequest) as caught:
        check_request(Request("r", (1,), SamplingParams(**params)), model, 100)
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            Constraint.json_schema(
                {"allOf": [{"type": "string", "pattern": f"a{{{i}}}.*"} for i in range(60)]}
            ),
            "longer|memory",
        ),
        (Constraint.regex("(a{1000}){1000}"), "memory"),
        (Constraint.regex("(a"), "unclosed"),
    ],
)
def test_what_takes_too_much_to_compile_is_ended_in_a_process_of_its_own(
    form: Constraint, message: str
) -> None:
    assert CPU_SECONDS <= 2
    check(Constraint.json_object())
    with pytest.raises(InvalidRequest, match=message):
        check(form)


@pytest.mark.parametrize(
    ("code", "stderr", "error", "message"),
    [
        (-6, b"memory allocation of 9 bytes failed", InvalidRequest, "memory"),
        (1, b"Traceback ... MemoryError", InvalidRequest, "memory"),
        (1, b"No module named peqa_runtime", RuntimeError, "No module"),
    ],
)
def test_how_the_process_ended_says_whose_fault_it_was(
    monkeypatch: pytest.MonkeyPatch, code: int, stderr: bytes, error: type[Exception], message: str
) -> None:
    import peqa_runtime.engine.grammar_probe as probe

    done = SimpleNamespace(returncode=code, stdout=b"", stderr=stderr)
    monkeypatch.setattr(probe.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(error, match=message):
        check(Constraint.json_object())
