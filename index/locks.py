"""Locks: many readers beside one writer, and one process per directory."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Condition

from index.gallery import GalleryUnavailableError


class ReadWriteLock:
    """Lets many read at once, or one write alone.

    A waiting writer goes before readers that come later, so that steady searching cannot starve it.
    It is not re-entrant.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._readers = 0
        self._writing = False
        self._waiting_writers = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold off writers."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writing and not self._waiting_writers)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold off everybody."""
        with self._changed:
            self._waiting_writers += 1
            try:
                self._changed.wait_for(lambda: not self._writing and not self._readers)
                self._writing = True
            finally:
                self._waiting_writers -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()


class DirectoryLock:
    """Keeps a directory to one opener; the operating system frees it when the process dies.

    Raises:
        GalleryUnavailableError: Somebody else holds it, or the lock file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            message = f"cannot make the gallery's lock file: {error.strerror}"
            raise GalleryUnavailableError(message) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise GalleryUnavailableError(
                f"expected to be the only one to open the gallery in {path.parent}, "
                "got a gallery that is already open, here or in another process"
            ) from error

    def release(self) -> None:
        """Let the next one in."""
        os.close(self._file)
