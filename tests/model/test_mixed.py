"""Several data sets at once: nobody is mixed up, and each part stays what it is alone."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from model.checkpoint import load_checkpoint
from model.cli import app
from model.datasets.checking import check_dataset
from model.datasets.layouts import (
    detect_layout,
    fingerprint_dataset,
    fingerprint_parts,
    read_dataset,
)
from model.datasets.mixed import MixedDataset
from model.datasets.presets import preset_set
from model.datasets.synthetic import write_set
from model.errors import DatasetError, EvaluationError, RecipeError
from model.recipe import format_recipe, load_recipe, parse_recipe
from model.runs import RunFolder

SMALL = [
    "network.backbone=conv5",
    "preprocessing.height=64",
    "preprocessing.width=32",
    "batch.identities=2",
    "batch.frames=2",
    "optimiser.precision=fp32",
    "optimiser.epochs=1",
    "monitor.every_epochs=1",
]


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def fill_people(root: Path, count: int = 6) -> Path:
    for person in range(1, count + 1):
        touch(root, *(f"{person:04d}/c{camera}/1.png" for camera in (1, 2)))
    return root


def fill_crops(root: Path, count: int = 6) -> Path:
    for person in range(1, count + 1):
        touch(root, *(f"{person:04d}_c{at}s1_00{at}051_01.jpg" for at in (1, 2, 3)))
    return root


def fill_divided(root: Path) -> Path:
    """The published three folders of crops."""
    for part, people in (("bounding_box_train", (1, 2)), ("bounding_box_test", (3, 4))):
        for person in people:
            touch(root / part, *(f"{person:04d}_c{at}s1_000051_01.jpg" for at in (1, 2)))
    touch(root / "query", "0003_c1s1_000061_01.jpg", "0004_c1s1_000061_01.jpg")
    return root


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    """People of a folder and crops, whose names are the same, behind links."""
    root = tmp_path / "mix"
    root.mkdir()
    (root / "people").symlink_to(fill_people(tmp_path / "there" / "people"))
    (root / "crops").symlink_to(fill_crops(tmp_path / "elsewhere"))
    return root


def read_mix(root: Path, **test_share: float) -> MixedDataset:
    dataset = read_dataset(root, "mixed", test_share=test_share)
    assert isinstance(dataset, MixedDataset)
    return dataset


def test_people_and_cameras_carry_the_name_of_their_part(mix: Path) -> None:
    dataset = read_mix(mix)

    assert {one.identity for one in dataset.tracklets} == {
        f"{part}/{person:04d}" for part in ("people", "crops") for person in range(1, 7)
    }
    assert {one.camera for one in dataset.tracklets if one.identity.startswith("people")} == {
        "people/c1",
        "people/c2",
    }


def test_frames_keep_the_paths_where_they_lie(mix: Path, tmp_path: Path) -> None:
    frames = {frame for one in read_mix(mix).tracklets for frame in one.frames}

    there = (tmp_path.resolve() / "there", tmp_path.resolve() / "elsewhere")
    assert all(any(frame.is_relative_to(one) for one in there) for frame in frames)


def test_split_n_of_a_mix_is_split_n_of_every_part(mix: Path) -> None:
    """So a checkpoint of the mix can be tested on the same split of a part alone."""
    dataset = read_mix(mix)

    assert [split.name for split in dataset.splits] == [str(number) for number in range(10)]
    for name in ("people", "crops"):
        alone = read_dataset((mix / name).resolve()).splits
        for split, part in zip(dataset.splits, alone, strict=True):
            for side in ("train", "query", "gallery"):
                mixed = {one.identity for one in getattr(split, side)}
                assert {one.identity for one in getattr(part, side)} == {
                    one.removeprefix(f"{name}/") for one in mixed if one.startswith(f"{name}/")
                }
            assert f"{name}: {part.source}" in split.source
        assert dataset.parts[name].splits == alone


def test_a_share_of_nothing_trains_a_whole_part(mix: Path) -> None:
    dataset = read_mix(mix, crops=0.0)

    for split in dataset.splits:
        trained = {one.identity for one in split.train}
        tested = {one.identity for one in split.query + split.gallery}
        assert sum(one.startswith("crops/") for one in trained) == 6
        assert sum(one.startswith("people/") for one in trained) == 3
        assert {one.partition("/")[0] for one in tested} == {"people"}
        assert "crops: all 6 identities train (test share 0)" in split.source


def test_a_single_published_split_goes_with_every_split(tmp_path: Path) -> None:
    fill_people(tmp_path / "people")
    fill_divided(tmp_path / "market")

    dataset = read_mix(tmp_path)

    assert len(dataset.splits) == 10
    of_market = [dataset.part_splits(split)["market"] for split in dataset.splits]
    assert len({split.train for split in of_market}) == 1
    assert [split.name for split in of_market] == [split.name for split in dataset.splits]


def test_the_part_with_the_fewest_splits_says_how_many_there_are(tmp_path: Path) -> None:
    fill_people(tmp_path / "people")
    for camera in "ab":
        touch(
            tmp_path / "prid" / "multi_shot",
            *(f"cam_{camera}/person_000{person}/1.png" for person in range(1, 5)),
        )
    names = [f"person_000{person}" for person in range(1, 5)]
    divisions = [{"train": names[at::2], "test": names[1 - at :: 2]} for at in (0, 1)]
    (tmp_path / "prid" / "splits_prid2011.json").write_text(json.dumps(divisions))

    assert len(read_mix(tmp_path).splits) == 2
    assert len(read_dataset(tmp_path, splits=1).splits) == 1


@pytest.mark.parametrize("published", ["market", "people"])
def test_a_share_is_refused_where_it_can_mean_nothing(tmp_path: Path, published: str) -> None:
    fill_people(tmp_path / "people")
    fill_divided(tmp_path / "market")

    with pytest.raises(DatasetError, match="market: expected the division of bounding_box_train"):
        read_mix(tmp_path, market=0.1)
    with pytest.raises(DatasetError, match="expected parts among market, people, got ward"):
        read_mix(tmp_path, ward=0.1)
    with pytest.raises(DatasetError, match="test_share: expected a mixed data set, got one of"):
        read_dataset(tmp_path / published, test_share={published: 0.1})


def test_a_part_has_the_fingerprint_that_it_has_alone(mix: Path) -> None:
    assert fingerprint_parts(read_mix(mix)) == {
        name: fingerprint_dataset(read_dataset(mix / name)) for name in ("crops", "people")
    }


def test_the_fingerprint_of_a_mix_depends_on_names_and_contents_of_parts_alone(
    mix: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    fill_people(copy / "people")
    fill_crops(copy / "crops")
    first, same = (fingerprint_dataset(read_mix(root)) for root in (mix, copy))

    (copy / "crops").rename(copy / "market")
    renamed = fingerprint_dataset(read_mix(copy))
    (copy / "people" / "0001" / "c1" / "1.png").write_bytes(b"x")

    assert first == same
    assert len({first, renamed, fingerprint_dataset(read_mix(copy))}) == 3


def test_a_mix_with_a_published_layout_in_it_is_recognised(mix: Path) -> None:
    assert detect_layout(mix) == "mixed"


def test_plain_folders_alone_are_a_mix_only_where_that_is_said(tmp_path: Path) -> None:
    """They look like one folder whose cameras hold several tracklets, and that came first."""
    for name in ("a", "b"):
        fill_people(tmp_path / name)

    assert detect_layout(tmp_path) == "folder"
    assert len(read_mix(tmp_path).parts) == 2


@pytest.mark.parametrize("odd", ["other/notes/1.txt", "1.png", "empty/nothing.txt"])
def test_a_folder_with_something_else_in_it_is_not_taken_for_a_mix(mix: Path, odd: str) -> None:
    touch(mix, odd)

    assert detect_layout(mix) == "folder"


def test_a_part_within_another_is_refused(mix: Path) -> None:
    """Its people would train in one and be tested in the other."""
    (mix / "inner").symlink_to(mix / "people" / "0001")

    report = check_dataset(mix, "mixed", decode=False)

    told = [(one.where, one.what) for one in report.findings if one.severity == "error"]
    assert any(where == "people (inner)" and "or within it" in what for where, what in told)


def test_everything_wrong_with_a_mix_is_told_by_part(mix: Path) -> None:
    touch(mix / "people", "0001/stray.png")
    touch(mix, "1.png", "empty/nothing.txt")
    (mix / "gone").symlink_to(mix / "nowhere")
    (mix / "again").symlink_to(mix / "crops")

    report = check_dataset(mix, "mixed", decode=False)

    told = [(one.where, one.what) for one in report.findings if one.severity == "error"]
    assert ("gone", "a link to nothing") in told
    assert any(where == "crops (again)" and "same folder" in what for where, what in told)
    assert any(where == "empty" and "known layout" in what for where, what in told)
    assert any(where == "." and "image '1.png'" in what for where, what in told)
    assert any(where == "people/0001" and "got an image" in what for where, what in told)
    assert ("people/0001/c1/1.png", "an empty file") in told
    assert report.fingerprint is None


def test_a_mix_is_checked_as_each_part_would_be_alone(tmp_path: Path) -> None:
    for place, path in enumerate(
        [
            *(f"people/p{person}/c{camera}/1.png" for person in (1, 2) for camera in (1, 2)),
            *("people/p1/c1/2.png", "people/p1/c1/5.png", "people/p1/c1/6.png"),
            *(f"crops/000{person}_c{at}s1_000{at}_01.jpg" for person in (1, 2) for at in (1, 2)),
        ]
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * place, 0, 0)).save(tmp_path / path)

    report = check_dataset(tmp_path)

    assert (report.layout, report.ok, report.identities, len(report.splits)) == (
        "mixed",
        True,
        4,
        10,
    )
    assert report.fingerprint == fingerprint_dataset(read_mix(tmp_path))
    expected = {
        (one.severity, f"{part}/{one.where}", one.what)
        for part in ("people", "crops")
        for one in check_dataset(tmp_path / part).findings
    }
    assert {(one.severity, one.where, one.what) for one in report.findings} == expected
    assert len(expected) == 8


def test_frames_that_two_parts_share_are_told(tmp_path: Path) -> None:
    for path in ("people/p1/c1/1.png", "people/p1/c2/1.png", "crops/0001_c1s1_0001_01.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        colour = (200, 0, 0) if "c2" in path else (0, 0, 0)
        Image.new("RGB", (16, 16), colour).save(tmp_path / path, format="png")

    told = {one.where: one.what for one in check_dataset(tmp_path, "mixed").findings}

    where = "people/p1/people/c1 (1 of crops/0001/crops/c1/s1)"
    assert told[where] == "frames that another tracklet holds, too"


def test_an_empty_mix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected data set folders"):
        read_mix(tmp_path)


# Recipes


def test_a_recipe_with_shares_comes_back_from_what_is_written(tmp_path: Path) -> None:
    shares = {"ward": 0.5, 'odd "name"': 0.25, "drawn": 0.0}
    recipe = parse_recipe({"name": "mine", "data": {"layout": "mixed", "test_share": shares}})
    path = tmp_path / "recipe.toml"

    path.write_text(format_recipe(recipe))

    assert load_recipe(path) == recipe
    assert recipe.data.test_share == shares
    assert 'test_share = { "ward" = 0.5,' in path.read_text()


def test_shares_are_laid_over_one_by_one() -> None:
    recipe = load_recipe(
        "folder", ["data.layout=mixed", "data.test_share.ward=0.25", "data.test_share.drawn=0"]
    )

    assert recipe.data.test_share == {"ward": 0.25, "drawn": 0.0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"layout": "folder", "test_share": {"a": 0.5}}, 'expected the layout "mixed"'),
        ({"layout": "mixed", "test_share": {"a": 1.0}}, r"shares in \[0, 1\), got 1.0 of 'a'"),
        ({"layout": "mixed", "test_share": {"a": -0.1}}, r"shares in \[0, 1\)"),
        ({"layout": "mixed", "test_share": {"a": "0.5"}}, "data.test_share.a"),
        ({"layout": "mixed", "test_share": 0.5}, "data.test_share"),
    ],
)
def test_shares_that_are_none_are_refused(data: Mapping[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"name": "mine", "data": data})


# Training on a mix, and what is known of it afterwards


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mix of two drawn sets, one in the layout of PRID-2011."""
    root = tmp_path_factory.mktemp("drawn")
    write_set(preset_set("easy", "tiny"), root / "plain", masks=False, jobs=1)
    write_set(preset_set("easy", "tiny"), root / "prid", layout="prid-2011", masks=False, jobs=1)
    write_set(preset_set("easy", "tiny", seed=5), root / "whole", masks=False, jobs=1)
    return root


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "run"
    result = train(drawn, output)
    assert result.exit_code == 0, result.output
    return output


def train(data: Path, output: Path, *settings: str) -> Result:
    command = ["train", "folder", "--data", str(data), "--output", str(output), "--device", "cpu"]
    command += ["--start", "random"]
    for setting in (*SMALL, "data.layout=mixed", "data.test_share.whole=0", *settings):
        command += ["--set", setting]
    return CliRunner().invoke(app, command)


def evaluate(run: Path, data: Path, *arguments: str) -> Result:
    command = ["evaluate", str(run), "--data", str(data), "--device", "cpu", *arguments]
    return CliRunner().invoke(app, command)


def test_a_run_measures_each_part_that_tests_anybody(run: Path) -> None:
    measured = [row for row in RunFolder(run).read_log() if "measured" in row]

    assert [row["measured"] for row in measured] == [0, 1]
    names = {name for name in measured[0] if "/" in name}
    assert names == {
        f"{part}/{name}" for part in ("plain", "prid") for name in ("rank_1", "rank_5", "mAP")
    }


def test_a_checkpoint_says_of_each_part_whom_it_was_trained_on(run: Path, drawn: Path) -> None:
    data = load_checkpoint(run / "model.safetensors").provenance["data"]

    parts = {one["name"]: one for one in data["parts"]}
    assert data["layout"] == "mixed"
    assert list(parts) == ["plain", "prid", "whole"]
    for name, part in parts.items():
        alone = read_dataset(drawn / name)
        trained = {one.identity for one in alone.splits[0].train}
        if name == "whole":
            trained = {one.identity for one in alone.tracklets}
        assert (part["layout"], part["fingerprint"]) == (alone.layout, fingerprint_dataset(alone))
        assert set(part["train_identities"]) == trained


def test_the_same_command_finds_its_run_again_and_another_share_does_not(
    run: Path, drawn: Path
) -> None:
    assert "is finished" in train(drawn, run).output

    other = train(drawn, run, "data.test_share.plain=0.25")

    assert '(test_share = { "whole" = 0.0, "plain" = 0.25 })' in str(other.exception)


def test_who_was_trained_on_in_a_mix_is_known_in_the_part_alone(run: Path, drawn: Path) -> None:
    checkpoint = load_checkpoint(run / "model.safetensors")
    parts = {one["name"]: one for one in checkpoint.provenance["data"]["parts"]}

    for name, part in parts.items():
        split = read_dataset(drawn / name).splits[1]
        known = {one.identity for one in split.query} & set(part["train_identities"])
        refused = evaluate(run / "model.safetensors", drawn / name, "--splits", "1")
        assert isinstance(refused.exception, EvaluationError)
        assert f"was trained on {len(known)} of the 4 identities" in str(refused.exception)


def test_whoever_a_mix_left_out_of_a_part_is_unseen_there(
    run: Path, drawn: Path, tmp_path: Path
) -> None:
    result = evaluate(
        run, drawn / "plain", "--splits", "unseen", "--unit", "--output", str(tmp_path)
    )

    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["sources"] == ["the 4 identities that the checkpoint was not trained on"]
    assert results["seen_identities"] == 0
    assert results["options"]["unit"] is True
    assert "the 4 identities that the checkpoint was not trained on" in (
        tmp_path / "index.html"
    ).read_text(encoding="utf-8")


def test_a_mix_is_trained_on_but_not_evaluated(run: Path, drawn: Path) -> None:
    result = evaluate(run, drawn)

    assert isinstance(result.exception, EvaluationError)
    assert "expected one data set, got a mix of plain, prid, whole" in str(result.exception)


def test_a_mix_that_tests_nobody_trains_without_measuring(drawn: Path, tmp_path: Path) -> None:
    root = tmp_path / "mix"
    root.mkdir()
    (root / "whole").symlink_to(drawn / "whole")

    result = train(root, tmp_path / "run")

    assert result.exit_code == 0, result.output
    assert not any("measured" in row for row in RunFolder(tmp_path / "run").read_log())
