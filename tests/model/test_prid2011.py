import json
from pathlib import Path

import numpy as np
import pytest

from model.datasets.checking import check_dataset
from model.datasets.layouts import read_dataset
from model.errors import DatasetError

NAMES = [f"person_{number:04d}" for number in range(1, 750)]
CHOSEN = [name for name in NAMES[:200] if int(name[-4:]) % 9][:178]


def fill(root: Path, in_a: list[str], in_b: list[str]) -> None:
    for camera, names in (("cam_a", in_a), ("cam_b", in_b)):
        for name in names:
            folder = root / "multi_shot" / camera / name
            folder.mkdir(parents=True)
            (folder / "0001.png").touch()


def write_splits(root: Path, names: list[str], splits: int = 10) -> None:
    rng = np.random.default_rng(0)
    content = []
    for _ in range(splits):
        order = rng.permutation(names).tolist()
        half = len(names) // 2
        content.append({"train": order[:half], "test": order[half:]})
    (root / "splits_prid2011.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prid") / "prid_2011"
    fill(root, NAMES[:385], NAMES)
    write_splits(root, CHOSEN)
    return root


def test_the_ten_published_splits_divide_178_people_into_halves(published: Path) -> None:
    splits = read_dataset(published).splits

    assert len(splits) == 10
    for split in splits:
        train = {one.identity for one in split.train}
        test = {one.identity for one in split.query}
        assert len(train) == len(test) == 89
        assert not train & test
        assert train | test == set(CHOSEN)
        assert split.source == "published: splits_prid2011.json"


def test_cam_a_asks_and_the_gallery_is_cam_b_without_distractors(published: Path) -> None:
    for split in read_dataset(published).splits:
        assert {one.camera for one in split.query} == {"cam_a"}
        assert {one.camera for one in split.gallery} == {"cam_b"}
        assert {one.identity for one in split.gallery} == {one.identity for one in split.query}


def test_equal_names_above_200_are_different_people_and_left_out(published: Path) -> None:
    """person_0201 of cam_a is somebody else than person_0201 of cam_b."""
    tracklets = read_dataset(published).tracklets

    assert {one.identity for one in tracklets} == set(NAMES[:200])
    assert len(tracklets) == 400


def test_all200_takes_seeded_halves_of_the_first_200(published: Path) -> None:
    splits = read_dataset(published, prid_subset="all200", seed=2).splits

    assert len(splits) == 10
    assert splits[0].source == "random half of 200 identities, seed 2 (all200)"
    for split in splits:
        train = {one.identity for one in split.train}
        test = {one.identity for one in split.query}
        assert len(train) == len(test) == len(split.gallery) == 100
        assert train | test == set(NAMES[:200])


def test_the_folder_around_may_be_named(published: Path) -> None:
    assert read_dataset(published.parent) == read_dataset(published)


def test_the_checker_has_no_complaint_about_the_counts_of_the_whole_set(published: Path) -> None:
    findings = check_dataset(published, decode=False).findings

    assert not [one for one in findings if one.what.endswith("as published")]
    [left_out] = [one for one in findings if one.severity == "note"]
    assert left_out.what.startswith("734 tracklets of persons above 200 left out")


def test_tracklets_that_are_too_short_may_be_half_copied(published: Path) -> None:
    findings = check_dataset(published, decode=False).findings

    said = {(one.where, one.what) for one in findings if one.severity == "warning"}
    few = "expected about 100 frames a tracklet as published, got 1: half-copied?"
    assert ("multi_shot", few) in said
    short = "expected at least 21 frames of who is in the published splits: half-copied?"
    assert (f"multi_shot/cam_b/{CHOSEN[0]} (1 frames)", short) in said
    assert sum(what == short for _, what in said) == 2 * 178


def test_somebody_whom_the_split_names_in_vain_is_named(tmp_path: Path) -> None:
    fill(tmp_path, NAMES[:20], NAMES[:18])
    write_splits(tmp_path, NAMES[:20])

    with pytest.raises(
        DatasetError, match=r"2 that are not: person_0019, person_0020;.*check-data"
    ):
        read_dataset(tmp_path)
    findings = check_dataset(tmp_path, decode=False).findings
    vain = [one.where for one in findings if one.what.startswith("named by the split file")]
    assert vain == ["person_0019", "person_0020"]


def test_a_split_file_may_name_people_above_200(tmp_path: Path) -> None:
    """A drawn set can be larger than the published one."""
    fill(tmp_path, NAMES[:204], NAMES[:204])
    write_splits(tmp_path, NAMES[:204], splits=1)

    [split] = read_dataset(tmp_path).splits

    assert len(split.query) == 102
    assert split.source == "split file: splits_prid2011.json"


def test_without_a_split_file_halves_are_drawn_and_say_so(tmp_path: Path) -> None:
    fill(tmp_path, [*NAMES[:6], "person_0300"], [*NAMES[:6], "person_0300"])

    splits = read_dataset(tmp_path).splits

    assert splits[0].source == "random half of 6 identities, seed 0 (no splits_prid2011.json)"


def test_a_damaged_split_file_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, NAMES[:6], NAMES[:6])
    (tmp_path / "splits_prid2011.json").write_text("[{")

    with pytest.raises(DatasetError, match=r"expected a JSON file at .*splits_prid2011\.json"):
        read_dataset(tmp_path)


def test_an_unknown_subset_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, NAMES[:6], NAMES[:6])

    with pytest.raises(ValueError, match=r"prid_subset: expected .*, got '200'"):
        read_dataset(tmp_path, prid_subset="200")  # type: ignore[arg-type]
