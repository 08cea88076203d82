"""A gallery's file before SQLite opens it: whether it or its log was cut, overwritten or emptied.

SQLite reads what is missing of a last page as zeros, and whoever closes a file that it did not
understand takes in the write-ahead log all the same, and removes it. So this is looked at first,
without SQLite. The layouts are those of https://www.sqlite.org/fileformat2.html (1.3).
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from index.gallery import DamagedGalleryError, GalleryUnavailableError
from index.log_frames import HEADER_BYTES, LogFrames, compare, is_ahead, log_of, read_log

APPLICATION_ID = 0x50415353  # "PASS", in the header of every file of ours
_HEADER_BYTES = 100
_MAGIC = b"SQLite format 3\0"
_LARGEST_PAGE_BYTES = 65536  # which two bytes cannot say; it is written as 1
# Page size; change counter, pages; version, application; the change counter that pages go with.
_HEADER = struct.Struct(">16xH6xII28xI4xI20xI4x")
_BLANK_PAGES = 2  # at most, of a file whose tables are still in the log


class _Header(NamedTuple):
    """What a file says of itself.

    Args:
        page_bytes: How long each page is.
        pages: How many there are; 0 where it does not say.
        version: Of its form, 0 while it is blank.
        application: Whose it is, 0 while it is blank.
    """

    page_bytes: int
    pages: int
    version: int
    application: int


def check_recognised(path: Path) -> None:
    """Return where a file is one of SQLite's and may be a gallery, or is empty or missing.

    Somebody may have it open and write.

    Raises:
        DamagedGalleryError: It is something else.
        GalleryUnavailableError: It cannot be read.
    """
    with _told():
        _read_header(path)


def check_intact(path: Path, index_name: str) -> None:
    """Return where a gallery's file is as whole as its header and its log say, or there is none.

    Args:
        path: The file; nobody has it open.
        index_name: Of a file beside it that shows that there was a gallery.

    Raises:
        DamagedGalleryError: It is gone, was emptied, cut, or overwritten by something else; or its
            log was damaged where it was already acknowledged.
        GalleryUnavailableError: It cannot be read.
    """
    log, size = log_of(path), _size(path)
    if size < _HEADER_BYTES:
        _check_not_lost(path, log, path.with_name(index_name))
    with _told():
        header = _read_header(path)
        frames = read_log(log)
        is_cut = header is not None and _lacks_pages(header, size, frames)
    _check_log(log, frames)
    if header is not None and is_cut:
        raise DamagedGalleryError(
            f"expected a gallery file of {header.pages} pages of {header.page_bytes} bytes, got "
            f"{size} bytes, a damaged or foreign one: it was cut. Restore a snapshot"
        )
    _check_not_ahead(path, frames)


def _check_not_ahead(path: Path, frames: LogFrames) -> None:
    # What a kill left half written ends no transaction, and was never copied.
    if not frames.file_pages[frames.committed : frames.end].any():
        return
    with _told():
        copied = compare(path, frames)
    if is_ahead(frames, copied):
        raise DamagedGalleryError(
            f"expected a whole log beside the gallery's file, got {log_of(path).name}, in which "
            f"frame {frames.sound + 1} of {frames.end} is damaged, "
            "while the file has what was in it. "
            "Restore a snapshot, or run `passerby mend --lose-log` to go on with the file alone"
        )


def check_log(path: Path) -> None:
    """Return where the log beside a gallery's file is as whole as what is in it says.

    Somebody may have it open and write.

    Raises:
        DamagedGalleryError: It was damaged where it was already acknowledged.
        GalleryUnavailableError: It cannot be read.
    """
    log = log_of(path)
    with _told():
        frames = read_log(log)
    _check_log(log, frames)


def _check_log(log: Path, frames: LogFrames) -> None:
    if frames.lost is not None:
        raise DamagedGalleryError(
            f"expected a whole log beside the gallery's file, got {log.name}, in which frame "
            f"{frames.lost + 1} of {len(frames.good)} is damaged, before others that were stored. "
            "Restore a snapshot, or run `passerby mend --lose-log` to go on with what was stored "
            "before it"
        )


def _check_not_lost(path: Path, *others: Path) -> None:
    """Refuse to begin anew where a gallery's other files say that there was one.

    SQLite would make an empty one, which begins by removing their content.
    """
    for left in others:
        if _size(left) > HEADER_BYTES:
            raise DamagedGalleryError(
                f"expected {path.name} beside {left.name}, got none or an empty one: it was "
                "deleted or emptied. Restore a snapshot, or remove the other files to begin anew"
            )


def _read_header(path: Path) -> _Header | None:
    """The header of a file; None where that is empty or missing."""
    try:
        with path.open("rb") as file:
            content = file.read(_HEADER_BYTES)
    except FileNotFoundError:
        return None
    if not content:
        return None
    if len(content) < _HEADER_BYTES or not content.startswith(_MAGIC):
        raise _foreign("it does not begin as one")
    size, changes, pages, version, application, pages_of = _HEADER.unpack(content)
    page_bytes = _LARGEST_PAGE_BYTES if size == 1 else size
    if page_bytes < 512 or page_bytes & (page_bytes - 1):
        raise _foreign(f"pages of {page_bytes} bytes")
    header = _Header(page_bytes, pages if changes == pages_of else 0, version, application)
    is_blank = application == version == 0 and header.pages <= _BLANK_PAGES
    # Without a log SQLite can look, and tell more, without changing anything.
    if application != APPLICATION_ID and not is_blank and _size(log_of(path)):
        raise _foreign(f"an SQLite file of another application ({application}) beside a log")
    return header


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"cannot open the gallery's file: {error.strerror}"
        raise GalleryUnavailableError(message) from error


def _foreign(what: str) -> DamagedGalleryError:
    return DamagedGalleryError(f"expected a gallery file, got a damaged or foreign one: {what}")


def _lacks_pages(header: _Header, size: int, frames: LogFrames) -> bool:
    """Whether a page lacks something that is not in the log either."""
    whole, rest = divmod(size, header.page_bytes)
    if not rest and whole >= header.pages:
        return False
    # A power failure may have come while pages were copied from the log into the file.
    count = frames.committed
    if not count or frames.page_bytes != header.page_bytes:
        return True
    logged = set(frames.pages[:count].tolist())
    pages = int(frames.file_pages[count - 1])
    return any(page not in logged for page in range(whole + 1, pages + 1))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # whoever opens it tells
        return 0
