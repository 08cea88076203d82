"""What a gallery keeps of itself: its calibration, whoever has written it."""

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from index.calibration import Calibration
from index.embedded import EmbeddedGallery
from index.gallery import (
    DamagedGalleryError,
    GalleryUnavailableError,
    ModelMismatchError,
)
from index.guest import write_calibration
from index.schema import MIGRATIONS
from index.store import FILE_NAME
from tests.index.conftest import Enrol

CALIBRATION = Calibration(
    threshold=11.25,
    rate="pair",
    false_match_rate=0.001,
    measured_false_match_rate=0.0009,
    interval=(0.0004, 0.0014),
    false_non_match_rate=0.1,
    false_non_match_interval=(0.08, 0.13),
    false_positive_identification_rate=0.02,
    false_positive_identification_interval=(0.01, 0.04),
    false_negative_identification_rate=0.1,
    false_negative_identification_interval=(0.05, 0.16),
    genuine_pairs=1000,
    impostor_pairs=99000,
    tracklets=450,
    identities=100,
    gallery_identities=100,
    cameras=6,
    across_cameras=True,
    model="trsa-test",
    created_at=datetime(2026, 11, 22, 12, tzinfo=UTC),
    confidence=0.95,
    seed=0,
)


def test_a_calibration_is_kept_across_restarts_and_can_be_forgotten(
    directory: Path, enrol: Enrol
) -> None:
    with EmbeddedGallery(directory) as gallery:
        gallery.add([enrol("a", [1])])
        assert gallery.calibration() is None
        gallery.set_calibration(replace(CALIBRATION, threshold=3.0))
        gallery.set_calibration(CALIBRATION)

    with EmbeddedGallery(directory) as gallery:
        assert gallery.calibration() == CALIBRATION
        gallery.set_calibration(None)
        assert gallery.calibration() is None


def test_a_calibration_of_another_model_is_refused_or_does_not_count(
    gallery: EmbeddedGallery, enrol: Enrol
) -> None:
    gallery.set_calibration(replace(CALIBRATION, model="other"))
    assert gallery.calibration() is None
    gallery.add([enrol("a", [1])])
    assert gallery.calibration() is None

    gallery.set_calibration(CALIBRATION)
    with pytest.raises(ModelMismatchError, match="trsa-test, got one of other"):
        gallery.set_calibration(replace(CALIBRATION, model="other"))

    assert gallery.calibration() == CALIBRATION


GUEST = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from index.guest import write_calibration
from tests.index.test_properties import CALIBRATION
write_calibration(Path(sys.argv[1]), CALIBRATION)
"""


def test_another_process_writes_a_calibration_while_the_gallery_is_open(
    gallery: EmbeddedGallery, directory: Path, enrol: Enrol
) -> None:
    gallery.add([enrol("a", [1])])
    command = [sys.executable, "-c", GUEST, str(directory), str(Path(__file__).parents[2])]

    subprocess.run(command, check=True, timeout=60)

    assert gallery.calibration() == CALIBRATION
    gallery.add([enrol("b", [1])])
    gallery.remove("a")
    assert gallery.calibration() == CALIBRATION


def test_a_guest_keeps_to_the_gallerys_model_and_may_come_when_nobody_is_there(
    directory: Path, enrol: Enrol
) -> None:
    with EmbeddedGallery(directory) as gallery:
        gallery.add([enrol("a", [1])])

    write_calibration(directory, CALIBRATION)
    with pytest.raises(ModelMismatchError):
        write_calibration(directory, replace(CALIBRATION, model="other"))

    with EmbeddedGallery(directory) as gallery:
        assert gallery.calibration() == CALIBRATION
    write_calibration(directory, None)
    with EmbeddedGallery(directory) as gallery:
        assert gallery.calibration() is None


def make_nothing(_: Path) -> None:
    """Not even a file."""


def make_note(path: Path) -> None:
    path.write_text("not a database, by far" * 300)


def make_foreign(path: Path) -> None:
    run_sql(path, "CREATE TABLE notes (x)")


def make_newer(path: Path) -> None:
    run_sql(
        path, f"PRAGMA application_id = 1346458451; PRAGMA user_version = {len(MIGRATIONS) + 1}"
    )


def make_older(path: Path) -> None:
    run_sql(path, "PRAGMA application_id = 1346458451; PRAGMA user_version = 1")


def run_sql(path: Path, script: str) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (make_nothing, GalleryUnavailableError),
        (make_note, DamagedGalleryError),
        (make_foreign, DamagedGalleryError),
        (make_newer, DamagedGalleryError),
        (make_older, GalleryUnavailableError),
    ],
)
def test_a_guest_leaves_what_is_no_gallery_of_this_version_untouched(
    directory: Path, make: Callable[[Path], None], error: type[Exception]
) -> None:
    directory.mkdir()
    make(directory / FILE_NAME)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    with pytest.raises(error) as told:
        write_calibration(directory, CALIBRATION)

    assert str(directory) not in str(told.value)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
