"""The stored tracklets that nobody has named yet."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from index.gallery import DamagedGalleryError, Embeddings
from index.reading import reading
from index.recognition import require_newest
from index.rows import STORED, check_embeddings, to_stored
from index.store import to_matrix


class UnnamedTracklets(NamedTuple):
    """Stored tracklets without an identity, in the order of enrolment.

    Args:
        tracklet_ids: N ids.
        cameras: N cameras, None where unknown.
        embeddings: (N, D) float32; (0, 0) where there is none.
        strips: JPEG bytes by tracklet id, of those that have one.
    """

    tracklet_ids: list[str]
    cameras: list[str | None]
    embeddings: Embeddings
    strips: dict[str, bytes]


def read_unnamed(
    directory: Path, *, most: int, cameras: frozenset[str] = frozenset(), with_strips: bool = False
) -> UnnamedTracklets:
    """Read the unnamed tracklets as they are at one moment; takes no lock, writes nothing.

    Args:
        directory: The gallery's data directory.
        most: How many are wanted; one more is read, to show that there are more.
        cameras: Only these; all where empty.
        with_strips: Read the film strips, too.

    Raises:
        GalleryUnavailableError: There is no gallery, or it cannot be read, or an older version
            wrote it.
        DamagedGalleryError: The file is not a gallery that this version can read, or one of them
            is not as it was stored.
    """
    with reading(directory) as connection:
        require_newest(connection)
        found = connection.execute(
            f"SELECT {STORED}, jpeg, vector FROM tracklets JOIN embeddings USING (key) "  # noqa: S608
            "LEFT JOIN (SELECT key, jpeg FROM strips WHERE ?) USING (key) "
            "WHERE identity IS NULL AND (? OR camera IN (SELECT value FROM json_each(?))) "
            "ORDER BY key LIMIT ?",
            [with_strips, not cameras, json.dumps(sorted(cameras)), most + 1],
        ).fetchall()
    check_embeddings(found)
    records = [to_stored(row, DamagedGalleryError).record for row in found]
    vectors = to_matrix([row[-1] for row in found]) if found else np.empty((0, 0), np.float32)
    strips = {row[1]: row[-2] for row in found if row[-2] is not None}
    return UnnamedTracklets(
        [one.tracklet_id for one in records], [one.camera for one in records], vectors, strips
    )
