"""A stored gallery as it is at one moment, read beside a service that has it open."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from index.gallery import GalleryUnavailableError
from index.intact import check_log, check_recognised
from index.schema import damage_told, open_reader, translated, version_of
from index.store import FILE_NAME


@contextmanager
def reading(directory: Path) -> Iterator[sqlite3.Connection]:
    """Open a gallery to read it; takes no lock, and makes no file.

    Args:
        directory: The gallery's data directory.

    Returns:
        A connection whose statements all see the same moment.

    Raises:
        GalleryUnavailableError: There is no gallery, or it cannot be read.
        DamagedGalleryError: The file is not a gallery that this version can read.
    """
    path = directory / FILE_NAME
    if not path.is_file():  # SQLite would make an empty one
        raise GalleryUnavailableError(f"expected a gallery in {directory}, got no {FILE_NAME}")
    check_recognised(path)  # or closing it would take in its log
    check_log(path)
    with damage_told(), translated("read the gallery"), closing(open_reader(path)) as connection:
        connection.execute("BEGIN")
        version_of(connection)  # older ones, too: only a service or a restore brings them up
        yield connection
