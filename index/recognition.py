"""A gallery's file seen from outside: whether it is one, sound, and what is in it."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote

from index.checksums import register
from index.gallery import DamagedGalleryError, GalleryUnavailableError
from index.schema import MIGRATIONS, damage_told, translated, version_of
from index.soundness import check_everything, check_keys
from index.vector_storage import Storage, dimension_of, storage_of

NEWEST = len(MIGRATIONS)


class Facts(NamedTuple):
    """What is in a gallery's file.

    Args:
        schema_version: Of its form.
        model: Fingerprint of the model; None while it is empty.
        dimension: Of the embeddings; None while it is empty.
        tracklets: How many.
        identities: How many.
    """

    schema_version: int
    model: str | None
    dimension: int | None
    tracklets: int
    identities: int


def require_newest(connection: sqlite3.Connection) -> None:
    """Return where a file has the newest form.

    Raises:
        GalleryUnavailableError: It has an older one.
    """
    version = version_of(connection)
    if version != NEWEST:
        message = f"expected a gallery of version {NEWEST}, got {version}: start the service once"
        raise GalleryUnavailableError(message)


def inspect(path: Path) -> Facts:
    """Read a file that nobody has open, all of it; it is not changed, and its log not looked at.

    Raises:
        DamagedGalleryError: It is not a sound gallery that this version can read.
        GalleryUnavailableError: It cannot be read.
    """
    with _checked(path, "immutable=1") as (connection, version):
        return facts_of(connection, version)


def check_file(path: Path, *, how: Literal["immutable=1", "mode=ro"] = "immutable=1") -> None:
    """Return where all of a file is sound; it is not changed.

    Args:
        path: The file; nobody has it open.
        how: Whether to look at the file alone, or with its log.

    Raises:
        DamagedGalleryError: It is not a sound gallery that this version can read.
        GalleryUnavailableError: It cannot be read.
    """
    with _checked(path, how):
        pass


@contextmanager
def _checked(path: Path, how: str) -> Iterator[tuple[sqlite3.Connection, int]]:
    """Open a file, and read and check all of it; also gives its version."""
    address = f"file:{quote(str(path.absolute()))}?{how}"
    with (
        damage_told(),
        translated("read the gallery"),
        closing(sqlite3.connect(address, uri=True)) as connection,
    ):
        version = version_of(connection)
        register(connection)
        check_everything(connection, version)
        yield connection, version


def facts_of(connection: sqlite3.Connection, version: int) -> Facts:
    """What is in a gallery's file of a version.

    Raises:
        DamagedGalleryError: Embeddings of two models, or of two sizes, or a tracklet without.
    """
    tracklets, model, vector_bytes = content_of(connection)
    [identities] = connection.execute("SELECT count(DISTINCT identity) FROM tracklets").fetchone()
    dimension = None if vector_bytes is None else dimension_of(vector_bytes)
    return Facts(version, model, dimension, tracklets, identities)


def content_of(
    connection: sqlite3.Connection, storage: Storage | None = None
) -> tuple[int, str | None, int | None]:
    """How many tracklets a file holds, of which model, and how many bytes each vector takes.

    Args:
        connection: To the file.
        storage: How embeddings have to be kept; None for any one way.

    Raises:
        DamagedGalleryError: Embeddings of two models, or of two sizes, or a tracklet without.
    """
    tracklets, models, model = connection.execute(
        "SELECT count(*), count(DISTINCT model), min(model) FROM tracklets"
    ).fetchone()
    joined, smallest, greatest = connection.execute(
        "SELECT count(*), min(length(vector)), max(length(vector)) "
        "FROM tracklets JOIN embeddings USING (key) WHERE key > 0"
    ).fetchone()
    [vectors] = connection.execute("SELECT count(*) FROM embeddings").fetchone()
    if joined < tracklets:
        check_keys(connection)
    is_whole = smallest is None or (
        dimension_of(smallest) is not None and storage in {None, storage_of(smallest)}
    )
    if not tracklets == joined == vectors or models > 1 or smallest != greatest or not is_whole:
        raise DamagedGalleryError(
            f"expected embeddings of one model and size for {tracklets} tracklets, got "
            f"{vectors} of {models} models and {smallest} to {greatest} bytes. "
            "Restore a snapshot, or run `passerby mend`"
        )
    return tracklets, model, smallest
