"""The truth: records, embeddings and strips in one SQLite file."""

import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from index import identities
from index.calibration import Calibration
from index.erasures import Erasure, Erasures, Kind, digest
from index.gallery import (
    DamagedGalleryError,
    Embeddings,
    Enrolment,
    Filters,
    GalleryUnavailableError,
    IdentitySummary,
    NotFoundError,
)
from index.locks import DirectoryLock
from index.probe import WriteProbe
from index.properties import (
    Name,
    erasure_salt,
    read_property,
    replace_calibration,
    replace_property,
    stored_as,
)
from index.recognition import content_of
from index.rows import (
    PLACES,
    RECORD,
    Stored,
    from_microseconds,
    to_microseconds,
    to_row,
    to_stored,
    where,
)
from index.saved import FILE_NAME as INDEX_NAME
from index.saved import SavedIndex
from index.schema import (
    BUSY_TIMEOUT_MS,
    MIGRATIONS,
    damage_told,
    open_reader,
    open_writer,
    translated,
)
from index.scrub import UnknownLayoutError, scrub
from index.vector_storage import (
    Storage,
    StorageMismatchError,
    dimension_of,
    to_blob,
)
from index.vector_storage import to_matrix as to_matrix  # is imported from here, too

FILE_NAME = "passerby.sqlite3"
LOCK_NAME = "passerby.lock"

_log = logging.getLogger(__name__)
_HEADER_BYTES, _LOG_HEADER_BYTES = 100, 32  # of SQLite's files
# Vectors of a sample are read so many at a time.
_ROWS_AT_ONCE = 2048
# Fewer free pages (4 KiB each) are not given back: the next enrolments take them.
_FEW_FREE_PAGES = 256
# So many are given back at a time: searches go on meanwhile, but no write does.
_PAGES_AT_ONCE = 25_000
# Of the time between two removals of traces, so much at most is spent on them.
_SCRUBBING_SHARE = 1 / 20


class Content(NamedTuple):
    """How much the store holds, and of what. Both are None while it is empty."""

    tracklets: int
    model: str | None
    dimension: int | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows, with what a search needs to know of them.

    Args:
        keys: N keys, ascending.
        identities: N identities.
        cameras: N cameras.
        start_times: N times in microseconds since 1970 UTC.
        vectors: (N, D) float32.
    """

    keys: Sequence[int]
    identities: Sequence[str | None]
    cameras: Sequence[str | None]
    start_times: Sequence[int | None]
    vectors: Embeddings

    @classmethod
    def of(cls, keys: Sequence[int], enrolments: Sequence[Enrolment]) -> "Chunk":
        """The rows that enrolments became."""
        records = [enrolment.record for enrolment in enrolments]
        return cls(
            keys,
            [record.identity for record in records],
            [record.camera for record in records],
            [to_microseconds(record.start_time) for record in records],
            np.stack([enrolment.embedding for enrolment in enrolments]),
        )


class Described(NamedTuple):
    """Consecutive rows as in `Chunk`, without vectors."""

    keys: Sequence[int]
    identities: Sequence[str | None]
    cameras: Sequence[str | None]
    start_times: Sequence[int | None]


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
        self.has_erased = False

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
        return _get(self._connection, tracklet_id)

    def insert(self, enrolment: Enrolment) -> int:
        """Add a tracklet; returns its key.

        Raises:
            InvalidEmbeddingError: See `index.vector_storage.to_blob`.
        """
        cursor = self._connection.execute(
            f"INSERT INTO tracklets ({RECORD}) VALUES ({PLACES})",  # noqa: S608
            (None, *to_row(enrolment.record)),
        )
        key = cursor.lastrowid
        vector = to_blob(enrolment.embedding, self._storage)
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
            self._connection.execute("COMMIT")


class Store:
    """One gallery directory: a writing connection, and as many reading ones as are needed at once.

    Reading may happen from any thread. Who writes sees to it that nobody else does.

    Args:
        directory: Made, readable for its owner only, if it is missing.
        migrations: See `index.schema.MIGRATIONS`.
        storage: How embeddings are kept; None for what they are kept as already, and float32 in a
            new gallery. It may change while the gallery is empty.

    Raises:
        GalleryUnavailableError: The directory cannot be used, or is open elsewhere.
        StorageMismatchError: There are embeddings, and they are kept otherwise.
        DamagedGalleryError: The file in it is not a gallery that this version can read.
        StorageFullError: The disk is full.
    """

    def __init__(
        self,
        directory: Path,
        migrations: Sequence[str] = MIGRATIONS,
        *,
        storage: Storage | None = None,
    ) -> None:
        self._path = directory / FILE_NAME
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot make the gallery's directory {directory}: {error.strerror}"
            raise GalleryUnavailableError(message) from error
        self._lock = DirectoryLock(directory / LOCK_NAME)
        try:
            _check_not_lost(directory)
            self._file = _open(self._path)
        except BaseException:
            self._lock.release()
            raise
        try:
            self._inode = os.fstat(self._file).st_ino
            self._writer = open_writer(self._path, migrations)
            try:
                with damage_told(), translated("open the gallery"):
                    self.storage = _settle_storage(self._writer, storage)
                self._probe = WriteProbe(directory)
            except BaseException:
                self._writer.close()
                raise
        except BaseException:
            os.close(self._file)
            self._lock.release()
            raise
        # Whether the files may hold traces of what was erased: who opened them last may have died.
        self._has_traces = True
        self._scrubs_from = 0.0
        self.saved = SavedIndex(directory)
        self._is_saved_outdated = False
        self._idle_readers: SimpleQueue[sqlite3.Connection] = SimpleQueue()
        self._closed = False

    def close(self) -> None:
        """Release the file. Reads that have begun may end; new ones are refused."""
        self._closed = True
        try:
            self._close_idle_readers()
            self._writer.close()
        finally:
            os.close(self._file)  # last, see `index.scrub.scrub`
            self._lock.release()

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Begin a transaction; without a commit in the block, nothing has happened after it.

        Raises:
            StorageFullError: The disk is full.
            GalleryUnavailableError: The file cannot be written.
        """
        with translated("write the gallery"):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                transaction = Transaction(self._writer, self.storage)
                yield transaction
            finally:
                self._is_saved_outdated |= transaction.has_erased
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")

    @property
    def has_traces(self) -> bool:
        """Whether the files may hold traces of what was erased, so that `forget` has work to do."""
        return self._has_traces

    def forget(self, *, at_once: bool = False) -> None:
        """Remove what is left of erased rows from the files; nobody else may write meanwhile.

        The rows themselves are overwritten by then. What is left are pages that nothing needs any
        more, copies in the write-ahead log, and in parts of pages that are not in use. Somebody who
        is just reading can prevent it; then the next call does it. It never fails.

        Args:
            at_once: Do not put off what takes long in a large file, see `_SCRUBBING_SHARE`.
        """
        self._has_traces = True
        if self._is_saved_outdated:
            self.drop_saved()
        self._writer.execute("PRAGMA busy_timeout = 0")  # rather than wait for readers
        try:
            self._give_back_pages()
            [(is_busy, _, _)] = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            if not is_busy and (at_once or time.monotonic() >= self._scrubs_from):
                self._scrub()
        except (sqlite3.Error, OSError, UnknownLayoutError) as error:
            _log.warning("traces of what was erased could not be removed from the files: %s", error)
        finally:
            self._writer.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")

    def drop_saved(self) -> None:
        """Remove the saved index, with what was erased since. Never fails, but may have to wait."""
        try:
            self.saved.destroy()
            self._is_saved_outdated = False
        except OSError as error:
            self._is_saved_outdated = self._has_traces = True
            _log.warning("the saved index could not be removed: %s", error.strerror)

    def _give_back_pages(self) -> None:
        [free] = self._writer.execute("PRAGMA freelist_count").fetchone()
        if free < _FEW_FREE_PAGES:
            return
        # First the zeros over their content: pages that are cut off are not written any more.
        self._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        try:
            # As a script: it yields a row without columns for each page, and `execute` ends there.
            self._writer.executescript(f"PRAGMA incremental_vacuum({_PAGES_AT_ONCE})")
        except sqlite3.OperationalError as error:  # no room for the pages that move
            _log.warning("the gallery's file cannot be made shorter, for now: %s", error)

    def _scrub(self) -> None:
        began = time.monotonic()
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            log = self._path.with_name(f"{self._path.name}-wal")
            if not log.exists() or not log.stat().st_size:  # else another process has just written
                scrub(self._writer, self._file)
                self._has_traces = self._is_saved_outdated
        finally:
            self._writer.execute("ROLLBACK")
            self._writer.execute("PRAGMA shrink_memory")  # pages as they were, traces and all
        ended = time.monotonic()
        self._scrubs_from = ended + (ended - began) / _SCRUBBING_SHARE

    def get(self, tracklet_id: str) -> Stored:
        """A record by id.

        Raises:
            NotFoundError: No tracklet has this id.
        """
        with self._reading() as connection:
            return _get(connection, tracklet_id)

    def embedding(self, tracklet_id: str) -> Embeddings:
        """A (D,) float32 embedding by id.

        Raises:
            NotFoundError: No tracklet has this id.
        """
        blob = self._blob(tracklet_id, "SELECT vector FROM embeddings WHERE key = ?")
        return to_matrix([blob]).reshape(-1)

    def strip(self, tracklet_id: str) -> bytes:
        """JPEG bytes by id.

        Raises:
            NotFoundError: No tracklet has this id, or none was kept for it.
        """
        return self._blob(tracklet_id, "SELECT jpeg FROM strips WHERE key = ?")

    def frames(self, tracklet_id: str) -> tuple[bytes, ...]:
        """Kept frames by id, in temporal order.

        Raises:
            NotFoundError: No tracklet has this id, or none were kept for it.
        """
        with self._reading() as connection:
            key = _get(connection, tracklet_id).key
            query = "SELECT content FROM frames WHERE key = ? ORDER BY position"
            rows = connection.execute(query, (key,)).fetchall()
        if not rows:
            raise _nothing_kept(tracklet_id)
        return tuple(content for (content,) in rows)

    def identity(self, name: str) -> IdentitySummary:
        """What is known of an identity.

        Raises:
            NotFoundError: No tracklet shows it.
        """
        with self._reading() as connection:
            return identities.summary(connection, name)

    def identities(self, *, after: str | None, limit: int) -> list[IdentitySummary]:
        """What is known of identities, by name, beginning after one."""
        with self._reading() as connection:
            return identities.summaries(connection, after=after, limit=limit)

    def due(self, now: int, enrolled: int | None, *, limit: int) -> dict[int, str]:
        """The ids of tracklets that are to be erased, by key; at most ``limit``.

        Args:
            now: In microseconds. What has an ``expires_at`` at or before it is due.
            enrolled: Likewise; what was enrolled at or before it is due, too.
            limit: How many at most.
        """
        query = "SELECT key, tracklet_id FROM tracklets WHERE expires_at <= ? OR created_at <= ?"
        with self._reading() as connection:
            rows = connection.execute(f"{query} LIMIT ?", (now, enrolled, limit))
            return dict(rows.fetchall())

    def next_expiry(self) -> datetime | None:
        """The earliest ``expires_at``, aware UTC; None where no tracklet has one."""
        query = "SELECT min(expires_at) FROM tracklets WHERE expires_at IS NOT NULL"
        with self._reading() as connection:
            row: tuple[int | None] = connection.execute(query).fetchone()
        return from_microseconds(row[0])

    def property(self, name: Name) -> str | None:
        """What is kept under a name, or None."""
        with self._reading() as connection:
            return read_property(connection, name)

    def erasures(self) -> Erasures:
        """The ledger."""
        with self._reading() as connection:
            return read_erasures(connection)

    def page(self, filters: Filters, *, after: int, limit: int) -> list[Stored]:
        """Records that pass the filters, by key, beginning after a key."""
        conditions, values = where(filters)
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT {RECORD} FROM tracklets WHERE key > ? {conditions} ORDER BY key LIMIT ?",  # noqa: S608
                [after, *values, limit],
            )
            return [to_stored(row) for row in rows.fetchall()]

    def keys(self, tracklet_ids: Iterable[str]) -> list[int]:
        """The keys of those ids that exist."""
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT key FROM tracklets WHERE tracklet_id IN (SELECT value FROM json_each(?))",
                [json.dumps(list(tracklet_ids))],
            )
            return [key for (key,) in rows.fetchall()]

    def rows(self, keys: Sequence[int], *, vectors: bool) -> dict[int, tuple[Any, ...]]:
        """What is stored, by key: the values of `index.rows.RECORD`, and the vector's bytes.

        Args:
            keys: Which; those that do not exist are left out.
            vectors: Whether to read the vectors; else there are no such bytes.
        """
        source = "tracklets JOIN embeddings USING (key)" if vectors else "tracklets"
        columns = f"{RECORD}, vector" if vectors else RECORD
        query = f"SELECT {columns} FROM {source} WHERE key IN (SELECT value FROM json_each(?))"  # noqa: S608
        with self._reading() as connection:
            found = connection.execute(query, [json.dumps(keys)]).fetchall()
        return {row[0]: row for row in found}

    def sample(self, count: int) -> Embeddings:
        """Embeddings drawn at random, (at most ``count``, D) float32; the same every time.

        Raises:
            ValueError: There are none, or none are wanted.
        """
        with self._reading() as connection:
            rows = connection.execute("SELECT key FROM tracklets ORDER BY key").fetchall()
        keys = np.array(rows, dtype=np.int64).reshape(-1)
        drawn = np.random.default_rng(0).permutation(keys)[:count]
        drawn.sort()
        made: Embeddings | None = None  # filled in place: in parts it would be held twice
        for start in range(0, len(drawn), _ROWS_AT_ONCE):
            part = drawn[start : start + _ROWS_AT_ONCE]
            vectors = to_matrix(self._vectors(part.tolist()))
            if made is None:
                made = np.empty((len(drawn), vectors.shape[1]), dtype=np.float32)
            made[start : start + len(part)] = vectors
        if made is None:
            raise ValueError("expected rows to draw from, got none")
        return made

    def _vectors(self, keys: Sequence[int]) -> list[bytes]:
        query = "SELECT vector FROM embeddings WHERE key IN (SELECT value FROM json_each(?)) "
        with self._reading() as connection:
            rows = connection.execute(f"{query} ORDER BY key", [json.dumps(keys)]).fetchall()
        return [vector for (vector,) in rows]

    def content(self) -> Content:
        """How much there is, and of what.

        Raises:
            DamagedGalleryError: Embeddings of two models, or of two sizes, or a tracklet without.
        """
        with self._reading() as connection:
            tracklets, model, vector_bytes = content_of(connection, self.storage)
        dimension = None if vector_bytes is None else dimension_of(vector_bytes)
        return Content(tracklets, model, dimension)

    def columns(self, rows: int, *, until: int) -> Iterator[Described]:
        """Everything but the vectors, by key, ``rows`` at a time.

        Args:
            rows: How many at a time.
            until: The last key that is wanted.
        """
        query = (
            "SELECT key, identity, camera, start_time FROM tracklets "
            "WHERE key > ? AND key <= ? ORDER BY key LIMIT ?"
        )
        after = 0
        while True:
            with self._reading() as connection:
                found = connection.execute(query, (after, until, rows)).fetchall()
            if not found:
                return
            yield Described(*zip(*found, strict=True))
            after = found[-1][0]

    def chunks(self, rows: int, *, after: int = 0) -> Iterator[Chunk]:
        """Everything with a key greater than one, by key, ``rows`` at a time."""
        while found := self._chunk(after, rows):
            keys, identities, cameras, start_times, blobs = zip(*found, strict=True)
            yield Chunk(keys, identities, cameras, start_times, to_matrix(blobs))
            after = keys[-1]

    def check(self) -> None:
        """Return when the file is where it was and can be read, and its directory be written.

        Raises:
            StorageFullError: The disk is full.
            GalleryUnavailableError: It cannot; the message says why.
        """
        try:
            inode = self._path.stat().st_ino
        except OSError as error:
            message = f"the gallery's file is out of reach: {error.strerror}"
            raise GalleryUnavailableError(message) from error
        # SQLite would go on with the deleted file, and lose everything at the next start.
        if inode != self._inode:
            raise GalleryUnavailableError("another file has taken the place of the gallery's")
        with self._reading() as connection:
            connection.execute("SELECT key FROM tracklets LIMIT 1").fetchall()
        self._probe.check()

    def _chunk(self, after: int, rows: int) -> list[Any]:
        with self._reading() as connection:
            return connection.execute(
                "SELECT key, identity, camera, start_time, vector FROM tracklets "
                "JOIN embeddings USING (key) WHERE key > ? ORDER BY key LIMIT ?",
                (after, rows),
            ).fetchall()

    def _blob(self, tracklet_id: str, query: str) -> bytes:
        with self._reading() as connection:
            key = _get(connection, tracklet_id).key
            row = connection.execute(query, (key,)).fetchone()
        if row is None:
            raise _nothing_kept(tracklet_id)
        return bytes(row[0])

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if self._closed:
            raise GalleryUnavailableError("the gallery is closed")
        try:
            connection = self._idle_readers.get_nowait()
        except Empty:
            connection = open_reader(self._path)
        try:
            with translated("read the gallery"):
                yield connection
        finally:
            self._idle_readers.put(connection)
            if self._closed:  # while this one was at work
                self._close_idle_readers()

    def _close_idle_readers(self) -> None:
        while True:
            try:
                self._idle_readers.get_nowait().close()
            except Empty:
                return


def _settle_storage(connection: sqlite3.Connection, wanted: Storage | None) -> Storage:
    """How embeddings are kept from now on."""
    found = stored_as(connection)
    if wanted in {None, found}:
        return found
    if connection.execute("SELECT key FROM embeddings LIMIT 1").fetchone() is not None:
        raise StorageMismatchError(
            f"expected embeddings kept as {wanted}, got a gallery of {found}: "
            f"open it as {found}, or export it and import it into a new gallery"
        )
    replace_property(connection, "storage", wanted)
    return wanted


def _check_not_lost(directory: Path) -> None:
    """Refuse to begin anew where a gallery's other files say that there was one.

    SQLite would make an empty one, which begins by removing their content.

    Raises:
        DamagedGalleryError: The store is gone, or was emptied.
    """
    if _size(directory / FILE_NAME) >= _HEADER_BYTES:
        return
    for left in (f"{FILE_NAME}-wal", INDEX_NAME):
        if _size(directory / left) > _LOG_HEADER_BYTES:
            raise DamagedGalleryError(
                f"expected {FILE_NAME} beside {left}, got none or an empty one: it was deleted or "
                "emptied. Restore a snapshot, or remove the other files to begin anew"
            )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # whoever opens it tells
        return 0


def _open(path: Path) -> int:
    """Make the file, for its owner only, if it is missing; returns a descriptor of it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        message = f"cannot open the gallery's file: {error.strerror}"
        raise GalleryUnavailableError(message) from error


def read_erasures(connection: sqlite3.Connection) -> Erasures:
    """The ledger of a gallery's file of version 2 or newer."""
    rows = connection.execute("SELECT digest, kind, erased_at, salt FROM erasures").fetchall()
    return Erasures(
        tuple(
            Erasure(digested, kind, from_microseconds(erased_at), salt)
            for digested, kind, erased_at, salt in rows
        )
    )


def _nothing_kept(tracklet_id: str) -> NotFoundError:
    return NotFoundError(f"nothing of this kind is kept for {tracklet_id}")


def _get(connection: sqlite3.Connection, tracklet_id: str) -> Stored:
    row = connection.execute(
        f"SELECT {RECORD} FROM tracklets WHERE tracklet_id = ?",  # noqa: S608
        (tracklet_id,),
    ).fetchone()
    if row is None:
        raise NotFoundError(f"no tracklet has the id {tracklet_id}")
    return to_stored(row)
