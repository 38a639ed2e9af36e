"""What every verb does at the terminal: errors as one line, results as JSON or lines, progress bars."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer

from peqa_runtime.core import BaseManifest
from peqa_runtime.disk_space import full_at, is_full
from peqa_runtime.errors import PeqaError

P = ParamSpec("P")
R = TypeVar("R")


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """The command's edge: errors raised on purpose, and the disk's, become one line on stderr and exit status 1."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except PeqaError as error:
            stop(str(error), error)
        except OSError as error:  # a folder that cannot be written, a full disk
            at = Path(str(error.filename or "."))
            stop(
                f"{full_at(at)}; make room and run the same command again" if is_full(error) else str(error),
                error,
            )
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None

    return run


def stop(message: str, cause: BaseException | None = None) -> NoReturn:
    """End the command with one line on stderr and exit status 1."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1) from cause


def say(line: str) -> None:
    """Tell a person, on stderr, so that stdout holds results only."""
    typer.echo(line, err=True)


def tell(report: Mapping[str, Any], sentence: str, *, as_json: bool) -> None:
    """What a command made: an object on stdout for a program, or a sentence for a person."""
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        say(sentence)


def show(reports: Sequence[Mapping[str, Any]], *, as_json: bool, keys: Sequence[str] = ()) -> None:
    """What a command measured, on stdout: an object (a list, of several), or lines; `keys`: only these."""
    if as_json:
        typer.echo(json.dumps(reports[0] if len(reports) == 1 else reports, ensure_ascii=False))
        return
    for report in reports:
        for key in keys or report:
            value = report[key]
            inner = value.items() if isinstance(value, Mapping) else (("", value),)
            for name, shown in inner:
                typer.echo(f"{key} {name}: {shown}" if name else f"{key}: {shown}")


def base_said(folder: Path, manifest: BaseManifest, origin: str = "") -> str:
    """A base that was made, in one line."""
    linears, digest = len(manifest.linears), manifest.base_digest[:12]
    return f"{folder}: {manifest.model_id}{origin}, {linears} linears, base {digest}"


def size_of(num_bytes: int) -> str:
    """A file's size for people."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1_000_000 else f"{num_bytes / 1e3:.0f} kB"


def print_table(columns: Sequence[Any], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; `columns` are names or rich's columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


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
