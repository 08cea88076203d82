"""What the study of spoiled frames does to frames, and that a second run goes on with the first."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.spoiled import (
    DRAWS,
    KINDS,
    ORACLE,
    POOLINGS,
    ROWS,
    SHARES,
    Bank,
    Condition,
    Draw,
    Eye,
    Kind,
    blur,
    draw_strangers,
    fill_bank,
    make_tables,
    measure,
    occlude,
    open_model,
    plan_conditions,
    pool,
    spoil,
)
from model.checkpoint import save_checkpoint, untrained_checkpoint
from model.datasets.layouts import read_dataset
from model.datasets.splits import divide_unseen
from model.datasets.tracklets import Dataset, Tracklet
from model.frames import Clip, Preprocessing
from model.network import NetworkConfig

FRAMES = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three people before two cameras, each of one colour with a little noise."""
    root, rng = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    for person in range(3):
        for camera in range(2):
            folder = root / f"p{person}" / f"c{camera}"
            folder.mkdir(parents=True)
            for number in range(FRAMES + person):
                pixels = rng.integers(0, 60, (64, 32, 3), dtype=np.uint8)
                pixels[..., person] += 150
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return read_dataset(root)


class Counting:
    """An eye that sees mean colours and counts its looks."""

    def __init__(self) -> None:
        self.seen = 0

    def embed(self, crops: Clip) -> np.ndarray:
        self.seen += len(crops)
        return np.asarray(crops.mean(axis=(1, 2)), np.float32)

    def eye(self) -> Eye:
        return Eye("colours", Preprocessing(height=64, width=32), self.embed)


def numbered_bank(length: int = 8, seeds: int = 1) -> Bank:
    """Frames (length, 2) that say whose they are and in which state: 0 clean, 1 and 2 spoiled."""
    people = [Tracklet(f"p{n // 2}", f"c{n % 2}", "", (Path("a"),) * length) for n in range(24)]
    states = {
        "clean": 0,
        **{f"{k}-{s}": i for s in range(seeds) for i, k in enumerate(KINDS[:2], 1)},
    }

    def frames(state: int) -> list[np.ndarray]:
        return [np.full((length, 2), (n, state), np.float32) for n in range(24)]

    return Bank(people, {name: frames(state) for name, state in states.items()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", SHARES)
def test_an_exact_share_of_each_tracklet_is_spoiled_and_marked(kind: Kind, share: float) -> None:
    bank = numbered_bank()

    for number, (frames, marked) in enumerate(spoil(bank, Condition(kind, "exact", share, 0))):
        changed = (frames != bank.states["clean"][number]).any(axis=1)
        assert marked.sum() == share * 8
        assert np.array_equal(changed, marked)


def test_an_independent_share_is_met_on_the_mean_only() -> None:
    condition = Condition("replaced", "independent", 0.5, 0)

    counts = [int(marked.sum()) for _, marked in spoil(numbered_bank(), condition)]

    assert np.mean(counts) == pytest.approx(4, abs=1)
    assert len(set(counts)) > 2


@pytest.mark.parametrize("draw", DRAWS)
def test_strangers_are_others_before_the_same_camera(draw: Draw) -> None:
    bank = numbered_bank()
    for kind in ("replaced", "switched"):
        for number, (frames, marked) in enumerate(spoil(bank, Condition(kind, draw, 0.75, 0))):
            whose = frames[marked, 0].astype(int).tolist()

            assert all(one % 2 == number % 2 and one // 2 != number // 2 for one in whose)
            expected = len(whose) if kind == "replaced" else min(len(whose), 1)
            assert len(set(whose)) == expected


def test_a_switch_is_one_run_of_frames() -> None:
    for _, marked in spoil(numbered_bank(), Condition("switched", "exact", 0.5, 0)):
        assert np.ptp(np.flatnonzero(marked)) == marked.sum() - 1


def test_more_strangers_than_there_are_people_repeat() -> None:
    drawn = draw_strangers(numbered_bank(), 0, 30, np.random.default_rng(0), one=False)

    assert len(drawn) == 30


def test_equal_seeds_spoil_alike_and_others_otherwise() -> None:
    bank = numbered_bank(seeds=2)

    def drawn(seed: int) -> Sequence[np.ndarray]:
        return [frames for frames, _ in spoil(bank, Condition("mixed", "exact", 0.5, seed))]

    assert all(map(np.array_equal, drawn(1), drawn(1)))
    assert not all(map(np.array_equal, drawn(1), drawn(0)))


def test_laid_over_a_crop_is_something_and_blur_takes_detail_away() -> None:
    rng = np.random.default_rng(0)
    crop = rng.integers(0, 256, (256, 128, 3), dtype=np.uint8)
    for seed in range(6):
        occluded = occlude(crop, np.random.default_rng(seed))
        blurred = blur(crop, np.random.default_rng(seed))

        assert occluded.shape == blurred.shape == crop.shape
        assert occluded.dtype == blurred.dtype == np.uint8
        hidden = (occluded != crop).any(axis=2).mean()
        assert 0.03 < hidden < 0.8
        assert np.abs(np.diff(blurred.astype(int), axis=1)).mean() < 10
        assert np.array_equal(occluded, occlude(crop, np.random.default_rng(seed)))


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_pooling_of_equal_frames_is_that_frame(name: str, count: int) -> None:
    frame = torch.randn(16, generator=torch.Generator().manual_seed(0))
    direction = frame / frame.norm()

    pooled = pool(name, frame.repeat(count, 1).numpy(), np.zeros(count, bool))

    assert pooled == pytest.approx(direction.numpy(), abs=1e-5)


def test_who_knows_the_true_frames_averages_them_alone() -> None:
    frames = np.array([[1, 0], [0, 5], [1, 0]], np.float32)

    assert pool(ORACLE, frames, np.array([False, True, False])) == pytest.approx([1, 0])
    assert np.isfinite(pool(ORACLE, frames, np.ones(3, bool))).all()


def test_results_have_length_1_unless_the_row_says_otherwise() -> None:
    frames = 3 * np.eye(4, dtype=np.float32)[:3] + 1  # without 1, their median is 0
    none = np.zeros(3, bool)

    lengths = {name: float(np.linalg.norm(pool(name, frames, none))) for name in ROWS}

    raw = {name for name, length in lengths.items() if length != pytest.approx(1)}
    assert raw == {"average, any length", "agreement, any length"}


def test_a_second_run_embeds_nothing_again(dataset: Dataset, tmp_path: Path) -> None:
    split, first, second = divide_unseen(dataset.tracklets, ()), Counting(), Counting()

    bank = fill_bank(first.eye(), split, tmp_path, used=FRAMES, seeds=2)
    again = fill_bank(second.eye(), split, tmp_path, used=FRAMES, seeds=2)

    assert first.seen == 6 * FRAMES * 5  # clean, and occluded and blurred by two seeds
    assert second.seen == 0
    assert bank.states.keys() == again.states.keys()
    for name, state in bank.states.items():
        assert all(map(np.array_equal, state, again.states[name]))


def test_everything_is_measured_and_stands_in_the_tables(dataset: Dataset, tmp_path: Path) -> None:
    split = divide_unseen(dataset.tracklets, ())
    bank = fill_bank(Counting().eye(), split, tmp_path, used=FRAMES, seeds=1)

    results = [
        one for each in plan_conditions(1) for one in measure(bank, split, each, "camera-pairs")
    ]

    assert len(results) == len(ROWS) * (1 + len(DRAWS) * len(KINDS) * len(SHARES))
    assert all(one["rank_1"] == 1 for one in results if one["share"] == 0)
    about = dict.fromkeys(("model", "frames", "identities", "tracklets", "seeds", "protocol"), "x")
    table = make_tables(results, about)
    assert table.count("| agreement |") == len(DRAWS) * len(KINDS)


def test_a_checkpoint_gives_single_frames_whatever_it_makes_of_tracklets(
    dataset: Dataset, tmp_path: Path
) -> None:
    config = NetworkConfig(backbone="conv5", head=8, temporal="agreement", unit=True)
    save_checkpoint(untrained_checkpoint(0, config), tmp_path / "net.safetensors")

    eye, split = open_model(tmp_path / "net.safetensors", dataset, "cpu")
    crops = np.random.default_rng(0).integers(0, 256, (3, 256, 128, 3), dtype=np.uint8)
    embeddings = eye.embed(crops)

    assert embeddings.shape == (3, 8)
    assert np.abs(np.linalg.norm(embeddings, axis=1) - 1).min() > 1e-3
    assert len(split.query) == 6
