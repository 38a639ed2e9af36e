"""How the tokens of a request are chosen and when it ends. Plain values, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from peqa_runtime.constraint import Constraint
from peqa_runtime.errors import InvalidRequest

MAX_LOGPROBS = 20
"""Alternatives to report for a token."""

MAX_LOGPROB_TOKENS = 1024
"""Tokens of `logprob_token_ids`."""

MAX_STOP_TOKENS = 1024
"""Tokens of `stop_token_ids`."""

MAX_BIASES = 1024
"""Tokens that `logit_bias` may name."""

MAX_BAD_WORDS = 1024
"""Sequences of `bad_words`."""

MAX_BAD_WORD_TOKENS = 64
"""Tokens of one of them."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. Values outside their range raise `InvalidRequest`.

    `logprobs` / `prompt_logprobs`: how many alternatives to report per generated / prompt token (0 = only the
    token itself, None = none). `logprob_token_ids`: tokens to report at each generated one besides. `temperature` 0 is
    greedy. `seed` None draws one at random on admission.

    `logit_bias`: (token id, number to add to its logit) for each token once. `allowed_token_ids`: nothing else is
    chosen. `bad_words`: sequences of tokens whose last token is not chosen after the others; the same text in other
    tokens is not held back. `structured`: the form of the answer, whose end ends it before `min_tokens` and in spite
    of `ignore_eos`. Reported log-probabilities are the model's own, before any of these.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    structured: Constraint | None = None

    def __post_init__(self) -> None:
        """Check every range; the message names the field and the allowed values."""
        checks: tuple[tuple[str, bool, str], ...] = (
            ("max_tokens", self.max_tokens >= 0, "at least 0"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "greater than 0 and at most 1"),
            ("top_k", self.top_k >= -1, "-1 or 0 (off) or a positive number"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a signed 64-bit integer"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            # Below 0.01 the penalised logits leave float32, and the request would end as if the model had failed.
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100.0, "between 0.01 and 100"),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"between 0 and {MAX_LOGPROBS}",
            ),
            (
                "prompt_logprobs",
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS,
                f"between 0 and {MAX_LOGPROBS}",
            ),
            (
                "stop_token_ids",
                len(self.stop_token_ids) <= MAX_STOP_TOKENS,
                f"at most {MAX_STOP_TOKENS} token ids",
            ),
            (
                "logprob_token_ids",
                not self.logprob_token_ids
                or (self.logprobs is not None and len(self.logprob_token_ids) <= MAX_LOGPROB_TOKENS),
                f"at most {MAX_LOGPROB_TOKENS} token ids, given together with logprobs",
            ),
        )
        for name, ok, allowed in checks:
            if not ok:
                value = getattr(self, name)
                got = f"{len(value)} of them" if isinstance(value, tuple) else repr(value)
                raise InvalidRequest(f"{name} must be {allowed}, got {got}", param=name)
        if self.ruled:
            self._check_rules()

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature < 1e-5

    @property
    def narrows(self) -> bool:
        """True when a token is not drawn from all that are left: top_k, top_p or min_p."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @cached_property
    def ruled(self) -> bool:
        """True when something says token by token what may be chosen: a bias, a list of tokens, a form."""
        return bool(
            self.logit_bias
            or self.allowed_token_ids is not None
            or self.bad_words
            or self.structured is not None
        )

    @cached_property
    def stop_tokens(self) -> frozenset[int]:
        """`stop_token_ids`, to look one up."""
        return frozenset(self.stop_token_ids)

    def _check_rules(self) -> None:
        """The fields of `ruled`, of which most requests have none."""
        ids = [token for token, _ in self.logit_bias]
        checks: tuple[tuple[str, bool, str], ...] = (
            ("logit_bias", len(ids) <= MAX_BIASES, f"name at most {MAX_BIASES} tokens"),
            ("logit_bias", len(set(ids)) == len(ids), "name each token once"),
            (
                "logit_bias",
                all(math.isfinite(value) and -100 <= value <= 100 for _, value in self.logit_bias),
                "have numbers between -100 and 100",
            ),
            ("allowed_token_ids", self.allowed_token_ids != (), "name at least one token"),
            (
                "bad_words",
                len(self.bad_words) <= MAX_BAD_WORDS,
                f"have at most {MAX_BAD_WORDS} sequences of tokens",
            ),
            (
                "bad_words",
                all(1 <= len(word) <= MAX_BAD_WORD_TOKENS for word in self.bad_words),
                f"have sequences of 1 to {MAX_BAD_WORD_TOKENS} tokens",
            ),
        )
        for name, ok, allowed in checks:
            if not ok:
                raise InvalidRequest(f"{name} must {allowed}", param=name)
