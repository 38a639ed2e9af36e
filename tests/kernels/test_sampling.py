"""Choosing tokens: every build of the C library and torch's operations give what the formulas give."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peqa_kernels import native, sampling
from peqa_kernels.native.isa import usable
from peqa_kernels.sampling import Draw, torch_path
from peqa_kernels.sampling.native_path import NativeSampling
from peqa_kernels.sampling.torch_path import draw_torch, likeliest_torch, row_best_torch

WIDTHS = [1, 5, 16, 1000, 1024, 5003]


@pytest.fixture(params=[build.name for build in usable()])
def rows(request: pytest.FixtureRequest) -> NativeSampling:
    ops = native.load(request.param)
    assert ops is not None, "the C library is not built: python -m peqa_kernels.native.compile"
    return NativeSampling(ops)


def logits_of(count: int, width: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * spread


def draws_of(logits: Tensor, seed: int, **fixed: float) -> list[Draw]:
    """One draw per row, of every mix of filters."""
    rng = random.Random(seed)
    found = []
    for row, best in enumerate(row_best_torch(logits)[0]):
        options: dict[str, float] = {
            "temperature": rng.choice([0.2, 0.7, 1.0, 3.0]),
            "top_k": rng.choice([0, 0, 1, 7, 300, 10**6]),
            "top_p": rng.choice([1.0, 1.0, 0.3, 0.9, 0.99999]),
            "min_p": rng.choice([0.0, 0.0, 0.05, 1e-6, 1.0]),
        }
        found.append(Draw(row, best, rng.random(), **{**options, **fixed}))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_the_best_of_each_row(rows: NativeSampling, width: int) -> None:
    logits = logits_of(7, width)
    logits[3] = logits[3].round()  # equals
    logits[4] = -math.inf
    best, tokens = rows.row_best(logits)
    assert best == logits.amax(-1).tolist()
    assert tokens == [row.tolist().index(row.max()) for row in logits]
    assert rows.row_best(logits[2:3]) == ([best[2]], [tokens[2]])


@pytest.mark.parametrize("at", [0, 17, 4999, 5002])
def test_what_is_not_finite_is_seen_wherever_it_stands(rows: NativeSampling, at: int) -> None:
    logits = logits_of(3, 5003)
    logits[0, at], logits[1, at] = float("nan"), float("inf")
    best, tokens = rows.row_best(logits)
    assert math.isnan(best[0])
    assert (best[1], tokens[1]) == (math.inf, at)
    assert math.isfinite(best[2])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("spread", [0.05, 0.5, 4.0, 30.0])
def test_draws_are_torchs_draws(rows: NativeSampling, width: int, spread: float) -> None:
    """The same number gives the same token; where it falls onto a boundary, rounding may choose the next one."""
    logits = logits_of(60, width, spread=spread)
    draws = draws_of(logits, seed=width)
    found, expected = rows.draw(logits, draws), draw_torch(logits, draws)
    different = [i for i in range(60) if found[i] != expected[i]]
    assert len(different) <= 1, [(draws[i], found[i], expected[i]) for i in different]


def test_a_draw_depends_on_its_row_alone(rows: NativeSampling) -> None:
    logits = logits_of(40, 5003)
    draws = draws_of(logits, seed=1)
    together = rows.draw(logits, draws)
    assert rows.draw(logits, draws[::-1]) == together[::-1]
    for i, draw in enumerate(draws):
        assert rows.draw(logits[i : i + 1], [draw._replace(row=0)]) == [together[i]]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert rows.draw(logits, draws) == together
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.01}])
def test_a_token_of_no_weight_is_never_drawn(
    rows: NativeSampling, uniform: float, filters: dict[str, float]
) -> None:
    logits = torch.full((1, 5003), -math.inf)
    logits[0, [40, 2500, 2501]] = torch.tensor([1.0, 1.5, -200.0])
    draw = Draw(0, 1.5, uniform, 1.0, **filters)  # type: ignore[arg-type]
    assert rows.draw(logits, [draw])[0] in (40, 2500)


def test_top_k_of_one_is_greedy_even_among_almost_equals(rows: NativeSampling) -> None:
    logits = torch.zeros(1, 5003)
    logits[0, 4000] = 1e-9
    for uniform in (0.0, 0.99):
        assert rows.draw(logits, [Draw(0, 1e-9, uniform, 1.0, top_k=1)]) == [4000]


@pytest.mark.parametrize(("top", "width"), [(0, 5003), (1, 5003), (20, 5003), (16, 16), (5, 5), (1, 1)])
@pytest.mark.parametrize("spread", [1e-4, 3.0, 50.0])
def test_the_likeliest_are_topk_and_give_log_probabilities(
    rows: NativeSampling, top: int, width: int, spread: float
) -> None:
    logits = logits_of(9, width, spread=spread)
    picked = [5, 0, 8]
    found = rows.likeliest(logits, picked, top)
    expected = logits[picked].topk(top)
    assert torch.equal(found.logits, expected.values)
    assert torch.equal(logits[picked].gather(1, found.tokens), found.logits)
    assert torch.equal(found.tokens.sort().values, expected.indices.sort().values)
    logprobs = (found.logits.double() - found.best[:, None]) - found.sums.log()[:, None]
    want = torch.log_softmax(logits[picked].double(), -1).gather(1, expected.indices)
    torch.testing.assert_close(logprobs, want, rtol=0, atol=2e-6)
    other = likeliest_torch(logits, picked, top)
    assert torch.equal(other.logits, found.logits)
    torch.testing.assert_close(other.sums, found.sums, rtol=2e-6, atol=0)


def test_of_equals_the_first_tokens_are_listed(rows: NativeSampling) -> None:
    logits = torch.zeros(1, 5003)
    logits[0, ::2] = -0.0
    assert rows.likeliest(logits, [0], 4).tokens.tolist() == [[0, 1, 2, 3]]


def test_masked_tokens_are_listed_last(rows: NativeSampling) -> None:
    logits = torch.full((1, 40), -math.inf)
    logits[0, 30] = 2.0
    found = rows.likeliest(logits, [0], 3)
    assert found.tokens.tolist() == [[30, 0, 1]]
    assert found.logits.tolist() == [[2.0, -math.inf, -math.inf]]


def test_a_row_of_nan_gives_something_and_harms_no_other(rows: NativeSampling) -> None:
    logits = logits_of(3, 100)
    good = rows.likeliest(logits, [0, 2], 5)
    logits[1] = float("nan")
    found = rows.likeliest(logits, [0, 1, 2], 5)
    assert torch.equal(found.tokens[[0, 2]], good.tokens)
    assert ((found.tokens[1] >= 0) & (found.tokens[1] < 100)).all()


def test_the_path_is_chosen_by_what_the_logits_are(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(2, 50)
    assert sampling.row_best(logits.T.contiguous().T) == sampling.row_best(logits)  # not contiguous: torch
    assert sampling.row_best(logits.double())[1] == sampling.row_best(logits)[1]
    monkeypatch.setattr(sampling, "native_sampling", lambda: None)
    draws = draws_of(logits, 0, temperature=1.0)
    assert sampling.draw(logits, draws) == draw_torch(logits, draws)
    assert torch.equal(sampling.likeliest(logits, [1], 3).tokens, logits[1:].topk(3).indices)


class Shapes(TorchDispatchMode):
    """First shapes of the operations that add along rows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("sum", "cumsum", "_softmax", "topk"):
            self.seen.add((name, args[0].shape[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("narrow", [{"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {}])
def test_on_a_gpu_rows_are_computed_in_parts_of_one_size(
    monkeypatch: pytest.MonkeyPatch, narrow: dict[str, float]
) -> None:
    logits = logits_of(11, 1500)
    draws = draws_of(logits, 4, **narrow)
    tokens, likely = draw_torch(logits, draws), likeliest_torch(logits, range(11), 3)
    monkeypatch.setattr(torch_path, "_part_size", lambda rows, like: 4)
    with Shapes() as shapes:
        assert draw_torch(logits, draws) == tokens
        for count in range(1, 12):
            found = likeliest_torch(logits, range(count), 3)
            assert all(torch.equal(a, b[:count]) for a, b in zip(found, likely, strict=True))
            assert draw_torch(logits, draws[:count]) == tokens[:count]
    names = {name for name, _ in shapes.seen}
    assert names >= {"sum", "cumsum", "_softmax", "topk"}
    alone = set() if narrow else {("sum", 1), ("cumsum", 1)}  # rows sorted whole, each by itself
    assert shapes.seen - alone == {(name, 4) for name in names}


def test_the_device_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at a result waits for a GPU: one for the best tokens, one for a part that draws."""
    logits, looks = logits_of(11, 1500), []
    plain = draws_of(logits, 4, top_k=0, top_p=1.0, min_p=0.0)
    narrowed = draws_of(logits, 4, top_k=40)
    look = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: looks.append(tensor) or look(tensor))
    monkeypatch.setattr(Tensor, "item", lambda tensor: pytest.fail("a look at one number"))
    for work, most in (
        (lambda: row_best_torch(logits), 1),
        (lambda: draw_torch(logits, plain), 1),
        (lambda: draw_torch(logits, narrowed), 1),
        (lambda: draw_torch(logits, [*plain, *narrowed]), 2),
    ):
        looks.clear()
        work()
        assert len(looks) == most
