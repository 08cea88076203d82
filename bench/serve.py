"""What HTTP, decoding, queueing and searching add to the bare embedder, in one run.

    .venv/bin/python -m bench.serve

1. Throughput: rounds of the bare embedder on decoded clips and of the service at saturation
   (several clients at once, a real process on loopback), alternating; tracklets a second of both
   and their ratio, round by round.
2. Latency: single queries one after the other; the parts that the answer reports, and what is left
   for HTTP.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from rich.console import Console

from model.checkpoint import untrained_checkpoint
from model.datasets.synthetic import SyntheticSet, write_folder
from model.datasets.tracklets import Tracklet
from model.embedder import Embedder
from model.frames import Clip, read_clip
from service.demo import serving

Files = list[tuple[str, tuple[str, bytes]]]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tracklets", type=int, default=24, help="of a round")
    parser.add_argument("--queries", type=int, default=20, help="one after the other")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        config = SyntheticSet(
            identities=max(arguments.tracklets // 2, 1), frames_min=15, frames_max=40
        )
        tracklets = write_folder(config, Path(folder) / "tracklets")[: arguments.tracklets]
        uploads = [upload(one) for one in tracklets]
        console = Console(stderr=True)
        # The very network of the bare embedder below: its weights do not change how long it takes.
        with serving(Path(folder) / "data", console, weights="untrained") as address:
            throughput(address, tracklets, uploads, arguments.rounds, arguments.clients)
            latency(address, uploads, arguments.queries)


def upload(tracklet: Tracklet) -> Files:
    """The multipart files of a tracklet."""
    return [("frames", (path.name, path.read_bytes())) for path in tracklet.frames]


def throughput(
    address: str, tracklets: list[Tracklet], uploads: list[Files], rounds: int, clients: int
) -> None:
    """Bare embedder and service in turn."""
    embedder = Embedder(untrained_checkpoint())
    clips = [read_clip(one.frames, embedder.preprocessing) for one in tracklets]
    embedder.warm_up()
    bare, served = [], []
    for _ in range(rounds):
        bare.append(len(clips) / bare_seconds(embedder, clips))
        served.append(len(clips) / served_seconds(address, uploads, clients))
    ratio = statistics.median(ours / theirs for ours, theirs in zip(served, bare, strict=True))
    print(
        f"\n{len(clips)} tracklets a round, {rounds} rounds, "
        f"{clients} clients, {embedder.precision}\n"
    )
    print("| | tracklets a second (median) | of the bare embedder |\n|---|---|---|")
    print(f"| bare embedder | {statistics.median(bare):.2f} | 1 |")
    print(f"| through HTTP | {statistics.median(served):.2f} | {ratio:.3f} |")


def bare_seconds(embedder: Embedder, clips: list[Clip]) -> float:
    """Seconds for all clips, four in a call as the service's worker does."""
    started = time.perf_counter()
    for first in range(0, len(clips), 4):
        embedder.embed(clips[first : first + 4])
    return time.perf_counter() - started


def served_seconds(address: str, uploads: list[Files], clients: int) -> float:
    """Seconds until all uploads are answered."""
    with httpx.Client(base_url=address, timeout=300) as client:

        def ask(files: Files) -> None:
            client.post("/embed", files=files).raise_for_status()

        with ThreadPoolExecutor(clients) as pool:
            started = time.perf_counter()
            list(pool.map(ask, uploads))
            return time.perf_counter() - started


def latency(address: str, uploads: list[Files], queries: int) -> None:
    """Single queries against a gallery of all uploads."""
    parts: dict[str, list[float]] = {name: [] for name in ("decode", "queue", "embed", "search")}
    parts |= {"HTTP and the rest": [], "whole query": []}
    with httpx.Client(base_url=address, timeout=300) as client:
        for number, files in enumerate(uploads):
            fields = {"identity": f"p{number}"}
            client.post("/gallery", files=files, data=fields).raise_for_status()
        for number in range(queries):
            started = time.perf_counter()
            answer = client.post("/query", files=uploads[number % len(uploads)])
            whole = (time.perf_counter() - started) * 1000
            timing = answer.raise_for_status().json()["timing_ms"]
            inside = [timing[name] for name in ("decode", "queue", "embed", "search")]
            for name, value in zip(parts, [*inside, whole - sum(inside), whole], strict=True):
                parts[name].append(value)
    print(f"\n{queries} queries, one at a time, {len(uploads)} tracklets stored\n")
    print("| part | median, ms | p90, ms |\n|---|---|---|")
    for name, values in parts.items():
        p90 = sorted(values)[int(0.9 * (len(values) - 1))]
        print(f"| {name} | {statistics.median(values):.1f} | {p90:.1f} |")


if __name__ == "__main__":
    main()
