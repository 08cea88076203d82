"""Records as SQLite keeps them: columns, times, filters."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, overload

from index.checksums import check_records, check_vectors
from index.gallery import (
    DamagedGalleryError,
    Filters,
    GalleryError,
    GalleryUnavailableError,
    TrackletRecord,
)

# The order of `to_row`.
RECORD = (
    "key, tracklet_id, identity, camera, start_time, end_time, metadata, "
    "frames_received, frames_used, model, created_at, content, expires_at, quality"
)
PLACES = ", ".join("?" * len(RECORD.split(", ")))  # for the values of `RECORD`
CHECKSUMS = "vector_checksum, strip_checksum, frames_checksum"
# What the checksum of a record is made of: all but the key, which is not yet known when it is made.
SUMMED = f"{RECORD.removeprefix('key, ')}, {CHECKSUMS}"
STORED = f"{RECORD}, {CHECKSUMS}, record_checksum"  # the order of `to_stored`
_VALUES = slice(1, len(STORED.split(", ")))  # of `SUMMED` and their checksum, in a row of `STORED`
_VECTOR_CHECKSUM = STORED.split(", ").index("vector_checksum")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Stored(NamedTuple):
    """A record and its key: a positive integer that grows with every enrolment."""

    key: int
    record: TrackletRecord


@overload
def to_microseconds(time: datetime) -> int: ...
@overload
def to_microseconds(time: None) -> None: ...
@overload
def to_microseconds(time: datetime | None) -> int | None: ...
def to_microseconds(time: datetime | None) -> int | None:
    """Microseconds since 1970 UTC of an aware time, exactly; None stays None."""
    return None if time is None else (time - _EPOCH) // _MICROSECOND


@overload
def from_microseconds(microseconds: int) -> datetime: ...
@overload
def from_microseconds(microseconds: None) -> None: ...
@overload
def from_microseconds(microseconds: int | None) -> datetime | None: ...
def from_microseconds(microseconds: int | None) -> datetime | None:
    """The aware UTC time that `to_microseconds` took."""
    return None if microseconds is None else _EPOCH + microseconds * _MICROSECOND


def to_row(record: TrackletRecord) -> tuple[Any, ...]:
    """The values of `RECORD`, but for the key."""
    return (
        record.tracklet_id,
        record.identity,
        record.camera,
        to_microseconds(record.start_time),
        to_microseconds(record.end_time),
        json.dumps(dict(record.metadata), allow_nan=False),
        record.frames_received,
        record.frames_used,
        record.model,
        to_microseconds(record.created_at),
        record.content,
        to_microseconds(record.expires_at),
        None if record.quality is None else json.dumps(dict(record.quality), allow_nan=False),
    )


def check_embeddings(
    rows: Iterable[tuple[Any, ...]], error: type[GalleryError] = DamagedGalleryError
) -> None:
    """Return where embeddings are as they were stored; `to_stored` looks at the records.

    Args:
        rows: Each begins with the values of `STORED` and ends with the bytes of the embedding.
        error: What to raise.

    Raises:
        GalleryError: One is not; the message names its tracklet.
    """
    check_vectors(((row[1], row[_VECTOR_CHECKSUM], row[-1]) for row in rows), error)


def check_stored(
    rows: Iterable[tuple[Any, ...]], error: type[GalleryError] = DamagedGalleryError
) -> None:
    """Return where records and their embeddings are as they were stored.

    Args:
        rows: Each begins with the values of `STORED` and ends with the bytes of the embedding.
        error: What to raise.

    Raises:
        GalleryError: One is not; the message names its tracklet.
    """
    for row in rows:
        check_records((row[_VALUES],), error)
        check_embeddings((row,), error)


def to_stored(
    row: tuple[Any, ...], error_type: type[GalleryError] = GalleryUnavailableError
) -> Stored:
    """The record in a row that begins with the values of `STORED`.

    Args:
        row: The row.
        error_type: What to raise.

    Raises:
        GalleryError: It was damaged; the message names its tracklet.
    """
    check_records((row[_VALUES],), error_type)
    try:
        return Stored(row[0], _to_record(row))
    except (ValueError, OverflowError, TypeError) as error:
        raise error_type(
            f"expected a record of the tracklet {row[1]} that can be read, got a damaged one. "
            "Restore a snapshot, or stop the service and erase that tracklet"
        ) from error


def _to_record(row: tuple[Any, ...]) -> TrackletRecord:
    return TrackletRecord(
        tracklet_id=row[1],
        identity=row[2],
        camera=row[3],
        start_time=from_microseconds(row[4]),
        end_time=from_microseconds(row[5]),
        metadata=json.loads(row[6]),
        frames_received=row[7],
        frames_used=row[8],
        model=row[9],
        created_at=_EPOCH + row[10] * _MICROSECOND,
        content=row[11],
        expires_at=from_microseconds(row[12]),
        quality=None if row[13] is None else json.loads(row[13]),
    )


def where(filters: Filters) -> tuple[str, list[Any]]:
    """The SQL of filters: conditions that each begin with AND, and their values."""
    conditions: list[tuple[str, Any]] = []
    if filters.identities is not None:
        chosen = json.dumps(sorted(filters.identities))
        conditions.append(("identity IN (SELECT value FROM json_each(?))", chosen))
    if filters.cameras is not None:
        chosen = json.dumps(sorted(filters.cameras))
        conditions.append(("camera IN (SELECT value FROM json_each(?))", chosen))
    if filters.exclude_cameras:
        left_out = json.dumps(sorted(filters.exclude_cameras))
        not_in = "NOT IN (SELECT value FROM json_each(?))"
        conditions.append((f"(camera IS NULL OR camera {not_in})", left_out))
    if filters.since is not None:
        conditions.append(("start_time >= ?", to_microseconds(filters.since)))
    if filters.until is not None:
        conditions.append(("start_time <= ?", to_microseconds(filters.until)))
    if filters.exclude_tracklets:
        left_out = json.dumps(sorted(filters.exclude_tracklets))
        conditions.append(("tracklet_id NOT IN (SELECT value FROM json_each(?))", left_out))
    sql = [f"AND {condition}" for condition, _ in conditions]
    if filters.unnamed:
        sql.append("AND identity IS NULL")
    return " ".join(sql), [value for _, value in conditions]
