"""Which ids and identities a stored gallery knows, for those who have only hashes of them."""

from collections.abc import Iterator
from pathlib import Path

from index.erasures import Kind
from index.reading import reading


def stored_names(directory: Path) -> Iterator[tuple[Kind, str]]:
    """Every tracklet id and every identity of a gallery, also while somebody has it open.

    Args:
        directory: The gallery's data directory.

    Raises:
        GalleryUnavailableError: There is no gallery, or it cannot be read.
        DamagedGalleryError: The file is not a gallery that this version can read.
    """
    with reading(directory) as connection:
        for [name] in connection.execute("SELECT tracklet_id FROM tracklets"):
            yield "tracklet", name
        named = "SELECT DISTINCT identity FROM tracklets WHERE identity IS NOT NULL"
        for [name] in connection.execute(named):
            yield "identity", name
