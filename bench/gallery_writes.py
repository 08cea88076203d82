"""Enrolments a second, each acknowledged when it is on the disk, and searches meanwhile."""

import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from threading import Event, Thread

import numpy as np

from bench.gallery_people import CAMERAS, MODEL, START, People, record_of
from index.embedded import EmbeddedGallery
from index.gallery import Embeddings, Enrolment, Filters

STRIP_BYTES = 6000  # about what a film strip takes
_ROW_BYTES = 300  # about what a record takes


@dataclass(frozen=True, slots=True)
class Way:
    """How to write.

    Args:
        name: In words.
        writers: Threads that enrol.
        at_once: Tracklets in a call.
        searches: Whether one thread searches meanwhile.
    """

    name: str
    writers: int
    at_once: int = 1
    searches: bool = False


WAYS = (
    # Those with searches first: the others add tens of thousands, which a search then looks at.
    Way("searches alone", 0, searches=True),
    Way("one writer, and searches", 1, searches=True),
    Way("8 writers, and searches", 8, searches=True),
    Way("one writer", 1),
    Way("8 writers", 8),
    Way("one writer, 8 in a call", 1, 8),
    Way("one writer, 64 in a call", 1, 64),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of a way; times in milliseconds, None where there was nothing to time."""

    way: str
    enrolments_per_s: float
    call_p50_ms: float | None
    call_p99_ms: float | None
    searches_per_s: float
    search_p50_ms: float | None
    search_p99_ms: float | None

    def to_row(self) -> str:
        """A line of a Markdown table."""
        values = list(asdict(self).values())[1:]
        shown = ["" if value is None else f"{value:.1f}" for value in values]
        return f"| {self.way} | {' | '.join(shown)} |"


HEAD = (
    "| way | enrolments/s | a call: p50, ms | p99, ms | searches/s | each: p50, ms | p99, ms |\n"
    "|---|---|---|---|---|---|---|"
)


def measure_writes(
    *,
    tracklets: int,
    dimension: int,
    seconds: float,
    folder: Path | None,
    seed: int,
    tell: Callable[[str], None],
) -> list[Measured]:
    """Measure each way for so long, in one gallery that grows meanwhile.

    Args:
        tracklets: How many there are before.
        dimension: D.
        seconds: For each way.
        folder: Where the gallery is for a while: on the disk that is to be measured.
        seed: Of all vectors.
        tell: Gets lines of a table.
    """
    people = People(tracklets, dimension, seed)
    with tempfile.TemporaryDirectory(dir=folder) as parent:
        tell(f"the disk alone: {bare_commits(Path(parent), dimension, seconds / 2):.0f} commits/s")
        with EmbeddedGallery(Path(parent) / "gallery") as gallery:
            for block in people.blocks():
                gallery.add(block.enrolments())
            tell(f"\n{HEAD}")
            playing = Playing(gallery, people, seconds)
            measured = []
            for way in WAYS:
                measured.append(playing.measure(way))
                tell(measured[-1].to_row())
    return measured


def bare_commits(folder: Path, dimension: int, seconds: float) -> float:
    """How many transactions a second SQLite brings to the disk, each as large as an enrolment's."""
    content = os.urandom(4 * dimension + STRIP_BYTES + _ROW_BYTES)
    with closing(sqlite3.connect(folder / "bare.sqlite3", isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL").fetchall()
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE rows (content BLOB)")
        begun, done = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            connection.execute("INSERT INTO rows VALUES (?)", (content,))
            done += 1
        return done / (time.perf_counter() - begun)


class Playing:
    """Threads that write and search.

    Args:
        gallery: With ``people`` in it.
        people: Whose further tracklets are enrolled.
        seconds: How long each way is measured.
    """

    def __init__(self, gallery: EmbeddedGallery, people: People, seconds: float) -> None:
        self._gallery = gallery
        self._people = people
        self._seconds = seconds
        self._numbers = count(people.tracklets)
        # Drawn before: what is measured is the gallery.
        self._vectors = people.queries(512).vectors
        self._strip = os.urandom(STRIP_BYTES)
        self._errors: list[BaseException] = []

    def measure(self, way: Way) -> Measured:
        """Measure one."""
        done = Event()
        calls: list[list[float]] = [[] for _ in range(way.writers)]
        looks: list[float] = []
        threads = [
            Thread(target=self._guarded, args=[self._write, times, way.at_once, done])
            for times in calls
        ]
        if way.searches:
            threads.append(Thread(target=self._guarded, args=[self._search, looks, done]))
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        done.wait(self._seconds)
        done.set()
        for thread in threads:
            thread.join()
        spent = time.perf_counter() - begun
        if self._errors:
            raise self._errors[0]
        written = [seconds for times in calls for seconds in times]
        return Measured(
            way.name,
            len(written) * way.at_once / spent,
            *_percentiles(written),
            len(looks) / spent,
            *_percentiles(looks),
        )

    def _guarded(self, work: Callable[..., None], *given: object) -> None:
        try:
            work(*given)
        except BaseException as error:  # noqa: BLE001 - raised again by `measure`
            self._errors.append(error)

    def _write(self, times: list[float], at_once: int, done: Event) -> None:
        rng = np.random.default_rng(threading.get_ident())
        while not done.is_set():
            enrolments = [self._enrolment(rng) for _ in range(at_once)]
            begun = time.perf_counter()
            self._gallery.add(enrolments)
            times.append(time.perf_counter() - begun)

    def _enrolment(self, rng: np.random.Generator) -> Enrolment:
        number = next(self._numbers)
        record = record_of(number, int(rng.integers(1000)), int(rng.integers(CAMERAS)))
        vector: Embeddings = self._vectors[number % len(self._vectors)]
        return Enrolment(replace(record, start_time=START), vector, self._strip)

    def _search(self, times: list[float], done: Event) -> None:
        filters = Filters(exclude_cameras=frozenset({"camera-0"}))
        for number in count():
            if done.is_set():
                return
            begun = time.perf_counter()
            query = self._vectors[number % len(self._vectors)]
            self._gallery.search(query, model=MODEL, top_k=10, filters=filters)
            times.append(time.perf_counter() - begun)


def _percentiles(seconds: Sequence[float]) -> tuple[float | None, float | None]:
    """p50 and p99 in milliseconds."""
    if not seconds:
        return None, None
    middle, late = np.percentile(seconds, [50, 99])
    return 1000 * float(middle), 1000 * float(late)
