"""From nearest tracklets to ranked identities, and from the nearest distance to a decision.

Pure numpy: whoever stores the vectors hands in a `Source`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from index.gallery import Embeddings

Rows = NDArray[np.int64]
Decision = Literal["match", "no_match"]
Squared = TypeVar("Squared", float, NDArray[np.float64])

_EPS = float(np.finfo(np.float32).eps)
_TINY = float(np.finfo(np.float32).tiny)
# Two squared distances further apart than this factor have different square roots in float32.
_SAME_FLOAT32 = 1 + 4 * _EPS
_GROWTH = 8
_FETCHED_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Error:
    """How far a measured squared distance s may be from the true one, t: |s - t| <= r t + a.

    Args:
        relative: r, less than 1.
        absolute: a.
    """

    relative: float
    absolute: float

    def lower(self, squared: Squared) -> Squared:
        """The least that the true squared distances can be."""
        return (squared - self.absolute) / (1 + self.relative)

    def upper(self, squared: Squared) -> Squared:
        """The most that the true squared distances can be."""
        return (squared + self.absolute) / (1 - self.relative)


@dataclass(frozen=True, slots=True)
class Nearest:
    """What a source has found nearest to a query.

    Args:
        rows: (n,) int64.
        squared: Their squared distances, (n,) float32, ascending.
        horizon: Every row that was looked at and is not among these is at least this far away,
            squared, by the same measure; infinite where there is none.
        error: Of the distances and of the horizon; None where they are estimates.
    """

    rows: Rows
    squared: NDArray[np.float32]
    horizon: float
    error: Error | None


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

    def nearest(self, count: int, without: Rows) -> Nearest:
        """The rows nearest to the query.

        Args:
            count: About how many.
            without: Groups whose rows are left out.
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


def summation_error(dimension: int) -> Error:
    """Error of a squared distance that was summed directly in float32.

    Differences, squares and any order of summation of D non-negative terms cost at most
    (D + 2) half-units of rounding (Higham, Accuracy and Stability of Numerical Algorithms, 3.1);
    this is twice that. Squares may underflow, one by one, where that bound says nothing.
    """
    return Error(_gamma(dimension), dimension * _TINY)


def expansion_error(query: Embeddings) -> Error:
    """Error of a squared distance that was expanded to |x|^2 + |y|^2 - 2xy in float32.

    The two squares and the product each cost at most D half-units of rounding, of |x|^2, |y|^2 and
    |x||y| (Higham, 3.1), and adding them up a few more: with d the distance, in all

        |s - d^2| <= g (|x| + |y|)^2 <= g (2|x| + d)^2 <= g (6|x|^2 + 3 d^2)

    where g is twice (D + 4) half-units. So |y| need not be known: a far row is allowed more.
    Products may underflow, one by one, in each of the three sums.

    Args:
        query: x, (D,) float32.
    """
    dimension = len(query)
    square = float(np.square(query, dtype=np.float64).sum())
    gamma = _gamma(dimension)
    return Error(3 * gamma, 6 * gamma * square + 4 * dimension * _TINY)


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
        found = _Candidates.nearest(source, wanted, closed)
        candidates = certain.joined(found)
        groups, group_of, reach = candidates.reach()
        cutoff = float(np.partition(reach, top_k - 1)[top_k - 1]) if len(reach) >= top_k else np.inf
        complete = found.horizon == np.inf if source.exhaustive else wanted >= source.count
        enough = len(groups) >= top_k if not source.exhaustive else found.horizon > cutoff
        if complete or enough:
            contenders = candidates.contenders(cutoff, reach[group_of])
            return _settle(query, source, contenders)[:top_k]
        if source.exhaustive:
            closed = groups[reach < found.horizon]
            certain = candidates.contenders(cutoff, reach[group_of]).only(closed)
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
    def nearest(cls, source: Source, count: int, without: Rows) -> "_Candidates":
        found = source.nearest(count, without)
        squared = found.squared.astype(np.float64)
        groups = source.groups(found.rows)
        if found.error is None:
            lower, upper = np.zeros_like(squared), np.full_like(squared, np.inf)
            return cls(found.rows, groups, lower, upper, -np.inf)
        lower, upper = found.error.lower(squared), found.error.upper(squared)
        horizon = found.error.lower(found.horizon)
        return cls(found.rows, groups, lower, upper, horizon)

    def joined(self, other: "_Candidates") -> "_Candidates":
        return _Candidates(
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.groups, other.groups]),
            np.concatenate([self.lower, other.lower]),
            np.concatenate([self.upper, other.upper]),
            other.horizon,
        )

    def reach(self) -> tuple[Rows, Rows, NDArray[np.float64]]:
        """The groups, which of them each row is of, and how far each group may matter.

        That is what its nearest row and all that tie with it stay within.
        """
        groups, group_of = np.unique(self.groups, return_inverse=True)
        reach = np.full(len(groups), np.inf)
        np.minimum.at(reach, group_of, self.upper)
        return groups, group_of, reach * _SAME_FLOAT32

    def contenders(self, cutoff: float, own_reach: NDArray[np.float64]) -> "_Candidates":
        """The rows that may be the nearest of a group whose nearest is within ``cutoff``."""
        return self._where(self.lower <= np.minimum(own_reach, cutoff))

    def only(self, groups: Rows) -> "_Candidates":
        return self._where(np.isin(self.groups, groups))

    def _where(self, mask: NDArray[np.bool_]) -> "_Candidates":
        return _Candidates(
            self.rows[mask], self.groups[mask], self.lower[mask], self.upper[mask], self.horizon
        )


def _gamma(dimension: int) -> float:
    return (dimension + 4) * _EPS


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
