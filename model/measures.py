"""Measures of a ranking: CMC and mAP, with junk left out and ties counted against us.

The cumulative matching characteristic at rank k (CMC) is the share of queries that meet a
correct tracklet among the first k of the gallery; the average precision (AP) of a query is the
mean, over its correct tracklets, of the precision at their places, and mAP is its mean over
queries (Zheng et al., *Scalable Person Re-identification: A Benchmark*, ICCV 2015, section 5; the
CMC of one correct tracklet a query is that of VIPeR and iLIDS-VID). With one correct tracklet a
query, mAP is the mean reciprocal rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.errors import EvaluationError

Distances = NDArray[np.floating]
LONGEST_CMC = 50


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """How well queries found their identity.

    Args:
        cmc: (min(N, 50),) float64, share of counted queries with a match within rank 1, 2, ...
        mean_average_precision: mAP, 0-1.
        mean_inverse_negative_penalty: mINP, 0-1: matches over the rank of the last of them, the
            mean over queries (Ye et al., arXiv:2001.04193v2, section 3.5).
        ranks: (M,) int64, rank of each query's first match, from 1; 0 for a query that is skipped.
        average_precisions: (M,) float64, 0-1; NaN for a query that is skipped.
        gallery: How many tracklets were searched in, N.
    """

    cmc: NDArray[np.float64]
    mean_average_precision: float
    mean_inverse_negative_penalty: float
    ranks: NDArray[np.int64]
    average_precisions: NDArray[np.float64]
    gallery: int

    @property
    def counted(self) -> int:
        """Queries that have a match in the gallery; all shares are shares of them."""
        return int((self.ranks > 0).sum())

    @property
    def skipped(self) -> int:
        """Queries that nothing in the gallery could have answered."""
        return len(self.ranks) - self.counted

    @property
    def rank_1(self) -> float:
        """CMC at rank 1."""
        return self.rank(1)

    @property
    def rank_5(self) -> float:
        """CMC at rank 5."""
        return self.rank(5)

    @property
    def rank_10(self) -> float:
        """CMC at rank 10."""
        return self.rank(10)

    @property
    def rank_20(self) -> float:
        """CMC at rank 20."""
        return self.rank(20)

    def rank(self, k: int) -> float:
        """CMC at rank k, 1 <= k <= 50; 1 where the gallery is shorter."""
        if not 1 <= k <= LONGEST_CMC:
            raise ValueError(f"k: expected 1 to {LONGEST_CMC}, got {k}")
        return float(self.cmc[min(k, len(self.cmc)) - 1])


def rank_queries(
    distances: Distances,
    query_identities: Sequence[str],
    gallery_identities: Sequence[str],
    query_cameras: Sequence[str],
    gallery_cameras: Sequence[str],
    *,
    exclude_same_camera: bool = True,
) -> Measures:
    """Rank the gallery for each query and measure it.

    Junk, what has the query's identity and its camera, is neither right nor wrong: it is left out.
    Ties count against us: at equal distance, wrong tracklets stand before right ones, so that an
    embedding which is the same for everybody has rank-1 of 0 and not of 1.

    Args:
        distances: (M, N), finite; smaller is more similar.
        query_identities: M names; the other sequences are alike, N names of the gallery.
        gallery_identities: See there.
        query_cameras: See there.
        gallery_cameras: See there.
        exclude_same_camera: Whether junk is left out, or counts as right.

    Raises:
        EvaluationError: Shapes differ, a distance is not finite, or no query has a match.
    """
    _check(distances, query_identities, gallery_identities, query_cameras, gallery_cameras)
    identities, cameras = np.array([*gallery_identities]), np.array([*gallery_cameras])
    queries = len(query_identities)
    ranks = np.zeros(queries, np.int64)
    precisions = np.full(queries, np.nan)
    penalties = np.full(queries, np.nan)
    for number in range(queries):
        correct = identities == query_identities[number]
        valid = np.ones(len(identities), bool)
        if exclude_same_camera:
            valid = ~(correct & (cameras == query_cameras[number]))
        order = order_gallery(distances[number], correct, valid)
        places = np.flatnonzero(correct[order]) + 1  # of the matches, from 1
        if len(places):
            ranks[number] = places[0]
            precisions[number] = np.mean(np.arange(1, len(places) + 1) / places)
            penalties[number] = len(places) / places[-1]
    return _summarise(ranks, precisions, penalties, gallery=len(identities))


def order_gallery(
    distances: Distances, correct: NDArray[np.bool_], valid: NDArray[np.bool_]
) -> NDArray[np.intp]:
    """Rank the gallery for one query, wrong before right at equal distance.

    Args:
        distances: (N,).
        correct: (N,), whether it has the query's identity.
        valid: (N,), False for junk.

    Returns:
        Indices of the valid ones, nearest first.
    """
    kept = np.flatnonzero(valid)
    return kept[np.lexsort((correct[kept], distances[kept]))]


def average_measures(parts: Sequence[Measures]) -> Measures:
    """The mean of measures that were taken apart, as of several camera pairs.

    Each part weighs as much as it has counted queries, so that each query weighs the same: a pair
    of cameras that share one person says little. ``ranks`` and ``average_precisions`` are those of
    all parts, one after another; ``gallery`` is the mean of theirs, rounded.

    Raises:
        EvaluationError: There is no part.
    """
    if not parts:
        raise EvaluationError("expected at least one measure to average, got none")
    length = max(len(part.cmc) for part in parts)
    # Beyond the end of a short gallery every counted query has met its match.
    curves = [np.pad(part.cmc, (0, length - len(part.cmc)), mode="edge") for part in parts]
    weights = [part.counted for part in parts]
    precisions = [part.mean_average_precision for part in parts]
    penalties = [part.mean_inverse_negative_penalty for part in parts]
    return Measures(
        cmc=np.average(curves, axis=0, weights=weights),
        mean_average_precision=float(np.average(precisions, weights=weights)),
        mean_inverse_negative_penalty=float(np.average(penalties, weights=weights)),
        ranks=np.concatenate([part.ranks for part in parts]),
        average_precisions=np.concatenate([part.average_precisions for part in parts]),
        gallery=round(float(np.mean([part.gallery for part in parts]))),
    )


def _summarise(
    ranks: NDArray[np.int64],
    precisions: NDArray[np.float64],
    penalties: NDArray[np.float64],
    gallery: int,
) -> Measures:
    counted = ranks > 0
    if not counted.any():
        raise EvaluationError(
            f"expected at least one query with a match in the gallery, got none among {len(ranks)}"
        )
    thresholds = np.arange(1, min(gallery, LONGEST_CMC) + 1)
    return Measures(
        cmc=np.mean(ranks[counted][:, None] <= thresholds, axis=0),
        mean_average_precision=float(precisions[counted].mean()),
        mean_inverse_negative_penalty=float(penalties[counted].mean()),
        ranks=ranks,
        average_precisions=precisions,
        gallery=gallery,
    )


def _check(
    distances: Distances,
    query_identities: Sequence[str],
    gallery_identities: Sequence[str],
    query_cameras: Sequence[str],
    gallery_cameras: Sequence[str],
) -> None:
    expected = (len(query_identities), len(gallery_identities))
    if distances.shape != expected:
        raise EvaluationError(f"expected distances {expected}, got {distances.shape}")
    cameras = (len(query_cameras), len(gallery_cameras))
    if cameras != expected:
        raise EvaluationError(f"expected cameras of {expected} tracklets, got {cameras}")
    if not np.isfinite(distances).all():
        row, column = np.argwhere(~np.isfinite(distances))[0]
        raise EvaluationError(
            f"expected finite distances, got {distances[row, column]} between query {row} "
            f"and gallery tracklet {column}"
        )
