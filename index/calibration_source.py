"""What calibrating reads of a stored gallery, also while a service has it open."""

import sqlite3
from pathlib import Path
from typing import NamedTuple

import numpy as np

from index.calibration import Calibration
from index.checksums import EVERYTHING_SINCE
from index.gallery import DamagedGalleryError, Embeddings
from index.properties import SINCE_VERSION, read_property
from index.reading import reading
from index.recognition import require_newest
from index.rows import STORED, check_stored
from index.schema import version_of
from index.store import to_matrix

_ROWS_AT_ONCE = 1000


class LabelledTracklets(NamedTuple):
    """Stored tracklets that have an identity.

    Args:
        embeddings: (N, D) float32; (0, 0) where there is none.
        identities: N identities.
        cameras: N cameras, None where unknown.
        model: Fingerprint of their model; None where there is none.
    """

    embeddings: Embeddings
    identities: list[str]
    cameras: list[str | None]
    model: str | None


def read_labelled(directory: Path) -> LabelledTracklets:
    """Read a gallery's labelled tracklets as they are at one moment; takes no lock, writes nothing.

    Args:
        directory: The gallery's data directory.

    Raises:
        GalleryUnavailableError: There is no gallery, or it cannot be read, or an older version
            wrote it.
        DamagedGalleryError: The file is not a gallery that this version can read, or one of them
            is not as it was stored.
    """
    with reading(directory) as connection:
        require_newest(connection)
        return _read(connection)


def read_calibration(directory: Path) -> Calibration | None:
    """The calibration of a stored gallery; None where none is of its model. Takes no lock.

    Raises:
        CalibrationError: Another version has written it.
        GalleryUnavailableError: See `read_labelled`.
        DamagedGalleryError: Likewise.
    """
    with reading(directory) as connection:
        version, text = version_of(connection), None
        if version >= SINCE_VERSION:
            is_checked = version >= EVERYTHING_SINCE
            text = read_property(connection, "calibration", checked=is_checked)
        row = connection.execute("SELECT model FROM tracklets LIMIT 1").fetchone()
    calibration = None if text is None else Calibration.from_json(text)
    if calibration is None or (row is not None and row[0] != calibration.model):
        return None
    return calibration


def _read(connection: sqlite3.Connection) -> LabelledTracklets:
    models = connection.execute("SELECT DISTINCT model FROM tracklets LIMIT 2").fetchall()
    if len(models) > 1:
        raise DamagedGalleryError("expected embeddings of one model, got those of several")
    [rows] = connection.execute(
        "SELECT count(*) FROM tracklets JOIN embeddings USING (key) WHERE identity IS NOT NULL"
    ).fetchone()
    found = connection.execute(
        f"SELECT {STORED}, vector FROM tracklets JOIN embeddings USING (key) "  # noqa: S608
        "WHERE identity IS NOT NULL ORDER BY key"
    )
    identities: list[str] = []
    cameras: list[str | None] = []
    embeddings = np.empty((0, 0), np.float32)
    while part := found.fetchmany(_ROWS_AT_ONCE):
        check_stored(part)
        vectors = to_matrix([vector for *_, vector in part])
        if not identities:  # filled in place: a list of parts would be held twice when joined
            embeddings = np.empty((rows, vectors.shape[1]), np.float32)
        embeddings[len(identities) : len(identities) + len(part)] = vectors
        identities += [identity for _, _, identity, *_ in part]
        cameras += [camera for _, _, _, camera, *_ in part]
    return LabelledTracklets(embeddings, identities, cameras, models[0][0] if models else None)
