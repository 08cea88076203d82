import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.io import savemat

from model.datasets.checking import check_dataset
from model.datasets.ilids_vid import find_ilids_vid
from model.datasets.layouts import read_dataset
from model.errors import DatasetError

# As in the published set, names have gaps: 300 of them go to 319.
NAMES = [f"person{number:03d}" for number in range(1, 320) if number % 16][:300]


def fill(root: Path, names: list[str], cameras: tuple[str, ...] = ("cam1", "cam2")) -> None:
    for camera in cameras:
        for name in names:
            folder = root / "i-LIDS-VID" / "sequences" / camera / name
            folder.mkdir(parents=True)
            for number in (9, 10):
                (folder / f"{camera}_{name}_{number:05d}.png").touch()


def rows(count: int, splits: int = 10) -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(count) + 1 for _ in range(splits)])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ilids")
    fill(root, NAMES)
    folder = root / "train-test people splits"
    folder.mkdir()
    savemat(folder / "train_test_splits_ilidsvid.mat", {"ls_set": rows(300).astype(np.float64)})
    return root


def test_the_ten_published_splits_divide_300_people_into_halves(published: Path) -> None:
    splits = read_dataset(published).splits

    assert len(splits) == 10
    for split in splits:
        train = {one.identity for one in split.train}
        test = {one.identity for one in split.query}
        assert len(train) == len(test) == 150
        assert not train & test
        assert train | test == set(NAMES)
        assert split.source == "published: train_test_splits_ilidsvid.mat"


def test_the_first_half_of_a_row_is_the_test_side(published: Path) -> None:
    """The other way round is a known error of published code."""
    expected = [{NAMES[index - 1] for index in row[:150]} for row in rows(300)]

    splits = read_dataset(published).splits

    assert [{one.identity for one in split.query} for split in splits] == expected


def test_cam1_asks_and_cam2_answers(published: Path) -> None:
    for split in read_dataset(published).splits:
        assert {one.camera for one in split.query} == {"cam1"}
        assert {one.camera for one in split.gallery} == {"cam2"}
        assert len(split.query) == len(split.gallery) == 150
        assert len(split.train) == 300


def test_either_folder_may_be_named(published: Path) -> None:
    inner = read_dataset(published / "i-LIDS-VID")

    assert inner == read_dataset(published)
    assert inner.root == published
    assert find_ilids_vid(published / "i-LIDS-VID") == published / "i-LIDS-VID"


def test_the_split_file_may_lie_in_either_folder(tmp_path: Path) -> None:
    fill(tmp_path, NAMES[:4])
    (tmp_path / "i-LIDS-VID" / "splits_ilidsvid.json").write_text("[[4, 3, 2, 1]]")

    [split] = read_dataset(tmp_path).splits

    assert [one.identity for one in split.query] == NAMES[2:4]


def test_sequences_may_lie_in_a_folder_of_another_name(tmp_path: Path) -> None:
    fill(tmp_path, NAMES[:4])
    moved = (tmp_path / "i-LIDS-VID").rename(tmp_path / "mine")

    dataset = read_dataset(moved)

    assert dataset.layout == "ilids-vid"
    assert dataset.root == moved


def test_one_person_too_few_is_refused_because_every_index_would_move(
    tmp_path: Path,
) -> None:
    fill(tmp_path, NAMES[:299])
    savemat(tmp_path / "train_test_splits_ilidsvid.mat", {"ls_set": rows(300)})

    with pytest.raises(DatasetError, match=r"expected the 300 persons.*got 299.*passerby check-da"):
        read_dataset(tmp_path)


def test_a_person_missing_in_one_camera_is_named(tmp_path: Path) -> None:
    names = NAMES[:10]
    fill(tmp_path, names, ("cam1",))
    fill(tmp_path, names[:-1], ("cam2",))
    (tmp_path / "splits_ilidsvid.json").write_text(json.dumps(rows(10).tolist()))

    with pytest.raises(DatasetError, match=rf"1 that are not: {names[-1]};.*check-data"):
        read_dataset(tmp_path)
    found = {(one.where, one.what) for one in check_dataset(tmp_path, decode=False).findings}
    assert (names[-1], "named by the split file, but not in both cameras") in found


def test_a_missing_camera_is_an_error_that_names_it(tmp_path: Path) -> None:
    fill(tmp_path, NAMES[:4], ("cam1",))

    with pytest.raises(DatasetError, match=r"sequences/cam2: missing folder"):
        read_dataset(tmp_path)


def test_an_empty_tracklet_is_an_error_that_names_it(tmp_path: Path) -> None:
    fill(tmp_path, NAMES[:4])
    empty = tmp_path / "i-LIDS-VID" / "sequences" / "cam2" / NAMES[2]
    for frame in empty.iterdir():
        frame.unlink()

    with pytest.raises(DatasetError, match=rf"cam2/{NAMES[2]}: expected at least one image in it"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_json_file_of_indices_or_of_names_says_the_same(tmp_path: Path, wrapped: bool) -> None:
    names = NAMES[:6]
    fill(tmp_path, names)
    row = [3, 1, 6, 2, 4, 5]
    content: list[object] = [row]
    if wrapped:
        content = [{"test": [names[2], names[0], names[5]], "train": [names[1], *names[3:5]]}]
    (tmp_path / "splits_ilidsvid.json").write_text(json.dumps(content))

    [split] = read_dataset(tmp_path).splits

    assert [one.identity for one in split.query] == [names[0], names[2], names[5]]
    assert [one.identity for one in split.gallery] == [names[0], names[2], names[5]]
    # It is not claimed that a file for six people is the published one.
    assert split.source == "split file: splits_ilidsvid.json"


@pytest.mark.parametrize(
    "row", [[1, 2, 3, 3], [0, 1, 2, 3], [1, 2, 3, 5], [1.0, 2, 3, 4], [True, 2, 3, 4], ["1"] * 4]
)
def test_a_row_that_is_no_permutation_is_refused(tmp_path: Path, row: list[object]) -> None:
    fill(tmp_path, NAMES[:4])
    (tmp_path / "splits_ilidsvid.json").write_text(json.dumps([[1, 2, 3, 4], row]))

    with pytest.raises(DatasetError, match=r"each number from 1 to 4 once in split 1"):
        read_dataset(tmp_path)


def test_without_a_split_file_halves_are_drawn_and_say_so(tmp_path: Path) -> None:
    fill(tmp_path, NAMES[:10])

    splits = read_dataset(tmp_path, seed=5, splits=4).splits

    assert len(splits) == 4
    assert splits[0].source == (
        "random half of 10 identities, seed 5 "
        "(no train_test_splits_ilidsvid.mat or splits_ilidsvid.json)"
    )
    assert {one.camera for one in splits[0].query} == {"cam1"}


def test_the_checker_counts_against_the_published_set(tmp_path: Path) -> None:
    fill(tmp_path, NAMES[:10])

    findings = check_dataset(tmp_path, decode=False).findings

    said = {(one.severity, one.where, one.what) for one in findings}
    few = "expected 300 persons as published, got 10"
    assert ("warning", "i-LIDS-VID/sequences/cam1", few) in said
    assert not any("a tracklet as published" in one.what for one in findings)
    short = "expected 23 to 192 frames as published"
    assert ("warning", f"i-LIDS-VID/sequences/cam1/{NAMES[0]} (2 frames)", short) in said


def test_a_whole_set_with_too_few_frames_may_be_half_copied(published: Path) -> None:
    """Tracklets that broke off at their ends leave no gap in the numbers."""
    findings = check_dataset(published, decode=False).findings

    what = "expected about 73 frames a tracklet as published, got 2: half-copied?"
    assert ("warning", ".", what) in {(one.severity, one.where, one.what) for one in findings}


def test_the_checker_does_not_send_people_to_the_checker(tmp_path: Path) -> None:
    fill(tmp_path, NAMES[:9])
    (tmp_path / "splits_ilidsvid.json").write_text(json.dumps(rows(10).tolist()))

    findings = check_dataset(tmp_path, decode=False).findings

    assert any("the 10 persons that splits_ilidsvid.json counts" in one.what for one in findings)
    assert not any("check-data" in one.what for one in findings)
