"""A derived index on the disk: so that a start need not train it, or link its graph, again.

It is never the truth. A file is used only if its checksum is right, if it was made for the same
model, size and plan, and if the store itself says that this is the last one made from it: each file
has a name of its own, drawn at random, and the store keeps the name of the last. A store that was
restored from a backup keeps another, or the same one where the file is of its own past. What was
enrolled or erased since then is found by comparing keys, which are never used twice.

Layout: a line of JSON (`Header`), the keys (int64, little-endian), what FAISS writes, and the
SHA-256 of all that. Nothing in it names anybody, but vectors are in it, more or less rounded: what
is erased must leave it, and it leaves with the whole file, see `SavedIndex.destroy`.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np

from index.files import sync
from index.ranking import Rows

FILE_NAME = "passerby.index"
NEW_NAME = "passerby.index.new"

_FORMAT = 1
_KEY = np.dtype("<i8")
_DIGEST_BYTES = 32
_LONGEST_HEADER = 65_536
_BYTES_AT_ONCE = 1 << 20

Write = Callable[[bytes], int]


class SavedIndexError(Exception):
    """Raised when a saved index cannot be used, and says why; never leaves the gallery."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a saved index is of.

    Args:
        name: Drawn at random; the store keeps it, too.
        model: Whose embeddings these are.
        dimension: D.
        plan: What made it, see `index.vectors.IndexPlan.description`.
        trained_on: How many rows it was trained with.
        slots: How many keys follow.
        rows: How many vectors the index holds.
        format: Of the file.
    """

    name: str
    model: str
    dimension: int
    plan: str
    trained_on: int
    slots: int
    rows: int
    format: int = _FORMAT

    def to_line(self) -> bytes:
        """The first line of a file."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "Header":
        """Read what `to_line` wrote.

        Raises:
            SavedIndexError: It is anything else.
        """
        try:
            header = cls(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise SavedIndexError(f"expected a header, got {error!r}") from error
        if header.format != _FORMAT:
            raise SavedIndexError(f"expected format {_FORMAT}, got {header.format}")
        return header


class SavedIndex:
    """The file of one gallery's directory. Who uses it sees to it that nobody else does.

    Args:
        directory: The gallery's.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / FILE_NAME
        self._new = directory / NEW_NAME

    @property
    def exists(self) -> bool:
        """Whether there is anything, usable or not."""
        return os.path.lexists(self._path) or os.path.lexists(self._new)

    def write(self, header: Header, keys: Rows, write_index: Callable[[Write], None]) -> None:
        """Replace the file; it is on the disk when this returns.

        Args:
            header: What is saved.
            keys: (N,) int64 by slot, -1 where a slot is dead.
            write_index: Hands the index to a function, part by part.

        Raises:
            OSError: The disk is full, or refuses; the old file is as it was.
        """
        digest = sha256()
        self._new.unlink(missing_ok=True)
        made = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(made, "wb") as file:

                def write(part: bytes) -> int:
                    digest.update(part)
                    file.write(part)
                    return len(part)

                write(header.to_line())
                write(keys.astype(_KEY, copy=False).tobytes())
                write_index(write)
                file.write(digest.digest())
                file.flush()
                os.fsync(file.fileno())
            self._new.replace(self._path)
            sync(self._directory)
        except BaseException:
            self._new.unlink(missing_ok=True)
            raise

    @contextmanager
    def reading(self) -> Iterator[tuple[Header, Rows, BinaryIO]]:
        """Open the file, having read all of it once: header, keys, and the rest to be read.

        Raises:
            SavedIndexError: It is damaged, or there is none.
        """
        try:
            with self._path.open("rb") as file:
                _check_sum(file)
                header = Header.from_line(file.readline(_LONGEST_HEADER))
                keys = np.frombuffer(file.read(header.slots * _KEY.itemsize), _KEY)
                yield header, keys.astype(np.int64), file
        except OSError as error:
            raise SavedIndexError(f"expected a file, got: {error.strerror}") from error

    def destroy(self) -> None:
        """Remove what there is.

        Raises:
            OSError: It cannot be done.
        """
        if self.exists:
            self._path.unlink(missing_ok=True)
            self._new.unlink(missing_ok=True)
            sync(self._directory)


def _check_sum(file: BinaryIO) -> None:
    """Read a file, and go back to its beginning."""
    left = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
    digest = sha256()
    while left > 0:
        part = file.read(min(left, _BYTES_AT_ONCE))
        if not part:
            break
        digest.update(part)
        left -= len(part)
    if left or file.read() != digest.digest():
        raise SavedIndexError("expected the checksum that the file ends with, got another")
    file.seek(0)
