"""What a gallery knows of itself besides its tracklets: texts by name."""

import os
import sqlite3
from typing import Literal

from index.calibration import Calibration
from index.erasures import SALT_BYTES
from index.gallery import ModelMismatchError
from index.vector_storage import Storage

Name = Literal["calibration", "erasure-salt", "storage", "saved-index"]


def read_property(connection: sqlite3.Connection, name: Name) -> str | None:
    """A property, or None where there is none."""
    row = connection.execute("SELECT value FROM properties WHERE name = ?", (name,)).fetchone()
    return None if row is None else str(row[0])


def stored_as(connection: sqlite3.Connection) -> Storage:
    """How a gallery's embeddings are kept."""
    return "float16" if read_property(connection, "storage") == "float16" else "float32"


def replace_property(connection: sqlite3.Connection, name: Name, value: str) -> None:
    """Keep a text in the place of the last one of its name, in this transaction."""
    connection.execute("INSERT OR REPLACE INTO properties VALUES (?, ?)", (name, value))


def erasure_salt(connection: sqlite3.Connection) -> bytes:
    """The salt of this gallery's own entries in its ledger; drawn, once, in this transaction."""
    connection.execute(
        "INSERT OR IGNORE INTO properties VALUES ('erasure-salt', ?)",
        (os.urandom(SALT_BYTES).hex(),),
    )
    return bytes.fromhex(read_property(connection, "erasure-salt") or "")


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
    text = calibration.to_json()
    connection.execute("INSERT INTO properties VALUES ('calibration', ?)", (text,))
