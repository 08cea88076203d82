"""Re-ranking by k-reciprocal neighbours: who are each other's neighbours are likely one person.

Zhong et al., *Re-ranking Person Re-identification with k-reciprocal Encoding*, CVPR 2017,
arXiv:1701.08398v4, section 3. It needs all queries and the whole gallery at once, so it belongs to
offline evaluation: a service, which gets one query at a time, would rank otherwise.
"""

import numpy as np
from numpy.typing import NDArray

from model.errors import EvaluationError

Distances = NDArray[np.floating]


def rerank(
    distances: Distances,
    among_queries: Distances,
    among_gallery: Distances,
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
) -> NDArray[np.float64]:
    """Replace distances by ones that know whose neighbours are whose.

    With N(p, k) the k nearest tracklets of p among all others, queries included:

        R(p, k)  = {g : g in N(p, k) and p in N(g, k)}                                    Eq. 2
        R*(p, k) = R(p, k) with each R(q, k/2), q in R(p, k), two thirds of which it holds  Eq. 3
        V_p,g    = exp(-d(p, g)) for g in R*(p, k1), else 0                               Eq. 7
        V_p      = mean of V_g over the k2 nearest of p                                   Eq. 11
        d_J      = 1 - sum_j min(V_p,j, V_g,j) / sum_j max(V_p,j, V_g,j)                  Eq. 10
        d*       = (1 - weight) d_J + weight d                                            Eq. 12

    We deviate in two ways. Distances are divided by the largest of them, because exp(-d) of raw
    embeddings (d about 400) is 0 in any float, and because Eq. 12 adds d to a number within 0-1.
    And p itself belongs to R(p, k) and is the first of its own k2 nearest, which gives a tracklet
    without reciprocal neighbours a vector that is not 0.

    It presumes that a person has several tracklets, about k1 of them at best: where each stands
    once in a small gallery, neighbourhoods are full of strangers and it does harm.

    Memory is O((M + N)^2): about 8 float32 matrices of that size at most, 1 GB for 5,700
    tracklets.

    Args:
        distances: Queries to gallery, (M, N), finite, >= 0.
        among_queries: (M, M).
        among_gallery: (N, N).
        k1: Neighbours of Eq. 2; at most N - 1 are used.
        k2: Neighbours of Eq. 11, the tracklet itself included; 1 for no expansion. At most N are
            used.
        weight: Lambda of Eq. 12: 1 keeps the original order.

    Returns:
        (M, N) float64, >= 0; smaller is more similar. They are no Euclidean distances.

    Raises:
        EvaluationError: Shapes differ, or a distance is negative or not finite.
        ValueError: Another argument is out of range.
    """
    if k1 < 1 or k2 < 1 or not 0 <= weight <= 1:
        raise ValueError(f"expected k1, k2 >= 1 and weight in [0, 1], got {k1}, {k2}, {weight}")
    queries, gallery = distances.shape
    joint = _join(distances, among_queries, among_gallery)
    scale = float(joint.max(initial=0)) or 1.0
    original = distances.astype(np.float64) / scale
    if gallery < 2:
        return original
    joint /= scale
    vectors = _encode(joint, min(k1, gallery - 1), min(k2, gallery))
    del joint
    return (1 - weight) * _jaccard(vectors, queries) + weight * original


def _join(
    distances: Distances, among_queries: Distances, among_gallery: Distances
) -> NDArray[np.float32]:
    """Put three tables into one of all tracklets, (M + N, M + N), queries first."""
    queries, gallery = distances.shape
    if among_queries.shape != (queries, queries) or among_gallery.shape != (gallery, gallery):
        raise EvaluationError(
            f"expected distances {(queries, queries)} among queries and {(gallery, gallery)} among "
            f"the gallery, got {among_queries.shape} and {among_gallery.shape}"
        )
    joint = np.empty((queries + gallery,) * 2, np.float32)
    joint[:queries, :queries], joint[:queries, queries:] = among_queries, distances
    joint[queries:, :queries], joint[queries:, queries:] = distances.T, among_gallery
    if not (np.isfinite(joint).all() and (joint >= 0).all()):
        raise EvaluationError("expected finite distances >= 0, got a negative one, NaN or infinity")
    return joint


def _encode(joint: NDArray[np.float32], k1: int, k2: int) -> NDArray[np.float32]:
    """Encode each tracklet as a vector over all: Eq. 2, 3, 7 and 11."""
    nearest = _neighbours(joint, max(k1, k2 - 1))
    wide = _reciprocal(nearest, k1)
    narrow = _reciprocal(nearest, max(1, (k1 + 1) // 2))
    vectors = np.zeros_like(joint)
    for one, members in enumerate(wide):
        expanded = _expand(members, narrow)
        vectors[one, expanded] = np.exp(-joint[one, expanded])
    if k2 == 1:
        return vectors
    return np.stack([vectors[nearest[one, :k2]].mean(axis=0) for one in range(len(vectors))])


def _neighbours(joint: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Each tracklet itself and then its nearest others, (M + N, 1 + count)."""
    rows = []
    for one, row in enumerate(joint):
        near = row.copy()
        near[one] = -1  # before a twin at distance 0
        rows.append(np.argsort(near, kind="stable")[: count + 1])
    return np.stack(rows)


def _reciprocal(nearest: NDArray[np.intp], k: int) -> list[NDArray[np.intp]]:
    """R(p, k) of each tracklet p, itself included: Eq. 2."""
    chosen = nearest[:, : k + 1]
    return [near[(chosen[near] == one).any(axis=1)] for one, near in enumerate(chosen)]


def _expand(members: NDArray[np.intp], narrow: list[NDArray[np.intp]]) -> NDArray[np.intp]:
    """R*(p, k): Eq. 3."""
    expanded = [members]
    for candidate in members:
        others = narrow[candidate]
        # 3a >= 2b is a >= 2/3 b without rounding.
        if 3 * np.isin(others, members).sum() >= 2 * len(others):
            expanded.append(others)
    return np.unique(np.concatenate(expanded))


def _jaccard(vectors: NDArray[np.float32], queries: int) -> NDArray[np.float64]:
    """Jaccard distances of the queries to the gallery, (M, N): Eq. 10."""
    mass = vectors.sum(axis=1, dtype=np.float64)
    gallery = vectors[queries:]
    distances = np.empty((queries, len(gallery)))
    for query, vector in enumerate(vectors[:queries]):
        mine = np.flatnonzero(vector)  # elsewhere the minimum is 0
        shared = np.minimum(gallery[:, mine], vector[mine]).sum(axis=1, dtype=np.float64)
        # min(a, b) + max(a, b) = a + b
        distances[query] = 1 - shared / (mass[query] + mass[queries:] - shared)
    return distances.clip(min=0)
