"""Reading the audit trail: which lines, and whom their hashes mean, as far as anybody knows."""

import contextlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from index.gallery import GalleryUnavailableError
from index.names import stored_names
from service.audit import DIRECTORY, NAMES, Pseudonyms, files_of, read_salt
from service.errors import AuditError

Line = dict[str, Any]
# Longer ones are not ours: assigning a thousand tracklets takes 40 KB.
GREATEST_LINE_BYTES = 1 << 20
# What a line has whose act has ended: a request its status, a command its outcome.
ENDED = frozenset({"status", "outcome"})


@dataclass(frozen=True, slots=True)
class Sought:
    """Which lines to read; a field that is None lets all through.

    Args:
        label: Of the key, or its id.
        by: Who acted without a key, or the first word of that: "command", "retention".
        action: What was done.
        identity: On whom, or who was found.
        tracklet: The same of a tracklet.
        since: Not before, timezone-aware.
        until: Not after.
    """

    label: str | None = None
    by: str | None = None
    action: str | None = None
    identity: str | None = None
    tracklet: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def lets_through(self, line: Line, pseudonyms: Pseudonyms) -> bool:
        """Whether a line, with hashes still, is one of them."""
        at = _time(line)
        return (
            (self.label is None or self.label in (line.get("key"), line.get("key_id")))
            and (self.by is None or _begins(line, self.by))
            and (self.action is None or self.action == line.get("action"))
            and (self.since is None or at >= self.since)
            and (self.until is None or at <= self.until)
            and _names(line, "identity", self.identity, pseudonyms)
            and _names(line, "tracklet", self.tracklet, pseudonyms)
        )


def _begins(line: Line, by: str) -> bool:
    """Whether somebody without a key acted, and is called so, or so and some words more."""
    return f"{line.get('by', '')} ".startswith(f"{by} ")


def _time(line: Line) -> datetime:
    return datetime.fromisoformat(line["time"])


def _names(line: Line, kind: str, name: str | None, pseudonyms: Pseudonyms) -> bool:
    """Whether a line speaks of somebody."""
    if name is None:
        return True
    hidden = pseudonyms.of(kind, name)
    return any(
        hidden in (value if isinstance(value, list) else [value])
        for field, value in line.items()
        if NAMES.get(field) == kind
    )


class Reading:
    """One pass over a trail.

    Args:
        data_dir: With the trail, and the gallery that knows the names.

    Attributes:
        damaged: How many lines were none.

    Raises:
        AuditError: There is no trail, or it cannot be read.
    """

    def __init__(self, data_dir: Path) -> None:
        self.damaged = 0
        self._data_dir = data_dir
        self._directory = data_dir / DIRECTORY
        try:
            self._pseudonyms = Pseudonyms(read_salt(self._directory))
        except FileNotFoundError as error:
            message = f"expected an audit trail in {self._directory}, got none"
            raise AuditError(message) from error

    def lines(self, sought: Sought, last: int | None = None) -> list[Line]:
        """Lines, oldest first, with names where somebody knows them.

        What was begun and ended is one line. What was begun and not ended has neither status nor
        outcome: it was cut off, or goes on, and whether it was done nobody has written.

        Args:
            sought: Which.
            last: Only so many of the newest; None for all.

        Raises:
            AuditError: The trail cannot be read.
            DamagedGalleryError: The gallery cannot be read, which knows the names.
        """
        matching = (one for one in self._merged() if sought.lets_through(one, self._pseudonyms))
        # Those that were cut off come out last, whenever that was.
        found = sorted(deque(matching, maxlen=last), key=_time)
        known = self._known(sought)
        return [_with_names(one, known) for one in found]

    def _merged(self) -> Iterator[Line]:
        begun: dict[str, Line] = {}
        for line in self._read():
            name = str(line.get("id"))
            if "id" in line and not line.keys() & ENDED:
                begun[name] = line
                continue
            begun.pop(name, None)
            yield line
        yield from begun.values()

    def _read(self) -> Iterator[Line]:
        try:
            for path in files_of(self._directory):
                # One that was removed meanwhile was the oldest, and too old.
                with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                    while content := file.readline(GREATEST_LINE_BYTES):
                        if (line := _parse(content)) is not None:
                            yield line
                        else:
                            self.damaged += 1
        except OSError as error:
            message = f"cannot read the audit trail: {error.strerror or error}"
            raise AuditError(message) from error

    def _known(self, sought: Sought) -> Mapping[str, str]:
        """The names behind hashes: those of the gallery, and those that were asked for."""
        known = {}
        with contextlib.suppress(GalleryUnavailableError):
            for kind, name in stored_names(self._data_dir):
                known[self._pseudonyms.of(kind, name)] = name
        for kind, asked in (("identity", sought.identity), ("tracklet", sought.tracklet)):
            if asked is not None:
                known[self._pseudonyms.of(kind, asked)] = asked
        return known


def _parse(content: bytes) -> Line | None:
    try:
        line = json.loads(content)
        if isinstance(line, dict) and _time(line).tzinfo is not None:
            return line
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return None


def _with_names(line: Line, known: Mapping[str, str]) -> Line:
    return {
        field: _revealed(value, known) if field in NAMES else value for field, value in line.items()
    }


def _revealed(value: Any, known: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_revealed(one, known) for one in value]
    return known.get(value, value) if isinstance(value, str) else value
