"""The GPU's own decoder, on the CPU with its ops in torch: what transformers' modules compute, in fewer launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from graph_recorder import Trace
from torch import Tensor, nn

import peqa_runtime.model.fused_decoder as module
from peqa_runtime.model import LoadedModel, load
from peqa_runtime.model.fused_decoder import FusedDecoder, fused_decoder
from peqa_runtime.model.self_check import packed_logits, self_check

ArchitectureBase = Callable[..., Path]  # the fixture of that name

KNOWN: dict[str, tuple[str, dict[str, object]]] = {
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied codes": ("llama", {"tie_word_embeddings": True, "embeddings": 8}),
    "odd widths": ("llama", {"intermediate_size": 160, "hidden_size": 96, "head_dim": 24}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "qwen2 with windows in some layers": (
        "qwen2",
        {
            "sliding_window": 6,
            "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
}


def fused(loaded: LoadedModel) -> FusedDecoder | None:
    """The decoder that the model would have on a GPU."""
    return fused_decoder(loaded.model, loaded.layers, loaded.max_model_len)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", KNOWN)
def test_it_computes_what_the_modules_compute(
    name: str, dtype: str, architecture_base: ArchitectureBase
) -> None:
    """In torch every number is rounded where the modules round it: not a bit differs."""
    architecture, changes = KNOWN[name]
    loaded = load(architecture_base(architecture, **changes), device="cpu", dtype=dtype, verify=False)
    assert loaded.fused is None, "for GPUs only"
    ids = torch.randint(0, 300, (29,), generator=torch.Generator().manual_seed(0))
    loaded.lean = None
    expected = packed_logits(loaded, ids)
    loaded.fused = fused(loaded)
    assert loaded.fused is not None
    with patch.object(loaded, "forward_through_modules", None):
        found = packed_logits(loaded, ids)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def calls_of_a_step(loaded: LoadedModel) -> Counter[str]:
    """What one step of five tokens calls: operations of torch that compute or allocate, kernels of ours."""
    trace = Trace()
    forward = loaded.forward

    def watched(*given: Tensor) -> Tensor:
        with trace.watching():
            return forward(*given)

    with patch.object(loaded, "forward", watched):
        packed_logits(loaded, torch.arange(5))
    views = ("aten::view", "aten::reshape")  # reshape: of rows that lie as they should
    return Counter(name for name, *_ in trace.calls if name not in views)


def test_a_layer_launches_nothing_but_its_kernels(architecture_base: ArchitectureBase) -> None:
    found = []
    for layers in (2, 3):
        base = architecture_base("qwen3", head_dim=16, num_hidden_layers=layers)
        loaded = load(base, device="cpu", dtype="float16", verify=False)
        loaded.fused = fused(loaded)
        found.append(calls_of_a_step(loaded))
    assert found[1] - found[0] == {
        "quant_matmul": 4,
        "add_rms_norm": 2,
        "rotate_and_write": 1,
        "paged_attention": 1,
        "silu_mul": 1,
    }
    outside = {name for name in found[0] if name.startswith("aten::")}
    on_a_cpu = {"aten::pad", "aten::slice"}  # a float head's
    assert outside - on_a_cpu == {"aten::embedding", "aten::index", "aten::linear", "aten::to"}


def test_no_logits_are_asked_for(tiny_base: Path) -> None:
    loaded = load(tiny_base, device="cpu", dtype="float16")
    decoder = fused(loaded)
    assert decoder is not None
    asked = []

    def nothing(context: object, ids: Tensor, positions: Tensor, logits_at: Tensor) -> Tensor:
        asked.append(decoder.forward(context, ids, positions, logits_at[:0]))  # type: ignore[arg-type]
        return asked[-1]

    with patch.object(loaded, "forward", nothing):
        packed_logits(loaded, torch.arange(3))
    assert asked[0].shape == (0, loaded.vocab_size)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama", {"hidden_act": "gelu"}), ("olmo2", {}), ("gemma2", {"head_dim": 16}), ("smollm3", {})],
    ids=["gelu", "olmo2", "gemma2", "smollm3"],
)
def test_other_architectures_run_through_their_modules(
    name: str, changes: dict[str, object], architecture_base: ArchitectureBase
) -> None:
    loaded = load(architecture_base(name, **changes), device="cpu", dtype="float16", verify=False)
    assert fused(loaded) is None


@pytest.mark.parametrize("what", ["hook", "norm in fp32", "wide rows", "siblings apart"])
def test_a_model_that_differs_in_one_thing_runs_through_its_modules(
    what: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(tiny_base, device="cpu", dtype="float16", fuse=what != "siblings apart")
    layer = loaded.model.model.layers[1]
    if what == "hook":
        layer.register_forward_hook(lambda *_: None)
    elif what == "norm in fp32":
        layer.input_layernorm.weight = nn.Parameter(layer.input_layernorm.weight.float(), requires_grad=False)
    elif what == "wide rows":
        monkeypatch.setattr(module, "LARGEST_ROW", 63)
    assert fused(loaded) is None


def test_kernels_that_compute_wrongly_are_not_used(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(tiny_base, device="cpu", dtype="float16")
    monkeypatch.setattr(
        "peqa_kernels.elementwise.gpu_check.silu_mul", lambda x: x.float().chunk(2, -1)[0].to(x.dtype)
    )
    assert fused(loaded) is None
    assert caplog.text.count("the fused kernels compute wrongly on this GPU") == 1


def test_a_decoder_that_computes_something_else_is_not_used(
    tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(tiny_base, device="cpu", dtype="float16")
    loaded.fused = fused(loaded)
    self_check(loaded)
    assert loaded.fused is not None
    assert not caplog.text
    loaded.fused._sines.neg_()
    self_check(loaded)
    assert loaded.fused is None
    assert "other logits in the GPU's own decoder" in caplog.text
