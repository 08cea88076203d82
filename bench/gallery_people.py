"""Many drawn people: tracklets whose embeddings lie apart as real ones do.

A made embedding is a unit vector, the direction of

    sqrt(A) m + sqrt(B) p + s sqrt(C) t,    A + B + C = 1

with m the same for all, p of the person and t of the tracklet. p is normal with variances that fall
as 1 / i over 256 random directions: few directions tell most people apart, many a little. t is
normal, half of its variance in the same 256 directions, half in all D. s^2 is drawn from a gamma
distribution of mean 1: some tracklets are worse than others. So distances between two people are
sqrt(2 - 2 A) on average, and within one person sqrt(2 C).

The figures are those of 35 people of WARD, three tracklets each, with the bundled weights: within
0.61 +- 0.13, between 1.26 +- 0.09; here 0.58 +- 0.13 and 1.24 +- 0.11. The means of 35 and of 70
people have a participation ratio (how many equally strong directions would do) of 22 and 20.

A person has 1 to 50 tracklets, log-uniformly: 12 on average, half of the people at most 7.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from index.gallery import Embeddings, Enrolment, TrackletRecord

MODEL = "trsa-bench"
START = datetime(2026, 1, 1, tzinfo=UTC)
CAMERAS = 6
MOST_TRACKLETS = 50
_DIRECTIONS = 256
_WITHIN, _BETWEEN = 0.6, 1.25
_SHARED = 1 - _BETWEEN**2 / 2  # A
_TRACKLET = _WITHIN**2 / 2  # C
_PERSON = 1 - _SHARED - _TRACKLET  # B
_WORSE_SHAPE = 2.0  # of the gamma distribution of s^2
_ROWS_AT_ONCE = 2000
Numbers = NDArray[np.int64]


class Block(NamedTuple):
    """Some tracklets, numbered as they come.

    Args:
        numbers: (n,) of the tracklets.
        people: (n,) numbers of whom they show.
        cameras: (n,) numbers of where.
        vectors: (n, D) float32, of length 1.
    """

    numbers: Numbers
    people: Numbers
    cameras: Numbers
    vectors: Embeddings

    def enrolments(self) -> list[Enrolment]:
        """What a gallery takes."""
        return [
            Enrolment(record_of(int(number), int(person), int(camera)), vector)
            for number, person, camera, vector in zip(*self, strict=True)
        ]


@dataclass(frozen=True)
class People:
    """A seeded population, as large as it takes; the same every time.

    Args:
        tracklets: How many tracklets there are to be.
        dimension: D.
        seed: Of everything.
    """

    tracklets: int
    dimension: int
    seed: int = 0

    def sizes(self) -> Numbers:
        """(P,) how many tracklets each person has; together ``tracklets``."""
        rng = np.random.default_rng((self.seed, 1))
        drawn = np.exp(rng.uniform(0, np.log(MOST_TRACKLETS + 1), self.tracklets)).astype(np.int64)
        ends = np.cumsum(drawn)
        people = int(np.searchsorted(ends, self.tracklets)) + 1
        sizes = drawn[:people]
        sizes[-1] -= ends[people - 1] - self.tracklets
        return sizes

    def blocks(self, rows: int = _ROWS_AT_ONCE) -> Iterator[Block]:
        """All tracklets, some at a time, in a random order."""
        sizes = self.sizes()
        rng = np.random.default_rng((self.seed, 2))
        people = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        for start in range(0, self.tracklets, rows):
            numbers = np.arange(start, min(start + rows, self.tracklets))
            drawn = np.random.default_rng((self.seed, 3, start))
            yield self._block(numbers, people[numbers], drawn)

    def queries(self, count: int) -> Block:
        """Other tracklets of people who are there, each person as likely as any."""
        rng = np.random.default_rng((self.seed, 4))
        people = rng.integers(0, len(self.sizes()), count)
        return self._block(self.tracklets + np.arange(count), people, rng)

    def _block(self, numbers: Numbers, people: Numbers, rng: np.random.Generator) -> Block:
        basis, common = self._basis
        spread = _spread(len(basis))
        # Each person from a generator of its own: whatever a block holds, they look the same.
        who, place = np.unique(people, return_inverse=True)
        looks = np.stack([self._looks(int(person)) for person in who])[place]
        noise = rng.standard_normal((len(people), len(basis)), dtype=np.float32)
        worse = np.sqrt(rng.gamma(_WORSE_SHAPE, 1 / _WORSE_SHAPE, len(people)))[:, None]
        amount = (np.sqrt(_TRACKLET) * worse).astype(np.float32)
        latent = np.float32(np.sqrt(_PERSON)) * looks * spread
        latent += amount * np.float32(np.sqrt(0.5)) * noise * spread
        vectors: Embeddings = (latent @ basis).astype(np.float32, copy=False)
        everywhere = rng.standard_normal((len(people), self.dimension), dtype=np.float32)
        vectors += amount * everywhere * np.float32(np.sqrt(0.5 / self.dimension))
        vectors += np.float32(np.sqrt(_SHARED)) * common
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return Block(numbers, people, rng.integers(0, CAMERAS, len(people)), vectors)

    def _looks(self, person: int) -> Embeddings:
        rng = np.random.default_rng((self.seed, 5, person))
        return rng.standard_normal(len(self._basis[0]), dtype=np.float32)

    @cached_property
    def _basis(self) -> tuple[Embeddings, Embeddings]:
        """Orthonormal directions, (256, D), fewer where D is less, and one more, (D,)."""
        rng = np.random.default_rng((self.seed, 6))
        drawn = rng.standard_normal((self.dimension, min(_DIRECTIONS + 1, self.dimension)))
        basis = np.linalg.qr(drawn)[0].T.astype(np.float32)
        return basis[1:], basis[0]


def _spread(directions: int) -> Embeddings:
    """(directions,) standard deviations along them; their squares sum to 1."""
    variances = 1 / np.arange(1, directions + 1)
    spread: Embeddings = np.sqrt(variances / variances.sum()).astype(np.float32)
    return spread


def record_of(number: int, person: int, camera: int) -> TrackletRecord:
    """What a gallery knows of a drawn tracklet."""
    known: dict[str, Any] = {"frames_received": 40, "frames_used": 15, "model": MODEL}
    time = START + timedelta(seconds=number)
    return TrackletRecord(
        tracklet_id=f"tracklet-{number:08d}",
        identity=f"person-{person}",
        camera=f"camera-{camera}",
        start_time=time,
        created_at=time,
        content=f"{number:064x}",
        **known,
    )
