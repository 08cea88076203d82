"""CMC and mAP against hand-worked cases, a slow obvious loop, and other people's code."""

import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from model.errors import EvaluationError
from model.measures import Measures, average_measures, rank_queries

Table = NDArray[np.float64]


def across(distances: Sequence[Sequence[float]], query: str, gallery: str) -> Measures:
    """Rank with one letter an identity; queries are seen by one camera, the gallery by another."""
    return rank_queries(
        np.array(distances, dtype=np.float64), query, gallery, "1" * len(query), "2" * len(gallery)
    )


def draw(seed: int) -> tuple[Table, list[str], list[str], list[str], list[str]]:
    """A small case with ties, several cameras, several matches, and queries without any."""
    rng = np.random.default_rng(seed)
    queries, gallery = int(rng.integers(1, 8)), int(rng.integers(1, 15))
    distances = rng.integers(0, 5, (queries, gallery)).astype(np.float64)

    def names(letters: str, count: int) -> list[str]:
        return [str(one) for one in rng.choice(list(letters), count)]

    identities = names("abcd", queries), names("abc", gallery)
    return (distances, *identities, names("xyz", queries), names("xyz", gallery))


def slow_ranks(
    distances: Table, query: list[str], gallery: list[str], seen: list[str], where: list[str]
) -> tuple[list[int], list[float]]:
    """Ranks and average precisions by counting, one pair at a time, without sorting a gallery."""
    ranks, precisions = [], []
    for q in range(len(query)):
        wrong = [distances[q][g] for g in range(len(gallery)) if gallery[g] != query[q]]
        right = sorted(
            distances[q][g]
            for g in range(len(gallery))
            if gallery[g] == query[q] and where[g] != seen[q]
        )
        if not right:
            continue
        places = [i + 1 + sum(d <= right[i] for d in wrong) for i in range(len(right))]
        ranks.append(places[0])
        precisions.append(sum((i + 1) / places[i] for i in range(len(places))) / len(places))
    return ranks, precisions


def test_ranks_one_two_three_give_the_hand_worked_curve() -> None:
    """The mean of 1, 1/2 and 1/3 is 11/18."""
    found = across([[1, 2, 3], [1, 2, 3], [1, 2, 3]], "abc", "abc")

    assert found.ranks.tolist() == [1, 2, 3]
    assert found.cmc == pytest.approx([1 / 3, 2 / 3, 1])
    assert found.mean_average_precision == pytest.approx(11 / 18)
    assert found.rank_1 == pytest.approx(1 / 3)
    assert found.rank_5 == found.rank_20 == 1


def test_map_is_the_mean_reciprocal_rank_where_each_identity_stands_once() -> None:
    distances = np.random.default_rng(0).random((20, 20))
    names = [str(number) for number in range(20)]

    found = rank_queries(distances, names, names, ["1"] * 20, ["2"] * 20)

    assert found.mean_average_precision == pytest.approx(np.mean(1 / found.ranks))
    assert found.mean_inverse_negative_penalty == pytest.approx(np.mean(1 / found.ranks))


def test_an_embedding_that_is_the_same_for_everybody_finds_nobody() -> None:
    """Counting only what is strictly nearer would report 100 % here."""
    found = across([[0.0] * 4] * 4, "abcd", "abcd")

    assert found.rank_1 == 0
    assert found.ranks.tolist() == [4, 4, 4, 4]
    assert found.mean_average_precision == pytest.approx(1 / 4)


def test_matches_that_tie_with_one_another_alone_lose_nothing() -> None:
    found = across([[1, 1, 2]], "a", "aab")

    assert found.ranks.tolist() == [1]
    assert found.mean_average_precision == 1


def test_the_same_identity_in_the_same_camera_is_left_out() -> None:
    """Its place is taken by the next: neither right nor wrong."""
    distances = np.array([[0.0, 1, 2, 3]])
    arguments = (distances, ["a"], ["a", "b", "a", "c"], ["1"], ["1", "1", "2", "2"])

    assert rank_queries(*arguments).ranks.tolist() == [2]
    assert rank_queries(*arguments).mean_average_precision == pytest.approx(1 / 2)
    assert rank_queries(*arguments, exclude_same_camera=False).ranks.tolist() == [1]


def test_a_query_without_a_match_is_skipped_and_counted() -> None:
    found = across([[1, 2], [1, 2]], "az", "ab")

    assert (found.counted, found.skipped, found.gallery) == (1, 1, 2)
    assert found.ranks.tolist() == [1, 0]
    assert np.isnan(found.average_precisions[1])
    assert found.rank_1 == found.mean_average_precision == 1


@pytest.mark.parametrize("block", range(4))
def test_a_slow_loop_agrees_on_random_cases_with_ties(block: int) -> None:
    for seed in range(100 * block, 100 * block + 100):
        case = draw(seed)
        ranks, precisions = slow_ranks(*case)
        if not ranks:
            with pytest.raises(EvaluationError, match="none among"):
                rank_queries(*case)
            continue

        found = rank_queries(*case)

        assert found.ranks[found.ranks > 0].tolist() == ranks
        assert found.mean_average_precision == pytest.approx(np.mean(precisions))
        assert found.skipped == len(case[1]) - len(ranks)
        for k, share in enumerate(found.cmc, start=1):
            assert share == pytest.approx(np.mean([rank <= k for rank in ranks]))


def tie_free(seed: int) -> tuple[Table, list[str], list[str]]:
    rng = np.random.default_rng(seed)
    query = [str(one) for one in rng.integers(0, 6, 12)]
    gallery = [str(one) for one in rng.permutation([*range(6), *rng.integers(0, 6, 24)])]
    return rng.random((12, 30)), query, gallery


@pytest.mark.parametrize("seed", range(5))
def test_scikit_learn_agrees_where_nothing_ties(seed: int) -> None:
    distances, query, gallery = tie_free(seed)

    found = rank_queries(distances, query, gallery, ["1"] * 12, ["2"] * 30)

    theirs = [
        average_precision_score(np.array(gallery) == identity, -row)
        for identity, row in zip(query, distances, strict=True)
    ]
    assert found.average_precisions == pytest.approx(theirs)


@pytest.mark.parametrize("seed", range(3))
def test_torchmetrics_agrees_where_nothing_ties(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP
    distances, query, gallery = tie_free(seed)
    relevant = torch.tensor([[one == name for name in gallery] for one in query]).flatten()
    numbers = torch.arange(12).repeat_interleave(30)
    similarity = torch.from_numpy(
        1 - distances
    ).flatten()  # it takes what is not positive as no answer

    found = rank_queries(distances, query, gallery, ["1"] * 12, ["2"] * 30)

    theirs = RetrievalMAP()(similarity, relevant, indexes=numbers)
    assert found.mean_average_precision == pytest.approx(theirs.item(), abs=1e-6)
    for k in (1, 5, 10):
        hits = RetrievalHitRate(top_k=k)(similarity, relevant, indexes=numbers)
        assert found.rank(k) == pytest.approx(hits.item(), abs=1e-6)


def test_the_curve_ends_at_rank_50_or_with_the_gallery() -> None:
    names = [str(number) for number in range(60)]
    long = rank_queries(np.ones((60, 60)), names, names, ["1"] * 60, ["2"] * 60)

    assert len(long.cmc) == 50
    assert long.rank(50) == 0
    assert len(across([[1, 2, 3]], "a", "abc").cmc) == 3
    with pytest.raises(ValueError, match="1 to 50"):
        long.rank(51)


def test_an_average_weighs_each_query_the_same_and_goes_on_at_one_beyond_a_short_gallery() -> None:
    one = across([[1, 2]], "a", "ab")
    two = across([[1, 2, 3, 4]] * 3, "ddd", "abcd")

    both = average_measures([one, two])

    assert both.cmc == pytest.approx([1 / 4, 1 / 4, 1 / 4, 1])
    assert both.mean_average_precision == pytest.approx((1 + 3 * 1 / 4) / 4)
    assert (both.counted, both.gallery) == (4, 3)
    with pytest.raises(EvaluationError, match="at least one"):
        average_measures([])


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_distance_that_is_not_finite_is_refused(wrong: float) -> None:
    with pytest.raises(EvaluationError, match="between query 0 and gallery tracklet 1"):
        across([[1, wrong]], "a", "ab")


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"expected distances \(1, 3\), got \(1, 2\)"):
        across([[1, 2]], "a", "abc")
    with pytest.raises(EvaluationError, match="cameras"):
        rank_queries(np.ones((1, 2)), "a", "ab", "1", "2")
