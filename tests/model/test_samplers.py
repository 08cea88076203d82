"""Batches of P identities with K tracklets each (paper/review.md, 3.8, test 12)."""

from collections import Counter
from itertools import chain, combinations
from pathlib import Path

import pytest

from model.datasets.tracklets import Tracklet
from model.errors import TrainingError
from model.samplers import ClipSampler, PKSampler


def tracklets(identities: int, cameras: int = 2, each: int = 1) -> list[Tracklet]:
    return [
        Tracklet(f"p{person}", f"c{camera}", str(number), (Path("1.jpg"),))
        for person in range(identities)
        for camera in range(cameras)
        for number in range(each)
    ]


@pytest.mark.parametrize("people", [8, 9, 13, 16])
def test_every_batch_holds_p_identities_with_k_tracklets(people: int) -> None:
    """Also the last batch of an epoch whose identities P does not divide."""
    known = tracklets(people)
    sampler = PKSampler(known, identities=8, per_identity=2)

    for batch in sampler.batches(epoch=0):
        groups = [batch[start : start + 2] for start in range(0, 16, 2)]
        assert len(batch) == 16
        assert len({known[number].identity for number in batch}) == 8
        assert all(known[a].identity == known[b].identity for a, b in groups)


def test_an_epoch_passes_over_every_identity() -> None:
    known = tracklets(13)
    sampler = PKSampler(known, identities=4)

    batches = sampler.batches(epoch=3)

    assert len(batches) == len(sampler) == 4
    assert {known[number].identity for number in chain(*batches)} == {f"p{n}" for n in range(13)}


def test_two_tracklets_of_an_identity_come_from_two_cameras() -> None:
    """A positive from the same camera is too easy."""
    known = tracklets(6, cameras=3, each=4)
    sampler = PKSampler(known, identities=3, per_identity=3, seed=5)

    for epoch in range(20):
        for batch in sampler.batches(epoch):
            for start in range(0, len(batch), 3):
                assert len({known[number].camera for number in batch[start : start + 3]}) == 3


def test_a_short_identity_repeats_its_tracklets_only_when_all_were_taken() -> None:
    known = tracklets(4, cameras=2, each=1)
    sampler = PKSampler(known, identities=2, per_identity=4)

    for batch in sampler.batches(epoch=0):
        for start in (0, 4):
            assert sorted(batch.count(number) for number in set(batch[start : start + 4])) == [2, 2]


def test_equal_seeds_draw_alike_and_epochs_differ() -> None:
    known = tracklets(20)

    first, again = PKSampler(known, seed=1), PKSampler(known, seed=1)
    other = PKSampler(known, seed=2)

    assert first.batches(4) == again.batches(4)
    assert first.batches(4) != first.batches(5)
    assert first.batches(4) != other.batches(4)


def test_ranks_share_a_batch_without_sharing_an_identity() -> None:
    known = tracklets(30)
    ranks = [PKSampler(known, identities=4, seed=3, rank=rank, ranks=3) for rank in range(3)]

    for parts in zip(*(sampler.batches(epoch=0) for sampler in ranks), strict=True):
        people = [{known[number].identity for number in part} for part in parts]
        assert all(len(one) == 4 for one in people)
        assert all(not one & other for one, other in combinations(people, 2))


def test_together_the_ranks_draw_what_one_process_would() -> None:
    known = tracklets(24)
    alone = PKSampler(known, identities=8, seed=3).batches(7)
    pairs = [
        PKSampler(known, identities=4, seed=3, rank=rank, ranks=2).batches(7) for rank in range(2)
    ]

    assert [first + second for first, second in zip(*pairs, strict=True)] == alone


def test_identities_of_ten_come_after_those_of_two() -> None:
    """The order does not depend on how a folder lists its names."""
    known = tracklets(12)

    batches = PKSampler(known, identities=4).batches(0)
    backwards = PKSampler(known[::-1], identities=4).batches(0)

    names = [[known[number].identity for number in batch] for batch in batches]
    assert names == [[known[::-1][number].identity for number in batch] for batch in backwards]


def test_too_few_identities_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"at least 16 .* got 10"):
        PKSampler(tracklets(10), identities=8, ranks=2)


@pytest.mark.parametrize(("identities", "per_identity"), [(1, 2), (4, 1)])
def test_a_batch_without_positives_or_negatives_is_refused(
    identities: int, per_identity: int
) -> None:
    with pytest.raises(TrainingError, match="at least 2"):
        PKSampler(tracklets(8), identities=identities, per_identity=per_identity)


def seen_by(camera: str, frames: int, tracklets: int) -> list[Tracklet]:
    paths = tuple(Path(f"{number}.jpg") for number in range(frames))
    return [Tracklet(f"p{number}", camera, "", paths) for number in range(tracklets)]


def test_an_epoch_of_clips_has_as_many_frames_as_there_are() -> None:
    known = seen_by("c1", frames=6, tracklets=20)

    sampler = ClipSampler(known, clips=4, frames=3)

    assert len(sampler) == len(sampler.batches(0)) == 120 // 12
    assert all(len(batch) == 4 for batch in sampler.batches(0))


def test_every_frame_counts_the_same_whichever_tracklet_it_is_of() -> None:
    """Ten tracklets of 5 frames and one of 50 are drawn alike."""
    known = [*seen_by("c1", 5, 10), *seen_by("c2", 50, 1)]
    sampler = ClipSampler(known, clips=10, frames=1, seed=3)

    drawn = Counter(chain(*(batch for epoch in range(300) for batch in sampler.batches(epoch))))

    assert drawn[10] / sum(drawn[number] for number in range(10)) == pytest.approx(1, rel=0.1)


def test_clips_depend_on_the_seed_and_the_epoch_and_ranks_get_their_own() -> None:
    known = seen_by("c1", 10, 30)
    first, again = ClipSampler(known, clips=5, frames=1), ClipSampler(known, clips=5, frames=1)
    ranks = [ClipSampler(known, clips=5, frames=1, rank=rank, ranks=2) for rank in (0, 1)]

    assert first.batches(1) == again.batches(1)
    assert first.batches(1) != first.batches(2)
    assert len(ranks[0]) == len(first) // 2
    assert ranks[0].batches(0) != ranks[1].batches(0)


def test_too_few_frames_for_a_batch_are_refused() -> None:
    with pytest.raises(TrainingError, match="at least 64 training frames for one batch, got 60"):
        ClipSampler(seen_by("c1", 6, 10), clips=64, frames=1)
