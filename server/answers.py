"""The JSON of completions and chat completions, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peqa_runtime.core import Lease
from peqa_runtime.text import token_text
from peqa_server.choice import Piece, TokenPiece
from peqa_server.services import ServedModel

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say (OpenAI's convention)."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Token counts of one HTTP request; `cached_tokens` of the prompts were found computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def json(self) -> Json:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True)
class AnswerStyle:
    """What the client wants to see besides the text."""

    logprobs: int | None = None
    token_ids: bool = False
    tokens_as_ids: bool = False


@dataclass
class Gathered:
    """Everything that one choice has produced so far."""

    text: str = ""
    tokens: list[TokenPiece] = field(default_factory=list)
    generated_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        if not piece.is_prompt:
            self.generated_ids += [t.token_id for t in piece.tokens]
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.stop_reason = piece.stop_reason if piece.stop_reason is not None else self.stop_reason


class Answer:
    """Writes the JSON of one request's answer. Subclasses differ in the shape of a choice."""

    prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self,
        model: ServedModel,
        lease: Lease,
        style: AnswerStyle,
        model_name: str | None = None,
        request_id: str | None = None,
    ) -> None:
        self._tokenizer = model.tokenizer
        self._style = style
        self._head: Json = {
            "id": self.prefix + (request_id or uuid.uuid4().hex),
            "object": self.whole_object,
            "created": int(time.time()),
            "model": model_name or model.model_id,
            "task": lease.task if lease.blend is None else dict(lease.blend.shares),
            "revision": lease.revision or None,
            "system_fingerprint": model.fingerprint,
        }

    def whole(self, choices: Sequence[Gathered], prompts: Sequence[tuple[int, ...]], usage: Usage) -> Json:
        """The complete answer; `prompts[i]` are the prompt tokens of choice i."""
        rows = []
        for index, (gathered, prompt) in enumerate(zip(choices, prompts, strict=True)):
            row: Json = {"index": index, **self.whole_choice(gathered)}
            row["finish_reason"] = gathered.finish_reason
            row["stop_reason"] = gathered.stop_reason
            if self._style.token_ids:
                row["token_ids"] = gathered.generated_ids
                row["prompt_token_ids"] = list(prompt)
            rows.append(row)
        return self._head | {"choices": rows, "usage": usage.json()}

    def chunk(self, index: int, piece: Piece, prompt: tuple[int, ...] | None) -> Json:
        """One streamed piece; `prompt` is given with the first chunk of a choice."""
        row: Json = {"index": index, **self.chunk_choice(piece)}
        row["finish_reason"] = piece.finish_reason
        row["stop_reason"] = piece.stop_reason
        if self._style.token_ids:
            row["token_ids"] = [] if piece.is_prompt else [t.token_id for t in piece.tokens]
            if prompt is not None:
                row["prompt_token_ids"] = list(prompt)
        return self._head | {"object": self.chunk_object, "choices": [row]}

    def last(self, usage: Usage) -> Json:
        """The chunk that `stream_options.include_usage` adds at the end."""
        return self._head | {"object": self.chunk_object, "choices": [], "usage": usage.json()}

    def opening(self, index: int) -> Json | None:
        """A chunk before a choice's first piece, where the format has one."""
        return None

    def whole_choice(self, gathered: Gathered) -> Json:
        """The choice's own fields in a complete answer."""
        return {"text": gathered.text, "logprobs": self._logprobs(gathered.tokens)}

    def chunk_choice(self, piece: Piece) -> Json:
        """The choice's own fields in a chunk."""
        return {"text": piece.text, "logprobs": self._logprobs(piece.tokens)}

    def shows(self, piece: Piece) -> bool:
        """Whether a piece has anything to tell: text held back for a possible stop string has not."""
        wants_tokens = self._style.logprobs is not None or self._style.token_ids
        return bool(piece.text or piece.finish_reason or (wants_tokens and piece.tokens))

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._style.tokens_as_ids else token_text(self._tokenizer, token_id)

    def _logprobs(self, tokens: Sequence[TokenPiece]) -> Json | None:
        """The completions format: four lists of equal length; a first prompt token has null values."""
        if self._style.logprobs is None:
            return None
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token in tokens:
            if token.logprobs is None:
                values.append(None)
                tops.append(None)
                continue
            chosen = finite(token.logprobs.logprob)
            values.append(chosen)
            top: dict[str, float] = {}
            # Least likely first: of two tokens with the same text the likelier one keeps the name.
            for token_id, logprob in reversed(token.logprobs.top[: self._style.logprobs]):
                top[self._name(token_id)] = finite(logprob)
            name = self._name(token.token_id)
            top[name] = max(top.get(name, chosen), chosen)
            tops.append(dict(sorted(top.items(), key=lambda item: -item[1])))
        return {
            "tokens": [self._name(t.token_id) for t in tokens],
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": [t.offset for t in tokens],
        }


class ChatAnswer(Answer):
    """The chat forms: `message` whole, `delta` in chunks, and chat's own logprobs format."""

    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole_choice(self, gathered: Gathered) -> Json:
        """`message` and `logprobs`."""
        return {
            "message": {"role": "assistant", "content": gathered.text},
            "logprobs": self._chat_logprobs(gathered.tokens),
        }

    def chunk_choice(self, piece: Piece) -> Json:
        """`delta` and `logprobs`."""
        return {"delta": {"content": piece.text}, "logprobs": self._chat_logprobs(piece.tokens)}

    def opening(self, index: int) -> Json:
        """The first chunk of a choice, which names the role."""
        row = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._head | {"object": self.chunk_object, "choices": [row]}

    def _chat_logprobs(self, tokens: Sequence[TokenPiece]) -> Json | None:
        if self._style.logprobs is None:
            return None
        content = []
        for token in tokens:
            if token.logprobs is None:
                continue
            top = token.logprobs.top[: self._style.logprobs]
            content.append(
                self._entry(token.token_id, token.logprobs.logprob)
                | {"top_logprobs": [self._entry(t, value) for t, value in top]}
            )
        return {"content": content}

    def _entry(self, token_id: int, logprob: float) -> Json:
        name = self._name(token_id)
        return {"token": name, "logprob": finite(logprob), "bytes": list(name.encode())}


def finite(logprob: float) -> float:
    """JSON has no infinity: clamp to OpenAI's floor."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
