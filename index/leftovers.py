"""What commands leave lying that were killed, and who removes it: whoever comes there next.

It is told by its name and by whether somebody is at work in it, never by its age. Copies of a
gallery are among it, which nobody would look for, and which no erasure reaches.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from index.files import workshop
from index.gallery import GalleryError

REPLACED_NAME = "passerby.replaced-"  # begins the names of galleries that were put aside
_UNFINISHED = ".passerby-making"


@contextmanager
def making(target: Path, refusal: type[GalleryError]) -> Iterator[Path]:
    """A workshop beside what is made in it; those that others left who were killed are removed.

    Args:
        target: What is to be made; its parent exists.
        refusal: What is raised where the workshop cannot be had, see `index.files.workshop`.

    Raises:
        StorageFullError: The disk is full.
        GalleryError: ``refusal``.
    """
    with workshop(target.parent / f".{target.name}{_UNFINISHED}", refusal) as work:
        remove_unfinished(target.parent)
        yield work


def remove_unfinished(directory: Path) -> None:
    """Remove what `making` left in a directory, of whatever name, where its maker was killed.

    Never fails: what cannot be removed stays.
    """
    for left in directory.glob(f".*{_UNFINISHED}"):
        with suppress(OSError):
            _remove_abandoned(left)


def _remove_abandoned(work: Path) -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    directory = os.open(work, flags)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while somebody is at work
        if os.fstat(directory).st_uid == os.geteuid():
            shutil.rmtree(work)
    finally:
        os.close(directory)


def remove_second_names(gallery: Path) -> None:
    """Remove what a restore put aside that was killed before the new gallery was in place.

    It is the gallery that is still there, under a second name, and would keep it on the disk after
    the next restore has replaced it. A file system without links has a copy there instead, which
    nothing tells from a gallery that was replaced: it stays. Never fails.

    Args:
        gallery: The file; nobody has it open.
    """
    for aside in gallery.parent.glob(f"{REPLACED_NAME}*"):
        with suppress(OSError):
            # With a log beside it, the log may be the only one, see `index.restore`.
            if [*aside.iterdir()] == [aside / gallery.name] and _is_same(
                aside / gallery.name, gallery
            ):
                shutil.rmtree(aside)


def _is_same(one: Path, other: Path) -> bool:
    return os.path.samestat(one.lstat(), other.lstat())
