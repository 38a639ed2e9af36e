"""The offline verbs of `peqa`, from import to generate (also `python -m peqa_runtime`)."""

from __future__ import annotations

import os

import typer

from peqa_runtime.commands.evaluate import evaluate
from peqa_runtime.commands.export import export
from peqa_runtime.commands.generate import generate
from peqa_runtime.commands.import_adapter import import_adapter
from peqa_runtime.commands.import_base import import_base
from peqa_runtime.commands.quantize import quantize
from peqa_runtime.commands.train import train

app = typer.Typer(
    name="peqa",
    help="One frozen integer model, many tasks: make bases, tune, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.command("import")(import_base)
app.command("import-adapter")(import_adapter)
app.command("quantize")(quantize)
app.command("export")(export)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("generate")(generate)


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
