"""A checksum for each stored embedding: SQLite has none, and a flipped byte is still a number.

It is the CRC-32 (as zlib's) of the tracklet's id in UTF-8, followed by the embedding's bytes as
they are stored. So it finds a damaged embedding, and a sound one that belongs to another tracklet.
It is kept with the record, apart from the embedding.
"""

import sqlite3
import zlib
from collections.abc import Iterable

from index.gallery import DamagedGalleryError, GalleryError

SINCE_VERSION = 4  # of the file, see `index.schema.MIGRATIONS`
_ROWS_AT_ONCE = 1000


def checksum_of(tracklet_id: str | None, vector: bytes | None) -> int | None:
    """The checksum of an embedding, 0 to 2^32 - 1; None where there is none."""
    if not isinstance(tracklet_id, str) or not isinstance(vector, bytes):
        return None  # damage may make another type of a value
    return zlib.crc32(vector, zlib.crc32(tracklet_id.encode()))


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
            raise error(
                f"expected the embedding of the tracklet {tracklet_id} as it was stored, got "
                "another one: its checksum is wrong. Restore a snapshot, or erase that tracklet"
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
