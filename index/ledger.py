"""The ledger of erasures as a file of its own, to be kept elsewhere than the backups."""

import os
from pathlib import Path

from index.checksums import EVERYTHING_SINCE
from index.erasures import Erasures
from index.files import create, open_regular, sync, told
from index.gallery import GalleryError
from index.leftovers import making
from index.properties import SINCE_VERSION
from index.reading import reading
from index.schema import version_of
from index.store import read_erasures

# About 220 bytes an entry: four million erasures.
GREATEST_LEDGER_BYTES = 1 << 30


class LedgerError(GalleryError):
    """Raised when a file is not a ledger of erasures, or cannot be read or written."""


def stored_ledger(directory: Path) -> Erasures:
    """The ledger of a stored gallery, also while somebody has that open.

    Args:
        directory: The gallery's data directory.

    Raises:
        GalleryUnavailableError: There is no gallery, or it cannot be read.
        DamagedGalleryError: The file is not a gallery that this version can read.
    """
    with reading(directory) as connection:
        version = version_of(connection)
        if version < SINCE_VERSION:
            return Erasures()
        return read_erasures(connection, checked=version >= EVERYTHING_SINCE)


def read_ledger(path: Path) -> Erasures:
    """The ledger in a file.

    Raises:
        LedgerError: It is not one, or cannot be read.
    """
    with told(f"read the ledger {path.name}", LedgerError), open_regular(path) as file:
        content = file.read(GREATEST_LEDGER_BYTES + 1)
    return parse_ledger(content, path.name)


def parse_ledger(content: bytes, name: str) -> Erasures:
    """The ledger in a file's content.

    Args:
        content: All of it.
        name: Of the file, for messages.

    Raises:
        LedgerError: It is not one.
    """
    if len(content) > GREATEST_LEDGER_BYTES:
        raise LedgerError(
            f"{name}: expected a ledger of at most {GREATEST_LEDGER_BYTES} bytes, got more"
        )
    try:
        return Erasures.from_json(content.decode())
    except (ValueError, RecursionError) as error:  # also where it is not UTF-8
        raise LedgerError(f"{name}: {error}") from error


def write_ledger(directory: Path, target: Path) -> Erasures:
    """Write a stored gallery's ledger to a file, in the place of the last one.

    Args:
        directory: The gallery's data directory; somebody may have it open.
        target: The file. It is there whole, or as it was before.

    Returns:
        What was written.

    Raises:
        LedgerError: ``target`` cannot be written.
        StorageFullError: Its disk is full.
        GalleryUnavailableError: There is no gallery, or it cannot be read.
        DamagedGalleryError: The file is not a gallery that this version can read.
    """
    ledger = stored_ledger(directory)
    with (
        making(target, LedgerError) as work,
        told(f"write the ledger {target.name}", LedgerError),
    ):
        made = work / "ledger.json"
        with create(made) as file:
            file.write(ledger.to_json().encode())
            file.flush()
            os.fsync(file.fileno())
        made.replace(target)
        sync(target.parent)
    return ledger
