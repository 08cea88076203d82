"""Changes of a gallery's file that happen together, or not at all."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import NamedTuple

from index import identities
from index.calibration import Calibration
from index.checksums import checksum_of
from index.erasures import Erasure, Erasures, Kind, digest
from index.gallery import Enrolment, IdentitySummary, NotFoundError
from index.properties import Name, erasure_salt, replace_calibration, replace_property
from index.rows import (
    PLACES,
    RECORD,
    Stored,
    from_microseconds,
    to_microseconds,
    to_row,
    to_stored,
)
from index.schema import translated
from index.vector_storage import Storage, to_blob


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
        checksum = checksum_of(enrolment.record.tracklet_id, vector)
        cursor = self._connection.execute(
            f"INSERT INTO tracklets ({RECORD}, vector_checksum) VALUES ({PLACES}, ?)",  # noqa: S608
            (None, *to_row(enrolment.record), checksum),
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
        """Write a record over the one with its key."""
        self._connection.execute(
            f"UPDATE tracklets SET ({RECORD}) = ({PLACES}) WHERE key = ?",  # noqa: S608
            (stored.key, *to_row(stored.record), stored.key),
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
        """Say whom tracklets show."""
        self._connection.execute(
            "UPDATE tracklets SET identity = ? WHERE key IN (SELECT value FROM json_each(?))",
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
        self._connection.executemany(
            "INSERT INTO erasures (digest, kind, erased_at, salt) VALUES (?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET erased_at = max(erased_at, excluded.erased_at)",
            ((one.digest, one.kind, to_microseconds(one.erased_at), one.salt) for one in erasures),
        )

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


def read_erasures(connection: sqlite3.Connection) -> Erasures:
    """The ledger of a gallery's file of version 2 or newer."""
    rows = connection.execute("SELECT digest, kind, erased_at, salt FROM erasures").fetchall()
    return Erasures(
        tuple(
            Erasure(digested, kind, from_microseconds(erased_at), salt)
            for digested, kind, erased_at, salt in rows
        )
    )


def read_stored(connection: sqlite3.Connection, tracklet_id: str) -> Stored:
    """A record by id.

    Raises:
        NotFoundError: No tracklet has this id.
    """
    row = connection.execute(
        f"SELECT {RECORD} FROM tracklets WHERE tracklet_id = ?",  # noqa: S608
        (tracklet_id,),
    ).fetchone()
    if row is None:
        raise no_tracklet(tracklet_id)
    return to_stored(row)


def no_tracklet(tracklet_id: str) -> NotFoundError:
    """What to raise where no tracklet has an id."""
    return NotFoundError(f"no tracklet has the id {tracklet_id}")
