"""The people that `bench.gallery` draws, and what it holds to be right."""

from pathlib import Path

import numpy as np
import pytest

from bench.gallery_people import MODEL, MOST_TRACKLETS, People
from bench.gallery_sizes import TOP_K, lists_for, write_store
from index.embedded import EmbeddedGallery


def test_drawn_people_have_1_to_50_tracklets_and_lie_apart_as_real_ones_do() -> None:
    people = People(3000, 256)
    sizes = people.sizes()
    blocks = [*people.blocks(500)]
    vectors = np.concatenate([block.vectors for block in blocks])
    who = np.concatenate([block.people for block in blocks])

    assert sizes.sum() == 3000
    assert (sizes.min(), sizes.max()) == (1, MOST_TRACKLETS)
    assert np.bincount(who).tolist() == sizes.tolist()
    order = np.argsort(who, kind="stable")
    apart = np.linalg.norm(vectors[order[1:]] - vectors[order[:-1]], axis=1)
    same = who[order[1:]] == who[order[:-1]]
    assert apart[same].mean() == pytest.approx(0.6, abs=0.05)
    assert apart[same].std() == pytest.approx(0.14, abs=0.03)
    others = np.linalg.norm(vectors[1:] - vectors[:-1], axis=1)[who[1:] != who[:-1]]
    assert others.mean() == pytest.approx(1.25, abs=0.05)
    assert others.std() == pytest.approx(0.11, abs=0.03)


def test_drawn_people_are_the_same_every_time_and_others_with_another_seed() -> None:
    [first], [again], [other] = (People(50, 32, seed).blocks() for seed in (0, 0, 1))

    assert first.vectors.tolist() == again.vectors.tolist()
    assert first.vectors.tolist() != other.vectors.tolist()


def test_right_are_the_nearest_people_from_other_cameras(tmp_path: Path) -> None:
    people = People(300, 32)

    asked = write_store(tmp_path / "gallery", people, "float32", 5)

    [block] = people.blocks()
    for query, camera, right in zip(asked.vectors, asked.cameras, asked.right, strict=True):
        away = np.linalg.norm(block.vectors.astype(np.float64) - query, axis=1)
        elsewhere = np.flatnonzero(block.cameras != camera)
        nearest = elsewhere[np.argsort(away[elsewhere])]
        assert right.tolist() == [*dict.fromkeys(block.people[nearest].tolist())][:TOP_K]


@pytest.mark.parametrize(
    ("tracklets", "lists"), [(1000, 16), (20_000, 512), (100_000, 1024), (1_000_000, 4096)]
)
def test_lists_are_few_enough_to_be_trained(tracklets: int, lists: int) -> None:
    assert lists_for(tracklets) == lists
    assert 39 * lists <= tracklets


@pytest.mark.parametrize("index", ["PCA64,IVF64,SQ8", "IVF64,RaBitQ4", "HNSW16,SQfp16"])
def test_what_is_found_approximately_is_nearly_everybody_at_exact_distances(
    tmp_path: Path, index: str
) -> None:
    """As an index looks where nobody says how far."""
    people = People(4000, 128)
    asked = write_store(tmp_path / "gallery", people, "float32", 25)
    stored = np.concatenate([block.vectors for block in people.blocks()])

    hits = 0
    with EmbeddedGallery(tmp_path / "gallery", index=index) as gallery:
        for number, query in enumerate(asked.vectors):
            found = gallery.search(query, model=MODEL, top_k=TOP_K, filters=asked.filters(number))
            for match in found.matches:
                row = int(match.record.tracklet_id.rpartition("-")[2])
                exact = np.linalg.norm(stored[row].astype(np.float64) - query)
                assert match.distance == pytest.approx(exact, rel=1e-7)
            names = {match.record.identity for match in found.matches}
            hits += len(names & {f"person-{each}" for each in asked.right[number]})

    assert hits >= 0.99 * TOP_K * 25
