"""What galleries of many drawn people take, how fast they answer, and what they find.

The store is written once for each form of vectors, by chunks; then each way opens it in a process
of its own, twice where it saves an index. What is right is found while the store is written, by
measuring every query against every chunk.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gallery_others import LIBRARIES, PLAIN, ask_other, is_other, is_there
from bench.gallery_people import MODEL, Block, People
from bench.search import memory
from index.derived import Derived
from index.embedded import EmbeddedGallery
from index.gallery import Embeddings, Filters, GroupBy
from index.ranking import Nearest
from index.saved import FILE_NAME as SAVED_NAME
from index.store import FILE_NAME, Store
from index.vector_storage import Storage, rounded
from index.vectors import Allowed

TOP_K = 10
_MOST_PLAIN = 200_000  # beyond, two lines of numpy take as long as they take memory
_FEW_DIMENSIONS = 256
_LEAST_ROWS_A_LIST = 39  # what FAISS wants to train with


@dataclass(frozen=True, slots=True)
class Way:
    """One way to look.

    Args:
        index: As `EmbeddedGallery` takes it, or see `bench.gallery_others`.
        storage: Of the vectors.
    """

    index: str
    storage: Storage = "float32"

    @classmethod
    def parse(cls, text: str) -> "Way":
        """Read a factory string, perhaps with ``float16:`` before it."""
        storage, _, index = text.rpartition(":")
        return cls(index, "float16" if storage == "float16" else "float32")

    @property
    def name(self) -> str:
        """In words."""
        return self.index if self.storage == "float32" else f"{self.index}, float16 stored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What came of a way.

    Args:
        way: Its name.
        tracklets: How many.
        dimension: D.
        build_s: The first opening, which makes the index; None where nothing is saved.
        start_s: An opening as every day: from the saved index where there is one.
        memory_bytes: A tracklet, resident, on top of a process that has opened nothing.
        peak_bytes: Likewise, at most while it opened.
        store_bytes: A tracklet, on the disk, of the store.
        index_bytes: Likewise, of the saved index.
        p50_ms: Of a filtered query for ten identities, one at a time.
        p99_ms: Likewise.
        recall: Of the identities that are right, how many were found.
        faiss_ms: p50 of what of it FAISS takes.
        everyone_ms: p50 of a query without a filter and without groups, for ten tracklets.
        bare_ms: p50 of FAISS as it comes, for ten rows; None where it would look elsewhere.
    """

    way: str
    tracklets: int
    dimension: int
    build_s: float | None
    start_s: float
    memory_bytes: float
    peak_bytes: float
    store_bytes: float
    index_bytes: float
    p50_ms: float
    p99_ms: float
    recall: float
    faiss_ms: float | None
    everyone_ms: float | None
    bare_ms: float | None

    def to_row(self) -> str:
        """A line of a Markdown table."""
        shown = [
            _shown(self.build_s, 1),
            _shown(self.start_s, 1),
            _shown(self.memory_bytes, 0),
            _shown(self.peak_bytes, 0),
            _shown(self.store_bytes, 0),
            _shown(self.index_bytes, 0),
            _shown(self.p50_ms, 2),
            _shown(self.p99_ms, 2),
            _shown(self.recall, 4),
            _shown(self.faiss_ms, 2),
            _shown(self.everyone_ms, 2),
            _shown(self.bare_ms, 2),
        ]
        return f"| {self.way} | {' | '.join(shown)} |"


HEAD = (
    "| way | first start, s | start, s | memory, B | at most, B | store, B | saved index, B "
    "| p50, ms | p99, ms | recall | of it FAISS, ms | all, no groups, ms | bare FAISS, ms |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Asked:
    """Queries, and the identities that are right for them, nearest first.

    Args:
        vectors: (M, D) float32.
        cameras: (M,) where they were seen; tracklets from there are left out.
        right: (M, `TOP_K`) numbers of people, -1 where there are fewer.
    """

    vectors: Embeddings
    cameras: NDArray[np.int64]
    right: NDArray[np.int64]

    def save(self, path: Path) -> None:
        """Write it to a file."""
        np.savez(path, vectors=self.vectors, cameras=self.cameras, right=self.right)

    @classmethod
    def load(cls, path: Path) -> "Asked":
        """Read what `save` wrote."""
        with np.load(path) as held:
            return cls(held["vectors"], held["cameras"], held["right"])

    def filters(self, number: int) -> Filters:
        """Of one query."""
        return Filters(exclude_cameras=frozenset({f"camera-{self.cameras[number]}"}))


def lists_for(tracklets: int) -> int:
    """How many IVF lists: a power of two, about 4 sqrt(N), and few enough to be trained."""
    wanted = round(math.log2(4 * tracklets**0.5))
    most = int(math.log2(max(tracklets / _LEAST_ROWS_A_LIST, 4)))
    return 1 << min(wanted, most)


def ways_for(tracklets: int, dimension: int) -> tuple[Way, ...]:
    """What is measured where nothing else is asked for."""
    best = best_for(tracklets, dimension)
    others = tuple(Way(name) for name in LIBRARIES if is_there(name))
    return (
        Way("Flat"),
        Way("Flat", "float16"),
        Way(best),
        Way(best, "float16"),
        *(Way(index) for index in (f"IVF{lists_for(tracklets)},RaBitQ", "HNSW32,SQfp16")),
        *others[: tracklets <= _MOST_PLAIN and len(others)],
        *([Way(PLAIN)] if tracklets <= _MOST_PLAIN else []),
    )


def best_for(tracklets: int, dimension: int) -> str:
    """The best approximate factory string that was found, see docs/gallery.md."""
    shortened = f"PCA{_FEW_DIMENSIONS}," if dimension > _FEW_DIMENSIONS else ""
    return f"{shortened}IVF{lists_for(tracklets)},SQ8"


def measure_sizes(
    people: People,
    ways: Sequence[Way],
    *,
    queries: int,
    folder: Path | None,
    data: Path | None = None,
    tell: Callable[[str], None],
) -> list[Figures]:
    """Measure all ways.

    Args:
        people: Who is enrolled.
        ways: See `Way`.
        queries: How many are asked.
        folder: Where the galleries are for a while: 4 or 2 bytes for each of N D numbers, and the
            saved indexes.
        data: Where they stay instead, and are used again.
        tell: Gets lines of a table.
    """
    found = []
    for storage in dict.fromkeys(way.storage for way in ways):
        with ExitStack() as stack:
            parent = data and data / f"{_name(people)}-{storage}-{queries}-{people.seed}"
            if parent is None:
                parent = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
            directory, asked = parent / "gallery", parent / "asked.npz"
            begun = time.perf_counter()
            if not asked.exists():  # written last
                shutil.rmtree(directory, ignore_errors=True)
                parent.mkdir(parents=True, exist_ok=True)
                write_store(directory, people, storage, queries).save(asked)
            spent = time.perf_counter() - begun
            tell(f"\n{_name(people)} as {storage}, there after {spent:.0f} s\n\n{HEAD}")
            for way in ways:
                if way.storage == storage and is_there(way.index):
                    found.append(measure_apart(way, directory, asked, people))
                    tell(found[-1].to_row())
    for name in LIBRARIES:
        if not is_there(name):
            tell(f"{name}: not installed")
    return found


def _name(people: People) -> str:
    return f"{people.tracklets}x{people.dimension}"


def write_store(directory: Path, people: People, storage: Storage, queries: int) -> Asked:
    """Write a gallery's files without an index, and find out what is right."""
    asked = people.queries(queries)
    best = np.full((queries, len(people.sizes())), np.inf, dtype=np.float32)
    store = Store(directory, storage=storage)
    try:
        for block in people.blocks():
            with store.transaction() as transaction:
                for enrolment in block.enrolments():
                    transaction.insert(enrolment)
                transaction.commit()
            vectors = np.stack([rounded(vector, storage) for vector in block.vectors])
            _bring_nearer(best, asked, block, vectors)
    finally:
        store.close()
    right = np.argsort(best, axis=1, kind="stable")[:, :TOP_K]
    there = np.isfinite(np.take_along_axis(best, right, axis=1))
    return Asked(asked.vectors, asked.cameras, np.where(there, right, -1))


def _bring_nearer(best: Embeddings, asked: Block, block: Block, vectors: Embeddings) -> None:
    """Note the people of a block who are nearer to a query than they were in those before.

    Args:
        best: (M, P) squared distances by query and person; changed.
        asked: M queries.
        block: n tracklets.
        vectors: (n, D) float32, as they are stored.
    """
    squared = np.square(vectors).sum(axis=1) - 2 * asked.vectors @ vectors.T
    squared += np.square(asked.vectors).sum(axis=1)[:, None]
    squared[asked.cameras[:, None] == block.cameras] = np.inf
    order = np.argsort(block.people, kind="stable")
    people, starts = np.unique(block.people[order], return_index=True)
    nearest = np.minimum.reduceat(squared[:, order], starts, axis=1)
    best[:, people] = np.minimum(best[:, people], nearest)


def measure_apart(way: Way, directory: Path, asked: Path, people: People) -> Figures:
    """Open a gallery in processes of their own, and ask it."""
    (directory / SAVED_NAME).unlink(missing_ok=True)
    first = None
    if not is_other(way.index):
        first = _in_child("open", way, directory, asked)["start_s"]
    is_saved = (directory / SAVED_NAME).exists()
    told = _in_child("ask", way, directory, asked)
    tracklets = people.tracklets
    sizes = {name: _size(directory / name) / tracklets for name in (FILE_NAME, SAVED_NAME)}
    told["memory_bytes"] /= tracklets
    told["peak_bytes"] /= tracklets
    return Figures(
        way=way.name,
        tracklets=tracklets,
        dimension=people.dimension,
        build_s=first if is_saved else None,
        store_bytes=sizes[FILE_NAME],
        index_bytes=sizes[SAVED_NAME],
        **told,
    )


def _in_child(what: str, way: Way, directory: Path, asked: Path) -> dict[str, Any]:
    order = json.dumps([what, asdict(way), str(directory), str(asked)])
    command = [sys.executable, "-m", "bench.gallery_sizes", order]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def child(order: str) -> dict[str, Any]:
    """What a process of its own does: it opens a gallery, and perhaps asks it."""
    what, how, directory, asked = json.loads(order)
    way = Way(**how)
    if is_other(way.index):
        return _ask_other(Path(directory), way, Asked.load(Path(asked)))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    before, begun = memory("VmRSS"), time.perf_counter()
    with EmbeddedGallery(Path(directory), index=way.index, storage=way.storage) as gallery:
        spent = time.perf_counter() - begun
        told: dict[str, Any] = {
            "start_s": spent,
            "memory_bytes": memory("VmRSS") - before,
            "peak_bytes": memory("VmHWM") - before,
        }
        if what == "ask":
            told |= _ask(gallery, Asked.load(Path(asked)))
    return told


def _ask(gallery: EmbeddedGallery, asked: Asked) -> dict[str, Any]:
    """Ask a gallery, each query in each way before the next."""
    derived = gallery._derived
    if derived is None:
        raise SystemExit("expected a gallery with tracklets, got an empty one")
    bare, spent = derived.vectors._index, _time_faiss(derived)
    times: dict[str, list[float]] = {"filtered": [], "everyone": [], "bare": [], "faiss": []}
    found = []
    for number, query in enumerate(asked.vectors):
        spent.clear()
        with _timed(times["filtered"]):
            matches = _names(gallery, query, asked.filters(number), "identity")
        times["faiss"].append(sum(spent))
        with _timed(times["everyone"]):
            _names(gallery, query, Filters(), "tracklet")
        if derived.vectors.exhaustive:
            with _timed(times["bare"]):
                bare.search(query[None], TOP_K)
        found.append(matches)
    return {
        **_told(times["filtered"], found, asked),
        **{f"{name}_ms": _median_ms(times[name]) for name in ("faiss", "everyone", "bare")},
    }


def _names(
    gallery: EmbeddedGallery, query: Embeddings, filters: Filters, group_by: GroupBy
) -> list[int]:
    """The numbers of the people that are found."""
    result = gallery.search(query, model=MODEL, top_k=TOP_K, group_by=group_by, filters=filters)
    return [int((match.record.identity or "-1").rpartition("-")[2]) for match in result.matches]


def _time_faiss(derived: Derived) -> list[float]:
    """Have each call of FAISS write down how long it took."""
    spent: list[float] = []
    search = derived.vectors.search

    def timed(queries: Embeddings, count: int, allowed: Allowed) -> list[Nearest]:
        with _timed(spent):
            return search(queries, count, allowed)

    derived.vectors.search = timed  # type: ignore[method-assign]
    return spent


def _ask_other(directory: Path, way: Way, asked: Asked) -> dict[str, Any]:
    started, seconds, found = ask_other(
        directory, way.index, way.storage, asked.vectors, asked.cameras, TOP_K
    )
    nothing = dict.fromkeys(("faiss_ms", "everyone_ms", "bare_ms"))
    return {**started, **_told(seconds, found, asked), **nothing}


def _told(
    seconds: Sequence[float], found: Sequence[Sequence[int]], asked: Asked
) -> dict[str, float]:
    middle, late = np.percentile(seconds, [50, 99])
    right = [set(one[one >= 0].tolist()) for one in asked.right]
    hits = sum(len(one & set(names)) for one, names in zip(right, found, strict=True))
    return {
        "p50_ms": 1000 * float(middle),
        "p99_ms": 1000 * float(late),
        "recall": hits / sum(map(len, right)),
    }


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - begun)


def _median_ms(seconds: Sequence[float]) -> float | None:
    return 1000 * float(np.median(seconds)) if seconds else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1])))
