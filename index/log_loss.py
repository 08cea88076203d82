"""Going on without the end of a write-ahead log that was damaged where it had been acknowledged.

SQLite lays the frames of a log over the file. Where it has copied later ones into the file already,
what is left of the log must not be laid over it: that would mix two moments. Then the file alone
is the gallery, if it is one.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from index.files import create, sync, told
from index.gallery import DamagedGalleryError
from index.log_frames import (
    FRAME_HEADER_BYTES,
    HEADER_BYTES,
    Copied,
    LogFrames,
    compare,
    is_ahead,
    log_of,
    read_log,
)
from index.recognition import check_file

Left = Literal["log", "file"]
"""What the gallery is made of: the log up to its damage, or the file alone."""


class Loss(NamedTuple):
    """What was given up of a log.

    Args:
        log_bytes: How much.
        left: What the gallery went on with; None where nothing was given up.
    """

    log_bytes: int
    left: Left | None


NO_LOSS = Loss(0, None)


@contextmanager
def settling(path: Path) -> Iterator[None]:
    """While a gallery is mended: finish or undo first what a mend that was killed began.

    Its copy of the log goes when the block ends well. Where the log is a shorter begin of the copy,
    nobody has written since, and nobody has said that it is sound so: it is put back.

    Args:
        path: The gallery's file; nobody has it open.

    Raises:
        StorageFullError: The disk is full.
        GalleryUnavailableError: It cannot be done.
    """
    log, kept = log_of(path), _copy_of(path)
    with told("finish an earlier mend"):
        if kept.exists():
            if _is_begin(log, kept):
                _put_back(log, kept)
            else:
                _remove(kept)
    yield
    with told("remove the copy of the damaged log"):
        _remove(kept)


def forget_copy(path: Path) -> None:
    """Remove what a killed mend kept of a log: the gallery is sound without. Never fails."""
    with suppress(OSError):
        _remove(_copy_of(path))


def lose_log(path: Path) -> Loss:
    """Give up a log from where it is damaged, or all of it where the file alone is newer.

    Until the gallery has been read in whole, a copy of the log is kept; it is put back where that
    shows damage. `settling` removes it.

    Args:
        path: The gallery's file; nobody has it open.

    Raises:
        DamagedGalleryError: Neither is a gallery as it once was; nothing was changed.
        StorageFullError, GalleryUnavailableError: It cannot be done; nothing was changed.
    """
    log = log_of(path)
    with told("read the gallery's log"):
        frames = read_log(log)
        whole = frames.committed
        if frames.end <= whole:
            return NO_LOSS
        size = log.stat().st_size
        copied = compare(path, frames)
    is_alone = not whole or is_ahead(frames, copied)
    length = 0
    if is_alone:
        if not _is_at_one_moment(frames, copied, path.stat().st_size):
            raise _beyond_mending("the file holds a part of what followed")
        with _refused():
            check_file(path)
    else:
        length = HEADER_BYTES + whole * (FRAME_HEADER_BYTES + frames.page_bytes)
    _shorten(log, _copy_of(path), length, lambda: check_file(path, how="mode=ro"))
    return Loss(size - length, "file" if is_alone else "log")


def _is_at_one_moment(frames: LogFrames, copied: Copied, size: int) -> bool:
    """Whether the file alone is what it was at an end of a transaction, after the damage or at it.

    It is not where somebody was killed who was copying pages from the log into the file. Then pages
    of several moments may fit together as far as anybody can tell from their checksums.
    """
    held, end = copied.held, frames.end
    ends = [0, *(np.flatnonzero(frames.file_pages[:end] > 0) + 1).tolist()]
    for moment in reversed([one for one in ends if one >= frames.committed]):
        pages = int(frames.file_pages[moment - 1]) if moment else 0
        newest = {int(page): number for number, page in enumerate(frames.pages[:moment])}
        # The whole of the file says by itself where a page is missing, if the log says nothing.
        if size % frames.page_bytes or size < pages * frames.page_bytes:
            continue
        if all(held[number] for page, number in newest.items() if page <= pages):
            later = range(moment, end)
            return not any(
                held[one] and not copied.blank[one] and int(frames.pages[one]) not in newest
                for one in later
            )
    return False


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except DamagedGalleryError as error:
        raise _beyond_mending(str(error)) from error


def _beyond_mending(why: str) -> DamagedGalleryError:
    return DamagedGalleryError(
        "expected a gallery that can do without the end of its log, got one that is not sound "
        f"without it: {why}. Nothing was changed: restore a snapshot"
    )


def _shorten(log: Path, kept: Path, length: int, check: Callable[[], None]) -> None:
    with told("cut the gallery's log"):
        _keep(log, kept)
        try:
            os.truncate(log, length)
            sync(log)
        except BaseException:
            _put_back(log, kept)
            raise
    try:
        with _refused():
            check()
    except BaseException:
        with told("put the gallery's log back"):
            _put_back(log, kept)
        raise


def _keep(log: Path, kept: Path) -> None:
    """Copy a log; it is shortened only after that is on the disk."""
    try:
        with log.open("rb") as source, create(kept) as target:
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
        sync(kept.parent)
    except BaseException:
        _remove(kept)
        raise


def _put_back(log: Path, kept: Path) -> None:
    kept.replace(log)
    # What SQLite knows of the shorter log; it makes it anew.
    log.with_name(f"{log.name.removesuffix('-wal')}-shm").unlink(missing_ok=True)
    sync(log.parent)


def _remove(kept: Path) -> None:
    if kept.exists():
        kept.unlink()
        sync(kept.parent)


def _copy_of(path: Path) -> Path:
    return path.with_name(f"{log_of(path).name}.damaged")


def _is_begin(log: Path, kept: Path) -> bool:
    """Whether a log is a begin of its copy, but neither nothing nor all of it."""
    if not log.exists() or not 0 < log.stat().st_size < kept.stat().st_size:
        return False
    with log.open("rb") as one, kept.open("rb") as other:
        while content := one.read(1 << 20):
            if other.read(len(content)) != content:
                return False
    return True
