"""Tokenizer of a GGUF file, built from its metadata (byte-level BPE).

transformers' own conversion keeps only the ByteLevel step and needs the `gguf` package; what splits text before the
merges is named by `tokenizer.ggml.pre` and decides how digits and spaces come out.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from peqa_runtime.errors import InvalidCheckpoint

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

# The split expressions that llama.cpp names (src/llama-vocab.cpp), as the models' own tokenizer.json has them.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3}
_DIGITS = ("smollm", "refact", "command-r", "starcoder")
_PLAIN = ("gpt-2", "gpt2", "default")


def pre_tokenizer(name: str) -> Any:
    """The splitting step called `name` in GGUF metadata; raises `InvalidCheckpoint` for one that is not known."""
    if name in _DIGITS:
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if name in _PLAIN:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _SPLITS:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLITS[name]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise InvalidCheckpoint(
        f"GGUF pre-tokenizer {name!r} is not known (known: {', '.join((*_DIGITS, *_PLAIN, *_SPLITS))}); give the "
        "original model's tokenizer folder instead (tokenizer_from)"
    )


def build_tokenizer(metadata: dict[str, Any], max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer that the metadata describe, with its chat template.

    Raises `InvalidCheckpoint` when the vocabulary is not byte-level BPE or contradicts itself.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise InvalidCheckpoint(
            f"GGUF tokenizer {kind!r} cannot be rebuilt (byte-level BPE, 'gpt2', can); give the original model's "
            "tokenizer folder instead (tokenizer_from)"
        )
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise InvalidCheckpoint("GGUF vocabulary holds a token twice")
    merges: list[tuple[str, str]] = []
    for merge in _strings(metadata, "tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise InvalidCheckpoint(
                f"GGUF tokenizer holds the merge {merge!r}, which is not two known tokens"
            )
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer(str(metadata.get("tokenizer.ggml.pre", "default")))
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type") or []
    tokenizer.add_special_tokens(_added(tokens, types, _CONTROL, special=True))
    tokenizer.add_tokens(_added(tokens, types, _USER_DEFINED, special=False))
    names = {
        role: _token(metadata, tokens, key)
        for role, key in (
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        )
    }
    bos = names["bos_token"]
    if metadata.get("tokenizer.ggml.add_bos_token") and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"),
        **{role: token for role, token in names.items() if token is not None},
    )


def _strings(metadata: dict[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise InvalidCheckpoint(f"GGUF metadata {key!r} must be a list of strings")
    return values


def _added(tokens: list[str], types: list[int], wanted: int, *, special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False, special=special)
        for token, kind in zip(tokens, types, strict=False)
        if kind == wanted
    ]


def _token(metadata: dict[str, Any], tokens: list[str], key: str) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{key}")
    if index is None:
        return None
    if type(index) is not int or not 0 <= index < len(tokens):
        raise InvalidCheckpoint(
            f"GGUF metadata tokenizer.ggml.{key} = {index!r} is outside of the vocabulary"
        )
    return tokens[index]
