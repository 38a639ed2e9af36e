"""The CPU's own decoder computes what transformers' modules compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peqa_kernels import native
from peqa_kernels.native.isa import usable
from peqa_kernels.paged_attention import new_caches
from peqa_kernels.paged_attention.checks import AttentionInputError
from peqa_kernels.paged_attention.reference import to_cache
from peqa_kernels.quant_matmul import QuantMatmulInputError
from peqa_kernels.quant_matmul.weight import LinearBank
from peqa_runtime.model import ForwardContext, LoadedModel, load
from peqa_runtime.model.quantized_linear import QuantizedLinear

ArchitectureBase = Callable[..., Path]  # the fixture of that name
BLOCK = 8
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

KNOWN: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "tied codes": ("llama", {"tie_word_embeddings": True, "embeddings": 8}),
    "codes": ("llama", {"embeddings": 8}),
    "4-bit embedding": ("llama", {"embeddings": 4, "tie_word_embeddings": True}),
    "3-bit embedding": ("llama", {"embeddings": 3, "tie_word_embeddings": True}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "a key head per query head": ("llama", {"num_key_value_heads": 4}),
    "narrow heads": ("llama", {"head_dim": 8}),
    "wide heads": ("llama", {"head_dim": 96}),
    "odd widths": ("llama", {"intermediate_size": 160, "hidden_size": 96, "head_dim": 24}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "yarn rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 6}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows in some layers": (
        "qwen2",
        {
            "sliding_window": 6,
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 with biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
}


HALVES = [torch.float32]
if (ops := native.load()) is not None and ops.halves:
    HALVES.append(torch.float16)


def bind(loaded: LoadedModel, blocks: int, dtype: torch.dtype = torch.float32) -> None:
    for layer, spec in zip(loaded.layers, loaded.kv_spec, strict=True):
        shape = (blocks, BLOCK, spec.kv_heads, spec.d_k, spec.d_v)
        layer.bind(*new_caches(*shape, dtype=dtype, device=torch.device("cpu")))


def steps(forward: Callable[..., Tensor]) -> Tensor:
    """A sequence in a chunk of 13, a chunk of 16 and two tokens one by one, beside a shorter one; all logits."""
    generator = torch.Generator().manual_seed(0)
    long, short = (torch.randint(0, 300, (count,), generator=generator) for count in (31, 10))
    tables = torch.tensor([[5, 0, 3, 6], [2, 4, 0, 0]], dtype=torch.int32)
    found = []
    for (a, b), (c, d) in (((0, 13), (0, 8)), ((13, 29), (8, 9)), ((29, 30), (9, 10)), ((30, 31), (10, 10))):
        chunks = [(long, a, b, 0), (short, c, d, 1)] if d > c else [(long, a, b, 0)]
        positions = torch.cat([torch.arange(start, stop) for _, start, stop, _ in chunks])
        owner = torch.cat([torch.full((stop - start,), s) for _, start, stop, s in chunks])
        context = ForwardContext(
            block_tables=tables[: len(chunks)].contiguous(),
            query_starts=torch.tensor([0, b - a, b - a + d - c][: len(chunks) + 1], dtype=torch.int32),
            seq_lens=torch.tensor([stop for _, _, stop, _ in chunks], dtype=torch.int32),
            slot_mapping=tables[owner, positions // BLOCK].long() * BLOCK + positions % BLOCK,
        )
        ids = torch.cat([tokens[start:stop] for tokens, start, stop, _ in chunks])
        found.append(forward(context, ids, positions, torch.arange(len(ids))))
    return torch.cat(found)


def difference(loaded: LoadedModel, dtype: torch.dtype = torch.float32) -> float:
    """Relative RMS difference between the lean decoder and the modules."""
    assert loaded.lean is not None, "not recognised"
    bind(loaded, 7, dtype)
    expected = steps(loaded.forward_through_modules)
    bind(loaded, 7, dtype)
    found = steps(loaded.forward)
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", KNOWN)
def test_it_computes_what_the_modules_compute(
    name: str, dtype: torch.dtype, architecture_base: ArchitectureBase
) -> None:
    architecture, changes = KNOWN[name]
    assert difference(load(architecture_base(architecture, **changes), device="cpu"), dtype) < 3e-4


@pytest.mark.parametrize("build", [build.name for build in usable()])
@pytest.mark.parametrize(
    "name", ["biases", "tied codes", "3-bit embedding", "odd widths", "mistral", "qwen3"]
)
def test_every_build_of_the_library(
    build: str, name: str, architecture_base: ArchitectureBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = native.load(build)
    assert ops is not None, "the C library is not built: python -m peqa_kernels.native.compile"
    monkeypatch.setattr(native, "load", lambda: ops)
    architecture, changes = KNOWN[name]
    assert difference(load(architecture_base(architecture, **changes), device="cpu")) < 3e-4


@pytest.mark.parametrize("build", [build.name for build in usable()])
@pytest.mark.parametrize("name", ["llama", "odd widths"])
def test_what_it_writes_into_fp16_caches(
    build: str, name: str, architecture_base: ArchitectureBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer's keys and values depend on no cache: they are those of fp32 caches, rounded as torch does."""
    ops = native.load(build)
    assert ops is not None, "the C library is not built: python -m peqa_kernels.native.compile"
    if not ops.halves:
        pytest.skip(f"{build} reads no fp16")
    monkeypatch.setattr(native, "load", lambda: ops)
    architecture, changes = KNOWN[name]
    loaded = load(architecture_base(architecture, attention_bias=True, **changes), device="cpu")
    bias = loaded.linears[0].module.bias
    assert bias is not None
    spec = loaded.kv_spec[0]
    values = bias[-spec.kv_heads * spec.d_v :]
    values[:7] = torch.tensor([7e4, -1e30, 65519.0, float("inf"), -float("inf"), float("nan"), 3e-6])
    values[-1] = 1e5  # beyond the last whole vector, of odd widths
    bias[-spec.kv_heads * (spec.d_v + spec.d_k)] = 1e9  # of a key
    written = []
    for dtype in HALVES:
        bind(loaded, 7, dtype)
        steps(loaded.forward)
        written.append((loaded.layers[0].key_cache, loaded.layers[0].value_cache))
    for whole, half in zip(*written, strict=True):
        assert whole is not None
        assert half is not None
        assert half.dtype == torch.float16
        torch.testing.assert_close(half, to_cache(whole, half.dtype), rtol=0, atol=0, equal_nan=True)
        assert (half.abs() == torch.finfo(half.dtype).max).sum() >= 31
    assert half[2].isinf().any()
    assert half[2].isnan().any()


@pytest.mark.parametrize("dtype", HALVES)
def test_neither_threads_nor_chunks_change_a_bit(tiny_base: Path, dtype: torch.dtype) -> None:
    """Of 300 tokens each of 4 threads takes some through all stages; 40 threads share each stage."""
    loaded = load(tiny_base, device="cpu")
    bind(loaded, 40, dtype)
    ids = torch.randint(0, 300, (300,), generator=torch.Generator().manual_seed(0))
    tables = torch.arange(39, -1, -1, dtype=torch.int32)[None]

    def logits(start: int, stop: int) -> Tensor:
        positions = torch.arange(start, stop)
        context = ForwardContext(
            block_tables=tables,
            query_starts=torch.tensor([0, stop - start], dtype=torch.int32),
            seq_lens=torch.tensor([stop], dtype=torch.int32),
            slot_mapping=tables[0, positions // BLOCK].long() * BLOCK + positions % BLOCK,
        )
        return loaded.forward(context, ids[start:stop], positions, torch.arange(stop - start))

    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 4, 40):
            torch.set_num_threads(count)
            found += [
                logits(0, 300),
                torch.cat([logits(0, 290), *(logits(i, i + 1) for i in range(290, 300))]),
            ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def attach_banks(loaded: LoadedModel) -> list[LinearBank]:
    """A bank of three rows, all ones, for every linear."""
    banks = [LinearBank(linear.sizes, torch.ones(3, linear.out_features)) for linear in loaded.linears]
    for linear, bank in zip(loaded.linears, banks, strict=True):
        linear.module.attach(bank, loaded.step_rows)
    return banks


def fill(loaded: LoadedModel, banks: list[LinearBank], kind: str) -> None:
    """Random scales of one kind in every row."""
    generator = torch.Generator().manual_seed(0)
    for linear, bank in zip(loaded.linears, banks, strict=True):
        shapes = {
            "out_scale": (3, linear.out_features),
            "in_scale": (3, len(linear.sizes), linear.in_features),
            "group_scale": (3, linear.groups, linear.out_features),
        }
        setattr(bank, kind, torch.rand(shapes[kind], generator=generator) + 0.5)


def with_rows(loaded: LoadedModel, forward: Callable[..., Tensor], group: bool) -> Callable[..., Tensor]:
    """The forward with tokens on rows 0, 1, 2, 0, 1, 2 ..."""

    def run(context: ForwardContext, ids: Tensor, *rest: Tensor) -> Tensor:
        loaded.step_rows.row = torch.arange(len(ids), dtype=torch.int32) % 3
        loaded.step_rows.group_row = loaded.step_rows.row if group else None
        return forward(context, ids, *rest)

    return run


@pytest.mark.parametrize("kind", ["out_scale", "in_scale", "group_scale"])
def test_rows_of_the_bank(kind: str, tiny_base: Path) -> None:
    """Also scales that are allocated after the first step, as a bank does for the first set that has them."""
    loaded = load(tiny_base, device="cpu")
    banks = attach_banks(loaded)
    lean = with_rows(loaded, loaded.forward, kind == "group_scale")
    bind(loaded, 7)
    before = steps(lean)
    fill(loaded, banks, kind)
    found = steps(lean)
    expected = steps(with_rows(loaded, loaded.forward_through_modules, kind == "group_scale"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - before).abs().max() > 0.1


@pytest.mark.parametrize("dtype", HALVES)
def test_nan_in_one_sequence_stays_there(tiny_base: Path, dtype: torch.dtype) -> None:
    """A sequence whose scales are infinite writes NaN into its caches; the one beside it does not change by a bit."""
    loaded = load(tiny_base, device="cpu")
    banks = attach_banks(loaded)
    found = []
    for scale in (1.0, float("inf")):
        for bank in banks:
            bank.out_scale[1] = scale
        bind(loaded, 7, dtype)
        found.append(steps(second_row_for_the_second_sequence(loaded)))
    longer = torch.tensor([*range(13), *range(21, 37), 38, 40])  # rows of the longer sequence, see `steps`
    assert torch.equal(found[0][longer], found[1][longer])
    others = torch.tensor([row for row in range(41) if row not in longer.tolist()])
    assert not found[1][others].isfinite().all(1).any()


def second_row_for_the_second_sequence(loaded: LoadedModel) -> Callable[..., Tensor]:
    """The forward with the step's first sequence on row 0 of the bank and its second one on row 1."""

    def run(context: ForwardContext, ids: Tensor, *rest: Tensor) -> Tensor:
        first = int(context.query_starts[1])
        loaded.step_rows.row = (torch.arange(len(ids)) >= first).to(torch.int32)
        return loaded.forward(context, ids, *rest)

    return run


@pytest.mark.parametrize("kind", ["base", "out_scale", "group_scale"])
def test_only_the_wanted_rows_and_none_at_all(kind: str, tiny_base: Path) -> None:
    loaded = load(tiny_base, device="cpu")
    forward = loaded.forward
    if kind != "base":
        fill(loaded, attach_banks(loaded), kind)
        forward = with_rows(loaded, forward, kind == "group_scale")
    same, second = [], []

    def twice(context: ForwardContext, ids: Tensor, positions: Tensor, at: Tensor) -> Tensor:
        every = forward(context, ids, positions, at)
        wanted = at.flip(0)[: max(1, len(at) // 2)]
        same.append(torch.equal(forward(context, ids, positions, wanted), every[wanted]))
        assert forward(context, ids, positions, at[:0]).shape == (0, 300)
        return every

    bind(loaded, 7)
    all_wanted = steps(twice)
    assert same == [True] * 4

    def none_before_the_last(context: ForwardContext, ids: Tensor, positions: Tensor, at: Tensor) -> Tensor:
        second.append(forward(context, ids, positions, at[:0] if len(second) < 3 else at))
        return second[-1]

    bind(loaded, 7)
    steps(none_before_the_last)
    assert torch.equal(second[-1], all_wanted[-1:]), "a step without results writes its keys and values"


def test_slots_of_minus_one_are_not_written(tiny_base: Path) -> None:
    loaded = load(tiny_base, device="cpu")
    bind(loaded, 2)
    context = ForwardContext(
        block_tables=torch.tensor([[1]], dtype=torch.int32),
        query_starts=torch.tensor([0, 3], dtype=torch.int32),
        seq_lens=torch.tensor([3], dtype=torch.int32),
        slot_mapping=torch.tensor([8, -1, 10]),
    )
    loaded.forward(context, torch.tensor([3, 4, 5]), torch.arange(3), torch.arange(3))
    for layer in loaded.layers:
        for cache in (layer.key_cache, layer.value_cache):
            assert cache is not None
            written = cache.flatten(0, 1).abs().sum((1, 2)) > 0
            assert written.nonzero().flatten().tolist() == [8, 10]


@pytest.mark.parametrize(
    "wrong",
    [
        "id",
        "negative id",
        "position",
        "slot",
        "output",
        "output before the first",
        "block",
        "length",
        "queries",
    ],
)
def test_nothing_outside_of_a_tensor_is_touched(wrong: str, tiny_base: Path) -> None:
    loaded = load(tiny_base, device="cpu")
    bind(loaded, 2)
    ids, positions, outputs = torch.tensor([3, 4]), torch.tensor([0, 1]), torch.tensor([1])
    slots, tables = torch.tensor([8, 9]), torch.tensor([[1]], dtype=torch.int32)
    starts, lengths = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    changes = {
        "id": (ids, 300),
        "negative id": (ids, -1),
        "position": (positions, 512),
        "slot": (slots, 16),
        "output": (outputs, 2),
        "output before the first": (outputs, -1),
        "block": (tables, 2),
        "length": (lengths, 9),
        "queries": (starts, 3),
    }

    def run() -> None:
        loaded.forward(ForwardContext(tables, starts, lengths, slots), ids, positions, outputs)

    run()
    tensor, value = changes[wrong]
    tensor.view(-1)[-1] = value
    with pytest.raises((AssertionError, AttentionInputError), match=r"out of range|does not fit"):
        run()


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (torch.tensor([0, 3], dtype=torch.int32), "bank has rows 0 to 2"),
        (torch.tensor([-1, 0], dtype=torch.int32), "bank has rows 0 to 2"),
        (torch.tensor([1, 2]), "do not go together"),
        (torch.tensor([1], dtype=torch.int32), "do not go together"),
        (torch.tensor([1, 0, 2, 0], dtype=torch.int32)[::2], "do not go together"),
    ],
)
def test_a_row_that_no_bank_has_is_refused(rows: Tensor, error: str, tiny_base: Path) -> None:
    loaded = load(tiny_base, device="cpu")
    bind(loaded, 2)
    attach_banks(loaded)
    tables = torch.tensor([[1]], dtype=torch.int32)
    starts, lengths = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    context = ForwardContext(tables, starts, lengths, torch.tensor([8, 9]))

    def run(row: Tensor) -> Tensor:
        loaded.step_rows.row = row
        return loaded.forward(context, torch.tensor([3, 4]), torch.tensor([0, 1]), torch.tensor([1]))

    run(torch.tensor([0, 2], dtype=torch.int32))
    with pytest.raises((AssertionError, QuantMatmulInputError), match=error):
        run(rows)


def test_a_step_looks_at_one_linear_to_see_that_no_bank_is_another(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking at all of them took 0.2 ms of each step with tasks; what changes, changes for all together."""
    loaded = load(tiny_base, device="cpu")
    bind(loaded, 2)
    banks = attach_banks(loaded)
    looked = [0]
    bank_of = QuantizedLinear.bank.fget
    assert bank_of is not None

    def counting(module: QuantizedLinear) -> LinearBank | None:
        looked[0] += 1
        return bank_of(module)

    monkeypatch.setattr(QuantizedLinear, "bank", property(counting))
    context = ForwardContext(
        block_tables=torch.tensor([[0]], dtype=torch.int32),
        query_starts=torch.tensor([0, 3], dtype=torch.int32),
        seq_lens=torch.tensor([3], dtype=torch.int32),
        slot_mapping=torch.arange(3),
    )
    run = with_rows(loaded, loaded.forward, False)
    found = []
    for kind in (None, None, "in_scale", None, "out_scale", None):
        if kind is not None:
            fill(loaded, banks, kind)
        before = looked[0]
        found.append(run(context, torch.tensor([3, 4, 5]), torch.arange(3), torch.arange(3)))
        assert (looked[0] - before == 1) == (kind is None and len(found) > 1)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert torch.equal(found[4], found[5])
    assert not torch.equal(found[1], found[2])
    assert not torch.equal(found[3], found[4])
