"""A stored gallery as it is at one moment, read beside a service that has it open."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from index.gallery import DamagedGalleryError, GalleryUnavailableError
from index.schema import APPLICATION_ID, MIGRATIONS, damage_told, open_reader, translated
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
    with damage_told(), translated("read the gallery"), closing(open_reader(path)) as connection:
        connection.execute("BEGIN")
        _recognise(connection)
        yield connection


def _recognise(connection: sqlite3.Connection) -> None:
    [application_id] = connection.execute("PRAGMA application_id").fetchone()
    [version] = connection.execute("PRAGMA user_version").fetchone()
    if application_id != APPLICATION_ID:
        raise DamagedGalleryError(
            f"expected a gallery file (application id {APPLICATION_ID}), "
            f"got an SQLite file of another application ({application_id})"
        )
    # Only a service or a restore brings a file to the newest version; this only reads.
    if version > len(MIGRATIONS):
        raise DamagedGalleryError(
            f"expected a gallery of version {len(MIGRATIONS)} or older, got version {version}: "
            "it was written by a newer Passerby"
        )
