"""Batches: what is shown, and what is said of it."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.augmentation import AugmentationConfig
from model.datasets.tracklets import Tracklet
from model.errors import InvalidFramesError
from model.frames import Preprocessing
from model.loading import ClipLoader, FrameStore
from model.recipe import BatchConfig
from model.samplers import ClipSampler
from model.teacher_cache import TeacherEmbeddings

SIZE = Preprocessing(height=40, width=32)
PLAIN = AugmentationConfig(flip=0)


@pytest.fixture
def tracklets(tmp_path: Path) -> list[Tracklet]:
    """Six tracklets of two cameras, three frames each."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(6):
        frames = tuple(tmp_path / f"{number}-{frame}.png" for frame in range(3))
        for path in frames:
            Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(path)
        made.append(Tracklet(f"p{number // 2}", f"c{number % 2}", "", frames))
    return made


def load(
    tracklets: list[Tracklet],
    teacher: TeacherEmbeddings | None,
    workers: int = 1,
    *,
    processes: bool = False,
    plain: float | None = None,
) -> ClipLoader:
    store = FrameStore([path for one in tracklets for path in one.frames], SIZE)
    sampler = ClipSampler(tracklets, clips=3, frames=2)
    batch = BatchConfig(frames=2, draw="clips")
    return ClipLoader(
        tracklets,
        sampler,
        store,
        batch,
        PLAIN,
        teacher=teacher,
        workers=workers,
        processes=processes,
        plain=plain,
    )


def say_of(tracklets: list[Tracklet], views: int) -> TeacherEmbeddings:
    paths = sorted(path for one in tracklets for path in one.frames)
    said = np.eye(len(paths) * views, dtype=np.float16).reshape(views, len(paths), -1)
    return TeacherEmbeddings("teacher-0", paths, said)


def test_a_batch_shows_the_looks_that_it_names(tracklets: list[Tracklet]) -> None:
    """Every look of every frame comes, with the pixels that the teacher was asked about."""
    teacher = say_of(tracklets, views=3)
    loader = load(tracklets, teacher)
    seen = set()

    for epoch in range(20):
        for batch in loader.epoch(epoch):
            for clip, number, places, views in zip(
                batch.clips.numpy(), batch.tracklets, batch.positions, batch.views, strict=True
            ):
                for shown, place, view in zip(clip, places, views, strict=True):
                    path = tracklets[number].frames[place]
                    assert np.array_equal(shown, teacher.show(path, view, loader._store.read))
                    seen.add((path, view))

    assert len(seen) == 18 * 3


def test_without_looks_frames_are_shown_as_they_are(tracklets: list[Tracklet]) -> None:
    for teacher in (None, say_of(tracklets, views=1)):
        loader = load(tracklets, teacher)
        [batch] = list(loader.epoch(0))[:1]

        assert batch.views == [[0, 0]] * 3
        path = tracklets[batch.tracklets[0]].frames[batch.positions[0][0]]
        assert np.array_equal(batch.clips[0, 0].numpy(), loader._store.read(path))


def test_looks_do_not_depend_on_how_many_threads_load(tracklets: list[Tracklet]) -> None:
    teacher = say_of(tracklets, views=3)

    one, many = load(tracklets, teacher), load(tracklets, teacher, workers=3)

    for a, b in zip(one.epoch(2), many.epoch(2), strict=True):
        assert a.views == b.views
        assert np.array_equal(a.clips.numpy(), b.clips.numpy())


# Python 3.12 and later warn of a fork beside threads; these processes only read and compute.
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@forks
def test_processes_load_what_threads_load(tracklets: list[Tracklet]) -> None:
    """Also from within an epoch, across its end, and back to one that was loaded before."""
    teacher = say_of(tracklets, views=3)
    threads = load(tracklets, teacher)
    processes = load(tracklets, teacher, workers=2, processes=True)

    for epoch, first in ((0, 1), (1, 0), (2, 0), (1, 1)):
        wanted = list(threads.epoch(epoch, first))
        made = list(processes.epoch(epoch, first))
        assert len(made) == len(wanted) > 0
        for one, other in zip(made, wanted, strict=True):
            assert torch.equal(one.clips, other.clips)
            assert torch.equal(one.labels, other.labels)
            assert (one.tracklets, one.positions, one.views) == (
                other.tracklets,
                other.positions,
                other.views,
            )
    processes.close()


@forks
def test_a_frame_that_a_process_cannot_decode_is_named(tracklets: list[Tracklet]) -> None:
    for path in tracklets[0].frames:
        path.write_bytes(b"no image")
    loader = load(tracklets, None, workers=2, processes=True)

    batches = itertools.chain.from_iterable(map(loader.epoch, range(5)))
    with pytest.raises(InvalidFramesError, match=r"0-\d\.png") as raised:
        list(batches)

    assert "Traceback" not in str(raised.value)
    loader.close()


@pytest.mark.parametrize("plain", [0.0, 0.25, 1.0])
def test_a_share_of_frames_is_shown_as_they_are(tracklets: list[Tracklet], plain: float) -> None:
    loader = load(tracklets, say_of(tracklets, views=5), plain=plain)

    drawn = [
        view
        for epoch in range(100)
        for batch in loader.epoch(epoch)
        for views in batch.views
        for view in views
    ]

    counts = np.bincount(drawn, minlength=5) / len(drawn)
    assert counts[0] == pytest.approx(plain, abs=0.04)
    assert counts[1:] == pytest.approx([(1 - plain) / 4] * 4, abs=0.04)
