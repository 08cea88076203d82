"""Checksums of what is stored: SQLite has none, and a flipped bit still makes a name or a number.

They are CRC-32s (as zlib's). That of an embedding, of a film strip or of a kept frame is made of
the tracklet's id in UTF-8 and the bytes as they are stored: so it finds what was damaged, and what
is sound but belongs to another tracklet. They are kept in the record. That of a record, of an entry
of the ledger or of a property is made of its values as compact JSON in ASCII, bytes as hexadecimal
digits; a record's are those of `index.rows.SUMMED`, which include the other checksums.
"""

import json
import sqlite3
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

from index.gallery import DamagedGalleryError, GalleryError

VECTORS_SINCE = 4  # version of the file, see `index.schema.MIGRATIONS`
EVERYTHING_SINCE = 5
_ROWS_AT_ONCE = 1000
_encode = json.JSONEncoder(separators=(",", ":"), default=bytes.hex).encode
_ADVICE = "Restore a snapshot, or stop the service and run `passerby erase-tracklet` for it"


def register(connection: sqlite3.Connection) -> None:
    """Let statements of a connection compute checksums."""
    connection.create_function("checksum_of", 2, checksum_of, deterministic=True)
    connection.create_function("values_checksum", -1, _values_checksum, deterministic=True)
    connection.create_function("text_checksum", 1, _text_checksum, deterministic=True)


def checksum_of(tracklet_id: str | None, content: bytes | None) -> int | None:
    """The checksum of an embedding, a strip or a frame, 0 to 2^32 - 1; None where there is none."""
    if not isinstance(tracklet_id, str) or not isinstance(content, bytes):
        return None  # damage may make another type of a value
    return zlib.crc32(content, zlib.crc32(tracklet_id.encode()))


def checksum_of_frames(tracklet_id: str, frames: Sequence[bytes]) -> int | None:
    """The checksum of kept frames in their order, 0 to 2^32 - 1; None where there are none.

    It is that of their checksums, as a JSON list.
    """
    if not frames:
        return None
    return checksum_of_values([checksum_of(tracklet_id, frame) for frame in frames])


def checksum_of_values(values: Sequence[Any]) -> int:
    """The checksum of a row's values, 0 to 2^32 - 1: texts, numbers, bytes or None."""
    return zlib.crc32(_encode(values).encode())


def _values_checksum(*values: Any) -> int:
    return checksum_of_values(values)


def _text_checksum(text: str) -> int:
    return zlib.crc32(text.encode())


def check_vectors(
    rows: Iterable[tuple[str, int | None, bytes]],
    error: type[GalleryError] = DamagedGalleryError,
) -> None:
    """Return where embeddings are as they were stored.

    Args:
        rows: Ids, checksums, and the stored bytes.
        error: What to raise.

    Raises:
        GalleryError: One is not; the message names its tracklet.
    """
    for tracklet_id, checksum, vector in rows:
        if checksum is None or checksum_of(tracklet_id, vector) != checksum:
            raise damaged("embedding", tracklet_id, error)


def check_records(
    rows: Iterable[Sequence[Any]], error: type[GalleryError] = DamagedGalleryError
) -> None:
    """Return where records are as they were stored.

    Args:
        rows: Each the values of `index.rows.SUMMED`, and their checksum.
        error: What to raise.

    Raises:
        GalleryError: One is not; the message names its tracklet.
    """
    for *values, checksum in rows:
        if checksum_of_values(values) != checksum:
            raise damaged("record", values[0], error)


def damaged(what: str, tracklet_id: str, error: type[GalleryError]) -> GalleryError:
    """What to raise where something of a tracklet is not as it was stored."""
    return error(
        f"expected the {what} of the tracklet {tracklet_id} as it was stored, got another one: its "
        f"checksum is wrong. {_ADVICE}"
    )


def check_all_vectors(connection: sqlite3.Connection) -> None:
    """Return where all embeddings of a file are as they were stored.

    Raises:
        DamagedGalleryError: One is not; the message names its tracklet.
    """
    rows = connection.execute(
        "SELECT tracklet_id, vector_checksum, vector FROM tracklets JOIN embeddings USING (key) "
        "ORDER BY key"
    )
    while part := rows.fetchmany(_ROWS_AT_ONCE):
        check_vectors(part)


def check_kept(
    tracklet_id: str, checksum: int | None, found: int | None, what: str, error: type[GalleryError]
) -> None:
    """Return where what is kept beside an embedding is as it was stored.

    Args:
        tracklet_id: Whose.
        checksum: The one in the record.
        found: That of what is there.
        what: It is, for the message: "film strip".
        error: What to raise.

    Raises:
        GalleryError: It is not.
    """
    if checksum != found:
        raise damaged(what, tracklet_id, error)
