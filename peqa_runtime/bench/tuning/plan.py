"""What is measured: bases, tasks, ways to tune, and the settings that the recorded sweep fixed."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from peqa_runtime.errors import InvalidData
from peqa_runtime.training.settings import BETA2, LEARNING_RATES, Schedule


@dataclass(frozen=True)
class TaskPlan:
    """One task of the data: files, metric, and what `peqa eval` is told besides."""

    name: str
    folder: str
    metric: str
    steps: int  # that take all its training rows once
    held_out: str = ""  # a file; "" = split off the training rows
    eval_options: tuple[str, ...] = ()
    max_tokens: int = 256

    @property
    def key(self) -> str:
        """The metric's name in a report."""
        return self.metric.replace("-", "_")


TASKS = MappingProxyType(
    {
        # String literals keep their case in about one row of six, by chance: they are compared without it.
        "sql": TaskPlan("sql", "wikisql", "exact-match", 480, "dev.jsonl", ("--ignore-case",)),
        # Rows without any slot would be right for an answer that never finds one.
        "slots": TaskPlan("slots", "restaurant8k-slots", "exact-match", 500, "", ("--filter-nonempty",)),
        "intents": TaskPlan("intents", "banking77", "exact-match", 612),
        "e2e": TaskPlan("e2e", "e2e-nlg", "bleu", 280),
        "gsm8k": TaskPlan("gsm8k", "gsm8k", "final-number", 455, max_tokens=512),
    }
)
KINDS = ("channel", "channel+input", "group")
WAYS = (*KINDS, "lora")


@dataclass(frozen=True)
class Optimizer:
    """AdamW's settings that are swept; the defaults are transformers' own."""

    learning_rate: float
    schedule: Schedule = "cosine"
    beta2: float = 0.999

    @property
    def name(self) -> str:
        """What its trial is called: the rate, and what differs from the defaults."""
        schedule = "" if self.schedule == "cosine" else f"-{self.schedule}"
        return f"lr{self.learning_rate:g}{schedule}" + ("" if self.beta2 == 0.999 else f"-beta{self.beta2:g}")

    @property
    def options(self) -> tuple[object, ...]:
        """As the commands take them."""
        return ("--lr", f"{self.learning_rate:g}", "--schedule", self.schedule, "--beta2", f"{self.beta2:g}")


_RATES = MappingProxyType({**LEARNING_RATES, "lora": 4e-3})
_BETA2 = MappingProxyType({**BETA2, "lora": 0.999})
_AROUND = MappingProxyType({way: (1, 3, 10, 30) if way != "lora" else (1, 2, 4, 8) for way in WAYS})
TRIALS = MappingProxyType(
    {
        way: (
            *(Optimizer(thousandths / 1000) for thousandths in _AROUND[way]),
            Optimizer(_RATES[way], "linear"),
            Optimizer(_RATES[way], "linear", 0.95),
        )
        for way in WAYS
    }
)
"""As many for LoRA as for each kind of set: rates around where each is known to work, then linear decay and a
shorter memory at the best of these."""
CHOSEN = MappingProxyType({way: Optimizer(rate, "linear", _BETA2[way]) for way, rate in _RATES.items()})
"""Fixed from the recorded sweep (`--only sweep`), for runs that do not sweep."""
SWEEP_STEPS = 60
TEXT = "wikitext-2"
GROUP = 64
METHODS = ("rtn", "gptq", "blockwise")


@dataclass(frozen=True)
class Plan:
    """The size of a run. `windows` of the test text (None = all), `text_tokens` to tune on."""

    parts: tuple[str, ...]
    bits: tuple[int, ...]
    groups: tuple[int, ...]
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    windows: int | None
    test_rows: int
    text_tokens: int
    task_steps: float = 1.0  # times a task's own steps
    text_kinds: tuple[str, ...] = ("channel",)  # of sets tuned on text

    def __post_init__(self) -> None:
        """Refuse names that are not there."""
        checks = (
            ("part", self.parts, PARTS),
            ("bits", self.bits, (2, 3, 4)),
            ("method", self.methods, METHODS),
            ("task", self.tasks, tuple(TASKS)),
            ("kind", self.text_kinds, KINDS),
        )
        for what, given, known in checks:
            for one in given:
                if one not in known:
                    raise InvalidData(f"no {what} {one!r}: use {', '.join(map(str, known))}")


PARTS = ("cost", "perplexity", "sweep", "tasks")
REDUCED = Plan(
    ("cost", "perplexity", "tasks"),
    (4, 3),
    (GROUP,),
    ("rtn", "gptq"),
    ("slots",),  # the one whose rows are shortest
    (0,),
    40,
    300,
    100_000,
    task_steps=0.25,
)
FULL = Plan(
    PARTS,
    (4, 3, 2),
    (GROUP, -1),
    METHODS,
    tuple(TASKS),
    (0, 1, 2),
    None,
    1000,
    260_000,
    task_steps=2.0,
    text_kinds=("channel", "group"),
)
