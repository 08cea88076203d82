import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from model.datasets.checking import check_dataset
from model.datasets.layouts import read_dataset
from model.datasets.tracklets import Tracklet
from model.errors import DatasetError

SHARED = Path(os.environ.get("SHARED", Path(__file__).resolve().parents[3] / "shared"))
MARKET = SHARED / "data" / "market1501-train"

TRAIN = [
    "0002_c1s1_000451_03.jpg",
    "0002_c1s1_000776_01.jpg",
    "0002_c1s2_000841_01.jpg",
    "0002_c2s1_000301_01.jpg",
    "0007_c1s1_000001_01.jpg",
    "0007_c3s1_000002_01.jpg",
]
QUERY = ["0001_c1s1_001051_00.jpg", "0001_c2s1_000301_00.jpg"]
TEST = [
    "-1_c1s1_000401_03.jpg",
    "0000_c1s1_000151_01.jpg",
    "0000_c1s1_000376_03.jpg",
    "0001_c1s1_001051_03.jpg",
    "0001_c2s1_000301_00.jpg",
]


def fill(root: Path, names: Iterable[str]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).touch()


def fill_all(root: Path) -> Path:
    fill(root / "bounding_box_train", TRAIN)
    fill(root / "query", QUERY)
    fill(root / "bounding_box_test", TEST)
    fill(root / "bounding_box_test", ["Thumbs.db"])
    return root


def labels(tracklets: Iterable[Tracklet]) -> list[str]:
    return [f"{one.identity} {one.camera} {one.name}" for one in tracklets]


def test_crops_of_one_identity_camera_and_sequence_are_a_tracklet_by_frame(tmp_path: Path) -> None:
    fill(tmp_path, ["0002_c1s1_100000_01.jpg", "0002_c1s1_000776_02.jpg", *TRAIN, "README.md"])

    dataset = read_dataset(tmp_path)

    assert dataset.layout == "market-1501"
    assert labels(dataset.tracklets) == [
        "0002 c1 s1",
        "0002 c1 s2",
        "0002 c2 s1",
        "0007 c1 s1",
        "0007 c3 s1",
    ]
    assert [frame.name for frame in dataset.tracklets[0].frames] == [
        "0002_c1s1_000451_03.jpg",
        "0002_c1s1_000776_01.jpg",
        "0002_c1s1_000776_02.jpg",
        "0002_c1s1_100000_01.jpg",
    ]


def test_the_published_folders_are_the_split(tmp_path: Path) -> None:
    [split] = read_dataset(fill_all(tmp_path)).splits

    assert {one.identity for one in split.train} == {"0002", "0007"}
    assert labels(split.query) == ["0001 c1 query-s1", "0001 c2 query-s1"]
    assert split.source == "published: the folders bounding_box_train, query and bounding_box_test"


def test_junk_is_left_out_and_distractors_stand_alone_in_the_gallery(tmp_path: Path) -> None:
    [split] = read_dataset(fill_all(tmp_path)).splits

    assert labels(split.gallery) == [
        "0000 c1 s1-000151-01",
        "0000 c1 s1-000376-03",
        "0001 c1 s1",
        "0001 c2 s1",
    ]


def test_no_two_tracklets_have_the_same_identity_camera_and_name(tmp_path: Path) -> None:
    tracklets = read_dataset(fill_all(tmp_path)).tracklets

    assert len(set(labels(tracklets))) == len(tracklets)


def test_the_folder_of_the_archive_may_stand_between(tmp_path: Path) -> None:
    inner = fill_all(tmp_path / "Market-1501-v15.09.15")

    assert read_dataset(tmp_path) == read_dataset(inner)


def test_crops_alone_are_divided_into_seeded_halves(tmp_path: Path) -> None:
    fill(tmp_path, [*TRAIN, *TEST])

    splits = read_dataset(tmp_path, splits=3).splits

    assert len(splits) == 3
    assert splits[0].source == (
        "random half of 3 identities, seed 0 (no bounding_box_train, query and bounding_box_test)"
    )
    for split in splits:
        assert not {"0000", "-1"} & {one.identity for one in (*split.train, *split.query)}
        assert sum(one.identity == "0000" for one in split.gallery) == 2


@pytest.mark.parametrize("missing", ["bounding_box_train", "query", "bounding_box_test"])
def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path, missing: str) -> None:
    fill_all(tmp_path)
    (tmp_path / missing).rename(tmp_path.parent / f"moved-{tmp_path.name}")

    with pytest.raises(DatasetError, match=f"{missing}: missing folder"):
        read_dataset(tmp_path)


def test_an_identity_in_both_parts_is_an_error(tmp_path: Path) -> None:
    fill_all(tmp_path)
    fill(tmp_path / "bounding_box_test", ["0007_c1s1_000009_01.jpg"])

    with pytest.raises(DatasetError, match="0007: in the training part and in the test part"):
        read_dataset(tmp_path)


def test_no_query_is_refused(tmp_path: Path) -> None:
    fill_all(tmp_path)
    for crop in (tmp_path / "query").iterdir():
        crop.unlink()

    with pytest.raises(DatasetError, match="expected tracklets to search with"):
        read_dataset(tmp_path)


def test_other_names_are_warned_of_and_counts_held_against_the_published_ones(
    tmp_path: Path,
) -> None:
    fill_all(tmp_path)
    fill(tmp_path / "query", ["cat.jpg"])

    findings = check_dataset(tmp_path, decode=False).findings

    said = {(one.severity, one.where, one.what) for one in findings}
    ignored = "not the name of a Market-1501 crop: ignored"
    assert ("warning", "query/cat.jpg", ignored) in said
    assert ("warning", "query", "expected 3,368 crops as published, got 3") in said
    assert ("note", "bounding_box_test", "1 junk crops (identity -1) left out") in said


@pytest.mark.dataset
@pytest.mark.skipif(not MARKET.is_dir(), reason=f"the Market-1501 crops are not at {MARKET}")
def test_the_real_crops_read_as_their_2842_tracklets() -> None:
    report = check_dataset(MARKET, decode=False)

    assert (report.layout, report.identities, len(report.cameras)) == ("market-1501", 600, 6)
    assert (report.tracklets, report.frames) == (2842, 10652)
    assert report.ok
    assert [(split.train[0], split.query[0]) for split in report.splits] == [(300, 300)] * 10
