"""Keeps answers to a form: which tokens may come next after those so far, by llguidance."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from peqa_runtime.constraint import Constraint
from peqa_runtime.engine import grammar_probe
from peqa_runtime.engine.grammar import check_installed, llguidance, new_matcher, problem
from peqa_runtime.errors import InvalidRequest

_T = TypeVar("_T")

KEPT = 32
"""Compiled forms that are kept for requests to come."""

HELD = 256
"""Compiled forms in memory, those of requests in work included, up to which a request gets its own to hold. A large one
takes 5 MB."""


class NoTokenLeft(Exception):
    """A form can go on with no token that is allowed; the message says why."""


class Form:
    """A compiled form, for as long as somebody holds it. `matcher`: llguidance's, at the start of it."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher


class Guidance:
    """The compiled forms of one base. Thread-safe.

    llguidance reads the tokenizer when the first form is asked for: 0.2 s for a vocabulary of 49 152.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, eos_token_ids: tuple[int, ...], kept: int = KEPT
    ) -> None:
        """`tokenizer`: transformers', of the base. `vocab_size`: logits of a row, which may be more than it has."""
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._read: Any = None  # llguidance's view of the tokenizer
        self._reading = threading.Lock()
        self._kept = kept
        self._forms: OrderedDict[Constraint, Form] = OrderedDict()
        self._alive: WeakSet[Form] = WeakSet()
        self._lock = threading.Lock()  # of _forms and _alive

    def compile(self, constraint: Constraint) -> Form | None:
        """Compile a form, unless it is kept. Raises `InvalidRequest` with param "structured" where that fails.

        Returns it, for `start` not to compile it again once it is not kept any more; None while `HELD` are alive.
        """
        form = self._form(constraint)
        with self._lock:
            return form if len(self._alive) <= HELD else None

    def knows(self, constraint: Constraint) -> bool:
        """Whether a form is compiled and kept."""
        with self._lock:
            return constraint in self._forms

    def compile_carefully(self, constraint: Constraint) -> None:
        """`compile`, after it was found to take little time and memory: for forms that strangers send."""
        if not self.knows(constraint):
            grammar_probe.check(constraint)
            self._form(constraint)

    def start(self, constraint: Constraint, form: Form | None = None, *, anew: bool = False) -> Any:
        """A matcher at the start of a form. `form`: what `compile` gave; `anew`: one that shares nothing with those
        before."""
        if anew:
            with self._lock:
                self._forms.pop(constraint, None)
        return self._form(constraint, form).matcher.deep_copy()

    def _form(self, constraint: Constraint, held: Form | None = None) -> Form:
        with self._lock:
            form = self._forms.get(constraint, held)
            if form is not None:
                self._keep(constraint, form)
                return form
        form = Form(new_matcher(self._vocabulary(), constraint))
        with self._lock:
            self._keep(constraint, form)
        return form

    def _keep(self, constraint: Constraint, form: Form) -> None:
        """Keep it as the latest one. Needs the lock."""
        self._alive.add(form)
        self._forms[constraint] = form
        self._forms.move_to_end(constraint)
        while len(self._forms) > self._kept:
            self._forms.popitem(last=False)

    def _vocabulary(self) -> Any:
        """llguidance's view of the tokenizer, made once."""
        with self._reading:
            if self._read is None:
                check_installed()
                backend = getattr(self._tokenizer, "backend_tokenizer", None)
                if backend is None:
                    raise InvalidRequest(
                        "answers in a form need a fast tokenizer, and this base has none", param="structured"
                    )
                if not self.eos_token_ids:
                    raise InvalidRequest(
                        "answers in a form need a token that ends them, and this base has none",
                        param="structured",
                    )
                self._read = llguidance.LLTokenizer(
                    backend.to_str(), n_vocab=self.vocab_size, eos_token=list(self.eos_token_ids)
                )
            return self._read


class Guide:
    """Where one answer stands in its form. It may be a token ahead of what is booked, and begins again then.

    Tokens that end an answer are allowed exactly when the form is complete: the model's (unless `ignore_eos`) and
    the request's own, which are also allowed where the form has their text.
    """

    def __init__(
        self,
        guidance: Guidance,
        constraint: Constraint,
        stop_token_ids: Iterable[int],
        *,
        ignore_eos: bool,
        form: Form | None = None,
    ) -> None:
        """`form`: the compiled constraint, where somebody has it."""
        self._guidance = guidance
        self._constraint = constraint
        self._form = form
        self._matcher = guidance.start(constraint, form)
        self._tokens: list[int] = []
        self._eos = frozenset(guidance.eos_token_ids)
        self._stops = frozenset(stop_token_ids) - self._eos
        self._ignore_eos = ignore_eos

    @property
    def end_token(self) -> int:
        """A token that ends an answer."""
        return self._guidance.eos_token_ids[0]

    def follow(self, token_ids: list[int], start: int) -> None:
        """Stand behind `token_ids[start:]`, the answer so far. Raises `NoTokenLeft`."""
        if len(token_ids) - start < len(self._tokens):
            self._matcher = self._guidance.start(self._constraint, self._form)
            self._tokens.clear()
        new = token_ids[start + len(self._tokens) :]
        if new:
            self._do(lambda m: m.consume_tokens(new))
            self._tokens += new

    def allows(self, token: int) -> bool:
        """Whether this token may come next. Raises `NoTokenLeft`."""
        if token in self._eos:
            return not self._ignore_eos and self.accepts()
        return self._do(lambda m: m.validate_tokens([token])) == 1 or (
            token in self._stops and self.accepts()
        )

    def accepts(self) -> bool:
        """Whether the answer so far has the whole form."""
        return bool(self._do(lambda m: m.is_accepting()))

    @property
    def matcher(self) -> Any:
        """llguidance's `LLMatcher`, which fills masks; where it fails, `finish_mask` finds out."""
        return self._matcher

    def finish_mask(self, mask: NDArray[np.int32]) -> None:
        """Make a mask that `matcher` has filled right: bit t of [words] says whether token t may come next.

        Raises `NoTokenLeft`.
        """
        if self._matcher.is_error():
            self._do(lambda m: m.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes))
        words = mask.view(np.uint32)
        if self._ignore_eos:
            for token in self._eos:
                words[token // 32] &= ~np.uint32(1 << token % 32)
        if self._stops and self.accepts():
            for token in self._stops:
                words[token // 32] |= np.uint32(1 << token % 32)

    def take(self, token: int) -> Literal["open", "complete"]:
        """Go on with a token that is allowed; "complete": nothing can follow it. Raises `NoTokenLeft`."""
        if token in self._eos or token in self._stops:
            return "open"  # it ends the answer by itself
        self._do(lambda m: m.consume_token(token))
        self._tokens.append(token)
        return "complete" if self._matcher.is_stopped() else "open"

    def _do(self, action: Callable[[Any], _T]) -> _T:
        """Ask the matcher. Answers in a form share states of its lexer, of which there may only be so many: when they
        are used up, a new matcher begins without those of others."""
        result = action(self._matcher)
        if not self._matcher.is_error():
            return result
        try:
            self._form = None
            self._matcher = self._guidance.start(self._constraint, anew=True)
        except InvalidRequest as error:
            raise NoTokenLeft(str(error)) from None
        self._matcher.consume_tokens(self._tokens)
        result = action(self._matcher)
        if self._matcher.is_error():
            raise NoTokenLeft(problem(self._matcher))
        return result
