"""Which tracklets meet in a batch: P identities with K tracklets each, or whichever come."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from model.datasets.tracklets import Tracklet, natural_key
from model.errors import TrainingError

# A seed sequence pads with zeros, so what draws must differ in a number that is not the last.
STREAM = 1


class PKSampler:
    """Draws batches of P identities with K tracklets each, after Hermans et al., arXiv:1703.07737.

    An epoch is one pass over the identities in a seeded order; the last batch is filled up from
    the beginning of that order, so every batch holds P different identities. The K tracklets of an
    identity come from different cameras as far as it has them, because a positive from the same
    camera is too easy to teach anything. An identity with fewer than K tracklets repeats them.

    What is drawn depends on nothing but ``seed`` and the epoch's number, so that an interrupted run
    needs no generator state to go on. With several ranks all draw the same global batch, and each
    takes its own identities of it.

    Args:
        tracklets: What to draw from.
        identities: P, of one rank.
        per_identity: K.
        seed: Decides every draw.
        rank: Which part of each global batch is ours.
        ranks: How many parts there are.

    Raises:
        TrainingError: There are fewer than P identities for each rank, or P or K is below 2.
    """

    def __init__(
        self,
        tracklets: Sequence[Tracklet],
        *,
        identities: int = 8,
        per_identity: int = 2,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if identities < 2 or per_identity < 2:
            raise TrainingError(
                "expected at least 2 identities with at least 2 tracklets each in a batch, "
                f"got P = {identities} and K = {per_identity}"
            )
        if not 0 <= rank < ranks:
            raise TrainingError(f"expected a rank in [0, {ranks}), got {rank}")
        by_identity: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, tracklet in enumerate(tracklets):
            by_identity[tracklet.identity][tracklet.camera].append(number)
        self._by_camera = [
            [by_identity[identity][camera] for camera in sorted(by_identity[identity])]
            for identity in sorted(by_identity, key=natural_key)
        ]
        if len(self._by_camera) < identities * ranks:
            raise TrainingError(
                f"expected at least {identities * ranks} training identities for P = {identities} "
                f"on {ranks} rank(s), got {len(self._by_camera)}; set batch.identities lower"
            )
        self.identities, self.per_identity = identities, per_identity
        self.seed, self.rank, self.ranks = seed, rank, ranks

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self._by_camera) // (self.identities * self.ranks))

    def batches(self, epoch: int) -> list[list[int]]:
        """Draw the batches of one epoch for this rank.

        Args:
            epoch: From 0.

        Returns:
            Each P * K indices into ``tracklets``, those of one identity next to each other.
        """
        rng = np.random.default_rng([self.seed, STREAM, epoch])
        order = rng.permutation(len(self._by_camera)).tolist()
        whole = self.identities * self.ranks
        order += order[: len(self) * whole - len(order)]
        drawn = [self._draw(identity, rng) for identity in order]
        batches = []
        for start in range(0, len(order), whole):
            first = start + self.rank * self.identities
            batches.append(list(chain(*drawn[first : first + self.identities])))
        return batches

    def _draw(self, identity: int, rng: np.random.Generator) -> list[int]:
        cameras = [list(rng.permutation(numbers)) for numbers in self._by_camera[identity]]
        order = rng.permutation(len(cameras)).tolist()
        turns: list[int] = []  # one tracklet of each camera, then the next of each, ...
        for turn in range(max(len(numbers) for numbers in cameras)):
            turns += [int(cameras[c][turn]) for c in order if turn < len(cameras[c])]
        return [turns[place % len(turns)] for place in range(self.per_identity)]


class ClipSampler:
    """Draws batches of tracklets without regard to who is in them, for learning from a teacher.

    An epoch has as many clips as make up all frames. A tracklet is drawn in proportion to its
    frames, with replacement, so that every frame counts the same.

    Args:
        tracklets: What to draw from, at least one.
        clips: In a batch of one rank, >= 2.
        frames: T, of each clip.
        seed: Decides every draw, with the epoch's number.
        rank: See `PKSampler`.
        ranks: Likewise.

    Raises:
        TrainingError: There are fewer frames than one batch of all ranks takes.
    """

    def __init__(
        self,
        tracklets: Sequence[Tracklet],
        *,
        clips: int,
        frames: int,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        counts = np.array([len(one.frames) for one in tracklets])
        self._chances: NDArray[np.float64] = counts / counts.sum()
        self._batches = int(counts.sum()) // (clips * frames * ranks)
        if not self._batches:
            raise TrainingError(
                f"expected at least {clips * frames * ranks} training frames for one batch, "
                f"got {counts.sum()}"
            )
        self.clips, self.seed, self.rank, self.ranks = clips, seed, rank, ranks

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._batches

    def batches(self, epoch: int) -> list[list[int]]:
        """Draw the batches of one epoch for this rank.

        Args:
            epoch: From 0.

        Returns:
            Each ``clips`` indices into ``tracklets``.
        """
        rng = np.random.default_rng([self.seed, STREAM, epoch])
        shape = (len(self), self.ranks, self.clips)
        drawn = rng.choice(len(self._chances), size=shape, p=self._chances)
        batches: list[list[int]] = drawn[:, self.rank].tolist()
        return batches


Sampler = PKSampler | ClipSampler
