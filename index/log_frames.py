"""The write-ahead log of a gallery's file, read without SQLite: which of its frames are sound.

SQLite reads a log up to the first frame whose checksum is wrong, which is right after a loss of
power, and forgets what follows without a word, which is wrong where that was acknowledged. The
layout is that of https://www.sqlite.org/fileformat2.html (4.1 to 4.4).
"""

import os
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24
_MAGIC = 0x377F0682  # or one more, see `_WORDS`
_FRAMES_AT_ONCE = 1024
_HEADER = struct.Struct(">I4xI4x8s2I")  # magic, page size, salt, checksum
_SUMMED_BYTES = 8  # of a frame's header
# In a frame's header: page, pages after a commit or 0, salt, checksum.
_FRAME = np.dtype([("page", ">u4"), ("pages", ">u4"), ("salt", "S8"), ("checksum", ">u4", (2,))])

_WORDS = (np.dtype("<u4"), np.dtype(">u4"))  # of which checksums are made
_PAGE_SIZES = tuple(1 << power for power in range(9, 17))

Checksums = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class LogFrames:
    """What a write-ahead log holds; N frames.

    Args:
        page_bytes: How long each page is; 0 of a log without a header.
        pages: (N,) which page each frame holds.
        file_pages: (N,) how many pages the file has after the commit that a frame ends, or 0.
        good: (N,) whether a frame is of this log and fits its own checksum, that of the frame
            before taken as it stands there.
        follows: (N,) whether it says that it is of this log, sound or not.
        is_headed: Whether the log's header is sound.
    """

    page_bytes: int
    pages: NDArray[np.int64]
    file_pages: NDArray[np.int64]
    good: NDArray[np.bool_]
    follows: NDArray[np.bool_]
    is_headed: bool

    @property
    def sound(self) -> int:
        """How many frames SQLite reads."""
        wrong = np.flatnonzero(~self.good) if self.is_headed else np.zeros(1, np.int64)
        return int(wrong[0]) if wrong.size else len(self.good)

    @property
    def committed(self) -> int:
        """How many of those are of whole transactions."""
        commits = np.flatnonzero(self.file_pages[: self.sound])
        return int(commits[-1]) + 1 if commits.size else 0

    @property
    def lost(self) -> int | None:
        """The first frame that was damaged after it had been acknowledged, or None.

        A transaction is on the disk before the next begins. So what was damaged is not just what a
        loss of power left half written, if after it one transaction ends and another begins.
        """
        first = self.sound
        ends = first + np.flatnonzero((self.follows & (self.file_pages > 0))[first:])
        return first if ends.size and self.good[ends[0] + 1 :].any() else None

    @property
    def end(self) -> int:
        """How many are of this log, sound or not; after them there may be those of earlier ones."""
        ours = np.flatnonzero(self.follows | self.good)
        return int(ours[-1]) + 1 if ours.size else 0


class Copied(NamedTuple):
    """How a file compares with the N frames of its log.

    Args:
        held: (N,) whether a frame holds what the file holds on its page. One that was damaged
            counts, too, where its checksum is that of the page in the file.
        blank: (N,) whether the file holds zeros there, as on pages of what was erased.
    """

    held: NDArray[np.bool_]
    blank: NDArray[np.bool_]


def log_of(path: Path) -> Path:
    """Where the log of a file is."""
    return path.with_name(f"{path.name}-wal")


def read_log(path: Path) -> LogFrames:
    """Read a log, which may be empty or missing; somebody may be writing it.

    Raises:
        OSError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            header, lost, frames = b"", None, _nothing()
            # Until it was not begun anew meanwhile, and what looks damaged looks so twice: frames
            # of a transaction that is under way are written again, and the reader is not alone.
            while True:
                now = os.pread(file.fileno(), HEADER_BYTES, 0)
                if now == header and lost == frames.lost:
                    return frames
                header, lost = now, frames.lost
                frames = _read_log(file, header)
    except FileNotFoundError:
        return _nothing()


def compare(path: Path, frames: LogFrames) -> Copied:
    """See which frames of a log were copied into its file; nobody has either of them open.

    Args:
        path: The file.
        frames: What `read_log` found in its log.

    Raises:
        OSError: They cannot be read.
    """
    held, blank = np.zeros((2, len(frames.pages)), bool)
    size = FRAME_HEADER_BYTES + frames.page_bytes
    with log_of(path).open("rb") as log, path.open("rb") as file:
        before = os.pread(log.fileno(), HEADER_BYTES, 0)[-8:]  # a checksum
        for number, page_number in enumerate(frames.pages.tolist()):
            frame = os.pread(log.fileno(), size, HEADER_BYTES + number * size)
            place = (page_number - 1) * frames.page_bytes
            page = os.pread(file.fileno(), frames.page_bytes, place) if place >= 0 else b""
            if len(page) == frames.page_bytes:
                blank[number] = not page.strip(b"\0")
                held[number] = page == frame[FRAME_HEADER_BYTES:] or (
                    not frames.good[number] and _would_fit(frame, page, before)
                )
            before = frame[FRAME_HEADER_BYTES - 8 : FRAME_HEADER_BYTES]
    return Copied(held, blank)


def is_ahead(frames: LogFrames, copied: Copied) -> bool:
    """Whether a file has a newer page than the whole transactions before a log's damage.

    So it is after a checkpoint, until the log is begun anew. SQLite would lay what is before the
    damage over newer pages, and say nothing. A page of zeros shows nothing.
    """
    whole = frames.committed
    newest = {page: number for number, page in enumerate(frames.pages[:whole].tolist())}
    for number in range(whole, frames.end):
        before = newest.get(int(frames.pages[number]))
        is_new = before is None or not copied.held[before]
        if copied.held[number] and is_new and not copied.blank[number]:
            return True
    return False


def _would_fit(frame: bytes, page: bytes, before: bytes) -> bool:
    """Whether a frame fits its checksum with another page in it."""
    rows = np.frombuffer(frame[:FRAME_HEADER_BYTES] + page, np.uint8)[None]
    seed = np.frombuffer(before, ">u4").astype(np.uint32)[None]
    return any(bool(_read(rows, words, seed)[1][0]) for words in _WORDS)


def _nothing() -> LogFrames:
    numbers, truths = np.zeros(0, np.int64), np.zeros(0, bool)
    return LogFrames(0, numbers, numbers, truths, truths, is_headed=False)


def _read_log(file: BinaryIO, header: bytes) -> LogFrames:
    if len(header) < HEADER_BYTES:
        return _nothing()
    magic, page_bytes, salt, *checksum = _HEADER.unpack(header)
    kinds = [(page_bytes, _WORDS[magic & 1])]
    seed = np.array([checksum], np.uint32)
    summed = np.frombuffer(header[:24], _WORDS[magic & 1])[None]
    is_headed = magic & ~1 == _MAGIC and bool((_sum(summed, 0 * seed) == seed).all())
    if not is_headed:  # what is wrong with it, the frames tell
        kinds = [(size, words) for size in _PAGE_SIZES for words in _WORDS]
    for page_bytes, words in kinds:
        heads, fits = _read_frames(file, page_bytes, words, seed)
        fits &= heads["page"] > 0  # a row of zeros fits, too
        if fits.any():
            break
    if not is_headed and fits.any():
        salt = heads["salt"][int(np.argmax(fits))]
    follows = (heads["salt"] == np.array(salt, "S8")) & (heads["page"] > 0)
    return LogFrames(
        page_bytes,
        heads["page"].astype(np.int64),
        heads["pages"].astype(np.int64),
        fits & follows,
        follows,
        is_headed,
    )


def _read_frames(
    file: BinaryIO, page_bytes: int, words: np.dtype[np.uint32], seed: Checksums
) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
    """The headers of all frames, and which fit their checksums; ``seed`` is the log header's."""
    heads, fits = [np.empty(0, _FRAME)], [np.zeros(0, bool)]
    size = FRAME_HEADER_BYTES + page_bytes
    at = HEADER_BYTES
    while count := len(content := os.pread(file.fileno(), _FRAMES_AT_ONCE * size, at)) // size:
        at += count * size  # of a frame that is being written there may be a part
        rows = np.frombuffer(content, np.uint8, count * size).reshape(count, size)
        some, fit = _read(rows, words, seed)
        seed = np.concatenate([seed, some["checksum"].astype(np.uint32)])[-1:]
        heads.append(some)
        fits.append(fit)
    return np.concatenate(heads), np.concatenate(fits)


def _read(
    rows: NDArray[np.uint8], words: np.dtype[np.uint32], before: Checksums
) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
    """The headers of frames, and which frames fit their checksums; ``before`` is the last one."""
    heads = np.ascontiguousarray(rows[:, :FRAME_HEADER_BYTES]).view(_FRAME)[:, 0]
    summed = np.concatenate([rows[:, :_SUMMED_BYTES], rows[:, FRAME_HEADER_BYTES:]], axis=1)
    stored = heads["checksum"].astype(np.uint32)
    seeds = np.concatenate([before, stored[:-1]])
    return heads, (_sum(summed.view(words), seeds) == stored).all(axis=1)


def _sum(rows: NDArray[np.uint32], seeds: Checksums) -> Checksums:
    """The checksums of rows of words, (N, 2), each begun from its seed.

    For each pair of words ``a, b`` the sums ``s, t`` become ``s + t + a`` and ``s + 2t + a + b``,
    modulo 2^32; all steps together are a product with powers of that matrix.
    """
    words, powers = _factors(rows.shape[1] // 2)
    return rows.astype(np.uint32) @ words + seeds @ powers


@cache
def _factors(pairs: int) -> tuple[Checksums, Checksums]:
    """What words, (2 pairs, 2), and the seed, (2, 2), are multiplied with."""
    step = np.array([[1, 1], [1, 2]], np.uint32)  # of a seed, as a row, transposed
    taken = np.array([[1, 1], [0, 1]], np.uint32)  # of a, and of b
    power = np.eye(2, dtype=np.uint32)
    words = np.empty((pairs, 2, 2), np.uint32)
    for pair in reversed(range(pairs)):
        words[pair] = taken @ power
        power = power @ step
    return words.reshape(-1, 2), power
