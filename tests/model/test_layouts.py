import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from model.datasets.layouts import LAYOUTS, detect_layout, fingerprint_dataset, read_dataset
from model.errors import DatasetError

Fill = Callable[[Path], None]
PEOPLE = range(1, 9)
REAL_SCANDIR = os.scandir


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def fill_folder(root: Path) -> None:
    for person in PEOPLE:
        touch(root, *(f"p{person}/c{camera}/{at}.png" for camera in (1, 2) for at in (2, 10)))
    touch(root, "p9/c1/first/1.png", "p9/c1/second/1.png", "README.md")


def fill_ilids(root: Path) -> None:
    sequences = root / "i-LIDS-VID" / "sequences"
    for person in PEOPLE:
        touch(sequences, *(f"cam{camera}/person{person:03d}/1.png" for camera in (1, 2)))
    (root / "splits_ilidsvid.json").write_text(json.dumps([[8, 3, 1, 2, 4, 5, 7, 6]]))


def fill_prid(root: Path) -> None:
    for person in PEOPLE:
        touch(root, *(f"multi_shot/cam_{camera}/person_{person:04d}/1.png" for camera in "ab"))


def fill_mars(root: Path) -> None:
    for part, people in (("bbox_train", PEOPLE[:4]), ("bbox_test", PEOPLE[4:])):
        for person in people:
            names = [
                f"{person:04d}C{at}T{at:04d}F00{frame}.jpg" for at in (1, 2) for frame in (1, 2)
            ]
            touch(root / part / f"{person:04d}", *names)


def fill_market(root: Path) -> None:
    for person in PEOPLE:
        touch(root, *(f"{person:04d}_c{at}s1_00{at}051_01.jpg" for at in (1, 2, 3)))


def fill_mixed(root: Path) -> None:
    fill_folder(root / "people")
    fill_prid(root / "prid")
    fill_market(root / "crops")


FILL: dict[str, Fill] = {
    "folder": fill_folder,
    "ilids-vid": fill_ilids,
    "prid-2011": fill_prid,
    "mars": fill_mars,
    "market-1501": fill_market,
    "mixed": fill_mixed,
}
every_layout = pytest.mark.parametrize(("layout", "fill"), FILL.items(), ids=list(FILL))


class Backwards:
    """What os.scandir gives, in the opposite order."""

    def __init__(self, path: Path) -> None:
        with REAL_SCANDIR(path) as listed:
            self._entries = list(listed)[::-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entries = []

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        return iter(self._entries)


def test_every_layout_is_tested_here() -> None:
    assert set(FILL) == set(LAYOUTS)


@every_layout
def test_a_layout_is_recognised_by_its_folders(tmp_path: Path, layout: str, fill: Fill) -> None:
    fill(tmp_path)

    assert detect_layout(tmp_path) == layout
    assert read_dataset(tmp_path).layout == layout


@every_layout
def test_nothing_depends_on_the_order_in_which_the_disk_lists(
    tmp_path: Path, layout: str, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    forwards = read_dataset(tmp_path)
    listdir = os.listdir

    monkeypatch.setattr("os.scandir", Backwards)
    monkeypatch.setattr("os.listdir", lambda path=".": listdir(path)[::-1])

    assert read_dataset(tmp_path) == forwards
    assert forwards.layout == layout


@every_layout
def test_nobody_is_trained_with_and_searched_for(tmp_path: Path, layout: str, fill: Fill) -> None:
    fill(tmp_path)

    for split in read_dataset(tmp_path).splits:
        train = {one.identity for one in split.train}
        test = {one.identity for one in (*split.query, *split.gallery)}
        assert train, layout
        assert {one.identity for one in split.query}
        assert not train & test


@every_layout
def test_frames_exist_and_are_in_the_order_of_their_numbers(
    tmp_path: Path, layout: str, fill: Fill
) -> None:
    fill(tmp_path)

    dataset = read_dataset(tmp_path)

    for tracklet in dataset.tracklets:
        assert all(frame.is_file() for frame in tracklet.frames), layout
    if layout == "folder":
        assert [frame.name for frame in dataset.tracklets[0].frames] == ["2.png", "10.png"]


def test_in_a_plain_folder_all_test_tracklets_ask_and_answer(tmp_path: Path) -> None:
    fill_folder(tmp_path)

    splits = read_dataset(tmp_path, seed=1, splits=3).splits

    assert len(splits) == 3
    for split in splits:
        assert len(split.query) == 8
        # p9 was seen by one camera: nobody asks for it, and it can be mistaken.
        assert len(split.gallery) == 10
        assert set(split.query) < set(split.gallery)
    assert splits[0].source == "random half of 8 identities, seed 1"


def test_a_folder_with_one_camera_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a/c1/1.png", "b/c1/1.png", "b/c1/2.png")

    with pytest.raises(DatasetError, match=r"at least two cameras.*0 of 2 identities, 1 camera"):
        read_dataset(tmp_path)


def test_a_broken_folder_is_refused_with_the_first_error_and_their_number(tmp_path: Path) -> None:
    fill_folder(tmp_path)
    touch(tmp_path, "p1/c1/t1/1.png", "p2/notes.png")

    message = r"p1/c1: expected either frames or tracklet folders in it.*, and 1 more error;"
    with pytest.raises(DatasetError, match=message):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["README.md"], "got no folders"),
        (["a/1.png"], "got folders without folders, such as 'a'"),
        (["cat.jpg"], "got no folders"),
    ],
)
def test_a_folder_like_no_layout_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    touch(tmp_path, *names)

    with pytest.raises(DatasetError, match=f"expected one of the layouts folder.*{message}"):
        detect_layout(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected a folder at .*absent, got nothing"):
        read_dataset(tmp_path / "absent")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_folder_is_no_layout_at_all(tmp_path: Path, layout: str) -> None:
    with pytest.raises(DatasetError):
        read_dataset(tmp_path, layout)  # type: ignore[arg-type]


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout: expected auto or one of"):
        read_dataset(tmp_path, "coco")  # type: ignore[arg-type]


@every_layout
def test_a_fingerprint_is_the_same_wherever_the_folder_lies(
    tmp_path: Path, layout: str, fill: Fill
) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        fill(tmp_path / place)

    first, second = (fingerprint_dataset(read_dataset(tmp_path / place)) for place in ("a", "b"))

    assert first == second, layout
    assert first.startswith("data-")
    assert len(first) == 17


def test_a_fingerprint_sees_a_frame_more_less_renamed_or_of_another_size(tmp_path: Path) -> None:
    fill_folder(tmp_path)
    frame = tmp_path / "p1" / "c1" / "2.png"
    seen = [fingerprint_dataset(read_dataset(tmp_path))]

    frame.write_bytes(b"x")
    seen.append(fingerprint_dataset(read_dataset(tmp_path)))
    frame.rename(frame.with_name("3.png"))
    seen.append(fingerprint_dataset(read_dataset(tmp_path)))
    frame.with_name("3.png").unlink()
    seen.append(fingerprint_dataset(read_dataset(tmp_path)))
    frame.touch()
    again = fingerprint_dataset(read_dataset(tmp_path))

    assert len(set(seen)) == 4
    assert again == seen[0]


def test_a_frame_that_went_is_an_error(tmp_path: Path) -> None:
    fill_folder(tmp_path)
    dataset = read_dataset(tmp_path)
    dataset.tracklets[0].frames[0].unlink()

    with pytest.raises(DatasetError, match=r"expected a frame at .*2\.png"):
        fingerprint_dataset(dataset)
