"""From the command line to runs on disk."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from model.checkpoint import load_checkpoint, make_checkpoint, save_checkpoint
from model.cli import app
from model.datasets.layouts import read_dataset
from model.datasets.presets import preset_set
from model.datasets.synthetic import write_set
from model.errors import DatasetError, ModelError, RecipeError, TeacherError, TrainingError
from model.experiment import (
    ask_teacher,
    choose_splits,
    make_job,
    plan_experiment,
    run_folders,
)
from model.frames import Preprocessing
from model.live_teacher import LiveTeacher
from model.network import NetworkConfig, TrackletNet
from model.recipe import Recipe, load_recipe
from model.runs import RunFolder
from model.training import Listener, Trainer
from tests.model.teaching import Small

needs_openvino = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "openvino")),
    reason="needs the extras export and openvino",
)

SMALL = [
    "network.backbone=conv5",
    "preprocessing.height=64",
    "preprocessing.width=32",
    "batch.identities=2",
    "batch.frames=2",
    "optimiser.precision=fp32",
    "optimiser.epochs=2",
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "tiny"
    write_set(preset_set("easy", "tiny"), root, layout="prid-2011", masks=False, jobs=1)
    return root


def train(data: Path, output: Path, *arguments: str, recipe: str = "prid-2011") -> Result:
    command = ["train", recipe, "--data", str(data), "--output", str(output), "--device", "cpu"]
    command += ["--start", "random"]
    for setting in SMALL:
        command += ["--set", setting]
    return CliRunner().invoke(app, [*command, *arguments])


def test_several_splits_and_seeds_make_a_folder_of_runs(drawn: Path, tmp_path: Path) -> None:
    result = train(drawn, tmp_path / "runs", "--splits", "0,1", "--seeds", "0-1")

    assert result.exit_code == 0, result.output
    made = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert made == [f"split-{split}-seed-{seed}" for split in (0, 1) for seed in (0, 1)]
    products = [load_checkpoint(tmp_path / "runs" / name / "model.safetensors") for name in made]
    assert len({one.fingerprint for one in products}) == 4
    assert [one.provenance["data"]["split"] for one in products] == ["0", "0", "1", "1"]


def test_a_run_measures_itself_by_the_protocol_of_its_data(drawn: Path, tmp_path: Path) -> None:
    result = train(drawn, tmp_path / "run", "--set", "monitor.every_epochs=1")

    assert result.exit_code == 0, result.output
    measured = [row for row in RunFolder(tmp_path / "run").read_log() if "rank_1" in row]
    assert [row["epoch"] for row in measured] == [0, 1, 2]
    assert all(0 <= row["mAP"] <= 1 for row in measured)


def test_a_run_knows_where_its_split_came_from(drawn: Path, tmp_path: Path) -> None:
    train(drawn, tmp_path / "run")

    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "splits_prid2011.json" in facts["data"]["source"]
    assert facts["data"]["fingerprint"].startswith("data-")
    assert len(facts["data"]["train_identities"]) == 4


def test_a_start_from_trained_weights_remembers_whom_they_saw(drawn: Path, tmp_path: Path) -> None:
    """Or the evaluation could not refuse people who were seen before."""
    train(drawn, tmp_path / "first")
    first = tmp_path / "first" / "model.safetensors"

    result = train(drawn, tmp_path / "second", "--splits", "1", "--start", str(first))

    assert result.exit_code == 0, result.output
    start = load_checkpoint(tmp_path / "second" / "model.safetensors").provenance["start"]
    assert start["checkpoint"] == load_checkpoint(first).fingerprint
    assert start["data"]["split"] == "0"


def test_weights_of_another_architecture_are_refused(drawn: Path, tmp_path: Path) -> None:
    train(drawn, tmp_path / "small")
    small = tmp_path / "small" / "model.safetensors"

    result = train(
        drawn,
        tmp_path / "run",
        *("--start", str(small), "--set", "network.backbone=resnet50"),
    )

    assert isinstance(result.exception, ModelError)
    assert "expected a checkpoint of a resnet50 network" in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_a_recipe_for_another_layout_is_refused(drawn: Path, tmp_path: Path) -> None:
    result = train(drawn, tmp_path / "run", recipe="mars")

    assert isinstance(result.exception, DatasetError)
    assert not (tmp_path / "run").exists()


def test_a_mistyped_setting_is_refused(drawn: Path, tmp_path: Path) -> None:
    result = train(drawn, tmp_path / "run", "--set", "optimizer.epochs=3")

    assert isinstance(result.exception, RecipeError)
    assert "'optimizer'" in str(result.exception)


def test_a_split_that_is_not_there_is_refused(drawn: Path) -> None:
    dataset = read_dataset(drawn)

    assert [split.name for split in choose_splits(dataset, "0,2-3")] == ["0", "2", "3"]
    with pytest.raises(TrainingError, match="got 10"):
        choose_splits(dataset, "9-10")


def test_a_single_run_lives_in_the_folder_itself(drawn: Path, tmp_path: Path) -> None:
    splits = read_dataset(drawn).splits

    [alone] = run_folders(tmp_path, splits[:1], [5]).values()
    several = run_folders(tmp_path, splits[:2], [5])

    assert alone.path == tmp_path
    assert isinstance(alone, RunFolder)
    assert [folder.path.name for folder in several.values()] == ["split-0-seed-5", "split-1-seed-5"]


FORGET_NOTHING = ("distillation.teacher=start", "distillation.projection=false", "network.head=8")


def started(folder: Path, *settings: str) -> Recipe:
    """A recipe that goes on from weights with a head of 8 numbers, taught by them."""
    weights = folder / "first.safetensors"
    torch.manual_seed(0)
    network = TrackletNet(NetworkConfig(backbone="conv5", head=8))
    save_checkpoint(make_checkpoint(network, Preprocessing(height=64, width=32)), weights)
    return load_recipe("folder", [*SMALL, *FORGET_NOTHING, f"start={weights}", *settings])


def test_what_a_run_begins_with_may_be_its_teacher(drawn: Path, tmp_path: Path) -> None:
    """Before the first step the student stands where its teacher does."""
    recipe = started(tmp_path, "data.layout=prid-2011", "augmentation.flip=0.0")
    experiment = plan_experiment(recipe, drawn)
    [split] = choose_splits(experiment.dataset, "0")
    teacher = ask_teacher(experiment, [split], tmp_path / "said", Listener())
    job = make_job(experiment, split, seed=3, device="cpu", listener=Listener(), save_every_s=99,
                   teacher=teacher)  # fmt: skip
    trainer = Trainer(job, RunFolder(tmp_path / "run"))
    trainer.learner.network.eval()

    batch = next(trainer.loader.epoch(0))
    learned = trainer.learner(batch.clips, trainer._teach(batch, batch.clips))

    assert learned.distilled.embedding.item() == pytest.approx(0, abs=1e-3)


def taught_by_the_start(folder: Path) -> list[str]:
    """Options of a run that begins with weights and is taught by them."""
    weights = folder / "first.safetensors"
    network = TrackletNet(NetworkConfig(backbone="conv5", head=8))
    save_checkpoint(make_checkpoint(network, Preprocessing(height=64, width=32)), weights)
    settings = [word for one in FORGET_NOTHING for word in ("--set", one)]
    return [*settings, "--init", str(weights)]


def test_too_few_people_are_refused_before_the_teacher_is_asked(
    drawn: Path, tmp_path: Path
) -> None:
    """It would see every frame first, which takes minutes."""
    settings = taught_by_the_start(tmp_path)

    result = train(drawn, tmp_path / "run", *settings, "--set", "batch.identities=99")

    assert isinstance(result.exception, TrainingError)
    assert "expected at least 99 training identities" in str(result.exception)
    assert not (tmp_path / ".teacher").exists()


def test_a_frame_that_cannot_be_decoded_is_named_with_what_lists_them(
    drawn: Path, tmp_path: Path
) -> None:
    """Also where a teacher meets it before the training does."""
    data = tmp_path / "data"
    shutil.copytree(drawn, data)
    for path in sorted(data.rglob("*.png"))[::2]:
        path.write_bytes(b"no image")

    result = train(data, tmp_path / "run", *taught_by_the_start(tmp_path))

    assert isinstance(result.exception, DatasetError)
    assert "could not decode" in str(result.exception)
    assert "passerby check-data" in str(result.exception)


@needs_openvino
def test_a_live_teacher_is_asked_about_the_augmented_crops(drawn: Path, tmp_path: Path) -> None:
    import openvino

    path = tmp_path / "teacher.onnx"
    program = torch.onnx.export(
        Small().eval(), (torch.zeros(1, 3, 40, 32),), dynamo=True, verbose=False
    )
    assert program is not None
    program.save(path, external_data=False)
    openvino.save_model(openvino.Core().read_model(path), path.with_suffix(".xml"))
    settings = [f"distillation.teacher={path.with_suffix('.xml')}", "distillation.live=true"]
    settings += ["distillation.views=50", "distillation.plain=0.25", "augmentation.erase=1.0"]
    settings += ["loss.identity=none", "loss.triplet=false", "loss.regulariser=none"]
    recipe = load_recipe("prid-2011", [*SMALL, "start=random", *settings])
    experiment = plan_experiment(recipe, drawn)
    [split] = choose_splits(experiment.dataset, "0")

    teacher = ask_teacher(experiment, [split], tmp_path / "said", Listener(), "cpu")
    job = make_job(experiment, split, seed=0, device="cpu", listener=Listener(), save_every_s=99,
                   teacher=teacher)  # fmt: skip
    trainer = Trainer(job, RunFolder(tmp_path / "run"))
    batch = next(trainer.loader.epoch(0))
    told = trainer._teach(batch, batch.clips)

    assert isinstance(teacher, LiveTeacher)
    assert not (tmp_path / "said").exists()
    assert max(view for views in batch.views for view in views) > 1
    assert told is not None
    assert torch.equal(told, teacher.see(batch.clips))
    assert trainer.run() is not None
    assert load_checkpoint(tmp_path / "run" / "model.safetensors").provenance["steps"] > 0


def test_a_teacher_that_would_be_drawn_is_refused(drawn: Path, tmp_path: Path) -> None:
    """With another head than that of the weights, what it says would come from nowhere."""
    recipe = started(tmp_path, "data.layout=prid-2011", "network.head=16")
    experiment = plan_experiment(recipe, drawn)

    with pytest.raises(TeacherError, match=r"has another network\.head"):
        ask_teacher(experiment, experiment.dataset.splits[:1], tmp_path / "said", Listener())


def test_random_weights_are_no_teacher(drawn: Path, tmp_path: Path) -> None:
    recipe = started(tmp_path, "data.layout=prid-2011", "start=random")
    experiment = plan_experiment(recipe, drawn)

    with pytest.raises(TeacherError, match="expected weights to begin with"):
        ask_teacher(experiment, experiment.dataset.splits[:1], tmp_path / "said", Listener())


def test_a_neck_does_not_go_with_what_a_run_begins_with(tmp_path: Path) -> None:
    """Teacher and student would be compared on two sides of it."""
    with pytest.raises(RecipeError, match="expected none with the teacher"):
        started(tmp_path, "network.neck=true")
