"""What a report is made of, read from the files of an evaluation."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.datasets.truth import has_truth
from model.errors import EvaluationError
from model.evaluation_files import EmbeddingCache

_RATES = ("rank_1", "rank_5", "rank_10", "rank_20", "mAP")
_NO_RATES: dict[str, float | None] = dict.fromkeys(_RATES)

Rates = Mapping[str, float | None]
"""Shares (0-1) of rank_1, rank_5, rank_10, rank_20 and mAP; None where nothing is known."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A tracklet as a page shows it.

    Args:
        identity: Who.
        camera: Where.
        name: Which of that person's tracklets in that camera; "" where there is only one.
        frames: Paths relative to the root of the data, with slashes.
    """

    identity: str
    camera: str
    name: str
    frames: tuple[str, ...]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Shown":
        """Read what the evaluation wrote."""
        frames = tuple(str(frame) for frame in content["frames"])
        identity, camera = str(content["identity"]), str(content["camera"])
        return cls(identity, camera, str(content["name"]), frames)

    @property
    def key(self) -> str:
        """Its name in the data set, as `model.evaluation.tracklet_name` has it."""
        return f"{self.identity}/{self.camera}/{self.name}".rstrip("/")


@dataclass(frozen=True, slots=True)
class Match:
    """A gallery tracklet that a query found.

    Args:
        tracklet: What was found.
        distance: To the query.
        correct: Whether it is the query's person.
    """

    tracklet: Shown
    distance: float
    correct: bool


@dataclass(frozen=True, slots=True)
class Ranking:
    """What one query found.

    Args:
        query: What was searched with.
        pair: Cameras of its comparison, "a>b"; "" where there was one comparison.
        rank: Of the first right match, from 1; None where the gallery held none.
        top: The nearest, nearest first.
    """

    query: Shown
    pair: str
    rank: int | None
    top: tuple[Match, ...]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Ranking":
        """Read what the evaluation wrote."""
        rank = content["rank"]
        top = tuple(
            Match(Shown.of(one), float(one["distance"]), bool(one["correct"]))
            for one in content["top"]
        )
        pair = str(content.get("pair", ""))
        return cls(Shown.of(content["query"]), pair, None if rank is None else int(rank), top)


@dataclass(frozen=True, slots=True)
class Unit:
    """One checkpoint on one split.

    Args:
        name: Of the checkpoint.
        checkpoint: Its fingerprint.
        split: Which split.
        seed: Of the training; None where the checkpoint names none.
        frame_seed: Of drawn frames; None where none are drawn.
        source: Where the split comes from.
        rates: What was measured.
        cmc: Rates at ranks 1, 2, ...; at least one.
        queries: That have a match in the gallery.
        skipped: That have none.
        gallery: How many tracklets were searched in; of a pair of cameras, on average.
        pairs: What was measured of each pair of cameras, by "a>b".
        occlusion: By level, where the data say what is hidden.
        rankings: What each query found.
        options: The rest of the file: which frames, which protocol, ...
    """

    name: str
    checkpoint: str
    split: str
    seed: int | None
    frame_seed: int | None
    source: str
    rates: Rates
    cmc: tuple[float, ...]
    queries: int
    skipped: int
    gallery: int
    pairs: Mapping[str, Mapping[str, Any]]
    occlusion: Mapping[str, Mapping[str, Any]]
    rankings: tuple[Ranking, ...]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Unit":
        """Read what the evaluation wrote."""
        bulky = ("rankings", "cmc", "pairs", "occlusion")
        return cls(
            name=str(content.get("name", "")),
            checkpoint=str(content["checkpoint"]),
            split=str(content["split"]),
            seed=None if content["seed"] is None else int(content["seed"]),
            frame_seed=int(content["frame_seed"]) if content["frames"] == "random" else None,
            source=str(content["source"]),
            rates=read_rates(content),
            cmc=tuple(float(rate) for rate in content["cmc"]) or (0.0,),
            queries=int(content["queries"]),
            skipped=int(content["skipped"]),
            gallery=int(content["gallery"]),
            pairs=dict(content.get("pairs") or {}),
            occlusion=dict(content.get("occlusion") or {}),
            rankings=tuple(Ranking.of(one) for one in content["rankings"]),
            options={name: value for name, value in content.items() if name not in bulky},
        )


@dataclass(frozen=True, slots=True)
class Attended:
    """Where the network looked in a stored query.

    Args:
        query: Its frames are all those that were used, T.
        kind: "best" or "worst", of the rankings.
        rank: Of its first right match.
        maps: (T, H, W) float32, each sums to 1.
    """

    query: Shown
    kind: str
    rank: int
    maps: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A finished evaluation.

    Args:
        folder: Where it lies.
        root: Where the data lie, or lay.
        results: All of ``results.json``.
        units: At least one.
        mean: Over units.
        deviation: Over units, of the sample; None each for a single one.
        attention: Of a few queries.
    """

    folder: Path
    root: Path
    results: Mapping[str, Any]
    units: tuple[Unit, ...]
    mean: Rates
    deviation: Rates
    attention: tuple[Attended, ...]

    @property
    def layout(self) -> str:
        """Of the data."""
        return str(self.results["data"]["layout"])

    @property
    def data(self) -> Mapping[str, Any]:
        """What is known of the data besides."""
        data: Mapping[str, Any] = self.results["data"]
        return data

    @property
    def checkpoints(self) -> list[str]:
        """Fingerprints, each once."""
        return list(dict.fromkeys(unit.checkpoint for unit in self.units))

    @property
    def sources(self) -> list[str]:
        """Where the splits come from, each origin once."""
        return list(dict.fromkeys(unit.source for unit in self.units))

    @property
    def pairs_left_out(self) -> list[str]:
        """Pairs of cameras that say nothing, "a>b", of any unit."""
        return [str(name) for name in self.results.get("pairs_left_out") or ()]

    @property
    def is_drawn(self) -> bool | None:
        """Whether the data are synthetic; None where they have moved and nobody can tell."""
        if any(unit.occlusion for unit in self.units):
            return True  # only a generator knows what is hidden
        return has_truth(self.root) if self.root.is_dir() else None

    def option(self, name: str) -> Any:
        """What the units say about how they were measured; they agree, being of one command."""
        return self.units[0].options.get(name)

    def frame(self, relative: str) -> Path | None:
        """Find a frame; None for a path that leads out of the data."""
        path = PurePosixPath(relative)
        return None if path.is_absolute() or ".." in path.parts else self.root / path

    def embeddings(self, unit: Unit) -> dict[str, NDArray[np.float32]]:
        """Return what a unit was measured with, (D,) by `Shown.key`; nothing without a cache."""
        file = unit.options.get("embeddings")
        found = EmbeddingCache(self.folder / str(file)).embeddings if file else {}
        if not unit.options.get("unit"):
            return found
        return {key: one / (np.linalg.norm(one) or 1) for key, one in found.items()}


def read_evaluation(folder: Path, data: Path | None = None) -> Evaluation:
    """Read a finished evaluation.

    Args:
        folder: That `passerby evaluate` wrote.
        data: Where the data lie now; where they lay then, by default.

    Raises:
        EvaluationError: A file is missing, or is not what an evaluation writes; or ``data`` is no
            folder.
    """
    if data is not None and not data.is_dir():
        found = "a file" if data.exists() else "nothing"
        raise EvaluationError(f"expected the folder of the data at {data}, got {found}")
    results = _read(folder / "results.json")
    try:
        units = tuple(Unit.of(_read(folder / str(one["file"]))) for one in results["units"])
        if not units:
            raise ValueError("no unit")
        return Evaluation(
            folder,
            data or Path(str(results["data"]["root"])),
            results,
            units,
            mean=read_rates(results["mean"]),
            deviation=read_rates(results["std"] or _NO_RATES),
            attention=tuple(_attended(folder, one) for one in results.get("attention", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EvaluationError(
            f"expected what `passerby evaluate` writes in {folder}, got something else: "
            f"{type(error).__name__} {error}"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EvaluationError(
            f"expected a finished evaluation, got no {path}; run `passerby evaluate` first"
        ) from error
    except (OSError, ValueError) as error:
        raise EvaluationError(f"expected a JSON file, could not read {path}: {error}") from error
    if not isinstance(content, dict):
        raise EvaluationError(f"expected a JSON object in {path}, got {type(content).__name__}")
    return content


def read_rates(content: Mapping[str, Any]) -> Rates:
    """Read rates as the evaluation wrote them."""
    return {name: None if content[name] is None else float(content[name]) for name in _RATES}


def _attended(folder: Path, content: Mapping[str, Any]) -> Attended:
    path = folder / str(content["file"])
    try:
        with np.load(path, allow_pickle=False) as arrays:
            maps = np.asarray(arrays["attention"], np.float32)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"expected attention maps, could not read {path}") from error
    query = Shown.of(content["query"])
    if maps.ndim != 3 or len(maps) != len(query.frames):
        raise ValueError(f"{len(query.frames)} frames but attention {maps.shape} in {path}")
    return Attended(query, str(content["kind"]), int(content["rank"]), maps)
