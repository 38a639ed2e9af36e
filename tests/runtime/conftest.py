"""Models of the runtime's tests: tiny bases, and a fake model of a few lines for the engine.

The fake's next token depends on everything the engine must get right. Its "hidden state" at a position is a weighted
sum over the tokens before it, read back from the KV cache, and over the scales of each token's bank row; so a wrong
block, slot, position, row or stale cache changes the answer. `FakeModel.expected` computes that answer without
engine, cache or batch.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from peqa_runtime.core import BaseManifest, LinearShape
from peqa_runtime.engine.config import EngineConfig
from peqa_runtime.engine.engine import Engine
from peqa_runtime.model.base_checkpoint import Precision, QuantizationSpec
from peqa_runtime.model.base_writer import BaseWriter, staged_folder
from peqa_runtime.model.quantize import quantize_folder, quantize_rtn
from peqa_runtime.scales.scale_store import ScaleStore
from peqa_runtime.scales.task_library import TaskLibrary
from peqa_runtime.scales.task_registry import TaskRegistry

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package; helpers are shared by name

from quantize_cases import Make, quantize_options
from training_cases import Rows

END = "<end>"
GROUP = 32


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {END: 0}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def write_base(folder: Path) -> Path:
    """A random model of 4-bit codes; the same on every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    spec = QuantizationSpec(
        bits=4,
        group_size=GROUP,
        model_id="tiny",
        modules_to_not_convert=("lm_head",),
        embeddings=("model.embed_tokens", "lm_head"),
    )
    with staged_folder(folder) as staging:
        byte_tokenizer().save_pretrained(staging)
        values = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
        with BaseWriter(staging, values, spec) as writer:
            for name, tensor in model.state_dict().items():
                if "_proj" in name:
                    writer.add_codes(name.removesuffix(".weight"), quantize_rtn(tensor, 4, GROUP))
                elif name != "lm_head.weight":
                    writer.add_float(name, tensor)
    return folder


@pytest.fixture(scope="session")
def tuning_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny base. Nobody writes into it."""
    return write_base(tmp_path_factory.mktemp("tuning") / "base")


MODULUS = 65521
VOCAB = 97
NO_EOS = 1_000_000


@dataclass(frozen=True)
class KVShape:
    kv_heads: int = 1
    d_k: int = 1
    d_v: int = 1


class FakeLayer:
    def bind(self, key_cache: Tensor, value_cache: Tensor) -> None:
        self.key_cache, self.value_cache = key_cache, value_cache


class FakeLinear:
    """Reads the bank as a quantized linear does: one factor per token."""

    def attach(self, bank: Any, rows: Any) -> None:
        self.bank, self.rows = bank, rows

    def scales(self, tokens: int) -> Tensor:
        if self.rows.row is None:
            return torch.ones(tokens)
        return self.bank.out_scale[self.rows.row.long(), 0]


class FakeTokenizer:
    """One token per ASCII character."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - 32 for c in text]}

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "".join(chr(i + 32) for i in token_ids)


@dataclass
class FakeModel:
    """What the engine needs of a LoadedModel.

    A forward raises when it computes the token `explode`, or always when `broken`; `poison` gives a row of NaN.
    """

    eos_token_ids: tuple[int, ...] = (NO_EOS,)
    explode: int | None = None
    poison: int | None = None
    broken: bool = False
    max_model_len: int = 256
    vocab_size: int = VOCAB
    kv_spec: list[KVShape] = field(default_factory=lambda: [KVShape()])
    layers: list[FakeLayer] = field(default_factory=lambda: [FakeLayer()])
    forwards: list[int] = field(default_factory=list)
    before_forward: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.device, self.dtype, self.model = torch.device("cpu"), torch.float32, torch.nn.Module()
        self.manifest = BaseManifest("fake", "ab" * 32, {"l": LinearShape(2, 2, 1)})
        self.tokenizer = FakeTokenizer()
        self.linear = FakeLinear()
        spec = SimpleNamespace(names=("l",), sizes=(2,), in_features=2, groups=1, module=self.linear)
        self.linears = [spec]
        self.step_rows = SimpleNamespace(row=None, group_row=None)

    def forward(self, context: Any, input_ids: Tensor, positions: Tensor, logits_at: Tensor) -> Tensor:
        self.before_forward()
        self.forwards.append(len(input_ids))
        if self.broken or (self.explode is not None and bool((input_ids == self.explode).any())):
            raise RuntimeError("boom")
        keys = self.layers[0].key_cache
        hidden = self._hidden(input_ids, positions, self.linear.scales(len(input_ids)))
        slots = context.slot_mapping
        keys[slots // keys.shape[1], slots % keys.shape[1], 0, 0] = hidden.float()
        states = torch.zeros(len(input_ids), dtype=torch.int64)
        starts = context.query_starts.tolist()
        for s, length in enumerate(context.seq_lens.tolist()):
            at = torch.arange(length)
            block = context.block_tables[s].long()[at // keys.shape[1]]
            past = keys[block, at % keys.shape[1], 0, 0].long()
            new = starts[s + 1] - starts[s]
            states[starts[s] : starts[s + 1]] = self._states(past)[length - new :]
        logits = self._logits(states)
        if self.poison is not None:
            logits[input_ids == self.poison] = float("nan")
        return logits[logits_at]

    @staticmethod
    def _hidden(ids: Tensor, positions: Tensor, scales: Tensor) -> Tensor:
        return (ids * 31 + positions * 7 + (scales * 1000).round().long()) % MODULUS

    @staticmethod
    def _states(hidden: Tensor) -> Tensor:
        return (hidden * (torch.arange(len(hidden)) + 1)).cumsum(0) % MODULUS

    @staticmethod
    def _logits(states: Tensor) -> Tensor:
        mixed = (states[:, None] + 1) * (torch.arange(VOCAB) + 3) * 7919 % MODULUS
        return mixed.float() / MODULUS * 8

    def expected(self, prompt: list[int], num_tokens: int, scale: float = 1.0) -> list[int]:
        """The greedy continuation."""
        ids = list(prompt)
        for _ in range(num_tokens):
            t = torch.tensor(ids)
            hidden = self._hidden(t, torch.arange(len(ids)), torch.full((len(ids),), scale))
            ids.append(int(self._logits(self._states(hidden)[-1:]).argmax()))
        return ids[len(prompt) :]


def fake_set(scale: float, digest: str = "ab" * 32) -> bytes:
    """A scale set file for the fake model."""
    metadata = {"format": "peqa-scale-set", "format_version": "1", "kind": "channel", "base_digest": digest}
    metadata |= {"task": "", "prompt_format": "", "note": "{}"}
    return safetensors.torch.save({"l.out_scale": torch.full((2,), scale)}, metadata)


@pytest.fixture
def fake_engine(tmp_path: Path) -> Callable[..., Engine]:
    """Make engines on fake models: `fake_engine(FakeModel settings as model={...}, tasks={name: scale}, **config)`."""
    numbers = itertools.count()

    def make(
        *, model: dict[str, Any] | None = None, tasks: dict[str, float] | None = None, **config: int
    ) -> Engine:
        sizes = {"num_blocks": 64, "block_size": 4, "task_rows": 8, **config}
        settings = EngineConfig(**sizes, kv_cache_dtype="float32")  # its keys are integers beyond 2^11
        fake = FakeModel(**(model or {}))
        registry = TaskRegistry(rows=settings.task_rows, group_rows=settings.group_rows)
        library = TaskLibrary(ScaleStore(tmp_path / f"store{next(numbers)}", fake.manifest), registry)
        for task, scale in (tasks or {}).items():
            library.upload(task, fake_set(scale))
        return Engine(fake, library, settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_fake_set() -> Callable[[float], bytes]:
    return fake_set


@pytest.fixture
def architecture_base(tiny_hf_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make 4-bit bases of random tiny models: `architecture_base(model_type, **config)`.

    `embeddings`: bits of the embedding and of the head, where they are to be codes too (llama-like names only).
    """
    numbers = itertools.count()

    def make(name: str, embeddings: int | None = None, **changes: object) -> Path:
        options = {
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.1,
            "bos_token_id": 1,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**options, **changes}))
        with torch.no_grad():
            for leaf, parameter in model.named_parameters():
                if leaf.endswith(("bias", "norm.weight")):  # zeros and ones would hide what is left out
                    parameter.add_(0.2 * torch.randn_like(parameter))
        folder = tmp_path / f"{name}{next(numbers)}"
        model.save_pretrained(folder / "hf")
        AutoTokenizer.from_pretrained(tiny_hf_folder).save_pretrained(folder / "hf")
        if embeddings is None:
            quantize_folder(folder / "hf", folder / "base", 4, GROUP, progress=False)
        else:
            _write_codes(model, folder / "hf", folder / "base", embeddings)
        return folder / "base"

    return make


def _write_codes(model: PreTrainedModel, source: Path, folder: Path, embedding_bits: int) -> None:
    outside = (
        ("model.embed_tokens",) if model.config.tie_word_embeddings else ("model.embed_tokens", "lm_head")
    )
    overrides = dict.fromkeys(outside, Precision(embedding_bits, GROUP))
    spec = QuantizationSpec(
        4, GROUP, "tiny", overrides=overrides, embeddings=("model.embed_tokens", "lm_head")
    )
    with staged_folder(folder) as staging:
        AutoTokenizer.from_pretrained(source).save_pretrained(staging)
        with BaseWriter(staging, json.loads((source / "config.json").read_text()), spec) as writer:
            for name, tensor in safetensors.torch.load_file(source / "model.safetensors").items():
                module = name.removesuffix(".weight")
                if module in outside or (name.endswith("_proj.weight")):
                    writer.add_codes(module, quantize_rtn(tensor, spec.of(module).bits, GROUP))
                else:
                    writer.add_float(name, tensor)


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    """Where a scale store is to lie; nothing is there yet."""
    return tmp_path / "store"


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9000 random words. Do not write into it."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    rng = random.Random(0)
    words = [
        "the",
        "cat",
        "and",
        "dog",
        "sat",
        "on",
        "mat",
        "then",
        "they",
        "ran",
        "into",
        "another",
        "house",
        "over",
    ]
    file.write_text(" ".join(rng.choice(words) for _ in range(9000)))
    return file


@pytest.fixture
def make_base(tiny_hf_folder: Path, calibration_text: Path, tmp_path: Path) -> Make:
    """Quantize into `tmp_path / name`: `make_base(name, method, bits, group_size, source=folder, **options)`."""

    def quantize(name: str, method: str, bits: int = 3, group_size: int = 32, **changes: Any) -> Path:
        source = changes.pop("source", tiny_hf_folder)
        quantize_folder(
            source, tmp_path / name, bits, group_size, method,  # type: ignore[arg-type]
            options=quantize_options(calibration_text, **changes), progress=False,
        )  # fmt: skip
        return tmp_path / name

    return quantize


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    """Write rows to tune on: `rows(word, count)`."""

    def write(word: str, count: int) -> Path:
        file = tmp_path / f"{word}.jsonl"
        pairs = ({"prompt": f"{i} is" + "?" * (i % 5), "completion": f"{word} {i % 3}"} for i in range(count))
        file.write_text("\n".join(map(json.dumps, pairs)))
        return file

    return write
