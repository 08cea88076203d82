"""What a gallery adds to a bare FAISS call: one search, many at once, and its opening.

    .venv/bin/python -m bench.search --tracklets 100000 --dim 2048

Galleries of random people, four tracklets each: two small ones, where all that is not FAISS shows,
and the one that is asked for. Each round takes every way in turn, so that a machine that slows down
slows down all of them; medians over rounds, ratios within a round. Bare is `IndexFlatL2.search` of
the same vectors, queries and number of answers, on all processors and without a selector, as FAISS
comes. Opening is measured in a process of its own, from files that the system has just written.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import faiss as _faiss
import numpy as np

from index.embedded import EmbeddedGallery
from index.gallery import Embeddings, Enrolment, SearchResult, TrackletRecord

faiss: Any = _faiss  # its type stubs know C++'s signatures, not those of its Python layer

MODEL = "trsa-bench"
TRACKLETS_PER_IDENTITY = 4
SPREAD = 0.5  # of a person's tracklets, where people are 1 apart in each of D directions
ADDED_AT_ONCE = 4000
START = datetime(2026, 1, 1, tzinfo=UTC)
Times = dict[str, list[float]]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tracklets", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--together", type=int, default=16, help="searches at once")
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where to put the galleries for a while")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(open_once(arguments.child)))
        return

    print(
        f"{platform.machine()}, {faiss.omp_get_max_threads()} threads, FAISS {faiss.__version__}, "
        f"Python {platform.python_version()}; top_k {arguments.top_k}, {arguments.rounds} rounds; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    sizes = dict.fromkeys([(1000, 192), (1000, 2048), (arguments.tracklets, arguments.dim)])
    for tracklets, dimension in sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            directory = Path(folder) / "gallery"
            compare(directory, tracklets, dimension, arguments)
            print_opening(directory, tracklets, dimension)


def compare(directory: Path, tracklets: int, dimension: int, arguments: argparse.Namespace) -> None:
    """Build a gallery, measure searches in it, and print a table."""
    with EmbeddedGallery(directory) as gallery:
        build(gallery, tracklets, dimension)
        queries = draw_queries(tracklets, dimension, arguments.together * arguments.rounds)
        times, cpu = measure(gallery, queries, arguments)
    print(f"\n## {tracklets} x {dimension}\n")
    print_table(times, cpu, arguments.together)


def centre(identity: int, dimension: int) -> Embeddings:
    """What a person's tracklets look like, (D,) float32."""
    return np.random.default_rng((0, identity)).standard_normal(dimension, dtype=np.float32)


def build(gallery: EmbeddedGallery, tracklets: int, dimension: int) -> None:
    """Enrol random people."""
    rng = np.random.default_rng(1)
    for start in range(0, tracklets, ADDED_AT_ONCE):
        numbers = range(start, min(start + ADDED_AT_ONCE, tracklets))
        gallery.add([enrolment(number, dimension, rng) for number in numbers])


def enrolment(number: int, dimension: int, rng: np.random.Generator) -> Enrolment:
    """One tracklet."""
    identity = number // TRACKLETS_PER_IDENTITY
    noise = rng.standard_normal(dimension, dtype=np.float32)
    record = TrackletRecord(
        tracklet_id=f"tracklet-{number:08d}",
        identity=f"person-{identity}",
        camera=f"camera-{number % 6}",
        frames_received=40,
        frames_used=15,
        model=MODEL,
        created_at=START,
        content=f"{number:064d}",
    )
    return Enrolment(record, centre(identity, dimension) + np.float32(SPREAD) * noise)


def draw_queries(tracklets: int, dimension: int, count: int) -> Embeddings:
    """More tracklets of people who are there, (count, D) float32."""
    rng = np.random.default_rng(2)
    identities = rng.integers(0, max(tracklets // TRACKLETS_PER_IDENTITY, 1), count)
    noise = rng.standard_normal((count, dimension), dtype=np.float32)
    centres = np.stack([centre(int(each), dimension) for each in identities])
    return centres + np.float32(SPREAD) * noise


def measure(
    gallery: EmbeddedGallery, queries: Embeddings, arguments: argparse.Namespace
) -> tuple[Times, Times]:
    """Seconds by the clock, and of processors, for each way in each round."""
    together, top_k = arguments.together, arguments.top_k
    bare = bare_index(gallery)
    everyone = np.packbits(np.ones(bare.ntotal, dtype=np.bool_), bitorder="little")
    selected = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(everyone))
    ask = partial(gallery.search, model=MODEL, top_k=top_k)
    with ThreadPoolExecutor(together) as pool:
        check_agreement(ask, pool, queries[:together])
        ways: dict[str, Callable[[Embeddings], object]] = {
            "bare FAISS": lambda some: bare.search(some[:1], top_k),
            "bare FAISS with a bitmap of all rows": lambda some: bare.search(
                some[:1], top_k, params=selected
            ),
            "gallery": lambda some: ask(some[0]),
            "bare FAISS, one call": lambda some: bare.search(some, top_k),
            "gallery, one thread each": lambda some: at_once(ask, pool, some),
        }
        times: Times = {name: [] for name in ways}
        cpu: Times = {name: [] for name in ways}
        for number in range(-1, arguments.rounds):
            some = queries[max(number, 0) * together :][:together]
            for name, run in ways.items():
                started, worked = time.perf_counter(), time.process_time()
                run(some)
                if number >= 0:  # the one before warms up
                    times[name].append(time.perf_counter() - started)
                    cpu[name].append(time.process_time() - worked)
    return times, cpu


def bare_index(gallery: EmbeddedGallery) -> Any:
    """The gallery's own FAISS index: the same vectors at the same place, without a second copy."""
    derived = gallery._derived
    if derived is None:
        raise SystemExit("expected a gallery with tracklets, got an empty one")
    return derived.vectors._index


def at_once(
    ask: Callable[[Embeddings], SearchResult], pool: ThreadPoolExecutor, queries: Embeddings
) -> list[SearchResult]:
    """Ask for each query in a thread of its own; all begin when the last is ready."""
    start = Barrier(len(queries))

    def one(query: Embeddings) -> SearchResult:
        start.wait()
        return ask(query)

    return list(pool.map(one, queries))


def check_agreement(
    ask: Callable[[Embeddings], SearchResult], pool: ThreadPoolExecutor, queries: Embeddings
) -> None:
    """Refuse to time searches whose answers depend on company."""
    if at_once(ask, pool, queries) != [ask(query) for query in queries]:
        raise SystemExit("expected the same answers alone and at once, got different ones")


def print_table(times: Times, cpu: Times, together: int) -> None:
    """Markdown, ready for docs/performance.md."""
    print("| searches | way | median, ms | p90, ms | of a processor, ms | times bare |")
    print("|---|---|---|---|---|---|")
    for name, seconds in times.items():
        alone = name in {"bare FAISS", "bare FAISS with a bitmap of all rows", "gallery"}
        base = times["bare FAISS" if alone else "bare FAISS, one call"]
        ratio = statistics.median(ours / bare for ours, bare in zip(seconds, base, strict=True))
        p90 = sorted(seconds)[int(0.9 * (len(seconds) - 1))]
        values = (statistics.median(seconds), p90, statistics.median(cpu[name]))
        shown = " | ".join(f"{1000 * value:.2f}" for value in values)
        print(f"| {1 if alone else together} | {name} | {shown} | {ratio:.2f} |")


def print_opening(directory: Path, tracklets: int, dimension: int) -> None:
    """What a start with this gallery takes."""
    command = [sys.executable, "-m", "bench.search", "--child", str(directory)]
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    seconds = statistics.median(each["seconds"] for each in found)
    resident, peak = (max(each[name] for each in found) / 1e6 for name in ("kept", "peak"))
    vectors = tracklets * dimension * 4 / 1e6
    size = sum(path.stat().st_size for path in directory.iterdir()) / 1e6
    print(
        f"\nOpening: {seconds:.2f} s (median of 3). Resident memory on top of the process: "
        f"{resident:.0f} MB, {peak:.0f} MB at most (the vectors alone: {vectors:.0f} MB). "
        f"On the disk: {size:.0f} MB."
    )


def open_once(directory: Path) -> dict[str, float]:
    """Open a gallery in this process; seconds and bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
    before = memory("VmRSS")
    started = time.perf_counter()
    with EmbeddedGallery(directory):
        seconds = time.perf_counter() - started
        kept, peak = memory("VmRSS") - before, memory("VmHWM") - before
    return {"seconds": seconds, "kept": kept, "peak": peak}


def memory(name: str) -> int:
    """A line of this process's status, bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
