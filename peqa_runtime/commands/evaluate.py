"""`peqa eval`: measure a base, or a base under a scale set."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from peqa_runtime.commands.options import AsJson, Base, Device, Measuring, OptionalSet, Quiet, Seed
from peqa_runtime.commands.terminal import progress_bar, quiet_libraries, reported, show

MetricName = Literal["perplexity", "exact-match", "bleu", "final-number", "multiple-choice", "slot-f1"]


@reported
def evaluate(
    base: Base,
    data: Annotated[
        Path, typer.Argument(help="Rows (.jsonl, .json), or text for perplexity.", envvar="PEQA_DATA")
    ],
    metric: Annotated[MetricName, typer.Option(help="What to measure.", envvar="PEQA_METRIC")],
    scale_set: OptionalSet = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Another set, or `base`, measured on the same rows too: the paired difference.",
            envvar="PEQA_AGAINST",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="A seeded sample of so many rows (or the first windows).", envvar="PEQA_LIMIT"),
    ] = None,
    filter_nonempty: Annotated[
        bool, typer.Option(help='Leave out rows whose answer is {}, [] or "".', envvar="PEQA_FILTER_NONEMPTY")
    ] = False,
    ignore_case: Annotated[
        bool, typer.Option(help="exact-match: case does not count.", envvar="PEQA_IGNORE_CASE")
    ] = False,
    prompt_format: Annotated[
        str | None,
        typer.Option(
            help="Text around each prompt, or chat; default: what the set notes.", envvar="PEQA_PROMPT_FORMAT"
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of a window of perplexity. Default: 1024.", envvar="PEQA_CONTEXT"),
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows answered together.", envvar="PEQA_BATCH")] = 25,
    predictions: Annotated[
        Path | None,
        typer.Option(
            help="Write every answer here (.jsonl); an interrupted evaluation goes on from it.",
            envvar="PEQA_PREDICTIONS",
        ),
    ] = None,
    compute: Measuring = "served",
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure the base, or the base under a scale set, with 95 % intervals by bootstrap.

    perplexity: whole text, non-overlapping windows. exact-match: greedy answers equal to the completion. bleu: by
    sacrebleu, against all references. final-number: the number after ####, else the last. multiple-choice: the option
    with the highest log-probability per token. slot-f1: keys and values of JSON objects.

    Example: peqa eval bases/smollm2 test.jsonl --scale-set sql.safetensors --metric exact-match --limit 200
    """
    from peqa_runtime.errors import InvalidData
    from peqa_runtime.evaluation import opened
    from peqa_runtime.evaluation.metrics import metric_named
    from peqa_runtime.evaluation.run import Question
    from peqa_runtime.evaluation.run import evaluate as measure

    if batch < 1:
        raise InvalidData(f"--batch must be at least 1, got {batch}")
    measured = metric_named(metric, ignore_case=ignore_case)
    question = Question(data, measured, limit, seed, filter_nonempty, prompt_format, context, batch)
    quiet_libraries()
    with ExitStack() as stack:
        model = stack.enter_context(opened(base, compute, device))
        progress = stack.enter_context(
            progress_bar(quiet, "windows" if measured.asks == "window" else "rows")
        )
        report = measure(
            model, question, scale_set, against=against, predictions=predictions, progress=progress
        )
    show([report], as_json=as_json)
