"""The offline verbs of the `peqa` command: import, quantize, train, eval, generate (also `python -m peqa_runtime`)."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from peqa_runtime.errors import InvalidData, PeqaError

app = typer.Typer(
    name="peqa",
    help="One frozen integer model, many tasks: make bases, tune, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

P = ParamSpec("P")
R = TypeVar("R")


class Kind(str, Enum):
    """Kinds of scale set."""

    channel = "channel"
    channel_input = "channel+input"
    group = "group"


class Metric(str, Enum):
    """What `peqa eval` measures."""

    perplexity = "perplexity"
    exact_match = "exact-match"
    bleu = "bleu"
    final_number = "final-number"
    multiple_choice = "multiple-choice"


class Method(str, Enum):
    """How `peqa quantize` rounds."""

    rtn = "rtn"
    gptq = "gptq"


class Schedule(str, Enum):
    """How the learning rate falls after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class TooLongRows(str, Enum):
    """What happens to rows longer than --max-tokens."""

    drop = "drop"
    fail = "fail"


class Compute(str, Enum):
    """Dtype of the matrix products in training."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class SetDtype(str, Enum):
    """Dtype of a saved set."""

    float16 = "float16"
    float32 = "float32"


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """The command's edge: errors raised on purpose, and the disk's, become one line on stderr and exit status 1."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (PeqaError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None

    return run


def say(line: str) -> None:
    """Tell a person, on stderr, so that stdout holds results only."""
    typer.echo(line, err=True)


def quiet_libraries() -> None:
    """Keep transformers' own bars and advice off the terminal."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def progress_bar(quiet: bool, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, moved by calling what this yields with (done, all)."""
    from tqdm import tqdm

    with tqdm(unit=unit, desc="evaluating", disable=quiet) as bar:

        def move(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield move


Base = Annotated[
    Path, typer.Argument(help="Base folder, from `peqa import` or `peqa quantize`.", envvar="PEQA_BASE")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", envvar="PEQA_DEVICE")]
OptionalSet = Annotated[
    Path | None,
    typer.Option("--scale-set", help="A scale set file; without it the base.", envvar="PEQA_SCALE_SET"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.", envvar="PEQA_JSON")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.", envvar="PEQA_SEED")]
NewBase = Annotated[Path, typer.Option("--output", "-o", help="Base folder to write.", envvar="PEQA_OUTPUT")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.", envvar="PEQA_QUIET")]


@app.command("import")
@reported
def import_(
    source: Annotated[Path, typer.Argument(help="A .gguf file (Q4_0, Q4_1, Q8_0).", envvar="PEQA_SOURCE")],
    output: NewBase,
) -> None:
    """Import a quantized checkpoint as a base, its codes kept bit for bit.

    Example: peqa import SmolLM2-135M-Instruct.Q4_1.gguf -o bases/smollm2
    """
    from peqa_runtime.model import import_gguf, read_manifest

    if source.suffix.lower() != ".gguf":
        raise InvalidData(f"{source}: only .gguf files can be imported so far; a float model: peqa quantize")
    import_gguf(source, output)
    manifest = read_manifest(output)
    say(f"{output}: {manifest.model_id}, {len(manifest.linears)} linears, base {manifest.base_digest[:12]}")


@app.command()
@reported
def quantize(
    source: Annotated[
        Path, typer.Argument(help="A Hugging Face model folder of floats.", envvar="PEQA_SOURCE")
    ],
    output: NewBase,
    bits: Annotated[int, typer.Option(help="Bits of a code: 2, 3, 4 or 8.", envvar="PEQA_BITS")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Inputs that share a scale; -1 = the whole row.", envvar="PEQA_GROUP_SIZE")
    ] = 64,
    method: Annotated[Method, typer.Option(help="How to round.", envvar="PEQA_METHOD")] = Method.rtn,
) -> None:
    """Quantize a float model into a base.

    Example: peqa quantize models/SmolLM2-135M -o bases/smollm2-g64 --bits 4 --group-size 64
    """
    from peqa_runtime.model import read_manifest
    from peqa_runtime.model.quantize import quantize_folder

    if method is Method.gptq:
        raise InvalidData("--method gptq is not there yet; use rtn")
    quantize_folder(source, output, bits, group_size, method=method.value)
    manifest = read_manifest(output)
    say(f"{output}: {manifest.model_id}, {len(manifest.linears)} linears, base {manifest.base_digest[:12]}")


@app.command()
@reported
def train(
    base: Base,
    data: Annotated[Path, typer.Argument(help="Rows (.jsonl) or plain text (.txt).", envvar="PEQA_DATA")],
    task: Annotated[str, typer.Option(help="Name of the task, noted in the set.", envvar="PEQA_TASK")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Scale set to write (.safetensors).", envvar="PEQA_OUTPUT")
    ],
    kind: Annotated[Kind, typer.Option(help="Which scales are tuned.", envvar="PEQA_KIND")] = Kind.channel,
    held_out: Annotated[
        Path | None,
        typer.Option("--eval", help="Held-out rows; the best set on them is kept.", envvar="PEQA_EVAL"),
    ] = None,
    eval_fraction: Annotated[
        float, typer.Option(help="Or: split off this share of DATA.", envvar="PEQA_EVAL_FRACTION")
    ] = 0.0,
    epochs: Annotated[float, typer.Option(help="Times over the rows.", envvar="PEQA_EPOCHS")] = 1.0,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", "--max-steps", help="Optimizer steps, instead of --epochs.", envvar="PEQA_STEPS"
        ),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option("--lr", help="Per step, on the relative scale.", envvar="PEQA_LR")
    ] = 1e-2,
    schedule: Annotated[
        Schedule, typer.Option(help="Decay of the learning rate.", envvar="PEQA_SCHEDULE")
    ] = Schedule.cosine,
    warmup: Annotated[int, typer.Option(help="Steps of warm-up.", envvar="PEQA_WARMUP")] = 20,
    batch: Annotated[int, typer.Option(help="Rows of a step.", envvar="PEQA_BATCH")] = 16,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.", envvar="PEQA_CLIP")] = 1.0,
    prompt_format: Annotated[
        str, typer.Option(help="Text around each prompt, with {prompt} in it.", envvar="PEQA_PROMPT_FORMAT")
    ] = "",
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Longest row; window of plain text. Default: 1024.", envvar="PEQA_MAX_TOKENS"),
    ] = None,
    too_long: Annotated[
        TooLongRows, typer.Option(help="Rows longer than that.", envvar="PEQA_TOO_LONG")
    ] = TooLongRows.drop,
    check_every: Annotated[
        int, typer.Option(help="Steps between checkpoints and held-out losses.", envvar="PEQA_CHECK_EVERY")
    ] = 100,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume", help="Default: go on with an unfinished run.", envvar="PEQA_RESUME"
        ),
    ] = None,
    compute: Annotated[
        Compute, typer.Option(help="Dtype of the matrix products.", envvar="PEQA_COMPUTE")
    ] = Compute.auto,
    dtype: Annotated[
        SetDtype, typer.Option(help="Dtype of the set.", envvar="PEQA_DTYPE")
    ] = SetDtype.float16,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tune one task's scales. Ctrl-C keeps a checkpoint; the same command goes on.

    Rows are {"prompt": …, "completion": …}. The model learns prompt, completion and end-of-sequence exactly as written.

    Example: peqa train bases/smollm2 train.jsonl --task sql -o sql.safetensors --eval-fraction 0.02
    """
    from peqa_runtime.training.run import TrainingFiles, steps_for, train_file
    from peqa_runtime.training.trainer import TrainingInterrupted, TuneConfig
    from peqa_runtime.training.tuning import load_tunable

    def config_of(rows: int) -> TuneConfig:
        return TuneConfig(
            task=task,
            kind=kind.value,
            steps=steps_for(rows, batch, epochs) if steps is None else steps,
            learning_rate=learning_rate,
            schedule=schedule.value,
            warmup_steps=warmup,
            batch_rows=batch,
            clip=clip,
            seed=seed,
            compute=compute.value,
            check_every=check_every,
        )

    files = TrainingFiles(
        data, output, held_out, eval_fraction, prompt_format, max_tokens, too_long.value, dtype.value
    )
    quiet_libraries()
    try:
        run = train_file(
            load_tunable(base, device=device), files, config_of, resume=resume, progress=not quiet, say=say
        )
    except TrainingInterrupted as stopped:
        say(f"{stopped}; the same command goes on from there")
        raise typer.Exit(130) from None
    report = {
        "output": str(output),
        "task": run.scale_set.task,
        "kind": run.scale_set.kind,
        "revision": run.scale_set.revision,
        "base_digest": run.scale_set.base_digest,
        "bytes": output.stat().st_size,
        **run.scale_set.note,
    }
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        keys = (
            "output",
            "revision",
            "bytes",
            "train_loss",
            "held_out_loss",
            "best_step",
            "tokens",
            "seconds",
        )
        typer.echo("\n".join(f"{key}: {report[key]}" for key in keys))


@app.command("eval")
@reported
def eval_(
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
    from peqa_runtime.training import evaluate
    from peqa_runtime.training.data import read_rows, read_text
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
            found = evaluate.perplexity(
                tunable, read_text(data), context=context, limit=limit, progress=progress
            )
            report |= {"perplexity": found.perplexity, "tokens": found.tokens, "context": context}
        else:
            rows = evaluate.sample_rows(read_rows(data), limit, seed, skip_empty=filter_nonempty)
            if prompt_format is None:
                prompt_format = tuned.prompt_format if tuned else ""
            match = evaluate.exact_match(tunable, rows, prompt_format=prompt_format, progress=progress)
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


@app.command()
@reported
def generate(
    base: Base,
    prompt: Annotated[str, typer.Option(help="The prompt, as written.", envvar="PEQA_PROMPT")],
    scale_set: OptionalSet = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", envvar="PEQA_MAX_TOKENS")] = 64,
    device: Device = "auto",
) -> None:
    """Print the greedy answer to one prompt. A set's own prompt format is applied.

    Example: peqa generate bases/smollm2 --scale-set sql.safetensors --prompt 'table t(a, b)\\nHow many a?'
    """
    from peqa_runtime.training.data import fill_prompt
    from peqa_runtime.training.evaluate import greedy
    from peqa_runtime.training.tuning import apply_scale_set, load_tunable

    if not prompt:
        raise InvalidData("--prompt is empty")
    if max_tokens < 1:
        raise InvalidData("--max-tokens must be at least 1")
    quiet_libraries()
    tunable = load_tunable(base, device=device)
    form = apply_scale_set(tunable, scale_set).prompt_format if scale_set else ""
    ids = tunable.encode_prompt(fill_prompt(form, prompt))
    if len(ids) + max_tokens > tunable.max_tokens:
        raise InvalidData(
            f"{len(ids)} prompt tokens and {max_tokens} more exceed the context of {tunable.max_tokens}"
        )
    typer.echo(greedy(tunable, [ids], max_new_tokens=max_tokens)[0])


def wait_asleep() -> None:
    """Have OpenMP's threads, which torch's own operations run on, sleep between them; call it before torch is there.

    They would spin otherwise, and where cores are shared, with a load test for instance, keep the others from working:
    beside one busy process a mean decode step of 16 sequences took 42 ms spinning and 28 to 33 ms asleep (two cores).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Entry point of `python -m peqa_runtime`."""
    wait_asleep()
    app()
