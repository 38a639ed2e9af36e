"""`peqa keys`: make, list, change and revoke the keys of a server. A running server follows within a second."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peqa_runtime.commands.terminal import print_table, stop

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peqa_server.access.api_key import ApiKey, KeySet

app = typer.Typer(
    help="Keys of a server: who may use which tasks, and how much.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

File = Annotated[
    Path,
    typer.Option(help="File of the keys; what serve gets as --api-key-file.", envvar="PEQA_API_KEY_FILE"),
]
Which = Annotated[str, typer.Argument(help="The key's id, or its name.", envvar="PEQA_KEY")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", envvar="PEQA_JSON")]
Role = Annotated[str | None, typer.Option(help="user, uploader or admin.", envvar="PEQA_KEY_ROLE")]
Tenant = Annotated[
    str | None,
    typer.Option(
        help="Whose key it is: keys of one tenant share disk quota and prefix cache. Default: the name.",
        envvar="PEQA_KEY_TENANT",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(help="A glob over task names, such as 'acme-*'; may be repeated.", envvar="PEQA_KEY_TASKS"),
]
Base = Annotated[
    bool | None,
    typer.Option("--base/--no-base", help="Whether the base may be used.", envvar="PEQA_KEY_BASE"),
]
TokenRate = Annotated[
    str | None, typer.Option(help="Prompt and generated tokens; none: no limit.", envvar="PEQA_KEY_TOKENS")
]
RequestRate = Annotated[
    str | None, typer.Option(help="HTTP requests; none: no limit.", envvar="PEQA_KEY_REQUESTS")
]
Concurrent = Annotated[
    str | None,
    typer.Option(help="Choices and uploads in work at once, or none.", envvar="PEQA_KEY_CONCURRENT"),
]
Disk = Annotated[
    str | None,
    typer.Option(
        help="What the tenant's uploads may take: bytes, 500MB, 2GiB, or none.", envvar="PEQA_KEY_DISK"
    ),
]
Priority = Annotated[
    int | None,
    typer.Option(
        help="Lowest `priority` that a request may have (0 or less; lower runs earlier).",
        envvar="PEQA_KEY_PRIORITY",
    ),
]
Expires = Annotated[
    str | None,
    typer.Option(
        help="90d, 12h, 30m, a time such as 2027-01-31T12:00:00Z, or never.", envvar="PEQA_KEY_EXPIRES"
    ),
]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SPANS = {"m": 60, "h": 3600, "d": 86400}


@app.command()
def make(
    name: Annotated[
        str, typer.Argument(help="What to call the key, in lists and metrics.", envvar="PEQA_NAME")
    ],
    file: File,
    role: Role = "user",
    tenant: Tenant = None,
    tasks: Tasks = None,
    base: Base = None,
    tokens_per_minute: TokenRate = None,
    requests_per_minute: RequestRate = None,
    concurrent: Concurrent = None,
    disk: Disk = None,
    highest_priority: Priority = None,
    expires: Expires = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown this once, on standard output; the file keeps a digest of it.

    Example: peqa keys make alice --file keys.json --tasks 'acme-*' --tokens-per-minute 60000
    """
    from peqa_server.access.api_key import ApiKey, KeySet, digest_of, new_key
    from peqa_server.access.api_key import Role as KeyRole
    from peqa_server.access.key_json import KeyFileError, check_name

    text = new_key()
    with _changing(file) as (keys, put):
        if any(key.name == name and key.revoked is None for key in keys.keys):
            raise KeyFileError(f"there is a key named {name!r}; take another name, or revoke that one first")
        if role != "admin" and not tasks:
            raise KeyFileError(
                "name the tasks that this key may use: --tasks 'acme-*', or --tasks '*' for all"
            )
        new = ApiKey(
            id=secrets.token_hex(6),
            name=check_name(name, "a key's name"),
            tenant=check_name(name if tenant is None else tenant, "a tenant"),
            role=KeyRole.USER,
            digest=digest_of(text),
            created=float(int(time.time())),
        )
        limits = (tokens_per_minute, requests_per_minute, concurrent, disk, highest_priority)
        new = _changed(new, role, tasks, base, limits, expires)
        put(KeySet((*keys.keys, new)))
    if as_json:
        typer.echo(json.dumps({"key": text, **_shown(new)}))
        return
    typer.echo(text)
    typer.echo(f"key {new.id} ({name}) is in {file}; what stands above is shown this once", err=True)


@app.command("list")
def list_(file: File, as_json: AsJson = False) -> None:
    """List the keys: what they may do, and until when. No key can be read from its file.

    Example: peqa keys list --file keys.json
    """
    from peqa_server.access import key_file
    from peqa_server.access.key_json import KeyFileError

    try:
        keys, _, _ = key_file.read(file)
    except KeyFileError as error:
        stop(str(error))
    rows = [_shown(key) for key in keys.keys]
    if as_json:
        typer.echo(json.dumps({"keys": rows}))
        return
    from rich.table import Column

    # The id is what `revoke` wants where a name is not enough, so it stays whole in a narrow terminal.
    whole = Column("id", no_wrap=True, min_width=12)
    print_table((whole, "name", "tenant", "role", "tasks", "limits", "state"), [_said(row) for row in rows])


@app.command()
def revoke(which: Which, file: File, as_json: AsJson = False) -> None:
    """Take a key back: within a second it opens nothing. Answers that already run on it finish.

    Example: peqa keys revoke alice --file keys.json
    """
    _replace(file, which, lambda key: replace(key, revoked=float(int(time.time()))), as_json, "is revoked")


@app.command()
def change(
    which: Which,
    file: File,
    role: Role = None,
    tasks: Tasks = None,
    base: Base = None,
    tokens_per_minute: TokenRate = None,
    requests_per_minute: RequestRate = None,
    concurrent: Concurrent = None,
    disk: Disk = None,
    highest_priority: Priority = None,
    expires: Expires = None,
    as_json: AsJson = False,
) -> None:
    """Change what a key may do; what is not named stays. The key itself stays the same.

    Example: peqa keys change alice --file keys.json --tokens-per-minute none
    """
    limits = (tokens_per_minute, requests_per_minute, concurrent, disk, highest_priority)
    if all(value is None for value in (role, tasks or None, base, *limits, expires)):
        stop("name what is to be changed; peqa keys change --help lists it")
    _replace(
        file, which, lambda key: _changed(key, role, tasks, base, limits, expires), as_json, "is changed"
    )


def _changed(
    key: ApiKey,
    role: str | None,
    tasks: Sequence[str] | None,
    base: bool | None,
    limits: tuple[str | None, str | None, str | None, str | None, int | None],
    expires: str | None,
) -> ApiKey:
    """The key with what is given put in place. Raises `KeyFileError` or `ValueError`."""
    from peqa_server.access.api_key import Role as KeyRole
    from peqa_server.access.key_json import check_limit, check_priority, check_rights

    new_role = key.role if role is None else KeyRole.of(role)
    globs = tuple(tasks) if tasks else () if new_role is KeyRole.ADMIN else key.tasks
    check_rights(new_role, globs)
    if new_role is not KeyRole.ADMIN and not globs:
        raise ValueError("name the tasks that this key may use: --tasks 'acme-*', or --tasks '*' for all")
    if new_role is KeyRole.ADMIN and base is False:
        raise ValueError(
            "an admin may use every task, the base too; leave --no-base out, or give another role"
        )
    tokens, requests, concurrent, disk, priority = limits
    kept = key.limits
    counts = {
        "tokens_per_minute": _number(tokens, kept.tokens_per_minute, "--tokens-per-minute"),
        "requests_per_minute": _number(requests, kept.requests_per_minute, "--requests-per-minute"),
        "concurrent": _number(concurrent, kept.concurrent, "--concurrent"),
        "disk_bytes": _number(disk, kept.disk_bytes, "--disk", sizes=True),
    }
    return replace(
        key,
        role=new_role,
        tasks=globs,
        base=key.base if base is None else base,
        limits=replace(
            kept,
            **{name: check_limit(value, name) for name, value in counts.items()},
            highest_priority=kept.highest_priority if priority is None else check_priority(priority),
        ),
        expires=key.expires if expires is None else _when(expires),
    )


def _number(text: str | None, kept: int | None, option: str, *, sizes: bool = False) -> int | None:
    """A limit as given: None keeps what was, "none" takes it away. Raises `ValueError`."""
    if text is None:
        return kept
    if text.lower() == "none":
        return None
    found = re.fullmatch(r"(\d{1,15})\s*([A-Za-z]*)" if sizes else r"(\d{1,15})()", text.strip(), re.ASCII)
    if found is None or found[2].upper() not in _UNITS:
        example = "bytes, 500MB or 2GiB" if sizes else "a whole number"
        raise ValueError(f"{option} must be {example}, or none, got {text[:40]!r}")
    return int(found[1]) * _UNITS[found[2].upper()]


def _when(text: str) -> float | None:
    """The moment that `--expires` names; "never" is None. Raises `ValueError`."""
    from peqa_server.access.key_json import time_of

    if text.lower() == "never":
        return None
    span = re.fullmatch(r"(\d{1,6})([mhd])", text, re.ASCII)
    try:
        when = time.time() + int(span[1]) * _SPANS[span[2]] if span else time_of(text, "--expires")
    except ValueError:
        raise ValueError(
            f"--expires must be 90d, 12h, 30m, a time such as 2027-01-31T12:00:00Z, or never, got {text[:40]!r}"
        ) from None
    if when is not None and when <= time.time():
        raise ValueError(f"--expires must lie in the future, got {text[:40]!r}")
    return when


@contextmanager
def _changing(file: Path) -> Iterator[tuple[KeySet, Callable[[KeySet], None]]]:
    """The keys of a locked file and what puts others there; a refusal ends the command with its sentence."""
    from peqa_server.access import key_file

    try:
        with key_file.locked(file) as target:
            yield key_file.read_for_change(target), lambda keys: key_file.replace(target, keys)
    except ValueError as error:
        stop(str(error))


def _replace(file: Path, which: str, new: Callable[[ApiKey], ApiKey], as_json: bool, done: str) -> None:
    """Put `new` of one key in the place of that key, and say so."""
    from peqa_server.access.api_key import KeySet

    with _changing(file) as (keys, put):
        old = _found(keys, which)
        key = new(old)
        put(KeySet(tuple(key if k is old else k for k in keys.keys)))
    typer.echo(json.dumps(_shown(key)) if as_json else f"key {key.id} ({key.name}) {done}")


def _found(keys: KeySet, which: str) -> ApiKey:
    """The key with this id, or the one key in force with this name. Raises `ValueError`."""
    if which.startswith("peqa_"):
        raise ValueError("name a key by its id or name, never by the key itself; peqa keys list shows them")
    found = [key for key in keys.keys if key.id == which] or [
        key for key in keys.keys if key.name == which and key.revoked is None
    ]
    if len(found) != 1:
        reason = f"{len(found)} keys have the name" if found else "no key that is in force has the id or name"
        raise ValueError(f"{reason} {which[:80]!r}; peqa keys list shows them")
    if found[0].revoked is not None:
        raise ValueError(f"the key {which} was revoked already; make another")
    return found[0]


def _shown(key: ApiKey) -> dict[str, Any]:
    from peqa_server.access.key_json import describe

    return {"id": key.id, **describe(key), "state": key.state(time.time())}


def _said(row: dict[str, Any]) -> tuple[str, ...]:
    """A key as a row of the table."""
    tasks = (
        "all" if row["role"] == "admin" else ", ".join([*row["tasks"], *(["base"] if row["base"] else [])])
    )
    state = f"{row['state']}, until {row['expires']}" if row["expires"] else row["state"]
    return (row["id"], row["name"], row["tenant"], row["role"], tasks, _limits_said(row), state)


def _limits_said(row: dict[str, Any]) -> str:
    parts = {
        "tokens_per_minute": "tokens/min",
        "requests_per_minute": "requests/min",
        "concurrent": "at once",
        "disk_bytes": "bytes on disk",
    }
    said = [f"{row[name]} {unit}" for name, unit in parts.items() if row[name] is not None]
    if row["highest_priority"]:
        said.append(f"priority from {row['highest_priority']}")
    return ", ".join(said) or "none"
