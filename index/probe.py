"""Whether a directory can be written: asked by writing."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from index.gallery import GalleryError, GalleryUnavailableError, StorageFullError

PROBE_NAME = "passerby.probe"

# About what an enrolment writes: an embedding and a film strip. Random, for a file system that
# compresses would find room for zeros.
_CONTENT = os.urandom(16 * 1024)
# A disk that was fine is asked again after so long: probes come every few seconds, from more than
# one side, and each makes the disk work.
_GOOD_FOR_S = 5.0
# A disk that has not answered for so long counts as failed; it is not asked by more threads.
_PATIENCE_S = 5.0
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# How a file system says that it has no nameless files, or a kernel that it does not know them.
_NO_NAMELESS_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT})


class WriteProbe:
    """Writes a little into a directory, and leaves nothing behind.

    The file has no name where the file system can do that, so no crash leaves it. Elsewhere what a
    crash left is removed by the next opener, here.

    Args:
        directory: Whose only user this is.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._named = directory / PROBE_NAME
        self._lock = Lock()
        self._good_until = 0.0
        self._busy_since: float | None = None
        self._failure: GalleryError | None = None
        with suppress(OSError):  # whether it can be written is for `check` to say
            self._named.unlink(missing_ok=True)

    def check(self) -> None:
        """Return when the directory can be written, or could a few seconds ago.

        One thread at a time asks the disk; it takes as long as the disk does. Others do not wait.

        Raises:
            StorageFullError: The disk is full.
            GalleryUnavailableError: It cannot, or has been trying for seconds.
        """
        now = time.monotonic()
        with self._lock:
            if self._busy_since is not None:
                self._tell_the_last(now - self._busy_since)
                return
            if now < self._good_until:
                return
            self._busy_since = now
        failure: GalleryError | None = None
        try:
            self._write()
        except OSError as error:
            failure = _told(error)
            raise failure from error
        finally:
            with self._lock:
                self._busy_since = None
                self._failure = failure
                self._good_until = 0.0 if failure else time.monotonic() + _GOOD_FOR_S

    @contextmanager
    def told_of_failures(self) -> Iterator[None]:
        """Ask the disk again at the next check where a write in the block fails."""
        try:
            yield
        except (StorageFullError, GalleryUnavailableError):
            with self._lock:
                self._good_until = 0.0
            raise

    def _tell_the_last(self, waited_s: float) -> None:
        if waited_s > _PATIENCE_S:
            raise GalleryUnavailableError(
                f"the gallery's directory cannot be written: waiting for {waited_s:.0f} s"
            )
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)

    def _write(self) -> None:
        file, has_name = self._open()
        try:
            os.write(file, _CONTENT)
            os.fsync(file)
        finally:
            os.close(file)
            if has_name:
                self._named.unlink(missing_ok=True)

    def _open(self) -> tuple[int, bool]:
        flags = os.O_WRONLY | os.O_CLOEXEC
        nameless = getattr(os, "O_TMPFILE", None)
        if nameless is not None:
            try:
                return os.open(self._directory, flags | nameless, 0o600), False
            except OSError as error:
                if error.errno not in _NO_NAMELESS_FILES:
                    raise
        return os.open(self._named, flags | os.O_CREAT | os.O_TRUNC, 0o600), True


def _told(error: OSError) -> GalleryError:
    """What happened, without the path: clients may see it."""
    if error.errno in _FULL:
        return StorageFullError("cannot write the gallery: the disk is full")
    return GalleryUnavailableError(f"the gallery's directory cannot be written: {error.strerror}")
