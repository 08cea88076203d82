"""Commands about keys and about who used them, mounted by `service.cli`."""

import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from service.audit_reading import Line, Reading, Sought
from service.command_auditing import Deed, is_data_dir, telling
from service.errors import KeysError
from service.keys import LONGEST_DAYS, Key, Role, create_key, describe, read_keys, revoke_key
from service.schemas import format_time

app = typer.Typer()
keys_app = typer.Typer(
    name="keys",
    help="Make, list and revoke the keys of a service, in its data directory (--data-dir, or "
    "PASSERBY_DATA_DIR). The service may run, and knows of a change within seconds.",
    no_args_is_help=True,
)
_console = Console(stderr=True, emoji=False)
_out = Console(emoji=False)  # a label may be :key:
DataDir = Annotated[
    Path, typer.Option(help="Data directory of the service.", envvar="PASSERBY_DATA_DIR")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
_DATA = Path("data")
# Acts that are shown; whoever wants all of them takes JSON.
SHOWN_LINES = 200
SHOWN_NAMES = 10


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
    """Make a key in a data directory and print it, this once.

    The service may run, and knows it within seconds. A directory that is not there is made.
    """
    with telling(data_dir, "create-key", at_once=False) as deed:
        key, secret = create_key(data_dir, role, label, expires, tell=_begin(deed))
    until = "" if key.expires_at is None else f", until {format_time(key.expires_at)}"
    _console.print(
        f"key {key.key_id} of {label} with role {role}{until}; it is shown this once:",
        soft_wrap=True,
        highlight=False,
    )
    sys.stdout.write(f"{secret}\n")  # alone, for whoever reads it from a pipe


@keys_app.command("list")
def list_command(data_dir: DataDir = _DATA, as_json: AsJson = False) -> None:
    """List all keys of a data directory, those that open nothing any more included.

    The service may run; keys of its settings (PASSERBY_API_KEYS) are not in the list.
    """
    _check_data_dir(data_dir)
    now = datetime.now(UTC)
    keys = read_keys(data_dir)
    if as_json:
        described = [describe(key) | {"state": key.state(now)} for key in keys]
        sys.stdout.write(json.dumps(described) + "\n")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("id", "label", "role", "state", "created", "expires"):
        # 80 columns have room for a label of 18; --json has the seconds.
        table.add_column(column, no_wrap=column != "label", overflow="fold")
    for key in keys:
        table.add_row(
            key.key_id,
            key.label,
            key.role,
            key.state(now),
            _moment(key.created_at)[:16],
            "never" if key.expires_at is None else _moment(key.expires_at)[:16],
        )
    _out.print(table)


def _moment(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


@keys_app.command("revoke")
def revoke_command(
    name: Annotated[str, typer.Argument(help="Id of the key, or its label.")],
    data_dir: DataDir = _DATA,
) -> None:
    """Have a key of a data directory open nothing any more.

    The service may run, and knows it within seconds.
    """
    _check_data_dir(data_dir)
    with telling(data_dir, "revoke-key", at_once=False) as deed:
        key = revoke_key(data_dir, name, tell=_begin(deed))
    _console.print(f"key {key.key_id} of {key.label} opens nothing any more", highlight=False)


def _begin(deed: Deed) -> Callable[[Key], None]:
    def begin(key: Key) -> None:
        deed.tell(about=key.label, about_id=key.key_id, about_role=key.role)
        deed.begin()

    return begin


def _check_data_dir(directory: Path) -> None:
    """Return where there is a data directory: a mistyped one is not one without keys.

    Raises:
        KeysError: There is none.
    """
    if not is_data_dir(directory):
        raise KeysError(f"expected the data directory of a service, got none at {directory}")


@app.command()
def audit(
    data_dir: DataDir = _DATA,
    label: Annotated[str | None, typer.Option(help="Only what this key did: label or id.")] = None,
    by: Annotated[
        str | None,
        typer.Option(help="Only what was done without a key: by command, or retention."),
    ] = None,
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
        typer.Option(min=1, help=f"Only so many of the newest; {SHOWN_LINES} without --json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Read a data directory's audit trail: who did what, to whom, when and from where.

    The oldest comes first, a line an act; all that is known of it with --json. The service may run.
    Who is told in brackets had no key: a command, by its user; retention; the first start.

    Whom a line means is told as long as the gallery has the name, or where you name it; else there
    is a hash of it, like #9f86d081884c7d65....
    """
    sought = Sought(
        label=label,
        by=by,
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
        _print_lines(lines, _out)
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


def _print_lines(lines: Sequence[Line], console: Console) -> None:
    """A line an act for a pipe; on a terminal as many as it takes, beside the time."""
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        moment = _moment(datetime.fromisoformat(line["time"]))
        if console.is_terminal:
            table.add_row(moment, Text(_sentence(line)))  # no markup, whoever chose it
        else:
            told = f"{moment}  {_sentence(line)}"
            console.print(told, markup=False, highlight=False, soft_wrap=True)
    if not lines:
        _console.print("the audit trail has nothing of that kind")
    elif console.is_terminal:
        console.print(table)


def _sentence(line: Line) -> str:
    """Who did what, and how it ended; on whom; who was found; from where."""
    who = line.get("key") or (f"({line['by']})" if "by" in line else "(no key)")
    ended = line.get("status", line.get("outcome", "cut off" if "id" in line else ""))
    parts = [
        f"{who}: {line.get('action')} {ended}".rstrip(),
        _told(line, "on", "about", "identity", "tracklet", "tracklets"),
        _told(line, "to", "into"),
        _told(line, "found", "best_identity", "best_tracklet", "decision"),
        _told(line, "", "error"),
        _told(line, "from", "address"),
    ]
    return "; ".join(part for part in parts if part)


def _told(line: Line, word: str, *fields: str) -> str:
    found: list[Any] = [line[field] for field in fields if line.get(field) is not None]
    listed = [one for some in found for one in (some if isinstance(some, list) else [some])]
    shown = ", ".join(_short(str(one)) for one in listed[:SHOWN_NAMES])
    more = f" and {len(listed) - SHOWN_NAMES} more" if len(listed) > SHOWN_NAMES else ""
    return f"{word} {shown}{more}".lstrip() if listed else ""


def _short(name: str) -> str:
    """A name, or as much of a hash as tells it from the others that are shown."""
    return f"{name[:9]}…" if name.startswith("#") else name
