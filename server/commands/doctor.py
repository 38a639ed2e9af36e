"""`peqa doctor`: what a server would find on this machine, and what to do for each problem."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from peqa_server.doctor.finding import Finding

_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}

Base = Annotated[
    Path | None, typer.Argument(help="What would be served. Default: the demo.", envvar="PEQA_BASE")
]
Store = Annotated[Path | None, typer.Option(help="Folder of the tasks.", envvar="PEQA_STORE")]
Home = Annotated[Path, typer.Option(help="Folder for made bases and stores.", envvar="PEQA_HOME")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="What would compute.", envvar="PEQA_DEVICE")
]
Host = Annotated[str, typer.Option(help="Address to listen on.", envvar="PEQA_HOST")]
Port = Annotated[int, typer.Option(help="Port to listen on.", envvar="PEQA_PORT", min=0, max=65535)]
KeyFile = Annotated[Path | None, typer.Option(help="File of keys.", envvar="PEQA_API_KEY_FILE")]
ApiKey = Annotated[
    str | None, typer.Option(help="Key for the server that runs already.", envvar="PEQA_API_KEY")
]
Timeout = Annotated[
    float, typer.Option(help="Seconds after which a check counts as hanging.", envvar="PEQA_TIMEOUT", min=1)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the findings as JSON.", envvar="PEQA_JSON")]


def doctor(
    context: typer.Context,
    base: Base = None,
    store: Store = None,
    home: Home = Path("~/.peqa"),
    device: Device = "auto",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_file: KeyFile = None,
    api_key: ApiKey = None,
    timeout: Timeout = 90.0,
    as_json: AsJson = False,
) -> None:
    """Say what is found on this machine, and what to do about it; status 1 when something stops serving.

    Example: peqa doctor bases/smollm2 --store tasks --port 8000
    """
    from peqa_server.doctor.examination import examine
    from peqa_server.doctor.finding import Asked

    asked = Asked(
        home=home.expanduser(),
        base=base,
        store=store,
        device=device,
        host=host,
        port=port,
        key_file=api_key_file,
        api_key=api_key,
        environ=os.environ,
        known_variables=frozenset(_variables(context.find_root().command)),
        timeout=timeout,
    )
    findings = examine(asked)
    problems = sum(finding.state == "problem" for finding in findings)
    if as_json:
        rows = [asdict(finding) for finding in findings]
        typer.echo(json.dumps({"ok": not problems, "findings": rows}))
    else:
        _print(findings, problems)
    raise typer.Exit(1 if problems else 0)


def _print(findings: Sequence[Finding], problems: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n→ {finding.advice}", style="italic")
        table.add_row(Text(finding.state, style=_COLOURS[finding.state]), finding.name, text)
    console = Console()
    console.print(table)
    warnings = sum(finding.state == "warning" for finding in findings)
    if problems:
        console.print(f"{problems} {'thing stops' if problems == 1 else 'things stop'} serving.")
    else:
        console.print("Nothing stops serving." + (f" {warnings} to look at." if warnings else ""))


def _variables(command: Any) -> Iterator[str]:
    """Every environment variable that a command, or one below it, reads."""
    for parameter in command.params:
        names = getattr(parameter, "envvar", None)
        yield from [names] if isinstance(names, str) else names or []
    for below in getattr(command, "commands", {}).values():
        yield from _variables(below)
