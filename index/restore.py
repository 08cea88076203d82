"""Restoring: a snapshot takes the place of a gallery, in one step, and brings nobody back.

What happens in the data directory, in this order; whoever is killed leaves the old gallery before
the last step but one, and the new one after it:

1. The directory's lock is taken.
2. The database is unpacked into `passerby.restoring`, checked, and brought to the newest form.
3. What the ledgers ban is erased from it, and its traces overwritten.
4. The old file takes in its write-ahead log, which is gone then: the new one must not find it.
5. A saved index is removed: it is made again, and may hold what is not in the new gallery.
6. The old file gets a second name in a directory of its own, `passerby.replaced-...`.
7. The new file takes the old one's name. This is the moment.
8. `passerby.restoring` is removed.

Who is killed between 6 and 7 leaves the old gallery with a second name, which the next restore
removes; who is killed between 7 and 8, `passerby.restoring`, which the next start removes.
"""

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from index.archive import Archive, Manifest, SnapshotError, open_archive
from index.erasures import Erasures
from index.files import Progress, create, no_progress, sync, told, workshop
from index.gallery import DamagedGalleryError, GalleryUnavailableError
from index.ledger import stored_ledger
from index.leftovers import REPLACED_NAME as REPLACED_NAME  # imported from here, too
from index.leftovers import remove_second_names, remove_unfinished
from index.locks import DirectoryLock
from index.recognition import inspect
from index.saved import SavedIndex
from index.schema import translated
from index.snapshot import check_model
from index.store import FILE_NAME, LOCK_NAME, RESTORING_NAME, Store

WORK_NAME = RESTORING_NAME
# What SQLite keeps beside a file, and would apply to another one of that name.
_COMPANIONS = tuple(f"{FILE_NAME}-{kind}" for kind in ("wal", "shm", "journal"))
_MOMENT = "%Y%m%dT%H%M%S%fZ"
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did.

    Args:
        manifest: Of the snapshot.
        erased: How many of its tracklets the ledgers banned: they are not there.
        replaced: Where the files of the gallery are that was there before; None where none was.
        others: Names in the data directory of those that earlier restores put aside. Who was killed
            in the end told nobody of his.
    """

    manifest: Manifest
    erased: int
    replaced: Path | None
    others: tuple[str, ...] = ()


def restore(
    snapshot: Path,
    data_dir: Path,
    *,
    expected_model: str | None = None,
    replace: bool = False,
    ledgers: Sequence[Erasures] = (),
    lose_ledger: bool = False,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    progress: Progress = no_progress,
) -> Restored:
    """Make a gallery of a snapshot; all of it is there, or nothing has changed.

    What was erased after the snapshot was made does not come back, as far as a ledger knows of it:
    the one of the gallery that is replaced, and those given.

    Args:
        snapshot: See `index.snapshot.snapshot`.
        data_dir: Where the gallery is to be; made if it is missing.
        expected_model: Fingerprint of the only model to accept; None for any.
        replace: Whether a gallery that is there may be replaced; its files are put aside.
        ledgers: What else was erased, see `index.ledger.read_ledger`.
        lose_ledger: Go on where the ledger of the gallery to be replaced cannot be read.
        clock: What the time is, aware: for the ledger, and the name of the directory aside.
        progress: See `index.files.Progress`.

    Raises:
        SnapshotError: The snapshot is damaged, none, of another model, or from a newer version; or
            there is a gallery already; or its ledger cannot be read.
        StorageFullError: The disk is full.
        GalleryUnavailableError: The directory cannot be used, or is open elsewhere.
    """
    with open_archive(snapshot) as archive:
        check_model(archive, expected_model)
        with _held(data_dir):
            is_there = any(os.path.lexists(data_dir / one) for one in (FILE_NAME, *_COMPANIONS))
            if is_there and not replace:
                message = f"expected a directory without a gallery, got one with: {data_dir}"
                raise SnapshotError(message)
            remove_second_names(data_dir / FILE_NAME)
            remove_unfinished(data_dir)
            with (
                workshop(data_dir / WORK_NAME, SnapshotError) as work,
                told("restore the snapshot", SnapshotError),
            ):
                _unpack(archive, work / FILE_NAME, progress)
                known = _old_ledger(data_dir, lose=lose_ledger) if is_there else Erasures()
                banning = [*ledgers, known or Erasures()]
                progress("erasing", 0, 1)
                erased = _apply(banning, work, clock())
                progress("erasing", 1, 1)
                if is_there and known is not None:
                    _take_in_log(data_dir / FILE_NAME)
                SavedIndex(data_dir).destroy()
                others = tuple(sorted(one.name for one in data_dir.glob(f"{REPLACED_NAME}*")))
                replaced = _put_aside(data_dir, work / "aside", clock()) if is_there else None
                _take_place(work / FILE_NAME, data_dir)
            return Restored(archive.manifest, erased, replaced, others)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Keep everybody else out of the data directory; if it is new and the block fails, it goes."""
    is_new = not directory.exists()
    with told(f"make the gallery's directory {directory}"):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = DirectoryLock(directory / LOCK_NAME)
    try:
        yield
        is_new = False
    finally:
        lock.release()
        if is_new:
            with suppress(OSError):
                (directory / LOCK_NAME).unlink()
                directory.rmdir()


def _unpack(archive: Archive, database: Path, progress: Progress) -> None:
    with create(database) as file:
        archive.unpack(file, progress, "unpacking")
    progress("checking", 0, 1)
    try:
        found = inspect(database)
    except (DamagedGalleryError, GalleryUnavailableError) as error:
        raise SnapshotError(f"the snapshot holds no sound gallery: {error}") from error
    expected = archive.manifest.facts
    if found != expected:
        raise SnapshotError(f"expected {expected} in the snapshot, got {found}")
    progress("checking", 1, 1)


def _old_ledger(data_dir: Path, *, lose: bool) -> Erasures | None:
    """What the gallery to be replaced has erased; None where that may be lost, and is."""
    try:
        return stored_ledger(data_dir)
    except (DamagedGalleryError, GalleryUnavailableError) as error:
        if lose:
            return None
        raise SnapshotError(
            "expected to read in the gallery to be replaced who was erased from it, or to be told "
            f"to do without, got: {error}"
        ) from error


def _apply(ledgers: Sequence[Erasures], directory: Path, now: datetime) -> int:
    """Add ledgers to a gallery that nobody sees yet, and erase what they ban; returns how many."""
    store = Store(directory)
    try:
        with store.transaction() as transaction:
            entries = tuple(entry for ledger in ledgers for entry in ledger.entries)
            # What its own ledger bans and it has is there with good reason, see
            # `index.gallery.Gallery.apply_erasures`.
            new = Erasures(entries).without(transaction.erasures())
            outlines = transaction.outlines() if new.entries else ()
            banned = {key: each.tracklet_id for key, each in outlines if new.bans(each)}
            transaction.enter(new.entries)
            if banned:
                transaction.erase(banned, at=now)
            transaction.commit()
        store.forget(at_once=True)
    finally:
        store.close()
    if any((directory / one).exists() for one in _COMPANIONS):  # else it would not be one file
        raise SnapshotError("expected the restored file to be closed, got it in use")
    sync(directory / FILE_NAME)
    return len(banned)


def _put_aside(data_dir: Path, unnamed: Path, now: datetime) -> Path:
    """Give the old files second names, and see to it that the new one is not taken for an old one.

    A gallery that cannot be read, and whose loss was accepted, loses its write-ahead log here: who
    is killed between this and the next step finds what there was among the files aside.

    Args:
        data_dir: Where they are.
        unnamed: A directory to be made in the workshop: what is half done is removed with that.
        now: What the time is, aware.

    Returns:
        What the directory is called when it is done.
    """
    aside = data_dir / f"{REPLACED_NAME}{now.astimezone(UTC):{_MOMENT}}"
    unnamed.mkdir(mode=0o700)
    for name in (FILE_NAME, *_COMPANIONS):
        if os.path.lexists(data_dir / name):
            _link(data_dir / name, unnamed / name)
    sync(unnamed)
    unnamed.rename(aside)
    sync(data_dir)
    for name in _COMPANIONS:
        (data_dir / name).unlink(missing_ok=True)
    sync(data_dir)
    return aside


def _take_place(database: Path, data_dir: Path) -> None:
    """Let a new file take the old one's name; if that fails, the old one has no second name."""
    try:
        database.replace(data_dir / FILE_NAME)
    except OSError:
        remove_second_names(data_dir / FILE_NAME)
        raise
    sync(data_dir)


def _take_in_log(path: Path) -> None:
    """Make one file of a gallery's; only where nobody else has it open does SQLite do so."""
    try:
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE").fetchall()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in _BUSY:
            message = "expected nobody to read the gallery to be replaced, got somebody: try again"
            raise SnapshotError(message) from error
        with translated("close the gallery to be replaced"):
            raise


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links
        with create(target) as file, source.open("rb") as old:
            shutil.copyfileobj(old, file)
            file.flush()
            os.fsync(file.fileno())
