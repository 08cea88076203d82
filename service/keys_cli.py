"""Commands about keys and about who used them, mounted by `service.cli`."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.audit import DIRECTORY, Trail
from service.audit_reading import Line, Reading, Sought
from service.keys import LONGEST_DAYS, Key, Role, create_key, describe, read_keys, revoke_key
from service.schemas import format_time

app = typer.Typer()
keys_app = typer.Typer(
    name="keys", help="Make, list and revoke the keys of a service.", no_args_is_help=True
)
_console = Console(stderr=True)
_out = Console()
DataDir = Annotated[Path, typer.Option(help="Of the service.", envvar="PASSERBY_DATA_DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
_DATA = Path("data")
# Lines of a table; whoever wants all of them takes JSON.
SHOWN_LINES = 200


@keys_app.command("create")
def create_command(
    role: Annotated[
        Role, typer.Option(help="What it opens: read; write, which reads; admin, which does all.")
    ],
    label: Annotated[str, typer.Option(help="Whose it is; the audit trail says it.")],
    expires: Annotated[
        float | None, typer.Option(help=f"Days until it opens nothing, up to {LONGEST_DAYS:g}.")
    ] = None,
    data_dir: DataDir = _DATA,
) -> None:
    """Make a key and print it, this once; a running service knows it within seconds."""
    with _telling(data_dir, "create-key") as tell:
        key, secret = create_key(data_dir, role, label, expires, tell=tell)
    until = "" if key.expires_at is None else f", until {format_time(key.expires_at)}"
    _console.print(
        f"key {key.key_id} of {label} with role {role}{until}; it is shown this once:",
        soft_wrap=True,
        highlight=False,
    )
    sys.stdout.write(f"{secret}\n")  # alone, for whoever reads it from a pipe


@keys_app.command("list")
def list_command(data_dir: DataDir = _DATA, as_json: AsJson = False) -> None:
    """List all keys, those that open nothing any more included."""
    now = datetime.now(UTC)
    keys = read_keys(data_dir)
    if as_json:
        described = [describe(key) | {"state": key.state(now)} for key in keys]
        sys.stdout.write(json.dumps(described) + "\n")
        return
    table = Table()
    for column in ("id", "label", "role", "state", "created", "expires"):
        table.add_column(column)
    for key in keys:
        table.add_row(
            key.key_id,
            key.label,
            key.role,
            key.state(now),
            _moment(key.created_at),
            "never" if key.expires_at is None else _moment(key.expires_at),
        )
    _out.print(table)


def _moment(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


@keys_app.command("revoke")
def revoke_command(
    name: Annotated[str, typer.Argument(help="Id of the key, or its label.")],
    data_dir: DataDir = _DATA,
) -> None:
    """Have a key open nothing any more; a running service knows it within seconds."""
    with _telling(data_dir, "revoke-key") as tell:
        key = revoke_key(data_dir, name, tell=tell)
    _console.print(f"key {key.key_id} of {key.label} opens nothing any more", highlight=False)


@contextmanager
def _telling(data_dir: Path, action: str) -> Iterator[Callable[[Key], None]]:
    """Have the audit trail tell of what a command does to a key, before it is done."""
    trail = Trail(data_dir / DIRECTORY)
    by = f"command of user {os.getuid()}"
    try:
        yield lambda key: trail.append(
            {"action": action, "by": by, "about": key.label, "about_id": key.key_id}
        )
    finally:
        trail.close()


@app.command()
def audit(
    data_dir: DataDir = _DATA,
    label: Annotated[str | None, typer.Option(help="Only what this key did: label or id.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this, like query or enrol.")] = None,
    identity: Annotated[
        str | None, typer.Option(help="Only what was done to this one, or found it.")
    ] = None,
    tracklet: Annotated[str | None, typer.Option(help="The same of a tracklet.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Not before, like 2026-11-22 or 2026-11-22T12:00:00Z.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Not after, likewise.")] = None,
    last: Annotated[
        int | None,
        typer.Option(min=1, help=f"Only so many of the newest; {SHOWN_LINES} in a table."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Read who did what, to whom, when and from where; the oldest first.

    Whom a line means is told as long as the gallery has the name, or where you name it; else there
    is a hash of it, like #9f86d081884c7d65....
    """
    sought = Sought(
        label=label,
        action=action,
        identity=identity,
        tracklet=tracklet,
        since=_read_time(since, "--since"),
        until=_read_time(until, "--until"),
    )
    reading = Reading(data_dir)
    lines = reading.lines(sought, last or (None if as_json else SHOWN_LINES))
    if as_json:
        for line in lines:
            sys.stdout.write(json.dumps(line) + "\n")
    else:
        _print_lines(lines)
    if reading.damaged:
        _console.print(f"{reading.damaged} lines of the trail are damaged and left out")


def _read_time(text: str | None, option: str) -> datetime | None:
    """A time; without an offset it is UTC."""
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: expected a time, got {text!r}") from error
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time


def _print_lines(lines: Sequence[Line]) -> None:
    table = Table()
    for column in ("time", "key", "action", "on", "found", "status", "from"):
        table.add_column(column, overflow="fold", no_wrap=column in ("time", "action", "status"))
    for line in lines:
        table.add_row(
            _moment(datetime.fromisoformat(line["time"])),
            _plain(line.get("key") or line.get("by") or ""),
            _plain(line.get("action")),
            _told(line, "about", "tracklet", "tracklets", "identity", "into"),
            _told(line, "best_identity", "best_tracklet", "decision"),
            _plain(line.get("status", "" if "id" not in line else "cut off")),
            _plain(line.get("address", "")),
        )
    _out.print(table)


def _told(line: Line, *fields: str) -> str:
    found: list[Any] = [line[field] for field in fields if line.get(field) is not None]
    listed = (one if isinstance(one, list) else [one] for one in found)
    return ", ".join(_plain(_short(str(one))) for some in listed for one in some)


def _plain(value: object) -> str:
    """What a client may have chosen, as text for a table that has markup."""
    return escape(str(value))


def _short(name: str) -> str:
    """A name, or as much of a hash as tells it from the others of a table."""
    return f"{name[:9]}…" if name.startswith("#") else name
