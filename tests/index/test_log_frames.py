"""A write-ahead log that was damaged where it was acknowledged is told, and can be cut there."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from index import log_frames, log_loss
from index.embedded import EmbeddedGallery
from index.gallery import DamagedGalleryError, Filters, GalleryUnavailableError
from index.intact import check_intact
from index.log_frames import FRAME_HEADER_BYTES, HEADER_BYTES, LogFrames, compare, read_log
from index.mending import mend
from index.reading import reading
from index.saved import FILE_NAME as INDEX_NAME
from index.store import FILE_NAME
from tests.index.conftest import make_enrolment

PAGE_BYTES = 4096
FRAME_BYTES = FRAME_HEADER_BYTES + PAGE_BYTES
LOG_NAME = f"{FILE_NAME}-wal"


class Killed(NamedTuple):
    """A directory as a kill leaves it, and how many frames its log had after each enrolment."""

    directory: Path
    ends: list[int]

    @property
    def log(self) -> Path:
        return self.directory / LOG_NAME

    def flip(self, place: int, bit: int = 0) -> None:
        content = bytearray(self.log.read_bytes())
        content[place] ^= 1 << bit
        self.log.write_bytes(content)


@pytest.fixture
def killed(directory: Path) -> Killed:
    """With 12 enrolments in its log, t0 to t11."""
    ends = []
    copy = directory.with_name("killed")
    with EmbeddedGallery(directory) as gallery:
        for row in range(12):
            gallery.add([make_enrolment(f"t{row}", [row] * 600)])
            ends.append(len(read_log(directory / LOG_NAME).good))
        shutil.copytree(directory, copy)
    return Killed(copy, ends)


def damaged(frames: LogFrames) -> int:
    assert frames.lost is not None
    return frames.lost


def stored(directory: Path) -> int:
    with EmbeddedGallery(directory) as gallery:
        return gallery.counts().tracklets


def test_a_log_as_sqlite_wrote_it_is_sound_to_its_end(killed: Killed) -> None:
    frames = read_log(killed.log)

    assert frames.page_bytes == PAGE_BYTES
    assert frames.sound == frames.committed == len(frames.good) == killed.ends[-1]
    assert frames.lost is None
    assert (np.flatnonzero(frames.file_pages) + 1).tolist()[-12:] == killed.ends
    assert frames.file_pages[-1] * PAGE_BYTES >= (killed.directory / FILE_NAME).stat().st_size


@pytest.mark.parametrize("page_bytes", [512, 1024, 65536])
def test_pages_of_every_size_are_read(tmp_path: Path, page_bytes: int) -> None:
    with closing(sqlite3.connect(tmp_path / "file", isolation_level=None)) as connection:
        connection.execute(f"PRAGMA page_size = {page_bytes}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (x)")
        for row in range(40):
            connection.execute("INSERT INTO t VALUES (?)", (bytes(row * 50),))

        frames = read_log(tmp_path / "file-wal")

        assert frames.page_bytes == page_bytes
        assert frames.sound == len(frames.good) > 40


def test_frames_of_an_earlier_round_are_not_of_this_log(tmp_path: Path) -> None:
    """SQLite begins a log anew over the old one, which may have been longer."""
    with closing(sqlite3.connect(tmp_path / "file", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (x)")
        for row in range(40):
            connection.execute("INSERT INTO t VALUES (?)", (bytes(row),))
        connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        connection.execute("INSERT INTO t VALUES (1)")

        frames = read_log(tmp_path / "file-wal")

    assert 0 < frames.sound < len(frames.good)
    assert not frames.good[frames.sound :].any()
    assert frames.lost is None


@pytest.mark.parametrize("place", [0, 3, 4, 7, 8, 13, 17, FRAME_HEADER_BYTES, 3000])
def test_a_flipped_bit_before_the_last_enrolment_is_told_and_nothing_changes(
    killed: Killed, place: int
) -> None:
    """In each part of a frame: page, length of the file, salt, checksum, content.

    But for the salt of the frame that ends the last but one: then it is no end any more, and looks
    like a frame of the last that a loss of power left out.
    """
    sound = killed.log.read_bytes()
    for frame in range(killed.ends[-2] - (place in {8, 13})):
        killed.log.write_bytes(sound)
        killed.flip(HEADER_BYTES + frame * FRAME_BYTES + place, bit=frame % 8)

        assert damaged(read_log(killed.log)) == frame
        before = killed.log.read_bytes()
        with pytest.raises(DamagedGalleryError, match=f"frame {frame + 1} of {killed.ends[-1]} is"):
            check_intact(killed.directory / FILE_NAME, INDEX_NAME)
        with pytest.raises(DamagedGalleryError, match="in which frame"), reading(killed.directory):
            pass
        assert killed.log.read_bytes() == before


@pytest.mark.parametrize("place", range(HEADER_BYTES))
def test_a_flipped_bit_in_the_header_of_a_log_is_told_or_harms_nothing(
    killed: Killed, place: int
) -> None:
    killed.flip(place, bit=place % 8)

    try:
        assert stored(killed.directory) == 12
    except DamagedGalleryError as error:
        assert "is damaged" in str(error)  # noqa: PT017


def test_what_a_loss_of_power_leaves_of_the_last_enrolment_is_not_damage(killed: Killed) -> None:
    """Its frames reach the disk in any order."""
    sound = killed.log.read_bytes()
    for frame in range(killed.ends[-2], killed.ends[-1]):
        content = bytearray(sound)
        start = HEADER_BYTES + frame * FRAME_BYTES
        content[start : start + FRAME_BYTES] = bytes(FRAME_BYTES)
        killed.log.write_bytes(content)

        assert read_log(killed.log).lost is None
        check_intact(killed.directory / FILE_NAME, INDEX_NAME)
    assert stored(killed.directory) == 11


def test_a_log_that_is_cut_where_it_is_damaged_gives_what_was_stored_before(
    killed: Killed,
) -> None:
    killed.flip(HEADER_BYTES + (killed.ends[5] + 1) * FRAME_BYTES + 100)
    with pytest.raises(DamagedGalleryError, match="mend --lose-log"):
        EmbeddedGallery(killed.directory)
    with pytest.raises(DamagedGalleryError, match="mend --lose-log"):
        mend(killed.directory)
    size = killed.log.stat().st_size

    mended = mend(killed.directory, lose_log=True)

    assert mended.log_bytes == size - HEADER_BYTES - killed.ends[5] * FRAME_BYTES
    assert (mended.erasures, mended.properties, mended.tracklets) == (0, (), ())
    assert stored(killed.directory) == 6


def checkpointed(directory: Path, after: int, *, erased: bool = False) -> Killed:
    """As a kill leaves it between a checkpoint and the next write.

    Args:
        directory: Of the gallery.
        after: How many of 12 enrolments the log was copied into the file.
        erased: Whether half of those were erased before, which leaves pages of zeros.
    """
    copy, ends = directory.with_name("killed"), []
    with EmbeddedGallery(directory) as gallery:
        for row in range(12):
            gallery.add([make_enrolment(f"t{row}", [row] * 600)])
            if row + 1 == after:
                if erased:
                    gallery._store._writer.execute("DELETE FROM tracklets WHERE key % 2")
                reader = sqlite3.connect(directory / FILE_NAME, isolation_level=None)
                reader.execute("BEGIN")  # so that the log is not begun anew
                reader.execute("SELECT count(*) FROM tracklets").fetchone()
                gallery._store._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            ends.append(len(read_log(directory / LOG_NAME).good))
        shutil.copytree(directory, copy)
        reader.close()
    return Killed(copy, ends)


def ids(directory: Path) -> list[str]:
    with EmbeddedGallery(directory) as gallery:
        gallery.check()
        return [each.tracklet_id for each in gallery.list(Filters(), limit=100).records]


@pytest.mark.parametrize("after", [3, 7, 12])
def test_what_a_checkpoint_had_copied_already_is_not_overlaid_with_older_pages(
    directory: Path, after: int
) -> None:
    """What is left of a damaged log is a state that there was, and no less than the file had."""
    killed = checkpointed(directory, after)
    sound, file = killed.log.read_bytes(), (killed.directory / FILE_NAME).read_bytes()
    counts = set()
    for frame in range(0, killed.ends[-2], 3):
        killed.log.write_bytes(sound)
        (killed.directory / FILE_NAME).write_bytes(file)
        killed.flip(HEADER_BYTES + frame * FRAME_BYTES + 2000)

        mend(killed.directory, lose_log=True)

        before = sum(end <= frame for end in killed.ends)  # the damage
        left = max(before, after if frame < killed.ends[after - 1] else 0)
        assert ids(killed.directory) == [f"t{row}" for row in range(left)]
        assert not (killed.directory / f"{LOG_NAME}.damaged").exists()
        counts.add(left)
    assert len(counts) > (after < 12)


def test_damage_in_the_last_enrolment_is_told_where_that_was_copied_already(
    directory: Path,
) -> None:
    """It looks like what a loss of power left, but nothing is copied that was not acknowledged."""
    killed = checkpointed(directory, 12)
    sound, file = killed.log.read_bytes(), (killed.directory / FILE_NAME).read_bytes()
    for frame in range(killed.ends[-2], killed.ends[-1]):
        killed.log.write_bytes(sound)
        (killed.directory / FILE_NAME).write_bytes(file)
        killed.flip(HEADER_BYTES + frame * FRAME_BYTES + 2000)
        before = killed.log.read_bytes()

        for begin in (EmbeddedGallery, mend):
            with pytest.raises(DamagedGalleryError, match="while the file has what was in it"):
                begin(killed.directory)
        assert (killed.log.read_bytes(), (killed.directory / FILE_NAME).read_bytes()) == (
            before,
            file,
        )

        assert mend(killed.directory, lose_log=True).left == "file"
        assert ids(killed.directory) == [f"t{row}" for row in range(12)]


def test_pages_of_zeros_that_were_copied_do_not_keep_a_gallery_from_being_mended(
    directory: Path,
) -> None:
    """An erasure overwrites them."""
    killed = checkpointed(directory, 12, erased=True)
    assert compare(killed.directory / FILE_NAME, read_log(killed.log)).blank.any()
    killed.flip(HEADER_BYTES + killed.ends[3] * FRAME_BYTES + 2000)

    assert mend(killed.directory, lose_log=True).left == "file"

    assert ids(killed.directory) == [f"t{row}" for row in range(1, 12, 2)]


@pytest.mark.parametrize("cut", [False, True], ids=["before the cut", "after the cut"])
def test_a_mend_that_was_killed_is_done_anew(killed: Killed, cut: bool) -> None:
    """It leaves a copy of the log, and the log itself or a begin of it."""
    killed.flip(HEADER_BYTES + (killed.ends[5] + 1) * FRAME_BYTES + 100)
    damaged_log, copy = killed.log.read_bytes(), killed.directory / f"{LOG_NAME}.damaged"
    copy.write_bytes(damaged_log if cut else damaged_log[:5000])
    if cut:
        killed.log.write_bytes(damaged_log[: HEADER_BYTES + killed.ends[5] * FRAME_BYTES])

    with pytest.raises(DamagedGalleryError, match="mend --lose-log"):
        mend(killed.directory)
    assert killed.log.read_bytes() == damaged_log

    assert mend(killed.directory, lose_log=True).left == "log"
    assert not copy.exists()
    assert stored(killed.directory) == 6


def test_a_start_removes_what_a_killed_mend_kept_of_a_log(killed: Killed) -> None:
    """It holds people, and no erasure would reach it."""
    copy = killed.directory / f"{LOG_NAME}.damaged"
    copy.write_bytes(killed.log.read_bytes())

    assert stored(killed.directory) == 12
    assert not copy.exists()


def test_a_cut_that_leaves_no_sound_gallery_is_undone(
    killed: Killed, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed.flip(HEADER_BYTES + (killed.ends[5] + 1) * FRAME_BYTES + 100)
    before, modes = killed.log.read_bytes(), []

    def refuse(_: Path, **__: str) -> None:
        assert len(killed.log.read_bytes()) < len(before)
        modes.append((killed.directory / f"{LOG_NAME}.damaged").stat().st_mode & 0o777)
        raise DamagedGalleryError("it is not")

    monkeypatch.setattr(log_loss, "check_file", refuse)
    with pytest.raises(DamagedGalleryError, match="Nothing was changed: restore a snapshot"):
        mend(killed.directory, lose_log=True)

    assert modes == [0o600]
    assert killed.log.read_bytes() == before
    assert not (killed.directory / f"{LOG_NAME}.damaged").exists()


def test_a_log_of_which_the_file_has_a_part_is_refused_and_left(killed: Killed) -> None:
    """As a kill in the middle of copying leaves it, with damage before what was copied."""
    log, path = killed.log.read_bytes(), killed.directory / FILE_NAME
    frames = read_log(killed.log)
    last = len(frames.good) - 1
    start = HEADER_BYTES + last * FRAME_BYTES + FRAME_HEADER_BYTES
    with path.open("r+b") as file:
        file.seek((int(frames.pages[last]) - 1) * PAGE_BYTES)
        file.write(log[start : start + PAGE_BYTES])
    killed.flip(HEADER_BYTES + killed.ends[2] * FRAME_BYTES + 2000)
    before = killed.log.read_bytes(), path.read_bytes()

    with pytest.raises(DamagedGalleryError, match="restore a snapshot"):
        mend(killed.directory, lose_log=True)

    assert (killed.log.read_bytes(), path.read_bytes()) == before


def test_a_sound_log_is_not_cut(killed: Killed) -> None:
    assert mend(killed.directory, lose_log=True).log_bytes == 0
    assert stored(killed.directory) == 12


def test_a_missing_log_is_an_empty_one(tmp_path: Path) -> None:
    assert len(read_log(tmp_path / "none").good) == 0
    assert read_log(tmp_path / "none").lost is None
    (tmp_path / "short").write_bytes(b"7")
    assert read_log(tmp_path / "short").sound == 0


def test_mending_needs_a_gallery_that_nobody_has_open(directory: Path) -> None:
    with pytest.raises(GalleryUnavailableError, match="got no"):
        mend(directory)
    assert not directory.exists()
    with (
        EmbeddedGallery(directory),
        pytest.raises(GalleryUnavailableError, match="already open"),
    ):
        mend(directory)


def test_a_log_that_is_begun_anew_while_it_is_read_is_read_again(
    killed: Killed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames of the new round lie before those of the old one: half of each is no damage."""
    other = killed.log.read_bytes()
    anew = bytearray(other)
    anew[16] ^= 1  # its salt, and with it all checksums, are others
    read = log_frames._read_frames
    rounds: list[int] = []

    def while_reading(*arguments: Any) -> Any:
        if not rounds:
            killed.log.write_bytes(bytes(HEADER_BYTES))
            found = read(*arguments)
            killed.log.write_bytes(other)
        else:
            found = read(*arguments)
        rounds.append(1)
        return found

    monkeypatch.setattr(log_frames, "_read_frames", while_reading)
    killed.log.write_bytes(anew)

    frames = read_log(killed.log)

    assert len(rounds) > 1
    assert frames.sound == killed.ends[-1]
    assert frames.lost is None
