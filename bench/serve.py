"""What HTTP, decoding and queueing add to the bare embedder and to bare decoding, side by side.

    .venv/bin/python -m bench.serve [--only bare free single] [--profile]

bare: rounds of the embedder on decoded clips, and of the service at saturation, in turn. The client
shares the processors with the service, and its part of the processor time is told.

free: the same with an embedder that costs nothing, against decoding alone in as many processes as
there are cores: what the service costs apart from its network, for small frames and for large ones.

single: queries one after the other; the parts that the answers report, and what is left for HTTP.

`--profile` tells, for the service with the free embedder, what its main thread did.
"""

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from bench.sending import Load
from bench.served import FreeEmbedder
from bench.serving import (
    FREE,
    Loads,
    Server,
    Uploads,
    add_arguments,
    describe_machine,
    draw_uploads,
    median,
    percentile,
    print_table,
    read_settings,
    serving,
)
from model.embedder import Embedder
from model.frames import Clip, read_clip
from service.limits import PlainLimits
from service.server import choose_checkpoint
from service.settings import LimitSettings
from service.uploads import FrameChoice, decode, decode_upload

PARTS = ("bare", "free", "single")
SIZES = ((64, 128), (256, 512))  # width and height of a frame, pixels
PROFILE_TIMES = 3  # as long as a round: a sample is a coarse thing
_PAUSE_S = 0.5  # in which threads that wait actively fall asleep


@dataclass(frozen=True, slots=True)
class Round:
    """One round of either side.

    Args:
        rate: Tracklets a second.
        cpu_s: Processor time a tracklet, of the side that is measured.
        client_cpu_s: Processor time a tracklet that sending took.
    """

    rate: float
    cpu_s: float
    client_cpu_s: float = 0.0


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tracklets", type=int, default=24, help="of a round, and single queries")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a round without a network")
    arguments = parser.parse_args()

    print(f"{describe_machine()}, {arguments.rounds} rounds, {arguments.clients} clients")
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as name:
        folder = Path(name)
        if {"bare", "single"} & set(arguments.only):
            with_network(folder, arguments)
        for width, height in SIZES:
            size = f"{width}x{height}"
            uploads = draw_uploads(
                folder / size, 8, frames=(15, 15), size=(width, height), seed=arguments.seed
            )
            if "free" in arguments.only:
                without_network(folder, size, uploads, arguments)
            if arguments.profile:
                profile(folder, size, uploads, arguments)


def with_network(folder: Path, arguments: argparse.Namespace) -> None:
    """Measure the service with its own embedder."""
    uploads = draw_uploads(folder / "mixed", arguments.tracklets, seed=arguments.seed)
    settings = read_settings(arguments.set)
    with serving(
        folder / "data", folder / "server.log", weights=arguments.weights, settings=settings
    ) as server:
        loads = Loads(server, uploads, folder)
        if "bare" in arguments.only:
            service_over_bare(server, loads, uploads, arguments, settings)
        if "single" in arguments.only:
            single_queries(loads, uploads, arguments.tracklets)


def service_over_bare(
    server: Server,
    loads: Loads,
    uploads: Uploads,
    arguments: argparse.Namespace,
    settings: dict[str, str],
) -> None:
    """The embedder on clips, and the service, in turn."""
    given: dict[str, Any] = {
        name.lower(): settings[name] for name in ("PRECISION", "RUNTIME") if name in settings
    }
    embedder = Embedder(choose_checkpoint(arguments.weights), **given)
    clips = [read_clip(one.frames, embedder.preprocessing) for one in uploads.tracklets]
    embedder.warm_up()
    bare, served = [], []
    embed_bare(embedder, clips[:4])
    loads.closed("embed", clients=arguments.clients, requests=4)
    send = partial(loads.closed, "embed", clients=arguments.clients, requests=len(clips))
    for _ in range(arguments.rounds):
        time.sleep(_PAUSE_S)
        bare.append(embed_bare(embedder, clips))
        time.sleep(_PAUSE_S)
        served.append(ask(server, send))
    print(f"\nService over bare: {len(clips)} tracklets a round, {embedder.precision}\n")
    print_sides("bare embedder", bare, served)


def embed_bare(embedder: Embedder, clips: Sequence[Clip]) -> Round:
    """Embed all clips, as many in a call as the service's worker takes."""
    started, cpu = time.perf_counter(), time.process_time()
    at_once = max(1, embedder.max_frames // len(clips[0]))
    for first in range(0, len(clips), at_once):
        embedder.embed(clips[first : first + at_once])
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return Round(len(clips) / seconds, cpu / len(clips))


def ask(server: Server, send: Callable[[], Load]) -> Round:
    """Have tracklets embedded by the service.

    Raises:
        RuntimeError: Not all were.
    """
    before = server.usage().cpu_s
    load = send()
    cpu = server.usage().cpu_s - before
    if bad := [one.status for one in load.answers if one.status != 200]:
        raise RuntimeError(f"expected only answers with 200, got {sorted(set(bad))}")
    count = len(load.answers)
    return Round(count / load.elapsed_s, cpu / count, load.cpu_s / count)


def print_sides(bare_name: str, bare: Sequence[Round], served: Sequence[Round]) -> None:
    """Both sides, and their ratio round by round."""
    pairs = list(zip(bare, served, strict=True))
    ratio = statistics.median(ours.rate / theirs.rate for theirs, ours in pairs)
    cpu = statistics.median(theirs.cpu_s / ours.cpu_s for theirs, ours in pairs)
    rows = [
        [bare_name, *_medians(bare), "1", "1"],
        ["through HTTP", *_medians(served), f"{ratio:.3f}", f"{cpu:.3f}"],
    ]
    columns = ("", "tracklets/s", "CPU ms a tracklet", "of the client")
    print_table((*columns, "rate, of bare", "tracklets a CPU second, of bare"), rows)


def _medians(rounds: Sequence[Round]) -> list[str]:
    return [
        f"{median(one.rate for one in rounds):.2f}",
        f"{1000 * median(one.cpu_s for one in rounds):.2f}",
        f"{1000 * median(one.client_cpu_s for one in rounds):.2f}",
    ]


def without_network(
    folder: Path, size: str, uploads: Uploads, arguments: argparse.Namespace
) -> None:
    """Decoding alone, and the service whose embedder costs nothing, in turn."""
    settings = read_settings(arguments.set)
    decoded, staged, served = [], [], []
    with serving(
        folder / f"data-{size}", folder / f"{size}.log", weights=FREE, settings=settings
    ) as server:
        loads = Loads(server, uploads, folder / f"loads-{size}")
        send = partial(loads.saturate, "embed", clients=arguments.clients)
        send(seconds=1.0)
        for _ in range(arguments.rounds):
            decoded.append(decode_alone(uploads, arguments.seconds))
            staged.append(decode_alone(uploads, arguments.seconds, whole_stage=True))
            time.sleep(_PAUSE_S)
            served.append(ask(server, partial(send, seconds=arguments.seconds)))
    print(f"\nWithout a network: 15 JPEGs of {size}, rounds of {arguments.seconds:g} s\n")
    print_sides("decoding alone", decoded, served)
    print()
    print_sides("decoding, digest and quality", staged, served)


def decode_alone(uploads: Uploads, seconds: float, *, whole_stage: bool = False) -> Round:
    """Decode in a process a core, which do nothing else.

    Args:
        uploads: What to decode, again and again.
        seconds: How long.
        whole_stage: With all that a decoder of the service makes of an upload.
    """
    cores = len(os.sched_getaffinity(0))
    paths = [[str(path) for path in one.frames] for one in uploads.tracklets]
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(cores)
    with context.Pool(cores, _remember, (barrier,)) as pool:
        shares = pool.starmap(_decode_for, [(paths, seconds, whole_stage)] * cores, chunksize=1)
    count = sum(one[0] for one in shares)
    return Round(sum(one[0] / one[1] for one in shares), sum(one[2] for one in shares) / count)


_barrier: Barrier


def _remember(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _decode_for(
    paths: Sequence[Sequence[str]], seconds: float, whole_stage: bool
) -> tuple[int, float, float]:
    """Decode again and again; returns how many, and seconds of wall and of processor."""
    tracklets = [[Path(path).read_bytes() for path in one] for one in paths]
    choice = FrameChoice(15, "even", FreeEmbedder.preprocessing)
    limits = PlainLimits.of(LimitSettings())

    def work(frames: list[bytes]) -> None:
        if whole_stage:
            decode_upload({"frames": frames}, choice, limits)
        else:
            decode("frames", frames, choice, limits)

    work(tracklets[0])
    _barrier.wait()  # nobody has a core for himself while another process starts
    started, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        work(tracklets[count % len(tracklets)])
        count += 1
    return count, time.perf_counter() - started, time.process_time() - cpu


def single_queries(loads: Loads, uploads: Uploads, queries: int) -> None:
    """Queries one after the other against a gallery of all uploads."""
    loads.closed("enrol", clients=4, requests=len(uploads))
    load = loads.closed("query", clients=1, requests=queries)
    names = ("decode", "queue", "embed", "search")
    parts: dict[str, list[float]] = {name: [] for name in names}
    parts |= {"HTTP and the rest": [], "whole query": []}
    for answer in load.good():
        inside = [answer.timing_ms[name] for name in names]
        whole = 1000 * answer.latency_s
        for name, value in zip(parts, [*inside, whole - sum(inside), whole], strict=True):
            parts[name].append(value)
    print(f"\n{queries} queries, one at a time, {len(uploads)} tracklets stored\n")
    rows = [
        (name, f"{median(values):.1f}", f"{percentile(values, 90):.1f}")
        for name, values in parts.items()
    ]
    print_table(("part", "median, ms", "p90, ms"), rows)


def profile(folder: Path, size: str, uploads: Uploads, arguments: argparse.Namespace) -> None:
    """Tell what the main thread of the service with the free embedder did."""
    path = folder / f"profile-{size}.json"
    with serving(
        folder / f"profiled-{size}",
        folder / f"profiled-{size}.log",
        weights=FREE,
        settings=read_settings(arguments.set),
        profile=path,
    ) as server:
        loads = Loads(server, uploads, folder / f"profiled-loads-{size}")
        send = partial(loads.saturate, "embed", clients=arguments.clients)
        send(seconds=1.0)
        _take_profile(server, path)
        before = server.usage().cpu_s
        load = send(seconds=PROFILE_TIMES * arguments.seconds)
        cpu = server.usage().cpu_s - before
        found = _take_profile(server, path)
    count = len(load.answers)
    print(f"\nWhere the time goes: 15 JPEGs of {size}, {count} tracklets, sampled\n")
    main_s, process_s = found["main_s"], found["process_s"]
    rows = [
        ("decoder processes", cpu - process_s),
        ("other threads", process_s - main_s),
        ("main thread", main_s),
        *((f"— {name}", seconds) for name, seconds in found["pieces"].items()),
    ]
    print_table(
        ("", "CPU ms a tracklet", "of all", "of the main thread"),
        [
            (
                name,
                f"{1000 * seconds / count:.3f}",
                f"{seconds / cpu:.1%}",
                f"{seconds / main_s:.1%}" if name.startswith("—") else "",
            )
            for name, seconds in rows
        ],
    )
    print("\nThe main thread's innermost functions:\n")
    functions = list(found["functions"].items())[:15]
    print_table(
        ("function", "CPU ms a tracklet"),
        [(name, f"{1000 * seconds / count:.3f}") for name, seconds in functions],
    )


def _take_profile(server: Server, path: Path) -> dict[str, Any]:
    path.unlink(missing_ok=True)
    server.process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
