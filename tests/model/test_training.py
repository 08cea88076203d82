"""The training loop, on small drawn frames and the small backbone."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from model.checkpoint import Checkpoint, load_checkpoint
from model.datasets.tracklets import Split, Tracklet
from model.errors import DatasetError, TrainingError
from model.frames import choose_frames
from model.learner import Learner
from model.recipe import Recipe, load_recipe
from model.runs import STATE, Moment, RunFolder
from model.teacher_cache import TeacherEmbeddings
from model.training import Job, Listener, Progress, Trainer, _Unread, count_cells

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "start=random",
    "network.backbone=conv5",
    "preprocessing.height=64",
    "preprocessing.width=32",
    "batch.identities=3",
    "batch.frames=2",
    "optimiser.precision=fp32",
    "optimiser.milestones=[2]",
    "optimiser.epochs=4",
    "optimiser.rate=1e-3",
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    """Small networks gain nothing from more, and other tests share the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(*overrides: str) -> Recipe:
    return load_recipe("folder", [*SMALL, *overrides])


def draw(root: Path, identities: int = 6, cameras: int = 2, frames: int = 4) -> list[Tracklet]:
    """People as coloured noise: an identity is a colour, a camera a brightness."""
    drawn = []
    for person in range(identities):
        colour = np.random.default_rng(person).uniform(40, 200, 3)
        for camera in range(cameras):
            rng = np.random.default_rng([person, camera])
            folder = root / f"p{person}" / f"c{camera}"
            folder.mkdir(parents=True)
            paths = []
            for number in range(frames):
                pixels = colour * (0.8 + 0.3 * camera) + rng.normal(0, 25, (64, 32, 3))
                paths.append(folder / f"{number}.png")
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1])
            drawn.append(Tracklet(f"p{person}", f"c{camera}", "", tuple(paths)))
    return drawn


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Split:
    train = tuple(draw(tmp_path_factory.mktemp("people")))
    return Split("0", train, (), (), "drawn")


def looking(people: Split) -> tuple[Recipe, TeacherEmbeddings]:
    """All that the bundled weights were trained with, and a teacher that says anything."""
    options = recipe(
        *("batch.draw=clips", "loss.identity=none", "loss.triplet=false", "loss.regulariser=none"),
        *("distillation.teacher=t.onnx", "distillation.views=3", "distillation.projection=false"),
        *("network.head=5", "network.temporal=agreement", "network.unit=true"),
        *("optimiser.schedule=cosine", "augmentation.jitter=0.1"),
    )
    frames = sorted(path for one in people.train for path in one.frames)
    said = np.random.default_rng(0).normal(size=(3, len(frames), 5)).astype(np.float16)
    return options, TeacherEmbeddings("teacher-0", frames, said)


class StopAt(Listener):
    """Sends this process a signal after one of the steps, as a person or a scheduler would."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def progress(self, progress: Progress) -> None:
        if progress.step == self.step:
            os.kill(os.getpid(), self.number)


class Heard(Listener):
    def __init__(self) -> None:
        self.steps: list[Progress] = []
        self.warnings: list[str] = []

    def progress(self, progress: Progress) -> None:
        self.steps.append(progress)

    def warned(self, text: str) -> None:
        self.warnings.append(text)


def train(
    recipe: Recipe,
    split: Split,
    folder: Path,
    listener: Listener | None = None,
    *,
    seed: int = 0,
    **job: Any,
) -> Path | None:
    whole = Job(recipe, split, {"fingerprint": "data-test"}, seed=seed, device="cpu", **job)
    return Trainer(whole, RunFolder(folder), listener=listener).run()


def weights(path: Path | None) -> Mapping[str, torch.Tensor]:
    assert path is not None
    return load_checkpoint(path).network.state_dict()


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_thirty_steps_lower_the_loss(people: Split, tmp_path: Path) -> None:
    heard = Heard()

    train(recipe("optimiser.epochs=15", "optimiser.milestones=[]"), people, tmp_path / "run", heard)

    least = 128 * (1 - 2 / 128) ** 2  # of Eq. 4, which no network can get below
    losses = [one.loss - least for one in heard.steps]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_two_runs_give_the_same_weights(people: Split, tmp_path: Path) -> None:
    first = train(recipe(), people, tmp_path / "first", workers=1)
    second = train(recipe(), people, tmp_path / "second", workers=3)

    assert same(weights(first), weights(second))


def test_another_seed_gives_other_weights(people: Split, tmp_path: Path) -> None:
    first = train(recipe(), people, tmp_path / "first")
    second = train(recipe(), people, tmp_path / "second", seed=1)

    assert not same(weights(first), weights(second))


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_a_signal_stopped_goes_on_to_the_same_weights(
    people: Split, tmp_path: Path, step: int, number: signal.Signals
) -> None:
    """Bit for bit, wherever it was stopped: within an epoch and between two."""
    whole = train(recipe(), people, tmp_path / "whole")

    stopped = train(recipe(), people, tmp_path / "halves", StopAt(step, number))
    finished = train(recipe(), people, tmp_path / "halves")

    assert stopped is None
    assert same(weights(whole), weights(finished))


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimiser.ema=0.9", "network.neck=true", "loss.identity=ce_smooth"],
        ["batch.accumulate=2", "optimiser.clip_norm=1.0"],
        ["augmentation.erase=0.5", "augmentation.pad=4", "batch.sampling=chunks"],
        ["optimiser.precision=bf16"],
        # A processor emulates it, slowly.
        pytest.param(["optimiser.precision=fp16", "batch.frames=1"], marks=pytest.mark.slow),
    ],
    ids=["ema-neck", "accumulate-clip", "augmented", "bf16", "fp16"],
)
def test_every_option_resumes_exactly(people: Split, tmp_path: Path, overrides: list[str]) -> None:
    options = recipe(*overrides)
    whole = train(options, people, tmp_path / "whole")

    train(options, people, tmp_path / "halves", StopAt(3))
    finished = train(options, people, tmp_path / "halves")

    assert same(weights(whole), weights(finished))


def test_learning_from_looks_resumes_exactly(people: Split, tmp_path: Path) -> None:
    options, teacher = looking(people)
    whole = train(options, people, tmp_path / "whole", teacher=teacher)

    train(options, people, tmp_path / "halves", StopAt(3), teacher=teacher)
    finished = train(options, people, tmp_path / "halves", teacher=teacher)

    assert same(weights(whole), weights(finished))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(people: Split, tmp_path: Path) -> None:
    """SIGKILL, at three different moments, of the real command."""
    from model.datasets.folder import read_folder

    root = people.train[0].frames[0].parents[2]
    assert len(read_folder(root)) == len(people.train)
    command = [sys.executable, "-m", "service.cli", "train", "folder", "--data", str(root)]
    command += ["--save-every", "0", "--device", "cpu"]
    for override in [*SMALL, "batch.identities=2", "optimiser.epochs=40"]:
        command += ["--set", override]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    whole = tmp_path / "whole"
    subprocess.run([*command, "--output", str(whole)], check=True, env=environment, cwd=ROOT)
    killed, kills = tmp_path / "killed", 0
    for steps in (3, 17, 30):
        process = subprocess.Popen([*command, "--output", str(killed)], env=environment, cwd=ROOT)
        try:
            while process.poll() is None and _saved_step(killed) < steps:
                pass
            kills += process.poll() is None
        finally:
            process.kill()
            process.wait()
    subprocess.run([*command, "--output", str(killed)], check=True, env=environment, cwd=ROOT)

    assert kills == 3
    assert same(weights(whole / "model.safetensors"), weights(killed / "model.safetensors"))


def _saved_step(folder: Path) -> int:
    """Of the saved state, which another process may replace meanwhile: so it is opened once."""
    try:
        with (folder / STATE).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except FileNotFoundError:
        return 0
    _, _, step, _ = json.loads(header["__metadata__"]["moment"])
    return int(step)


NORMALISED = ("network.head=8", "network.unit=true", "within_class.frames=2")


def test_a_run_ends_with_its_head_normalised(people: Split, tmp_path: Path) -> None:
    """Only the head differs from the same run without; nothing in it is longer."""
    plain = train(recipe(*NORMALISED[:2]), people, tmp_path / "plain")
    product = train(recipe(*NORMALISED), people, tmp_path / "normalised")
    assert product is not None

    before, after = weights(plain), weights(product)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight"}
    assert after["head.weight"].norm() < before["head.weight"].norm()
    assert load_checkpoint(product).provenance["normalised_by_people"] == {"": 6}


def test_a_run_without_a_step_normalises_what_it_begins_with(people: Split, tmp_path: Path) -> None:
    begun = train(recipe(*NORMALISED[:2]), people, tmp_path / "begun")
    product = train(
        recipe(*NORMALISED, "optimiser.epochs=0", f"start={begun}", "monitor.every_epochs=1"),
        people,
        tmp_path / "run",
        measure=lambda made: {"length": float(made.network.head.weight.detach().norm())},
    )

    assert product is not None
    assert not same(weights(begun), weights(product))
    assert same(
        {k: v for k, v in weights(begun).items() if k != "head.weight"},
        {k: v for k, v in weights(product).items() if k != "head.weight"},
    )
    told = [row for row in RunFolder(tmp_path / "run").read_log() if "measured" in row]
    assert [row.get("normalised", False) for row in told] == [False, True]
    assert told[1]["length"] < told[0]["length"]


def test_a_run_that_ends_while_it_normalises_does_so_again(people: Split, tmp_path: Path) -> None:
    class Full(Listener):
        def normalised(self, done: int, total: int) -> None:
            raise OSError(errno.ENOSPC, f"no room after {done} of {total}")

    options = recipe(*NORMALISED)
    whole = train(options, people, tmp_path / "whole")
    with pytest.raises(OSError, match="no room"):
        train(options, people, tmp_path / "broken", Full())

    again = train(options, people, tmp_path / "broken")

    assert same(weights(whole), weights(again))


def test_people_of_one_camera_each_are_refused_before_the_first_step(
    people: Split, tmp_path: Path
) -> None:
    train_half = [replace(one, camera=f"c{int(one.identity[1:]) % 2}") for one in people.train]
    alone = replace(people, train=tuple(train_half))

    with pytest.raises(DatasetError, match="at least two cameras saw, got 6 identities"):
        train(recipe(*NORMALISED), alone, tmp_path / "run")

    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_left_as_it_is(people: Split, tmp_path: Path) -> None:
    product = train(recipe(), people, tmp_path / "run")
    assert product is not None
    before = product.stat().st_mtime_ns

    again = train(recipe(), people, tmp_path / "run")

    assert again == product
    assert product.stat().st_mtime_ns == before


def test_the_log_of_a_resumed_run_tells_each_step_once(people: Split, tmp_path: Path) -> None:
    options = recipe("optimiser.epochs=15")

    train(options, people, tmp_path / "run", StopAt(17))
    RunFolder(tmp_path / "run").log({"step": 20, "loss": 1.0})  # as if it had gone on unsaved
    train(options, people, tmp_path / "run")

    assert [row["step"] for row in RunFolder(tmp_path / "run").read_log() if "loss" in row] == [
        10,
        20,
        30,
    ]


def test_a_run_says_what_it_was(people: Split, tmp_path: Path) -> None:
    product = train(recipe(), people, tmp_path / "run", seed=3)

    assert product is not None
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    provenance = load_checkpoint(product).provenance
    assert load_recipe(tmp_path / "run" / "recipe.toml") == recipe()
    assert facts["seed"] == provenance["data"]["seed"] == 3
    assert facts["data"]["fingerprint"] == provenance["data"]["fingerprint"] == "data-test"
    assert facts["versions"]["torch"] == torch.__version__
    assert provenance["recipe"]["network"]["backbone"] == "conv5"
    assert provenance["steps"] == 8
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    row = RunFolder(tmp_path / "run").read_log()[-1]
    assert {"loss", "triplet", "identity", "effective_positions", "coverage_cv2"} <= row.keys()
    assert {"regulariser_excess", "accuracy", "wrong_logit", "rate", "active"} <= row.keys()


def test_another_recipe_does_not_go_on_with_a_run(people: Split, tmp_path: Path) -> None:
    train(recipe(), people, tmp_path / "run", StopAt(1))

    with pytest.raises(TrainingError, match=r"another one \(margin = 0.5\)"):
        train(recipe("loss.margin=0.5"), people, tmp_path / "run")
    with pytest.raises(TrainingError, match="its seed is 0 and now it would be 4"):
        train(recipe(), people, tmp_path / "run", seed=4)


def test_a_folder_with_something_else_in_it_is_refused(people: Split, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")

    with pytest.raises(TrainingError, match="something else in it"):
        train(recipe(), people, tmp_path)


def test_one_camera_is_refused_before_anything_is_written(people: Split, tmp_path: Path) -> None:
    alone = tuple(one for one in people.train if one.camera == "c0")

    with pytest.raises(DatasetError, match="at least two cameras, got 1: c0"):
        train(recipe(), replace(people, train=alone), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_identities_with_a_single_tracklet_are_left_out_with_a_warning(
    people: Split, tmp_path: Path
) -> None:
    heard = Heard()
    fewer = people.train[1:]  # p0 keeps one tracklet

    train(recipe("optimiser.epochs=1"), replace(people, train=fewer), tmp_path / "run", heard)

    assert "1 identities with a single tracklet" in heard.warnings[0]


def test_nothing_but_single_tracklets_is_refused(people: Split, tmp_path: Path) -> None:
    single = tuple(
        one for number, one in enumerate(people.train) if number % 4 in (0, 3)
    )  # p0 in c0, p1 in c1, ...

    with pytest.raises(DatasetError, match="at least two tracklets each"):
        train(recipe(), replace(people, train=single), tmp_path / "run")


def test_a_tracklet_of_one_frame_trains(tmp_path: Path) -> None:
    train_set = tuple(draw(tmp_path / "data", identities=3, frames=1))

    product = train(recipe("optimiser.epochs=1"), Split("0", train_set, (), (), ""), tmp_path / "r")

    assert product is not None


def test_a_broken_frame_is_named_before_the_first_step(tmp_path: Path) -> None:
    drawn = draw(tmp_path / "data")
    drawn[3].frames[1].write_bytes(drawn[3].frames[1].read_bytes()[:60])
    heard = Heard()

    with pytest.raises(DatasetError, match=r"p1/c1/1\.png.*check-data"):
        train(recipe(), Split("0", tuple(drawn), (), (), ""), tmp_path / "run", heard)
    assert not heard.steps


def test_a_frame_that_breaks_later_loses_nothing(
    people: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the frames do not fit in memory, they are read when their turn comes."""
    monkeypatch.setattr("model.loading._MEMORY_SHARE", 0.0)
    drawn = tuple(draw(tmp_path / "data"))
    split = Split("0", drawn, (), (), "")
    whole = train(recipe(), people, tmp_path / "whole")
    broken = drawn[7].frames[2]
    intact = broken.read_bytes()
    broken.write_bytes(intact[:60])

    with pytest.raises(DatasetError, match=r"p3/c1/2\.png; the run is saved at step"):
        train(recipe(), split, tmp_path / "run")
    broken.write_bytes(intact)
    finished = train(recipe(), split, tmp_path / "run")

    assert same(weights(whole), weights(finished))


def test_a_frame_that_breaks_before_the_last_word_loses_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps are done and only the normalisation is left, which reads frames again."""
    monkeypatch.setattr("model.loading._MEMORY_SHARE", 0.0)
    drawn = tuple(draw(tmp_path / "data"))
    split = Split("0", drawn, (), (), "")
    whole = train(recipe(*NORMALISED), split, tmp_path / "whole")
    broken = drawn[7].frames[choose_frames(len(drawn[7].frames), 2)[0]]
    intact = broken.read_bytes()

    class BreaksInTheEnd(Listener):
        def progress(self, progress: Progress) -> None:
            if progress.step == progress.steps:
                broken.write_bytes(intact[:60])

    with pytest.raises(DatasetError, match=rf"{broken.name}; the run is saved at step"):
        train(recipe(*NORMALISED), split, tmp_path / "run", BreaksInTheEnd())
    broken.write_bytes(intact)
    heard = Heard()
    finished = train(recipe(*NORMALISED), split, tmp_path / "run", heard)

    assert heard.steps == []
    assert same(weights(whole), weights(finished))


def test_a_loss_that_is_no_number_stops_with_the_batch_named(
    people: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe(), people, tmp_path / "run", StopAt(3))
    forward = Learner.forward

    def poisoned(self: Learner, *arguments: Any) -> Any:
        learned = forward(self, *arguments)
        assert learned.logits is not None
        return learned._replace(logits=learned.logits * float("nan"))

    monkeypatch.setattr(Learner, "forward", poisoned)
    with pytest.raises(TrainingError, match=r"the loss is nan after 3 steps.* of p\d/c\d, p"):
        train(recipe(), people, tmp_path / "run")

    assert _saved_step(tmp_path / "run") == 3


def test_a_full_disk_leaves_the_state_that_was_saved_before(
    people: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(recipe(), people, tmp_path / "whole")
    train(recipe(), people, tmp_path / "run", StopAt(3))

    def full(_: object, path: Path, **_more: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("model.runs.save_file", full)
        with pytest.raises(TrainingError, match="No space left on device"):
            train(recipe(), people, tmp_path / "run", save_every_s=0.0)
    assert _saved_step(tmp_path / "run") == 3
    assert not [one for one in (tmp_path / "run").iterdir() if one.name.startswith(".aside")]

    finished = train(recipe(), people, tmp_path / "run")
    assert same(weights(whole), weights(finished))


@pytest.mark.parametrize("save_every_s", [0.0, 1000.0])
def test_weights_that_are_no_numbers_are_never_kept(
    people: Split, tmp_path: Path, save_every_s: float
) -> None:
    """Neither as the state, whose predecessor survives, nor as the product."""
    train(recipe("optimiser.epochs=1"), people, tmp_path / "fine", StopAt(1))
    before = (tmp_path / "fine" / "state.safetensors").read_bytes()
    folder = RunFolder(tmp_path / "fine")

    class Poison(Listener):
        def progress(self, progress: Progress) -> None:
            assert progress.step == 2
            with torch.no_grad():
                next(trainer.learner.network.parameters()).fill_(float("nan"))

    job = Job(
        recipe("optimiser.epochs=1"),
        people,
        {"fingerprint": "data-test"},
        device="cpu",
        save_every_s=save_every_s,
    )
    trainer = Trainer(job, folder, listener=Poison())
    with pytest.raises(TrainingError, match="NaN or infinity after 2 steps; what was saved before"):
        trainer.run()

    assert (tmp_path / "fine" / "state.safetensors").read_bytes() == before
    assert not folder.is_finished


def test_a_run_that_was_killed_while_it_began_begins_again(people: Split, tmp_path: Path) -> None:
    whole = train(recipe(), people, tmp_path / "whole")
    half = tmp_path / "half"
    (half / ".aside-x1").mkdir(parents=True)
    (half / ".aside-x1" / "recipe.toml").write_text("name = ")
    (half / "run.json").write_text("{}")

    finished = train(recipe(), people, half)

    assert same(weights(whole), weights(finished))
    assert not [one for one in half.iterdir() if one.name.startswith(".aside")]


def test_a_resumed_run_does_not_need_the_weights_that_it_began_with(
    people: Split, tmp_path: Path
) -> None:
    """And still says which they were, whatever lies under their name by then."""
    first = train(recipe(), people, tmp_path / "first")
    assert first is not None
    options = recipe(f"start={first}")
    train(options, people, tmp_path / "second", StopAt(3))
    fingerprint = load_checkpoint(first).fingerprint
    first.unlink()

    finished = train(options, people, tmp_path / "second")

    assert finished is not None
    assert load_checkpoint(finished).provenance["start"]["checkpoint"] == fingerprint


def test_a_damaged_state_is_refused(people: Split, tmp_path: Path) -> None:
    train(recipe(), people, tmp_path / "run", StopAt(3))
    state = tmp_path / "run" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])

    with pytest.raises(TrainingError, match="expected a training state"):
        train(recipe(), people, tmp_path / "run")


def test_the_curve_is_measured_when_the_recipe_says_so(people: Split, tmp_path: Path) -> None:
    asked: list[str] = []

    def measure(checkpoint: Checkpoint) -> Mapping[str, float]:
        asked.append(checkpoint.fingerprint)
        return {"rank_1": 0.5}

    options = recipe("monitor.every_epochs=3")
    product = train(options, people, tmp_path / "run", measure=measure)

    rows = [row for row in RunFolder(tmp_path / "run").read_log() if "rank_1" in row]
    assert [row["epoch"] for row in rows] == [0, 3, 4]
    assert product is not None
    assert asked[-1] == load_checkpoint(product).fingerprint
    assert len(set(asked)) == 3


class StopIn(Listener):
    """Stops the run inside its measurement after an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.measured: list[int] = []

    def __call__(self, _: Checkpoint) -> Mapping[str, float]:
        self.measured.append(len(self.measured))
        if self.measured[-1] == self.epoch:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"rank_1": 0.5}


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_signal_while_measuring_loses_nothing(people: Split, tmp_path: Path, epoch: int) -> None:
    options = recipe("monitor.every_epochs=1")
    whole = train(options, people, tmp_path / "whole", measure=StopIn(-1))

    stopped = train(options, people, tmp_path / "run", measure=StopIn(epoch))
    state = RunFolder(tmp_path / "run").load_state()
    finished = train(options, people, tmp_path / "run", measure=StopIn(-1))

    assert stopped is None
    assert state is not None
    assert state[1].epoch == epoch
    assert same(weights(whole), weights(finished))
    rows = RunFolder(tmp_path / "run").read_log()
    assert [row["measured"] for row in rows if "measured" in row] == [0, 1, 2, 3, 4]


def test_a_stop_at_the_end_of_an_epoch_makes_up_its_measurement(
    people: Split, tmp_path: Path
) -> None:
    options = recipe("monitor.every_epochs=1")

    train(options, people, tmp_path / "run", StopAt(4), measure=StopIn(-1))
    train(options, people, tmp_path / "run", measure=StopIn(-1))

    rows = RunFolder(tmp_path / "run").read_log()
    assert [row["measured"] for row in rows if "measured" in row] == [0, 1, 2, 3, 4]


def test_a_signal_in_the_last_step_comes_too_late_to_stop(people: Split, tmp_path: Path) -> None:
    assert train(recipe(), people, tmp_path / "run", StopAt(8)) is not None


@pytest.mark.parametrize(
    ("backbone", "size", "cells"),
    [
        ("resnet50", (256, 128), 128),
        ("resnet50", (100, 50), 28),
        ("conv5", (64, 32), 128),
        ("conv5", (50, 34), 117),
    ],
)
def test_cells_are_those_of_the_maps(backbone: str, size: tuple[int, int], cells: int) -> None:
    height, width = size
    settings = [f"network.backbone={backbone}", f"preprocessing.height={height}"]

    assert count_cells(recipe(*settings, f"preprocessing.width={width}")) == cells


def test_averaged_weights_are_what_is_kept(people: Split, tmp_path: Path) -> None:
    plain = train(recipe(), people, tmp_path / "plain")
    averaged = train(recipe("optimiser.ema=0.5"), people, tmp_path / "averaged")

    assert not same(weights(plain), weights(averaged))


def test_accumulated_batches_make_fewer_steps(people: Split, tmp_path: Path) -> None:
    heard = Heard()

    train(recipe("batch.accumulate=2"), people, tmp_path / "run", heard)

    assert len(heard.steps) == heard.steps[-1].steps == 4


def test_the_time_left_counts_down_to_nothing(people: Split, tmp_path: Path) -> None:
    heard = Heard()

    train(recipe(), people, tmp_path / "run", heard)

    assert heard.steps[-1].left_s == 0
    assert all(one.left_s > 0 for one in heard.steps[:-1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_trains_and_takes_up_a_run(people: Split, tmp_path: Path, precision: str) -> None:
    """Not bit for bit there: its sums have no fixed order."""
    options = recipe(f"optimiser.precision={precision}")
    heard = Heard()

    def run(listener: Listener) -> Path | None:
        job = Job(options, people, {}, device="cuda")
        return Trainer(job, RunFolder(tmp_path / "run"), listener=listener).run()

    assert run(StopAt(3)) is None
    product = run(heard)

    assert heard.steps[0].step == 4
    assert all(tensor.isfinite().all() for tensor in weights(product).values())


@pytest.mark.parametrize(("unit", "same"), [("true", True), ("false", False)])
def test_the_triplet_loss_compares_what_will_be_compared(
    people: Split, tmp_path: Path, unit: str, same: bool
) -> None:
    """With embeddings of length 1 it does not matter how long the head makes them."""
    losses = []
    for scale in (1.0, 10.0):
        chosen = recipe(f"network.unit={unit}", "network.head=8", "loss.identity=none")
        job = Job(chosen, people, data={}, device="cpu")
        trainer = Trainer(job, RunFolder(tmp_path / f"{unit}-{scale}"))
        head = trainer.learner.network.head
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            head.weight.mul_(scale)
        losses.append(trainer._loss(next(trainer.loader.epoch(0)), rate=0.0).item())

    assert (losses[0] == pytest.approx(losses[1], rel=1e-4)) is same


def test_a_student_is_told_of_the_very_looks_that_it_sees(people: Split, tmp_path: Path) -> None:
    options, teacher = looking(people)
    trainer = Trainer(Job(options, people, data={}, teacher=teacher), RunFolder(tmp_path / "run"))

    batch = next(trainer.loader.epoch(0))
    told = trainer._teach(batch, batch.clips)

    assert told is not None
    assert {view for views in batch.views for view in views} == {0, 1, 2}
    for row, number, places, views in zip(
        told, batch.tracklets, batch.positions, batch.views, strict=True
    ):
        frames = [trainer.tracklets[number].frames[place] for place in places]
        assert np.array_equal(row.numpy(), teacher.of(frames, views))


def test_a_run_does_not_go_on_with_looks_that_are_drawn_otherwise(
    people: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, teacher = looking(people)
    train(options, people, tmp_path / "run", StopAt(1), teacher=teacher)
    monkeypatch.setattr("model.training.VIEWS_FORMAT", 99)

    with pytest.raises(TrainingError, match="its looks is 4 and now it would be 99"):
        train(options, people, tmp_path / "run", teacher=teacher)


def test_batch_normalisation_may_keep_what_it_has(people: Split, tmp_path: Path) -> None:
    """Its statistics stay; what it learns beside them does not."""
    before = weights(train(recipe(), people, tmp_path / "first"))
    start = f"start={tmp_path / 'first' / 'model.safetensors'}"

    kept = weights(
        train(recipe(start, "optimiser.keep_batch_norm=true"), people, tmp_path / "kept")
    )
    moved = weights(train(recipe(start), people, tmp_path / "moved"))

    statistics = [name for name in before if "running" in name]
    assert statistics
    assert all(torch.equal(kept[name], before[name]) for name in statistics)
    assert not any(torch.equal(moved[name], before[name]) for name in statistics)
    learned = [name for name in before if name.startswith("backbone") and "running" not in name]
    assert any(not torch.equal(kept[name], before[name]) for name in learned)


def test_what_is_kept_may_lie_between_start_and_end(people: Split, tmp_path: Path) -> None:
    """Also after an interruption, when the start is read again."""
    before = weights(train(recipe(), people, tmp_path / "first"))
    start = f"start={tmp_path / 'first' / 'model.safetensors'}"
    after = weights(train(recipe(start), people, tmp_path / "after"))
    options = recipe(start, "optimiser.blend=0.25")

    assert train(options, people, tmp_path / "between", StopAt(2)) is None
    between = weights(train(options, people, tmp_path / "between"))

    for name, tensor in between.items():
        if tensor.is_floating_point():
            wanted = 0.75 * after[name] + 0.25 * before[name]
            assert torch.allclose(tensor, wanted, atol=1e-6)
            assert not torch.equal(tensor, after[name]) or torch.equal(after[name], before[name])


def test_on_a_gpu_a_loss_is_read_a_step_later(people: Split, tmp_path: Path) -> None:
    """So no step waits for its own loss; one that is no number still ends the run, by its name."""
    trainer = Trainer(Job(recipe(), people, data={}, device="cpu"), RunFolder(tmp_path / "run"))
    batch = next(trainer.loader.epoch(0))
    trainer.device = torch.device("cuda")

    def read(step: int, loss: float) -> float:
        losses = [torch.tensor(loss), torch.tensor(loss + 1)]
        return trainer._read(_Unread(losses, [batch, batch], Moment(step=step)))

    assert [read(0, 1.0), read(1, 2.0), read(2, 3.0)] == [1.5, 1.5, 2.5]
    assert read(3, float("nan")) == 3.5
    with pytest.raises(TrainingError, match="the loss is nan after 3 steps"):
        trainer._read_rest()
    read(4, 1.0)
    with pytest.raises(TrainingError, match="the loss is nan after 5 steps"):
        [read(5, float("nan")), read(6, 1.0)]
