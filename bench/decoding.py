"""How many tracklets of JPEG files are decoded a second: what the cores allow, what we make of it.

    .venv/bin/python -m bench.decoding

Bare ways have the files at hand and drop the clips: one thread, as many threads as cores, as many
processes. `Decoders` is what the service uses: files go to processes, clips come back to an event
loop. Every way takes its turn in each round; medians over rounds, and processor time from all
processes that took part.
"""

import argparse
import asyncio
import io
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image

from model.cores import available_cores
from model.frames import Preprocessing
from service.decoding import Decoders
from service.limits import PlainLimits
from service.uploads import FrameChoice, decode

FRAMES = 15
SIZES = ((64, 128), (256, 512))
LIMITS = PlainLimits(512, 16 * 2**20, 64 * 2**20, 40_000_000, 8)
BARE = "processes, bare"


@dataclass(frozen=True, slots=True)
class Task:
    """What is decoded.

    Args:
        width: Of a file, pixels.
        height: Likewise.
        choice: What becomes of it.
        seconds: How long it is decoded over and over.
    """

    width: int
    height: int
    choice: FrameChoice
    seconds: float


class Turn(NamedTuple):
    """What came of one turn.

    Args:
        rate: Tracklets a second.
        parent_ms: Processor time of this process for each of them.
        children_ms: Likewise, of all others.
    """

    rate: float
    parent_ms: float
    children_ms: float


Way = Callable[[Task], Turn]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cores", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one way in one round")
    parser.add_argument("--network", type=int, nargs=2, default=(128, 64), help="height, width")
    arguments = parser.parse_args()
    height, width = arguments.network
    choice = FrameChoice(FRAMES, "even", Preprocessing(height=height, width=width))
    print(
        f"{arguments.cores} cores, {arguments.rounds} rounds of {arguments.seconds:g} s, "
        f"Python {platform.python_version()}, Pillow {PIL.__version__}\n"
    )
    with ExitStack() as opened:
        ways = open_ways(choice, arguments.cores, opened)
        for size in SIZES:
            task = Task(*size, choice, arguments.seconds)
            turns = measure(ways, task, arguments.rounds)
            print_table(task, turns)


def open_ways(choice: FrameChoice, cores: int, opened: ExitStack) -> dict[str, Way]:
    """Start everything that decodes."""
    one, threads = (opened.enter_context(ThreadPoolExecutor(count)) for count in (1, cores))
    # Forked from a server that has imported the rest once, and has no thread.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = opened.enter_context(ProcessPoolExecutor(cores, context))
    decoders = opened.enter_context(closing(Decoders(choice, LIMITS, processes=cores)))
    decoders.start()
    return {
        "one thread": lambda task: decode_bare(one, 1, task),
        "threads": lambda task: decode_bare(threads, cores, task),
        BARE: lambda task: decode_bare(processes, cores, task),
        "Decoders": lambda task: asyncio.run(decode_served(decoders, cores, task)),
    }


def measure(ways: dict[str, Way], task: Task, rounds: int) -> dict[str, list[Turn]]:
    """Let all ways take turns; the first round warms up and is dropped."""
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            turns[name].append(way(task))
    return {name: taken[1:] for name, taken in turns.items()}


@cache
def draw_files(width: int, height: int) -> list[bytes]:
    """JPEG files of what cameras see: large shapes strong, fine ones weak (1/f)."""
    rng = np.random.default_rng(0)
    cycles = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    files = []
    for _ in range(FRAMES):
        spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / np.maximum(cycles, 1)
        levels = np.fft.irfft2(spectrum, (height, width))
        levels = 128 + 50 * (levels - levels.mean()) / levels.std()
        file = io.BytesIO()
        pixels = levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    return files


def decode_bare(pool: Executor, workers: int, task: Task) -> Turn:
    """Let each worker of a pool decode on its own."""
    parent = time.process_time()
    done = list(pool.map(decode_on_end, [task] * workers))
    parent = time.process_time() - parent
    tracklets = sum(count for count, _, _ in done)
    others = sum(cpu_s for _, pid, cpu_s in done if pid != os.getpid())
    return Turn(tracklets / task.seconds, parent * 1000 / tracklets, others * 1000 / tracklets)


def decode_on_end(task: Task) -> tuple[float, int, float]:
    """Decode until the time is up.

    Returns:
        How many tracklets in that time, where, and seconds of processor time of this process.
    """
    files = draw_files(task.width, task.height)
    cpu, started, count = time.process_time(), time.perf_counter(), 0
    while (took := time.perf_counter() - started) < task.seconds:
        decode("frames", files, task.choice, LIMITS)
        count += 1
    return count * task.seconds / took, os.getpid(), time.process_time() - cpu


async def decode_served(decoders: Decoders, cores: int, task: Task) -> Turn:
    """Let two clients for each core send uploads, one after the other."""
    files = {"frames": draw_files(task.width, task.height)}
    count = 0
    parent, children, started = time.process_time(), cpu_of(decoders.pids), time.perf_counter()

    async def send() -> None:
        nonlocal count
        while time.perf_counter() - started < task.seconds:
            await decoders.decode(files)
            count += 1

    await asyncio.gather(*(send() for _ in range(2 * cores)))
    took = time.perf_counter() - started
    parent = time.process_time() - parent
    children = cpu_of(decoders.pids) - children
    return Turn(count / took, parent * 1000 / count, children * 1000 / count)


def cpu_of(pids: Sequence[int]) -> float:
    """Seconds of processor time that processes have taken so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def print_table(task: Task, turns: dict[str, list[Turn]]) -> None:
    """Medians; shares are of the same round."""
    size = statistics.mean(map(len, draw_files(task.width, task.height))) / 1000
    print(f"## {FRAMES} JPEGs of {task.width}x{task.height}, {size:.1f} kB each\n")
    print("| decoded by | tracklets a second | of bare processes | ms, parent | ms, children |")
    print("|---|---|---|---|---|")
    for name, taken in turns.items():
        shares = [one.rate / bare.rate for one, bare in zip(taken, turns[BARE], strict=True)]
        rate, parent, children = (statistics.median(column) for column in zip(*taken, strict=True))
        share = statistics.median(shares)
        print(f"| {name} | {rate:.0f} | {share:.2f} | {parent:.2f} | {children:.2f} |")
    print(flush=True)


if __name__ == "__main__":
    main()
