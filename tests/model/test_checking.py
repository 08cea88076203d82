import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from model.cli import app
from model.datasets.checking import DataReport, check_dataset
from model.datasets.layouts import fingerprint_dataset, read_dataset
from model.errors import DatasetError

SHARED = Path(os.environ.get("SHARED", Path(__file__).resolve().parents[3] / "shared"))
WARD = SHARED / "data" / "ward"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four people by two cameras with three frames each, every frame different."""
    rng = np.random.default_rng(0)
    for person in range(1, 5):
        for camera in (1, 2):
            for number in (1, 2, 3):
                path = tmp_path / f"p{person}" / f"c{camera}" / f"{number:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (16, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
    return tmp_path


def said(report: DataReport) -> list[tuple[str, str, str]]:
    return [(one.severity, one.where, one.what) for one in report.findings]


def test_a_whole_folder_gives_no_finding(folder: Path) -> None:
    report = check_dataset(folder)

    assert report.findings == ()
    assert report.ok
    assert report.fingerprint == fingerprint_dataset(read_dataset(folder))
    assert (report.layout, report.identities, report.cameras) == ("folder", 4, ("c1", "c2"))
    assert (report.tracklets, report.frames) == (8, 24)
    assert (report.frames_min, report.frames_mean, report.frames_max) == (3, 3.0, 3)


def test_splits_are_counted_with_their_source(folder: Path) -> None:
    splits = check_dataset(folder).splits

    assert len(splits) == 10
    assert splits[0].source == "random half of 4 identities, seed 0"
    assert (splits[0].train, splits[0].query, splits[0].gallery) == ((2, 4), (2, 4), (2, 4))


def test_everything_that_is_wrong_is_reported_at_once(folder: Path) -> None:
    (folder / "p1" / "c1" / "0002.png").unlink()
    (folder / "p2" / "c1" / "0001.png").write_bytes(b"")
    (folder / "p2" / "c2" / "0001.png").write_bytes(b"no image")
    whole = (folder / "p3" / "c1" / "0001.png").read_bytes()
    (folder / "p3" / "c1" / "0001.png").write_bytes(whole[: len(whole) // 2])
    for frame in (folder / "p4" / "c2").iterdir():
        frame.unlink()
    (folder / "p5" / "notes.txt").parent.mkdir()

    report = check_dataset(folder)

    assert said(report) == [
        ("error", "p4/c2", "expected at least one image in it, got none"),
        ("error", "p5", "expected camera folders in it, got no tracklets there"),
        ("error", "p2/c1/0001.png", "an empty file"),
        ("error", "p2/c2/0001.png", "not an image"),
        ("error", "p3/c1/0001.png", "a truncated image"),
        ("warning", "p4 (c1)", "a single tracklet: neither trained with nor searched for"),
    ]
    assert not report.ok
    assert report.fingerprint is None


def test_a_gap_in_the_numbers_is_a_warning(folder: Path) -> None:
    for number in (4, 5, 8, 9, 12):
        frame = folder / "p1" / "c1" / f"{number:04d}.png"
        Image.new("RGB", (9, 16), (number, 0, 0)).save(frame)

    report = check_dataset(folder)

    where = "p1/c1 (after 0005.png, 0009.png)"
    assert said(report) == [("warning", where, "frames missing in the numbering")]


def test_every_fifth_frame_is_no_gap(folder: Path) -> None:
    for number in (3, 2, 1):
        frame = folder / "p1" / "c1" / f"{number:04d}.png"
        frame.rename(frame.with_name(f"frame_{5 * number}.png"))

    assert check_dataset(folder).findings == ()


def test_two_frames_with_one_number_are_a_warning(folder: Path) -> None:
    Image.new("RGB", (9, 16)).save(folder / "p1" / "c1" / "2.png")

    report = check_dataset(folder)

    assert said(report) == [("warning", "p1/c1 (2.png)", "two frames with the same number")]


def test_names_whose_last_number_is_no_frame_number_are_left_alone(folder: Path) -> None:
    for number in (1, 2, 3):
        frame = folder / "p1" / "c1" / f"{number:04d}.png"
        frame.rename(frame.with_name(f"{number}_camera1.png"))
        frame = folder / "p1" / "c2" / f"{number:04d}.png"
        frame.rename(frame.with_name(f"{'abc'[number - 1]}.png"))

    assert check_dataset(folder).findings == ()


@pytest.mark.parametrize("size", [(7, 16), (9, 7)])
def test_a_frame_under_8_pixels_is_a_warning(folder: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(folder / "p1" / "c1" / "0002.png")

    report = check_dataset(folder)

    assert said(report) == [("warning", "p1/c1/0002.png", "under 8 pixels a side")]


def test_a_tracklet_of_one_frame_is_a_warning(folder: Path) -> None:
    for number in (2, 3):
        (folder / "p1" / "c1" / f"{number:04d}.png").unlink()

    assert said(check_dataset(folder)) == [("warning", "p1/c1", "a tracklet of one frame")]


def test_one_camera_only_is_a_warning(folder: Path) -> None:
    (folder / "p1" / "c2").rename(folder / "p1" / "aside")
    (folder / "p1" / "c1").rename(folder / "p1" / "first")
    (folder / "p1" / "c1").mkdir()
    (folder / "p1" / "first").rename(folder / "p1" / "c1" / "first")
    (folder / "p1" / "aside").rename(folder / "p1" / "c1" / "second")

    report = check_dataset(folder)

    what = "seen by one camera only: nothing to find by another"
    assert said(report) == [("warning", "p1 (c1)", what)]
    assert report.ok


def test_a_camera_that_hardly_saw_anybody_is_a_warning(folder: Path) -> None:
    for person in range(5, 12):
        for camera in (1, 2):
            frame = folder / f"p{person}" / f"c{camera}" / "1.png"
            frame.parent.mkdir(parents=True)
            Image.new("RGB", (9, 16), (person, camera, 0)).save(frame)
    (folder / "p1" / "c1").rename(folder / "p1" / "C1")

    report = check_dataset(folder)

    what = "a camera that saw under a tenth of the busiest one's people: a misnamed folder?"
    assert ("warning", "C1 (1 of 11)", what) in said(report)


def test_frames_of_another_tracklet_are_a_warning(folder: Path) -> None:
    """A tracklet copied to the wrong person trains the network on a contradiction."""
    for number in (1, 2):
        frame = folder / "p1" / "c1" / f"{number:04d}.png"
        (folder / "p2" / "c2" / frame.name).write_bytes(frame.read_bytes())

    report = check_dataset(folder)

    what = "frames that another tracklet holds, too"
    assert said(report) == [("warning", "p2/c2 (2 of p1/c1)", what)]


def test_a_link_to_nothing_is_an_error(folder: Path) -> None:
    (folder / "p1" / "c1" / "0004.png").symlink_to(folder / "nothing.png")

    for decode in (True, False):
        report = check_dataset(folder, decode=decode)
        assert said(report) == [("error", "p1/c1/0004.png", "cannot be opened")]


def test_without_decoding_only_empty_files_are_seen(folder: Path) -> None:
    (folder / "p1" / "c1" / "0001.png").write_bytes(b"no image")
    (folder / "p2" / "c1" / "0001.png").write_bytes(b"")

    report = check_dataset(folder, decode=False)

    assert said(report) == [("error", "p2/c1/0001.png", "an empty file")]
    assert not report.decoded


def test_no_camera_to_compare_with_is_an_error_among_the_others(tmp_path: Path) -> None:
    for person in ("a", "b"):
        (tmp_path / person / "c1").mkdir(parents=True)
        (tmp_path / person / "c1" / "1.png").touch()

    report = check_dataset(tmp_path)

    assert report.splits == ()
    errors = [one for one in report.findings if one.severity == "error"]
    assert errors[0].what.startswith("expected at least 2 identities that at least two cameras")
    assert len(errors) == 3


def test_progress_counts_every_frame(folder: Path) -> None:
    seen: list[tuple[int, int]] = []

    check_dataset(folder, progress=lambda done, total: seen.append((done, total)))

    assert seen == [(number, 24) for number in range(1, 25)]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
def test_a_damaged_frame_is_a_finding_and_never_a_crash(folder: Path, suffix: str) -> None:
    rng = np.random.default_rng(1)
    whole = folder / f"whole{suffix}"
    Image.fromarray(rng.integers(0, 256, (16, 9, 3), dtype=np.uint8)).save(whole)
    content = whole.read_bytes()
    whole.unlink()
    for number in range(60):
        damaged = bytearray(content[: int(rng.integers(1, len(content) + 1))])
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = int(rng.integers(256))
        (folder / "p1" / "c1" / f"x{number}{suffix}").write_bytes(damaged)

    report = check_dataset(folder)

    assert not report.ok
    problems = {one.what for one in report.findings if one.severity == "error"}
    assert problems <= {"not an image", "a truncated image", "a damaged image"}


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected a folder at"):
        check_dataset(tmp_path / "absent")


def test_the_command_shows_counts_splits_and_the_verdict(folder: Path) -> None:
    answer = CliRunner().invoke(app, ["check-data", str(folder)])

    assert answer.exit_code == 0
    for words in ("identities", "split 0 to 9: random half of 4 identities", "usable as data-"):
        assert words in answer.stdout


def test_the_command_fails_on_an_error_and_shortens_long_lists(folder: Path) -> None:
    for person in range(1, 5):
        for number in (1, 2, 3):
            (folder / f"p{person}" / "c1" / f"{number:04d}.png").write_bytes(b"no image")

    short = CliRunner().invoke(app, ["check-data", str(folder)])
    long = CliRunner().invoke(app, ["check-data", "--all", str(folder)])

    assert short.exit_code == long.exit_code == 1
    assert "error: not an image (12)" in short.stdout
    assert "and 2 more (--all lists them)" in short.stdout
    assert "p4/c1/0003.png" not in short.stdout
    assert "p4/c1/0003.png" in long.stdout


def test_the_command_writes_json(folder: Path) -> None:
    (folder / "p1" / "c1" / "0001.png").write_bytes(b"")

    answer = CliRunner().invoke(app, ["check-data", "--json", "--no-decode", str(folder)])

    report = json.loads(answer.stdout)
    assert answer.exit_code == 1
    assert report == check_dataset(folder, decode=False).to_json()
    assert report["findings"] == [
        {"severity": "error", "where": "p1/c1/0001.png", "what": "an empty file"}
    ]


@pytest.mark.dataset
@pytest.mark.skipif(not WARD.is_dir(), reason=f"the WARD tracklets are not at {WARD}")
def test_ward_is_whole() -> None:
    report = check_dataset(WARD)

    assert report.findings == ()
    assert (report.identities, len(report.cameras)) == (35, 3)
    assert (report.tracklets, report.frames) == (105, 2365)
    assert (report.frames_min, report.frames_max) == (10, 64)
    assert [(one.train, one.query) for one in report.splits] == [((17, 51), (18, 54))] * 10
