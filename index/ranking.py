"""From nearest tracklets to ranked identities, and from the nearest distance to a decision.

Pure numpy: whoever stores the vectors hands in a `Source`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from index.gallery import Embeddings

Rows = NDArray[np.int64]
Decision = Literal["match", "no_match"]
Squared = TypeVar("Squared", float, NDArray[np.float64])
Floating = TypeVar("Floating", bound=np.floating[Any])

_EPS = float(np.finfo(np.float32).eps)
_TINY = float(np.finfo(np.float32).tiny)
# Two squared distances further apart than this factor have different square roots in float32.
_SAME_FLOAT32 = 1 + 4 * _EPS
_GROWTH = 8
_FETCHED_AT_ONCE = 1024
# Where distances are estimates: so many rows are measured first, and then so many at a time.
_MEASURED_FIRST, _MEASURED_AT_ONCE = 80, 128
# Of a million drawn people's tracklets, shortened to 256 numbers of a byte, this loses no identity
# that is among the candidates; of 20,000 as RaBitQ, 3 of 1000. Twice or four times as much doubt
# costs up to three times as many rows.
_DOUBT = 0.25


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


ANY_ERROR = Error(0.0, float("inf"))
"""Of distances that say nothing."""


@dataclass(frozen=True, slots=True)
class Nearest:
    """What a source has found nearest to a query.

    Args:
        rows: (n,) int64.
        squared: Their squared distances, (n,) float32, ascending; estimates where the source is
            not exhaustive.
        horizon: Every row that was looked at and is not among these is at least this far away,
            squared, by the same measure; infinite where there is none.
        error: Of the distances and of the horizon; not used where they are estimates.
    """

    rows: Rows
    squared: NDArray[np.float32]
    horizon: float
    error: Error


class Source(Protocol):
    """What a ranking needs to know of the rows that take part in one search.

    A row is whatever integer the source calls it by; so is a group.
    """

    @property
    def count(self) -> int:
        """How many rows take part."""

    @property
    def exhaustive(self) -> bool:
        """Whether `nearest` looks at every row, and bounds the error of what it says.

        If not, an answer is as good as what it finds and estimates.
        """

    def nearest(self, count: int, without: Rows) -> Nearest:
        """The rows nearest to the query.

        Args:
            count: About how many.
            without: Groups whose rows are left out.
        """

    def groups(self, rows: Rows) -> Rows:
        """The group of each row, (n,) int64."""

    def vectors(self, rows: Rows) -> Embeddings:
        """The stored vectors of rows, (n, D) float32."""

    def tracklet_ids(self, rows: Rows) -> Sequence[str]:
        """The ids of rows, in their order."""


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

    An exhaustive source is asked for more and more rows until no row that it has not named can
    change the first ``top_k`` groups, their nearest rows or their order. Of any other, what it
    finds is measured in the order of its estimates, until those that are left are too far for
    them to be that wrong. Groups that are there are left out of the next round, so one identity
    with many tracklets does not hide the others.

    Args:
        query: (D,) float32.
        source: The rows that take part.
        top_k: How many groups at most, >= 1.
        first: How many rows to ask for in the first round.

    Returns:
        At most ``top_k`` groups, by distance, then by tracklet id. Distances are exact.
    """
    measured = _Measured(query, source, top_k)
    if source.exhaustive:
        measured.all_of(_contenders(source, top_k, first))
        return measured.ranked()
    closed, wanted = np.empty(0, dtype=np.int64), first
    while True:
        found = source.nearest(wanted, closed)
        if len(found.rows):
            measured.nearest_of(found)
        if wanted >= source.count or measured.is_enough:
            return measured.ranked()
        closed = measured.groups
        # Where nothing was near, only a look at everything says that there is nothing.
        wanted = wanted * _GROWTH if len(found.rows) else source.count


def _contenders(source: Source, top_k: int, first: int) -> "_Candidates":
    """All rows that may be the nearest of one of the nearest groups, of an exhaustive source."""
    certain, closed = _Candidates.none(), np.empty(0, dtype=np.int64)
    wanted = first
    while True:
        found = _Candidates.nearest(source, wanted, closed)
        candidates = certain.joined(found)
        groups, group_of, reach = candidates.reach()
        cutoff = float(np.partition(reach, top_k - 1)[top_k - 1]) if len(reach) >= top_k else np.inf
        contenders = candidates.contenders(cutoff, reach[group_of])
        if found.horizon == np.inf or found.horizon > cutoff:
            return contenders
        closed = groups[reach < found.horizon]
        certain = contenders.only(closed)
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
        lower, upper = found.error.lower(squared), found.error.upper(squared)
        horizon = np.inf if found.horizon == np.inf else found.error.lower(found.horizon)
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


class _Measured:
    """Rows whose distances are exact, and what follows from them.

    Args:
        query: (D,) float32.
        source: Where the vectors are.
        top_k: How many groups are wanted.
    """

    def __init__(self, query: Embeddings, source: Source, top_k: int) -> None:
        self._query = query.astype(np.float64)
        self._source = source
        self._top_k = top_k
        self._rows = np.empty(0, dtype=np.int64)
        self._group_of = np.empty(0, dtype=np.int64)
        self._squared = np.empty(0)

    @property
    def groups(self) -> Rows:
        """Those of which a row is measured, each once."""
        return np.unique(self._group_of)

    @property
    def is_enough(self) -> bool:
        """Whether there are as many groups as are wanted."""
        return len(self.groups) >= self._top_k

    def all_of(self, candidates: _Candidates) -> None:
        """Measure all candidates."""
        self._measure(candidates.rows, candidates.groups)

    def nearest_of(self, found: Nearest) -> None:
        """Measure what was found until the rest is too far, or too far for its own group.

        How wrong estimates are is seen in those that were measured: a row counts as too far if its
        estimate would have to exceed its distance by more than any did, and by `_DOUBT` standard
        deviations on top of that. The first to be measured are those that most likely matter: the
        nearest rows, and the nearest of each of the nearest groups.

        Args:
            found: (n,) rows, n >= 1, with estimates.
        """
        estimates = found.squared.astype(np.float64)
        groups = self._source.groups(found.rows)
        waiting = np.ones(len(found.rows), dtype=np.bool_)
        errors = np.empty(0)
        chosen = _first_to_measure(groups, self._top_k)
        while len(chosen):
            exact = self._measure(found.rows[chosen], groups[chosen])
            errors = np.concatenate([errors, exact - estimates[chosen]])
            waiting[chosen] = False
            least = estimates + errors.min() - _DOUBT * errors.std()  # (n,)
            chosen = np.flatnonzero(waiting & (least <= self._reach(groups)))[:_MEASURED_AT_ONCE]

    def ranked(self) -> list[Ranked]:
        """The nearest groups, in order."""
        if not len(self._rows):
            return []
        distances = np.sqrt(self._squared).astype(np.float32)
        _, group_of, nearest = _nearest_of_groups(self._group_of, distances)
        # Rows that are equally near differ by their ids, and so do groups.
        named = (distances == nearest[group_of]) & (distances <= self._cutoff(nearest))
        rows, group_of, distances = self._rows[named], group_of[named], distances[named]
        best: dict[int, Ranked] = {}
        tracklet_ids = self._source.tracklet_ids(rows)
        each = map(Ranked, distances.tolist(), tracklet_ids, rows.tolist())
        for group, ranked in zip(group_of.tolist(), each, strict=True):
            best[group] = min(best.get(group, ranked), ranked)
        return sorted(best.values())[: self._top_k]

    def _reach(self, groups: Rows) -> NDArray[np.float64]:
        """How near a row of each group has to be to change the answer, squared, (n,)."""
        known, _, nearest = _nearest_of_groups(self._group_of, self._squared)
        place = np.minimum(np.searchsorted(known, groups), len(known) - 1)
        own = np.where(known[place] == groups, nearest[place], np.inf)
        return np.minimum(own, self._cutoff(nearest))

    def _cutoff(self, nearest: NDArray[np.floating[Any]]) -> float:
        """How far the last of the nearest groups is; infinite where there are not enough."""
        last = self._top_k - 1
        return float(np.partition(nearest, last)[last]) if len(nearest) > last else np.inf

    def _measure(self, rows: Rows, groups: Rows) -> NDArray[np.float64]:
        """Measure more rows, exactly; returns their squared distances."""
        squared = np.empty(len(rows))
        for start in range(0, len(rows), _FETCHED_AT_ONCE):
            part = slice(start, start + _FETCHED_AT_ONCE)
            difference = self._source.vectors(rows[part]) - self._query  # (n, D) float64
            squared[part] = np.square(difference, out=difference).sum(axis=1)
        self._rows = np.concatenate([self._rows, rows])
        self._group_of = np.concatenate([self._group_of, groups])
        self._squared = np.concatenate([self._squared, squared])
        return squared


def _first_to_measure(groups: Rows, top_k: int) -> Rows:
    """Places of the nearest rows, and of the nearest row of each of the nearest groups."""
    _, firsts = np.unique(groups, return_index=True)
    firsts = np.sort(firsts)[: 2 * top_k]
    nearest = np.arange(min(len(groups), _MEASURED_FIRST))
    return np.union1d(firsts, nearest)


def _nearest_of_groups(
    group_of: Rows, distances: NDArray[Floating]
) -> tuple[Rows, Rows, NDArray[Floating]]:
    """The groups, which of them each row is of, and how near the nearest row of each is."""
    groups, places = np.unique(group_of, return_inverse=True)
    nearest = np.full(len(groups), np.inf, dtype=distances.dtype)
    np.minimum.at(nearest, places, distances)
    return groups, places, nearest
