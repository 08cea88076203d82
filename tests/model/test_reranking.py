"""Re-ranking against the paper's equations written as slow loops over sets."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from model.errors import EvaluationError
from model.reranking import rerank

Table = NDArray[np.float64]


def tables(points: Table, queries: int) -> tuple[Table, Table, Table]:
    """Distances of queries to gallery, among queries and among the gallery."""
    every = np.linalg.norm(points[:, None] - points[None], axis=2)
    return every[:queries, queries:], every[:queries, :queries], every[queries:, queries:]


def draw(seed: int, queries: int = 6, gallery: int = 14) -> tuple[Table, Table, Table]:
    return tables(np.random.default_rng(seed).random((queries + gallery, 3)), queries)


def slow_rerank(
    parts: tuple[Table, Table, Table], k1: int, k2: int, weight: float
) -> list[list[float]]:
    """Eq. 2, 3, 7, 11, 10 and 12 of arXiv:1701.08398, one tracklet at a time."""
    qg, qq, gg = parts
    m, n = qg.shape
    k1 = min(k1, n - 1)
    k2 = min(k2, n)
    everyone = range(m + n)
    largest = max(qg.max(), qq.max(), gg.max())

    def d(a: int, b: int) -> float:
        if a >= m and b < m:
            a, b = b, a
        if b < m:
            return float(qq[a, b] / largest)
        return float((qg[a, b - m] if a < m else gg[a - m, b - m]) / largest)

    def nearest(p: int, k: int) -> list[int]:
        return [p, *sorted((g for g in everyone if g != p), key=lambda g: d(p, g))[:k]]

    def reciprocal(p: int, k: int) -> set[int]:
        return {g for g in nearest(p, k) if p in nearest(g, k)}

    def robust(p: int) -> set[int]:
        first = reciprocal(p, k1)
        result = set(first)
        for q in first:
            others = reciprocal(q, max(1, math.floor(k1 / 2 + 0.5)))
            if len(first & others) >= 2 / 3 * len(others) - 1e-9:
                result |= others
        return result

    plain = []
    for p in everyone:
        members = robust(p)
        plain.append([math.exp(-d(p, g)) if g in members else 0.0 for g in everyone])
    expanded = [
        [sum(plain[g][j] for g in nearest(p, k2 - 1)) / k2 for j in everyone] for p in everyone
    ]
    result = []
    for p in range(m):
        row = []
        for g in range(m, m + n):
            both = [*zip(expanded[p], expanded[g], strict=True)]
            jaccard = 1 - sum(map(min, both)) / sum(map(max, both))
            row.append((1 - weight) * jaccard + weight * d(p, g))
        result.append(row)
    return result


@pytest.mark.parametrize(
    ("k1", "k2", "weight"), [(20, 6, 0.3), (5, 3, 0.3), (4, 1, 0.0), (1, 2, 0.5), (7, 30, 0.1)]
)
@pytest.mark.parametrize("seed", range(3))
def test_the_equations_as_slow_loops_agree(seed: int, k1: int, k2: int, weight: float) -> None:
    parts = draw(seed)

    found = rerank(*parts, k1=k1, k2=k2, weight=weight)

    assert found == pytest.approx(np.array(slow_rerank(parts, k1, k2, weight)), abs=1e-6)


def test_the_order_of_queries_and_gallery_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    qg, qq, gg = draw(0)
    rows, columns = rng.permutation(len(qq)), rng.permutation(len(gg))

    mixed = rerank(
        qg[np.ix_(rows, columns)], qq[np.ix_(rows, rows)], gg[np.ix_(columns, columns)], k1=5, k2=3
    )

    assert mixed == pytest.approx(rerank(qg, qq, gg, k1=5, k2=3)[np.ix_(rows, columns)], abs=1e-6)


def test_the_full_weight_on_the_original_distance_keeps_the_order() -> None:
    qg, qq, gg = draw(1)

    found = rerank(qg, qq, gg, weight=1.0)

    assert np.array_equal(np.argsort(found, axis=1), np.argsort(qg, axis=1))


def test_the_scale_of_distances_does_not_matter() -> None:
    """Raw embeddings are hundreds apart, where exp(-d) is 0."""
    parts = draw(2)
    large = [1000 * part for part in parts]

    assert rerank(large[0], large[1], large[2]) == pytest.approx(rerank(*parts), abs=1e-6)


def test_it_helps_where_a_stranger_stands_between_query_and_match() -> None:
    """The match is a link of a chain that leads to the query; the stranger is alone, but nearer."""
    chain = [[0.0, 0], [1.0, 0], [0.9, 0.3], [1.1, 0.3], [0.5, 0.2], [0.5, -0.2]]
    query, match, stranger = [0.0, 0], [1.0, 0], [0.0, -0.95]
    crowd = [[-0.1, -1.8], [0.1, -1.8], [0.0, -1.6], [0.1, -1.5]]  # whom the stranger is near
    points = np.array([query, match, stranger, *chain[2:], *crowd])
    qg, qq, gg = tables(points, 1)
    assert qg[0, 1] < qg[0, 0]

    found = rerank(qg, qq, gg, k1=4, k2=2)

    assert found[0, 0] < found[0, 1]


def test_a_gallery_smaller_than_k1_is_no_trouble() -> None:
    for gallery in (1, 2, 3):
        found = rerank(*draw(3, queries=2, gallery=gallery))

        assert found.shape == (2, gallery)
        assert np.isfinite(found).all()


def test_a_constant_embedding_still_ties() -> None:
    """Everybody is everybody's neighbour, but for whom k1 happens to cut off."""
    found = rerank(np.zeros((2, 5)), np.zeros((2, 2)), np.zeros((5, 5)))

    assert np.isfinite(found).all()


def test_the_arguments_stay_as_they_were() -> None:
    parts = draw(4)
    before = [part.copy() for part in parts]

    rerank(*parts)

    assert all(np.array_equal(a, b) for a, b in zip(parts, before, strict=True))


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_distances_that_are_none_are_refused(wrong: float) -> None:
    qg, qq, gg = draw(5)
    qg[1, 2] = wrong

    with pytest.raises(EvaluationError, match="finite distances >= 0"):
        rerank(qg, qq, gg)


def test_other_shapes_and_settings_are_refused() -> None:
    qg, qq, gg = draw(6)
    with pytest.raises(EvaluationError, match=r"expected distances \(6, 6\) among queries"):
        rerank(qg, gg, qq)
    with pytest.raises(ValueError, match="k1, k2 >= 1"):
        rerank(qg, qq, gg, k1=0)
    with pytest.raises(ValueError, match="weight"):
        rerank(qg, qq, gg, weight=1.5)
