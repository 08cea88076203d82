"""A recipe: everything that decides what a training run does, in one TOML file.

One typed schema; a key that it does not know, or a value of another type, is an error. A run keeps
its recipe, and the checkpoint that it makes carries it.
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import cos, pi
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from model.augmentation import AugmentationConfig
from model.distillation import DistillationConfig
from model.embedder import Precision
from model.errors import RecipeError
from model.frames import Preprocessing
from model.losses import LossConfig
from model.network import NetworkConfig
from model.teacher import START
from model.within_class import WithinClassConfig

BUNDLED = Path(__file__).parent / "recipes"
RANDOM_START = "random"


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which data a recipe is for.

    Args:
        layout: A layout of `model.datasets.layouts`, or "auto" to recognise it.
        prid_subset: Of PRID-2011: "178" identities of the published split file, or "all200".
        test_share: Of a mix: how many of the identities of a part are tested, in [0, 1), by its
            name; a half where nothing is said.
    """

    layout: Literal["auto", "folder", "ilids-vid", "prid-2011", "mars", "market-1501", "mixed"] = (
        "auto"
    )
    prid_subset: Literal["178", "all200"] = "178"
    test_share: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.test_share and self.layout not in ("auto", "mixed"):
            raise ValueError(
                f'test_share: expected the layout "mixed", which has parts, got {self.layout!r}'
            )
        for part, share in self.test_share.items():
            if not 0 <= share < 1:
                raise ValueError(f"test_share: expected shares in [0, 1), got {share} of {part!r}")


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """What a batch is made of.

    Args:
        identities: P, of one rank.
        tracklets: K, of each identity.
        frames: T, of each tracklet.
        sampling: How they are chosen, see `model.frames.choose_frames`.
        accumulate: Batches whose gradients are averaged for one step. Hard mining stays within
            each batch.
        draw: "identities" as above; "clips" draws P * K tracklets whoever is in them, for learning
            from a teacher, see `model.samplers.ClipSampler`.
    """

    identities: int = 8
    tracklets: int = 2
    frames: int = 15
    sampling: Literal["random", "consecutive", "chunks", "even"] = "random"
    accumulate: int = 1
    draw: Literal["identities", "clips"] = "identities"

    def __post_init__(self) -> None:
        for name, least in (("identities", 2), ("tracklets", 2), ("frames", 1), ("accumulate", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class OptimiserConfig:
    """Adam and its schedule; an epoch is one pass over the training identities, or frames.

    Args:
        epochs: How many; 0 only where ``[within_class]`` is all that is done.
        rate: Learning rate.
        decay: Weight decay, added to the gradient (L2).
        schedule: "steps" is as follows; "cosine" lets the rate fall to 0 over the whole run, along
            half a wave.
        milestones: Epochs from which on the rate is multiplied by ``factor`` once more.
        factor: See there.
        warmup_epochs: Epochs over which the rate rises linearly from a tenth; 0 for none.
        clip_norm: Largest norm of the gradient; 0 for no limit.
        ema: Decay of an exponential moving average of the weights, which is then what is kept; 0
            for none.
        blend: Share of the weights that the run began with in those that are kept, in [0, 1): a
            way between what they knew and what they learned (Wortsman et al., arXiv:2109.01903).
        precision: Of the backbone; attention, distances and losses are always float32.
        sync_batch_norm: Whether batch statistics are those of all ranks.
        keep_batch_norm: Whether the backbone's batch normalisation goes on with the statistics that
            it has, instead of those of each batch: few people are no sample of everybody.
    """

    epochs: int = 600
    rate: float = 3e-4
    decay: float = 5e-4
    schedule: Literal["steps", "cosine"] = "steps"
    milestones: tuple[int, ...] = (200, 400)
    factor: float = 0.1
    warmup_epochs: int = 0
    clip_norm: float = 0.0
    ema: float = 0.0
    blend: float = 0.0
    precision: Precision = "auto"
    sync_batch_norm: bool = False
    keep_batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs: expected 0 or more, got {self.epochs}")
        if self.rate <= 0:
            raise ValueError(f"rate: expected a positive number, got {self.rate}")
        for name in ("decay", "warmup_epochs", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if not 0 < self.factor <= 1:
            raise ValueError(f"factor: expected a share in (0, 1], got {self.factor}")
        if any(milestone < 1 for milestone in self.milestones):
            raise ValueError(f"milestones: expected epochs from 1, got {self.milestones}")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones: expected ascending epochs, got {self.milestones}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a decay in [0, 1), got {self.ema}")
        if not 0 <= self.blend < 1:
            raise ValueError(f"blend: expected a share in [0, 1), got {self.blend}")

    def rate_at(self, epoch: int, progress: float = 0.0) -> float:
        """The learning rate in an epoch.

        Args:
            epoch: From 0.
            progress: How much of it is done, in [0, 1); steps change only between epochs.
        """
        rate = self.rate * self.factor ** sum(epoch >= milestone for milestone in self.milestones)
        if self.schedule == "cosine":
            rate = self.rate * 0.5 * (1 + cos(pi * (epoch + progress) / self.epochs))
        if epoch < self.warmup_epochs:
            rate *= 0.1 + 0.9 * (epoch + progress) / self.warmup_epochs
        return rate


@dataclass(frozen=True, slots=True)
class MonitorConfig:
    """What is measured while training goes on. Nothing is chosen by it: the last weights are kept.

    Args:
        every_epochs: Epochs between evaluations on the split's test identities; 0 for none.
        frames: Frames of a tracklet in them.
    """

    every_epochs: int = 0
    frames: int = 8

    def __post_init__(self) -> None:
        if self.every_epochs < 0:
            raise ValueError(f"every_epochs: expected 0 or more, got {self.every_epochs}")
        if self.frames < 1:
            raise ValueError(f"frames: expected at least 1, got {self.frames}")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole training run but for where its data lie.

    Args:
        name: Of the recipe.
        description: For people.
        start: Weights to begin with: "random"; a ResNet-50 with torchvision's names or a
            checkpoint of ours, by path; "bundled", which comes with Passerby; or "IMAGENET1K_V1",
            which downloads torchvision's.
        data: See the class of each; a table of the same name in the file.
    """

    name: str
    description: str = ""
    start: str = RANDOM_START
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    batch: BatchConfig = field(default_factory=BatchConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    distillation: DistillationConfig | None = None
    within_class: WithinClassConfig | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name: expected a name, got an empty one")
        if not self.optimiser.epochs and self.within_class is None:
            raise ValueError(
                "optimiser.epochs: expected at least 1, or a table [within_class], got 0 without it"
            )
        if self.within_class is not None and (not self.network.head or self.network.neck):
            raise ValueError(
                "within_class: expected a network with a head and without a neck, which the head's "
                f"weights can carry it for, got head {self.network.head}, neck {self.network.neck}"
            )
        if self.network.neck and self.loss.identity == "none":
            raise ValueError("network.neck: expected an identity loss to train it, got none")
        if self.batch.draw == "clips" and self.loss.triplet:
            raise ValueError(
                'batch.draw: expected "identities" for the triplet loss, which needs positives, '
                'got "clips"'
            )
        if self.optimiser.blend and self.start == RANDOM_START:
            raise ValueError(
                "optimiser.blend: expected 0 where a run begins with random weights, which know "
                f"nothing worth keeping, got {self.optimiser.blend}"
            )
        if self.network.neck and self.distillation and self.distillation.teacher == START:
            raise ValueError(
                'network.neck: expected none with the teacher "start", which answers behind it '
                "while a student is compared before it"
            )
        views = 1 if self.distillation is None else self.distillation.views
        if views > 1 and (self.loss.identity != "none" or self.loss.triplet):
            raise ValueError(
                "distillation.views: expected 1 beside an identity or triplet loss, because other "
                f"looks show other people, got {views}"
            )
        if self.loss.identity == "none" and not self.loss.triplet and (self.distillation is None):
            raise ValueError(
                "loss: expected an identity loss, a triplet loss or a teacher, got none"
            )


def bundled_recipes() -> list[str]:
    """Names of the recipes that come with Passerby."""
    return sorted(path.stem for path in BUNDLED.glob("*.toml"))


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: A path of a TOML file, or the name of a bundled recipe.
        overrides: Like ``optimiser.epochs=50``, laid over the file; values as in TOML.

    Raises:
        RecipeError: There is no such recipe, or something in it is not as the schema says.
    """
    values = _read(Path(source))
    for override in overrides:
        _lay_over(values, override)
    return parse_recipe(values, name=str(source))


def parse_recipe(values: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """Make a recipe of plain values.

    Raises:
        RecipeError: A key is unknown, or a value is not what the schema says; all are named.
    """
    unknown = _unknown_keys(values, Recipe)
    if unknown:
        raise RecipeError(f"{name}: {'; '.join(unknown)}")
    try:
        # As JSON, because there a list may stand for a tuple while nothing else is converted.
        recipe: Recipe = TypeAdapter(Recipe).validate_json(
            json.dumps(values, allow_nan=False), strict=True
        )
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise RecipeError(
                f"{name}: expected finite numbers, words and lists: {error}"
            ) from None
        raise RecipeError(f"{name}: {'; '.join(_described(error))}") from error
    return recipe


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, from which `parse_recipe` makes it again."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return {name: value for name, value in values.items() if value is not None}


def without_places(recipe: Recipe) -> Recipe:
    """The recipe with names of files where it has paths: what a checkpoint tells to strangers."""
    taught = recipe.distillation
    if taught is not None:
        taught = dataclasses.replace(taught, teacher=Path(taught.teacher).name, cache=None)
    return dataclasses.replace(recipe, start=Path(recipe.start).name, distillation=taught)


def format_recipe(recipe: Recipe) -> str:
    """The recipe as TOML, every value written out."""
    lines, tables = [], []
    for name, value in recipe_values(recipe).items():
        if isinstance(value, dict):
            rows = [f"{key} = {_toml(one)}" for key, one in value.items() if one is not None]
            tables.append("\n".join([f"[{name}]", *rows]))
        else:
            lines.append(f"{name} = {_toml(value)}")
    return "\n\n".join(["\n".join(lines), *tables]) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        rows = [f"{_toml(key)} = {_toml(one)}" for key, one in value.items()]
        return f"{{ {', '.join(rows)} }}" if rows else "{}"
    # Strings, numbers, booleans and lists of them are written alike in JSON and in TOML, but that
    # TOML also wants DEL escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read(path: Path) -> dict[str, Any]:
    # Only a file hides a bundled recipe: a data folder may well be called like one.
    if path.suffix != ".toml" and not path.is_file():
        if str(path) not in bundled_recipes():
            raise RecipeError(
                f"expected a recipe file or one of {', '.join(bundled_recipes())}; got {path}"
            )
        path = BUNDLED / f"{path}.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"expected a recipe, could not read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"expected TOML in {path}: {error}") from error


def _lay_over(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"expected a setting like optimiser.epochs=50, got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *tables, name = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise RecipeError(f"expected a table {table!r} for {override!r}, got a value")
    values[name] = value


def _unknown_keys(values: Mapping[str, Any], schema: type, prefix: str = "") -> list[str]:
    hints = get_type_hints(schema)
    known = {one.name for one in fields(schema)}
    problems = []
    for key, value in values.items():
        if key not in known:
            problems.append(
                f"unknown key {prefix + key!r}: expected one of {', '.join(sorted(known))}"
            )
        elif isinstance(value, Mapping) and (inner := _dataclass_of(hints[key])) is not None:
            problems += _unknown_keys(value, inner, f"{prefix}{key}.")
    return problems


def _dataclass_of(hint: Any) -> type | None:
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    found = (one for one in choices if isinstance(one, type) and dataclasses.is_dataclass(one))
    return next(found, None)


def _described(error: ValidationError) -> list[str]:
    described = []
    for one in error.errors(include_url=False):
        where = ".".join(str(part) for part in one["loc"])
        message = one["msg"].removeprefix("Value error, ")
        given = one["input"]
        got = "" if isinstance(given, dict) else f", got {given!r}"
        described.append(f"{where}: {message}{got}" if where else message)
    return described
