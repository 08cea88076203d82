"""Snapshots: a gallery in one file, made while a service goes on."""

import logging
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from index.archive import Archive, Manifest, SnapshotError, open_archive, write_archive
from index.files import Progress, create, no_progress, sync, told
from index.leftovers import making
from index.reading import reading
from index.recognition import inspect
from index.schema import translated
from index.scrub import UnknownLayoutError, scrub
from index.store import FILE_NAME

_log = logging.getLogger(__name__)
_PAGES_AT_ONCE = 2048  # of 4 KiB


def snapshot(
    data_dir: Path,
    target: Path,
    *,
    overwrite: bool = False,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    progress: Progress = no_progress,
) -> Manifest:
    """Copy a stored gallery, as it is at one moment, into one file.

    A service may have it open, and goes on; what it writes meanwhile is not in the copy. It takes
    twice the room of the gallery's file where ``target`` is, half of it only meanwhile. When this
    returns, the file has been read back from the disk and is whole; until then there is none.

    Args:
        data_dir: The gallery's data directory.
        target: The file to make.
        overwrite: Whether it may take the place of another one.
        clock: What the time is, aware.
        progress: See `index.files.Progress`.

    Raises:
        SnapshotError: ``target`` exists already, or cannot be written.
        StorageFullError: Its disk is full.
        GalleryUnavailableError: There is no gallery, or it cannot be read.
        DamagedGalleryError: The file is not a sound gallery that this version can read.
    """
    target = target.absolute()
    _check_free(target, overwrite=overwrite)
    with making(target, SnapshotError) as work:
        database, made = work / FILE_NAME, work / "snapshot"
        with told("write the snapshot", SnapshotError):
            create(database).close()  # SQLite would let others read it
            created_at = clock()
            _copy(data_dir, database, progress)
            progress("checking", 0, 1)
            facts = inspect(database)
            _remove_traces(database)
            progress("checking", 1, 1)
            manifest = write_archive(
                made,
                database,
                facts,
                created_at=created_at,
                passerby_version=version("passerby"),
                progress=progress,
            )
            check_snapshot(made, progress=progress)
            _put_in_place(made, target, overwrite=overwrite)
    return manifest


def check_snapshot(path: Path, *, progress: Progress = no_progress) -> Manifest:
    """Read all of a snapshot and compare it with its checksums; writes nothing.

    Raises:
        SnapshotError: It is none, is damaged, or was made by a newer version.
    """
    with open_archive(path) as archive, told("read the snapshot", SnapshotError):
        archive.unpack(None, progress, "verifying")
        return archive.manifest


def check_model(archive: Archive, expected: str | None) -> None:
    """Refuse a snapshot of another model than the one expected.

    Args:
        archive: The snapshot; one of an empty gallery goes with every model.
        expected: A fingerprint, or None for any.

    Raises:
        SnapshotError: It is of another model.
    """
    found = archive.manifest.model
    if expected is not None and found not in {None, expected}:
        raise SnapshotError(f"expected a snapshot of the model {expected}, got one of {found}")


def _check_free(target: Path, *, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise SnapshotError(f"expected a directory {target.parent}, got none")
    if target.is_dir():
        raise SnapshotError(f"expected the name of a file, got a directory: {target}")
    if not overwrite and os.path.lexists(target):
        raise SnapshotError(f"expected a new file, got one that exists: {target}")


def _copy(data_dir: Path, database: Path, progress: Progress) -> None:
    with (
        reading(data_dir) as source,
        closing(sqlite3.connect(database, isolation_level=None)) as made,
    ):
        made.execute("PRAGMA synchronous = OFF")  # it is not what has to last
        # The source is in a transaction, or each write of a service would make it begin again.
        source.backup(
            made,
            pages=_PAGES_AT_ONCE,
            progress=lambda _, left, pages: progress("copying", pages - left, pages),
        )


def _remove_traces(database: Path) -> None:
    """What was erased, and not yet overwritten where it was, shall not live on in a copy."""
    file = os.open(database, os.O_RDWR | os.O_CLOEXEC)
    try:
        with (
            translated("copy the gallery"),
            closing(sqlite3.connect(database, isolation_level=None)) as connection,
        ):
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # no file of shared memory
            connection.execute("BEGIN IMMEDIATE")
            scrub(connection, file)
            connection.execute("ROLLBACK")
    except UnknownLayoutError as error:
        _log.warning("traces of what was erased may be in the snapshot: %s", error)
    finally:
        os.close(file)


def _put_in_place(made: Path, target: Path, *, overwrite: bool) -> None:
    if not overwrite:
        try:
            os.link(made, target)  # unlike a renaming, it refuses to replace anything
        except FileExistsError as error:
            raise SnapshotError(f"expected a new file, got one that exists: {target}") from error
        except OSError:  # a file system without links: one that has appeared by now is lost
            _check_free(target, overwrite=False)
            made.replace(target)
    else:
        made.replace(target)
    sync(target.parent)
