"""From a recipe and a folder of tracklets to the runs of an experiment: one a split and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.checkpoint import IMAGENET, Checkpoint
from model.datasets.checking import check_dataset
from model.datasets.findings import shorten
from model.datasets.layouts import fingerprint_dataset, read_dataset
from model.datasets.tracklets import Dataset, Split
from model.distillation import TeacherEmbeddings, cache_embeddings, load_teacher
from model.embedder import Embedder
from model.errors import TrainingError
from model.evaluation import ClipChoice, evaluate_split, resolve_protocol
from model.evaluation_plan import read_choice
from model.recipe import Recipe
from model.runs import RunFolder, describe_split
from model.training import Job, Listener


@dataclass(frozen=True, slots=True)
class Experiment:
    """A recipe on a data set.

    Args:
        recipe: How to train.
        dataset: On what.
        fingerprint: Of the data set.
    """

    recipe: Recipe
    dataset: Dataset
    fingerprint: str


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
        root, recipe.data.layout, seed=split_seed, prid_subset=recipe.data.prid_subset
    )
    return Experiment(recipe, dataset, fingerprint_dataset(dataset))


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
    teacher: TeacherEmbeddings | None,
) -> Job:
    """Everything that one run needs."""
    recipe = experiment.recipe
    if recipe.start == IMAGENET:
        listener.said("start: torchvision's ImageNet weights, downloaded unless cached")
    data = describe_split(
        split, layout=experiment.dataset.layout, fingerprint=experiment.fingerprint
    )
    return Job(
        recipe,
        split,
        data,
        seed=seed,
        device=device,
        teacher=teacher,
        measure=_Measure(experiment, split, device),
        save_every_s=save_every_s,
    )


def ask_teacher(
    experiment: Experiment, splits: Sequence[Split], folder: Path, listener: Listener
) -> TeacherEmbeddings | None:
    """What the recipe's teacher says of every training frame; None without a teacher.

    Args:
        experiment: Whose recipe names the teacher.
        splits: Those that are trained on; they share one pass over the frames.
        folder: Where embeddings are kept, unless the recipe says where.
        listener: Hears how far it is.

    Raises:
        TeacherError: The teacher cannot be read or run.
    """
    config = experiment.recipe.distillation
    if config is None:
        return None
    teacher = load_teacher(
        config.teacher,
        channels=config.channels,
        scale=config.scale,
        mean=config.mean,
        std=config.std,
    )
    cache = Path(config.cache) if config.cache else folder
    frames = sorted({path for split in splits for one in split.train for path in one.frames})
    listener.said(f"the teacher's embeddings of {len(frames)} frames are kept in {cache}")
    return cache_embeddings(teacher, frames, cache, listener.loaded)


@dataclass(frozen=True, slots=True)
class _Measure:
    """Evaluates a checkpoint on a split's test identities, as `passerby evaluate` does."""

    experiment: Experiment
    split: Split
    device: str

    def __call__(self, checkpoint: Checkpoint) -> Mapping[str, float]:
        measures = evaluate_split(
            Embedder(checkpoint, device=self.device),
            self.split,
            protocol=resolve_protocol(self.experiment.dataset.layout),
            choice=ClipChoice("even", self.experiment.recipe.monitor.frames),
        )
        return {
            "rank_1": measures.rank_1,
            "rank_5": measures.rank_5,
            "mAP": measures.mean_average_precision,
        }
