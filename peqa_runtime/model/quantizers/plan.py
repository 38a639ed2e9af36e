"""Which linear gets how many bits: the default, and rules for some of them.

A file of rules is JSON, `{"rules": [{"match": "*.down_proj", "bits": 4}, {"match": "re:.*[.]0[.].*", "skip": true}]}`.
`match` is a shell pattern of whole module names, or a regular expression after `re:`. A rule sets any of `bits`,
`group_size` and `method`, or `skip`: the linear stays floats. What no rule sets is the default.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from peqa_runtime.errors import InvalidCheckpoint, InvalidData, InvalidRequest
from peqa_runtime.model.base_checkpoint import PER_CHANNEL, Precision

Method = Literal["rtn", "gptq", "blockwise"]
BITS = (2, 3, 4, 8)
GROUP_SIZES = (PER_CHANNEL, 16, 32, 64, 128, 256)
METHODS: tuple[Method, ...] = ("rtn", "gptq", "blockwise")
_CHOICES: dict[str, tuple[Any, ...]] = {"bits": BITS, "group_size": GROUP_SIZES, "method": METHODS}
_REGULAR = "re:"


@dataclass(frozen=True)
class LinearPlan:
    """How one linear is quantized."""

    bits: int
    group_size: int
    method: Method

    def __post_init__(self) -> None:
        """Raise `InvalidRequest` naming the field that has no such value."""
        for field in _CHOICES:
            check_choice(field, getattr(self, field))

    @property
    def precision(self) -> Precision:
        """As the base's config has it."""
        return Precision(self.bits, self.group_size)


@dataclass(frozen=True)
class Rule:
    """What the linears that `match` get; `settings` holds `bits`, `group_size`, `method` or `skip`."""

    match: str
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Raise `InvalidRequest` with a sentence for a rule that cannot be."""
        where = f"the rule {self.match!r}"
        unknown = sorted(self.settings.keys() - {*_CHOICES, "skip"})
        if unknown:
            raise InvalidRequest(
                f"{where} sets {unknown[0]!r}; it can set {', '.join(_CHOICES)} or skip", param="rules"
            )
        if not self.settings:
            raise InvalidRequest(
                f"{where} sets nothing; it can set {', '.join(_CHOICES)} or skip", param="rules"
            )
        if "skip" in self.settings and (self.settings["skip"] is not True or len(self.settings) > 1):
            raise InvalidRequest(f'{where}: "skip": true stands alone, without bits or method', param="rules")
        for field, value in self.settings.items():
            if field != "skip":
                check_choice(field, value, where)
        try:
            re.compile(self._pattern)
        except re.error as error:
            raise InvalidRequest(f"{where} is no regular expression: {error}", param="rules") from None

    @property
    def _pattern(self) -> str:
        return self.match.removeprefix(_REGULAR) if self.match.startswith(_REGULAR) else ""

    def fits(self, name: str) -> bool:
        """Whether the rule is for the linear of this name."""
        if self.match.startswith(_REGULAR):
            return re.fullmatch(self._pattern, name) is not None
        return fnmatchcase(name, self.match)

    def to_json(self) -> dict[str, Any]:
        """As in a file of rules."""
        return {"match": self.match, **self.settings}


def check_choice(field: str, value: Any, where: str = "") -> None:
    """Raise `InvalidRequest` when a field of a plan has a value that does not exist."""
    allowed = _CHOICES[field]
    if type(value) is not type(allowed[0]) or value not in allowed:
        prefix = f"{where}: " if where else ""
        raise InvalidRequest(f"{prefix}{field} must be one of {allowed}, not {value!r}", param=field)


def read_rules(path: Path | str) -> tuple[Rule, ...]:
    """The rules of a file. Raises `InvalidData` when it cannot be read, `InvalidRequest` for a rule that cannot be."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidData(f"{path}: the rules cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InvalidData(f"{path} is no JSON: {error}") from None
    rules = value.get("rules") if isinstance(value, dict) and value.keys() == {"rules"} else None
    if not isinstance(rules, list) or not all(
        isinstance(rule, dict) and isinstance(rule.get("match"), str) and rule["match"] for rule in rules
    ):
        raise InvalidData(
            f'{path} must hold {{"rules": [{{"match": "*.down_proj", "bits": 4}}, …]}}: each rule has a "match"'
        )
    return tuple(
        Rule(rule["match"], {key: value for key, value in rule.items() if key != "match"}) for rule in rules
    )


def plan_linears(
    linears: Mapping[str, int], default: LinearPlan, rules: Sequence[Rule]
) -> dict[str, LinearPlan | None]:
    """The plan of each linear (None: it stays floats). `linears`: inputs of each, by name.

    Raises `InvalidRequest` when a rule fits nothing or two contradict each other, `InvalidCheckpoint` for a group size
    that does not divide a linear's inputs.
    """
    plans: dict[str, LinearPlan | None] = {}
    unused = list(rules)
    for name, in_features in linears.items():
        chosen: dict[str, tuple[Any, Rule]] = {}
        for rule in rules:
            if rule.fits(name):
                if rule in unused:
                    unused.remove(rule)
                _add(name, chosen, rule)
        if "skip" in chosen:
            plans[name] = None
            continue
        values = {field: value for field, (value, _) in chosen.items()}
        plan = LinearPlan(**{**vars(default), **values})
        check_fit(name, in_features, plan.group_size)
        plans[name] = plan
    if unused:
        near = difflib.get_close_matches(unused[0].match, linears, n=2, cutoff=0.0)
        raise InvalidRequest(
            f"the rule {unused[0].match!r} fits no linear; names are like {' or '.join(near)} "
            "(embeddings and the output head stay as they are)",
            param="rules",
        )
    if not any(plans.values()):
        raise InvalidRequest("the rules skip every linear; nothing is left to quantize", param="rules")
    return plans


def _add(name: str, chosen: dict[str, tuple[Any, Rule]], rule: Rule) -> None:
    for field, value in rule.settings.items():
        before = chosen.get(field)
        clash = before if before and before[0] != value else None
        if chosen and (field == "skip") != ("skip" in chosen):
            clash = next(iter(chosen.values()))
        if clash:
            raise InvalidRequest(
                f"the rules {clash[1].match!r} and {rule.match!r} contradict each other for {name}; let only one of "
                "them fit it",
                param="rules",
            )
        chosen[field] = (value, rule)


def check_fit(name: str, in_features: int, group_size: int) -> None:
    """Raise `InvalidCheckpoint` when a linear's inputs cannot be packed, or the group size does not divide them."""
    if in_features % 8:
        raise InvalidCheckpoint(f"{name} has {in_features} inputs; only multiples of 8 can be packed")
    if group_size != PER_CHANNEL and in_features % group_size:
        fit = [str(g) for g in GROUP_SIZES if g == PER_CHANNEL or in_features % g == 0]
        raise InvalidCheckpoint(
            f"group size {group_size} does not divide the {in_features} inputs of {name}; "
            f"group sizes that fit it: {', '.join(fit)}"
        )
