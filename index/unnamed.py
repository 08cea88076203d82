"""The stored tracklets that nobody has named yet."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from index.gallery import Embeddings
from index.reading import reading
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
        GalleryUnavailableError: There is no gallery, or it cannot be read.
        DamagedGalleryError: The file is not a gallery that this version can read.
    """
    with reading(directory) as connection:
        found = connection.execute(
            "SELECT tracklet_id, camera, vector, jpeg FROM tracklets JOIN embeddings USING (key) "
            "LEFT JOIN (SELECT key, jpeg FROM strips WHERE ?) USING (key) "
            "WHERE identity IS NULL AND (? OR camera IN (SELECT value FROM json_each(?))) "
            "ORDER BY key LIMIT ?",
            [with_strips, not cameras, json.dumps(sorted(cameras)), most + 1],
        ).fetchall()
    vectors = to_matrix([row[2] for row in found]) if found else np.empty((0, 0), np.float32)
    strips = {row[0]: row[3] for row in found if row[3] is not None}
    return UnnamedTracklets([row[0] for row in found], [row[1] for row in found], vectors, strips)
