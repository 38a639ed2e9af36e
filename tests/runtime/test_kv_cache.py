"""What keys and values are kept in, and where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peqa_kernels import native, paged_attention
from peqa_kernels.native.kv_layout import layout_of
from peqa_runtime.engine.allocation import kv_dtype
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.engine.kv_cache import KVCache, bytes_per_block
from peqa_runtime.model.attention import KVSpec
from peqa_runtime.sampling_params import SamplingParams

CPU, GPU = torch.device("cpu"), torch.device("cuda")
OPS = native.load()
HALVES = OPS is not None and OPS.halves
PARAMS = SamplingParams(max_tokens=8, temperature=0.0, logprobs=1, ignore_eos=True)
needs_halves = pytest.mark.skipif(not HALVES, reason="the compiled kernels read no fp16 here")


def cache_of(
    specs: list[KVSpec], blocks: int, dtype: torch.dtype = torch.float32, block_size: int = 16
) -> KVCache:
    return KVCache(specs, num_blocks=blocks, spare_blocks=1, block_size=block_size, device=CPU, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layers_of_all_shapes_share_no_byte(dtype: torch.dtype) -> None:
    specs = [KVSpec(3, 64, 64), KVSpec(1, 10, 7), KVSpec(2, 5, 5)]
    cache = cache_of(specs, 6, dtype, block_size=3)
    tensors = [tensor for pair in cache.layers for tensor in pair]
    assert not any(tensor.any() for tensor in tensors)
    assert all(layout_of(*pair) is not None for pair in cache.layers)
    for number, tensor in enumerate(tensors):
        assert tensor.dtype == cache.dtype == dtype
        tensor.fill_(number + 1)
    for number, (tensor, (spec, width)) in enumerate(
        zip(tensors, [(s, w) for s in specs for w in (s.d_k, s.d_v)], strict=True)
    ):
        assert tensor.shape == (7, 3, spec.kv_heads, width)
        assert (tensor == number + 1).all()


def test_what_a_block_has_in_all_layers_lies_together() -> None:
    specs = [KVSpec(3, 64, 64)] * 30
    cache = cache_of(specs, 100)
    for block in (0, 41):
        addresses = [tensor[block].data_ptr() for pair in cache.layers for tensor in pair]
        size = bytes_per_block(specs, 16, torch.float32)
        assert max(addresses) - min(addresses) < size
    first = cache.layers[0][0]
    assert first[1].data_ptr() - first[0].data_ptr() == size


def test_what_the_option_means_where() -> None:
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    assert kv_dtype("float32", CPU, fp32) == fp32
    assert kv_dtype("auto", CPU, fp32) == (fp16 if HALVES else fp32)
    assert kv_dtype("auto", CPU, bf16) == bf16
    assert kv_dtype("float32", CPU, bf16) == fp32
    assert kv_dtype("float16", CPU, fp16) == fp16
    for dtype in (bf16, fp16, fp32):
        assert kv_dtype("auto", GPU, dtype) == dtype
    assert kv_dtype("float16", GPU, fp16) == fp16
    with pytest.raises(ValueError, match=r"kv_cache_dtype float16 needs a model that computes in float16"):
        kv_dtype("float16", GPU, bf16)


@pytest.mark.parametrize("build", ["generic", None])
def test_without_kernels_that_read_fp16_it_is_refused_at_the_start(
    build: str | None, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = native.load(build) if build else None
    if build and without is None:
        pytest.skip("no such build on this processor")
    monkeypatch.setattr(paged_attention.native, "load", lambda: without)
    with pytest.raises(ValueError, match="kv_cache_dtype float16 needs the compiled CPU kernels"):
        Engine(tiny_base, device="cpu", config=EngineConfig(num_blocks=8, kv_cache_dtype="float16"))
    engine = Engine(tiny_base, device="cpu", config=EngineConfig(num_blocks=8))
    assert engine.kv_cache.dtype == torch.float32


@pytest.mark.parametrize("value", ["fp16", "bfloat16", "fp8", ""])
def test_a_value_that_is_none(value: str) -> None:
    with pytest.raises(ValueError, match=r"kv_cache_dtype must be auto, float16 or float32, got"):
        EngineConfig(kv_cache_dtype=value)


@needs_halves
def test_twice_as_many_blocks_fit(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peqa_runtime.engine import allocation

    monkeypatch.setattr(allocation, "available_memory", lambda _: 32 << 20)
    wide, narrow = (
        Engine(
            tiny_base, device="cpu", config=EngineConfig(kv_cache_dtype=name, max_sequences=1000)
        ).kv_cache.num_blocks
        for name in ("float32", "auto")
    )
    assert narrow in (2 * wide, 2 * wide + 1)


@needs_halves
@pytest.mark.parametrize("lean", [True, False])
def test_fp16_changes_answers_a_little_and_never_from_batch_to_batch(tiny_base: Path, lean: bool) -> None:
    """Decode and prefill, alone and together, preempted and with a beginning that is found: the same bits."""
    prompts = [[5, 6, 7, 8] * 6, [9, 10], [11] * 20, [5, 6, 7, 8] * 5]

    def engine_with(dtype: str, **sizes: int) -> Engine:
        config = EngineConfig(**{"num_blocks": 64, "block_size": 8, **sizes}, kv_cache_dtype=dtype)
        engine = Engine(tiny_base, device="cpu", config=config)
        if not lean:
            engine.model.lean = None
        return engine

    exact, rounded = engine_with("float32"), engine_with("float16")
    want = [rounded.generate([prompt], PARAMS)[0] for prompt in prompts]
    answers = rounded.generate(prompts, PARAMS)
    assert answers == want
    assert rounded.stats()["prefix_cache_hits_total"] > 0
    tight = engine_with("float16", num_blocks=7, max_batch_tokens=13)
    again = tight.generate(prompts, PARAMS)
    assert tight.stats()["preemptions_total"] > 0
    assert again == want
    others = exact.generate(prompts, PARAMS)
    assert [answer.logprobs for answer in others] != [answer.logprobs for answer in answers]


@needs_halves
def test_the_general_path_gives_what_the_lean_one_gives(
    architecture_base: Callable[..., Path],
) -> None:
    """A model that has no lean decoder keeps fp16, too."""
    base = architecture_base("gpt_neox")
    engine = Engine(base, device="cpu", config=EngineConfig(num_blocks=16))
    assert engine.model.lean is None
    assert engine.kv_cache.dtype == torch.float16
    together = engine.generate([[3, 4, 5], [6] * 20], PARAMS)
    assert [engine.generate([prompt], PARAMS)[0] for prompt in ([3, 4, 5], [6] * 20)] == together
