"""Changes of a gallery's file that happen together, or not at all."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import NamedTuple

from index import identities
from index.calibration import Calibration
from index.checksums import checksum_of, checksum_of_frames, checksum_of_values
from index.erasures import Erasure, Erasures, Kind, digest
from index.gallery import DamagedGalleryError, Enrolment, IdentitySummary, NotFoundError
from index.properties import Name, erasure_salt, replace_calibration, replace_property
from index.rows import (
    CHECKSUMS,
    PLACES,
    RECORD,
    STORED,
    SUMMED,
    Stored,
    from_microseconds,
    to_microseconds,
    to_row,
    to_stored,
)
from index.schema import translated
from index.vector_storage import Storage, to_blob

# As `SUMMED`, where the identity becomes the first parameter.
_RENAMED = SUMMED.replace("identity", "?1")


class Outline(NamedTuple):
    """What decides whether a tracklet was erased, see `index.erasures.Erasable`."""

    tracklet_id: str
    identity: str | None
    created_at: datetime


class Transaction:
    """Changes that happen together at `commit`, or not at all."""

    def __init__(self, connection: sqlite3.Connection, storage: Storage = "float32") -> None:
        self._connection = connection
        self._storage = storage
        self._has_failed = False
        self.has_erased = False

    @property
    def is_open(self) -> bool:
        """Whether it can be committed: it is not yet, and SQLite has not given it up."""
        return self._connection.in_transaction and not self._has_failed

    @property
    def is_committed(self) -> bool:
        """Whether it has happened; right also where `commit` was interrupted."""
        return not self._connection.in_transaction and not self._has_failed

    @contextmanager
    def part(self) -> Iterator[None]:
        """Changes that are undone alone if the block raises; what was changed before stays.

        Where even that fails, `is_open` says so afterwards.
        """
        self._connection.execute("SAVEPOINT part")
        self._has_failed = True  # until the part is kept, or undone
        try:
            yield
        except BaseException:
            if self._connection.in_transaction:  # else SQLite has undone all of it
                self._connection.execute("ROLLBACK TO part")
                self._connection.execute("RELEASE part")
                self._has_failed = False
            raise
        self._connection.execute("RELEASE part")
        self._has_failed = False

    def taken(self, tracklet_ids: Iterable[str]) -> list[str]:
        """Those of the ids that are in use, sorted."""
        rows = self._connection.execute(
            "SELECT tracklet_id FROM tracklets "
            "WHERE tracklet_id IN (SELECT value FROM json_each(?)) ORDER BY tracklet_id",
            [json.dumps(list(tracklet_ids))],
        )
        return [tracklet_id for (tracklet_id,) in rows.fetchall()]

    def get(self, tracklet_id: str) -> Stored:
        """A record as it is before the commit.

        Raises:
            NotFoundError: No tracklet has this id.
        """
        return read_stored(self._connection, tracklet_id)

    def insert(self, enrolment: Enrolment) -> int:
        """Add a tracklet; returns its key.

        Raises:
            InvalidEmbeddingError: See `index.vector_storage.to_blob`.
        """
        vector = to_blob(enrolment.embedding, self._storage)
        name = enrolment.record.tracklet_id
        summed = (
            *to_row(enrolment.record),
            checksum_of(name, vector),
            checksum_of(name, enrolment.strip),
            checksum_of_frames(name, enrolment.frames),
        )
        cursor = self._connection.execute(
            f"INSERT INTO tracklets ({STORED}) VALUES ({PLACES}, ?, ?, ?, ?)",  # noqa: S608
            (None, *summed, checksum_of_values(summed)),
        )
        key = cursor.lastrowid
        self._connection.execute("INSERT INTO embeddings VALUES (?, ?)", (key, vector))
        if enrolment.strip is not None:
            self._connection.execute("INSERT INTO strips VALUES (?, ?)", (key, enrolment.strip))
        self._connection.executemany(
            "INSERT INTO frames VALUES (?, ?, ?)",
            ((key, position, content) for position, content in enumerate(enrolment.frames)),
        )
        return int(key or 0)

    def replace(self, stored: Stored) -> None:
        """Write a record over the one with its key, which was read in this transaction."""
        row = to_row(stored.record)
        query = f"SELECT {CHECKSUMS} FROM tracklets WHERE key = ?"  # noqa: S608
        checksums = self._connection.execute(query, (stored.key,)).fetchone()
        self._connection.execute(
            f"UPDATE tracklets SET ({RECORD}, record_checksum) = ({PLACES}, ?) WHERE key = ?",  # noqa: S608
            (stored.key, *row, checksum_of_values((*row, *checksums)), stored.key),
        )

    def identity(self, name: str) -> IdentitySummary:
        """What is known of an identity before the commit.

        Raises:
            NotFoundError: No tracklet shows it.
        """
        return identities.summary(self._connection, name)

    def has_identity(self, name: str) -> bool:
        """Whether any tracklet shows an identity."""
        return identities.exists(self._connection, name)

    def of_identity(self, name: str) -> dict[int, str]:
        """The ids of an identity's tracklets, by key, in the order of enrolment.

        Raises:
            NotFoundError: No tracklet shows it.
        """
        query = "SELECT key, tracklet_id FROM tracklets WHERE identity = ? ORDER BY key"
        if found := dict(self._connection.execute(query, (name,)).fetchall()):
            return found
        raise NotFoundError("no tracklet shows this identity")

    def shown(self, tracklet_ids: Iterable[str]) -> dict[str, tuple[int, str | None]]:
        """The key and the identity of those of the ids that are in use."""
        rows = self._connection.execute(
            "SELECT tracklet_id, key, identity FROM tracklets "
            "WHERE tracklet_id IN (SELECT value FROM json_each(?))",
            [json.dumps(list(tracklet_ids))],
        )
        return {tracklet_id: (key, identity) for tracklet_id, key, identity in rows.fetchall()}

    def outlines(self) -> Iterator[tuple[int, Outline]]:
        """What decides whether a tracklet was erased, of all of them, with their keys."""
        query = "SELECT key, tracklet_id, identity, created_at FROM tracklets ORDER BY key"
        for key, tracklet_id, identity, created_at in self._connection.execute(query):
            yield key, Outline(tracklet_id, identity, from_microseconds(created_at))

    def name(self, keys: Sequence[int], identity: str | None) -> None:
        """Say whom tracklets show. A record that is damaged keeps its wrong checksum."""
        self._connection.execute(
            "UPDATE tracklets SET identity = ?1, record_checksum = "  # noqa: S608
            f"CASE record_checksum WHEN values_checksum({SUMMED}) THEN values_checksum({_RENAMED}) "
            "ELSE record_checksum END WHERE key IN (SELECT value FROM json_each(?2))",
            (identity, json.dumps(keys)),
        )

    def erase(
        self, tracklets: Mapping[int, str], *, at: datetime, identity: str | None = None
    ) -> None:
        """Erase tracklets with all that hangs on them, and enter that in the ledger.

        Args:
            tracklets: Their ids by key.
            at: When, aware.
            identity: The one that is erased with them, if it is.
        """
        self.has_erased = True
        salt = erasure_salt(self._connection)
        erased: list[tuple[Kind, str]] = [("tracklet", each) for each in tracklets.values()]
        if identity is not None:
            erased.append(("identity", identity))
        self.enter(Erasure(digest(salt, kind, name), kind, at, salt) for kind, name in erased)
        self._connection.execute(
            "DELETE FROM tracklets WHERE key IN (SELECT value FROM json_each(?))",
            [json.dumps(list(tracklets))],
        )

    def enter(self, erasures: Iterable[Erasure]) -> None:
        """Add entries to the ledger; where one is there already, the later counts."""
        rows = (
            (one.digest, one.kind, to_microseconds(one.erased_at), one.salt) for one in erasures
        )
        self._connection.executemany(
            "INSERT INTO erasures (digest, kind, erased_at, salt, checksum) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET (erased_at, salt, checksum) = "
            "(excluded.erased_at, excluded.salt, excluded.checksum) "
            "WHERE excluded.erased_at > erased_at",
            ((*row, checksum_of_values(row)) for row in rows),
        )

    @property
    def connection(self) -> sqlite3.Connection:
        """For `index.mending` alone, which looks at what was damaged."""
        return self._connection

    def erasures(self) -> Erasures:
        """The ledger before the commit."""
        return read_erasures(self._connection)

    def replace_calibration(self, calibration: Calibration | None) -> None:
        """See `index.properties.replace_calibration`."""
        replace_calibration(self._connection, calibration)

    def replace_property(self, name: Name, value: str) -> None:
        """Keep a text under a name, in the place of the last."""
        replace_property(self._connection, name, value)

    def commit(self) -> None:
        """Make the changes durable and visible."""
        with translated("write the gallery"):
            try:
                self._connection.execute("COMMIT")
            except sqlite3.Error:
                self._has_failed = True
                raise


def read_erasures(connection: sqlite3.Connection, *, checked: bool = True) -> Erasures:
    """The ledger of a gallery's file, by digest and kind.

    Args:
        connection: To a file of version 2 or newer.
        checked: Whether it is of version 5 or newer, which has checksums.

    Raises:
        DamagedGalleryError: An entry is not as it was entered.
    """
    checksum = "checksum" if checked else "NULL"
    rows = connection.execute(
        f"SELECT digest, kind, erased_at, salt, {checksum} FROM erasures ORDER BY digest, kind"  # noqa: S608
    ).fetchall()
    if checked and (bad := sum(checksum_of_values(row[:-1]) != row[-1] for row in rows)):
        raise DamagedGalleryError(
            f"expected a ledger of erasures as it was entered, got one in which {bad} of "
            f"{len(rows)} entries are damaged. Restore a snapshot, or run `passerby mend`"
        )
    return Erasures(
        tuple(
            Erasure(digested, kind, from_microseconds(erased_at), salt)
            for digested, kind, erased_at, salt, _ in rows
        )
    )


def read_stored(connection: sqlite3.Connection, tracklet_id: str) -> Stored:
    """A record by id.

    Raises:
        NotFoundError: No tracklet has this id.
        GalleryUnavailableError: It is not as it was stored.
    """
    row = connection.execute(
        f"SELECT {STORED} FROM tracklets WHERE tracklet_id = ?",  # noqa: S608
        (tracklet_id,),
    ).fetchone()
    if row is None:
        raise no_tracklet(tracklet_id)
    return to_stored(row)


def no_tracklet(tracklet_id: str) -> NotFoundError:
    """What to raise where no tracklet has an id."""
    return NotFoundError(f"no tracklet has the id {tracklet_id}")
