"""What an evaluation consists of, planned before any work: checkpoints, splits, who was seen.

A *unit* is one checkpoint on one split (and with one seed, where frames are drawn).
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from model.checkpoint import load_checkpoint, trained_identities, trainings
from model.datasets.findings import shorten
from model.datasets.layouts import LAYOUTS
from model.datasets.market1501 import DISTRACTOR, is_plain
from model.datasets.mixed import MixedDataset
from model.datasets.splits import UNSEEN, divide_unseen
from model.datasets.tracklets import Dataset, Split, natural_key
from model.embedder import Precision, choose_device, choose_precision
from model.errors import DatasetError, EvaluationError, RecipeError
from model.evaluation import (
    ClipChoice,
    ProtocolName,
    plan_comparisons,
    resolve_protocol,
    tracklet_name,
)
from model.recipe import parse_recipe, without_places
from model.runs import FACTS, PRODUCT

FORMAT = "passerby-evaluation-1"
_PUBLISHED = frozenset(LAYOUTS) - {"folder", "mixed"}  # their names mean the same people everywhere
_ANY_NAME = ("utf-8", "surrogateescape")  # file names need not be text
_LONGEST_NAME = 120  # letters of a unit's file name; file systems take 255 bytes


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How to evaluate.

    Args:
        choice: Which frames of a tracklet are used.
        protocol: What is compared with what; "auto" follows the layout.
        rerank: Whether to re-rank by k-reciprocal neighbours.
        unit: Whether embeddings are scaled to length 1 first, so that distances rank as cosines.
        allow_seen: Whether to go on where a checkpoint was trained on who is tested.
    """

    choice: ClipChoice = field(default_factory=ClipChoice)
    protocol: ProtocolName = "auto"
    rerank: bool = False
    unit: bool = False
    allow_seen: bool = False


@dataclass(frozen=True)
class EvaluationTask:
    """What to evaluate on what.

    Args:
        source: A checkpoint file, evaluated on every split asked for; a run folder, evaluated on
            the split it was trained on; or a folder of run folders, each on its own.
        dataset: The data.
        fingerprint: Of the data, from `model.datasets.layouts.fingerprint_dataset`.
        output: Folder to write to; an evaluation that is there goes on.
        options: How.
        splits: Names of the splits asked for; None for all. "unseen" alone is the split of
            everybody whom the checkpoint was not trained on.
        seeds: Of drawn frames; more than one only with ``frames="random"``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: Of the backbone.
    """

    source: Path
    dataset: Dataset
    fingerprint: str
    output: Path
    options: EvaluationOptions = field(default_factory=EvaluationOptions)
    splits: Sequence[str] | None = None
    seeds: Sequence[int] = (0,)
    device: str = "auto"
    precision: Precision = "auto"

    @cached_property
    def protocol(self) -> str:
        """What the protocol asked for means for this data."""
        return resolve_protocol(self.dataset.layout, self.options.protocol)

    @cached_property
    def resolved_precision(self) -> str:
        """What the precision asked for means for this device."""
        return choose_precision(self.precision, choose_device(self.device))

    @cached_property
    def stamp(self) -> str:
        """What embeddings that are kept here were made of, (12,) hex digits.

        Names, sizes and times of change of all frames. The fingerprint has no times, because a
        copy is the same data; but here a frame that was changed and kept its size must not go
        unnoticed.

        Raises:
            EvaluationError: A frame has gone.
        """
        digest = hashlib.sha256()
        for frame in sorted(frame for one in self.dataset.tracklets for frame in one.frames):
            try:
                found = frame.stat()
            except OSError as error:
                raise EvaluationError(f"expected a frame at {frame}, got: {error}") from error
            name = os.path.relpath(frame, self.dataset.root)
            digest.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(*_ANY_NAME))
        return digest.hexdigest()[:12]


class EvaluationListener:
    """Hears of an evaluation; this one ignores it."""

    def progress(self, done: int, total: int) -> None:
        """After each tracklet that had to be embedded, and at the start with 0."""

    def said(self, text: str) -> None:
        """Something worth a line."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint that is evaluated, without its weights.

    Args:
        name: Of its file or of its run folder.
        path: Its file.
        fingerprint: The model's.
        provenance: What the file says about its weights.
        network: Its configuration.
        is_run: Whether it stands in a run folder, and so has a split of its own.
    """

    name: str
    path: Path
    fingerprint: str
    provenance: Mapping[str, Any]
    network: Mapping[str, Any]
    is_run: bool

    @property
    def data(self) -> Mapping[str, Any]:
        """What the checkpoint says about the data that it was trained on."""
        data = self.provenance.get("data")
        return data if isinstance(data, Mapping) else {}

    @property
    def trainings(self) -> list[Mapping[str, Any]]:
        """What it says about every training that its weights have been through, the last first.

        A training on a mix counts as one on each of its parts.
        """
        return trainings(self.provenance)


@dataclass(frozen=True, slots=True)
class Unit:
    """One checkpoint on one split with one seed of drawn frames.

    Args:
        subject: Which checkpoint.
        split: Which split.
        seed: Of the training; None where the checkpoint names none.
        frame_seed: Of drawn frames; None where none are drawn.
        seen: Tested identities that the checkpoint was trained on.
        namesakes: How many tested people have a name that it was trained on in another folder.
        file: Name of its file in the folder of units.
        key: All that decides its outcome.
    """

    subject: Subject
    split: Split
    seed: int | None
    frame_seed: int | None
    seen: tuple[str, ...]
    namesakes: int
    file: str
    key: dict[str, Any]


def read_choice(text: str) -> list[str]:
    """Read a choice of splits like ``0``, ``0,3`` or ``0-9``, each once, in order.

    Raises:
        EvaluationError: It names none.
    """
    names: list[str] = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        bounds = re.fullmatch(r"([0-9]{1,6})-([0-9]{1,6})", part)
        if bounds:
            names += [str(number) for number in range(int(bounds[1]), int(bounds[2]) + 1)]
        else:
            names.append(part)
    if not names:
        raise EvaluationError(f"expected a choice like 0, 0,3 or 0-9, got {text!r}")
    return list(dict.fromkeys(names))


def read_seeds(text: str) -> list[int]:
    """Read a choice of seeds like ``0``, ``0,3`` or ``0-9``.

    Raises:
        EvaluationError: It holds none, or something that is no number.
    """
    names = read_choice(text)
    if not all(name.isdecimal() for name in names):
        raise EvaluationError(f"expected seeds like 0, 0,3 or 0-9, got {text!r}")
    return [int(name) for name in names]


def plan_units(task: EvaluationTask, listener: EvaluationListener | None = None) -> list[Unit]:
    """Find what is to be evaluated, and refuse before any work what cannot be.

    Raises:
        CheckpointError: A checkpoint is missing, damaged or of another architecture.
        EvaluationError: The data are a mix, a split asked for is not there, a run has no split
            here, nobody is left whom a checkpoint was not trained on, or it was trained on who is
            tested.
    """
    _refuse_mix(task.dataset)
    if not task.seeds or (len(set(task.seeds)) > 1 and task.options.choice.frames != "random"):
        raise EvaluationError(
            f"expected one seed, got {len(set(task.seeds))}: with frames "
            f"{task.options.choice.frames!r} nothing is drawn; several need --frames random"
        )
    listener = listener or EvaluationListener()
    if task.splits is not None and UNSEEN in task.splits:
        subjects = _find_unseen(task, listener)
    else:
        subjects = _find_splits(task, listener)
    units = [
        _plan_unit(task, subject, split, seed)
        for subject, splits in subjects
        for split in splits
        for seed in dict.fromkeys(task.seeds)
    ]
    if namesakes := max(unit.namesakes for unit in units):
        listener.said(f"note: {describe_namesakes(namesakes)}")
    return units


def _refuse_mix(dataset: Dataset) -> None:
    if isinstance(dataset, MixedDataset):
        raise EvaluationError(
            f"expected one data set, got a mix of {', '.join(dataset.parts)} in {dataset.root}, "
            "where no camera of one part saw anybody of another, so that a figure over all of it "
            "would say nothing: name the folder of one part"
        )


def _find_splits(
    task: EvaluationTask, listener: EvaluationListener
) -> list[tuple[Subject, list[Split]]]:
    """Find each checkpoint with those of the chosen splits that it is evaluated on."""
    chosen = _choose_splits(task)
    subjects = []
    for subject in find_subjects(task.source, listener):
        own = [_own_split(subject, task.dataset)] if subject.is_run else chosen
        subjects.append((subject, [one for one in own if one in chosen]))
    if not any(splits for _, splits in subjects):
        raise EvaluationError(
            f"expected runs on the splits {', '.join(one.name for one in chosen)}, "
            f"got none in {task.source}"
        )
    return subjects


def _find_unseen(
    task: EvaluationTask, listener: EvaluationListener
) -> list[tuple[Subject, list[Split]]]:
    """Find each checkpoint with the one split of everybody whom it was not trained on."""
    if set(task.splits or ()) != {UNSEEN}:
        raise EvaluationError(f"expected {UNSEEN!r} without other splits, got {task.splits}")
    dataset = task.dataset
    if dataset.layout != "folder" and not (
        dataset.layout == "market-1501" and is_plain(dataset.root)
    ):
        raise EvaluationError(
            f"expected a folder of tracklets or of nothing but crops for the split {UNSEEN!r}, got "
            f"{dataset.layout}, whose own splits say who is tested "
            f"({', '.join(one.name for one in dataset.splits)}: {dataset.splits[0].source})"
        )
    subjects = [
        (subject, [_unseen_split(subject, task)])
        for subject in find_subjects(task.source, listener)
    ]
    first, [split] = subjects[0]
    for other, [another] in subjects[1:]:
        if another != split:
            raise EvaluationError(
                f"expected runs that were trained on the same people, because their figures are "
                f"averaged, got others in {other.name} than in {first.name}; evaluate each alone"
            )
    return subjects


def _unseen_split(subject: Subject, task: EvaluationTask) -> Split:
    known = _trained_identities(subject, lambda data: _is_same(data, task))
    present = {one.identity for one in task.dataset.tracklets}
    namesakes: set[str] = set()
    is_known = any(_is_same(data, task) for data in subject.trainings)
    if task.dataset.layout == "folder" and not is_known and not task.options.allow_seen:
        # A folder that grew, or lost a frame, has another fingerprint but the people whom it had.
        namesakes = _trained_identities(subject, _is_folder) & present
    try:
        return _divide_unseen(subject, task, known, namesakes)
    except EvaluationError as error:
        if not namesakes:
            raise
        raise EvaluationError(
            f"{error}; {len(namesakes)} more have the name of somebody that it was trained on in "
            "another folder: where they are other people, say --allow-seen"
        ) from error


def _divide_unseen(
    subject: Subject, task: EvaluationTask, known: set[str], namesakes: set[str]
) -> Split:
    distractors = {DISTRACTOR} if task.dataset.layout == "market-1501" else set()
    try:
        return divide_unseen(
            task.dataset.tracklets, known, namesakes=namesakes, distractors=distractors
        )
    except DatasetError as error:
        raise EvaluationError(f"{subject.name} on {task.dataset.root}: {error}") from error


def find_subjects(source: Path, listener: EvaluationListener) -> list[Subject]:
    """Find the checkpoints of a file, a run folder or a folder of run folders.

    Raises:
        CheckpointError: A checkpoint is missing, damaged or of another architecture.
        EvaluationError: There is no finished run, or the runs are of several recipes.
    """
    if not source.is_dir():
        return [_subject(source, source.stem, is_run=False)]
    if (source / FACTS).is_file():
        return [_subject(source / PRODUCT, source.resolve().name, is_run=True)]
    runs = sorted(
        (one for one in source.iterdir() if (one / FACTS).is_file()),
        key=lambda one: natural_key(one.name),
    )
    finished = [one for one in runs if (one / PRODUCT).is_file()]
    for run in runs:
        if run not in finished:
            listener.said(f"left out, because it is not finished: {run}")
    if not finished:
        raise EvaluationError(
            f"expected a checkpoint, a run folder or a folder of finished runs, got {source} with "
            f"{len(runs)} unfinished runs in it"
        )
    subjects = [_subject(one / PRODUCT, one.name, is_run=True) for one in finished]
    first = subjects[0]
    for other in subjects[1:]:
        if _recipe_of(other) != _recipe_of(first):
            raise EvaluationError(
                f"expected runs of one recipe, because their figures are averaged, got another "
                f"recipe in {other.name} than in {first.name}"
            )
    return subjects


def _recipe_of(subject: Subject) -> object:
    """The recipe of a checkpoint: what came later than the file counts as left at its default."""
    values = subject.provenance.get("recipe")
    if not isinstance(values, Mapping):
        return values
    try:
        return without_places(parse_recipe(values))
    except RecipeError:
        return values


def seen_identities(subject: Subject, task: EvaluationTask, split: Split) -> tuple[str, ...]:
    """Return the tested identities that a checkpoint was trained on, by what it says itself.

    The same published layout counts, too: a copy from which a file was lost has another
    fingerprint but the same people. In folders of somebody's own, "p1" may be anybody.
    """
    return _known(subject, split, lambda data: _is_same(data, task))


def count_namesakes(subject: Subject, task: EvaluationTask, split: Split) -> int:
    """Count tested identities whose names occur in the training data of another plain folder."""
    if task.dataset.layout != "folder":
        return 0
    found = _known(subject, split, lambda data: _is_folder(data) and not _is_same(data, task))
    return len(set(found) - set(seen_identities(subject, task, split)))


def describe_namesakes(count: int) -> str:
    """Say what it means that names coincide."""
    names = "1 name of a tested person also occurs"
    if count > 1:
        names = f"{count} names of tested people also occur"
    return (
        f"{names} in the training data of another folder; whether they are the same people cannot "
        "be told"
    )


def _is_folder(data: Mapping[str, Any]) -> bool:
    return data.get("layout") == "folder"


def _is_same(data: Mapping[str, Any], task: EvaluationTask) -> bool:
    """Whether a training's people are those of this data, by name."""
    if data.get("fingerprint") == task.fingerprint:
        return True
    return task.dataset.layout in _PUBLISHED and data.get("layout") == task.dataset.layout


def _known(
    subject: Subject, split: Split, counts: Callable[[Mapping[str, Any]], bool]
) -> tuple[str, ...]:
    """Tested identities whose names occur in those of its trainings that count."""
    trained = _trained_identities(subject, counts)
    return tuple(sorted({one.identity for one in split.query} & trained, key=natural_key))


def _trained_identities(subject: Subject, counts: Callable[[Mapping[str, Any]], bool]) -> set[str]:
    """Everybody in those of its trainings that count."""
    return set().union(*map(trained_identities, filter(counts, subject.trainings)))


def _subject(path: Path, name: str, *, is_run: bool) -> Subject:
    if is_run and not path.is_file():
        raise EvaluationError(
            f"expected a finished run with {PRODUCT} in it, got {path.parent} without one; "
            "`passerby train` goes on with it"
        )
    checkpoint = load_checkpoint(path)  # all of it: a damaged file shows before any work
    network = asdict(checkpoint.network.config)
    return Subject(name, path, checkpoint.fingerprint, checkpoint.provenance, network, is_run)


def _choose_splits(task: EvaluationTask) -> list[Split]:
    known = {split.name: split for split in task.dataset.splits}
    if task.splits is None:
        return list(known.values())
    if not task.splits:
        raise EvaluationError("expected at least one split, got an empty choice")
    unknown = [name for name in task.splits if name not in known]
    if unknown:
        raise EvaluationError(
            f"expected splits among {', '.join(known)}, got {shorten(unknown)}; the splits are "
            f"{next(iter(known.values())).source}"
        )
    return [known[name] for name in task.splits]


def _own_split(subject: Subject, dataset: Dataset) -> Split:
    """The split that a run was trained on; its training identities must be the very same."""
    name, source = subject.data.get("split"), subject.data.get("source")
    trained = trained_identities(subject.data)
    for split in dataset.splits:
        identities = {one.identity for one in split.train}
        if (split.name, split.source, identities) == (name, source, trained):
            return split
    raise EvaluationError(
        f"expected the split that {subject.name} was trained on ({name!r}, {source}), got a data "
        f"set whose splits are {dataset.splits[0].source}; give the run's {PRODUCT} itself to "
        f"evaluate it on other data, --splits {UNSEEN}, or the same --split-seed as in training"
    )


def _plan_unit(task: EvaluationTask, subject: Subject, split: Split, frame_seed: int) -> Unit:
    plan_comparisons(split, task.protocol)  # refuses what cannot be evaluated
    seen = seen_identities(subject, task, split)
    if seen and not task.options.allow_seen:
        raise EvaluationError(
            f"{subject.name} was trained on {len(seen)} of the "
            f"{len({one.identity for one in split.query})} identities that split {split.name} "
            f"tests ({', '.join(seen[:3])}{', ...' if len(seen) > 3 else ''}): expected people it "
            f"has never seen. Say --splits {UNSEEN} to test all of those, give its run folder to "
            "evaluate the split it was trained on, choose others with --splits, or say "
            "--allow-seen, and the results will say so, too"
        )
    drawn = frame_seed if task.options.choice.frames == "random" else None
    trained = subject.data.get("seed")
    seed = trained if isinstance(trained, int) else None
    key = _unit_key(task, subject, split) | {"seed": seed, "frame_seed": drawn}
    return Unit(
        subject,
        split,
        seed,
        drawn,
        seen,
        count_namesakes(subject, task, split),
        _file_name(subject, split, drawn),
        key,
    )


def _file_name(subject: Subject, split: Split, frame_seed: int | None) -> str:
    """Name the file of a unit: readable, fit for every file system, and no other unit's."""
    draw = "" if frame_seed is None else f"-frames-{frame_seed}"
    wanted = f"{subject.name}-split-{split.name}{draw}"
    name = re.sub(r"[^A-Za-z0-9._-]", "_", wanted)[:_LONGEST_NAME]
    if name != wanted:
        name += f"-{hashlib.sha256(wanted.encode(*_ANY_NAME)).hexdigest()[:8]}"
    return f"{name}.json"


def _unit_key(task: EvaluationTask, subject: Subject, split: Split) -> dict[str, Any]:
    digest = hashlib.sha256()
    for side in (split.query, split.gallery):
        digest.update(
            b"\0" + b"\n".join(tracklet_name(one).encode(errors="replace") for one in side)
        )
    return {
        "format": FORMAT,
        "checkpoint": subject.fingerprint,
        "data": task.fingerprint,
        "frames_stamp": task.stamp,
        "split": split.name,
        "source": split.source,
        "tracklets": digest.hexdigest()[:12],
        "protocol": task.protocol,
        "frames": task.options.choice.frames,
        "clip_frames": task.options.choice.clip_frames,
        "reranked": task.options.rerank,
        "unit": task.options.unit,
        "precision": task.resolved_precision,
    }
