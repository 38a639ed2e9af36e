"""What every verb does at the terminal: errors as one line, words for people on stderr, progress bars."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import typer

from peqa_runtime.errors import PeqaError

P = ParamSpec("P")
R = TypeVar("R")


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
