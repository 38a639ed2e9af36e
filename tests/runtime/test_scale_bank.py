"""The device rows of the scale sets: the right numbers in the right row, and nothing else touched."""

from __future__ import annotations

import pytest
import torch

from peqa_kernels.quant_matmul.weight import LinearBank
from peqa_runtime.core import BaseManifest, FusedLinear, LinearShape
from peqa_runtime.scales.scale_bank import ScaleBank
from peqa_runtime.scales.scale_set import ScaleSet
from peqa_runtime.scales.set_layout import expected_shapes

MANIFEST = BaseManifest(
    "tiny",
    "d" * 64,
    {
        "q": LinearShape(6, 8, 2),
        "k": LinearShape(2, 8, 2),
        "v": LinearShape(3, 8, 2),
        "down": LinearShape(8, 12, 1),
    },
)
LINEARS = [FusedLinear(("q", "k", "v"), (6, 2, 3), 8, 2), FusedLinear(("down",), (8,), 12, 1)]


def random_set(kind: str, seed: int) -> ScaleSet:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        n: 0.5 + torch.rand(s, generator=generator) for n, s in expected_shapes(kind, MANIFEST).items()
    }
    return ScaleSet.build(kind, tensors, MANIFEST)


def new_bank(**options: object) -> ScaleBank:
    return ScaleBank(LINEARS, **{"rows": 4, "group_rows": 3, **options})


def expected_rows(scale_set: ScaleSet, bank: LinearBank, linear: FusedLinear) -> tuple[torch.Tensor, ...]:
    """The rows as plain loops would fill them: out [N], in [segments, K], group [G, N]."""
    out = torch.ones(sum(linear.sizes))
    into = torch.ones(len(linear.sizes), linear.in_features)
    group = torch.ones(linear.groups, sum(linear.sizes))
    start = 0
    for segment, (name, size) in enumerate(zip(linear.names, linear.sizes, strict=True)):
        for n in range(size):
            if f"{name}.out_scale" in scale_set.tensors:
                out[start + n] = float(scale_set.tensors[f"{name}.out_scale"][n])
            for g in range(linear.groups):
                if f"{name}.group_scale" in scale_set.tensors:
                    group[g, start + n] = float(scale_set.tensors[f"{name}.group_scale"][n, g])
        if f"{name}.in_scale" in scale_set.tensors:
            into[segment] = scale_set.tensors[f"{name}.in_scale"].float()
        start += size
    return out, into, group


def snapshot(bank: ScaleBank) -> list[dict[str, torch.Tensor]]:
    return [
        {
            name: getattr(b, name).clone()
            for name in ("out_scale", "in_scale", "group_scale")
            if getattr(b, name) is not None
        }
        for b in bank.banks
    ]


def test_a_new_bank_is_the_base_everywhere() -> None:
    bank = new_bank()
    assert [b.segments for b in bank.banks] == [(6, 2, 3), (8,)]
    for b, linear in zip(bank.banks, LINEARS, strict=True):
        assert b.out_scale.shape == (4, linear.out_features)
        assert b.out_scale.dtype == torch.float32
        assert bool((b.out_scale == 1).all())
        assert b.in_scale is None
        assert b.group_scale is None
    assert bank.allocated == ("channel",)
    assert bank.num_bytes == 4 * 4 * (11 + 8)


@pytest.mark.parametrize("kind", ["channel", "channel+input", "group"])
def test_a_row_holds_the_set_and_the_others_stay(kind: str) -> None:
    bank = new_bank(kinds=("channel", "channel+input", "group"))
    other = random_set("channel+input", 1)
    bank.write(1, None, other)
    before = snapshot(bank)
    scale_set = random_set(kind, 2)
    bank.write(2, 2 if kind == "group" else None, scale_set)
    for b, linear, old in zip(bank.banks, LINEARS, before, strict=True):
        out, into, group = expected_rows(scale_set, b, linear)
        assert torch.equal(b.out_scale[2], out)
        assert torch.equal(b.in_scale[2], into)
        if kind == "group":
            assert torch.equal(b.group_scale[2], group)
        for row in (0, 1, 3):
            assert torch.equal(b.out_scale[row], old["out_scale"][row])
            assert torch.equal(b.in_scale[row], old["in_scale"][row])
        for group_row in (0, 1):
            assert torch.equal(b.group_scale[group_row], old["group_scale"][group_row])


def test_siblings_keep_their_own_input_scales() -> None:
    bank = new_bank()
    scale_set = random_set("channel+input", 3)
    bank.write(3, None, scale_set)
    fused = bank.banks[0].in_scale
    assert fused is not None
    assert fused.shape == (4, 3, 8)
    assert torch.equal(fused[3, 1], scale_set.tensors["k.in_scale"].float())
    assert not torch.equal(fused[3, 0], fused[3, 1])


def test_a_row_forgets_the_kind_that_it_held_before() -> None:
    bank = new_bank()
    bank.write(1, None, random_set("channel+input", 4))
    channel = random_set("channel", 5)
    bank.write(1, None, channel)
    for b, linear in zip(bank.banks, LINEARS, strict=True):
        out, into, _ = expected_rows(channel, b, linear)
        assert torch.equal(b.out_scale[1], out)
        assert torch.equal(b.in_scale[1], into)
    bank.write(1, None, random_set("channel+input", 6))
    bank.write(1, 1, random_set("group", 7))
    for b in bank.banks:
        assert bool((b.out_scale[1] == 1).all())
        assert bool((b.in_scale[1] == 1).all())
        assert not bool((b.group_scale[1] == 1).all())
    bank.clear(1, 1)
    for b in bank.banks:
        assert bool((b.group_scale == 1).all())


def test_tensors_are_written_in_place_and_never_replaced() -> None:
    bank = new_bank()
    out_addresses = [b.out_scale.data_ptr() for b in bank.banks]
    for seed, kind in enumerate(("channel", "channel+input", "group", "channel")):
        bank.write(1 + seed % 3, 1 if kind == "group" else None, random_set(kind, seed))
    assert bank.allocated == ("channel", "channel+input", "group")
    addresses = [(b.in_scale.data_ptr(), b.group_scale.data_ptr()) for b in bank.banks]
    for seed, kind in enumerate(("channel+input", "group", "channel")):
        bank.write(1 + seed % 3, 2 if kind == "group" else None, random_set(kind, 10 + seed))
    bank.clear(2, 2)
    assert [b.out_scale.data_ptr() for b in bank.banks] == out_addresses
    assert [(b.in_scale.data_ptr(), b.group_scale.data_ptr()) for b in bank.banks] == addresses


def test_writing_under_inference_mode_works() -> None:
    bank = new_bank()
    with torch.inference_mode():
        bank.write(1, None, random_set("channel+input", 1))
    assert not bool((bank.banks[0].out_scale[1] == 1).all())
    bank.write(2, None, random_set("channel+input", 1))
    bank.clear(1)


@pytest.mark.parametrize("row", [0, 4, -1])
def test_row_zero_and_rows_outside_are_a_bug(row: int) -> None:
    with pytest.raises(AssertionError):
        new_bank().write(row, None, random_set("channel", 1))
    with pytest.raises(AssertionError):
        new_bank().clear(row)


@pytest.mark.parametrize("group_row", [None, 0, 3])
def test_a_group_set_needs_a_group_row(group_row: int | None) -> None:
    with pytest.raises(AssertionError):
        new_bank().write(1, group_row, random_set("group", 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["channel", "channel+input", "group"])
def test_a_device_bank_equals_the_host_bank(kind: str) -> None:
    host, device = new_bank(), new_bank(device="cuda")
    for bank in (host, device):
        bank.write(2, 1 if kind == "group" else None, random_set(kind, 8))
    for ours, theirs in zip(snapshot(device), snapshot(host), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name].cpu(), theirs[name]) for name in ours)
