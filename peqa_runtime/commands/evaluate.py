"""`peqa eval`: measure a base, or a base under a scale set."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from peqa_runtime.commands.options import AsJson, Base, Device, OptionalSet, Quiet, Seed
from peqa_runtime.commands.terminal import progress_bar, quiet_libraries, reported
from peqa_runtime.errors import InvalidData


class Metric(str, Enum):
    """What `peqa eval` measures."""

    perplexity = "perplexity"
    exact_match = "exact-match"
    bleu = "bleu"
    final_number = "final-number"
    multiple_choice = "multiple-choice"


@reported
def evaluate(
    base: Base,
    data: Annotated[Path, typer.Argument(help="Rows (.jsonl), or text for perplexity.", envvar="PEQA_DATA")],
    metric: Annotated[Metric, typer.Option(help="What to measure.", envvar="PEQA_METRIC")],
    scale_set: OptionalSet = None,
    limit: Annotated[
        int | None,
        typer.Option(help="A seeded sample of so many rows (or the first windows).", envvar="PEQA_LIMIT"),
    ] = None,
    filter_nonempty: Annotated[
        bool, typer.Option(help='Leave out rows whose answer is {}, [] or "".', envvar="PEQA_FILTER_NONEMPTY")
    ] = False,
    prompt_format: Annotated[
        str | None,
        typer.Option(
            help="Text around each prompt; default: what the set notes.", envvar="PEQA_PROMPT_FORMAT"
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Window of perplexity.", envvar="PEQA_CONTEXT")] = 1024,
    predictions: Annotated[
        Path | None, typer.Option(help="Write every answer here (.jsonl).", envvar="PEQA_PREDICTIONS")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure the base, or the base under a scale set, in fp32.

    perplexity: whole text, non-overlapping windows. exact-match: greedy answers equal to the completion.

    Example: peqa eval bases/smollm2 test.jsonl --scale-set sql.safetensors --metric exact-match --limit 200
    """
    from peqa_runtime.training.data import read_text
    from peqa_runtime.training.evaluate import exact_match, perplexity, sample_rows
    from peqa_runtime.training.rows import read_rows
    from peqa_runtime.training.tuning import apply_scale_set, load_tunable

    if metric not in (Metric.perplexity, Metric.exact_match):
        raise InvalidData(f"--metric {metric.value} is not there yet; use perplexity or exact-match")
    quiet_libraries()
    tunable = load_tunable(base, device=device)
    tuned = apply_scale_set(tunable, scale_set) if scale_set else None
    report: dict[str, Any] = {
        "metric": metric.value,
        "data": data.name,
        "base_digest": tunable.manifest.base_digest,
        "revision": tuned.revision if tuned else None,
    }
    with progress_bar(quiet, "windows" if metric is Metric.perplexity else "rows") as progress:
        if metric is Metric.perplexity:
            found = perplexity(tunable, read_text(data), context=context, limit=limit, progress=progress)
            report |= {"perplexity": found.perplexity, "tokens": found.tokens, "context": context}
        else:
            rows = sample_rows(read_rows(data), limit, seed, skip_empty=filter_nonempty)
            if prompt_format is None:
                prompt_format = tuned.prompt_format if tuned else ""
            match = exact_match(tunable, rows, prompt_format=prompt_format, progress=progress)
            report |= {
                "exact_match": match.percent,
                "correct": match.correct,
                "rows": len(rows),
                "seed": seed,
            }
            if predictions:
                lines = (
                    json.dumps(asdict(p) | {"correct": p.correct}, ensure_ascii=False)
                    for p in match.predictions
                )
                predictions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(report))
    else:
        typer.echo("\n".join(f"{key}: {value}" for key, value in report.items()))
