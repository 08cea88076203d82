"""From nearest tracklets to ranked identities, and from the nearest distance to a decision.

Pure numpy: whoever stores the vectors hands in a `Source`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from index.gallery import Embeddings

Rows = NDArray[np.int64]
Decision = Literal["match", "no_match"]

_EPS = float(np.finfo(np.float32).eps)
_TINY = float(np.finfo(np.float32).tiny)
# Two squared distances further apart than this factor have different square roots in float32.
_SAME_FLOAT32 = 1 + 4 * _EPS
_GROWTH = 8
_FETCHED_AT_ONCE = 1024


class Source(Protocol):
    """What a ranking needs to know of the rows that take part in one search.

    A row is whatever integer the source calls it by; so is a group.
    """

    @property
    def count(self) -> int:
        """How many rows take part."""

    @property
    def exhaustive(self) -> bool:
        """Whether `nearest` looks at every row. If not, an answer is as good as what it finds."""

    @property
    def error(self) -> float | None:
        """Bound of the relative error of `nearest`'s distances; None where they are estimates."""

    def nearest(self, count: int, without: Rows) -> tuple[Rows, NDArray[np.float32]]:
        """The rows nearest to the query.

        Args:
            count: How many; fewer come back when there are no more.
            without: Groups whose rows are left out.

        Returns:
            Rows, (n,) int64, and their squared distances, (n,) float32, ascending.
        """

    def groups(self, rows: Rows) -> Rows:
        """The group of each row, (n,) int64."""

    def fetch(self, rows: Rows) -> tuple[Sequence[str], Embeddings]:
        """The tracklet ids and the stored vectors, (n, D) float32, of rows."""


@dataclass(frozen=True, slots=True, order=True)
class Ranked:
    """One rank: the nearest row of a group. The order of its fields is the order of the ranking.

    Args:
        distance: Euclidean, float64 arithmetic on the stored vectors, rounded to float32.
        tracklet_id: Breaks ties.
        row: The source's row.
    """

    distance: float
    tracklet_id: str
    row: int


def decide(nearest: float | None, threshold: float | None) -> Decision | None:
    """Say whether anybody was found.

    Args:
        nearest: Distance of the nearest tracklet; None when there is none.
        threshold: Greatest distance that still counts as a match; None while nobody has set one.

    Returns:
        None without a threshold.
    """
    if threshold is None:
        return None
    return "match" if nearest is not None and nearest <= threshold else "no_match"


def summation_error(dimension: int) -> float:
    """Bound of the relative error of a squared distance that was summed directly in float32.

    Differences, squares and any order of summation of D non-negative terms cost at most
    (D + 2) half-units of rounding (Higham, Accuracy and Stability of Numerical Algorithms, 3.1);
    this is twice that. The expansion |x|^2 + |y|^2 - 2xy, which FAISS uses from 20 queries on, has
    no such bound.
    """
    return (dimension + 4) * _EPS


def rank(query: Embeddings, source: Source, *, top_k: int, first: int) -> list[Ranked]:
    """Rank groups by their nearest row: exactly, if the source is exhaustive.

    The source is asked for more and more rows until no row that it has not named can change the
    first ``top_k`` groups, their nearest rows or their order. Groups that are already certain are
    left out of the next round, so one identity with many tracklets does not hide the others.

    Args:
        query: (D,) float32.
        source: The rows that take part.
        top_k: How many groups at most, >= 1.
        first: How many rows to ask for in the first round.

    Returns:
        At most ``top_k`` groups, by distance, then by tracklet id.
    """
    certain, closed = _Candidates.none(), np.empty(0, dtype=np.int64)
    wanted = first
    while True:
        found = _Candidates.nearest(source, wanted, closed, dimension=len(query))
        candidates = certain.joined(found)
        groups, reach = candidates.reach()
        cutoff = float(np.partition(reach, top_k - 1)[top_k - 1]) if len(reach) >= top_k else np.inf
        complete = wanted >= source.count or (source.exhaustive and len(found.rows) < wanted)
        enough = len(groups) >= top_k if not source.exhaustive else found.horizon > cutoff
        if complete or enough:
            return _settle(query, source, candidates.contenders(cutoff))[:top_k]
        if source.exhaustive:
            closed = groups[reach < found.horizon]
            certain = candidates.contenders(cutoff).only(closed)
        wanted *= _GROWTH


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Rows with bounds of their true squared distances, (n,) each.

    ``horizon`` is a lower bound for every row that the source has not named.
    """

    rows: Rows
    groups: Rows
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    horizon: float

    @classmethod
    def none(cls) -> "_Candidates":
        integers, floats = np.empty(0, dtype=np.int64), np.empty(0)
        return cls(integers, integers, floats, floats, -np.inf)

    @classmethod
    def nearest(cls, source: Source, count: int, without: Rows, *, dimension: int) -> "_Candidates":
        rows, found = source.nearest(count, without)
        squared = found.astype(np.float64)
        if source.error is None:
            lower, upper = np.zeros_like(squared), np.full_like(squared, np.inf)
        else:
            # Squares may underflow, one by one, where the relative bound says nothing.
            underflow = dimension * _TINY
            lower = squared / (1 + source.error) - underflow
            upper = squared / (1 - source.error) + underflow
        horizon = float(lower[-1]) if len(rows) else -np.inf
        return cls(rows, source.groups(rows), lower, upper, horizon)

    def joined(self, other: "_Candidates") -> "_Candidates":
        return _Candidates(
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.groups, other.groups]),
            np.concatenate([self.lower, other.lower]),
            np.concatenate([self.upper, other.upper]),
            other.horizon,
        )

    def reach(self) -> tuple[Rows, NDArray[np.float64]]:
        """The groups, and for each what its nearest row and all that tie with it stay within."""
        groups, index_of = np.unique(self.groups, return_inverse=True)
        reach = np.full(len(groups), np.inf)
        np.minimum.at(reach, index_of, self.upper)
        return groups, reach * _SAME_FLOAT32

    def contenders(self, cutoff: float) -> "_Candidates":
        """The rows that may be the nearest of a group whose nearest is within ``cutoff``."""
        groups, reach = self.reach()
        own_reach = reach[np.searchsorted(groups, self.groups)]
        return self._where(self.lower <= np.minimum(own_reach, cutoff))

    def only(self, groups: Rows) -> "_Candidates":
        return self._where(np.isin(self.groups, groups))

    def _where(self, mask: NDArray[np.bool_]) -> "_Candidates":
        return _Candidates(
            self.rows[mask], self.groups[mask], self.lower[mask], self.upper[mask], self.horizon
        )


def _settle(query: Embeddings, source: Source, contenders: _Candidates) -> list[Ranked]:
    """Measure the contenders again, exactly, and keep the nearest of each group, in order."""
    nearest: dict[int, Ranked] = {}
    for start in range(0, len(contenders.rows), _FETCHED_AT_ONCE):
        part = slice(start, start + _FETCHED_AT_ONCE)
        rows, groups = contenders.rows[part], contenders.groups[part].tolist()
        tracklet_ids, vectors = source.fetch(rows)
        difference = vectors.astype(np.float64) - query.astype(np.float64)  # (n, D)
        distances = np.sqrt(np.square(difference).sum(axis=1)).astype(np.float32).tolist()
        for ranked, group in zip(
            map(Ranked, distances, tracklet_ids, rows.tolist()), groups, strict=True
        ):
            nearest[group] = min(nearest.get(group, ranked), ranked)
    return sorted(nearest.values())
