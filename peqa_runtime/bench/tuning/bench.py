"""The parts of the benchmark, each a list of cells; a cell whose rows are there already is passed over."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peqa_kernels.bench.machine import device_name
from peqa_kernels.bench.row import Op, Row
from peqa_runtime.bench.tuning import cost
from peqa_runtime.bench.tuning.cell import Cell
from peqa_runtime.bench.tuning.commands import Ran, run, shown_as
from peqa_runtime.bench.tuning.plan import (
    CHOSEN,
    KINDS,
    SWEEP_STEPS,
    TASKS,
    TEXT,
    TRIALS,
    WAYS,
    Optimizer,
    Plan,
    TaskPlan,
)
from peqa_runtime.bench.tuning.splits import split_rows, split_text
from peqa_runtime.bench.tuning.store import RowFile
from peqa_runtime.errors import InvalidData
from peqa_runtime.evaluation.compare import paired
from peqa_runtime.evaluation.metrics import metric_named

PEQA = "peqa_runtime"
LORA = "peqa_runtime.bench.tuning.lora"
TEXT_WINDOW = 512


@dataclass
class Bench:
    """Where everything lies. `base` is the imported model, whose floats are the reference."""

    data: Path
    work: Path
    base: Path
    plan: Plan
    rows: RowFile
    device: str = "auto"
    hardware: str = field(default="")

    def __post_init__(self) -> None:
        """Refuse data that is not there before time is spent."""
        place = torch.device("cuda" if torch.cuda.is_available() and self.device != "cpu" else "cpu")
        self.hardware = self.hardware or device_name(place)
        wanted = [self.data / TEXT / "test.raw.txt", self.data / TEXT / "valid.raw.txt"]
        if {"tasks", "sweep"} & set(self.plan.parts):
            wanted += [
                self.data / TASKS[t].folder / f
                for t in self.plan.tasks
                for f in ("train.jsonl", "test.jsonl")
            ]
        for file in wanted:
            if not file.is_file():
                raise InvalidData(
                    f"{file} is missing: `python -m peqa_runtime.bench.tuning fetch DIR` gets the data"
                )

    def cells(self) -> list[Cell]:
        """All cells of the plan, in the order in which they are measured."""
        found: list[Cell] = []
        for part in self.plan.parts:
            found += list(getattr(self, f"_{part}")())
        return found

    def _row(
        self,
        name: str,
        value: float,
        unit: str,
        op: Op,
        ran: Ran | None,
        bar: float | None = None,
        **facts: Any,
    ) -> Row:
        more: dict[str, Any] = {"date": datetime.date.today().isoformat(), "device": self.hardware, **facts}
        if ran is not None:
            more |= {"command": ran.command, "seconds": round(ran.seconds, 1)}
        return Row(name, value, unit, op, bar, more)

    def _peqa(self, *arguments: object) -> Ran:
        return run(PEQA, *arguments, "--device", self.device, "--json")

    # -- cost ----------------------------------------------------------------------------------------------------

    def _cost(self) -> Iterator[Cell]:
        names = [
            f"tuning/cost/{way}/{what}" for way in cost.WAYS for what in ("seconds-per-step", "peak-memory")
        ]
        names += [f"tuning/cost/steps-per-second-against-{way}" for way in cost.WAYS[1:]]
        names += ["tuning/cost/peak-memory-against-lora"]

        def measure() -> list[Row]:
            date = {"date": datetime.date.today().isoformat()}
            found = cost.measure(self.base, rows=16, tokens=64, steps=10, device=self.device)
            command = "python -m peqa_runtime.bench.tuning.cost BASE"
            return [
                Row(r.name, r.value, r.unit, r.op, r.bar, r.facts | date | {"command": command})
                for r in found
            ]

        yield Cell(tuple(names), measure)

    # -- perplexity ----------------------------------------------------------------------------------------------

    def _perplexity(self) -> Iterator[Cell]:
        bases = ["float"]
        bases += [
            f"{bits}bit-{_group(group)}-{method}"
            for bits in self.plan.bits
            for group in self.plan.groups
            for method in self.plan.methods
        ]
        for base in bases:
            name = f"tuning/perplexity/{base}"
            windows = {"windows": self.plan.windows, "computes": "served"}
            yield Cell(
                (f"{name}/before",), partial(self._before, base, f"{name}/before"), partial(dict, windows)
            )
            for kind in self.plan.text_kinds:
                for seed in self.plan.seeds:
                    own = f"{name}/{_after(kind)}/seed{seed}"
                    tuned = windows | {"text_tokens": self.plan.text_tokens, **asdict(CHOSEN[kind])}
                    yield Cell((own,), partial(self._after, base, own, seed, kind), partial(dict, tuned))
        for bits, limit in ((4, 1.05), (3, 1.15)):
            for kind in self.plan.text_kinds if bits in self.plan.bits else ():
                own = f"tuning/perplexity/{bits}bit/tuned-against-float{_after(kind).removeprefix('after')}"
                of = partial(self._tuned_text, bits, _after(kind))
                yield Cell((own,), partial(self._against_float, own, bits, limit, of), of)

    def _base(self, name: str) -> Path:
        """The base of this name, quantized now if it is not there yet. `float` is the imported one."""
        if name == "float":
            return self.base
        folder = self.work / "bases" / name
        if not (folder / "config.json").is_file():
            self._peqa(*self._quantize(name))
        return folder

    def _quantize(self, name: str) -> tuple[object, ...]:
        """The command's words that make the base of this name."""
        bits, group, method = name.split("-", 2)
        options = [] if method == "rtn" else ["--calibration", self.data / TEXT / "valid.raw.txt"]
        size = -1 if group == "row" else int(group.removeprefix("g"))
        sizes = ("--bits", bits.removesuffix("bit"), "--group-size", size, "--method", method)
        return ("quantize", self.base, "-o", self.work / "bases" / name, *sizes, *options)

    def _made_by(self, name: str) -> dict[str, str]:
        return {} if name == "float" else {"base_command": shown_as(PEQA, *self._quantize(name))}

    def _eval_text(self, base: str, *more: object) -> Ran:
        limit = () if self.plan.windows is None else ("--limit", self.plan.windows)
        test = self.data / TEXT / "test.raw.txt"
        return self._peqa("eval", self._base(base), test, "--metric", "perplexity", *limit, *more)

    def _before(self, base: str, name: str) -> list[Row]:
        ran = self._eval_text(base)
        facts = {"tokens": ran.report["tokens"], **self._made_by(base)}
        return [self._row(name, ran.report["perplexity"], "", "<=", ran, **facts)]

    def _after(self, base: str, name: str, seed: int, kind: str) -> list[Row]:
        train, held_out = split_text(self.data, self.work, self.plan.text_tokens)
        own = "" if kind == "channel" else f"-{kind}"
        output = self.work / "sets" / f"{base}-text{own}-{seed}.safetensors"
        output.unlink(missing_ok=True)  # of a benchmark that was stopped before the cell was measured
        trained = self._peqa(
            *("train", self._base(base), train, "--task", "wikitext", "--eval", held_out, "-o", output),
            *("--kind", kind, "--max-tokens", TEXT_WINDOW, "--batch", 4, "--warmup", 5),
            *(*CHOSEN[kind].options, "--check-every", 25, "--seed", seed),
        )
        ran = self._eval_text(base, "--scale-set", output)
        note = trained.report
        facts = {"seed": seed, "train_tokens": note["tokens"], "train_command": trained.command}
        facts |= self._made_by(base)
        facts |= {
            "train_seconds": note["seconds"],
            "peak_memory_bytes": note["peak_memory_bytes"],
            "tokens": ran.report["tokens"],
        }
        return [self._row(name, ran.report["perplexity"], "", "<=", ran, **facts)]

    def _tuned_text(self, bits: int, after: str) -> dict[str, float]:
        """Mean perplexity of `float` and of each base of these bits, tuned in this way."""
        tuned: dict[str, list[float]] = {}
        for row in self.rows.rows.values():
            base = row["name"].split("/")[2]
            if f"/{after}/" in row["name"] and base.startswith(("float", f"{bits}bit")):
                tuned.setdefault(base, []).append(row["value"])
        return {base: sum(values) / len(values) for base, values in tuned.items()}

    def _against_float(
        self, name: str, bits: int, limit: float, tuned: Callable[[], dict[str, float]]
    ) -> list[Row]:
        """The best base of these bits, tuned, over the float model tuned the same way."""
        means = tuned()
        best = min((base for base in means if base != "float"), key=lambda base: means[base])
        return [self._row(name, means[best] / means["float"], "x", "<=", None, limit, base=best)]

    # -- tasks ---------------------------------------------------------------------------------------------------

    def _sweep(self) -> Iterator[Cell]:
        for task in (TASKS[name] for name in self.plan.tasks):
            for way in WAYS:
                for trial in TRIALS[way]:
                    name = f"tuning/sweep/{task.name}/{way}/{trial.name}"
                    yield Cell((name,), partial(self._trial, task, way, trial, name), self._sweep_settings)

    def _sweep_settings(self) -> dict[str, Any]:
        return {"steps": SWEEP_STEPS}

    def _trial(self, task: TaskPlan, way: str, trial: Optimizer, name: str) -> list[Row]:
        output = self.work / "sweep" / f"{task.name}-{way}-{trial.name}.safetensors"
        ran = self._train(task, way, 0, trial, SWEEP_STEPS, output)
        return [self._row(name, ran.report["held_out_loss"], "nats", "<=", ran, seed=0, steps=SWEEP_STEPS)]

    def _optimizer(self, task: TaskPlan, way: str) -> Optimizer:
        """The settings with the lowest held-out loss in the rows' own sweep, or the recorded ones."""
        losses = {
            trial: self.rows.value(name)
            for trial in TRIALS[way]
            if self.rows.has([name := f"tuning/sweep/{task.name}/{way}/{trial.name}"])
        }
        return (
            min(losses, key=lambda trial: losses[trial]) if len(losses) == len(TRIALS[way]) else CHOSEN[way]
        )

    def _tasks(self) -> Iterator[Cell]:
        for task in (TASKS[name] for name in self.plan.tasks):
            name = f"tuning/task/{task.name}"
            rows = {"test_rows": self.plan.test_rows, "computes": "served"}
            yield Cell((f"{name}/base",), partial(self._untuned, task, f"{name}/base"), partial(dict, rows))
            for way in WAYS:
                for seed in self.plan.seeds:
                    own = f"{name}/{way}/seed{seed}"
                    settings = partial(self._task_settings, task, way)
                    yield Cell((own,), partial(self._tuned, task, way, seed, own), settings)
            names = (f"{name}/channel-gain-of-lora", f"{name}/best-gain-of-lora")
            yield Cell(names, partial(self._gains, task), partial(self._exact, task))

    def _task_settings(self, task: TaskPlan, way: str) -> dict[str, Any]:
        steps = self._steps(task)
        computes = "float32" if way == "lora" else "served"  # no engine runs PEFT's adapters
        return {
            "test_rows": self.plan.test_rows,
            "computes": computes,
            "steps": steps,
            **asdict(self._optimizer(task, way)),
        }

    def _steps(self, task: TaskPlan) -> int:
        return max(1, round(task.steps * self.plan.task_steps))

    def _exact(self, task: TaskPlan) -> dict[str, float]:
        """The values that gains are made of, by row."""
        names = [f"{way}/seed{seed}" for way in WAYS for seed in self.plan.seeds]
        return {name: self.rows.value(f"tuning/task/{task.name}/{name}") for name in ("base", *names)}

    def _train(
        self,
        task: TaskPlan,
        way: str,
        seed: int,
        optimizer: Optimizer,
        steps: int,
        output: Path,
        *more: object,
    ) -> Ran:
        train, held_out = split_rows(self.data, self.work, task)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)  # as above
        same: tuple[object, ...] = (
            "--eval",
            held_out,
            "--steps",
            steps,
            *optimizer.options,
            "--batch",
            16,
            "--warmup",
            20,
        )
        same += ("--check-every", 50, "--max-tokens", task.max_tokens, "--seed", seed)
        if way == "lora":
            return run(LORA, self.base, train, *same, "--device", self.device, *more)
        return self._peqa("train", self.base, train, "--task", task.name, "--kind", way, "-o", output, *same)

    def _questions(self, task: TaskPlan) -> tuple[object, ...]:
        return ("--metric", task.metric, "--limit", self.plan.test_rows, *task.eval_options)

    def _answers(self, task: TaskPlan, way: str, seed: int) -> Path:
        return self.work / "answers" / f"{task.name}-{way}-{seed}.jsonl"

    def _untuned(self, task: TaskPlan, name: str) -> list[Row]:
        test = self.data / task.folder / "test.jsonl"
        answers = self._answers(task, "base", 0)
        ran = self._peqa("eval", self.base, test, *self._questions(task), "--predictions", answers)
        facts = {"low": ran.report["low"], "high": ran.report["high"], "rows": ran.report["rows"]}
        return [self._row(name, ran.report[task.key], "%", ">=", ran, **facts)]

    def _tuned(self, task: TaskPlan, way: str, seed: int, name: str) -> list[Row]:
        test, answers = self.data / task.folder / "test.jsonl", self._answers(task, way, seed)
        answers.parent.mkdir(parents=True, exist_ok=True)
        steps, optimizer = self._steps(task), self._optimizer(task, way)
        output = self.work / "sets" / f"{task.name}-{way}-{seed}.safetensors"
        if way == "lora":
            asked: tuple[object, ...] = ("--test", test, *self._questions(task), "--predictions", answers)
            trained = ran = self._train(task, way, seed, optimizer, steps, output, *asked)
            size, count = ran.report["bytes"], ran.report["parameters"]
        else:
            trained = self._train(task, way, seed, optimizer, steps, output)
            asked = ("--scale-set", output, *self._questions(task), "--predictions", answers)
            ran = self._peqa("eval", self.base, test, *asked)
            size, count = trained.report["bytes"], trained.report["parameters"]
        report = ran.report
        facts = {
            "low": report["low"],
            "high": report["high"],
            "rows": report["rows"],
            "seed": seed,
            "steps": steps,
        }
        facts |= asdict(optimizer)
        facts |= {"bytes_per_task": size, "parameters": count}
        facts |= {name: trained.report[name] for name in ("peak_memory_bytes", "held_out_loss")}
        facts |= {"seconds_per_step": trained.report["seconds"] / steps, "train_command": trained.command}
        return [self._row(name, report[task.key], "%", ">=", ran, **facts)]

    def _gains(self, task: TaskPlan) -> list[Row]:
        """What part of LoRA's gain over the base a set reaches, means over the seeds; the paired difference to LoRA."""
        name = f"tuning/task/{task.name}"
        before = self.rows.value(f"{name}/base")
        mean = {
            way: sum(self.rows.value(f"{name}/{way}/seed{s}") for s in self.plan.seeds) / len(self.plan.seeds)
            for way in WAYS
        }
        gain = mean["lora"] - before
        best = max(KINDS, key=lambda kind: mean[kind])
        found: list[Row] = []
        for what, kind, bar in (("channel", "channel", 0.85), ("best", best, 0.95)):
            share = (mean[kind] - before) / gain if gain > 0 else float(mean[kind] >= mean["lora"])
            facts = {"kind": kind, "lora_gain": gain} | self._difference(task, kind)
            found.append(self._row(f"{name}/{what}-gain-of-lora", share, "x", ">=", None, bar, **facts))
        return found

    def _difference(self, task: TaskPlan, kind: str) -> dict[str, float]:
        metric = metric_named(task.metric)
        ours, theirs = (
            np.concatenate([_stats(self._answers(task, way, seed)) for seed in self.plan.seeds])
            for way in (kind, "lora")
        )
        found = paired(theirs, ours, metric)
        return {"difference": found.difference, "low": found.low, "high": found.high, "better": found.better}


def _after(kind: str) -> str:
    """What rows are called that come after tuning sets of this kind on text."""
    return "after" if kind == "channel" else f"after-{kind}"


def _group(group: int) -> str:
    return "row" if group == -1 else f"g{group}"


def _stats(answers: Path) -> np.ndarray:
    with open(answers, encoding="utf-8") as file:
        return np.array([json.loads(line)["stats"] for line in file])
