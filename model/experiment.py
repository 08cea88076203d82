"""From a recipe and a folder of tracklets to the runs of an experiment: one a split and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model.checkpoint import IMAGENET, Checkpoint, make_checkpoint
from model.datasets.checking import check_dataset
from model.datasets.findings import shorten
from model.datasets.layouts import fingerprint_dataset, fingerprint_parts, read_dataset
from model.datasets.mixed import MixedDataset
from model.datasets.tracklets import Dataset, Split
from model.distillation import DistillationConfig
from model.embedder import Embedder, choose_device
from model.errors import TeacherError, TrainingError
from model.evaluation import ClipChoice, evaluate_split, resolve_protocol
from model.evaluation_plan import read_choice
from model.learner import start_network
from model.live_teacher import LiveTeacher
from model.recipe import RANDOM_START, Recipe
from model.runs import RunFolder, describe_split
from model.teacher import (
    START,
    Teacher,
    is_openvino,
    load_teacher,
    teach_by_checkpoint,
)
from model.teacher_cache import TeacherEmbeddings, cache_embeddings
from model.training import Job, Listener


@dataclass(frozen=True, slots=True)
class Experiment:
    """A recipe on a data set.

    Args:
        recipe: How to train.
        dataset: On what.
        fingerprint: Of the data set.
        parts: Layout and fingerprint of each part of a mix, by its name.
    """

    recipe: Recipe
    dataset: Dataset
    fingerprint: str
    parts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def plan_experiment(recipe: Recipe, root: Path, *, split_seed: int = 0) -> Experiment:
    """Read the data that a recipe is for.

    Args:
        recipe: How to train.
        root: Folder of the data set.
        split_seed: Of random halves, where no published splits are there.

    Raises:
        DatasetError: The folder is not laid out as the recipe says.
    """
    dataset = read_dataset(
        root,
        recipe.data.layout,
        seed=split_seed,
        prid_subset=recipe.data.prid_subset,
        test_share=recipe.data.test_share,
    )
    parts: dict[str, dict[str, str]] = {}
    if isinstance(dataset, MixedDataset):
        parts = {
            name: {"layout": dataset.parts[name].layout, "fingerprint": fingerprint}
            for name, fingerprint in fingerprint_parts(dataset).items()
        }
    return Experiment(recipe, dataset, fingerprint_dataset(dataset), parts)


def tell_oddities(experiment: Experiment, listener: Listener) -> None:
    """Warn of what `passerby check-data` would: people left out are a smaller training set."""
    dataset = experiment.dataset
    report = check_dataset(dataset.root, experiment.recipe.data.layout, decode=False)
    odd = [one for one in report.findings if one.severity == "warning"]
    if odd:
        more = f" and {len(odd) - 1} more oddities" if len(odd) > 1 else ""
        listener.warned(
            f"{odd[0].where}: {odd[0].what}{more}; `passerby check-data` lists them all"
        )
    people = {one.identity for one in dataset.tracklets}
    used = {one.identity for split in dataset.splits for one in split.train + split.gallery}
    used |= {one.identity for split in dataset.splits for one in split.query}
    if left_out := len(people - used):
        listener.warned(f"{left_out} of {len(people)} identities are in no split")


def choose_splits(dataset: Dataset, text: str) -> list[Split]:
    """Read a choice of splits like ``0``, ``0,3`` or ``0-9``.

    Raises:
        EvaluationError: It names none.
        TrainingError: The data set has no such split.
    """
    known = {split.name: split for split in dataset.splits}
    chosen = read_choice(text)
    if unknown := [name for name in chosen if name not in known]:
        raise TrainingError(f"expected splits of {', '.join(known)}, got {shorten(unknown)}")
    return [known[name] for name in chosen]


def run_folders(
    output: Path, splits: Sequence[Split], seeds: Sequence[int]
) -> dict[tuple[str, int], RunFolder]:
    """Where each run of an experiment lives: a single one in the folder itself."""
    if len(splits) * len(seeds) == 1:
        return {(splits[0].name, seeds[0]): RunFolder(output)}
    return {
        (split.name, seed): RunFolder(output / f"split-{split.name}-seed-{seed}")
        for split in splits
        for seed in seeds
    }


def make_job(
    experiment: Experiment,
    split: Split,
    *,
    seed: int,
    device: str,
    listener: Listener,
    save_every_s: float,
    teacher: TeacherEmbeddings | LiveTeacher | None,
) -> Job:
    """Everything that one run needs."""
    recipe = experiment.recipe
    if recipe.start == IMAGENET:
        listener.said("start: torchvision's ImageNet weights, downloaded unless cached")
    data = describe_split(
        split,
        layout=experiment.dataset.layout,
        fingerprint=experiment.fingerprint,
        parts=experiment.parts,
    )
    return Job(
        recipe,
        split,
        data,
        seed=seed,
        device=device,
        teacher=teacher,
        measure=_Measure(experiment, split, device) if split.query else None,
        save_every_s=save_every_s,
    )


def ask_teacher(
    experiment: Experiment,
    splits: Sequence[Split],
    folder: Path,
    listener: Listener,
    device: str = "auto",
) -> TeacherEmbeddings | LiveTeacher | None:
    """What the recipe's teacher says of every training frame, or the teacher itself if it is live.

    Args:
        experiment: Whose recipe names the teacher.
        splits: Those that are trained on; they share one pass over the frames.
        folder: Where embeddings are kept, unless the recipe says where.
        listener: Hears how far it is.
        device: Of the student; a live teacher computes there.

    Returns:
        None without a teacher.

    Raises:
        TeacherError: The teacher cannot be read or run.
    """
    config = experiment.recipe.distillation
    if config is None:
        return None
    teacher = _find_teacher(experiment.recipe, config, choose_device(device))
    if config.views > 1 and len(splits) > 1:
        raise TrainingError(
            f"expected one split at a time with distillation.views, whose looks borrow from all "
            f"training frames, got {len(splits)}"
        )
    cache = Path(config.cache) if config.cache else folder
    trained = [one for split in splits for one in split.train]
    cameras = {path: one.camera for one in trained for path in one.frames}
    frames = sorted(cameras)
    if config.live:
        listener.said(f"the teacher runs beside the student and sees {len(frames)} frames")
        return LiveTeacher(teacher, frames, cameras, config.views)
    listener.said(f"the teacher's embeddings of {len(frames)} frames are kept in {cache}")
    return cache_embeddings(
        teacher, frames, cache, listener.loaded, views=config.views, cameras=cameras
    )


def _find_teacher(recipe: Recipe, config: DistillationConfig, device: torch.device) -> Teacher:
    if config.teacher != START:
        # What is cached is the same wherever it was made; a live teacher must keep up.
        beside = config.live and device.type == "cuda" and is_openvino(config.teacher)
        return load_teacher(
            config.teacher,
            channels=config.channels,
            scale=config.scale,
            mean=config.mean,
            std=config.std,
            precision=config.precision,
            runtime="torch" if beside else "auto",
            device=device,
        )
    if recipe.start == RANDOM_START:
        raise TeacherError('expected weights to begin with, for the teacher "start", got random')
    network, _ = start_network(recipe, seed=0)
    other, _ = start_network(recipe, seed=1)
    if make_checkpoint(network).fingerprint != make_checkpoint(other).fingerprint:
        raise TeacherError(
            'expected weights for all of the network, for the teacher "start", got some that are '
            f"drawn: {recipe.start} has another network.head"
        )
    return teach_by_checkpoint(make_checkpoint(network, recipe.preprocessing))


@dataclass(frozen=True, slots=True)
class _Measure:
    """Evaluates a checkpoint on a split's test identities, as `passerby evaluate` does.

    Of a mix, each part that tests anybody is measured alone, by its own protocol: its cameras never
    saw the people of another.
    """

    experiment: Experiment
    split: Split
    device: str

    def __call__(self, checkpoint: Checkpoint) -> Mapping[str, float]:
        embedder = Embedder(checkpoint, device=self.device)
        dataset = self.experiment.dataset
        if not isinstance(dataset, MixedDataset):
            return self._evaluate(embedder, self.split, dataset.layout)
        return {
            f"{name}/{measure}": value
            for name, split in dataset.part_splits(self.split).items()
            if split.query
            for measure, value in self._evaluate(
                embedder, split, dataset.parts[name].layout
            ).items()
        }

    def _evaluate(self, embedder: Embedder, split: Split, layout: str) -> dict[str, float]:
        measures = evaluate_split(
            embedder,
            split,
            protocol=resolve_protocol(layout),
            choice=ClipChoice("even", self.experiment.recipe.monitor.frames),
        )
        return {
            "rank_1": measures.rank_1,
            "rank_5": measures.rank_5,
            "mAP": measures.mean_average_precision,
        }
