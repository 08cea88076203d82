"""The calibration command: a stored gallery, a labelled folder, what is said and drawn."""

import json
import os
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from index.bootstrap import Plan
from index.calibration import (
    Calibration,
    CalibrationCurves,
    CalibrationError,
    calibrate,
    measure,
)
from index.embedded import EmbeddedGallery
from index.gallery import Enrolment
from model.checkpoint import BUNDLED_FILE, load_checkpoint
from model.embedder import Embedder
from service.calibration import (
    CalibrationRequest,
    calibrate_folder,
    calibrate_gallery,
    embed_folder,
    report,
    warn_of_taught,
)
from service.calibration_picture import draw_calibration
from service.client import ClientError
from tests.index.conftest import make_enrolment
from tests.service.conftest import FakeEmbedder

SHARED = Path(os.environ.get("SHARED", Path(__file__).parents[3] / "shared"))
WARD = SHARED / "data" / "ward"
QUIET = Console(file=StringIO(), width=130)
REQUEST = CalibrationRequest(false_match_rate=0.02, plan=Plan(rounds=100))


def embeddings() -> NDArray[np.float32]:
    """Of 40 people in 3 cameras, (120, 16)."""
    generator = np.random.default_rng(0)
    people = np.repeat(generator.standard_normal((40, 16)), 3, axis=0)
    return (people + 0.5 * generator.standard_normal((120, 16))).astype(np.float32)


IDENTITIES = [f"p{number // 3}" for number in range(120)]
CAMERAS = [f"c{number % 3}" for number in range(120)]


@pytest.fixture(scope="module")
def calibrated() -> tuple[Calibration, CalibrationCurves]:
    """Of the forty people."""
    return calibrate(embeddings(), IDENTITIES, CAMERAS, model="trsa-test", false_match_rate=0.02)


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """Of a gallery of the forty people, which somebody has open."""
    labelled = zip(embeddings(), IDENTITIES, CAMERAS, strict=True)
    enrolments: list[Enrolment] = [
        make_enrolment(f"t{number}", vector.tolist(), identity=identity, camera=camera)
        for number, (vector, identity, camera) in enumerate(labelled)
    ]
    with EmbeddedGallery(tmp_path / "data") as gallery:
        gallery.add(enrolments)
        yield tmp_path / "data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of twelve people of different colours in two cameras, one frame each."""
    generator = np.random.default_rng(0)
    for number, colour in enumerate(generator.integers(40, 215, size=(12, 3))):
        for camera in range(2):
            place = tmp_path / "people" / f"person{number}" / f"cam{camera}"
            place.mkdir(parents=True)
            shade = colour + generator.integers(-20, 20, size=3)
            Image.new("RGB", (32, 64), tuple(shade.tolist())).save(place / "1.png")
    return tmp_path / "people"


def test_a_gallery_is_calibrated_while_a_service_has_it_open(
    data_dir: Path, calibrated: tuple[Calibration, CalibrationCurves]
) -> None:
    found, _ = calibrate_gallery(data_dir, REQUEST, QUIET)

    assert found.threshold == calibrated[0].threshold
    assert found.model == "trsa-test"


def test_an_empty_gallery_is_refused(tmp_path: Path) -> None:
    with (
        EmbeddedGallery(tmp_path / "data"),
        pytest.raises(CalibrationError, match="got an empty gallery"),
    ):
        calibrate_gallery(tmp_path / "data", REQUEST, QUIET)


def test_a_folder_is_embedded_with_its_identities_and_cameras(
    folder: Path, embedder: FakeEmbedder
) -> None:
    found = embed_folder(folder, embedder, QUIET)

    assert found.embeddings.shape == (24, embedder.dim)
    assert found.identities[:3] == ["person0", "person0", "person1"]
    assert found.cameras[:3] == ["cam0", "cam1", "cam0"]
    assert found.model == embedder.model
    assert all(len(batch) <= 8 for batch in embedder.batches)


@pytest.mark.parametrize(
    ("provenance", "warned"),
    [
        ({"data": {"train_identities": ["person1", "person12", "somebody"]}}, True),
        ({"start": {"data": {"parts": [{"train_identities": ["person1"]}]}}}, True),
        ({"data": {"train_identities": ["somebody"]}}, False),
        ({}, False),
    ],
    ids=["last training", "part of an earlier one", "others", "untold"],
)
def test_people_whom_the_weights_were_taught_are_warned_of(
    folder: Path, provenance: dict[str, Any], warned: bool
) -> None:
    said = StringIO()

    warn_of_taught(folder, provenance, Console(file=said, width=200))

    assert ("1 of 12 people" in said.getvalue()) is warned
    assert "person1" not in said.getvalue()


def test_a_folder_of_few_people_supports_a_high_rate_only(
    folder: Path, embedder: FakeEmbedder
) -> None:
    low, high = (CalibrationRequest(false_match_rate=rate) for rate in (0.01, 0.2))

    with pytest.raises(CalibrationError, match="among 132 impostor pairs"):
        calibrate_folder(folder, embedder, low, QUIET)

    assert calibrate_folder(folder, embedder, high, QUIET)[0].identities == 12


def test_the_table_says_each_rate_with_its_interval_and_number(
    calibrated: tuple[Calibration, CalibrationCurves],
) -> None:
    said = StringIO()

    report(*calibrated, Console(file=said, width=130))

    text = said.getvalue()
    for word in ("FMR", "FNMR", "FPIR", "FNIR", "95% interval", "4,680 impostor pairs"):
        assert word in text
    assert "asked for: false matches in 2 % of pairs of two people; 120 tracklets" in text
    assert "p0" not in text


def test_json_is_the_calibration_and_nothing_else(
    calibrated: tuple[Calibration, CalibrationCurves], tmp_path: Path
) -> None:
    said = StringIO()

    report(*calibrated, Console(file=said), as_json=True, picture=tmp_path / "a.png")

    assert json.loads(said.getvalue()) == calibrated[0].to_dict()


def test_the_picture_is_the_same_bytes_each_time(
    calibrated: tuple[Calibration, CalibrationCurves], tmp_path: Path
) -> None:
    for name in ("a.png", "b.png"):
        draw_calibration(*calibrated, tmp_path / name)

    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1200, 500)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_picture_without_any_miss_can_be_drawn(tmp_path: Path) -> None:
    """Where nobody is missed, the curves lie on the lower edge."""
    apart = 100 * np.repeat(np.random.default_rng(0).standard_normal((40, 16)), 3, axis=0)
    near = (apart + embeddings()).astype(np.float32)
    calibrated = calibrate(near, IDENTITIES, CAMERAS, model="m", false_match_rate=0.01)

    draw_calibration(*calibrated, tmp_path / "a.svg")

    assert calibrated[0].false_non_match_rate == 0
    assert (tmp_path / "a.svg").stat().st_size > 0


@pytest.mark.parametrize("name", ["nowhere/a.png", "a.nonsense"])
def test_a_picture_that_cannot_be_written_is_said(
    calibrated: tuple[Calibration, CalibrationCurves], tmp_path: Path, name: str
) -> None:
    with pytest.raises(ClientError, match="could not write the picture"):
        draw_calibration(*calibrated, tmp_path / name)


@pytest.mark.slow
@pytest.mark.dataset
@pytest.mark.skipif(not WARD.is_dir(), reason=f"needs WARD in {SHARED}")
def test_what_is_promised_on_half_of_the_people_is_kept_among_the_others() -> None:
    """Real people, bundled weights: 17 choose the threshold for 5 %, 18 others judge it."""
    found = embed_folder(
        WARD, Embedder(load_checkpoint(BUNDLED_FILE), device="cpu"), QUIET, frames_per_tracklet=8
    )
    people = np.array(found.identities)
    names = np.unique(people)

    held = 0
    for seed in range(20):
        chosen = np.isin(people, np.random.default_rng(seed).permutation(names)[:17])
        halves = [
            (
                found.embeddings[half],
                people[half].tolist(),
                [found.cameras[row] for row in np.nonzero(half)[0]],
            )
            for half in (chosen, ~chosen)
        ]
        calibration, _ = calibrate(*halves[0], model="m", false_match_rate=0.05)
        rate = measure(*halves[1], calibration.threshold).false_match
        held += rate.low <= calibration.false_match_rate <= rate.high

    print(f"kept in {held} of 20 halves")  # noqa: T201 shown with pytest -s
    assert held >= 18
