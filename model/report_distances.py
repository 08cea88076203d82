"""How far apart same and different people lie: a histogram from kept embeddings."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.frames import choose_frames
from model.report_data import Evaluation, Shown, Unit

_FEWEST_BINS, _MOST_BINS = 12, 48
_MOST_PAIRS = 1_000_000  # of a unit; a histogram needs no more


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Distances of pairs of tracklets from different cameras.

    Args:
        edges: (n + 1,) float64, rising Euclidean distances.
        genuine: (n,) int64, pairs of one person.
        impostor: (n,) int64, pairs of two people.
    """

    edges: NDArray[np.float64]
    genuine: NDArray[np.int64]
    impostor: NDArray[np.int64]


def distance_histogram(evaluation: Evaluation) -> Histogram | None:
    """Count distances between queries and the tested tracklets of other cameras.

    Args:
        evaluation: Its units' distances are counted together.

    Returns:
        Histogram, or None where the embeddings are gone.
    """
    genuine: list[NDArray[np.float64]] = []
    impostor: list[NDArray[np.float64]] = []
    for unit in evaluation.units:
        found = _distances(unit, evaluation.embeddings(unit))
        genuine.append(found[0])
        impostor.append(found[1])
    same, different = np.concatenate(genuine), np.concatenate(impostor)
    if not len(same) or not len(different):
        return None
    bins = min(max(math.isqrt(len(same)), _FEWEST_BINS), _MOST_BINS)  # few pairs make spikes
    low = min(same.min(), different.min())
    # Constant embeddings have one distance, which still needs a bin of some width.
    edges = np.linspace(low, max(same.max(), different.max(), low + 1e-6), bins + 1)
    return Histogram(edges, np.histogram(same, edges)[0], np.histogram(different, edges)[0])


def _distances(
    unit: Unit, embeddings: Mapping[str, NDArray[np.float32]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances of the unit's queries to the same person, and to other people."""
    queries = _embedded((ranking.query for ranking in unit.rankings), embeddings)
    people = {query.identity for query in queries.values()}
    # A cache holds the tracklets of all splits; those of this one are of its queries' people.
    tested = {
        name: vector for name, vector in embeddings.items() if name.split("/", 2)[0] in people
    }
    if not queries or not tested:
        return np.empty(0), np.empty(0)
    cameras = np.array([name.split("/", 2)[1] for name in tested])
    identities = np.array([name.split("/", 2)[0] for name in tested])
    vectors = np.stack(list(tested.values())).astype(np.float64)
    same: list[NDArray[np.float64]] = []
    different: list[NDArray[np.float64]] = []
    for query in _few(list(queries.values()), most=_MOST_PAIRS // len(tested) + 1):
        away = np.linalg.norm(vectors - embeddings[query.key], axis=1)
        elsewhere = cameras != query.camera
        correct = identities == query.identity
        same.append(away[elsewhere & correct])
        different.append(away[elsewhere & ~correct])
    return np.concatenate(same), np.concatenate(different)


def _embedded(
    tracklets: Iterable[Shown], embeddings: Mapping[str, NDArray[np.float32]]
) -> dict[str, Shown]:
    """Keep each tracklet once that has an embedding, by name."""
    return {one.key: one for one in tracklets if one.key in embeddings}


def _few(queries: list[Shown], most: int) -> list[Shown]:
    return [queries[place] for place in choose_frames(len(queries), most)]
