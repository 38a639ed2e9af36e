"""Batches of training: rows of several tasks, packed rows, shares of processes; each gradient that of the plain way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from peqa_runtime.core import ScaleKind
from peqa_runtime.errors import UnsupportedModel
from peqa_runtime.training.batches import StepBatches, collate, pack_rows
from peqa_runtime.training.data import Example
from peqa_runtime.training.packing import check_packing
from peqa_runtime.training.tuning import TunableModel, load_tunable, logits_at, start_tuning, tuned_scales

LENGTHS = ([5, 9, 3, 12], [7, 2, 30])


@pytest.fixture
def tunable(tiny_base: Path) -> TunableModel:
    torch.set_num_threads(1)
    return load_tunable(tiny_base, device="cpu")


def examples(task: int, lengths: list[int]) -> list[Example]:
    generator = torch.Generator().manual_seed(task)
    return [
        Example(tuple(torch.randint(1, 200, (n,), generator=generator).tolist()), max(1, n // 2))
        for n in lengths
    ]


def randomize(tunable: TunableModel, kind: ScaleKind, sets: int) -> None:
    start_tuning(tunable, kind, sets)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for task in range(sets):
            for scale in tuned_scales(tunable.model, task).values():
                scale.copy_(0.8 + 0.4 * torch.rand(scale.shape, generator=generator))


def gradients(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    for p in parameters.values():
        p.grad = None
    return found


def step_loss(tunable: TunableModel, item: dict[str, Tensor]) -> Tensor:
    tunable.parts.parts = tuple((int(t), int(n)) for t, n in item["parts"].tolist())
    logits = logits_at(tunable.model, item["input_ids"], item["positions"], item.get("position_ids"))
    return (functional.cross_entropy(logits, item["targets"], reduction="none") * item["weights"]).sum()


def alone_gradient(tunable: TunableModel, task: int, rows: list[Example]) -> dict[str, Tensor]:
    """Of the mean loss over all loss tokens, each example on its own, under set `task`."""
    total = sum(len(e.token_ids) - e.loss_from for e in rows)
    for example in rows:
        batch = collate([example], 0)
        tunable.parts.parts = ((task, batch.input_ids.numel()),)
        logits = logits_at(tunable.model, batch.input_ids, batch.positions)
        (functional.cross_entropy(logits, batch.targets, reduction="sum") / total).backward()
    return gradients(tuned_scales(tunable.model, task))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).norm() / tensor.norm()
        assert error < 1e-4, f"{name}: {error}"


@pytest.mark.parametrize("kind", ["channel", "channel+input", "group"])
@pytest.mark.parametrize("pack", [0, 40])
def test_each_task_of_a_mixed_batch_gets_the_gradient_that_it_has_alone(
    tunable: TunableModel, kind: ScaleKind, pack: int
) -> None:
    tasks = [examples(task, lengths) for task, lengths in enumerate(LENGTHS)]
    randomize(tunable, kind, 2)
    expected = [alone_gradient(tunable, task, rows) for task, rows in enumerate(tasks)]
    plans = [[tuple(range(len(rows)))] for rows in tasks]
    step_loss(tunable, StepBatches(tasks, plans, 0, pack=pack)[0]).backward()
    for task in range(2):
        assert_close(gradients(tuned_scales(tunable.model, task)), expected[task])


@pytest.mark.parametrize("shares", [2, 6])
def test_shares_of_a_step_add_up_to_the_step(tunable: TunableModel, shares: int) -> None:
    """Six shares are more than the rows of the second task: some compute a row at weight 0."""
    tasks = [examples(task, lengths) for task, lengths in enumerate(LENGTHS)]
    plans = [[tuple(range(len(rows)))] * 2 for rows in tasks]
    randomize(tunable, "channel", 2)
    whole = StepBatches(tasks, plans, 0)
    step_loss(tunable, whole[1]).backward()
    expected = [gradients(tuned_scales(tunable.model, task)) for task in range(2)]
    parts = StepBatches(tasks, plans, 0, shares=shares)
    assert len(parts) == 2 * shares
    for item in range(shares, 2 * shares):
        step_loss(tunable, parts[item]).backward()
    for task in range(2):
        assert_close(gradients(tuned_scales(tunable.model, task)), expected[task])


def test_a_packed_example_does_not_see_its_neighbours(tunable: TunableModel) -> None:
    """Its logits keep their bits whatever stands in the same row before and after it."""
    start_tuning(tunable, "channel")
    middle = examples(3, [8])[0]
    found: list[Tensor] = []
    for seed in (4, 5):
        before, after = examples(seed, [10, 6])
        batch = collate([before, middle, after], 0, pack=32)
        assert batch.input_ids.shape[0] == 1
        with torch.no_grad():
            logits = logits_at(tunable.model, batch.input_ids, batch.positions, batch.position_ids)
        found.append(logits[batch.owners == 1])
    assert torch.equal(found[0], found[1])
    alone = collate([middle], 0)
    with torch.no_grad():
        expected = logits_at(tunable.model, alone.input_ids, alone.positions)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_does_not_keep_packed_examples_apart_is_refused(
    tunable: TunableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_packing(tunable)
    forward = tunable.model.forward

    def deaf(*args: object, position_ids: Tensor | None = None, **kwargs: object) -> object:
        return forward(*args, **kwargs)

    monkeypatch.setattr(tunable.model, "forward", deaf)
    with pytest.raises(UnsupportedModel, match="keep packed examples apart"):
        check_packing(tunable)


def test_packed_rows_hold_every_example_once_within_the_width() -> None:
    lengths = [7, 3, 3, 20, 1, 9]
    rows = pack_rows(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(6))
    assert all(sum(lengths[i] for i in row) <= 10 or len(row) == 1 for row in rows)
    assert len(rows) == 4
