"""From token outputs to the text of one choice: incremental decoding, stop strings, offsets. Knows no JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peqa_runtime.core import TokenLogprobs, TokenOutput
from peqa_runtime.text import IncrementalDecoder, StopStrings

LONG_PIECE = 1024  # tokens; to decode or write more takes more than a few milliseconds


@dataclass(frozen=True)
class Prompt:
    """One prompt: its tokens, and its text where the client sent text."""

    token_ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True)
class TextRules:
    """How tokens become text, the same for every choice of a request."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool | None = None
    echo: bool = False
    min_tokens: int = 0


@dataclass(frozen=True)
class TokenPiece:
    """One token as reported to the client. `offset`: where it starts in the choice's text, in characters."""

    token_id: int
    offset: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Piece:
    """What a step adds to a choice. `text` may be empty while a possible stop string is held back.

    `prompt_logprobs`, where asked for, come with the first one.
    """

    text: str = ""
    tokens: tuple[TokenPiece, ...] = ()
    is_prompt: bool = False
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    def then(self, later: Piece) -> Piece:
        """Both in one."""
        assert self.is_prompt == later.is_prompt
        assert self.finish_reason is None, "nothing comes after the end"
        return replace(
            later,
            text=self.text + later.text,
            tokens=self.tokens + later.tokens,
            prompt_logprobs=self.prompt_logprobs or later.prompt_logprobs,
        )


class ShownPrompt:
    """A prompt as the first piece of an answer, the same for all its choices but for the tokens' log-probabilities."""

    def __init__(self, tokenizer: Any, prompt: Prompt, rules: TextRules) -> None:
        text, skip = prompt.text, rules.skip_special_tokens
        # A text is echoed as it came, its special tokens included.
        decoder = IncrementalDecoder(tokenizer, (), skip_special_tokens=skip and text is None)
        decoded = ""
        starts = []
        for token_id in prompt.token_ids:
            starts.append(len(decoded))
            decoded += decoder.push(token_id)
        decoded += decoder.flush()
        added = 0  # characters of the begin-of-text token that encoding put before the text
        if text is None:
            text = decoded
        elif decoded.endswith(text):
            added = len(decoded) - len(text)
        self._tokens = [
            (token_id, max(0, start - added))
            for token_id, start in zip(prompt.token_ids, starts, strict=True)
        ]
        self._plain = Piece(text, tuple(TokenPiece(*token, None) for token in self._tokens), is_prompt=True)

    def piece(self, logprobs: Sequence[TokenLogprobs | None] | None) -> Piece:
        """With the tokens' log-probabilities, where there are any."""
        if logprobs is None:
            return self._plain
        pairs = zip(self._tokens, logprobs, strict=True)
        return replace(self._plain, tokens=tuple(TokenPiece(*token, value) for token, value in pairs))


class Choice:
    """Mutable state of one choice. `feed` takes the engine's outputs in order and says what the client may see."""

    def __init__(self, tokenizer: Any, prompt: Prompt, rules: TextRules) -> None:
        self._rules = rules
        self._decoder = IncrementalDecoder(
            tokenizer,
            prompt.token_ids,
            skip_special_tokens=rules.skip_special_tokens,
            spaces_between_special_tokens=rules.spaces_between_special_tokens,
        )
        self._stop = StopStrings(rules.stop, include=rules.include_stop)
        self._length = 0  # characters decoded so far, held-back ones included
        self.num_tokens = 0
        self.finished = False

    def echo(self, piece: Piece) -> None:
        """Take note that the answer begins with a piece, the prompt's."""
        self._length = len(piece.text)

    def feed(self, output: TokenOutput) -> Piece:
        """Take one output. After a stop string is found (`finished` with the engine still running): cancel."""
        piece = self._decoded(output)
        prompt = output.prompt_logprobs
        return piece if prompt is None else replace(piece, prompt_logprobs=prompt)

    def _decoded(self, output: TokenOutput) -> Piece:
        text = ""
        tokens: tuple[TokenPiece, ...] = ()
        stopped_by: int | str | None = None
        if output.token_id is not None:
            self.num_tokens += 1
            tokens = (TokenPiece(output.token_id, self._length, output.logprobs),)
            ends = output.finish_reason == "stop" and not (self._rules.include_stop or output.complete)
            text = "" if ends else self._decoder.push(output.token_id)
        if output.finished:
            text += self._decoder.flush()
        self._length += len(text)
        hit = None
        if self.num_tokens >= self._rules.min_tokens:
            text, hit = self._stop.push(text)
        if hit is not None:
            self.finished = True
            return Piece(text, tokens, finish_reason="stop", stop_reason=hit)
        reason: str | None = output.finish_reason
        if output.finished:
            self.finished = True
            text += self._stop.flush()
            stopped_by = output.stop_reason
        return Piece(text, tokens, finish_reason=reason, stop_reason=stopped_by)
