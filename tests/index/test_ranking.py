"""Ranking against a slow, obvious ranking; and decisions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from index.gallery import Embeddings
from index.ranking import Error, Nearest, Rows, decide, rank, summation_error


@dataclass
class FakeSource:
    """Measures everything in float32, with as much noise as the bound allows."""

    query: Embeddings
    kept: Embeddings
    group_of: Rows
    noise: int = 0
    bound: Error | None = None
    exhaustive: bool = True
    blur: float = 0.0  # of estimates, where it is not exhaustive: a standard deviation
    bias: float = 0.0
    fetched: int = 0
    rounds: list[int] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.kept)

    def nearest(self, count: int, without: Rows) -> Nearest:
        self.rounds.append(count)
        error = self.bound or summation_error(self.kept.shape[1])
        draw = np.random.default_rng(self.noise).uniform(-1, 1, len(self.kept))
        exact = ((self.kept.astype(float) - self.query.astype(float)) ** 2).sum(axis=1)
        noise = draw * 0.9 * (error.relative * exact + error.absolute)
        if not self.exhaustive:
            drawn = np.random.default_rng(self.noise).standard_normal(len(exact))
            noise = self.bias + self.blur * drawn
        squared = (exact + noise).clip(min=0 if self.exhaustive else None).astype(np.float32)
        rows = np.flatnonzero(~np.isin(self.group_of, without))
        rows = rows[np.argsort(squared[rows], kind="stable")]
        horizon = np.inf if count >= len(rows) else float(squared[rows[count - 1]])
        return Nearest(rows[:count], squared[rows[:count]], horizon, error)

    def groups(self, rows: Rows) -> Rows:
        return self.group_of[rows]

    def vectors(self, rows: Rows) -> Embeddings:
        self.fetched += len(rows)
        return self.kept[rows]

    def tracklet_ids(self, rows: Rows) -> Sequence[str]:
        return [tracklet_id(row) for row in rows.tolist()]


def tracklet_id(row: int) -> str:
    """Ids whose order is not that of the rows."""
    return f"t{row * 7919 % 100_003:06d}"


def slow_rank(source: FakeSource, top_k: int) -> list[tuple[float, str]]:
    best: dict[int, tuple[float, str]] = {}
    for row, group in enumerate(source.group_of.tolist()):
        squared = sum((float(a) - float(b)) ** 2 for a, b in zip(source.kept[row], source.query))  # noqa: B905
        key = (float(np.float32(squared**0.5)), tracklet_id(row))
        best[group] = min(best.get(group, key), key)
    return sorted(best.values())[:top_k]


def ranked(source: FakeSource, top_k: int, first: int) -> list[tuple[float, str]]:
    found = rank(source.query, source, top_k=top_k, first=first)
    return [(each.distance, each.tracklet_id) for each in found]


@settings(max_examples=600, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 120),
    groups=st.integers(1, 30),
    top_k=st.integers(1, 12),
    first=st.integers(1, 20),
    spread=st.sampled_from([1, 3, 50]),
)
def test_ranking_equals_the_slow_ranking_under_rounding_noise_and_ties(
    seed: int, rows: int, groups: int, top_k: int, first: int, spread: int
) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.integers(0, spread + 1, (rows, 3)).astype(np.float32)
    # Skewed: the first groups have most of the rows.
    group_of = (groups * rng.random(rows) ** 3).astype(np.int64)
    source = FakeSource(vectors[0] * 1.5, vectors, group_of, noise=seed)

    assert ranked(source, top_k, first) == slow_rank(source, top_k)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-30, 1e-19, 1.0, 1e15]))
def test_distances_that_differ_by_less_than_their_rounding_are_ranked_exactly(
    seed: int, scale: float
) -> None:
    """At 1e-30 all squares underflow: FAISS's distances say nothing at all."""
    rng = np.random.default_rng(seed)
    vectors = (scale * (1 + rng.integers(0, 4, (60, 8)) * 2.0**-22)).astype(np.float32)
    source = FakeSource(np.zeros(8, np.float32), vectors, np.arange(60) % 20, noise=seed)

    assert ranked(source, 5, 3) == slow_rank(source, 5)


def test_an_identity_with_very_many_tracklets_does_not_hide_the_others() -> None:
    rng = np.random.default_rng(0)
    crowd = rng.normal(0, 0.01, (20_000, 4))
    others = rng.normal(10, 1, (50, 4))
    vectors = np.concatenate([crowd, others]).astype(np.float32)
    groups = np.concatenate([np.zeros(20_000, np.int64), np.arange(1, 51)])
    source = FakeSource(np.zeros(4, np.float32), vectors, groups)

    found = ranked(source, 10, 64)

    assert found == slow_rank(source, 10)
    assert source.rounds == [64, 512]
    assert source.fetched < 100


def test_distances_that_are_equal_only_in_float32_rank_by_tracklet_id() -> None:
    """Also for a source whose own distances are good enough to tell them apart."""
    eps = float(np.finfo(np.float32).eps)
    vectors = np.array([[1, (2.9 * eps) ** 0.5], [1, (1.1 * eps) ** 0.5]], dtype=np.float32)
    source = FakeSource(np.zeros(2, np.float32), vectors, np.arange(2), bound=Error(eps / 2, 0.0))

    assert ranked(source, 1, 2) == slow_rank(source, 1) == [(1 + eps, tracklet_id(0))]


def test_only_contenders_are_fetched() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5000, 16)).astype(np.float32)
    source = FakeSource(vectors[0], vectors, np.arange(5000) % 500)

    ranked(source, 10, 256)

    assert source.fetched <= 20


def test_equal_vectors_rank_by_tracklet_id() -> None:
    source = FakeSource(np.ones(2, np.float32), np.ones((300, 2), np.float32), np.arange(300) % 100)

    assert ranked(source, 5, 8) == slow_rank(source, 5)


def test_top_k_above_the_number_of_groups_gives_them_all() -> None:
    vectors = np.arange(12, dtype=np.float32).reshape(6, 2)
    source = FakeSource(vectors[3], vectors, np.array([0, 0, 1, 1, 2, 2]))

    assert ranked(source, 500, 2) == slow_rank(source, 500)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 300),
    groups=st.integers(1, 30),
    top_k=st.integers(1, 12),
    first=st.integers(1, 20),
    blur=st.sampled_from([0.0, 0.1, 10.0]),
)
def test_estimates_leave_distances_exact_and_ranks_full(
    seed: int, rows: int, groups: int, top_k: int, first: int, blur: float
) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, 3)).astype(np.float32)
    group_of = (groups * rng.random(rows) ** 3).astype(np.int64)
    source = FakeSource(
        vectors[0] * 1.5, vectors, group_of, noise=seed, exhaustive=False, blur=blur
    )

    found = rank(source.query, source, top_k=top_k, first=first)

    assert len(found) == min(top_k, len(np.unique(group_of)))
    assert found == sorted(found)
    assert len({int(group_of[each.row]) for each in found}) == len(found)
    for each in found:
        exact = np.linalg.norm(vectors[each.row].astype(float) - source.query)
        assert each.distance == np.float32(exact)


def crowded(bias: float = 0.0, blur: float = 0.1) -> FakeSource:
    """500 groups of ten rows each, of which estimates are wrong by a tenth of what matters."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5000, 16)).astype(np.float32)
    groups = np.arange(5000) % 500
    return FakeSource(
        np.zeros(16, np.float32), vectors, groups, exhaustive=False, blur=blur, bias=bias
    )


def test_of_good_estimates_few_rows_are_measured_and_nothing_is_missed() -> None:
    source = crowded()

    assert ranked(source, 10, 1000) == slow_rank(source, 10)
    assert source.fetched < 100


def test_of_worse_estimates_more_rows_are_measured() -> None:
    good, worse = crowded(), crowded(blur=1.5)

    for source in (good, worse):
        ranked(source, 10, 1000)

    assert 1.5 * good.fetched < worse.fetched < 500


@pytest.mark.parametrize("bias", [-5.0, 5.0])
def test_estimates_that_are_all_wrong_by_as_much_cost_nothing(bias: float) -> None:
    source, shifted = crowded(), crowded(bias)

    assert ranked(shifted, 10, 1000) == ranked(source, 10, 1000)
    assert shifted.fetched == source.fetched


def test_estimated_rows_of_a_large_identity_do_not_hide_the_others() -> None:
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(0, 0.01, (20_000, 4)), rng.normal(10, 1, (50, 4))])
    groups = np.concatenate([np.zeros(20_000, np.int64), np.arange(1, 51)])
    source = FakeSource(
        np.zeros(4, np.float32), vectors.astype(np.float32), groups, exhaustive=False, blur=1e-6
    )

    assert ranked(source, 10, 64) == slow_rank(source, 10)
    assert source.rounds == [64, 512]


def test_where_all_groups_are_named_the_search_ends_after_one_look_at_everything() -> None:
    vectors = np.arange(4000, dtype=np.float32).reshape(2000, 2)
    source = FakeSource(vectors[3], vectors, np.arange(2000) % 3, exhaustive=False)

    assert ranked(source, 500, 10) == slow_rank(source, 500)
    assert source.rounds == [10, 80, 2000]


@pytest.mark.parametrize(
    ("nearest", "threshold", "decision"),
    [
        (1.0, None, None),
        (None, None, None),
        (None, 2.0, "no_match"),
        (1.0, 2.0, "match"),
        (2.0, 2.0, "match"),
        (2.1, 2.0, "no_match"),
        (0.0, 0.0, "match"),
    ],
)
def test_decision(nearest: float | None, threshold: float | None, decision: str | None) -> None:
    assert decide(nearest, threshold) == decision
