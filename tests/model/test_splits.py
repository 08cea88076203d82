import json
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from model.datasets.findings import Finding
from model.datasets.splits import (
    Names,
    check_division,
    check_usable,
    divide,
    divide_parts,
    divide_unseen,
    drop_singles,
    parse_names,
    random_halves,
    read_json,
    read_matrix,
    sort_tracklets,
)
from model.datasets.tracklets import Split, Tracklet
from model.errors import DatasetError


def seen(identity: str, *cameras: str) -> list[Tracklet]:
    return [
        Tracklet(identity, camera, "", (Path(identity, camera, "1.png"),)) for camera in cameras
    ]


def people(count: int) -> tuple[Tracklet, ...]:
    return tuple(one for number in range(count) for one in seen(f"p{number + 1}", "c1", "c2"))


def names_in(tracklets: tuple[Tracklet, ...]) -> set[str]:
    return {one.identity for one in tracklets}


def test_tracklets_sort_by_identity_camera_and_name_as_numbers() -> None:
    order = [
        Tracklet(identity, camera, name, ())
        for identity in ("p2", "p10")
        for camera in ("c1", "c10")
        for name in ("9", "11")
    ]

    assert sort_tracklets(order[::-1]) == tuple(order)


@pytest.mark.parametrize("count", [2, 3, 35, 300])
def test_random_halves_divide_everybody_and_share_nobody(count: int) -> None:
    for split in random_halves(people(count), seed=0, splits=10):
        train, test = names_in(split.train), names_in(split.query)

        assert not train & test
        assert len(train | test) == count
        assert len(train) == count // 2
        assert split.gallery == split.query


def test_random_halves_depend_on_seed_and_number_alone() -> None:
    tracklets = people(20)

    ten = random_halves(tracklets, seed=3, splits=10)

    assert ten == random_halves(tracklets, seed=3, splits=10)
    assert ten[:4] == random_halves(tracklets, seed=3, splits=4)
    assert ten != random_halves(tracklets, seed=4, splits=10)
    assert len({split.train for split in ten}) == 10
    assert [split.name for split in ten] == [str(number) for number in range(10)]
    assert {split.source for split in ten} == {"random half of 20 identities, seed 3"}


def test_a_half_is_drawn_as_it_always_was() -> None:
    """Runs find their splits again by names alone: noted before shares could be asked for."""
    drawn = random_halves(people(7), seed=3, splits=2)

    assert [names_in(split.train) for split in drawn] == [{"p3", "p6", "p7"}, {"p1", "p2", "p5"}]
    assert drawn == random_halves(people(7), seed=3, splits=2, test_share=0.5)


@pytest.mark.parametrize(("share", "tested"), [(0.1, 3), (0.25, 8), (0.34, 10), (0.9, 27)])
def test_a_share_of_the_identities_is_tested_and_said(share: float, tested: int) -> None:
    for split in random_halves(people(30), seed=0, splits=3, test_share=share):
        assert len(names_in(split.query)) == tested
        assert len(names_in(split.train)) == 30 - tested
        assert not names_in(split.query) & names_in(split.train)
        assert split.source == (
            f"random {tested} of 30 identities tested (test share {share}), seed 0"
        )


def test_a_smaller_share_tests_some_of_those_of_a_larger_one() -> None:
    few, many = (
        random_halves(people(30), seed=0, splits=1, test_share=share) for share in (0.1, 0.4)
    )

    assert names_in(few[0].query) < names_in(many[0].query)


def test_of_a_share_of_nothing_everybody_trains_and_the_gallery_is_empty() -> None:
    tracklets = sort_tracklets([*people(4), *seen("lonely", "c1")])

    [split] = random_halves(tracklets, seed=0, splits=1, test_share=0.0)

    assert names_in(split.train) == {"p1", "p2", "p3", "p4"}
    assert (split.query, split.gallery) == ((), ())
    assert split.source == "all 4 identities train (test share 0)"


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"test_share: expected a share in \[0, 1\)"):
        random_halves(people(4), seed=0, splits=1, test_share=share)


@pytest.mark.parametrize(("share", "tested"), [(0.1, 0), (0.9, 4)])
def test_a_share_that_leaves_nobody_on_a_side_is_refused(share: float, tested: int) -> None:
    with pytest.raises(DatasetError, match=f"got {share} of 4 identities, which is {tested}"):
        random_halves(people(4), seed=0, splits=1, test_share=share)


def test_whoever_was_not_trained_on_asks_and_answers_beside_bystanders() -> None:
    lonely, drawn = seen("lonely", "c1"), seen("0000", "c1", "c2")
    tracklets = sort_tracklets([*people(5), *lonely, *drawn])

    split = divide_unseen(tracklets, {"p1", "p4", "somebody else"}, distractors={"0000"})

    assert names_in(split.query) == {"p2", "p3", "p5"}
    assert names_in(split.gallery) == {"p2", "p3", "p5", "lonely", "0000"}
    assert names_in(split.train) == {"p1", "p4"}
    assert split.name == "unseen"
    assert split.source == "the 3 identities that the checkpoint was not trained on"


def test_fewer_than_two_who_were_not_trained_on_are_refused() -> None:
    with pytest.raises(DatasetError, match="not trained on, got 1 of 4 identities"):
        divide_unseen(people(4), {"p1", "p2", "p3"})


def test_who_was_seen_by_one_camera_only_stands_in_every_gallery() -> None:
    lonely = [*seen("lonely", "c1"), Tracklet("lonely", "c1", "again", (Path("2.png"),))]
    tracklets = sort_tracklets([*people(4), *lonely])

    for split in random_halves(tracklets, seed=0, splits=3):
        assert "lonely" not in names_in(split.train) | names_in(split.query)
        assert sum(one.identity == "lonely" for one in split.gallery) == 2


def test_distractors_are_never_trained_with_or_searched_for() -> None:
    tracklets = sort_tracklets([*people(4), *seen("0000", "c1", "c2")])

    for split in random_halves(tracklets, seed=0, splits=3, distractors={"0000"}):
        assert "0000" not in names_in(split.train) | names_in(split.query)
        assert "0000" in names_in(split.gallery)


def test_a_protocol_of_two_cameras_searches_from_one_in_the_other() -> None:
    [split] = random_halves(people(4), seed=0, splits=1, query_camera="c1", gallery_camera="c2")

    assert {one.camera for one in split.query} == {"c1"}
    assert {one.camera for one in split.gallery} == {"c2"}
    assert names_in(split.query) == names_in(split.gallery)
    assert {one.camera for one in split.train} == {"c1", "c2"}


def test_one_camera_is_not_enough() -> None:
    tracklets = [one for number in range(35) for one in seen(f"p{number}", "cam_1")]

    with pytest.raises(DatasetError, match=r"at least two cameras.*got 0 of 35.*1 camera.*cam_1"):
        random_halves(tracklets, seed=0, splits=1)


def test_one_identity_in_two_cameras_is_not_enough() -> None:
    tracklets = [*seen("a", "c1", "c2"), *seen("b", "c1")]

    with pytest.raises(DatasetError, match=r"at least 2 identities.*got 1 of 2 identities"):
        random_halves(tracklets, seed=0, splits=1)


def test_nothing_at_all_is_not_enough() -> None:
    with pytest.raises(DatasetError, match=r"got 0 of 0 identities, 0 camera\(s\): none"):
        check_usable({})


@pytest.mark.parametrize(("seed", "splits"), [(-1, 10), (0, 0)])
def test_seed_and_splits_out_of_range_are_refused(seed: int, splits: int) -> None:
    with pytest.raises(ValueError, match="expected seed >= 0 and splits >= 1"):
        random_halves(people(4), seed=seed, splits=splits)


def test_identities_with_a_single_tracklet_are_not_trained_with() -> None:
    tracklets = [*seen("a", "c1", "c2"), *seen("b", "c1")]

    assert drop_singles(tracklets) == tuple(tracklets[:2])


def test_divide_keeps_the_order_of_the_tracklets() -> None:
    tracklets = people(4)

    split = divide(tracklets, Names(("p4", "p1"), ("p3",)), name="7", source="by hand")

    assert split == Split(
        "7", tracklets[:2] + tracklets[6:], tracklets[4:6], tracklets[4:6], "by hand"
    )


def test_parts_with_somebody_on_both_sides_are_an_error() -> None:
    findings: list[Finding] = []
    both = seen("0007", "c1", "c2")

    divide_parts(both, both[:1], both, source="x", distractor="0000", findings=findings)

    assert [(one.severity, one.where) for one in findings] == [("error", "0007")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (Names(("a", "b"), ("b", "c")), "expected nobody on both sides of split 0, got b"),
        (Names(("a", "a"), ("c",)), "different names on each side of split 0, got 2 with 1"),
        (Names(("a",), ()), "different names on each side of split 0, got 0 with 0"),
        (
            Names(("a", "z"), ("c", "y10", "y9")),
            "got 3 that are not: y9, y10, z;.*may not be whole",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(names: Names, message: str) -> None:
    with pytest.raises(DatasetError, match=rf"splits\.json: .*{message}"):
        check_division([names], {"a", "b", "c"}, file="splits.json", root=Path("data"))


def test_a_file_of_names_reads_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    path.write_text(json.dumps([{"train": ["a"], "test": ["b", "c"], "remark": 1}]))

    assert parse_names(read_json(path), path) == (Names(("a",), ("b", "c")),)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "[[1, 2]]", '[{"train": ["a"]}]', '[{"train": [1], "test": ["b"]}]']
)
def test_another_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "splits.json"
    path.write_text(text)

    with pytest.raises(DatasetError, match=r"splits\.json"):
        parse_names(read_json(path), path)


def test_a_matrix_of_whole_numbers_reads_in_whatever_type_matlab_wrote_it(tmp_path: Path) -> None:
    expected = np.array([[1, 2], [2, 1]])

    for kind in (np.uint16, np.float64):
        savemat(tmp_path / "splits.mat", {"ls_set": expected.astype(kind)})

        assert (read_matrix(tmp_path / "splits.mat", "ls_set") == expected).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"other": np.eye(2)}, "expected a matrix 'ls_set'.*got none of that name"),
        ({"ls_set": np.array([[1, "a"]], dtype=object)}, r"whole numbers.*got object"),
        ({"ls_set": {"field": 1}}, "whole numbers"),
        ({"ls_set": "text"}, "whole numbers"),
        ({"ls_set": np.array([[1.5]])}, "whole numbers.*got float64"),
        ({"ls_set": np.array([[np.nan]])}, "whole numbers.*got float64"),
        ({"ls_set": np.zeros((0, 0))}, "whole numbers"),
    ],
)
def test_a_matrix_of_anything_else_is_refused(
    tmp_path: Path, content: dict[str, object], message: str
) -> None:
    savemat(tmp_path / "splits.mat", content)

    with pytest.raises(DatasetError, match=message):
        read_matrix(tmp_path / "splits.mat", "ls_set")


@pytest.mark.parametrize("size", [0, 3, 127, 140, 190])
def test_a_matlab_file_that_broke_off_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "splits.mat"
    savemat(path, {"ls_set": np.arange(600).reshape(2, 300)}, do_compression=True)
    path.write_bytes(path.read_bytes()[:size])

    with pytest.raises(DatasetError, match=r"splits\.mat"):
        read_matrix(path, "ls_set")


def test_without_scipy_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)

    with pytest.raises(DatasetError, match=r"needs scipy: pip install 'passerby\[train\]'"):
        read_matrix(tmp_path / "splits.mat", "ls_set")
