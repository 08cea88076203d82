"""Files that are there whole or not at all, and that only we have made."""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from index.gallery import GalleryError, GalleryUnavailableError, StorageFullError

Progress = Callable[[str, int, int], None]
"""Gets what is being done, how much of it is, and how much there is to do."""
CHUNK_BYTES = 4 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def no_progress(_doing: str, _done: int, _all: int) -> None:
    """For those who do not want to know."""


@contextmanager
def told(doing: str, refusal: type[GalleryError] = GalleryUnavailableError) -> Iterator[None]:
    """Turn the system's errors into the gallery's.

    Args:
        doing: What is being tried, for the message: "write the snapshot".
        refusal: What is raised where the disk is not full.

    Raises:
        StorageFullError: The disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError(f"cannot {doing}: the disk is full") from error
        raise refusal(f"cannot {doing}: {error.strerror or error}") from error


def create(path: Path) -> BinaryIO:
    """Make a file for its owner only, and open it for writing.

    Raises:
        OSError: It cannot be made, or something has this name, be it a link that leads nowhere.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "w+b")


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; does not wait for who writes into a pipe.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "expected a regular file, got another kind")
    return file


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk.

    Raises:
        OSError: It cannot be done.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def workshop(path: Path, refusal: type[GalleryError]) -> Iterator[Path]:
    """A directory of our own for unfinished things; it is gone afterwards.

    What somebody left in it who was killed is removed.

    Args:
        path: Where; its parent exists.
        refusal: What is raised where it cannot be had.

    Raises:
        StorageFullError: The disk is full.
        GalleryError: ``refusal``, also where somebody else is at work in it.
    """
    with told(f"make {path.name}", refusal):
        path.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        directory = os.open(path, flags)
    try:
        if os.fstat(directory).st_uid != os.geteuid():  # whose files would be ours to trust
            raise refusal(f"expected {path.name} to be ours, got somebody else's")
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"expected nobody to be at work in {path.name}, got another process"
            raise refusal(message) from error
        try:
            with told(f"clear {path.name}", refusal):
                _clear(path)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(directory)


def _clear(path: Path) -> None:
    for one in path.iterdir():
        if one.is_dir() and not one.is_symlink():
            shutil.rmtree(one)
        else:
            one.unlink()


class Hashed:
    """A file that is read or written from its begin to its end, and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = sha256()
        self.count = 0
        """Bytes so far."""

    def write(self, content: bytes | memoryview) -> int:
        """Append bytes."""
        self._file.write(content)
        self._seen(content)
        return len(content)

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes; fewer at the end only."""
        content = self._file.read(size)
        self._seen(content)
        return content

    def readline(self, limit: int) -> bytes:
        """The next bytes up to the end of the line, or as many as the limit."""
        content = self._file.readline(limit)
        self._seen(content)
        return content

    @property
    def hex(self) -> str:
        """SHA-256 of what has passed."""
        return self._hash.hexdigest()

    def _seen(self, content: bytes | memoryview) -> None:
        self._hash.update(content)
        self.count += len(content)
