"""What a graph is given: which bucket, which numbers at which addresses, and how much memory is left for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from peqa_kernels.paged_attention.tiles import most_splits
from peqa_runtime.core import Request
from peqa_runtime.engine import allocation, graph_setup
from peqa_runtime.engine.allocation import bound_kv_cache
from peqa_runtime.engine.batch import ScheduledSequence
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.graph_plan import FIRST_REACH, Bucket, GraphPlan, graph_bytes
from peqa_runtime.engine.sequence import Sequence
from peqa_runtime.engine.static_inputs import StaticInputs
from peqa_runtime.engine.step_inputs import StepInputs
from peqa_runtime.model.loader import load
from peqa_runtime.sampling_params import SamplingParams

SCRATCH = 9
VOCAB = 1000


def test_buckets_are_powers_of_two_up_to_the_engines_own_sizes() -> None:
    assert GraphPlan.of(1, 100) == GraphPlan((1,), (100,))
    assert GraphPlan.of(2, 100).sizes == (1, 2)
    assert GraphPlan.of(48, FIRST_REACH) == GraphPlan((1, 2, 4, 8, 16, 32, 48), (FIRST_REACH,))
    assert GraphPlan.of(64, FIRST_REACH + 1) == GraphPlan(
        (1, 2, 4, 8, 16, 32, 64), (FIRST_REACH, FIRST_REACH + 1)
    )


def test_the_smallest_bucket_that_is_enough() -> None:
    plan = GraphPlan.of(6, 8000)
    assert plan.find(1, 1) == Bucket(1, FIRST_REACH)
    assert plan.find(3, FIRST_REACH, grouped=True) == Bucket(4, FIRST_REACH, grouped=True)
    assert plan.find(5, FIRST_REACH + 1) == Bucket(6, 8000)
    assert plan.find(7, 1) is plan.find(1, 8001) is None
    assert plan.buckets[0] == Bucket(6, 8000), "what the largest takes serves all"
    assert len(plan.buckets) == len(set(plan.buckets)) == 8


def test_the_first_reach_is_a_whole_level_of_attentions_splits() -> None:
    assert most_splits(FIRST_REACH, None) == 16
    assert most_splits(FIRST_REACH + 1, None) > 16


def decoding(tokens: list[int], table: list[int], row: int = 0, group_row: int = 0) -> ScheduledSequence:
    request = Request("r", (tokens[0],), SamplingParams(max_tokens=99))
    sequence = Sequence(request, tokens, block_table=table, row=row, group_row=group_row)
    return ScheduledSequence(sequence, len(tokens) - 1, 1)


def numbers(inputs: StepInputs) -> dict[str, object]:
    context = inputs.context
    assert inputs.row is not None
    return {
        "ids": inputs.ids.tolist(),
        "positions": inputs.positions.tolist(),
        "slots": context.slot_mapping.tolist(),
        "lens": context.seq_lens.tolist(),
        "rows": inputs.row.tolist(),
        "group_rows": None if inputs.group_row is None else inputs.group_row.tolist(),
    }


@pytest.fixture
def static() -> StaticInputs:
    return StaticInputs(
        5,
        reach=14,
        block_size=4,
        scratch_block=SCRATCH,
        vocab_size=VOCAB,
        device=torch.device("cpu"),
        row_invariant=True,
    )


def test_a_step_and_its_padding(static: StaticInputs) -> None:
    inputs = static.of(4, grouped=True)
    static.fill([decoding([7, 8, 9], [2], 3, 1), decoding([5] * 6, [4, 1], 2)], 4)
    assert numbers(inputs) == {
        "ids": [9, 5, 500, 700],
        "positions": [2, 5, 0, 0],
        "slots": [2 * 4 + 2, 1 * 4 + 1, -1, -1],
        "lens": [3, 6, 1, 1],
        "rows": [3, 2, 0, 0],
        "group_rows": [1, 0, 0, 0],
    }
    context = inputs.context
    assert [row[0] for row in context.block_tables.tolist()] == [2, 4, SCRATCH, SCRATCH]
    assert context.block_tables.shape == (4, 4), "as wide as the reach"
    assert context.query_starts.tolist() == [0, 1, 2, 3, 4]
    assert inputs.logits_at.tolist() == [0, 1, 2, 3]
    assert context.plan is not None
    assert (context.plan.max_new, context.plan.max_len, context.plan.invariant) == (1, 14, True)
    assert static.of(4, grouped=False).group_row is None


def test_nothing_of_a_larger_or_longer_step_stays(static: StaticInputs) -> None:
    static.fill([decoding([1] * 14, [i, 6, 7, 8], 4, 2) for i in range(5)], 5)
    static.fill([decoding([3], [1])], 4)
    padding = numbers(static.of(4, grouped=True))
    assert padding == {
        "ids": [3, 300, 500, 700],
        "positions": [0] * 4,
        "slots": [4, -1, -1, -1],
        "lens": [1] * 4,
        "rows": [0] * 4,
        "group_rows": [0] * 4,
    }
    assert static.of(4, grouped=True).context.block_tables[1:, 0].tolist() == [SCRATCH] * 3


def test_a_table_that_was_given_anew_is_written_anew(static: StaticInputs) -> None:
    """Of the same length, in the same list: a sequence was preempted in between."""
    item = decoding([1, 2, 3, 4, 5], [3, 4])
    tables = static.of(2, grouped=False).context.block_tables
    static.fill([item], 2)
    assert tables[0, :2].tolist() == [3, 4]
    item.sequence.block_table[:] = [4, 2]
    static.fill([item], 2)
    assert tables[0, :2].tolist() == [4, 2]
    item.sequence.block_table.append(6)
    static.fill([item], 2)
    assert tables[0, :3].tolist() == [4, 2, 6]


def test_tensors_are_where_they_were_and_aligned(static: StaticInputs) -> None:
    """Kernels are compiled for addresses that are multiples of 16 bytes, and once more for others."""

    def addresses() -> list[int]:
        found = []
        for size in (1, 2, 3, 5):
            step = static.of(size, grouped=True)
            context = step.context
            tensors = [step.ids, step.positions, step.row, step.group_row, context.block_tables]
            tensors += [context.slot_mapping, context.seq_lens, context.query_starts, step.logits_at]
            found += [tensor.data_ptr() for tensor in tensors if tensor is not None]
        return found

    before = addresses()
    static.fill([decoding([1], [1])], 5)
    assert addresses() == before
    assert all(address % 16 == 0 for address in before)


def test_memory_is_left_for_the_graphs(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is made of memory figures alone."""
    model = load(tiny_base, device="cpu", verify=False)
    config = EngineConfig(max_sequences=64)
    assert graph_setup.reserved_bytes(model, config, 512) == 0, "a CPU has no graphs"
    on_gpu = SimpleNamespace(**{**vars(model), "device": torch.device("cuda")})
    eager = EngineConfig(max_sequences=64, enforce_eager=True)
    assert graph_setup.planned_graphs(on_gpu, config, 512) == GraphPlan.of(64, 512)  # type: ignore[arg-type]
    assert graph_setup.planned_graphs(on_gpu, eager, 512) is None  # type: ignore[arg-type]
    left = graph_setup.reserved_bytes(on_gpu, config, 512)  # type: ignore[arg-type]
    assert left > 64 * model.vocab_size * 4, "the logits alone"
    assert graph_setup.reserved_bytes(on_gpu, eager, 512) == 0  # type: ignore[arg-type]

    asked: list[int] = []
    monkeypatch.setattr(allocation, "available_memory", lambda _: 10 * left)
    monkeypatch.setattr(
        allocation, "fitting_blocks", lambda _, **how: asked.append(how["available_bytes"]) or 8
    )
    monkeypatch.setattr(allocation, "KVCache", lambda *_, **__: SimpleNamespace(layers=[(None, None)] * 2))
    bound_kv_cache(on_gpu, config, 512)  # type: ignore[arg-type]
    bound_kv_cache(on_gpu, eager, 512)  # type: ignore[arg-type]
    assert asked == [9 * left, 10 * left]


def test_what_graphs_take_grows_with_what_they_hold() -> None:
    def taken(sequences: int = 64, vocab: int = 1000, layers: int = 2) -> int:
        plan = GraphPlan.of(sequences, 512)
        return graph_bytes(plan, vocab_size=vocab, widths=[64], heads=4, d_v=16, layers=layers, splits=2)

    assert taken(sequences=128) > taken()
    assert taken(vocab=2000) - taken() == 3 * 4 * 64 * 1000
    assert taken(layers=3) > taken()
