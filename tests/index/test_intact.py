"""A store that was cut or overwritten is told before SQLite opens it, and nothing is changed."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from index.calibration_source import read_calibration
from index.embedded import EmbeddedGallery
from index.exporting import export_gallery
from index.gallery import DamagedGalleryError, GalleryUnavailableError
from index.guest import write_calibration
from index.intact import check_intact
from index.saved import FILE_NAME as INDEX_NAME
from index.snapshot import snapshot
from index.store import FILE_NAME
from tests.index.conftest import Enrol

PAGE_BYTES = 4096
LOG_NAME = f"{FILE_NAME}-wal"


@pytest.fixture
def halfway(directory: Path, enrol: Enrol) -> Path:
    """As a power failure may leave it while the log is copied into the file: both have new rows."""
    with EmbeddedGallery(directory) as gallery:
        gallery.add([enrol(f"old{row}", [row] * 512) for row in range(40)])
    with EmbeddedGallery(directory) as gallery:
        gallery.add([enrol(f"new{row}", [row] * 512) for row in range(10)])
        log = (directory / LOG_NAME).read_bytes()
        gallery._store._writer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        copy = directory.with_name("halfway")
        shutil.copytree(directory, copy)
    (copy / LOG_NAME).write_bytes(log)
    return copy


def cut(path: Path, length: int) -> None:
    with path.open("r+b") as file:
        file.truncate(length)


def files(directory: Path) -> dict[str, bytes]:
    names = (FILE_NAME, LOG_NAME, INDEX_NAME)
    return {name: (directory / name).read_bytes() for name in names if (directory / name).exists()}


def test_what_is_missing_is_taken_from_the_log(halfway: Path) -> None:
    """All lengths that a copying of the log can leave, from the old file's on."""
    path = halfway / FILE_NAME
    sound, log = path.read_bytes(), (halfway / LOG_NAME).read_bytes()
    for missing in (1, 100, PAGE_BYTES, PAGE_BYTES + 5, 3 * PAGE_BYTES):
        path.write_bytes(sound)
        (halfway / LOG_NAME).write_bytes(log)
        cut(path, len(sound) - missing)

        with EmbeddedGallery(halfway) as gallery:
            assert gallery.counts().tracklets == 50, missing
            assert gallery.embedding("new9").tolist() == [9] * 512


def test_what_is_missing_and_not_in_the_log_is_told(halfway: Path) -> None:
    path = halfway / FILE_NAME
    for length in (path.stat().st_size // 2, 5 * PAGE_BYTES + 7, PAGE_BYTES):
        cut(path, length)
        before = files(halfway)

        with pytest.raises(DamagedGalleryError, match="it was cut"):
            EmbeddedGallery(halfway)

        assert files(halfway) == before


@pytest.mark.parametrize("spoiled", [8, 18, 32, 40])
def test_a_log_of_another_life_explains_nothing(halfway: Path, spoiled: int) -> None:
    """Its page size, its salt, or those of its first frame are others."""
    log = bytearray((halfway / LOG_NAME).read_bytes())
    log[spoiled] ^= 0xFF
    if spoiled == 32:  # that is no part of a salt: the log ends before its first commit
        del log[32 + 24 + PAGE_BYTES :]
    (halfway / LOG_NAME).write_bytes(log)
    cut(halfway / FILE_NAME, (halfway / FILE_NAME).stat().st_size - 5)
    before = files(halfway)

    with pytest.raises(DamagedGalleryError, match="it was cut"):
        EmbeddedGallery(halfway)

    assert files(halfway) == before


def test_a_file_that_is_longer_than_it_says_is_taken_as_it_is(
    directory: Path, enrol: Enrol
) -> None:
    """A kill may come before a file that has lost pages is made shorter."""
    with EmbeddedGallery(directory) as gallery:
        gallery.add([enrol("a", [1, 2])])
    with (directory / FILE_NAME).open("ab") as file:
        file.write(bytes(2 * PAGE_BYTES))

    with EmbeddedGallery(directory) as gallery:
        assert gallery.counts().tracklets == 1


def test_a_new_gallery_that_was_killed_before_its_first_page_was_written_goes_on(
    directory: Path, enrol: Enrol
) -> None:
    """All that it ever was is in the log."""
    gallery = EmbeddedGallery(directory)
    gallery.add([enrol("a", [1, 2])])
    copy = directory.with_name("copy")
    shutil.copytree(directory, copy)
    gallery.close()
    assert (copy / FILE_NAME).stat().st_size <= 2 * PAGE_BYTES
    assert (copy / LOG_NAME).stat().st_size

    with EmbeddedGallery(copy) as gallery:
        assert gallery.counts().tracklets == 1


def test_a_database_of_another_application_in_the_place_of_a_store_does_not_get_its_log(
    halfway: Path,
) -> None:
    """SQLite would write our pages over its own."""
    for script in ("CREATE TABLE notes (x)", "CREATE TABLE notes (x); PRAGMA application_id = 7"):
        (halfway / FILE_NAME).unlink()
        with closing(sqlite3.connect(halfway.parent / "other")) as connection:
            connection.executescript(f"{script}; CREATE TABLE more (x); PRAGMA user_version = 3")
        (halfway.parent / "other").rename(halfway / FILE_NAME)
        before = files(halfway)

        with pytest.raises(DamagedGalleryError, match="another application"):
            EmbeddedGallery(halfway)

        assert files(halfway) == before


def test_whoever_reads_beside_a_service_leaves_the_log_of_an_overwritten_store(
    halfway: Path,
) -> None:
    (halfway / FILE_NAME).write_bytes(b"something else, by far" * 3000)
    before = files(halfway)
    readers = (
        lambda: snapshot(halfway, halfway.parent / "saved"),
        lambda: export_gallery(halfway, halfway.parent / "exported"),
        lambda: read_calibration(halfway),
        lambda: write_calibration(halfway, None),
    )

    for read in readers:
        with pytest.raises(DamagedGalleryError, match="damaged or foreign"):
            read()

    assert files(halfway) == before


@pytest.mark.parametrize("page_bytes", [0, 1000, 256])
def test_pages_that_sqlite_cannot_have_are_no_gallerys(
    directory: Path, enrol: Enrol, page_bytes: int
) -> None:
    with EmbeddedGallery(directory) as gallery:
        gallery.add([enrol("a", [1, 2])])
    content = bytearray((directory / FILE_NAME).read_bytes())
    content[16:18] = page_bytes.to_bytes(2)
    (directory / FILE_NAME).write_bytes(content)

    with pytest.raises(DamagedGalleryError, match=f"pages of {page_bytes} bytes"):
        EmbeddedGallery(directory)


def test_a_file_that_cannot_be_read_is_out_of_reach_and_not_damaged(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()

    with pytest.raises(GalleryUnavailableError, match="cannot open"):
        check_intact(tmp_path / FILE_NAME, INDEX_NAME)


def test_no_file_and_an_empty_one_are_where_a_gallery_begins(tmp_path: Path) -> None:
    check_intact(tmp_path / FILE_NAME, INDEX_NAME)
    (tmp_path / FILE_NAME).touch()
    check_intact(tmp_path / FILE_NAME, INDEX_NAME)

    (tmp_path / INDEX_NAME).write_bytes(bytes(100))
    with pytest.raises(DamagedGalleryError, match="deleted or emptied"):
        check_intact(tmp_path / FILE_NAME, INDEX_NAME)
