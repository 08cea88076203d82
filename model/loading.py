"""Batches of augmented clips, decoded ahead of the network."""

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from model.augmentation import AugmentationConfig, augment
from model.datasets.tracklets import Tracklet, natural_key
from model.errors import DatasetError, InvalidFramesError
from model.frames import Clip, Preprocessing, choose_frames, read_frame
from model.live_teacher import LiveTeacher
from model.recipe import BatchConfig
from model.samplers import Sampler
from model.teacher_cache import TeacherEmbeddings

_STREAM = 2  # see `model.samplers.STREAM`
_MEMORY_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Batch:
    """P identities with K tracklets each, as the network takes them.

    Args:
        clips: (B, T, H, W, 3) uint8 RGB, B = P * K.
        labels: (B,) int64, numbers of the training identities.
        tracklets: B numbers of tracklets.
        positions: For each tracklet the numbers of its T frames.
        views: For each tracklet which looks of them it shows; 0 is the frame itself.
    """

    clips: Tensor
    labels: Tensor
    tracklets: list[int]
    positions: list[list[int]]
    views: list[list[int]]

    def pin_memory(self) -> "Batch":
        """The same where a GPU can take it from without waiting, as PyTorch's loader asks for."""
        return replace(self, clips=self.clips.pin_memory(), labels=self.labels.pin_memory())


class FrameStore:
    """Prepared frames, kept in memory where all of them fit.

    Args:
        paths: Every frame that may be asked for.
        preprocessing: What they go through.
        sharers: How many processes keep their own on this machine. Nothing is kept if all frames
            together need more than this one's part of a quarter of its memory.
    """

    def __init__(
        self, paths: Sequence[Path], preprocessing: Preprocessing, sharers: int = 1
    ) -> None:
        limit = _memory_bytes() * _MEMORY_SHARE / sharers
        self._paths = paths
        self._preprocessing = preprocessing
        self._kept: dict[Path, Clip] = {}
        self.keeps = len(paths) * preprocessing.height * preprocessing.width * 3 <= limit

    def preload(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Decode everything now, if it is kept: what cannot be decoded then shows before training.

        Raises:
            DatasetError: Some frames cannot be decoded; the first of them are named.
        """
        if not self.keeps:
            return
        broken = []
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for done, (path, frame) in enumerate(
                zip(self._paths, threads.map(self._try, self._paths), strict=True), start=1
            ):
                if frame is None:
                    broken.append(path)
                else:
                    self._kept[path] = frame
                if progress is not None:
                    progress(done, len(self._paths))
        if broken:
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            names = ", ".join(str(path) for path in broken[:3])
            raise DatasetError(
                f"expected images, could not decode {names}{more}; `passerby check-data` lists them"
            )

    def read(self, path: Path) -> Clip:
        """One prepared frame, (H, W, 3) uint8 RGB.

        Raises:
            InvalidFramesError: It cannot be decoded.
        """
        kept = self._kept.get(path)
        return read_frame(path, self._preprocessing) if kept is None else kept

    def _try(self, path: Path) -> Clip | None:
        try:
            return read_frame(path, self._preprocessing)
        except InvalidFramesError:
            return None


class ClipLoader:
    """Reads, augments and stacks what the sampler draws.

    Every draw depends on the seed and on where in the run a tracklet stands, and on nothing else:
    however many threads read, and wherever a run is taken up again, batches are the same.

    Args:
        tracklets: Of the training identities.
        sampler: Draws from them.
        store: Where their frames come from.
        batch: Frames per tracklet and how they are chosen.
        augmentation: What is done to them.
        teacher: Whose looks are shown, each as often as every other; without one the frames alone.
        workers: Threads, or processes; by default as many as cores.
        processes: Whether they are processes, which share no interpreter: for a GPU that threads
            cannot feed.
        plain: How often a frame is shown as it is, see `model.distillation.DistillationConfig`.
    """

    def __init__(
        self,
        tracklets: Sequence[Tracklet],
        sampler: Sampler,
        store: FrameStore,
        batch: BatchConfig,
        augmentation: AugmentationConfig,
        *,
        teacher: TeacherEmbeddings | LiveTeacher | None = None,
        workers: int | None = None,
        processes: bool = False,
        plain: float | None = None,
    ) -> None:
        self._tracklets = tracklets
        self._teacher = teacher
        self._sampler = sampler
        self._store = store
        self._batch = batch
        self._augmentation = augmentation
        self._workers = workers or len(os.sched_getaffinity(0))
        self._processes, self._plain = processes, plain
        self._stream: Iterator[Batch | InvalidFramesError] | None = None
        self._next = 0
        self.labels = identity_labels(tracklets)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._sampler)

    def epoch(self, epoch: int, first: int = 0) -> Generator[Batch]:
        """The batches of an epoch, from one of them on.

        Raises:
            InvalidFramesError: A frame cannot be decoded.
        """
        if self._processes:
            yield from self._from_processes(epoch, first)
            return
        drawn = self._sampler.batches(epoch)
        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(self._workers) as threads:
            try:
                for step in range(first, len(drawn)):
                    waiting.append(threads.submit(self.load, drawn[step], epoch, step))
                    if len(waiting) > self._workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _from_processes(self, epoch: int, first: int) -> Generator[Batch]:
        batches = len(self._sampler)
        for place in range(epoch * batches + first, (epoch + 1) * batches):
            if self._stream is None or self._next != place:
                self._stream = self._begin_stream(place)
            loaded = next(self._stream)
            self._next = place + 1
            if isinstance(loaded, InvalidFramesError):
                raise loaded
            yield loaded

    def _begin_stream(self, place: int) -> Iterator[Batch | InvalidFramesError]:
        """Start processes that load batches from one on, ahead of an epoch's end, too."""
        loader: DataLoader[Batch | InvalidFramesError] = DataLoader(
            _Stream(self, self._sampler),
            batch_size=None,
            sampler=range(place, sys.maxsize),
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="fork",  # they find the frames where they lie in memory
            worker_init_fn=_leave_signals_to_the_parent,
        )
        return iter(loader)

    def close(self) -> None:
        """End processes, if there are any; the next epoch starts others."""
        self._stream = None

    def load(self, numbers: list[int], epoch: int, step: int) -> Batch:
        """Load one batch of tracklets, given by their numbers."""
        clips, positions, views = [], [], []
        first = self._sampler.rank * len(numbers)
        for slot, number in enumerate(numbers, start=first):
            rng = np.random.default_rng([self._sampler.seed, _STREAM, epoch, step, slot])
            frames = self._tracklets[number].frames
            chosen = choose_frames(len(frames), self._batch.frames, self._batch.sampling, rng)
            # "even" returns fewer where there are fewer; a batch needs as many of each.
            chosen = [chosen[place % len(chosen)] for place in range(self._batch.frames)]
            looks = self._draw_views(len(chosen), rng)
            clip = np.stack(
                [self._show(frames[at], look) for at, look in zip(chosen, looks, strict=True)]
            )
            clips.append(augment(clip, self._augmentation, rng))
            positions.append(chosen)
            views.append(looks)
        labels = [self.labels[self._tracklets[number].identity] for number in numbers]
        stacked = torch.from_numpy(np.stack(clips))
        return Batch(stacked, torch.tensor(labels), numbers, positions, views)

    def _draw_views(self, frames: int, rng: np.random.Generator) -> list[int]:
        if self._teacher is None or self._teacher.views == 1:
            return [0] * frames
        if self._plain is None:
            views: list[int] = rng.integers(self._teacher.views, size=frames).tolist()
            return views
        drawn: list[int] = rng.integers(1, self._teacher.views, size=frames).tolist()
        changed = (rng.random(frames) >= self._plain).tolist()
        return [view if changes else 0 for view, changes in zip(drawn, changed, strict=True)]

    def _show(self, frame: Path, view: int) -> Clip:
        if self._teacher is None or view == 0:
            return self._store.read(frame)
        return self._teacher.show(frame, view, self._store.read)


class _Stream(Dataset[Batch | InvalidFramesError]):
    """The batches of all epochs in one row, for processes that load them."""

    def __init__(self, loader: ClipLoader, sampler: Sampler) -> None:
        self._loader, self._sampler = loader, sampler
        self._drawn: tuple[int, list[list[int]]] = (-1, [])

    def __getitem__(self, place: int) -> Batch | InvalidFramesError:
        epoch, step = divmod(place, len(self._sampler))
        if self._drawn[0] != epoch:
            self._drawn = (epoch, self._sampler.batches(epoch))
        try:
            return self._loader.load(self._drawn[1][step], epoch, step)
        except InvalidFramesError as error:
            return error  # raised where it is asked for, without another process's traceback


def _leave_signals_to_the_parent(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def identity_labels(tracklets: Sequence[Tracklet]) -> dict[str, int]:
    """Number the identities, in natural order."""
    identities = sorted({tracklet.identity for tracklet in tracklets}, key=natural_key)
    return {identity: number for number, identity in enumerate(identities)}


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
