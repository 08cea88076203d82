"""Drawn sets on disk: layouts, splits, the truth beside the frames."""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from model.cli import app
from model.datasets.drawing import Share, written_by_processes
from model.datasets.folder import read_folder
from model.datasets.layouts import detect_layout, read_dataset
from model.datasets.presets import preset_set
from model.datasets.synthetic import SyntheticSet, draw_set, write_set
from model.datasets.truth import TrackletTruth, has_truth, read_truth
from model.datasets.writing import DrawnLayout, write_splits
from model.errors import DatasetError

SET = preset_set("full", "tiny", identities=4, frames_max=7, seed=2)
LAYOUTS: tuple[DrawnLayout, ...] = ("folder", "ilids-vid", "prid-2011")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[DrawnLayout, Path]:
    roots = {layout: tmp_path_factory.mktemp("drawn") / layout for layout in LAYOUTS}
    for layout, root in roots.items():
        write_set(SET, root, layout=layout, jobs=1)
    return roots


def digests(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_drawn_layout_is_read_with_its_splits(
    written: dict[DrawnLayout, Path], layout: DrawnLayout
) -> None:
    dataset = read_dataset(written[layout])

    assert detect_layout(written[layout]) == layout
    assert len(dataset.tracklets) == 8
    assert len(dataset.splits) == 10
    for split in dataset.splits:
        assert len({one.identity for one in split.train}) == 2
        assert len({one.identity for one in split.query}) == 2
        assert {one.identity for one in split.query} == {one.identity for one in split.gallery}
        assert layout == "folder" or "split file" in split.source


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_truth_of_a_tracklet_is_what_was_drawn(
    written: dict[DrawnLayout, Path], layout: DrawnLayout
) -> None:
    dataset = read_dataset(written[layout])
    truth = read_truth(dataset.root)
    drawn = {(one.identity, one.camera): one for one in draw_set(SET)}

    for tracklet in dataset.tracklets:
        record = truth.of(tracklet)
        expected = drawn[record.identity, record.camera]
        masks = [truth.load_mask(frame) for frame in tracklet.frames]
        np.testing.assert_array_equal(np.stack(masks), expected.masks)
        assert record.hidden == expected.truth.hidden
        assert record.degradations == expected.truth.degradations
        assert record.level == expected.truth.level


@pytest.mark.parametrize("layout", ["ilids-vid", "prid-2011"])
def test_frames_of_published_layouts_lose_nothing(
    written: dict[DrawnLayout, Path], layout: DrawnLayout
) -> None:
    first = read_dataset(written[layout]).tracklets[0]
    [drawn, *_] = draw_set(SET)

    with Image.open(first.frames[0]) as picture:
        np.testing.assert_array_equal(np.asarray(picture), drawn.frames[0])


def test_published_layouts_have_the_published_names(written: dict[DrawnLayout, Path]) -> None:
    ilids, prid = (set(digests(written[layout])) for layout in LAYOUTS[1:])

    assert "i-LIDS-VID/sequences/cam1/person001/cam1_person001_00001.png" in ilids
    assert "splits_ilidsvid.json" in ilids
    assert "multi_shot/cam_b/person_0004/0001.png" in prid
    assert "splits_prid2011.json" in prid


def test_the_first_half_of_an_ilids_row_tests(written: dict[DrawnLayout, Path]) -> None:
    root = written["ilids-vid"]
    rows = json.loads((root / "splits_ilidsvid.json").read_text())
    dataset = read_dataset(root)

    for row, split in zip(rows, dataset.splits, strict=True):
        asked = {int(one.identity.removeprefix("person")) for one in split.query}
        assert asked == set(row[:2])


def test_the_mat_file_says_what_the_json_says(written: dict[DrawnLayout, Path]) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    root = written["ilids-vid"]
    path = root / "train-test people splits" / "train_test_splits_ilidsvid.mat"

    rows = json.loads((root / "splits_ilidsvid.json").read_text())

    assert scipy_io.loadmat(path)["ls_set"].tolist() == rows


def test_without_scipy_there_is_no_mat_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)

    write_splits(tmp_path, "ilids-vid", 6, seed=1)

    assert [path.name for path in tmp_path.iterdir()] == ["splits_ilidsvid.json"]


def test_odd_numbers_of_people_are_halved_as_the_loaders_do(tmp_path: Path) -> None:
    write_set(SyntheticSet(identities=5, frames_min=1, frames_max=2, height=32, width=16),
              tmp_path / "set", layout="prid-2011", masks=False, jobs=1)  # fmt: skip

    [split, *_] = read_dataset(tmp_path / "set").splits

    assert len(split.query) == 2
    assert len(split.train) == 6


@pytest.mark.parametrize("layout", ["ilids-vid", "prid-2011"])
def test_published_layouts_have_two_cameras(tmp_path: Path, layout: DrawnLayout) -> None:
    with pytest.raises(DatasetError, match=f"expected 2 cameras for {layout}, got 3"):
        write_set(SyntheticSet(cameras=3), tmp_path / "set", layout=layout)

    assert list(tmp_path.iterdir()) == []


def test_bytes_do_not_depend_on_the_number_of_processes(
    written: dict[DrawnLayout, Path], tmp_path: Path
) -> None:
    tracklets = write_set(SET, tmp_path / "set", layout="ilids-vid", jobs=2)

    assert digests(tmp_path / "set") == digests(written["ilids-vid"])
    assert [one.identity for one in tracklets[:3]] == ["person001", "person001", "person002"]


def test_progress_counts_every_tracklet_with_several_processes(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    write_set(
        SyntheticSet(identities=2, frames_min=1, frames_max=1, height=32, width=16),
        tmp_path / "set",
        jobs=2,
        progress=lambda done, total: seen.append((done, total)),
    )

    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


class _StopError(Exception):
    pass


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_set_leaves_nothing(tmp_path: Path, jobs: int) -> None:
    def stop(done: int, _: int) -> None:
        if done == 2:
            raise _StopError

    with pytest.raises(_StopError):
        write_set(SET, tmp_path / "set", jobs=jobs, progress=stop)

    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".set.unfinished" / "p0001" / "c1" / "0001.jpg"
    left.parent.mkdir(parents=True)
    left.touch()

    write_set(SET, tmp_path / "set", jobs=1, masks=False)

    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(read_folder(tmp_path / "set")) == 8


def test_a_full_disk_is_a_data_set_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.datasets.writing.save_mask", full)

    with pytest.raises(DatasetError, match="No space left on device"):
        write_set(SET, tmp_path / "set", jobs=1)

    assert list(tmp_path.iterdir()) == []


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.touch()
    share = Share(asdict(SET), str(root), "folder", False, 0, 1)

    with pytest.raises(DatasetError, match=r"expected a tracklet, got .*Not a directory"):
        list(written_by_processes([share], 1))


def test_a_process_whose_starter_is_gone_stops(tmp_path: Path) -> None:
    share = Share(asdict(SET), str(tmp_path), "folder", False, 0, 1)
    process = subprocess.Popen(
        [sys.executable, "-m", "model.datasets.drawing"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    process.stdin.write(json.dumps(asdict(share)).encode())
    process.stdin.close()

    assert process.wait(timeout=60) != 0
    process.stderr.close()
    assert len(list(tmp_path.rglob("c1"))) + len(list(tmp_path.rglob("c2"))) == 1


def test_jobs_start_at_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least 1 job, got 0"):
        write_set(SET, tmp_path / "set", jobs=0)


def test_a_set_without_masks_says_so(tmp_path: Path) -> None:
    [tracklet, *_] = write_set(SET, tmp_path / "set", masks=False, jobs=1)
    truth = read_truth(tmp_path / "set")

    assert truth.of(tracklet).identity == 1
    with pytest.raises(DatasetError, match=r"expected a mask at .*0001\.png, got none"):
        truth.load_mask(tracklet.frames[0])


def test_a_folder_without_truth_says_so(tmp_path: Path) -> None:
    assert not has_truth(tmp_path)
    with pytest.raises(DatasetError, match=r"expected a drawn set with .truth/tracklets.jsonl"):
        read_truth(tmp_path)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    write_set(SET, tmp_path / "set", masks=False, jobs=1)
    path = tmp_path / "set" / ".truth" / "tracklets.jsonl"
    path.write_text(path.read_text() + '{"folder": "p0009/c1"}\n')

    assert has_truth(tmp_path / "set")
    with pytest.raises(DatasetError, match=r"expected a record in line 9 of .*, got"):
        read_truth(tmp_path / "set")


def test_a_tracklet_of_elsewhere_has_no_truth(
    written: dict[DrawnLayout, Path], tmp_path: Path
) -> None:
    truth = read_truth(written["folder"])
    [foreign, *_] = write_set(SET, tmp_path / "set", masks=False, jobs=1)

    with pytest.raises(DatasetError, match="expected a path within"):
        truth.of(foreign)


def test_a_link_to_a_set_has_the_same_truth(
    written: dict[DrawnLayout, Path], tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(written["folder"], target_is_directory=True)
    [tracklet, *_] = read_folder(link)

    assert read_truth(written["folder"]).of(tracklet).folder == "p0001/c1"


@pytest.mark.parametrize(
    ("hidden", "foreign", "level"),
    [
        ((0.0,) * 8, (), 0),
        ((0.05,) * 8, (), 0),
        ((0.9,) * 2 + (0.0,) * 6, (), 25),
        ((0.9,) * 2 + (0.0,) * 6, (6, 7), 50),
        ((0.2,) * 4 + (0.0,) * 4, (), 50),
        ((0.2,) * 5 + (0.0,) * 3, (), 75),
        ((0.9,) * 8, (), 75),
    ],
)
def test_levels_count_the_persons_own_frames(
    hidden: tuple[float, ...], foreign: tuple[int, ...], level: int
) -> None:
    truth = TrackletTruth("", 1, 1, 8, hidden=hidden, foreign=foreign)

    assert truth.level == level


def test_synth_writes_what_its_options_say(tmp_path: Path) -> None:
    root = tmp_path / "set"
    arguments = (
        "synth", "--preset", "occluded", "--size", "tiny", "--identities", "2", "--height", "32",
        "--width", "16", "--frames-min", "3", "--frames-max", "3", "--layout", "prid-2011",
        "--occluded", "1", "--seed", "3", "--no-masks", "--jobs", "1", str(root),
    )  # fmt: skip

    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 0, result.output
    truth = read_truth(root)
    assert {one.frames for one in truth.tracklets.values()} == {3}
    assert all(one.occluder for one in truth.tracklets.values())
    assert not (root / ".truth" / "masks").exists()
    made_of = json.loads((root / ".truth" / "set.json").read_text())
    assert (made_of["layout"], made_of["set"]["seed"]) == ("prid-2011", 3)


def test_synth_refuses_what_cannot_be_drawn(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ("synth", "--height", "8", str(tmp_path / "set")))

    assert result.exit_code == 2
    assert "expected frames of at least" in result.output.replace("\n", " ")
