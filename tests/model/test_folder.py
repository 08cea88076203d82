from pathlib import Path

import pytest

from model.datasets.folder import read_folder, read_tracklet
from model.datasets.tracklets import Tracklet, natural_key
from model.errors import DatasetError

WARD = Path(__file__).resolve().parents[3] / "shared" / "data" / "ward"


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_natural_order_counts_as_people_do() -> None:
    names = ["1.jpg", "2.jpg", "10.jpg", "a1b2.png", "a1b10.png", "a2b1.png", "B1.png"]
    backwards = names[::-1]

    assert sorted(backwards, key=natural_key) == names


def test_natural_order_is_the_same_whatever_order_the_names_come_in() -> None:
    """Names that count alike must not depend on the order in which the disk lists them."""
    names = ["1.jpg", "01.jpg", "001.jpg", "A.jpg", "a.jpg"]

    assert len({natural_key(name) for name in names}) == len(names)


def test_natural_order_takes_numbers_of_any_length() -> None:
    """Python's int() refuses 4,301 digits, and an archive may hold such a name."""
    long, longer = "9" * 5000, "1" + "0" * 5000

    assert sorted([longer, long], key=natural_key) == [long, longer]


def test_frames_in_a_camera_folder_are_one_nameless_tracklet(tmp_path: Path) -> None:
    touch(tmp_path, "anna/c1/10.jpg", "anna/c1/2.jpg", "anna/c1/1.jpg")

    [tracklet] = read_folder(tmp_path)

    folder = tmp_path / "anna" / "c1"
    assert tracklet == Tracklet(
        "anna", "c1", "", (folder / "1.jpg", folder / "2.jpg", folder / "10.jpg")
    )


def test_tracklet_folders_give_their_names_in_natural_order(tmp_path: Path) -> None:
    touch(tmp_path, "7/c1/t10/1.jpg", "7/c1/t9/1.jpg")

    assert [tracklet.name for tracklet in read_folder(tmp_path)] == ["t9", "t10"]


def test_both_layouts_may_stand_side_by_side(tmp_path: Path) -> None:
    touch(tmp_path, "p2/c1/1.jpg", "p10/c1/1.jpg", "p2/c2/first/1.jpg", "p2/c2/second/1.jpg")

    found = [(one.identity, one.camera, one.name) for one in read_folder(tmp_path)]

    assert found == [
        ("p2", "c1", ""),
        ("p2", "c2", "first"),
        ("p2", "c2", "second"),
        ("p10", "c1", ""),
    ]


def test_image_suffixes_count_in_any_case(tmp_path: Path) -> None:
    names = ("1.jpg", "2.JPEG", "3.Png", "4.webp", "5.BMP")
    touch(tmp_path, *names)

    assert [frame.name for frame in read_tracklet(tmp_path)] == list(names)


def test_hidden_and_other_files_are_ignored_on_every_level(tmp_path: Path) -> None:
    touch(tmp_path, "README.md", "LICENSE", ".git/c1/1.jpg", "p1/notes.txt", "p1/.cache/1.jpg")
    touch(tmp_path, "p1/c1/1.jpg", "p1/c1/.hidden.jpg", "p1/c1/boxes.csv", "p1/c1/.thumbs/1.jpg")

    [tracklet] = read_folder(tmp_path)

    assert tracklet.frames == (tmp_path / "p1" / "c1" / "1.jpg",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["README.md"], "expected identity folders in .*, got no tracklets"),
        (["1.jpg"], "expected only identity folders in .*, got an image '1.jpg'"),
        (["p1/notes.txt"], "expected camera folders in .*p1, got no tracklets"),
        (["p1/1.jpg"], "expected only camera folders in .*p1, got an image '1.jpg'"),
        (["p1/c1/notes.txt"], "expected at least one image in .*c1, got none"),
        (["p1/c1/t1/notes.txt"], "expected at least one image in .*t1, got none"),
        (["p1/c1/1.jpg", "p1/c1/t1/1.jpg"], "in .*c1, got both: '1.jpg' and 't1'"),
        (["p1/c1/t1/deep/1.jpg"], "expected only frames in .*t1, got a folder 'deep'"),
    ],
)
def test_what_does_not_belong_is_refused_by_name(
    tmp_path: Path, files: list[str], message: str
) -> None:
    touch(tmp_path, *files)

    with pytest.raises(DatasetError, match=message):
        read_folder(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected a folder at .*absent, got nothing"):
        read_folder(tmp_path / "absent")


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "people.zip")

    with pytest.raises(DatasetError, match=r"expected a folder at .*zip, got a file"):
        read_tracklet(tmp_path / "people.zip")


@pytest.mark.dataset
@pytest.mark.skipif(not WARD.is_dir(), reason=f"the WARD tracklets are not at {WARD}")
def test_ward_reads_as_its_105_tracklets() -> None:
    tracklets = read_folder(WARD)

    assert len(tracklets) == 105
    assert len({tracklet.identity for tracklet in tracklets}) == 35
    assert {tracklet.camera for tracklet in tracklets} == {"cam_1", "cam_2", "cam_3"}
    assert sum(len(tracklet.frames) for tracklet in tracklets) == 2365
