"""The whole engine on the Triton kernels: python engine_triton_checks.py cpu|cuda BASE [BASE ...].

Requests over the base and a task of each kind, in one batch, against the engine on the CPU's own kernels: prompt
log-probabilities, greedy tokens and their log-probabilities. The second base runs through transformers' modules, the
others through the fused decoder. On "cpu" TRITON_INTERPRET=1 must be set; the ops are then pointed at the Triton
kernels by hand, and decode steps of the first base's first run take the way of CUDA graphs, padding and all, with a
replay that runs the step again. Exits non-zero at the first difference.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

import peqa_kernels.elementwise as elementwise
import peqa_kernels.paged_attention as attention
import peqa_runtime.model.quantized_linear as modules
from peqa_kernels.elementwise import gpu
from peqa_kernels.paged_attention.gpu import paged_attention_gpu, write_kv_gpu
from peqa_runtime.core import SCALE_KINDS
from peqa_runtime.engine import kv_cache
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.decode_graphs import DecodeGraphs
from peqa_runtime.engine.engine import Engine
from peqa_runtime.engine.graph_plan import GraphPlan
from peqa_runtime.engine.offline import Completion
from peqa_runtime.model import LoadedModel, load
from peqa_runtime.model.fused_decoder import fused_decoder
from peqa_runtime.sampling_params import SamplingParams

_spec = importlib.util.spec_from_file_location(
    "cases", Path(__file__).with_name("test_batch_independence.py")
)
assert _spec is not None
assert _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

PROMPTS = ["the cat and the dog", "mat sat on", "into another house", "over there, without them, " * 4]
CONFIG = EngineConfig(num_blocks=64, max_batch_tokens=24, task_rows=5)  # the last prompt comes in chunks
LIMIT = {"float32": 2e-3, "float16": 5e-2, "bfloat16": 3e-1}  # the tiny models' logits reach 30


class Again:
    """A recorder whose replay runs the work again."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        return run

    def forget(self) -> None:
        """There is nothing to forget."""


class Contiguous:
    """Caches as a GPU has them, with nothing between two blocks."""

    def __init__(self, shapes: object, dtype: torch.dtype) -> None:
        self.part = partial(torch.zeros, dtype=dtype)


def with_graphs(engine: Engine) -> None:
    """Give the engine what it has by itself on a GPU."""
    engine.runner.graphs = DecodeGraphs(
        GraphPlan((1, 5), (engine.max_model_len,)),
        Again(),
        engine.runner.forward,
        engine.bank,
        block_size=CONFIG.block_size,
        scratch_block=engine.kv_cache.spare[0],
        vocab_size=engine.model.vocab_size,
        device=engine.model.device,
        row_invariant=False,
    )


def loaded(base: Path, device: str, dtype: str, *, fused: bool) -> LoadedModel:
    """A model, which on a CUDA device has a fused decoder anyway."""
    model = load(base, device=device, dtype=dtype)
    if fused and device == "cpu":
        model.fused = fused_decoder(model.model, model.layers, model.max_model_len)
    assert model.fused is not None or not fused
    model.fused = model.fused if fused else None
    return model


def answers(model: LoadedModel, *, graphs: bool = False) -> list[Completion]:
    """Four requests, each of another task."""
    exact = (
        model.device.type == "cpu" and model.dtype == torch.float32
    )  # the caches, too: else the CPU's would be fp16
    config = replace(CONFIG, kv_cache_dtype="float32") if exact else CONFIG
    engine = Engine(model, config=config)
    if graphs:
        with_graphs(engine)
    for i, kind in enumerate(SCALE_KINDS):
        engine.tasks.upload(f"task{i}", cases.random_set(engine, kind, i, 0.2))
    params = SamplingParams(max_tokens=3, temperature=0.0, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    completions = engine.generate(PROMPTS, params, ["base", "task0", "task1", "task2"])
    assert (engine.runner.graphs is not None) is (graphs or model.device.type == "cuda")
    assert engine.runner.graphs is None or engine.runner.graphs.replays > 0
    return completions


def on_triton(base: Path, device: str, dtype: str, *, graphs: bool, fused: bool) -> list[Completion]:
    """`answers` on the Triton kernels, which a CUDA device has anyway."""
    with ExitStack() as stack:
        if device == "cpu":
            for name in ("rms_norm", "add_rms_norm", "rotate_and_write", "silu_mul"):
                kernel = getattr(gpu, f"{name}_gpu")
                stack.enter_context(patch.object(elementwise, f"{name}_reference", kernel))
            for place, name, other in (
                (modules, "prepare", partial(modules.prepare, backend="gpu")),
                (attention.native, "load", lambda: None),
                (attention, "paged_attention_cpu", paged_attention_gpu),
                (attention, "write_kv_cpu", write_kv_gpu),
                (kv_cache, "_Interleaved", Contiguous),
            ):
                stack.enter_context(patch.object(place, name, other))
        return answers(loaded(base, device, dtype, fused=fused), graphs=graphs)


def check(base: Path, device: str, dtype: str, *, graphs: bool = False, fused: bool) -> None:
    """Compare; rounding may change a token of 16 bits, but never the log-probabilities of the prompt."""
    ours = on_triton(base, device, dtype, graphs=graphs, fused=fused)
    wanted = answers(loaded(base, "cpu", "float32", fused=False))
    for got, want in zip(ours, wanted, strict=True):
        name = f"{base.name} {dtype} {got.task}"
        assert got.finish_reason == "length", f"{name}: {got.error}"
        pairs = list(zip(got.prompt_logprobs[1:], want.prompt_logprobs[1:], strict=True))
        if dtype == "float32":
            assert got.token_ids == want.token_ids, name
            pairs += zip(got.logprobs, want.logprobs, strict=True)
        worst = max(abs(a.logprob - b.logprob) for a, b in pairs)
        assert worst < LIMIT[dtype], f"{name}: {worst}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, folders = sys.argv[1], [Path(folder) for folder in sys.argv[2:]]
    for i, folder in enumerate(folders):
        # The interpreter is slow, and multiplies bfloat16 wrongly.
        for precision in LIMIT if where == "cuda" else ("float32",) if i else ("float32", "float16"):
            graphed = where == "cpu" and i == 0 and precision == "float32"
            check(folder, where, precision, graphs=graphed, fused=i != 1)
    print("checks passed")
