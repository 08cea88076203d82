"""The same search by others, where they are installed: hnswlib, usearch, and two lines of numpy.

They hold all vectors in memory and know nothing of identities. So each is asked for `_NAMED` rows,
and filter and grouping are done afterwards, in numpy, from arrays that lie ready.
"""

import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.search import memory
from index.gallery import Embeddings
from index.store import Store
from index.vector_storage import Storage

PLAIN = "plain numpy"
LIBRARIES = ("hnswlib", "usearch")
_LINKS, _BUILD_BREADTH, _SEARCH_BREADTH = 32, 80, 1000  # M, ef of construction, ef
_NAMED = 1000
_READ_AT_ONCE = 2048
Numbers = NDArray[np.int64]
Find = Callable[[Embeddings], Numbers]


def is_other(index: str) -> bool:
    """Whether this is not a gallery."""
    return index == PLAIN or index in LIBRARIES


def is_there(index: str) -> bool:
    """Whether it can be asked here."""
    return index not in LIBRARIES or find_spec(index) is not None


def ask_other(
    directory: Path, index: str, storage: Storage, queries: Embeddings, cameras: Numbers, top_k: int
) -> tuple[dict[str, float], list[float], list[list[int]]]:
    """Ask for identities without those of the query's camera.

    Args:
        directory: A gallery's.
        index: `PLAIN`, or one of `LIBRARIES`.
        storage: How the vectors are stored.
        queries: (M, D) float32.
        cameras: (M,) where they were seen.
        top_k: How many identities.

    Returns:
        How long it took to make and how many bytes it takes, the seconds of each query, and the
        numbers of the people that were found.
    """
    before, begun = memory("VmRSS"), time.perf_counter()
    vectors, people, seen_at = read_all(directory, storage)
    find = _finder(index, vectors)
    if index != PLAIN:
        del vectors  # both have copied them
    started = {
        "start_s": time.perf_counter() - begun,
        "memory_bytes": float(memory("VmRSS") - before),
        "peak_bytes": float(memory("VmHWM") - before),
    }
    seconds, found = [], []
    for query, camera in zip(queries, cameras, strict=True):
        begun = time.perf_counter()
        named = find(query)
        named = named[seen_at[named] != camera]
        _, places = np.unique(people[named], return_index=True)
        found.append(people[named[np.sort(places)[:top_k]]].tolist())
        seconds.append(time.perf_counter() - begun)
    return started, seconds, found


def read_all(directory: Path, storage: Storage) -> tuple[Embeddings, Numbers, Numbers]:
    """All vectors, whom they show, and where."""
    store = Store(directory, storage=storage)
    try:
        tracklets, _, dimension = store.content()
        vectors = np.empty((tracklets, dimension or 0), dtype=np.float32)
        people, cameras = np.empty((2, tracklets), dtype=np.int64)
        start = 0
        for chunk in store.chunks(_READ_AT_ONCE):
            end = start + len(chunk.keys)
            vectors[start:end] = chunk.vectors
            people[start:end] = [_number(each) for each in chunk.identities]
            cameras[start:end] = [_number(each) for each in chunk.cameras]
            start = end
        return vectors, people, cameras
    finally:
        store.close()


def _finder(index: str, vectors: Embeddings) -> Find:
    """What names the rows nearest to a query, nearest first."""
    named = min(_NAMED, len(vectors))
    if index == PLAIN:
        return _plain(vectors, named)
    # Neither has type stubs, nor has to be there.
    library: Any = import_module("usearch.index" if index == "usearch" else index)
    if index == "usearch":
        graph = library.Index(
            ndim=vectors.shape[1],
            metric="l2sq",
            connectivity=_LINKS,
            expansion_add=_BUILD_BREADTH,
            expansion_search=_SEARCH_BREADTH,
        )
        graph.add(np.arange(len(vectors)), vectors)
        return lambda query: graph.search(query, named, threads=1).keys.astype(np.int64)
    graph = library.Index(space="l2", dim=vectors.shape[1])
    graph.init_index(len(vectors), ef_construction=_BUILD_BREADTH, M=_LINKS)
    graph.add_items(vectors)
    graph.set_ef(_SEARCH_BREADTH)
    return lambda query: graph.knn_query(query, named, num_threads=1)[0][0].astype(np.int64)


def _plain(vectors: Embeddings, named: int) -> Find:
    lengths = np.square(vectors).sum(axis=1)

    def find(query: Embeddings) -> Numbers:
        squared = lengths - 2 * (vectors @ query)
        few = np.argpartition(squared, named - 1)[:named]
        return few[np.argsort(squared[few])]

    return find


def _number(name: str | None) -> int:
    return int((name or "-1").rpartition("-")[2])
