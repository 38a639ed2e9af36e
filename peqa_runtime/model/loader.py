"""A base folder into a model that is ready to serve: loaded, verified, fused, paged and checked against itself."""

from __future__ import annotations

import ctypes
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from peqa_kernels.quant_matmul import lay_together
from peqa_runtime.core import BaseManifest
from peqa_runtime.errors import InvalidCheckpoint, UnsupportedModel
from peqa_runtime.model import hf_quantizer
from peqa_runtime.model.attention import KVSpec, PagedLayer, StepContext, place_layers
from peqa_runtime.model.base_checkpoint import read_manifest, verify_digest
from peqa_runtime.model.float_linear import steady_linears
from peqa_runtime.model.forward_context import ForwardContext
from peqa_runtime.model.fused_decoder import FusedDecoder, fused_decoder
from peqa_runtime.model.fusion import LinearSpec, fuse_siblings
from peqa_runtime.model.lean_decoder import LeanDecoder, lean_decoder
from peqa_runtime.model.own_products import steady_own_products
from peqa_runtime.model.quantized_linear import QuantizedLinear, StepRows, TiedHead
from peqa_runtime.model.self_check import self_check
from peqa_runtime.model.threads import one_thread
from peqa_runtime.text import load_tokenizer

assert hf_quantizer.METHOD  # imported for what it registers


@dataclass
class LoadedModel:
    """A model that serves packed batches.

    `linears`: its launches, to each of which the engine attaches a bank. `layers`: its attention layers, to each of
    which the engine binds a KV cache of the shape in `kv_spec`. `lean`: the same model as one call per step on a CPU,
    `fused`: in few launches on a GPU, each where it is of a kind that has one. One forward at a time.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: BaseManifest
    linears: list[LinearSpec]
    step_rows: StepRows
    kv_spec: list[KVSpec]
    layers: list[PagedLayer]
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    step_context: StepContext
    selects_logits: bool
    lean: LeanDecoder | None = None
    fused: FusedDecoder | None = None

    def forward(
        self, context: ForwardContext, input_ids: Tensor, positions: Tensor, logits_at: Tensor
    ) -> Tensor:
        """One step: input_ids and positions int64 [tokens], logits_at int64 [R] -> logits fp32 [R, vocab].

        Tokens of all sequences are packed one after the other, as `context` says; `logits_at` names none twice and may
        be empty. `step_rows` must be set before.
        """
        if self.lean is not None:
            return self.lean.forward(context, input_ids, positions, logits_at, self.step_rows)
        if self.fused is not None:
            return self.fused.forward(context, input_ids, positions, logits_at)
        return self.forward_through_modules(context, input_ids, positions, logits_at)

    def forward_through_modules(
        self, context: ForwardContext, input_ids: Tensor, positions: Tensor, logits_at: Tensor
    ) -> Tensor:
        """`forward` as transformers wrote it, whether or not there is a decoder of ours."""
        if len(logits_at) == 0:  # ops on no rows at all are a rare case in other people's modules
            return self.forward_through_modules(context, input_ids, positions, logits_at.new_zeros(1))[:0]
        self.step_context.current = context
        keep = {"logits_to_keep": logits_at} if self.selects_logits else {}
        with torch.inference_mode():
            logits = self.model(
                input_ids=input_ids[None], position_ids=positions[None], use_cache=False, **keep
            ).logits[0]
            return (logits if self.selects_logits else logits[logits_at]).float()


def load(
    folder: Path | str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    fuse: bool = True,
    paged: bool = True,
    verify: bool = True,
) -> LoadedModel:
    """Load a base folder for serving.

    `device`: auto (CUDA where there is a GPU), cpu or cuda. `dtype` of activations: auto (float32 on a CPU, bfloat16 on
    a GPU), float32, bfloat16 or float16. `verify` recomputes `base_digest` first. With `paged=False` the model keeps
    transformers' own attention (`layers` is empty, `forward` does not work).

    Raises `InvalidCheckpoint` when the folder is no base or is damaged, `UnsupportedModel` when the model would be
    computed wrongly here.
    """
    with one_thread():
        return _load(Path(folder), device, dtype, fuse, paged, verify)


def _load(folder: Path, device: str, dtype: str, fuse: bool, paged: bool, verify: bool) -> LoadedModel:
    manifest = read_manifest(folder)
    if verify:
        verify_digest(folder)
    place = pick_device(device)
    precision = pick_dtype(dtype, place)
    tokenizer = load_tokenizer(folder)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=precision, local_files_only=True, output_loading_info=True
    )
    refuse_missing(folder, info)
    model.requires_grad_(False)
    model.to(place).eval()
    _check_names(folder, model, manifest)
    linears = fuse_siblings(model, manifest.linears, fuse=fuse)
    steady_linears(model)
    if paged and place.type == "cpu":
        steady_own_products(model)
    _prepare(model, linears, serving=paged)
    step = StepContext()
    layers = place_layers(model, step) if paged else []
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        manifest=manifest,
        linears=linears,
        step_rows=StepRows(),
        kv_spec=[layer.spec for layer in layers if layer.spec is not None],
        layers=layers,
        device=place,
        dtype=precision,
        max_model_len=context_limit(model),
        eos_token_ids=_eos_token_ids(model, tokenizer),
        vocab_size=int(model.config.get_text_config().vocab_size),
        step_context=step,
        selects_logits="logits_to_keep" in inspect.signature(model.forward).parameters,
    )
    if paged:
        loaded.lean = lean_decoder(model, layers, loaded.max_model_len)
        if place.type == "cuda":
            loaded.fused = fused_decoder(model, layers, loaded.max_model_len)
        self_check(loaded)
    _give_memory_back()
    return loaded


def _prepare(model: PreTrainedModel, linears: list[LinearSpec], *, serving: bool) -> None:
    """Lay all codes out for the device: fused launches, and heads that are codes."""
    for module in (
        *(linear.module for linear in linears),
        *model.modules(),
    ):  # fused ones are not in the tree
        if isinstance(module, QuantizedLinear):
            module.serve() if serving else module.prepare()
        elif isinstance(module, TiedHead):
            module.embedding.serving = serving  # its codes stay where the lookup reads them
            module.embedding.prepare()
    if serving:
        _lay_together(model, linears)


def _lay_together(model: PreTrainedModel, linears: list[LinearSpec]) -> None:
    """Weights in the order in which a step reads them."""
    heads = (module.embedding for module in model.modules() if isinstance(module, TiedHead))
    others = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    modules = dict.fromkeys((*(linear.module for linear in linears), *others, *heads))
    lay_together(module.prepare() for module in modules)


def _give_memory_back() -> None:
    """Return to the system what loading used for a moment: else glibc keeps it, and that is more than a small model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def refuse_missing(folder: Path, info: dict[str, Any]) -> None:
    """Raise `InvalidCheckpoint` for tensors that transformers did not find, and would leave random."""
    if info["missing_keys"]:
        raise InvalidCheckpoint(
            f"{folder} is incomplete: {', '.join(sorted(info['missing_keys'])[:5])} missing"
        )


def pick_device(name: str) -> torch.device:
    """The device that auto, cpu, cuda or cuda:N means here; raises `UnsupportedModel` for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name)
    if match is None:
        raise UnsupportedModel(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if name != "cpu" and not torch.cuda.is_available():
        raise UnsupportedModel(f"device {name} was asked for, but torch sees no CUDA device; use cpu or auto")
    if match[1] and int(match[1]) >= torch.cuda.device_count():
        raise UnsupportedModel(f"device {name} was asked for, but there are only {torch.cuda.device_count()}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The activation dtype that auto, float32, bfloat16 or float16 means on `device`."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise UnsupportedModel(f"dtype must be auto, float32, bfloat16 or float16, not {name!r}")
    return dtypes[name]


def context_limit(model: PreTrainedModel) -> int:
    """Tokens that one sequence may have.

    Rotary scalings that depend on the longest sequence of a batch would let neighbours change a result: such a model
    is limited to the length up to which its frequencies are fixed.
    """
    config = model.config.get_text_config()
    limit: int = getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 2048)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if part.get("rope_type") in ("dynamic", "longrope"):
            original = part.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limit = min(limit, int(original or limit))
    return limit


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    found: set[int] = set()
    for source in (model.generation_config, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return tuple(sorted(found))


def _check_names(folder: Path, model: PreTrainedModel, manifest: BaseManifest) -> None:
    """The linears in the files must be those that the model has."""
    heads = {id(model.get_output_embeddings())}
    present = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and id(module) not in heads
    }
    expected = {name: (shape.out_features, shape.in_features) for name, shape in manifest.linears.items()}
    wrong = sorted(name for name, _ in present.items() ^ expected.items())
    if wrong:
        raise InvalidCheckpoint(
            f"{folder} does not fit its own config.json: {type(model).__name__} and the files differ in "
            f"{', '.join(dict.fromkeys(wrong[:5]))}"
        )
