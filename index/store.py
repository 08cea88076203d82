"""The truth: records, embeddings and strips in one SQLite file."""

import json
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from index import identities
from index.checksums import (
    check_kept,
    check_vectors,
    checksum_of,
    checksum_of_frames,
)
from index.erasures import Erasures
from index.gallery import (
    Embeddings,
    Enrolment,
    Filters,
    GalleryUnavailableError,
    IdentitySummary,
    NotFoundError,
)
from index.intact import check_intact
from index.leftovers import remove_second_names, remove_unfinished
from index.locks import DirectoryLock
from index.log_loss import forget_copy
from index.probe import WriteProbe
from index.properties import Name, read_property, replace_property, stored_as
from index.recognition import content_of
from index.rows import (
    STORED,
    Stored,
    check_stored,
    to_microseconds,
    to_stored,
    where,
)
from index.saved import FILE_NAME as INDEX_NAME
from index.saved import SavedIndex
from index.schema import (
    BUSY_TIMEOUT_MS,
    MIGRATIONS,
    close_as_it_is,
    damage_told,
    no_check,
    open_reader,
    open_writer,
    readable,
    translated,
)
from index.scrub import UnknownLayoutError, scrub
from index.soundness import check_tables
from index.transaction import Transaction as Transaction  # these three are imported from here, too
from index.transaction import no_tracklet, read_stored
from index.transaction import read_erasures as read_erasures
from index.vector_storage import Storage, StorageMismatchError, dimension_of
from index.vector_storage import to_matrix as to_matrix

FILE_NAME = "passerby.sqlite3"
LOCK_NAME = "passerby.lock"
RESTORING_NAME = "passerby.restoring"  # where `index.restore` works; it holds the same lock

_log = logging.getLogger(__name__)
# Vectors of a sample are read so many at a time.
_ROWS_AT_ONCE = 2048
# Checksums are compared so many at a time where `check` asks, which is every second or so: 1 ms.
_CHECKED_AT_ONCE = 64
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


class Store:
    """One gallery directory: a writing connection, and as many reading ones as are needed at once.

    Reading may happen from any thread. Who writes sees to it that nobody else does.

    Args:
        directory: Made, readable for its owner only, if it is missing.
        migrations: See `index.schema.MIGRATIONS`.
        storage: How embeddings are kept; None for what they are kept as already, and float32 in a
            new gallery. It may change while the gallery is empty.
        is_checked: Whether to compare records with their indexes, and the ledger and properties
            with their checksums; without, a damaged gallery can be mended.

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
        is_checked: bool = True,
    ) -> None:
        self._path = directory / FILE_NAME
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot make the gallery's directory {directory}: {error.strerror}"
            raise GalleryUnavailableError(message) from error
        self._lock = DirectoryLock(directory / LOCK_NAME)
        try:
            check_intact(self._path, INDEX_NAME)
            self._file = _open(self._path)
        except BaseException:
            self._lock.release()
            raise
        try:
            self._inode = os.fstat(self._file).st_ino
            check = check_tables if is_checked else no_check
            self._writer = open_writer(self._path, migrations, check=check)
            if not is_checked:
                self._writer.text_factory = readable
            try:
                with damage_told(), translated("open the gallery"):
                    self.storage = _settle_storage(self._writer, storage)
                self._probe = WriteProbe(directory)
            except BaseException:
                close_as_it_is(self._writer, self._path)
                raise
        except BaseException:
            os.close(self._file)
            self._lock.release()
            raise
        # Whether the files may hold traces of what was erased: who opened them last may have died.
        self._has_traces = True
        self._scrubs_from = 0.0
        self._checked_until = 0  # a key
        self.saved = SavedIndex(directory)
        self._is_saved_outdated = False
        self._idle_readers: SimpleQueue[sqlite3.Connection] = SimpleQueue()
        self._closed = False
        # Of commands that were killed: embeddings of people who may have been erased since.
        shutil.rmtree(directory / RESTORING_NAME, ignore_errors=True)
        remove_unfinished(directory)
        remove_second_names(self._path)
        forget_copy(self._path)

    def close(self, *, as_it_is: bool = False) -> None:
        """Release the file. Reads that have begun may end; new ones are refused.

        Args:
            as_it_is: Leave the write-ahead log where it is: the gallery is refused.
        """
        self._closed = True
        try:
            self._close_idle_readers()
            if as_it_is:
                close_as_it_is(self._writer, self._path)
            else:
                self._writer.close()
        finally:
            os.close(self._file)  # last, see `index.scrub.scrub`
            self._lock.release()

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Begin a transaction; without a commit in the block, nothing has happened after it.

        Raises:
            StorageFullError: The disk is full.
            GalleryUnavailableError: The file cannot be written, or is not where it was.
        """
        self._check_in_place()
        with self._probe.told_of_failures(), translated("write the gallery"):
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
            return read_stored(connection, tracklet_id)

    def embedding(self, tracklet_id: str) -> Embeddings:
        """An embedding by id, (D,) float32.

        Raises:
            NotFoundError: No tracklet has this id.
            GalleryUnavailableError: It is not as it was stored.
        """
        query = (
            "SELECT tracklet_id, vector_checksum, vector FROM tracklets JOIN embeddings USING (key)"
            " WHERE tracklet_id = ?"
        )
        with self._reading() as connection:
            row = connection.execute(query, (tracklet_id,)).fetchone()
        if row is None:
            raise no_tracklet(tracklet_id)
        check_vectors([row], GalleryUnavailableError)
        embedding: Embeddings = to_matrix([row[-1]])[0]
        return embedding

    def strip(self, tracklet_id: str) -> bytes:
        """JPEG bytes by id.

        Raises:
            NotFoundError: No tracklet has this id, or none was kept for it.
            GalleryUnavailableError: They are not as they were stored.
        """
        with self._reading() as connection:
            row = connection.execute(
                "SELECT strip_checksum, jpeg FROM tracklets LEFT JOIN strips USING (key) "
                "WHERE tracklet_id = ?",
                (tracklet_id,),
            ).fetchone()
        if row is None:
            raise no_tracklet(tracklet_id)
        checksum, jpeg = row
        found = checksum_of(tracklet_id, jpeg)
        check_kept(tracklet_id, checksum, found, "film strip", GalleryUnavailableError)
        if jpeg is None:
            raise _nothing_kept(tracklet_id)
        return bytes(jpeg)

    def frames(self, tracklet_id: str) -> tuple[bytes, ...]:
        """Kept frames by id, in temporal order.

        Raises:
            NotFoundError: No tracklet has this id, or none were kept for it.
            GalleryUnavailableError: They are not as they were stored.
        """
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT frames_checksum, frames.content FROM tracklets "
                "LEFT JOIN frames USING (key) "
                "WHERE tracklet_id = ? ORDER BY position",
                (tracklet_id,),
            ).fetchall()
        if not rows:
            raise no_tracklet(tracklet_id)
        frames = tuple(content for _, content in rows if content is not None)
        found = checksum_of_frames(tracklet_id, frames)
        check_kept(tracklet_id, rows[0][0], found, "kept frames", GalleryUnavailableError)
        if not frames:
            raise _nothing_kept(tracklet_id)
        return frames

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
                f"SELECT {STORED} FROM tracklets WHERE key > ? {conditions} ORDER BY key LIMIT ?",  # noqa: S608
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
        """What is stored, by key: the values of `index.rows.STORED`.

        Args:
            keys: Which; those that do not exist are left out.
            vectors: Whether to read the bytes of the embedding, too; they come last.
        """
        source = "tracklets JOIN embeddings USING (key)" if vectors else "tracklets"
        columns = f"{STORED}, vector" if vectors else STORED
        query = f"SELECT {columns} FROM {source} WHERE key IN (SELECT value FROM json_each(?))"  # noqa: S608
        with self._reading() as connection:
            found = connection.execute(query, [json.dumps(keys)]).fetchall()
        return {row[0]: row for row in found}

    def sample(self, count: int) -> Embeddings:
        """Embeddings drawn at random, (at most ``count``, D) float32; the same every time.

        Nobody has compared their checksums: `chunks` does, and then all is read.

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
            vectors = self.vectors(part.tolist())
            if made is None:
                made = np.empty((len(drawn), vectors.shape[1]), dtype=np.float32)
            made[start : start + len(part)] = vectors
        if made is None:
            raise ValueError("expected rows to draw from, got none")
        return made

    def vectors(self, keys: Sequence[int]) -> Embeddings:
        """Embeddings by key, (n, D) float32, n >= 1, in the order of the keys.

        Many are read for each answer, so their checksums are left to who shows one to somebody.

        Raises:
            NotFoundError: A key is not there, or twice.
        """
        query = "SELECT key, vector FROM embeddings WHERE key IN (SELECT value FROM json_each(?))"
        with self._reading() as connection:
            found = dict(connection.execute(query, [json.dumps(keys)]).fetchall())
        if len(found) < len(keys):
            raise NotFoundError(f"expected {len(keys)} embeddings, got {len(found)}")
        return to_matrix([found[key] for key in keys])

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
        """Everything with a key greater than one, by key, ``rows`` at a time.

        Raises:
            DamagedGalleryError: An embedding or a record is not as it was stored.
        """
        while found := self._stored_after(after, rows):
            check_stored(found)
            keys, _, identities, cameras, start_times, *_ = columns = [*zip(*found, strict=True)]
            yield Chunk(keys, identities, cameras, start_times, to_matrix(columns[-1]))
            after = keys[-1]

    def check(self) -> None:
        """Return when the file is where it was and can be read, and its directory be written.

        Each call also compares the next few records and embeddings with their checksums.

        Raises:
            StorageFullError: The disk is full.
            GalleryUnavailableError: It cannot; the message says why.
        """
        self._check_in_place()
        with self._reading() as connection:
            connection.execute("SELECT key FROM tracklets LIMIT 1").fetchall()
        self._check_some()
        self._probe.check()

    def _check_in_place(self) -> None:
        """Return where the file is the one that was opened.

        SQLite would go on with a deleted one, and lose everything at the next start.
        """
        try:
            inode = self._path.stat().st_ino
        except OSError as error:
            message = f"the gallery's file is out of reach: {error.strerror}"
            raise GalleryUnavailableError(message) from error
        if inode != self._inode:
            raise GalleryUnavailableError("another file has taken the place of the gallery's")

    def _check_some(self) -> None:
        """Compare the checksums of the next few; whoever asks often has all of them compared.

        A damaged one is met again by each call, until it is gone.
        """
        rows = self._stored_after(self._checked_until, _CHECKED_AT_ONCE)
        check_stored(rows, GalleryUnavailableError)
        self._checked_until = rows[-1][0] if rows else 0

    def _stored_after(self, key: int, rows: int) -> list[Any]:
        """The values of `index.rows.STORED` and the bytes of the embedding, by key."""
        query = (
            f"SELECT {STORED}, vector FROM tracklets JOIN embeddings USING (key) "  # noqa: S608
            "WHERE key > ? ORDER BY key LIMIT ?"
        )
        with self._reading() as connection:
            return connection.execute(query, (key, rows)).fetchall()

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


def _open(path: Path) -> int:
    """Make the file, for its owner only, if it is missing; returns a descriptor of it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        message = f"cannot open the gallery's file: {error.strerror}"
        raise GalleryUnavailableError(message) from error


def _nothing_kept(tracklet_id: str) -> NotFoundError:
    return NotFoundError(f"nothing of this kind is kept for {tracklet_id}")
