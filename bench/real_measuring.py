"""How `bench.real` measures a network: every frame embedded once, then averaged in every way."""

import time
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.real_rows import CHOICES, MEASURES, SCALES, SHOWN, Json
from model.checkpoint import Checkpoint
from model.datasets.mixed import MixedDataset
from model.datasets.tracklets import Split, Tracklet
from model.embedder import Embedder
from model.evaluation import (
    compare,
    plan_comparisons,
    resolve_protocol,
    tested_tracklets,
    tracklet_name,
)
from model.experiment import Experiment
from model.loading import FrameStore
from model.measures import average_measures

Vectors = NDArray[np.float32]
CHUNK_FRAMES = 256


class Ruler:
    """Measures networks on the test identities of one division, each frame embedded once.

    Frames are independent until they are averaged, so the embeddings of all of them give those of
    any choice of them.

    Args:
        experiment: Whose data are divided.
        split: How.
        steps: After how many a network is measured in every way.
        device: Where networks run.
    """

    def __init__(self, experiment: Experiment, split: Split, *, steps: int, device: str) -> None:
        self.parts = parts_of(experiment, split)
        self._steps, self._device = steps, device
        # Parts apart: people of two of them may have one name.
        self._tracklets = {name: tested_tracklets([one]) for name, (one, _) in self.parts.items()}
        self.frames = [
            path for some in self._tracklets.values() for one in some for path in one.frames
        ]
        self._store = FrameStore(self.frames, experiment.recipe.preprocessing)
        self._store.preload()
        self._known: dict[str, Json] = {}

    def __call__(self, checkpoint: Checkpoint) -> Mapping[str, float]:
        """Measure a point of the curve, as a trainer asks for it."""
        began = time.monotonic()
        last = checkpoint.provenance["steps"] == self._steps
        if last or checkpoint.fingerprint in self._known:
            measured = self.measure(checkpoint)
        else:
            frames = self._embed(checkpoint, [SHOWN])
            measured = self.measure_frames(frames, [SHOWN], ["raw"])
        return {
            **{
                f"{part}/{name}": values["raw"][SHOWN][name]
                for part, values in measured.items()
                for name in MEASURES
            },
            "measure_s": time.monotonic() - began,
        }

    def measure(self, checkpoint: Checkpoint) -> Json:
        """Measure a network in every way, see `measure_frames`."""
        if checkpoint.fingerprint not in self._known:
            frames = self._embed(checkpoint, CHOICES)
            self._known[checkpoint.fingerprint] = self.measure_frames(frames)
        return self._known[checkpoint.fingerprint]

    def measure_frames(
        self,
        frames: Mapping[Path, Vectors],
        choices: Collection[str] = tuple(CHOICES),
        scales: Collection[str] = SCALES,
    ) -> Json:
        """Measure what frame embeddings make.

        Args:
            frames: (D,) of each that the choices take.
            choices: Keys of `CHOICES`.
            scales: Of `SCALES`.

        Returns:
            By part, scale and choice: measures in 0-1, how many queries count, and the gallery.
        """
        measured: Json = {part: {scale: {} for scale in scales} for part in self.parts}
        for part, (split, protocol) in self.parts.items():
            for choice in choices:
                made = {
                    tracklet_name(one): average(one, choice, frames)
                    for one in self._tracklets[part]
                }
                for scale in scales:
                    scaled = made
                    if scale == "unit":
                        scaled = {name: to_unit(one) for name, one in made.items()}
                    measured[part][scale][choice] = rank_part(split, protocol, scaled)
        return measured

    def _embed(self, checkpoint: Checkpoint, choices: Collection[str]) -> dict[Path, Vectors]:
        embedder = Embedder(checkpoint, device=self._device)
        tracklets = [one for some in self._tracklets.values() for one in some]
        needed = {
            one.frames[place]
            for one in tracklets
            for name in choices
            for place in CHOICES[name].positions(one)
        }
        paths = sorted(needed)
        frames: dict[Path, Vectors] = {}
        for start in range(0, len(paths), CHUNK_FRAMES):
            chunk = paths[start : start + CHUNK_FRAMES]
            found = embedder.embed([self._store.read(path)[None] for path in chunk])
            frames |= {path: one.embedding for path, one in zip(chunk, found, strict=True)}
        return frames


def parts_of(experiment: Experiment, split: Split) -> dict[str, tuple[Split, str]]:
    """What is tested, with its protocol, by the name of the part; "data" where there is no mix."""
    dataset = experiment.dataset
    if not isinstance(dataset, MixedDataset):
        return {"data": (split, resolve_protocol(dataset.layout))}
    return {
        name: (part, resolve_protocol(dataset.parts[name].layout))
        for name, part in dataset.part_splits(split).items()
        if part.query
    }


def average(tracklet: Tracklet, choice: str, frames: Mapping[Path, Vectors]) -> Vectors:
    """Embed a tracklet by the embeddings of its frames, (D,)."""
    positions = CHOICES[choice].positions(tracklet)
    mean: Vectors = np.stack([frames[tracklet.frames[place]] for place in positions]).mean(axis=0)
    return mean


def to_unit(embedding: Vectors) -> Vectors:
    """Scale to length 1; what has none stays as it is."""
    length = np.linalg.norm(embedding.astype(np.float64))
    return embedding / np.float32(length) if length else embedding


def rank_part(split: Split, protocol: str, embeddings: Mapping[str, Vectors]) -> Json:
    """Measure one part of the data by its own protocol."""
    comparisons = plan_comparisons(split, protocol)
    measures = average_measures([compare(one, embeddings)[0] for one in comparisons])
    return {
        "rank_1": measures.rank_1,
        "rank_5": measures.rank_5,
        "mAP": measures.mean_average_precision,
        "queries": measures.counted,
        "gallery": measures.gallery,
    }
