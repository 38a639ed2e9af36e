"""Text to tokens and back, a token at a time: encode, incremental decoding, stop strings, chat templates.

The engine speaks token ids only; this is the one place that knows text. `tokenizer` is any transformers tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peqa_runtime.errors import InvalidCheckpoint, InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""What a decoder shows for bytes that are no UTF-8 (yet)."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
"""A token that stands for one byte, in vocabularies that fall back to bytes."""

_CONTEXT = 6
"""Prompt tokens that a decoder looks back on, so that the first generated token keeps its leading space."""

_LONG = 4096
"""Tokens decoded in a way that costs more to begin but lets other threads run: some milliseconds."""

_MAX_HELD = 8
"""A character has at most 4 bytes, so at most 4 tokens: more held-back tokens than this hold no character."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises `InvalidCheckpoint` where none can be read."""
    from transformers import AutoTokenizer

    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).partition("\n")[0].rstrip(" :")
        raise InvalidCheckpoint(
            f"{folder} has no tokenizer that can be read ({reason}); copy the model's tokenizer files into it"
        ) from error
    return found


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of `text`, exactly as it stands; with the model's begin-of-text token where it has one."""
    ids: list[int] = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return ids


def decode(tokenizer: Any, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
    """Text of `token_ids`; bytes that are no UTF-8 become U+FFFD. Ids outside the vocabulary raise `InvalidRequest`."""
    ids = list(token_ids)
    size = len(tokenizer)
    for token_id in ids:
        if not 0 <= token_id < size:
            raise InvalidRequest(f"token id {token_id} is outside the vocabulary of {size}", param="tokens")
    return _decode(tokenizer, ids, skip_special_tokens)


def token_text(tokenizer: Any, token_id: int) -> str:
    """One token's own text, its leading space and special tokens included; part of a character shows as U+FFFD.

    Alone at the start of a text a token may lose its leading space, so it is read as its own successor.
    """
    once = _decode(tokenizer, [token_id], False)
    return _decode(tokenizer, [token_id, token_id], False)[len(once) :]


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """One token's own bytes. Of a token that is part of a character the text cannot say them."""
    text = token_text(tokenizer, token_id)
    if REPLACEMENT not in text:
        return text.encode()
    name = str(tokenizer.convert_ids_to_tokens(token_id))
    if (byte := _BYTE_TOKEN.fullmatch(name)) is not None:
        return bytes.fromhex(byte[1])
    letters = _byte_letters()
    if all(letter in letters for letter in name):
        return bytes(letters[letter] for letter in name)
    return text.encode()


class TokenTexts:
    """`token_text`, and `token_bytes` as numbers, of one tokenizer. The last `KEPT` of each are kept, for answers with
    log-probabilities ask for the same again and again."""

    KEPT = 32768  # 15 megabytes at most

    def __init__(self, tokenizer: Any) -> None:
        self.text: Callable[[int], str] = lru_cache(self.KEPT)(partial(token_text, tokenizer))
        self.bytes: Callable[[int], tuple[int, ...]] = lru_cache(self.KEPT)(
            lambda token_id: tuple(token_bytes(tokenizer, token_id))
        )


def _byte_letters() -> dict[str, int]:
    """How byte-level BPE writes bytes in names of tokens: printable Latin-1 as itself, the rest from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


def apply_chat_template(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
) -> str:
    """The prompt text of a conversation (encode it without special tokens: the template has written them).

    Raises `InvalidRequest` when the model has no template or the template refuses the messages.
    """
    from jinja2 import TemplateError  # comes with transformers; only chats need it

    if not getattr(tokenizer, "chat_template", None):
        raise InvalidRequest("this model has no chat template; send a plain prompt instead", param="messages")
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, ValueError) as error:
        raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from None
    return text


class IncrementalDecoder:
    """Turns a stream of token ids into text that never ends within a character.

    All pieces together, `flush` included, are the text of the tokens after `prompt_token_ids`.

        [ decoded before ... | context ... | held back ... ]
                           _prefix       _read           len(_ids)

    A token's text depends on its left neighbours (leading spaces, bytes of one character), so each piece is the
    difference between decoding context + held and decoding the context alone.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._spaces = spaces_between_special_tokens
        self._ids = list(prompt_token_ids[-_CONTEXT:])
        self._prefix = 0
        self._read = len(self._ids)

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is certain now (possibly none)."""
        self._ids.append(token_id)
        before = self._text(self._prefix, self._read)
        now = self._text(self._prefix, len(self._ids))
        if now.endswith(REPLACEMENT):
            if len(self._ids) - self._read <= _MAX_HELD:
                return ""
            # Bytes that never become a character: let go of all but what a character could still begin with.
            read = len(self._ids) - 4
            return self._advance(before, self._text(self._prefix, read), read)
        if len(now) <= len(before):
            return ""
        return self._advance(before, now, len(self._ids))

    def flush(self) -> str:
        """The text of what is still held back (U+FFFD for an unfinished character). Call it once, at the end."""
        end = len(self._ids)
        return self._advance(self._text(self._prefix, self._read), self._text(self._prefix, end), end)

    def _advance(self, before: str, now: str, read: int) -> str:
        self._prefix, self._read = self._read, read
        return now[len(before) :]

    def _text(self, start: int, stop: int) -> str:
        return _decode(self._tokenizer, self._ids[start:stop], self._skip_special_tokens, self._spaces)


class StopStrings:
    """Cuts a stream of text at the first stop string, and never lets out what could be the start of one."""

    def __init__(self, stop: Iterable[str], *, include: bool = False) -> None:
        self._stop = tuple(stop)
        assert all(self._stop), "a stop string has at least one character"
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Take decoded text; return what may be shown, and the stop string that was hit, if one was.

        Among several, the one that is complete first wins; of those, the one that starts first. With `include`
        the shown text ends with it, without it just before it. After a hit nothing more may be pushed.
        """
        held, self._held = self._held + text, ""
        hits = [(held.find(s) + len(s), held.find(s), s) for s in self._stop if s in held]
        if hits:
            end, start, stop = min(hits)
            return held[: end if self._include else start], stop
        keep = max((_overlap(held, s) for s in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], None

    def flush(self) -> str:
        """The text held back, when generation has ended without a hit."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper start of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _decode(
    tokenizer: Any, token_ids: list[int], skip_special_tokens: bool, spaces: bool | None = None
) -> str:
    """`spaces` between special tokens (None: as the tokenizer does): tokenizers with a backend never put any."""
    if not token_ids:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # without transformers' wrapper, which costs more than the decoding
        fast: str
        if len(token_ids) <= _LONG:
            fast = backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        else:
            (fast,) = backend.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return fast
    options = {} if spaces is None else {"spaces_between_special_tokens": spaces}
    slow: str = tokenizer.decode(
        token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False, **options
    )
    return slow
