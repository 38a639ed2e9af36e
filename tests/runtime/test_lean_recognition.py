"""What the CPU's own decoder takes for its own, and what it leaves to transformers' modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from peqa_runtime.model import LoadedModel, load
from peqa_runtime.model.lean_decoder import lean_decoder

ArchitectureBase = Callable[..., Path]  # the fixture of that name


def unknown(name: str, loaded: LoadedModel) -> None:
    """Change one thing about a model that was recognised."""
    layer = loaded.model.model.layers[1]
    if name == "hook":
        layer.mlp.register_forward_hook(lambda *_: None)
    elif name == "pre-hook":
        layer.self_attn.o_proj.register_forward_pre_hook(lambda *_: None)
    elif name == "own forward":
        layer.mlp.forward = layer.mlp.forward
    elif name == "activation":
        layer.mlp.act_fn = nn.GELU()
    elif name == "scaling":
        layer.self_attn.scaling = 0.5
    elif name == "eps":
        layer.input_layernorm.variance_epsilon = 0.1
    elif name == "class of a norm":
        layer.input_layernorm = nn.RMSNorm(64)
    elif name == "one more part":
        layer.extra = nn.Identity()
    elif name == "a head with more":
        loaded.model.lm_head = nn.Sequential(loaded.model.lm_head)
    else:
        loaded.layers.reverse()


@pytest.mark.parametrize(
    "name",
    [
        "hook",
        "pre-hook",
        "own forward",
        "activation",
        "scaling",
        "eps",
        "class of a norm",
        "one more part",
        "a head with more",
        "order",
    ],
)
def test_a_model_that_differs_in_one_thing_is_not_recognised(name: str, tiny_base: Path) -> None:
    loaded = load(tiny_base, device="cpu")
    assert lean_decoder(loaded.model, loaded.layers, loaded.max_model_len) is not None
    unknown(name, loaded)
    assert lean_decoder(loaded.model, loaded.layers, loaded.max_model_len) is None


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"hidden_act": "gelu"}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("granite", {}),
        ("smollm3", {}),
        ("olmo2", {}),
    ],
    ids=["gelu", "dynamic rope", "granite", "smollm3", "olmo2"],
)
def test_other_architectures_run_through_their_modules(
    name: str, changes: dict[str, object], architecture_base: ArchitectureBase
) -> None:
    assert load(architecture_base(name, **changes), device="cpu").lean is None


def test_other_precisions_and_siblings_apart_run_through_their_modules(tiny_base: Path) -> None:
    assert load(tiny_base, device="cpu", dtype="bfloat16").lean is None
    assert load(tiny_base, device="cpu", fuse=False).lean is None
