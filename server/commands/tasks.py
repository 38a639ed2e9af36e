"""`peqa tasks`: list, upload, remove, roll back and download tasks of a running server."""

from __future__ import annotations

import json
import struct
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peqa_runtime.commands.terminal import print_table, reported, size_of, stop

if TYPE_CHECKING:
    import httpx

app = typer.Typer(
    help="Tasks of a running server.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

MAX_HEADER_BYTES = 1 << 20

Server = Annotated[str, typer.Option(help="Where the server listens.", envvar="PEQA_SERVER")]
ApiKey = Annotated[
    str | None, typer.Option(help="Key, where the server asks for one.", envvar="PEQA_API_KEY")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's JSON.", envvar="PEQA_JSON")]
Task = Annotated[str, typer.Argument(help="Name of the task.", envvar="PEQA_TASK")]
IfMatch = Annotated[
    str | None, typer.Option(help="Only if this revision is current.", envvar="PEQA_IF_MATCH")
]
LOCAL = "http://127.0.0.1:8000"


@app.command("ls")
def list_(server: Server = LOCAL, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List the tasks.

    Example: peqa tasks ls --server http://127.0.0.1:8000
    """
    listed = _ask("GET", server, "", api_key).json()
    if as_json:
        typer.echo(json.dumps(listed))
        return
    rows = [
        (
            *(
                row["task"],
                row["revision"][:12],
                row["kind"],
                size_of(row["bytes"]),
                str(row["num_revisions"]),
            ),
            datetime.fromtimestamp(row["created"]).strftime("%Y-%m-%d %H:%M"),
        )
        for row in listed["data"]
    ]
    print_table(("task", "revision", "kind", "size", "revisions", "since"), rows)
    for row in listed["data"]:
        if row["status"] != "ready":
            typer.echo(f"{row['status']}: {row['status_reason']}", err=True)
    for row in listed["unusable"]:
        typer.echo(f"unusable: {row['task']}: {row['reason']}", err=True)


@app.command()
def push(
    file: Annotated[Path, typer.Argument(help="Scale set file (.safetensors).", envvar="PEQA_SCALE_SET")],
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the task. Default: as noted in the file, else the file's name.", envvar="PEQA_NAME"
        ),
    ] = None,
    if_match: IfMatch = None,
    server: Server = LOCAL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Upload a scale set; it is live when this returns.

    Example: peqa tasks push sql.safetensors --name sql
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        stop(f"{file} cannot be read: {error.strerror}")
    task = name or _noted_name(content) or file.stem
    answer = _ask("PUT", server, task, api_key, content=content, if_match=if_match)
    _tell(answer, as_json, "{task} is at revision {revision}")


@app.command("rm")
def remove(
    task: Task,
    if_match: IfMatch = None,
    server: Server = LOCAL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Remove a task; answers that already run on it finish.

    Example: peqa tasks rm sql
    """
    _tell(_ask("DELETE", server, task, api_key, if_match=if_match), as_json, "{task} is removed")


@app.command()
def rollback(
    task: Task,
    revision: Annotated[
        str | None,
        typer.Option(
            help="4 or more of its digits. Default: the one before the current.", envvar="PEQA_REVISION"
        ),
    ] = None,
    if_match: IfMatch = None,
    server: Server = LOCAL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make an earlier revision current again.

    Example: peqa tasks rollback sql
    """
    body = b"" if revision is None else json.dumps({"revision": revision}).encode()
    answer = _ask("POST", server, task, api_key, suffix="/rollback", content=body, if_match=if_match)
    _tell(answer, as_json, "{task} is at revision {revision}")


@app.command()
def pull(
    task: Task,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.", envvar="PEQA_OUTPUT")],
    revision: Annotated[
        str | None,
        typer.Option(help="4 or more of its digits. Default: the current.", envvar="PEQA_REVISION"),
    ] = None,
    server: Server = LOCAL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Download a task's scale set.

    Example: peqa tasks pull sql -o sql.safetensors
    """
    query = {} if revision is None else {"revision": revision}
    answer = _ask("GET", server, task, api_key, suffix="/content", query=query)
    try:
        output.write_bytes(answer.content)
    except OSError as error:
        stop(f"{output} cannot be written: {error.strerror}")
    found = answer.headers.get("etag", "").strip('"')
    if as_json:
        report = {"task": task, "revision": found, "bytes": len(answer.content), "output": str(output)}
        typer.echo(json.dumps(report))
    else:
        typer.echo(f"{output}: revision {found}, {len(answer.content)} bytes")


@app.command()
@reported
def fill(
    base: Annotated[Path, typer.Argument(help="Base folder.", envvar="PEQA_BASE")],
    count: Annotated[int, typer.Option(help="How many tasks.", envvar="PEQA_COUNT", min=1)],
    store: Annotated[Path, typer.Option(help="Folder of the tasks.", envvar="PEQA_STORE")],
    seed: Annotated[int, typer.Option(help="Other seeds, other scales.", envvar="PEQA_SEED")] = 0,
    as_json: AsJson = False,
) -> None:
    """Put generated tasks into a store, to try out how many a machine serves: synthetic-00000, 00001 and so on.

    A server that runs on the store sees them within seconds.

    Example: peqa tasks fill bases/smollm2 --count 10000 --store tasks
    """
    from tqdm import tqdm

    from peqa_runtime.model import read_manifest
    from peqa_runtime.scales.scale_store import ScaleStore
    from peqa_runtime.scales.synthetic import fill_store

    opened = ScaleStore(store, read_manifest(base), durable=False)
    for _ in tqdm(fill_store(opened, count, seed=seed), total=count, disable=None, unit="task"):
        pass
    opened.close()
    report = {"store": str(store), "added": count, "tasks": len(opened.tasks())}
    typer.echo(
        json.dumps(report) if as_json else "{store}: {added} tasks added, {tasks} in all".format(**report)
    )


def _ask(
    method: str,
    server: str,
    task: str,
    api_key: str | None,
    *,
    suffix: str = "",
    content: bytes | None = None,
    if_match: str | None = None,
    query: dict[str, str] | None = None,
) -> httpx.Response:
    """One request; anything but success ends the command with the server's sentence."""
    from urllib.parse import quote

    import httpx

    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    if if_match is not None:
        headers["If-Match"] = f'"{if_match}"'
    url = f"{server.rstrip('/')}/v1/tasks" + (f"/{quote(task, safe='')}{suffix}" if task else "")
    try:
        answer = httpx.request(method, url, headers=headers, content=content, params=query, timeout=120)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        stop(f"no server answers at {server} ({error}); start one with: peqa serve")
    if answer.is_success:
        return answer
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"{server} answered {answer.status_code}, but not as a peqa server does"
    stop(message)


def _tell(answer: httpx.Response, as_json: bool, sentence: str) -> None:
    typer.echo(json.dumps(answer.json()) if as_json else sentence.format(**answer.json()))


def _noted_name(content: bytes) -> str | None:
    """The task that the file's own header names; None when it names none or is no such file."""
    if len(content) < 8:
        return None
    (length,) = struct.unpack("<Q", content[:8])
    if length > MAX_HEADER_BYTES:
        return None
    try:
        note = json.loads(content[8 : 8 + length])["__metadata__"]["task"]
    except (ValueError, KeyError, TypeError):
        return None
    return note if isinstance(note, str) and note else None
