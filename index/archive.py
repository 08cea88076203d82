"""The form of a snapshot: one tar file of a manifest and a gallery's file.

    512 bytes    header of manifest.json
    3072 bytes   manifest.json, filled up with spaces
    512 bytes    header of passerby.sqlite3
    ...          passerby.sqlite3, filled up to a multiple of 512 with zeros
    1024 bytes   of zeros

Any tar unpacks it. Who reads it here does not parse the headers: they are made again from the
manifest, and every byte that is not the database's has to be as it would be written. So no name,
size or kind that somebody put into a header has any effect, and no flipped bit goes unseen.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from index.files import CHUNK_BYTES, Hashed, Progress, create, open_regular, told
from index.gallery import GalleryError
from index.recognition import NEWEST, Facts
from index.store import FILE_NAME

MANIFEST_NAME = "manifest.json"
FORMAT = "passerby-snapshot"
VERSION = 1
_BLOCK_BYTES = 512
_MANIFEST_BYTES = 3072
_DATABASE_AT = _MANIFEST_BYTES + 2 * _BLOCK_BYTES
_END = bytes(2 * _BLOCK_BYTES)
_GREATEST_OCTAL = 8**11  # sizes from here on, 8 GiB, are written in base 256, as GNU tar does


class SnapshotError(GalleryError):
    """Raised when a snapshot cannot be made, or is damaged, or is not to be restored here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a snapshot says of itself.

    Args:
        created_at: When the gallery was as it is in it, timezone-aware UTC.
        passerby_version: That made it.
        schema_version: Of the gallery's file.
        model: Fingerprint of the gallery's model; None where it was empty.
        dimension: Of the embeddings; None where it was empty.
        tracklets: How many.
        identities: How many.
        database_bytes: Of the gallery's file.
        database_sha256: Likewise, hex.
    """

    created_at: datetime
    passerby_version: str
    schema_version: int
    model: str | None
    dimension: int | None
    tracklets: int
    identities: int
    database_bytes: int
    database_sha256: str

    @property
    def facts(self) -> Facts:
        """What has to be in the gallery's file."""
        return Facts(
            self.schema_version, self.model, self.dimension, self.tracklets, self.identities
        )


class Sink(Protocol):
    """Where the database goes."""

    def write(self, content: bytes, /) -> int:
        """Append bytes."""


def write_archive(
    path: Path,
    database: Path,
    facts: Facts,
    *,
    created_at: datetime,
    passerby_version: str,
    progress: Progress,
) -> Manifest:
    """Make a snapshot of a gallery's file that does not change, and bring it to the disk.

    Args:
        path: Where; nothing has this name.
        database: The file.
        facts: What `index.recognition.inspect` found in it.
        created_at: See `Manifest`.
        passerby_version: Likewise.
        progress: Gets bytes.

    Raises:
        OSError: A file cannot be read or written.
    """
    size = database.stat().st_size
    with create(path) as file, open_regular(database) as source:
        file.seek(_DATABASE_AT)
        hashed = Hashed(source)
        while content := hashed.read(CHUNK_BYTES):
            file.write(content)
            progress("writing", hashed.count, size)
        file.write(bytes(-hashed.count % _BLOCK_BYTES) + _END)
        manifest = Manifest(
            created_at=created_at.astimezone(UTC),
            passerby_version=passerby_version,
            **facts._asdict(),
            database_bytes=hashed.count,
            database_sha256=hashed.hex,
        )
        file.seek(0)  # the sum stands before what it is the sum of
        file.write(_head(manifest))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that who reads it back reads the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return manifest


class Archive:
    """A snapshot that is open for reading; its manifest has been checked, its database has not."""

    def __init__(self, file: BinaryIO, manifest: Manifest) -> None:
        self._file = file
        self.manifest = manifest

    def unpack(self, sink: Sink | None, progress: Progress, doing: str) -> None:
        """Read the database, write it to ``sink`` where there is one, and check it.

        Raises:
            SnapshotError: It is not what the manifest says.
            OSError: A file cannot be read or written.
        """
        self._file.seek(_DATABASE_AT)
        size = self.manifest.database_bytes
        hashed = Hashed(self._file)
        while hashed.count < size:
            content = hashed.read(min(CHUNK_BYTES, size - hashed.count))
            if not content:
                raise SnapshotError(f"expected {size} bytes of database, got {hashed.count}")
            if sink is not None:
                sink.write(content)
            progress(doing, hashed.count, size)
        expected = self.manifest.database_sha256
        if hashed.hex != expected:
            raise SnapshotError(
                f"expected a database with the SHA-256 {expected}, got {hashed.hex}: "
                "the snapshot is damaged"
            )
        if any(self._file.read()):  # what is left is as long as it should be
            raise SnapshotError("expected zeros at the end of the snapshot, got something else")


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a snapshot and read its manifest.

    Raises:
        SnapshotError: It is none, is not whole, is damaged where the manifest is, was made by a
            newer version, or cannot be read.
    """
    with told(f"read the snapshot {path.name}", SnapshotError):
        file = open_regular(path)
    with file:
        with told(f"read the snapshot {path.name}", SnapshotError):
            manifest = _read_head(file.read(_DATABASE_AT))
            found = os.fstat(file.fileno()).st_size
        expected = _whole(manifest)
        if found != expected:
            raise SnapshotError(f"expected a snapshot of {expected} bytes, got {found}")
        yield Archive(file, manifest)


def _whole(manifest: Manifest) -> int:
    filling = -manifest.database_bytes % _BLOCK_BYTES
    return _DATABASE_AT + manifest.database_bytes + filling + len(_END)


def _head(manifest: Manifest) -> bytes:
    """All that stands before the database."""
    values = {"format": FORMAT, "version": VERSION} | asdict(manifest)
    values["created_at"] = manifest.created_at.isoformat()
    values["sha256"] = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    text = json.dumps(values, indent=1).encode()
    if len(text) >= _MANIFEST_BYTES:
        raise SnapshotError(
            f"expected a manifest of less than {_MANIFEST_BYTES} bytes, got {len(text)}"
        )
    content = text.ljust(_MANIFEST_BYTES - 1) + b"\n"
    time = int(manifest.created_at.timestamp())
    return (
        _header(MANIFEST_NAME, _MANIFEST_BYTES, time)
        + content
        + _header(FILE_NAME, manifest.database_bytes, time)
    )


def _header(name: str, size: int, time: int) -> bytes:
    """A member's header in GNU tar's format, https://www.gnu.org/software/tar/manual (Basic Tar).

    By hand, for it has to be the same bytes with every version of Python.
    """
    length = b"%011o\0" % size if size < _GREATEST_OCTAL else b"\x80" + size.to_bytes(11, "big")
    before = name.encode().ljust(100, b"\0") + b"0000600\0" + 2 * b"0000000\0"
    before += length + b"%011o\0" % max(time, 0)
    after = (b"0" + bytes(100) + b"ustar  \0").ljust(_BLOCK_BYTES - 156, b"\0")
    total = sum(before) + sum(after) + 8 * ord(" ")  # its own place counts as spaces
    return before + b"%06o\0 " % total + after


def _read_head(head: bytes) -> Manifest:
    if len(head) < _DATABASE_AT or not head.startswith(MANIFEST_NAME.encode() + b"\0"):
        raise SnapshotError("expected a snapshot, got another kind of file, or a part of one")
    try:
        values = json.loads(head[_BLOCK_BYTES : _BLOCK_BYTES + _MANIFEST_BYTES])
    except (ValueError, RecursionError) as error:
        raise SnapshotError("expected a manifest in JSON, got something else") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise SnapshotError("expected a snapshot, got another kind of file")
    version, schema = values.get("version"), values.get("schema_version")
    if isinstance(version, int) and version > VERSION:
        raise SnapshotError(
            f"expected a snapshot of version {VERSION}, got {version}: a newer Passerby made it"
        )
    manifest = _to_manifest(values)
    if _head(manifest) != head:
        raise SnapshotError("expected a manifest as it was written, got another: it is damaged")
    if manifest.schema_version > NEWEST:
        raise SnapshotError(
            f"expected a gallery of version {NEWEST} or older, got version {schema}: "
            "a newer Passerby made it"
        )
    return manifest


def _to_manifest(values: dict[str, Any]) -> Manifest:
    known: dict[str, Any] = {field.name: values.get(field.name) for field in fields(Manifest)}
    kinds: dict[str, type | tuple[type, ...]] = {
        "passerby_version": str,
        "schema_version": int,
        "model": (str, type(None)),
        "dimension": (int, type(None)),
        "tracklets": int,
        "identities": int,
        "database_bytes": int,
        "database_sha256": str,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(known[name], kind)]
    numbers = [value for value in known.values() if isinstance(value, int)]
    if wrong or not all(0 <= number < 2**63 for number in numbers):
        raise SnapshotError(f"a manifest: expected other values, got them in {wrong or 'numbers'}")
    try:
        created_at = datetime.fromisoformat(str(known.pop("created_at")))
        if created_at.utcoffset() is None:
            raise ValueError("no offset")
        created_at = created_at.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise SnapshotError("a manifest: expected a time with an offset, got another") from error
    return Manifest(created_at=created_at, **known)
