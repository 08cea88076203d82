"""What `bench.real` studies: its rows, and the recipe of each."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from model.evaluation import ClipChoice
from model.recipe import Recipe, load_recipe

Json = dict[str, Any]
Start = Literal["random", "imagenet", "teacher"]

QUARTERS = 4
TRACKLETS = 2  # K
# Frames of a tracklet: each of these evenly, and every one of them once.
CHOICES = {str(count): ClipChoice("even", count) for count in (1, 2, 4, 8, 15)}
CHOICES["all"] = ClipChoice("all", 1)
SHOWN = "8"  # what the curve and the first table are measured with
SCALES = ("raw", "unit")
MEASURES = ("rank_1", "rank_5", "mAP")

READINGS = {
    "zscore": ("z-score", ()),
    "printed": ("as printed (T = 1, mean)", ("network.temperature=1.0", "network.pool=mean")),
    "mean": ("softmax of the mean", ("network.attention=mean",)),
    "l1": ("L1", ("network.attention=l1",)),
    "none": ("average pooling", ("network.attention=none",)),
}
# What is in braces the study knows.
TAUGHT_ALONE = (
    "network.head={dim}",
    "distillation.projection=false",
    "loss.identity=none",
    "loss.triplet=false",
    "loss.regulariser=none",
    "batch.draw=clips",
    "batch.identities={clips}",
    "batch.frames=1",
)
NORMALISED = (*TAUGHT_ALONE, "within_class.frames=8")
TAUGHT_BESIDE = (
    "network.head={dim}",
    "distillation.projection=false",
    "loss.identity=ce",
    "loss.regulariser=none",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the tables.

    Args:
        name: Its key.
        label: What it is, for people.
        start: Where its weights come from.
        settings: Laid over the recipe; in braces what the study knows.
        recipe: A bundled one.
        beside: The row that it is compared with, in pairs.
        trained: Whether it is trained at all.
        taught: Whether a teacher takes part.
    """

    name: str
    label: str
    start: Start
    settings: tuple[str, ...] = ()
    recipe: str = "folder"
    beside: str | None = None
    trained: bool = True
    taught: bool = False

    @property
    def kind(self) -> str:
        """Rows of one kind take about the same time."""
        return "teacher" if self.start == "teacher" else "trained" if self.trained else "untrained"


def untrained_row(start: Start, reading: str) -> Row:
    """A network as it begins, read one way."""
    label, settings = READINGS[reading]
    beside = None if reading == "zscore" else f"{start}-untrained-zscore"
    name = f"{start}-untrained-{reading}"
    return Row(name, f"untrained, {label}", start, settings, beside=beside, trained=False)


def trained_rows(start: Start) -> list[Row]:
    """All that is trained from one start, the most telling first."""

    def row(name: str, label: str, *settings: str, recipe: str = "folder", **more: bool) -> Row:
        beside = f"{start}-untrained-zscore" if name == "default" else f"{start}-default"
        return Row(f"{start}-{name}", label, start, settings, recipe, beside, **more)

    strong = ("augmentation.pad={pad}", "optimiser.ema={ema}", "optimiser.warmup_epochs=1")
    return [
        row("default", "the default reading"),
        row("distilled", "teacher alone, single crops", *TAUGHT_ALONE, taught=True),
        replace(
            row("distilled-normalised", "the same, cameras discounted", *NORMALISED, taught=True),
            beside=f"{start}-distilled",
        ),
        row("distilled-losses", "teacher, CE and triplet", *TAUGHT_BESIDE, taught=True),
        row("no-reg", "without the temporal term", "loss.regulariser=none"),
        row("strong", "the strong recipe", *strong, recipe="folder-strong"),
        *(
            row(f"attention-{name}", f"attention: {label}", *settings)
            for name, (label, settings) in READINGS.items()
            if name != "zscore"
        ),
        row("consistency", "temporal term: consistency", "loss.regulariser=consistency"),
        row("paper", "every equation as printed", recipe="folder-paper"),
    ]


def all_rows() -> list[Row]:
    """Every row, in the order of work: what is most worth knowing first, both starts in turn."""
    teacher = Row("teacher", "the teacher, its frame embeddings averaged", "teacher", trained=False)
    starts: tuple[Start, Start] = ("random", "imagenet")
    # Before what begins with them, which then need not measure them again.
    rows = [teacher, *(untrained_row(start, name) for name in READINGS for start in starts)]
    for pair in zip(*(trained_rows(start) for start in starts), strict=True):
        rows += pair
    return rows


@dataclass(frozen=True, slots=True)
class Study:
    """What is asked for; see the command's help.

    Args:
        data: Folder of the data.
        output: Folder of the study.
        layout: Of the data.
        test_share: Of the identities of each part of a mix, by its name.
        imagenet: Weights of the upper reference; None leaves its rows out.
        teacher: Likewise.
        teacher_precision: In which it computes.
        steps: Of each trained row.
        identities: P.
        frames: T.
        height: Of the network's input, pixels.
        width: Likewise.
        backbone: See `model.network.NetworkConfig`.
        rates: Of learning, by start.
        dim: Length of the embeddings of rows that have the teacher's.
        changes: Laid over every recipe.
        device: See `model.embedder.choose_device`.
        keep: Whether trained weights are kept.
    """

    data: Path
    output: Path
    layout: str = "auto"
    test_share: Mapping[str, float] | None = None
    imagenet: Path | None = None
    teacher: Path | None = None
    teacher_precision: str = "fp32"
    steps: int = 60
    identities: int = 8
    frames: int = 4
    height: int = 128
    width: int = 64
    backbone: str = "resnet50"
    rates: Mapping[str, float] | None = None
    dim: int = 256
    changes: tuple[str, ...] = ()
    device: str = "auto"
    keep: bool = False

    def recipe(self, row: Row) -> Recipe:
        """The whole recipe of a row."""
        return load_recipe(row.recipe, [*self._common(row), *self._own(row), *self.changes])

    def _common(self, row: Row) -> list[str]:
        start = self.imagenet if row.start == "imagenet" else None
        rates = {"random": 1e-3, "imagenet": 3e-4, **(self.rates or {})}
        return [
            f"start={json.dumps('random' if start is None else str(start))}",
            f"data.layout={self.layout}",
            *(f"data.test_share.{part}={one}" for part, one in (self.test_share or {}).items()),
            f"network.backbone={self.backbone}",
            f"preprocessing.height={self.height}",
            f"preprocessing.width={self.width}",
            f"batch.identities={self.identities}",
            f"batch.tracklets={TRACKLETS}",
            f"batch.frames={self.frames}",
            f"optimiser.rate={rates.get(row.start, 1e-3)}",
            f"optimiser.epochs={QUARTERS}",
            "optimiser.schedule=cosine",
            "optimiser.milestones=[]",
            "monitor.every_epochs=1",
            f"monitor.frames={SHOWN}",
        ]

    def _own(self, row: Row) -> list[str]:
        known = {
            "dim": self.dim,
            "clips": self.identities * self.frames,  # pairs of them make as many frames as a batch
            # What the strong recipe means by 10 of 256 rows, and by 1,000 of so many more steps.
            "pad": round(self.height * 10 / 256),
            "ema": max(0.0, 1 - 3 / self.steps),
        }
        settings = [one.format(**known) for one in row.settings]
        if row.taught:
            settings.append(f"distillation.teacher={json.dumps(str(self.teacher))}")
            settings.append(f"distillation.precision={self.teacher_precision}")
        return settings

    def decisive(self, fingerprint: str) -> Json:
        """Everything that decides a figure but which rows and divisions there are."""
        values = asdict(self)
        for name in ("data", "output", "device", "keep", "layout"):
            del values[name]
        for name in ("imagenet", "teacher"):
            values[name] = _digest(values[name])
        return {**values, "fingerprint": fingerprint, "changes": list(self.changes)}


def _digest(path: Path | None) -> str | None:
    if path is None:
        return None
    whole = path.with_suffix(".bin") if path.suffix == ".xml" else path
    with whole.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def choose_rows(patterns: str, study: Study) -> list[Row]:
    """The rows that patterns name, without those whose file is not given.

    Raises:
        ValueError: A pattern names none.
    """
    rows = all_rows()
    wanted = patterns.split(",")
    for pattern in wanted:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            names = ", ".join(row.name for row in rows)
            raise ValueError(f"expected rows among {names}; got {pattern}")
    chosen = [row for row in rows if any(fnmatchcase(row.name, pattern) for pattern in wanted)]
    if study.imagenet is None:
        chosen = [row for row in chosen if row.start != "imagenet"]
    if study.teacher is None:
        chosen = [row for row in chosen if not row.taught and row.start != "teacher"]
    return chosen
