"""quant_matmul: every path against the plain formula, and the promises about single rows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from peqa_kernels.native import load
from peqa_kernels.packing import pack_codes
from peqa_kernels.quant_matmul import (
    LinearBank,
    QuantizedWeight,
    QuantMatmulInputError,
    dequantize,
    prepare,
    quant_matmul,
    quant_matmul_reference,
)

KINDS = ("base", "channel", "channel+input", "group", "mixed")
CPU_BACKENDS = ("torch", "native")


def available(backend: str) -> str:
    """The backend's name; the set-up builds the compiled kernels everywhere, so a missing build is a failure."""
    assert backend != "native" or load() is not None, "not built: python -m peqa_kernels.native.compile"
    return backend


def make_weight(n: int, k: int, groups: int, bits: int, *, integers: bool = False) -> QuantizedWeight:
    """A weight whose every group has a scale and a zero point of its own; fractional unless `integers`."""
    g = torch.Generator().manual_seed(n * 7919 + k * 31 + groups * 5 + bits)
    codes = torch.randint(0, 1 << bits, (n, k), generator=g, dtype=torch.uint8)
    if integers:
        scales = torch.randint(1, 5, (n, groups), generator=g).float()
        zeros = torch.randint(0, 1 << bits, (n, groups), generator=g).float()
    else:
        scales = 0.01 + 0.05 * torch.rand((n, groups), generator=g)
        zeros = (1 << bits) * torch.rand((n, groups), generator=g)
    return QuantizedWeight(pack_codes(codes, bits), scales, zeros, bits, k)


def make_bank(
    weight: QuantizedWeight,
    kind: str,
    segments: tuple[int, ...] | None = None,
    rows: int = 5,
    *,
    integers: bool = False,
) -> LinearBank:
    """A bank whose row 0 is the base and whose other rows all differ, per output, input and group."""
    g = torch.Generator().manual_seed(len(kind) + rows)
    n, k, groups = weight.out_features, weight.in_features, weight.groups
    segments = segments or (n,)

    def scales(*shape: int) -> torch.Tensor:
        values = torch.rand(shape, generator=g) + 0.5
        if integers:
            values = torch.randint(1, 4, shape, generator=g).float()
        values[0] = 1.0
        return values

    with_input, with_group = kind in ("channel+input", "mixed"), kind in ("group", "mixed")
    return LinearBank(
        segments,
        scales(rows, n),
        scales(rows, len(segments), k) if with_input else None,
        scales(rows, groups, n) if with_group else None,
    )


def make_rows(m: int, kind: str, rows: int = 5) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Neighbouring activations belong to different tasks, and to different group rows."""
    if kind == "base":
        return None, None
    row = ((torch.arange(m) * 3 + 1) % rows).to(torch.int32)
    return row, ((torch.arange(m) * 2 + 3) % rows).to(torch.int32) if kind in ("group", "mixed") else None


def make_x(m: int, k: int, dtype: torch.dtype = torch.float32, *, integers: bool = False) -> torch.Tensor:
    g = torch.Generator().manual_seed(m * 131 + k)
    if integers:
        return torch.randint(-4, 5, (m, k), generator=g).to(dtype)
    return torch.randn((m, k), generator=g).to(dtype)


def assert_close(name: str, got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    """RMS error over RMS signal; a wrong scale or index in one row in a thousand is far above any limit here."""
    error = (got.double() - want.double()).square().mean().sqrt() / want.double().square().mean().sqrt()
    assert error <= limit, f"{name}: relative RMS error {error:.2e} > {limit:.0e}"


# (N, K, groups): per channel, g32, g64; odd N; K that fills no SIMD register and no byte at 3 bit
SHAPES = [(64, 64, 1), (96, 128, 4), (33, 128, 2), (7, 35, 1), (50, 36, 3), (1, 32, 1)]


def fp32_limit(backend: str) -> float:
    """Relative RMS error allowed; the compiled kernels round activations to 16 bits of each 128's largest."""
    return 1e-4 if backend == "native" else 2e-6


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: tuple[int, int, int], bits: int, kind: str, backend: str) -> None:
    n, k, groups = shape
    weight = make_weight(n, k, groups, bits)
    prepared = prepare(weight, backend=available(backend))
    bank = make_bank(weight, kind)
    for m, dtype, with_bias in [
        (1, torch.float32, True),
        (13, torch.float32, False),
        (33, torch.bfloat16, True),
    ]:
        x = make_x(m, k, dtype)
        bias = torch.linspace(-3, 3, n) if with_bias else None
        row, group_row = make_rows(m, kind)
        got = quant_matmul(x, prepared, bias=bias, bank=bank, row=row, group_row=group_row)
        want = quant_matmul_reference(x, weight, bias, bank, row, group_row)
        assert got.dtype == dtype
        assert got.shape == (m, n)
        limit = fp32_limit(backend) if dtype == torch.float32 else 3e-3
        assert_close(f"{backend} {kind} {m} rows {dtype}", got, want, limit)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_are_exact(bits: int, kind: str, backend: str) -> None:
    weight = make_weight(40, 96, 3, bits, integers=True)
    segments = (16, 8, 16)
    prepared = prepare(weight, segments=segments, backend=available(backend))
    bank = make_bank(weight, kind, segments, integers=True)
    x, (row, group_row) = make_x(21, 96, integers=True), make_rows(21, kind)
    bias = torch.arange(40.0)
    got = quant_matmul(x, prepared, bias=bias, bank=bank, row=row, group_row=group_row)
    assert torch.equal(got, quant_matmul_reference(x, weight, bias, bank, row, group_row))


def test_reference_is_the_formula() -> None:
    """The reference itself, against loops over single numbers in float64."""
    weight, segments = make_weight(6, 8, 2, 3), (4, 2)
    bank = make_bank(weight, "mixed", segments)
    x, (row, group_row) = make_x(7, 8), make_rows(7, "mixed")
    bias = torch.linspace(-1, 1, 6)
    assert row is not None
    assert group_row is not None
    assert bank.in_scale is not None
    assert bank.group_scale is not None
    stream = [sum(int(b) << (8 * i) for i, b in enumerate(line)) for line in weight.qweight.tolist()]
    want = torch.zeros((7, 6), dtype=torch.float64)
    for m in range(7):
        t, u = int(row[m]), int(group_row[m])
        for n in range(6):
            total = 0.0
            for k in range(8):
                code, g = (stream[n] >> (3 * k)) & 7, k // 4
                s = weight.scales[n, g].item() * bank.group_scale[u, g, n].item()
                entered = x[m, k].item() * bank.in_scale[t, 0 if n < 4 else 1, k].item()
                total += s * entered * (code - weight.zeros[n, g].item())
            want[m, n] = bias[n].item() + bank.out_scale[t, n].item() * total
    got = quant_matmul_reference(x, weight, bias, bank, row, group_row)
    assert_close("reference", got, want, 1e-6)
    assert_close("dequantize", x @ dequantize(weight).t(), quant_matmul_reference(x, weight), 1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_segments_have_their_own_input_scales(backend: str) -> None:
    """A fused launch equals its parts run one by one, each with its own input scales."""
    segments = (32, 8, 24)
    weight = make_weight(64, 64, 2, 4)
    bank = make_bank(weight, "mixed", segments)
    x, (row, group_row) = make_x(11, 64), make_rows(11, "mixed")
    fused = prepare(weight, segments=segments, backend=available(backend))
    got = quant_matmul(x, fused, bank=bank, row=row, group_row=group_row)
    first = 0
    assert bank.in_scale is not None
    assert bank.group_scale is not None
    for i, width in enumerate(segments):
        cut = slice(first, first + width)
        part = QuantizedWeight(weight.qweight[cut], weight.scales[cut], weight.zeros[cut], 4, 64)
        part_bank = LinearBank(
            (width,), bank.out_scale[:, cut], bank.in_scale[:, i : i + 1], bank.group_scale[:, :, cut]
        )
        want = quant_matmul_reference(x, part, None, part_bank, row, group_row)
        assert_close(f"segment {i}", got[:, cut], want, fp32_limit(backend))
        first += width


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", ["channel", "mixed"])
@pytest.mark.parametrize("shape", [(96, 128, 4), (576, 576, 18), (33, 40, 1)], ids=str)
def test_a_row_has_the_bits_that_it_has_alone(
    shape: tuple[int, int, int], kind: str, threads: int, backend: str
) -> None:
    n, k, groups = shape
    segments = (n - 20, 12, 8)
    weight = make_weight(n, k, groups, 4)
    prepared = prepare(weight, segments=segments, backend=available(backend))
    bank = make_bank(weight, kind, segments)
    total = 24
    x, (row, group_row) = make_x(total, k), make_rows(total, kind)
    bias = torch.linspace(-1, 1, n)

    def run(picked: torch.Tensor) -> torch.Tensor:
        return quant_matmul(
            x[picked],
            prepared,
            bias=bias,
            bank=bank,
            row=None if row is None else row[picked],
            group_row=None if group_row is None else group_row[picked],
        )

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = torch.cat([run(torch.tensor([m])) for m in range(total)])
        g = torch.Generator().manual_seed(5)
        for m in (2, 3, 5, 7, 9, 17, 24):
            picked = torch.randperm(total, generator=g)[:m]
            assert torch.equal(run(picked), alone[picked]), f"{m} rows"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_base_row_has_the_bits_of_no_row(backend: str) -> None:
    """Whatever a bank holds besides, row 0 is the base, to the bit; so is a step that reads no bank at all."""
    segments = (48, 16)
    weight = make_weight(64, 96, 3, 4)
    prepared = prepare(weight, segments=segments, backend=available(backend))
    x, zeros, bias = make_x(9, 96), torch.zeros(9, dtype=torch.int32), torch.linspace(-1, 1, 64)
    want = quant_matmul(x, prepared, bias=bias)
    for kind in KINDS[1:]:
        bank = make_bank(weight, kind, segments)
        got = quant_matmul(x, prepared, bias=bias, bank=bank, row=zeros, group_row=zeros)
        assert torch.equal(got, want), kind
        assert torch.equal(quant_matmul(x, prepared, bias=bias, bank=bank), want), kind


def test_dense_is_kept_per_dtype_until_dropped() -> None:
    weight = make_weight(16, 32, 2, 4)
    prepared = prepare(weight, backend="torch")
    dense = prepared.dense(torch.bfloat16)
    assert dense.dtype == torch.bfloat16
    assert prepared.dense(torch.bfloat16) is dense
    assert torch.equal(prepared.dense(), dequantize(weight))
    prepared.drop_dense()
    assert prepared.dense(torch.bfloat16) is not dense


def test_a_gradient_is_right_or_refused() -> None:
    weight = make_weight(16, 32, 2, 4)
    prepared, bank = prepare(weight, backend="torch"), make_bank(weight, "channel")
    x, row = make_x(3, 32).requires_grad_(), make_rows(3, "channel")[0]
    quant_matmul(x, prepared, bank=bank).sum().backward()
    assert x.grad is not None
    assert_close("gradient of x", x.grad, dequantize(weight).sum(0).expand(3, 32), 1e-6)
    with pytest.raises(RuntimeError, match="scaled_linear"):
        quant_matmul(x, prepared, bank=bank, row=row)
    with torch.no_grad():
        quant_matmul(x, prepared, bank=bank, row=row)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_compiles_into_one_graph(backend: str) -> None:
    """Two weights of one shape in one compiled function: neither breaks the graph nor is taken for the other."""
    weights = [make_weight(64, 64, 2, bits) for bits in (4, 3)]
    prepared = [prepare(w, backend=available(backend)) for w in weights]
    bank = make_bank(weights[0], "mixed")

    def two_layers(x: torch.Tensor, row: torch.Tensor | None, group_row: torch.Tensor | None) -> torch.Tensor:
        for one in prepared:
            x = quant_matmul(x, one, bank=bank, row=row, group_row=group_row).relu()
        return x

    compiled = torch.compile(two_layers, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for m in (3, 5):
            x, rows = make_x(m, 64), make_rows(m, "mixed")
            assert torch.equal(compiled(x, *rows), two_layers(x, *rows))
        assert torch.equal(compiled(x, None, None), two_layers(x, None, None))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(3, 63)}, r"x must be \[rows, 64\], not \[3, 63\]"),
        ({"x": torch.zeros(64)}, r"x must be \[rows, 64\], not \[64\]"),
        ({"x": torch.zeros(3, 64, dtype=torch.float64)}, "not torch.float64"),
        ({"x": torch.zeros(3, 64, dtype=torch.int32)}, "not torch.int32"),
        ({"bias": torch.zeros(63)}, r"bias must be \[64\]"),
        ({"bias": torch.zeros(128)[::2]}, "bias must be .* contiguous"),
        ({"row": torch.zeros(3, dtype=torch.int64)}, r"row must be int32 \[3\], contiguous, not torch.int64"),
        ({"row": torch.zeros(2, dtype=torch.int32)}, r"row must be int32 \[3\]"),
        ({"row": torch.zeros(6, dtype=torch.int32)[::2]}, "not contiguous"),
        ({"row": torch.tensor([0, 5, 1], dtype=torch.int32)}, r"row\[1\] is 5, but the bank has rows 0 to 4"),
        ({"row": torch.tensor([0, 1, -1], dtype=torch.int32)}, r"row\[2\] is -1"),
        ({"group_row": torch.tensor([7, 1, 1], dtype=torch.int32)}, r"group_row\[0\] is 7"),
        ({"bank": LinearBank((32, 32), torch.ones(5, 64))}, r"segments \(32, 32\)"),
        ({"bank": LinearBank((64,), torch.ones(5, 64).double())}, "out_scale must be float32"),
        ({"bank": LinearBank((64,), torch.ones(5, 63))}, r"out_scale must be \[rows, 64\] .* not \[5, 63\]"),
        (
            {"bank": LinearBank((64,), torch.ones(5, 64), torch.ones(5, 64))},
            r"in_scale must be \[rows, 1, 64\]",
        ),
        (
            {"bank": LinearBank((64,), torch.ones(5, 64), None, torch.ones(5, 64, 2))},
            r"group_scale must be \[rows, 2, 64\] .* not \[5, 64, 2\]",
        ),
        (
            {"bank": LinearBank((64,), torch.ones(5, 64, device="meta"))},
            "out_scale is on meta, the weight on",
        ),
        ({"x": torch.zeros(3, 64, device="meta")}, "x is on meta, the weight on cpu"),
        ({"bias": torch.zeros(64, device="meta")}, "bias is on meta, x on cpu"),
        (
            {"bank": LinearBank((64,), torch.ones(64, 5).t())},
            "out_scale must be contiguous and of out_scale.s torch.float32",
        ),
    ],
)
def test_refuses_what_does_not_fit(backend: str, change: dict[str, object], sentence: str) -> None:
    weight = make_weight(64, 64, 2, 4)
    row, group_row = make_rows(3, "mixed")
    arguments = {"x": make_x(3, 64), "bias": None, "bank": make_bank(weight, "mixed")}
    arguments |= {"row": row, "group_row": group_row, **change}
    with pytest.raises(QuantMatmulInputError, match=sentence):
        quant_matmul(arguments.pop("x"), prepare(weight, backend=available(backend)), **arguments)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_activations_need_not_be_contiguous(backend: str) -> None:
    weight = make_weight(64, 64, 2, 4)
    prepared, x = prepare(weight, backend=available(backend)), make_x(64, 5).t()
    assert not x.is_contiguous()
    assert torch.equal(quant_matmul(x, prepared), quant_matmul(x.contiguous(), prepared))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bits": 5}, r"bits must be one of \(2, 3, 4, 8\), not 5"),
        ({"bits": 8}, r"qweight must be uint8 \[16, 64\], 16 rows of 64 codes of 8 bits, not .* \[16, 32\]"),
        ({"qweight": torch.zeros(16, 31, dtype=torch.uint8)}, r"qweight must be uint8 \[16, 32\]"),
        ({"qweight": torch.zeros(17, 32, dtype=torch.uint8)}, r"not torch.uint8 of shape \[17, 32\]"),
        ({"qweight": torch.zeros(16, 32, dtype=torch.int32)}, "qweight must be uint8 .* not torch.int32"),
        ({"qweight": torch.zeros(16, 32, dtype=torch.int8)}, "qweight must be uint8 .* not torch.int8"),
        ({"scales": torch.ones(16)}, r"scales must be float32 \[N, G\] .* not torch.float32 of shape \[16\]"),
        ({"scales": torch.ones(16, 0)}, "with one group at least"),
        ({"scales": torch.ones(16, 2).half()}, "scales must be float32 .* not torch.float16"),
        ({"scales": torch.ones(16, 2, dtype=torch.int32)}, "scales must be float32 .* not torch.int32"),
        ({"zeros": torch.ones(16, 1)}, r"zeros must be float32 \[16, 2\] as the scales, not .* \[16, 1\]"),
        ({"zeros": torch.ones(16, 2, dtype=torch.uint8)}, "zeros must be float32 .* not torch.uint8"),
        ({"scales": torch.ones(16, 3), "zeros": torch.ones(16, 3)}, "a multiple of the 3 groups, not 64"),
        ({"in_features": 0}, "in_features must be a multiple of the 2 groups, not 0"),
        ({"zeros": torch.ones(16, 2, device="meta")}, "on one device, not on cpu, cpu and meta"),
    ],
)
def test_a_weight_whose_tensors_do_not_fit_is_refused(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(QuantMatmulInputError, match=sentence):
        replace(make_weight(16, 64, 2, 4), **change)


@pytest.mark.parametrize("segments", [(), (8,), (8, 9), (16, 0), (20, -4)])
def test_segments_that_do_not_fit_are_refused(segments: tuple[int, ...]) -> None:
    with pytest.raises(QuantMatmulInputError, match="whose sum is the weight's 16 outputs, not"):
        prepare(make_weight(16, 32, 2, 4), segments=segments)


def test_refuses_unknown_backends() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        prepare(make_weight(16, 32, 2, 4), backend="tpu")


def test_importing_the_op_loads_no_triton() -> None:
    code = "import sys, peqa_kernels.quant_matmul; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
