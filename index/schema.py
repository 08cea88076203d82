"""The SQLite file: how it is opened, recognised and brought to the newest form."""

import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from index.checksums import register
from index.gallery import (
    DamagedGalleryError,
    GalleryUnavailableError,
    StorageFullError,
)
from index.intact import APPLICATION_ID as APPLICATION_ID  # imported from here, like others
from index.intact import check_recognised

BUSY_TIMEOUT_MS = 5000

_log = logging.getLogger(__name__)
_UNDECODED = "Could not decode to UTF-8"
_DAMAGE = frozenset({sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT})

# Migration i brings a file from version i to i + 1. A published migration never changes.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE tracklets (
        -- AUTOINCREMENT: a key is never used twice, so keys are the order of enrolment for ever
        key INTEGER PRIMARY KEY AUTOINCREMENT,
        tracklet_id TEXT NOT NULL UNIQUE,
        identity TEXT,
        camera TEXT,
        start_time INTEGER,  -- microseconds since 1970 UTC, like all times
        end_time INTEGER,
        metadata TEXT NOT NULL,
        frames_received INTEGER NOT NULL,
        frames_used INTEGER NOT NULL,
        model TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        content TEXT NOT NULL
    );
    CREATE INDEX tracklets_identity ON tracklets (identity);
    CREATE INDEX tracklets_camera ON tracklets (camera);
    CREATE INDEX tracklets_start_time ON tracklets (start_time);
    CREATE TABLE embeddings (
        key INTEGER PRIMARY KEY REFERENCES tracklets (key) ON DELETE CASCADE,
        vector BLOB NOT NULL  -- D little-endian float32
    );
    CREATE TABLE strips (
        key INTEGER PRIMARY KEY REFERENCES tracklets (key) ON DELETE CASCADE,
        jpeg BLOB NOT NULL
    );
    """,
    """
    ALTER TABLE tracklets ADD COLUMN expires_at INTEGER;
    ALTER TABLE tracklets ADD COLUMN quality TEXT;  -- a JSON object
    CREATE INDEX tracklets_expires_at ON tracklets (expires_at) WHERE expires_at IS NOT NULL;
    CREATE INDEX tracklets_created_at ON tracklets (created_at);
    DROP INDEX tracklets_identity;
    -- with the camera: identities are listed from the index alone
    CREATE INDEX tracklets_identity ON tracklets (identity, camera);
    CREATE TABLE frames (
        key INTEGER NOT NULL REFERENCES tracklets (key) ON DELETE CASCADE,
        position INTEGER NOT NULL,  -- 0, 1, ... in temporal order
        content BLOB NOT NULL,
        PRIMARY KEY (key, position)
    );
    CREATE TABLE properties (
        name TEXT PRIMARY KEY,
        value TEXT NOT NULL
    );
    CREATE TABLE erasures (  -- see index/erasures.py
        digest BLOB NOT NULL,
        kind TEXT NOT NULL,
        erased_at INTEGER NOT NULL,
        salt BLOB NOT NULL,  -- that the digest was made with; other galleries have other ones
        PRIMARY KEY (digest, kind)
    ) WITHOUT ROWID;
    """,
    """
    CREATE TABLE succeeding_embeddings (  -- by another model, see index/succession.py
        key INTEGER PRIMARY KEY REFERENCES tracklets (key) ON DELETE CASCADE,
        model TEXT NOT NULL,
        vector BLOB NOT NULL,
        frame_distance REAL NOT NULL
    );
    """,
    """
    ALTER TABLE tracklets ADD COLUMN vector_checksum INTEGER;  -- see index/checksums.py
    UPDATE tracklets SET vector_checksum = checksum_of(
        tracklet_id, (SELECT vector FROM embeddings WHERE embeddings.key = tracklets.key)
    );
    ALTER TABLE succeeding_embeddings ADD COLUMN checksum INTEGER;
    UPDATE succeeding_embeddings SET checksum = checksum_of(
        (SELECT tracklet_id FROM tracklets WHERE tracklets.key = succeeding_embeddings.key), vector
    );
    """,
    """
    ALTER TABLE tracklets ADD COLUMN strip_checksum INTEGER;
    ALTER TABLE tracklets ADD COLUMN frames_checksum INTEGER;
    ALTER TABLE tracklets ADD COLUMN record_checksum INTEGER;
    UPDATE tracklets SET
        strip_checksum = checksum_of(
            tracklet_id, (SELECT jpeg FROM strips WHERE strips.key = tracklets.key)
        ),
        frames_checksum = (
            SELECT CASE WHEN count(*) THEN text_checksum(json_group_array(checksum)) END FROM (
                SELECT checksum_of(tracklets.tracklet_id, content) AS checksum FROM frames
                WHERE frames.key = tracklets.key ORDER BY position
            )
        );
    UPDATE tracklets SET record_checksum = values_checksum(
        tracklet_id, identity, camera, start_time, end_time, metadata, frames_received, frames_used,
        model, created_at, content, expires_at, quality, vector_checksum, strip_checksum,
        frames_checksum
    );
    ALTER TABLE erasures ADD COLUMN checksum INTEGER;
    UPDATE erasures SET checksum = values_checksum(digest, kind, erased_at, salt);
    ALTER TABLE properties ADD COLUMN checksum INTEGER;
    UPDATE properties SET checksum = values_checksum(name, value);
    """,
)


class _UndecodableError(GalleryUnavailableError):
    """Raised where a text is none. It is not shown, nor what says so: it may be a name."""


def _undecodable(doing: str) -> _UndecodableError:
    return _UndecodableError(
        f"cannot {doing}: a text in it is damaged. Restore a snapshot, or stop the service and run "
        "`passerby mend` to see of which tracklet"
    )


def readable(text: bytes) -> str:
    """For `sqlite3.Connection.text_factory`: a text that is none shall be found, not stop us."""
    return text.decode(errors="backslashreplace")


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn SQLite's errors into the gallery's.

    Args:
        doing: What is being tried, for the message: "write the gallery".

    Raises:
        StorageFullError: The disk is full.
        GalleryUnavailableError: SQLite reports anything else.
    """
    try:
        yield
    except sqlite3.Error as error:
        if _is_full(error):
            raise StorageFullError(f"cannot {doing}: the disk is full") from error
        if str(error).startswith(_UNDECODED):
            raise _undecodable(doing) from None
        raise GalleryUnavailableError(f"cannot {doing}: {error}") from error
    except UnicodeDecodeError:  # where the text would have been part of a message of SQLite's
        raise _undecodable(doing) from None


@contextmanager
def damage_told() -> Iterator[None]:
    """While a gallery is being opened: tell a file that is damaged from one that is out of reach.

    Raises:
        DamagedGalleryError: SQLite finds that the file is damaged, or not its own.
    """
    try:
        yield
    except _UndecodableError as error:
        raise DamagedGalleryError(str(error)) from None
    except GalleryUnavailableError as error:
        cause = error.__cause__
        if isinstance(cause, sqlite3.Error) and _code(cause) in _DAMAGE:
            message = f"expected a gallery file, got a damaged or foreign one: {cause}"
            raise DamagedGalleryError(message) from error
        raise


def no_check(_connection: sqlite3.Connection, _version: int) -> None:
    """For those who open a gallery to mend it."""


def open_writer(
    path: Path,
    migrations: Sequence[str] = MIGRATIONS,
    *,
    check: Callable[[sqlite3.Connection, int], None] = no_check,
) -> sqlite3.Connection:
    """Open the one connection that writes, and bring the file to the newest version.

    Args:
        path: The file, already made; an empty one becomes a gallery.
        migrations: See `MIGRATIONS`.
        check: Called with the connection and the version of a file that is a gallery, before
            anything is changed; it raises where that is not sound.

    Raises:
        DamagedGalleryError: The file is not a gallery, or comes from a newer version; it is left
            as it was.
        StorageFullError: The disk is full.
        GalleryUnavailableError: It cannot be opened.
    """
    connection = _connect(path)
    try:
        with damage_told(), translated("open the gallery"):
            register(connection)
            if not _is_blank(connection):
                check(connection, version_of(connection, newest=len(migrations)))
            if not _is_shrinkable(connection):  # to say it again would be a write
                # Before the first table, or it takes a VACUUM.
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            # Erased means overwritten with zeros, not only forgotten.
            connection.execute("PRAGMA secure_delete = ON")
            _migrate(connection, migrations)
            _make_shrinkable(connection)
            # What a part of a transaction may have to be undone with, else in a temporary file. Not
            # before: VACUUM makes a temporary copy of everything.
            connection.execute("PRAGMA temp_store = MEMORY")
    except BaseException:
        close_as_it_is(connection, path)
        raise
    return connection


def close_as_it_is(connection: sqlite3.Connection, path: Path) -> None:
    """Close the only connection to a file, but leave the write-ahead log to whoever mends it.

    SQLite takes in and removes the log when the last connection is closed. It cannot if that may
    only read.
    """
    log = path.with_name(f"{path.name}-wal")
    if not log.exists() or not log.stat().st_size:
        connection.close()
        return
    address = f"file:{quote(str(path.absolute()))}?mode=ro"
    with closing(sqlite3.connect(address, uri=True, isolation_level=None)) as last:
        try:
            last.execute("BEGIN")
            last.execute("PRAGMA user_version").fetchone()  # begins to read; no table is looked at
        except sqlite3.Error as error:
            _log.warning("the log of a refused gallery may be lost: %s", error)
        connection.close()


def open_guest(path: Path, version: int = len(MIGRATIONS)) -> sqlite3.Connection:
    """Open a connection that writes a little beside the one that the gallery's opener has.

    Args:
        path: The file.
        version: The one that it has to have.

    Raises:
        DamagedGalleryError: The file is not a gallery, or comes from a newer version.
        GalleryUnavailableError: There is no file, it cannot be opened, or it comes from an older
            version: only the gallery's opener migrates.
    """
    if not path.is_file():
        raise GalleryUnavailableError("expected a gallery in the directory, got none")
    check_recognised(path)
    connection = _connect(path)
    try:
        with damage_told(), translated("open the gallery"):
            found = version_of(connection, newest=version)
            if found != version:
                message = f"expected a gallery of version {version}, got {found}: open it first"
                raise GalleryUnavailableError(message)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def open_reader(path: Path) -> sqlite3.Connection:
    """Open a connection that cannot write."""
    with translated("read the gallery"):
        connection = _connect(path)
        connection.execute("PRAGMA query_only = ON")
        return connection


def _connect(path: Path) -> sqlite3.Connection:
    with translated("open the gallery"):
        return sqlite3.connect(
            path,
            timeout=BUSY_TIMEOUT_MS / 1000,
            isolation_level=None,  # transactions begin and end where we say
            check_same_thread=False,  # a connection has one user at a time: the pool sees to it
        )


def version_of(connection: sqlite3.Connection, newest: int = len(MIGRATIONS)) -> int:
    """The version of a gallery's file, 1 to ``newest``.

    Raises:
        DamagedGalleryError: It is no gallery, or from a newer version of Passerby.
    """
    [application_id] = connection.execute("PRAGMA application_id").fetchone()
    [version] = connection.execute("PRAGMA user_version").fetchone()
    if application_id != APPLICATION_ID:
        raise DamagedGalleryError(
            f"expected a gallery file (application id {APPLICATION_ID}), "
            f"got an SQLite file of another application ({application_id})"
        )
    if not 1 <= version <= newest:
        raise DamagedGalleryError(
            f"expected a gallery of version {newest} or older, got version {version}: "
            "it was written by a newer Passerby"
        )
    return int(version)


def _is_blank(connection: sqlite3.Connection) -> bool:
    """Whether a file is yet to become anything."""
    [application_id] = connection.execute("PRAGMA application_id").fetchone()
    [version] = connection.execute("PRAGMA user_version").fetchone()
    [objects] = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return (application_id, version, objects) == (0, 0, 0)


def _migrate(connection: sqlite3.Connection, migrations: Sequence[str]) -> None:
    [version] = connection.execute("PRAGMA user_version").fetchone()
    for number, migration in enumerate(migrations[version:], start=version + 1):
        with closing(connection.cursor()) as cursor:
            try:
                cursor.executescript(
                    f"BEGIN IMMEDIATE; {migration}; PRAGMA user_version = {number};"
                    f"PRAGMA application_id = {APPLICATION_ID}; COMMIT"
                )
            finally:
                if connection.in_transaction:
                    cursor.execute("ROLLBACK")


def _make_shrinkable(connection: sqlite3.Connection) -> None:
    """Let a file that was made without it give back the room of what is erased from it.

    Once in its life the whole file is copied, which takes as much room again, and as much in the
    write-ahead log. Without, everything works, but the file only ever grows.
    """
    if _is_shrinkable(connection):
        return
    try:
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    except sqlite3.OperationalError as error:  # no room; damage is another error
        _log.warning("the gallery's file cannot be made to shrink, for now: %s", error)


def _is_shrinkable(connection: sqlite3.Connection) -> bool:
    [kind] = connection.execute("PRAGMA auto_vacuum").fetchone()
    return bool(kind)


def _is_full(error: sqlite3.Error) -> bool:
    # Where the file that connections share cannot be made longer, SQLite does not say why. There is
    # hardly another reason than that the disk is full: it has just been made.
    extended = getattr(error, "sqlite_errorcode", None)
    return _code(error) == sqlite3.SQLITE_FULL or extended == sqlite3.SQLITE_IOERR_SHMSIZE


def _code(error: sqlite3.Error) -> int | None:
    # Absent where the module itself complains, as of a closed connection. The low byte is the
    # primary code; the rest says more of the same.
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return code if code is None else code & 0xFF
