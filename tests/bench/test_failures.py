"""The picture of failures shows the worst answer, and who was meant."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.failures import draw_failures, embed, find_failure
from model.checkpoint import make_checkpoint, untrained_checkpoint
from model.embedder import Embedder
from model.evaluation import euclidean_distances
from model.frames import Preprocessing
from model.network import NetworkConfig


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    network = untrained_checkpoint(0, NetworkConfig(backbone="conv5")).network
    checkpoint = make_checkpoint(network, Preprocessing(height=64, width=32))
    return Embedder(checkpoint, device="cpu", precision="fp32")


def test_the_worst_answer_is_found_and_drawn(embedder: Embedder, tmp_path: Path) -> None:
    failure = find_failure(embedder, "blur", people=5)

    assert failure.rank > 1  # untrained: somebody is mistaken
    assert failure.queries == 5
    assert failure.rank_1 < 1
    assert failure.right.identity == failure.query.identity != failure.taken_for.identity
    assert (failure.query.camera, failure.right.camera, failure.taken_for.camera) == (2, 1, 1)
    made = embed(embedder, [failure.query, failure.taken_for, failure.right])
    [[wrong, right]] = euclidean_distances(made[:1], made[1:])
    assert wrong < right

    draw_failures([failure, failure], tmp_path / "failures.png")
    with Image.open(tmp_path / "failures.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
        assert picture.width > picture.height


def test_it_is_the_same_every_time(embedder: Embedder) -> None:
    first, again = (find_failure(embedder, "easy", people=3) for _ in range(2))

    assert (first.rank, first.rank_1) == (again.rank, again.rank_1)
    assert np.array_equal(first.query.frames, again.query.frames)
