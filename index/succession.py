"""A gallery passes from one model to the next: embeddings are made aside, then all change at once.

What is made lies in the gallery's own file, so that erasing a tracklet erases its next embedding,
too, and nothing is lost when whoever makes them is interrupted.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from index.checksums import check_kept, checksum_of_frames, register
from index.gallery import (
    DamagedGalleryError,
    Embeddings,
    GalleryError,
    GalleryUnavailableError,
)
from index.locks import DirectoryLock
from index.properties import stored_as
from index.reading import reading
from index.rows import SUMMED
from index.saved import SavedIndex
from index.schema import open_guest, translated
from index.soundness import check_all_records
from index.store import FILE_NAME, LOCK_NAME
from index.vector_storage import to_blob


class SuccessionError(GalleryError):
    """Raised when a gallery cannot pass to another model: frames are missing, or embeddings."""


class InUseError(GalleryUnavailableError):
    """Raised when a gallery cannot pass to another model now: somebody has it open."""


class Standing(NamedTuple):
    """How far a succession is.

    Args:
        model: The one that the gallery is of; None where it is empty.
        tracklets: How many there are.
        without_frames: Of how many no frames are kept: those cannot be embedded again.
        made: How many have an embedding by the next model.
    """

    model: str | None
    tracklets: int
    without_frames: int
    made: int


class NextEmbedding(NamedTuple):
    """An embedding by the next model.

    Args:
        key: Of its tracklet, from `pending`.
        embedding: (D,) float32, finite.
        frame_distance: For the tracklet's quality.
    """

    key: int
    embedding: Embeddings
    frame_distance: float


class Pending(NamedTuple):
    """A tracklet without an embedding by the next model.

    Args:
        key: What it is known by, here.
        frames: Its kept frames as image files, in temporal order.
    """

    key: int
    frames: tuple[bytes, ...]


_UNMADE = (
    "FROM tracklets AS t LEFT JOIN succeeding_embeddings AS s ON s.key = t.key AND s.model = ? "
    "WHERE s.key IS NULL"
)


def standing(directory: Path, model: str) -> Standing:
    """How far the succession of a gallery to a model is; takes no lock.

    Raises:
        GalleryUnavailableError: There is no gallery, or it cannot be read, or it has to be opened
            by this version first.
        DamagedGalleryError: The file is not a gallery that this version can read.
    """
    with _guest(directory) as connection:
        tracklets, current = connection.execute(
            "SELECT count(*), min(model) FROM tracklets"
        ).fetchone()
        [without] = connection.execute(
            "SELECT count(*) FROM tracklets WHERE key NOT IN (SELECT key FROM frames)"
        ).fetchone()
        [unmade] = connection.execute(f"SELECT count(*) {_UNMADE}", (model,)).fetchone()
    return Standing(current, tracklets, without, tracklets - unmade)


def pending(directory: Path, model: str, *, most: int) -> list[Pending]:
    """Some of the tracklets that are still to be embedded by a model, oldest first.

    Args:
        directory: The gallery's data directory.
        model: Fingerprint of the next model.
        most: How many.

    Raises:
        SuccessionError: One of them has no frames.
        DamagedGalleryError: Its frames are not as they were stored; the message names it.
        GalleryUnavailableError: See `standing`.
    """
    found = []
    with reading(directory) as connection:
        rows = connection.execute(
            f"SELECT t.key, t.tracklet_id, t.frames_checksum {_UNMADE} ORDER BY t.key LIMIT ?",
            (model, most),
        ).fetchall()
        for key, tracklet_id, checksum in rows:
            frames = connection.execute(
                "SELECT content FROM frames WHERE key = ? ORDER BY position", (key,)
            ).fetchall()
            kept = tuple(content for (content,) in frames)
            sum_found = checksum_of_frames(tracklet_id, kept)
            check_kept(tracklet_id, checksum, sum_found, "kept frames", DamagedGalleryError)
            if not kept:
                raise SuccessionError("expected kept frames of every tracklet, got one without")
            found.append(Pending(key, kept))
    return found


def keep(directory: Path, model: str, embeddings: Sequence[NextEmbedding]) -> None:
    """Put embeddings by the next model aside, durably; what was erased meanwhile is left out.

    Raises:
        ValueError: One is not finite.
        StorageFullError: The disk is full.
        GalleryUnavailableError: See `standing`.
    """
    if not all(np.isfinite(one.embedding).all() for one in embeddings):
        raise ValueError("expected finite embeddings, got NaN or infinity")
    with _guest(directory) as connection, translated("write the gallery"):
        storage = stored_as(connection)
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            "INSERT OR REPLACE INTO succeeding_embeddings "
            "(key, model, vector, frame_distance, checksum) "
            "SELECT key, ?1, ?2, ?3, checksum_of(tracklet_id, ?2) FROM tracklets WHERE key = ?4",
            [
                (model, to_blob(one.embedding, storage), one.frame_distance, one.key)
                for one in embeddings
            ],
        )
        connection.execute("COMMIT")


def take_over(directory: Path, model: str) -> int:
    """Make a gallery one of the next model, in one step; returns how many tracklets it has.

    A calibration of the old model goes with it.

    Raises:
        SuccessionError: A tracklet has no embedding by the model.
        DamagedGalleryError: A record is not as it was stored.
        InUseError: Somebody has the gallery open.
        GalleryUnavailableError: See `standing`.
        StorageFullError: The disk is full; nothing has changed.
    """
    try:
        lock = DirectoryLock(directory / LOCK_NAME)
    except GalleryUnavailableError as error:
        raise InUseError(str(error)) from error
    try:
        with _guest(directory) as connection, translated("write the gallery"):
            connection.execute("BEGIN IMMEDIATE")
            try:
                count = _change(connection, model)
                # Its vectors are the old ones. Gone before the change: it can be made again.
                SavedIndex(directory).destroy()
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return count
    finally:
        lock.release()


def abandon(directory: Path) -> None:
    """Forget what was put aside.

    Raises:
        GalleryUnavailableError: See `standing`.
    """
    with _guest(directory) as connection, translated("write the gallery"):
        connection.execute("DELETE FROM succeeding_embeddings")


def _change(connection: sqlite3.Connection, model: str) -> int:
    [unmade] = connection.execute(f"SELECT count(*) {_UNMADE}", (model,)).fetchone()
    if unmade:
        raise SuccessionError(f"expected every tracklet to be embedded, got {unmade} that are not")
    check_all_records(connection)  # from here on they have other checksums
    connection.execute(
        "UPDATE embeddings SET vector = (SELECT vector FROM succeeding_embeddings AS s "
        "WHERE s.key = embeddings.key)"
    )
    connection.execute(
        "UPDATE tracklets SET model = ?, vector_checksum = "
        "(SELECT checksum FROM succeeding_embeddings AS s WHERE s.key = tracklets.key), "
        "quality = json_set(quality, '$.frame_distance', "
        "(SELECT round(frame_distance, 4) FROM succeeding_embeddings AS s "
        "WHERE s.key = tracklets.key))",
        (model,),
    )
    connection.execute(f"UPDATE tracklets SET record_checksum = values_checksum({SUMMED})")  # noqa: S608
    connection.execute("DELETE FROM succeeding_embeddings")
    connection.execute("DELETE FROM properties WHERE name = 'calibration'")
    [count] = connection.execute("SELECT count(*) FROM tracklets").fetchone()
    return int(count)


@contextmanager
def _guest(directory: Path) -> Iterator[sqlite3.Connection]:
    with closing(open_guest(directory / FILE_NAME)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        register(connection)
        yield connection
