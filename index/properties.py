"""What a gallery knows of itself besides its tracklets: texts by name."""

import os
import sqlite3
from typing import Literal, get_args

from index.calibration import Calibration
from index.checksums import checksum_of_values
from index.erasures import SALT_BYTES
from index.gallery import GalleryUnavailableError, ModelMismatchError
from index.vector_storage import Storage

Name = Literal["calibration", "erasure-salt", "storage", "saved-index"]
SINCE_VERSION = 2  # of the file, see `index.schema.MIGRATIONS`; so has the ledger
NAMES: tuple[Name, ...] = get_args(Name)


def read_property(
    connection: sqlite3.Connection, name: Name, *, checked: bool = True
) -> str | None:
    """A property, or None where there is none.

    Args:
        connection: To a file of version 2 or newer.
        name: Which.
        checked: Whether the file is of version 5 or newer, which has checksums.

    Raises:
        GalleryUnavailableError: It is not as it was stored.
    """
    checksum = "checksum" if checked else "NULL"
    query = f"SELECT value, {checksum} FROM properties WHERE name = ?"  # noqa: S608
    row = connection.execute(query, (name,)).fetchone()
    if row is None:
        return None
    value, checksum = row
    if checked and checksum_of_values((name, value)) != checksum:
        raise GalleryUnavailableError(
            f"expected the gallery's {name} as it was stored, got another one: its checksum is "
            "wrong. Restore a snapshot, or stop the service and run `passerby mend`"
        )
    return str(value)


def stored_as(connection: sqlite3.Connection) -> Storage:
    """How a gallery's embeddings are kept."""
    return "float16" if read_property(connection, "storage") == "float16" else "float32"


def replace_property(connection: sqlite3.Connection, name: Name, value: str) -> None:
    """Keep a text in the place of the last one of its name, in this transaction."""
    connection.execute(
        "INSERT OR REPLACE INTO properties (name, value, checksum) VALUES (?, ?, ?)",
        (name, value, checksum_of_values((name, value))),
    )


def erasure_salt(connection: sqlite3.Connection) -> bytes:
    """The salt of this gallery's own entries in its ledger; drawn, once, in this transaction."""
    if (salt := read_property(connection, "erasure-salt")) is None:
        salt = os.urandom(SALT_BYTES).hex()
        replace_property(connection, "erasure-salt", salt)
    return bytes.fromhex(salt)


def replace_calibration(connection: sqlite3.Connection, calibration: Calibration | None) -> None:
    """Put a calibration in the place of the last one, or forget that, in this transaction.

    Raises:
        ModelMismatchError: It is of another model than the tracklets.
    """
    connection.execute("DELETE FROM properties WHERE name = 'calibration'")
    if calibration is None:
        return
    row = connection.execute("SELECT model FROM tracklets LIMIT 1").fetchone()
    if row is not None and row[0] != calibration.model:
        message = f"expected a calibration of the model {row[0]}, got one of {calibration.model}"
        raise ModelMismatchError(message)
    replace_property(connection, "calibration", calibration.to_json())
