"""Mending a gallery that cannot be opened because of something in it that was damaged."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from index import log_loss
from index.files import told
from index.gallery import DamagedGalleryError, GalleryUnavailableError
from index.intact import check_intact
from index.locks import DirectoryLock
from index.properties import NAMES, Name, read_property, replace_property
from index.saved import FILE_NAME as INDEX_NAME
from index.saved import SavedIndex
from index.schema import open_writer, readable, translated
from index.soundness import OF_TRACKLETS, check_tracklet, tracklets_of
from index.store import FILE_NAME, LOCK_NAME, Store
from index.transaction import Transaction, no_tracklet
from index.vector_storage import storage_of


@dataclass(frozen=True, slots=True)
class Mended:
    """What was done to a gallery, and what is left to do.

    Args:
        log_bytes: How much was cut off the write-ahead log.
        left: What the gallery goes on with where that is more than nothing: the log up to its
            damage, or the file alone, which had what followed already.
        orphans: How many embeddings, strips and frames were dropped that belonged to no tracklet,
            so that no erasure would have reached them.
        erasures: How many damaged entries of the ledger were dropped.
        properties: Which damaged properties were dropped.
        tracklets: The ids of those of which something is damaged, in the order of enrolment; they
            are left as they are, for `erase_stored`.
    """

    log_bytes: int
    left: log_loss.Left | None
    orphans: int
    erasures: int
    properties: tuple[Name, ...]
    tracklets: tuple[str, ...]


def mend(data_dir: Path, *, lose_log: bool = False) -> Mended:
    """Drop what is damaged and can be done without, and find what else is damaged.

    Indexes of records are made anew. Entries of the ledger of erasures that are damaged are
    dropped: what they were made for may come back with a snapshot from before it was erased.
    Properties, too: a calibration has to be made anew, the rest makes itself.

    Args:
        data_dir: The gallery's data directory; nobody has it open.
        lose_log: Cut a write-ahead log where it is damaged; every change from there on is lost.

    Raises:
        GalleryUnavailableError: There is no gallery, or it cannot be used, or is open elsewhere.
        DamagedGalleryError: What is damaged can neither be made anew nor be done without.
        StorageFullError: The disk is full; nothing has changed but the log.
    """
    path = _required(data_dir)
    lock = DirectoryLock(data_dir / LOCK_NAME)
    try:
        with log_loss.settling(path):
            loss = log_loss.lose_log(path) if lose_log else log_loss.NO_LOSS
            check_intact(path, INDEX_NAME)
            with closing(open_writer(path)) as connection, translated("mend the gallery"):
                connection.text_factory = readable
                with _transaction(connection):
                    connection.execute("REINDEX")
                    orphans = _drop_what_is_nobodys(connection)
                    erasures = _drop_damaged_erasures(connection)
                    properties = _drop_damaged_properties(connection)
                    if orphans:
                        with told("remove the saved index"):  # their vectors may be in it, too
                            SavedIndex(data_dir).destroy()
                tracklets = tuple(_damaged(connection))
    finally:
        lock.release()
    return Mended(loss.log_bytes, loss.left, orphans, erasures, properties, tracklets)


def erase_stored(
    data_dir: Path,
    tracklet_id: str,
    *,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> str | None:
    """Erase a tracklet as `index.gallery.Gallery.remove` does, without looking at anything of it.

    It is for a tracklet of which something was damaged on the disk: a gallery does not open with
    it, or cannot show it.
    The ledger has it afterwards, so no older snapshot brings it back.

    Args:
        data_dir: The gallery's data directory; nobody has it open.
        tracklet_id: Which.
        clock: What the time is, aware: for the ledger.

    Returns:
        Whom it showed; None where that was not known.

    Raises:
        NotFoundError: No tracklet has this id.
        GalleryUnavailableError: There is no gallery, or it cannot be used, or is open elsewhere.
        DamagedGalleryError: More is damaged than tracklets.
        StorageFullError: The disk is full.
    """
    _required(data_dir)
    store = Store(data_dir, is_checked=False)
    try:
        with store.transaction() as transaction:
            # A damaged record may not be found, or be erased, otherwise.
            transaction.connection.execute("REINDEX")
            key, identity = _find(transaction, tracklet_id)
            transaction.erase({key: tracklet_id}, at=clock())
            _drop_what_is_nobodys(transaction.connection)
            transaction.commit()
        store.forget(at_once=True)
    finally:
        store.close()
    return identity


def _find(transaction: Transaction, tracklet_id: str) -> tuple[int, str | None]:
    """The key and the identity of a tracklet, by its id as `mend` tells it."""
    if found := transaction.shown([tracklet_id]):
        return found[tracklet_id]
    # Damage may have made no text of it, and then no index leads there.
    rows = transaction.connection.execute("SELECT tracklet_id, key, identity FROM tracklets")
    for stored_id, key, identity in rows:
        if _as_text(stored_id) == tracklet_id:
            return key, identity
    raise no_tracklet(tracklet_id)


def _as_text(stored_id: str | bytes) -> str:
    return readable(stored_id) if isinstance(stored_id, bytes) else str(stored_id)


def _required(data_dir: Path) -> Path:
    path = data_dir / FILE_NAME
    if not path.is_file():  # else one would be made
        raise GalleryUnavailableError(f"expected a gallery in {data_dir}, got no {FILE_NAME}")
    return path


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _drop_what_is_nobodys(connection: sqlite3.Connection) -> int:
    return sum(
        connection.execute(
            f"DELETE FROM {table} WHERE key NOT IN (SELECT key FROM tracklets)"  # noqa: S608
        ).rowcount
        for table in OF_TRACKLETS
    )


def _drop_damaged_properties(connection: sqlite3.Connection) -> tuple[Name, ...]:
    dropped = []
    for name in NAMES:
        try:
            read_property(connection, name)
        except GalleryUnavailableError:
            connection.execute("DELETE FROM properties WHERE name = ?", (name,))
            dropped.append(name)
    if "storage" in dropped:
        [size] = connection.execute("SELECT min(length(vector)) FROM embeddings").fetchone()
        if size is not None:
            replace_property(connection, "storage", storage_of(size))
    return tuple(dropped)


def _drop_damaged_erasures(connection: sqlite3.Connection) -> int:
    cursor = connection.execute(
        "DELETE FROM erasures WHERE checksum IS NOT values_checksum(digest, kind, erased_at, salt)"
    )
    return cursor.rowcount


def _damaged(connection: sqlite3.Connection) -> Iterator[str]:
    """The ids of tracklets of which anything is not as it was stored."""
    for stored in tracklets_of(connection):
        try:
            check_tracklet(stored)
        except DamagedGalleryError:
            yield _as_text(stored.row[1])
