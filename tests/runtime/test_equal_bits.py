"""The mode of equal bits: every product and reduction of torch's sees one number of rows, and gives what it gave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from graph_recorder import Trace
from torch import nn

from peqa_runtime.model.equal_bits import set_equal_bits
from peqa_runtime.model.float_linear import in_parts
from peqa_runtime.model.fused_decoder import fused_decoder
from peqa_runtime.model.loader import LoadedModel, load
from peqa_runtime.model.self_check import packed_logits

ADDS = {
    f"aten::{name}"
    for name in ("mean", "sum", "mm", "addmm", "bmm", "baddbmm", "_softmax", "var", "norm", "linear")
}


def test_parts_are_of_one_size_and_keep_every_row() -> None:
    seen = []

    def compute(rows: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(rows.shape))
        return rows[:, :2] * 2

    for count in (1, 3, 4, 5, 9):
        x = torch.randn(2, count, 3)
        assert torch.equal(in_parts(compute, x, 4), x[..., :2] * 2)
    assert set(seen) == {(4, 3)}


def shapes_of_adding(loaded: LoadedModel, tokens: int) -> set[Any]:
    """Operations that add, with the shapes that they get; products with one term each are none."""
    trace = Trace()
    forward = loaded.forward

    def watched(*given: Any) -> torch.Tensor:
        with trace.watching():
            return forward(*given)

    with patch.object(loaded, "forward", watched):
        packed_logits(loaded, torch.arange(tokens))
    found = set()
    for name, *leaves in trace.calls:
        shapes = [leaf[1] for leaf in leaves if isinstance(leaf, tuple)]
        if name in ADDS and shapes[0][-1] != 1:
            found.add((name, *shapes))
    return found


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("qwen3", {"head_dim": 16, "tie_word_embeddings": False}),  # norms of heads
        ("gemma2", {"head_dim": 16}),
    ],
)
def test_what_adds_sees_the_same_shapes_whatever_the_number_of_rows(
    architecture_base: Callable[..., Path], name: str, changes: dict[str, object]
) -> None:
    loaded = load(architecture_base(name, **changes), device="cpu", verify=False)
    loaded.lean = None
    assert shapes_of_adding(loaded, 3) != shapes_of_adding(loaded, 5), "the mode is needed"
    before = packed_logits(loaded, torch.arange(7))
    assert set_equal_bits(loaded.model) == []
    assert torch.allclose(packed_logits(loaded, torch.arange(7)), before, rtol=1e-5, atol=1e-5)
    shapes = shapes_of_adding(loaded, 3)
    assert shapes
    assert shapes == shapes_of_adding(loaded, 1) == shapes_of_adding(loaded, 70)


def test_all_that_torch_adds_beside_the_fused_decoder_is_its_head(
    architecture_base: Callable[..., Path],
) -> None:
    base = architecture_base("qwen3", head_dim=16, tie_word_embeddings=False)
    loaded = load(base, device="cpu", dtype="float16", verify=False)
    loaded.fused = fused_decoder(loaded.model, loaded.layers, loaded.max_model_len)
    assert loaded.fused is not None
    set_equal_bits(loaded.model)
    shapes = shapes_of_adding(loaded, 3)
    assert {name for name, *_ in shapes} == {"aten::linear"}
    assert shapes == shapes_of_adding(loaded, 70)


def test_modules_with_floats_of_their_own_are_named(architecture_base: Callable[..., Path]) -> None:
    loaded = load(architecture_base("mixtral", num_local_experts=4), device="cpu", verify=False)
    names = set_equal_bits(loaded.model)
    assert names
    assert all("mlp" in name or "moe" in name for name in names)


def test_torchs_own_norm_is_left_alone() -> None:
    norm = nn.RMSNorm(8)
    set_equal_bits(nn.Sequential(norm))
    assert "forward" not in vars(norm)
