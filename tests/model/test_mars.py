from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from model.datasets.checking import check_dataset
from model.datasets.layouts import read_dataset
from model.datasets.tracklets import Tracklet
from model.errors import DatasetError

# Identity, camera, tracklet, frames; as in the published lists, -1 is junk and 0 a distractor.
TRAIN = [(1, 1, 1, 2), (1, 2, 2, 3), (3, 1, 1, 1), (3, 4, 2, 2)]
TEST = [
    (-1, 1, 1, 2),
    (0, 1, 1, 2),
    (0, 1, 2, 1),
    (2, 1, 1, 2),
    (2, 1, 2, 2),
    (2, 2, 3, 12),
    (4, 5, 1, 1),
    (4, 6, 2, 2),
]
QUERIES = [4, 6, 7, 8]  # 1-based rows of TEST


def frame_names(row: tuple[int, int, int, int]) -> list[str]:
    identity, camera, tracklet, frames = row
    label = "00-1" if identity == -1 else f"{identity:04d}"
    return [f"{label}C{camera}T{tracklet:04d}F{frame:03d}.jpg" for frame in range(1, frames + 1)]


def fill(root: Path, *, info: bool = True) -> Path:
    for part, rows in (("train", TRAIN), ("test", TEST)):
        names = [name for row in rows for name in frame_names(row)]
        for name in names:
            path = root / f"bbox_{part}" / name[:4] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if info:
            (root / "info").mkdir(exist_ok=True)
            (root / "info" / f"{part}_name.txt").write_text("\n".join(names) + "\n")
            ends = np.cumsum([row[3] for row in rows])
            table = [
                (end - row[3] + 1, end, row[0], row[1]) for end, row in zip(ends, rows, strict=True)
            ]
            path = root / "info" / f"tracks_{part}_info.mat"
            savemat(path, {f"track_{part}_info": np.array(table, dtype=np.float64)})
    if info:
        savemat(root / "info" / "query_IDX.mat", {"query_IDX": np.array([QUERIES])})
    return root


def labels(tracklets: Iterable[Tracklet]) -> list[str]:
    return [f"{one.identity} {one.camera} {one.name}" for one in tracklets]


def test_the_info_files_say_who_trains_asks_and_answers(tmp_path: Path) -> None:
    [split] = read_dataset(fill(tmp_path)).splits

    assert labels(split.train) == [
        "0001 C1 T0001",
        "0001 C2 T0002",
        "0003 C1 T0001",
        "0003 C4 T0002",
    ]
    assert labels(split.query) == [
        "0002 C1 T0001",
        "0002 C2 T0003",
        "0004 C5 T0001",
        "0004 C6 T0002",
    ]
    assert split.source == "published: info/query_IDX.mat, the gallery with the queries"


def test_the_gallery_is_every_test_tracklet_but_junk(tmp_path: Path) -> None:
    """Without the queries in it, identity 0004 here could not be found at all."""
    [split] = read_dataset(fill(tmp_path)).splits

    assert labels(split.gallery) == [
        "0000 C1 T0001",
        "0000 C1 T0002",
        "0002 C1 T0001",
        "0002 C1 T0002",
        "0002 C2 T0003",
        "0004 C5 T0001",
        "0004 C6 T0002",
    ]
    assert "00-1" not in {one.identity for one in read_dataset(tmp_path).tracklets}


def test_first_and_last_frame_of_a_row_are_counted_from_1_and_inclusive(tmp_path: Path) -> None:
    [split] = read_dataset(fill(tmp_path)).splits

    [long] = [one for one in split.gallery if one.name == "T0003"]

    assert [frame.name for frame in long.frames] == frame_names(TEST[5])


def test_without_info_names_say_it_and_a_seed_chooses_the_queries(tmp_path: Path) -> None:
    [with_info] = read_dataset(fill(tmp_path / "a")).splits
    root = fill(tmp_path / "b", info=False)

    chosen = [read_dataset(root, seed=seed).splits[0] for seed in range(20)]

    assert labels(chosen[0].gallery) == labels(with_info.gallery)
    assert labels(chosen[0].train) == labels(with_info.train)
    for split in chosen:
        asked = [(one.identity, one.camera) for one in split.query]
        assert asked == [("0002", "C1"), ("0002", "C2"), ("0004", "C5"), ("0004", "C6")]
    assert {split.query[0].name for split in chosen} == {"T0001", "T0002"}
    assert chosen[3] == read_dataset(root, seed=3).splits[0]
    assert chosen[3].source == (
        "by folder; one query of each identity and camera, seed 3 (no info/)"
    )


def test_a_listed_frame_that_is_not_there_is_an_error_by_identity(tmp_path: Path) -> None:
    fill(tmp_path)
    for name in frame_names(TEST[5])[:7]:
        (tmp_path / "bbox_test" / "0002" / name).unlink()

    with pytest.raises(
        DatasetError, match=r"bbox_test/0002 \(7\): frames of test_name\.txt that a"
    ):
        read_dataset(tmp_path)


def test_a_frame_that_no_list_names_is_a_warning(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "bbox_test" / "0002" / "0002C1T0009F001.jpg").touch()

    findings = check_dataset(tmp_path, decode=False).findings

    said = {(one.severity, one.where, one.what) for one in findings}
    assert ("warning", "bbox_test/0002 (1)", "frames that test_name.txt does not name") in said


@pytest.mark.parametrize("part", ["bbox_train", "bbox_test"])
def test_a_missing_part_is_an_error_that_names_it(tmp_path: Path, part: str) -> None:
    fill(tmp_path, info=False)
    (tmp_path / part).rename(tmp_path / "elsewhere")

    with pytest.raises(DatasetError, match=f"{part}: missing folder"):
        read_dataset(tmp_path)


def test_a_missing_info_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    """Half of the info must not quietly become another protocol."""
    fill(tmp_path)
    (tmp_path / "info" / "query_IDX.mat").unlink()

    with pytest.raises(DatasetError, match=r"info/query_IDX\.mat: missing file"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 99, 1, 1]], "row 1: expected first frame, last frame, identity and camera"),
        ([[0, 2, 1, 1]], "row 1: expected first frame"),
        ([[1, 2, 1]], "row 1: expected first frame"),
        ([[1, 2, 3, 1]], "row 1: the file names are not of one tracklet by that camera"),
        ([[1, 2, 1, 2]], "row 1: the file names are not of one tracklet by that camera"),
        ([[1, 3, 1, 1]], "row 1: the file names are not of one tracklet by that camera"),
    ],
)
def test_a_row_that_disagrees_with_the_names_is_an_error(
    tmp_path: Path, rows: list[list[int]], message: str
) -> None:
    fill(tmp_path)
    path = tmp_path / "info" / "tracks_train_info.mat"
    savemat(path, {"track_train_info": np.array(rows)})

    with pytest.raises(DatasetError, match=message):
        read_dataset(tmp_path)


@pytest.mark.parametrize("row", [0, 1, 2, 99])
def test_a_query_that_is_nobody_is_an_error(tmp_path: Path, row: int) -> None:
    """Row 1 is junk, row 2 a distractor."""
    fill(tmp_path)
    savemat(tmp_path / "info" / "query_IDX.mat", {"query_IDX": np.array([[4, row]])})

    with pytest.raises(DatasetError, match=rf"query_IDX\.mat value {row}: a query that is no trac"):
        read_dataset(tmp_path)


def test_an_unreadable_info_file_is_an_error_beside_the_others(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "info" / "tracks_test_info.mat").write_bytes(b"broken off")
    (tmp_path / "bbox_train" / "0001" / "0001C1T0001F001.jpg").unlink()

    findings = check_dataset(tmp_path, decode=False).findings

    said = " ".join(f"{one.where}: {one.what}" for one in findings if one.severity == "error")
    assert "tracks_test_info.mat" in said
    assert "bbox_train/0001 (1): frames of train_name.txt that are not there" in said


def test_the_checker_counts_against_the_published_set(tmp_path: Path) -> None:
    findings = check_dataset(fill(tmp_path), decode=False).findings

    said = {(one.where, one.what) for one in findings if one.severity == "warning"}
    assert ("info/tracks_train_info.mat", "expected 8,298 tracklets as published, got 4") in said
    assert ("info/tracks_test_info.mat", "expected 12,180 tracklets as published, got 8") in said
    assert ("info/query_IDX.mat", "expected 1,980 queries as published, got 4") in said
