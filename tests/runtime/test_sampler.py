"""The sampler: each row by itself, reproducible, the distribution that was asked for."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from peqa_runtime.core import Request
from peqa_runtime.engine import sampler as sampler_module
from peqa_runtime.engine.batch import Batch, ScheduledSequence, StepResult
from peqa_runtime.engine.logit_rows import logit_positions
from peqa_runtime.engine.sampler import Sampler, uniform
from peqa_runtime.engine.sequence import Sequence
from peqa_runtime.errors import InvalidRequest
from peqa_runtime.sampling_params import MAX_STOP_TOKENS, SamplingParams

VOCAB = 2000
EOS = 1


def sequence(
    seed: int = 0, prompt: tuple[int, ...] = (5, 6, 7), generated: int = 0, **params: object
) -> Sequence:
    request = Request("r", prompt, SamplingParams(**{"max_tokens": 100, **params}))  # type: ignore[arg-type]
    return Sequence(request, list(prompt) + [9] * generated, seed=seed)


def share(s: Sequence, start: int | None = None) -> ScheduledSequence:
    start = s.num_tokens - 1 if start is None else start
    return ScheduledSequence(s, start, s.num_tokens - start)


def run(logits: Tensor, *items: ScheduledSequence) -> list[StepResult]:
    return Sampler((EOS,)).sample(Batch(tuple(items)), logits.clone())


def one(logits: Tensor, **params: object) -> StepResult:
    return run(logits[None], share(sequence(**params)))[0]  # type: ignore[arg-type]


def random_logits(rows: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def test_uniform_is_spread_and_fixed() -> None:
    numbers = [uniform(seed, position) for seed in range(-50, 50) for position in range(100)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= n < 1 for n in numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.01
    assert uniform(42, 7) == 0.8614033402518924  # a seed keeps its meaning across releases


def test_greedy_takes_the_best() -> None:
    logits = random_logits(3)
    out = run(logits, *(share(sequence(temperature=0.0)) for _ in range(3)))
    assert [r.token_id for r in out] == logits.argmax(-1).tolist()


def test_only_rows_that_are_needed_are_asked_for() -> None:
    prompt = (1, 2, 3, 4)
    assert list(logit_positions(share(sequence(prompt=prompt), 0))) == [3]
    assert list(logit_positions(ScheduledSequence(sequence(prompt=prompt), 0, 2))) == [1], "is it finite?"
    assert list(logit_positions(share(sequence(prompt=prompt, max_tokens=0), 0))) == [3]
    scored = sequence(prompt=prompt, max_tokens=0, prompt_logprobs=0)
    assert list(logit_positions(share(scored, 0))) == [0, 1, 2, 3]
    assert list(logit_positions(ScheduledSequence(scored, 0, 2))) == [0, 1]
    assert list(logit_positions(share(sequence(prompt=prompt, prompt_logprobs=0), 1))) == [1, 2, 3]


KINDS: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"top_p": 0.999},
    {"min_p": 0.02},
    {"top_k": 1000, "top_p": 0.95, "min_p": 0.001},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.2, "generated": 3},
    {"min_tokens": 5, "logprobs": 3},
    {"logprobs": 20},
]


@pytest.mark.parametrize(
    "width", [VOCAB, 49_152]
)  # torch splits a wide single row among threads in some sums
def test_a_row_does_not_depend_on_its_neighbours(width: int) -> None:
    count = 40 if width == VOCAB else len(KINDS)
    logits = torch.randn(count, width, generator=torch.Generator().manual_seed(0)) * 2
    items = [share(sequence(seed=i, **KINDS[i % len(KINDS)])) for i in range(count)]  # type: ignore[arg-type]
    together = run(logits, *items)
    backwards = run(logits.flip(0), *reversed(items))[::-1]
    alone = [run(logits[i : i + 1], items[i])[0] for i in range(count)]
    assert together == backwards == alone


def test_the_seed_and_the_position_make_the_choice() -> None:
    logits = random_logits(1, spread=1.0)[0]
    by_seed = {one(logits, seed=seed).token_id for seed in range(20)}
    by_position = {one(logits, seed=1, generated=n).token_id for n in range(20)}
    assert len(by_seed) > 10
    assert len(by_position) > 10
    assert one(logits, seed=3) == one(logits, seed=3)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 8, "top_p": 0.9, "min_p": 0.3},
    ],
)
def test_the_distribution_is_the_one_asked_for(params: dict[str, float]) -> None:
    size = 200
    logits = torch.full((size,), -40.0)
    logits[100:110] = torch.linspace(2.0, 0.0, 10)
    p = torch.softmax(logits.double() / params.get("temperature", 1.0), -1)
    order = p.argsort(descending=True)
    kept = torch.zeros(size, dtype=torch.bool)
    total = p[order[: int(params.get("top_k", size))]].sum()
    mass = 0.0
    for rank, token in enumerate(order.tolist()):
        if rank >= params.get("top_k", size) or mass >= params.get("top_p", 1.1) * total:
            break
        if p[token] >= params.get("min_p", 0.0) * p[order[0]]:
            kept[token] = True
        mass += p[token]
    want = p * kept / (p * kept).sum()
    n = 2000
    rows = run(logits.expand(n, -1), *(share(sequence(seed=i, **params)) for i in range(n)))  # type: ignore[arg-type]
    seen = Counter(r.token_id for r in rows)
    for token in range(100, 110):
        share_of = float(want[token])
        assert abs(seen[token] / n - share_of) < 4.5 * math.sqrt(share_of * (1 - share_of) / n) + 1e-9, token
    assert sum(seen[t] for t in range(100, 110)) == n


@pytest.mark.parametrize(
    "params", [{"top_p": 0.9}, {"min_p": 1e-3}, {"top_k": 700}, {"top_k": 700, "top_p": 0.9}]
)
def test_a_flat_distribution_is_narrowed_over_the_whole_vocabulary(params: dict[str, object]) -> None:
    logits = torch.zeros(VOCAB)
    logits += torch.arange(VOCAB) * 1e-6
    keep = {"top_p": 0.9 * VOCAB, "min_p": VOCAB, "top_k": 700}
    expected = 630 if len(params) == 2 else keep[next(iter(params))]
    items = [share(sequence(seed=i, **params)) for i in range(300)]  # type: ignore[arg-type]
    tokens = {r.token_id for r in run(logits.expand(300, -1), *items)}
    assert min(t for t in tokens if t is not None) >= VOCAB - expected - 1
    assert len(tokens) > 200, "all over the range, not only its top"


def test_a_top_k_beyond_the_vocabulary_takes_every_token() -> None:
    logits = random_logits(1, spread=1.0)[0]
    for top_k in (VOCAB, VOCAB + 1, 2**80):  # the last does not fit the C library's integers
        assert [one(logits, seed=i, top_k=top_k) for i in range(20)] == [
            one(logits, seed=i) for i in range(20)
        ]


def test_penalties_follow_their_formulas() -> None:
    logits = torch.zeros(VOCAB)
    logits[[5, 9, 20]] = torch.tensor([3.0, 2.9, 2.0])
    penal = {"temperature": 0.0, "prompt": (5, 6), "generated": 2}
    assert one(logits, **penal).token_id == 5
    # 5 (prompt) 3/1.6 = 1.875, 9 (output) 2.9/1.6 < 1.875, 20 untouched
    assert one(logits, repetition_penalty=1.6, **penal).token_id == 20
    logits[5] = 0.0  # output penalties leave prompt tokens alone: 9 stands twice in the output
    assert one(logits, frequency_penalty=0.4, **penal).token_id == 9  # 2.9 - 0.8 = 2.1 > 2.0
    assert one(logits, frequency_penalty=0.5, **penal).token_id == 20  # 2.9 - 1.0 = 1.9
    assert one(logits, presence_penalty=0.8, **penal).token_id == 9  # once, however often
    assert one(logits, presence_penalty=1.0, **penal).token_id == 20
    negative = torch.full((VOCAB,), -4.0)
    negative[9] = -1.0
    negative[20] = -1.5  # a negative logit is multiplied, so that the penalty lowers it too
    assert one(negative, repetition_penalty=1.6, **penal).token_id == 20


def test_min_tokens_holds_back_every_end() -> None:
    logits = torch.zeros(VOCAB)
    logits[[EOS, 30, 40]] = torch.tensor([9.0, 8.0, 7.0])
    params = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (30,)}
    assert one(logits, generated=1, **params).token_id == 40
    assert one(logits, generated=2, **params).token_id == EOS
    assert one(logits, generated=1, ignore_eos=True, **params).token_id == EOS  # no end then: not held back


def test_min_tokens_keeps_each_row_to_its_own_ends() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[:, [EOS, 30, 40, 50]] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    greedy = {"temperature": 0.0, "min_tokens": 2}
    ends: list[dict[str, object]] = [
        {"stop_token_ids": (30, 40)}, {}, {"ignore_eos": True}, {"ignore_eos": True, "stop_token_ids": (EOS,)},
    ]  # fmt: skip
    items = [share(sequence(**greedy, **params)) for params in ends]  # type: ignore[arg-type]
    assert [r.token_id for r in run(logits, *items)] == [50, 30, EOS, 30]


def test_the_ends_of_a_sequence_are_put_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    make = sampler_module._index

    def index(numbers: list[int], like: Tensor) -> Tensor:
        counted.append(len(numbers))
        return make(numbers, like)

    monkeypatch.setattr(sampler_module, "_index", index)
    batch = Batch((share(sequence(min_tokens=9, stop_token_ids=tuple(range(100, 1100)))),))
    sampler = Sampler((EOS,))
    sampler.sample(batch, random_logits(1))
    assert max(counted) > 1000
    counted.clear()
    sampler.sample(batch, random_logits(1))
    assert sum(counted) < 10


@pytest.mark.parametrize("field", ["stop_token_ids", "logprob_token_ids"])
def test_too_many_tokens_are_refused_in_few_words(field: str) -> None:
    fields: dict[str, Any] = {"logprobs": 1, field: tuple(range(MAX_STOP_TOKENS))}
    SamplingParams(**fields)
    with pytest.raises(InvalidRequest, match=f"{field} must be at most 1024 token ids.*, got 1025 of them$"):
        SamplingParams(**fields | {field: tuple(range(MAX_STOP_TOKENS + 1))})


def test_tokens_asked_for_by_name_are_reported_with_the_same_floats() -> None:
    logits = random_logits(1)[0]
    want = logits.topk(3).indices.tolist()
    rare = int(logits.argmin())
    ids = (rare, want[1], rare)
    result = one(logits, temperature=0.0, logprobs=2, logprob_token_ids=ids, logit_bias=((rare, 100.0),))
    assert result.logprobs is not None
    assert result.token_id == rare, "the bias chooses"
    assert [token for token, _ in result.logprobs.asked] == list(ids)
    assert result.logprobs.asked[0][1] == result.logprobs.logprob == result.logprobs.asked[2][1]
    assert result.logprobs.asked[1] == result.logprobs.top[1], "the model's own values, before the bias"
    with pytest.raises(InvalidRequest, match="logprob_token_ids"):
        SamplingParams(logprob_token_ids=(1,))


def test_logprobs_are_the_models_own_and_the_same_floats() -> None:
    logits = random_logits(1)[0]
    best = int(logits.argmax())
    result = one(logits, temperature=0.0, logprobs=4, repetition_penalty=1.01)
    assert result.logprobs is not None
    assert result.logprobs.top[0] == (best, result.logprobs.logprob)
    want = torch.log_softmax(logits, -1)
    assert result.logprobs.logprob == pytest.approx(float(want[best]), abs=1e-5)
    assert [t for t, _ in result.logprobs.top] == want.topk(4).indices.tolist()
    assert one(logits, temperature=0.0, logprobs=0).logprobs.top == ()  # type: ignore[union-attr]
    assert one(logits, temperature=0.0).logprobs is None


def test_among_equals_the_chosen_token_is_listed() -> None:
    logits = torch.zeros(VOCAB)
    for seed in range(5):
        result = one(logits, seed=seed, logprobs=1)
        assert result.logprobs is not None
        assert result.logprobs.top == ((result.token_id, result.logprobs.logprob),)


def test_prompt_logprobs_of_every_position_of_the_share() -> None:
    prompt = (5, 6, 7, 8)
    logits = random_logits(4)
    s = sequence(prompt=prompt, prompt_logprobs=2, logprobs=1, temperature=0.0)
    other = sequence(seed=1)
    result, _ = run(torch.cat([logits, random_logits(1, 1)]), share(s, 0), share(other))
    want = torch.log_softmax(logits, -1)
    assert [p.token_id for p in result.prompt_logprobs] == [6, 7, 8]
    for i, entry in enumerate(result.prompt_logprobs):
        assert entry.logprob == pytest.approx(float(want[i, prompt[i + 1]]), abs=1e-5)
        assert [t for t, _ in entry.top] == want[i].topk(2).indices.tolist()
        likeliest_first = logits[i].argsort(descending=True).tolist()
        assert entry.rank == 1 + likeliest_first.index(prompt[i + 1])
    assert result.token_id == int(logits[3].argmax())
    assert result.logprobs is not None
    assert len(result.logprobs.top) == 1
    assert result.logprobs.rank is None, "nobody sees a generated token's"


def test_equally_likely_prompt_tokens_have_the_same_rank() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 9] = 1.0
    (result,) = run(
        torch.cat([logits, random_logits(1)]), share(sequence(prompt=(5, 9, 7), prompt_logprobs=0), 0)
    )
    assert [entry.rank for entry in result.prompt_logprobs] == [1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"logprobs": 2}])
def test_a_bad_row_is_named_and_the_others_are_untouched(bad: float, params: dict[str, object]) -> None:
    logits = random_logits(3)
    items = [share(sequence(seed=i, **params)) for i in range(3)]  # type: ignore[arg-type]
    good = run(logits, *items)
    logits[1, 77] = bad
    mixed = run(logits, *items)
    assert not mixed[1].finite
    assert mixed[1].token_id is None
    assert (mixed[0], mixed[2]) == (good[0], good[2])


def test_a_bad_prompt_row_is_named_too() -> None:
    logits = random_logits(3)
    logits[0, 0] = float("nan")
    assert not run(logits, share(sequence(prompt_logprobs=0), 0))[0].finite
    assert not run(torch.full((1, VOCAB), -math.inf), share(sequence()))[0].finite


def test_a_masked_logit_is_no_error() -> None:
    logits = random_logits(1)[0]
    logits[::2] = -math.inf
    tokens = {one(logits, seed=i).token_id for i in range(50)}
    assert all(t is not None and t % 2 == 1 for t in tokens)


@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_the_strongest_penalties_leave_numbers(penalty: float) -> None:
    logits = random_logits(1)[0] * 50
    assert one(logits, temperature=0.0, repetition_penalty=penalty, generated=3).finite
    for beyond in (penalty / 2, penalty * 2):
        if not 0.01 <= beyond <= 100:
            with pytest.raises(InvalidRequest, match=r"between 0\.01 and 100"):
                SamplingParams(repetition_penalty=beyond)
