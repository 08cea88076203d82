"""The form of an export: a folder that numpy and any JSON reader can read.

`embeddings.npy` holds (N, D) float32, `tracklets.jsonl` one record a line in the same order,
`erasures.json` the ledger, `manifest.json` what there is and the checksum of each file. Where asked
for, `strips` holds the film strips, `0.jpg` for the first record. docs/moving.md describes all of
it for those who read it elsewhere.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from index.gallery import GalleryError, TrackletRecord
from index.json_values import MAX_DEPTH, check_json

FORMAT = "passerby-gallery-export"
VERSION = 1
MANIFEST_NAME = "manifest.json"
EMBEDDINGS_NAME = "embeddings.npy"
TRACKLETS_NAME = "tracklets.jsonl"
ERASURES_NAME = "erasures.json"
PARQUET_NAME = "tracklets.parquet"
STRIPS_NAME = "strips"
GREATEST_MANIFEST_BYTES = 64 * 1024
GREATEST_LINE_BYTES = 1024 * 1024
GREATEST_DIMENSION = 65536

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_CAMERA = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Of the frames, and, where it was enrolled over HTTP, of the fields that came with them.
_CONTENT = re.compile(r"[0-9a-f]{64}(:[0-9a-f]{64})?")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)")
_MOST_FRAMES = 2**31 - 1
_TIMES = frozenset({"start_time", "end_time", "created_at", "expires_at"})


class ExchangeError(GalleryError):
    """Raised when an export cannot be written, or a folder to import is not one that can be."""


@dataclass(frozen=True, slots=True)
class FileSum:
    """One file of an export.

    Args:
        bytes: How long it is.
        sha256: Of its content, hex.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportManifest:
    """What an export says of itself.

    Args:
        created_at: When the gallery was as it is in it, timezone-aware UTC.
        passerby_version: That made it.
        model: Fingerprint of the gallery's model; None where it is empty.
        dimension: D; None where it is empty.
        tracklets: N.
        strips: Whether the film strips are there.
        calibration: As `index.calibration.Calibration.to_json` gives it, read; or None.
        files: By name.
    """

    created_at: datetime
    passerby_version: str
    model: str | None
    dimension: int | None
    tracklets: int
    strips: bool
    calibration: Mapping[str, Any] | None
    files: Mapping[str, FileSum]

    def to_json(self) -> str:
        """As text, for `read_manifest`."""
        files = {
            name: {"bytes": one.bytes, "sha256": one.sha256} for name, one in self.files.items()
        }
        values = {
            "format": FORMAT,
            "version": VERSION,
            "created_at": format_time(self.created_at),
            "passerby_version": self.passerby_version,
            "model": self.model,
            "dimension": self.dimension,
            "tracklets": self.tracklets,
            "strips": self.strips,
            "calibration": self.calibration,
            "files": files,
        }
        return json.dumps(values, indent=2, allow_nan=False) + "\n"


def format_time(time: datetime | None) -> str | None:
    """RFC 3339 in UTC, exact to the microsecond."""
    return None if time is None else time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def to_line(record: TrackletRecord, strip_sha256: str | None) -> bytes:
    """A record as a line of `tracklets.jsonl`.

    Args:
        record: What is known of a tracklet.
        strip_sha256: Of its film strip where one is exported with it.
    """
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    values |= {name: format_time(values[name]) for name in _TIMES}
    values["strip_sha256"] = strip_sha256
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def from_line(line: bytes) -> tuple[TrackletRecord, str | None]:
    """Read what `to_line` wrote.

    Raises:
        ValueError: It is anything else; the message repeats no value.
    """
    values = parse_object(line)
    if values.keys() != _READERS.keys():
        unknown = ", ".join(sorted(values.keys() - _READERS.keys()))[:200]
        missing = ", ".join(sorted(_READERS.keys() - values.keys()))
        raise ValueError(f"unknown fields: {unknown or 'none'}; missing: {missing or 'none'}")
    read: dict[str, Any] = {}
    for name, reader in _READERS.items():
        try:
            read[name] = reader(values[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    strip_sha256 = read.pop("strip_sha256")
    record = TrackletRecord(**read)
    if record.start_time and record.end_time and record.start_time > record.end_time:
        raise ValueError("expected end_time at or after start_time, got an earlier one")
    return record, strip_sha256


def parse_object(content: bytes) -> dict[str, Any]:
    """Read a JSON object that can be stored and answered again.

    Raises:
        ValueError: It is anything else: not UTF-8, not finite, too deep.
    """
    try:
        value = json.loads(content.decode())
        check_json(value)
    except RecursionError as error:
        raise ValueError(f"expected at most {MAX_DEPTH} levels, got more") from error
    except json.JSONDecodeError as error:
        raise ValueError("expected JSON, got something else") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def read_manifest(folder: Path, content: bytes) -> ExportManifest:
    """Read what `ExportManifest.to_json` wrote.

    Args:
        folder: Where it lies, for messages.
        content: Of the file.

    Raises:
        ExchangeError: It is anything else, or from a newer version.
    """
    try:
        values = parse_object(content)
        if values.get("format") != FORMAT:
            raise ValueError("the manifest of something else")
        if values["version"] != VERSION:
            raise ValueError(f"version {_whole(values['version'])}: a newer Passerby made it")
        files = {name: _file(one) for name, one in _object(values["files"]).items()}
        calibration = values["calibration"]
        return ExportManifest(
            created_at=_time(values["created_at"]),
            passerby_version=str(values["passerby_version"]),
            model=_optional(_matching(_NAME))(values["model"]),
            dimension=_optional(_whole)(values["dimension"]),
            tracklets=_whole(values["tracklets"]),
            strips=values["strips"] is True,
            calibration=None if calibration is None else _object(calibration),
            files=files,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ExchangeError(
            f"expected the manifest of an export of version {VERSION} in {folder}, got: {error}"
        ) from error


Reader = Callable[[Any], Any]


def _optional(reader: Reader) -> Reader:
    return lambda value: None if value is None else reader(value)


def _matching(pattern: re.Pattern[str]) -> Reader:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError(f"expected text like ^{pattern.pattern}$, got something else")
        return value

    return read


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError("expected a whole number of at least 0, got something else")
    return value


def _frames(value: Any) -> int:
    if not 1 <= _whole(value) <= _MOST_FRAMES:
        raise ValueError("expected a number of frames, got none or too many")
    return int(value)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _time(value: Any) -> datetime:
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise ValueError("expected a time like 2026-11-22T12:00:00Z, got something else")
    try:
        return datetime.fromisoformat(value).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise ValueError("expected a time that exists, got another") from error


def _file(value: Any) -> FileSum:
    found = _object(value)
    return FileSum(_whole(found["bytes"]), _matching(_SHA256)(found["sha256"]))


_READERS: Mapping[str, Reader] = {
    "tracklet_id": _matching(_NAME),
    "identity": _optional(_matching(_NAME)),
    "camera": _optional(_matching(_CAMERA)),
    "start_time": _optional(_time),
    "end_time": _optional(_time),
    "metadata": _object,
    "frames_received": _frames,
    "frames_used": _frames,
    "model": _matching(_NAME),
    "created_at": _time,
    "content": _matching(_CONTENT),
    "expires_at": _optional(_time),
    "quality": _optional(_object),
    "strip_sha256": _optional(_matching(_SHA256)),
}
