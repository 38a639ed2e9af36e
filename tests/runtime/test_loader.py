"""Loading for serving: fusion, paging, the self-check, rows that do not depend on their batch, many architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peqa_kernels import native
from peqa_kernels.quant_matmul.weight import LinearBank
from peqa_runtime.errors import UnsupportedModel
from peqa_runtime.model import (
    ForwardContext,
    LoadedModel,
    QuantizedLinear,
    load,
    read_manifest,
)
from peqa_runtime.model import attention as attention_module
from peqa_runtime.model.float_linear import SteadyLinear
from peqa_runtime.model.fusion import SiblingPart, fuse_siblings
from peqa_runtime.model.loader import context_limit, pick_device
from peqa_runtime.model.self_check import packed_logits, self_check

ArchitectureBase = Callable[..., Path]  # the fixture of that name
BLOCK = 8
ATTENTION = "model.layers.0.self_attn."


def bind(loaded: LoadedModel, blocks: int) -> None:
    for layer, spec in zip(loaded.layers, loaded.kv_spec, strict=True):
        layer.bind(
            torch.zeros(blocks, BLOCK, spec.kv_heads, spec.d_k),
            torch.zeros(blocks, BLOCK, spec.kv_heads, spec.d_v),
        )


def step(loaded: LoadedModel, chunks: list[tuple[Tensor, int, list[int]]]) -> Tensor:
    """One forward of (ids, position of the first, block table) per sequence; logits of every token."""
    positions = torch.cat([torch.arange(start, start + len(ids)) for ids, start, _ in chunks])
    slots = [
        table[p // BLOCK] * BLOCK + p % BLOCK
        for ids, start, table in chunks
        for p in range(start, start + len(ids))
    ]
    width = max(len(table) for _, _, table in chunks)
    starts = torch.tensor([0, *(len(ids) for ids, _, _ in chunks)]).cumsum(0)
    context = ForwardContext(
        block_tables=torch.tensor([t + [0] * (width - len(t)) for _, _, t in chunks], dtype=torch.int32),
        query_starts=starts.to(torch.int32),
        seq_lens=torch.tensor([start + len(ids) for ids, start, _ in chunks], dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
    )
    ids = torch.cat([ids for ids, _, _ in chunks])
    return loaded.forward(context, ids, positions, torch.arange(len(ids)))


def random_ids(seed: int, count: int, vocab: int = 300) -> Tensor:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def loaded(tiny_base: Path) -> LoadedModel:
    return load(tiny_base, device="cpu")


def test_what_load_tells(loaded: LoadedModel, tiny_base: Path) -> None:
    assert loaded.manifest == read_manifest(tiny_base)
    assert [(s.kv_heads, s.d_k, s.d_v, s.sliding_window) for s in loaded.kv_spec] == [(2, 16, 16, None)] * 2
    assert len(loaded.layers) == 2
    assert all(layer.key_cache is None for layer in loaded.layers)
    assert (loaded.max_model_len, loaded.eos_token_ids, loaded.vocab_size) == (512, (0,), 300)
    assert (loaded.device.type, loaded.dtype) == ("cpu", torch.float32)
    assert loaded.tokenizer.decode(loaded.tokenizer("then the cat 😀").input_ids) == "then the cat 😀"


def test_packed_steps_equal_the_plain_model(loaded: LoadedModel, tiny_base: Path) -> None:
    """Prefill in chunks, then decode, two sequences in one pack, blocks scattered."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    a, b = random_ids(1, 21), random_ids(2, 9)
    with torch.no_grad():
        expected_a, expected_b = plain(a[None]).logits[0], plain(b[None]).logits[0]
    bind(loaded, 6)
    table_a, table_b = [5, 0, 3], [2, 4]
    first = step(loaded, [(a[:13], 0, table_a), (b[:8], 0, table_b)])
    second = step(loaded, [(b[8:9], 8, table_b), (a[13:20], 13, table_a)])
    third = step(loaded, [(a[20:], 20, table_a)])
    torch.testing.assert_close(torch.cat([first[:13], second[1:], third]), expected_a, rtol=1e-3, atol=5e-3)
    torch.testing.assert_close(torch.cat([first[13:], second[:1]]), expected_b, rtol=1e-3, atol=5e-3)


def test_logits_at_picks_tokens(loaded: LoadedModel) -> None:
    ids = random_ids(1, 7)
    context = ForwardContext(
        block_tables=torch.tensor([[0]], dtype=torch.int32),
        query_starts=torch.tensor([0, 7], dtype=torch.int32),
        seq_lens=torch.tensor([7], dtype=torch.int32),
        slot_mapping=torch.arange(7),
    )
    bind(loaded, 1)
    every = loaded.forward(context, ids, torch.arange(7), torch.arange(7))
    some = loaded.forward(context, ids, torch.arange(7), torch.tensor([6, 2]))
    assert every.dtype == torch.float32
    assert torch.equal(some, every[[6, 2]])


@pytest.mark.parametrize("folder", ["tiny_base", pytest.param("smollm2_base", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lean", [True, False], ids=["lean", "modules"])
def test_bits_of_a_token_do_not_depend_on_its_batch(
    folder: str, lean: bool, request: pytest.FixtureRequest
) -> None:
    """On the CPU, with and without the lean decoder."""
    loaded = load(request.getfixturevalue(folder), device="cpu")
    assert loaded.lean is not None
    loaded.lean = loaded.lean if lean else None
    check_bits_of_a_token(loaded)


def check_bits_of_a_token(loaded: LoadedModel) -> None:
    """Alone, in company and in other chunks: equal bits."""
    a, others = random_ids(3, 14), [random_ids(seed, 3 + 2 * seed) for seed in range(4, 11)]
    bind(loaded, 40)
    alone = torch.cat([step(loaded, [(a[i : i + 1], i, [0, 1])]) for i in range(14)])
    chunked = torch.cat([step(loaded, [(a[:11], 0, [0, 1])]), step(loaded, [(a[11:], 11, [0, 1])])])
    assert torch.equal(alone, chunked)
    company = [(ids, 0, [2 + 4 * i, 3 + 4 * i, 4 + 4 * i]) for i, ids in enumerate(others)]
    mixed = step(loaded, [*company[:3], (a, 0, [0, 1]), *company[3:]])
    before = sum(len(ids) for ids in others[:3])
    assert torch.equal(mixed[before : before + 14], alone)


def test_fusion_covers_every_linear_once(loaded: LoadedModel) -> None:
    names = [name for linear in loaded.linears for name in linear.names]
    assert sorted(names) == sorted(loaded.manifest.linears)
    qkv = loaded.linears[0]
    assert qkv.names == (f"{ATTENTION}q_proj", f"{ATTENTION}k_proj", f"{ATTENTION}v_proj")
    assert (qkv.sizes, qkv.in_features, qkv.groups, qkv.out_features) == ((64, 32, 32), 64, 2, 128)
    assert [linear.names[0].rpartition(".")[2] for linear in loaded.linears[:4]] == [
        "q_proj",
        "o_proj",
        "gate_proj",
        "down_proj",
    ]
    assert isinstance(loaded.model.get_submodule(f"{ATTENTION}k_proj"), SiblingPart)
    assert isinstance(loaded.model.lm_head, SteadyLinear)


def test_fused_and_apart_give_the_same(loaded: LoadedModel, tiny_base: Path) -> None:
    apart = load(tiny_base, device="cpu", fuse=False)
    assert len(apart.linears) == 14
    assert all(linear.sizes == (linear.out_features,) for linear in apart.linears)
    ids = random_ids(5, 20)
    torch.testing.assert_close(packed_logits(apart, ids), packed_logits(loaded, ids), rtol=1e-3, atol=1e-3)


def test_siblings_in_any_order_and_with_other_inputs(tiny_base: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_base).model.layers[0].self_attn
    fused = AutoModelForCausalLM.from_pretrained(tiny_base)
    fuse_siblings(fused, read_manifest(tiny_base).linears)
    parts = fused.model.layers[0].self_attn
    x, y = torch.randn(2, 1, 5, 64)
    with torch.no_grad():
        for leaf, value in [
            ("v_proj", x),
            ("q_proj", x),
            ("q_proj", y),
            ("k_proj", x),
            ("v_proj", y),
            ("k_proj", y),
        ]:
            expected, found = getattr(plain, leaf)(value), getattr(parts, leaf)(value)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        parts.v_proj(y)
    assert parts.q_proj.group.x is None, "no activation is kept"


def test_siblings_that_differ_stay_apart(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.model.layers[0].self_attn.k_proj = QuantizedLinear(64, 32, 8, 32)
    specs = fuse_siblings(model, read_manifest(tiny_base).linears)
    assert [s.names for s in specs[:3]] == [(f"{ATTENTION}{leaf}_proj",) for leaf in "qkv"]
    assert specs[4].names == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("kind", ["channel", "channel+input", "group"])
def test_a_bank_row_equals_the_tuned_model(tiny_base: Path, kind: str) -> None:
    """The same scales as trained (one set on the plain model) and as served (rows of a bank, siblings fused)."""
    tuned = AutoModelForCausalLM.from_pretrained(tiny_base)
    served = load(tiny_base, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for linear in served.linears:
        bank = LinearBank(linear.sizes, torch.ones(3, linear.out_features))
        if kind == "channel+input":
            bank.in_scale = torch.ones(3, len(linear.sizes), linear.in_features)
        if kind == "group":
            bank.group_scale = torch.ones(3, linear.groups, linear.out_features)
        start = 0
        for i, (name, size) in enumerate(zip(linear.names, linear.sizes, strict=True)):
            module = tuned.get_submodule(name)
            module.tune(kind)
            for leaf, parameter in module.named_parameters():
                if leaf.startswith("tuned."):
                    parameter.data.copy_(torch.rand(parameter.shape, generator=generator) * 0.5 + 0.75)
            if kind == "group":
                bank.group_scale[2, :, start : start + size] = module.tuned[0].group_scale.data.T
            else:
                bank.out_scale[2, start : start + size] = module.tuned[0].out_scale.data
            if kind == "channel+input":
                bank.in_scale[2, i] = module.tuned[0].in_scale.data
            start += size
        linear.module.attach(bank, served.step_rows)
    ids = random_ids(6, 8)
    with torch.no_grad():
        expected = tuned(ids[None]).logits[0]
        base = AutoModelForCausalLM.from_pretrained(tiny_base)(ids[None]).logits[0]
    bind(served, 4)
    rows = torch.tensor([0] * 8 + [2] * 8, dtype=torch.int32)
    served.step_rows.row, served.step_rows.group_row = rows, rows if kind == "group" else None
    found = step(served, [(ids, 0, [0]), (ids, 0, [3])])
    torch.testing.assert_close(found[:8], base, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[8:], expected, rtol=1e-3, atol=1e-3)
    assert (base - expected).abs().max() > 0.1


def test_two_loaded_models_do_not_share_anything(loaded: LoadedModel, tiny_base: Path) -> None:
    other = load(tiny_base, device="cpu")
    a, b = random_ids(7, 10), random_ids(8, 6)
    expected_a, expected_b = packed_logits(loaded, a), packed_logits(other, b)
    bind(loaded, 2)
    bind(other, 2)
    step(loaded, [(a[:9], 0, [0, 1])])
    assert torch.equal(step(other, [(b, 0, [0, 1])]), expected_b)
    assert torch.equal(step(loaded, [(a[9:], 9, [0, 1])])[0], expected_a[9])


ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "granite": {},
    "cohere2": {"sliding_window": 6},
    "smollm3": {},
    "starcoder2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "do_layer_norm_before": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, architecture_base: ArchitectureBase) -> None:
    """`load` runs the self-check; a longer prompt also reaches past the sliding windows."""
    base = architecture_base(name, **ARCHITECTURES[name])
    loaded = load(base, device="cpu")
    assert self_check(loaded) < 5e-4
    ids = random_ids(9, 30)
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = loaded.model(input_ids=ids[None], use_cache=False).logits[0]
    loaded.model.set_attn_implementation(attention_module.ATTENTION)
    torch.testing.assert_close(packed_logits(loaded, ids), expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bits_of_a_token_of_any_architecture(name: str, architecture_base: ArchitectureBase) -> None:
    check_bits_of_a_token(load(architecture_base(name, **ARCHITECTURES[name]), device="cpu"))


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_models_that_would_be_silently_wrong_are_refused(
    name: str, architecture_base: ArchitectureBase
) -> None:
    changes = {"n_head": 4, "n_layer": 2, "alibi": False} if name == "bloom" else {}
    base = architecture_base(name, **changes)
    with pytest.raises(UnsupportedModel, match="does not take its attention from"):
        load(base, device="cpu")


def test_layers_with_another_kind_of_state_are_refused(architecture_base: ArchitectureBase) -> None:
    base = architecture_base(
        "lfm2",
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention"],
    )
    with pytest.raises(UnsupportedModel, match="layers of type conv"):
        load(base, device="cpu")


def test_self_check_finds_wrong_numbers(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_module.paged_attention

    def slightly_wrong(*args: object, scaling: float, **options: object) -> Tensor:
        return right(*args, scaling=scaling * 1.05, **options)

    monkeypatch.setattr(attention_module, "paged_attention", slightly_wrong)
    with pytest.raises(UnsupportedModel, match="other logits with paged attention"):
        load(tiny_base, device="cpu")


def test_self_check_finds_a_layer_that_does_not_call(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(tiny_base, device="cpu")
    attention = loaded.model.model.layers[1].self_attn
    monkeypatch.setattr(
        attention, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    )
    with pytest.raises(UnsupportedModel, match="once per layer and step"):
        self_check(loaded)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 512),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, 512),
        (
            {
                "rope_type": "dynamic",
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": 128,
            },
            128,
        ),
        (
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            128,
        ),
    ],
    ids=["default", "linear", "dynamic", "longrope"],
)
def test_rope_that_depends_on_the_batch_limits_the_context(rope: dict, limit: int) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=32,
        max_position_embeddings=512,
        rope_parameters=rope,
    )
    assert context_limit(LlamaForCausalLM(config)) == limit


def test_device_and_dtype_that_are_not_there(tiny_base: Path) -> None:
    with pytest.raises(UnsupportedModel, match="dtype must be auto, float32"):
        load(tiny_base, device="cpu", dtype="int4")
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedModel, match="no CUDA device"):
            load(tiny_base, device="cuda")


def test_bfloat16_on_the_cpu(tiny_base: Path, loaded: LoadedModel) -> None:
    rounded = load(tiny_base, device="cpu", dtype="bfloat16")
    ids = random_ids(5, 20)
    exact = packed_logits(loaded, ids)
    found = packed_logits(rounded, ids)
    assert found.dtype == torch.float32
    assert ((found - exact).square().mean() / exact.square().mean()).sqrt() < 0.2


def test_generate_of_transformers_works(tiny_base: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_base),
        AutoTokenizer.from_pretrained(tiny_base),
    )
    ids = tokenizer("the cat sat on", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert out.shape[1] == ids.input_ids.shape[1] + 8


@pytest.mark.parametrize("name", ["gpu", "mps", "CPU", "cuda:", "cuda:x", "cuda:64", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="device"):
        pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")


def test_attention_is_warmed_up_once_for_each_kind_of_layer(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the layers will be called: their heads, scaling, window, softcap and sinks."""
    pytest.importorskip("triton")
    from peqa_kernels.paged_attention import gpu

    calls: list[dict] = []
    monkeypatch.setattr(gpu, "warm_up", lambda key, value, **how: calls.append({"d": key.shape[3], **how}))
    config = loaded.model.config
    layers = loaded.layers
    assert len(layers) > 1
    d = config.hidden_size // config.num_attention_heads
    for layer in layers:
        monkeypatch.setattr(layer, "key_cache", torch.zeros(1, BLOCK, config.num_key_value_heads, d))
        monkeypatch.setattr(layer, "value_cache", torch.zeros(1, BLOCK, config.num_key_value_heads, d))
    attention_module.warm_up_attention(layers, torch.float16, row_invariant=True)
    expected = {
        "heads": config.num_attention_heads,
        "scaling": d**-0.5,
        "sliding_window": None,
        "softcap": None,
    }
    assert calls == [{"d": d, "dtype": torch.float16, "sinks": None, "invariant": True, **expected}]


def test_a_model_that_serves_holds_its_codes_once(tiny_base: Path) -> None:
    """In the kernels' layout alone; a model for training and evaluation keeps them as the files have them."""
    serving, other = load(tiny_base, device="cpu"), load(tiny_base, device="cpu", paged=False)
    for linear in serving.linears:
        module = linear.module
        assert all(getattr(module, name).is_meta for name in ("qweight", "scales", "zeros"))
        assert module.weight_codes().out_features == linear.out_features, "shapes are known"
        with pytest.raises(RuntimeError, match="load the base anew"):
            module.prepare().dense()
    for linear in other.linears:
        assert not linear.module.qweight.is_meta
        assert linear.module.prepare().dense().shape == (linear.out_features, linear.in_features)


def test_without_compiled_kernels_the_codes_stay(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = packed_logits(load(tiny_base, device="cpu"), torch.arange(5))
    monkeypatch.setattr(native, "load", lambda: None)
    loaded = load(tiny_base, device="cpu")
    assert not any(linear.module.qweight.is_meta for linear in loaded.linears)
    assert torch.allclose(packed_logits(loaded, torch.arange(5)), want, atol=1e-2)
