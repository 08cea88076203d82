"""Distances between all tracklets of a labelled set, block by block, and what is kept of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from index.gallery import Embeddings

Counts = NDArray[np.int64]
Codes = NDArray[np.int32]
Progress = Callable[[int, int], None]

BINS = 1 << 16
_ROWS, _COLUMNS = 1024, 4096  # of a block: 16 MB of distances


@dataclass(frozen=True, slots=True, eq=False)
class Tracklets:
    """Labelled embeddings in numbers.

    Args:
        vectors: (N, D) float32 about their mean: distances stay the same, and less is lost to
            rounding. Networks' outputs share a large mean, which |a|^2 + |b|^2 - 2ab would
            subtract from itself.
        identities: (N,) who, numbered from 0.
        cameras: (N,) where, numbered from 0; all different where cameras do not matter.
        drawn: So many rows, from the first, are compared with one another and ask; the others are
            only asked.
    """

    vectors: Embeddings
    identities: Codes
    cameras: Codes
    drawn: int

    @property
    def reach(self) -> float:
        """More than the greatest distance there can be; bins of equal width end there."""
        longest = float(np.sqrt(np.einsum("nd,nd->n", self.vectors, self.vectors).max()))
        return max(2.001 * longest, 1e-6)


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What one look at all distances finds.

    Args:
        reach: See `Tracklets.reach`.
        impostors: (BINS,) pairs of different identities from different cameras, by distance.
        genuine: (G,) float32 distances of pairs of one identity from different cameras.
        genuine_identities: (G,) whose.
        nearest_impostor: (drawn,) float32, to the nearest other identity in another camera,
            infinite where there is none.
        nearest_identities: (drawn,) whose; -1 where there is none.
        nearest_mate: (drawn,) float32, to the nearest tracklet of the same identity in another
            camera, infinite where there is none.
    """

    reach: float
    impostors: Counts
    genuine: NDArray[np.float32]
    genuine_identities: Codes
    nearest_impostor: NDArray[np.float32]
    nearest_identities: Codes
    nearest_mate: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Impostors:
    """The nearest pairs of different identities, nearest first.

    Args:
        distances: (n,) float32, rising.
        first: (n,) the lower of the two identities' numbers.
        second: (n,) the higher.
    """

    distances: NDArray[np.float32]
    first: Codes
    second: Codes


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Distances of some rows to some columns, and which of them count.

    Args:
        rows: Places of the rows.
        columns: Places of the columns.
        distances: (rows, columns) float32.
        same: Whether both are one identity.
        compared: Whether the cameras differ.
    """

    rows: slice
    columns: slice
    distances: NDArray[np.float32]
    same: NDArray[np.bool_]
    compared: NDArray[np.bool_]

    def once(self, drawn: int) -> NDArray[np.bool_]:
        """Which of them are a pair of drawn rows that no other block or place has."""
        rows = np.arange(self.rows.start, self.rows.stop)[:, None]
        columns = np.arange(self.columns.start, self.columns.stop)
        return (columns > rows) & (columns < drawn)


def survey(tracklets: Tracklets, progress: Progress) -> Survey:
    """Look at all distances from drawn rows, to each other and to all others.

    Takes a matrix product of (drawn, D) and (D, N), and memory for one block beside the genuine
    pairs.

    Args:
        tracklets: At least one row.
        progress: Gets the rows done and all there are.
    """
    drawn, reach = tracklets.drawn, tracklets.reach
    impostors = np.zeros(BINS, np.int64)
    genuine: list[NDArray[np.float32]] = []
    owners: list[Codes] = []
    nearest = np.full(drawn, np.inf, np.float32)
    nearest_identities = np.full(drawn, -1, np.int32)
    mate = np.full(drawn, np.inf, np.float32)
    for block in _blocks(tracklets, len(tracklets.vectors)):
        if block.columns.start < drawn and block.columns.stop > block.rows.start:
            counted = block.once(drawn) & block.compared
            impostors += _count(block.distances[counted & ~block.same], reach)
            rows, _ = pairs = np.nonzero(counted & block.same)
            genuine.append(block.distances[pairs])
            owners.append(tracklets.identities[block.rows][rows])
        away = np.where(block.compared & ~block.same, block.distances, np.float32(np.inf))
        places = away.argmin(axis=1)
        found = away[np.arange(len(away)), places]
        better = found < nearest[block.rows]
        nearest[block.rows][better] = found[better]
        whose = tracklets.identities[block.columns][places]
        nearest_identities[block.rows][better] = whose[better]
        mates = np.nonzero(block.compared & block.same)
        np.minimum.at(mate[block.rows], mates[0], block.distances[mates])
        if block.columns.stop == len(tracklets.vectors):
            progress(block.rows.stop, drawn)
    empty = np.empty(0, np.float32)
    return Survey(
        reach,
        impostors,
        np.concatenate([empty, *genuine]),
        np.concatenate([empty.astype(np.int32), *owners]),
        nearest,
        nearest_identities,
        mate,
    )


def collect(tracklets: Tracklets, reach: float, up_to: int) -> Impostors:
    """Gather the impostor pairs of the lowest bins.

    Args:
        tracklets: As surveyed.
        reach: Of the survey.
        up_to: Number of the last bin.

    Returns:
        As many as the survey counted in these bins: see to it that they fit.
    """
    distances: list[NDArray[np.float32]] = [np.empty(0, np.float32)]
    first: list[Codes] = [np.empty(0, np.int32)]
    second: list[Codes] = [np.empty(0, np.int32)]
    for block in _blocks(tracklets, tracklets.drawn, upper=True):
        once = block.once(tracklets.drawn)
        near = _numbers(block.distances, reach) <= up_to
        rows, columns = pairs = np.nonzero(near & once & block.compared & ~block.same)
        ends = tracklets.identities[block.rows][rows], tracklets.identities[block.columns][columns]
        distances.append(block.distances[pairs])
        first.append(np.minimum(*ends))
        second.append(np.maximum(*ends))
    found = np.concatenate(distances)
    order = found.argsort(kind="stable")
    return Impostors(found[order], np.concatenate(first)[order], np.concatenate(second)[order])


def _blocks(tracklets: Tracklets, columns: int, *, upper: bool = False) -> Iterator[_Block]:
    """Blocks of drawn rows and the first ``columns`` columns, row by row.

    Args:
        tracklets: All of them.
        columns: How many of them are columns.
        upper: Leave out blocks that lie below the diagonal.
    """
    vectors, identities, cameras = tracklets.vectors, tracklets.identities, tracklets.cameras
    squares = np.einsum("nd,nd->n", vectors, vectors)
    for top in range(0, tracklets.drawn, _ROWS):
        rows = slice(top, min(top + _ROWS, tracklets.drawn))
        for left in range(0, columns, _COLUMNS):
            across = slice(left, min(left + _COLUMNS, columns))
            if upper and across.stop <= rows.start:
                continue
            products = vectors[rows] @ vectors[across].T
            products *= -2
            products += squares[rows, None]
            products += squares[across]
            distances = np.sqrt(np.maximum(products, 0, out=products), out=products)
            same = identities[rows, None] == identities[across]
            compared = cameras[rows, None] != cameras[across]
            yield _Block(rows, across, distances, same, compared)


def _numbers(distances: NDArray[np.float32], reach: float) -> Codes:
    """Bins that distances fall into; bin b begins at b / BINS of the reach."""
    return (distances * np.float32(BINS / reach)).astype(np.int32)


def _count(distances: NDArray[np.float32], reach: float) -> Counts:
    return np.bincount(_numbers(distances, reach), minlength=BINS)
