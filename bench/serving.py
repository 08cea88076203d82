"""What the benches of the service share: a server process and what it holds, drawn uploads, tables.

The server is a real process on loopback with settings of its own. `FREE` serves with an embedder
that costs nothing (`bench.served`), to measure everything else.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from bench.sending import Connection, Entry, Load, Plan, Sender, write_bodies
from bench.served import FreeEmbedder
from index.embedded import EmbeddedGallery
from index.gallery import Enrolment, TrackletRecord
from model.checkpoint import untrained_checkpoint
from model.datasets.synthetic import SyntheticSet, write_folder
from model.datasets.tracklets import Tracklet
from service.client import read_local
from service.loadtest_sending import encode_body
from service.server import choose_checkpoint
from service.settings import UNTRAINED

ROOT = Path(__file__).parent.parent
FREE = "free"
MODULE, SERVED = "service.cli", "bench.served"
_START_S, _STOP_S = 300.0, 90.0
_TICK = os.sysconf("SC_CLK_TCK")
_CHUNK = 2000  # enrolments in one transaction


@dataclass(frozen=True, slots=True)
class Usage:
    """What a server process and its children hold.

    Args:
        rss: Resident memory of the process itself, bytes.
        children_rss: Of each child; pages that they share count in each.
        threads: Of all of them.
        descriptors: Open files, sockets and pipes of all of them.
        sockets: How many of those are sockets.
        cpu_s: Processor time of all of them, and of children that have ended.
    """

    rss: int
    children_rss: tuple[int, ...]
    threads: int
    descriptors: int
    sockets: int
    cpu_s: float

    @property
    def memory(self) -> int:
        """Resident memory of all of them, bytes."""
        return self.rss + sum(self.children_rss)


def usage_of(pid: int) -> Usage:
    """Read what a process and its children hold, from /proc.

    Raises:
        FileNotFoundError: There is no such process.
    """
    children = descendants(pid)
    cpu = _cpu_s(pid, with_ended=True)
    memory, threads, links = [], 0, []
    for one in (pid, *children):
        try:
            status = _status(one)
            links += _links(one)
        except (FileNotFoundError, ProcessLookupError):
            if one == pid:
                raise
            continue  # it has ended meanwhile
        memory.append(int(status.get("VmRSS", "0 kB").split()[0]) * 1024)
        threads += int(status["Threads"])
    for one in children:
        with suppress(FileNotFoundError, ProcessLookupError):
            cpu += _cpu_s(one, with_ended=True)
    sockets = sum(link.startswith("socket:") for link in links)
    return Usage(memory[0], tuple(memory[1:]), threads, len(links), sockets, cpu)


def descendants(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(FileNotFoundError, ProcessLookupError):
                parents.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; the second may hold blanks and brackets."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


def _cpu_s(pid: int, *, with_ended: bool) -> float:
    fields = _stat(pid)[11 : 15 if with_ended else 13]  # of itself, then of children it waited for
    return sum(int(one) for one in fields) / _TICK


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _links(pid: int) -> list[str]:
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(entry.readlink()))
    return links


@dataclass(frozen=True, slots=True)
class Server:
    """A server process.

    Args:
        process: It.
        port: On loopback.
        log: Its standard error.
        ready_s: From its beginning until it was ready.
    """

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path
    ready_s: float

    def usage(self) -> Usage:
        """What it and its children hold now."""
        return usage_of(self.process.pid)

    def get(self, path: str) -> tuple[int, bytes]:
        """Ask for a page on a connection of its own; returns status and body.

        Raises:
            OSError: No answer came.
        """
        connection = Connection(self.port, timeout_s=30)
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        try:
            status, _, body = connection.ask(request.encode())
        finally:
            connection.close()
        return status, body

    def metric(self, name: str) -> float | None:
        """A metric without labels; None where the service has none of the name."""
        status, body = self.get("/metrics")
        if status == 200:
            for line in body.decode().splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[1])
        return None

    def info(self) -> dict[str, Any]:
        """Body of ``GET /info``."""
        found: dict[str, Any] = json.loads(self.get("/info")[1])
        return found


@contextmanager
def serving(
    data_dir: Path,
    log: Path,
    *,
    weights: str = "bundled",
    settings: Mapping[str, str] | None = None,
    cores: Iterable[int] | None = None,
    profile: Path | None = None,
) -> Iterator[Server]:
    """Run the service in a process of its own until the end of the block.

    Args:
        data_dir: Of its gallery.
        log: File for its standard error.
        weights: What to serve, as in the settings; or `FREE`.
        settings: Further ones, by the name of their variable without its prefix.
        cores: Of the machine, that it may use; all without it.
        profile: Where it writes what its main thread did, see `bench.served`.

    Raises:
        RuntimeError: It did not become ready; the message ends with its last words.
    """
    port = free_port()
    given = {"PORT": str(port), "DATA_DIR": str(data_dir), **(settings or {})}
    command = [sys.executable, "-m"]
    if weights == FREE or profile is not None:
        command += [SERVED]
        command += ["--free"] if weights == FREE else []
        command += ["--profile", str(profile)] if profile is not None else []
    else:
        command += [MODULE, "serve"]
    if weights != FREE:
        given["WEIGHTS"] = weights
    # What the caller's environment says about a real service stays out.
    environment = {n: v for n, v in os.environ.items() if not n.upper().startswith("PASSERBY_")}
    environment |= {f"PASSERBY_{name}": value for name, value in given.items()}
    with log.open("wb") as out, _on_cores(cores):
        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, stderr=out, cwd=ROOT)
    try:
        wait_until_ready(process, port, log)
        yield Server(process, port, log, time.monotonic() - started)
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _on_cores(cores: Iterable[int] | None) -> Iterator[None]:
    """Let what is started in the block use these cores only; it counts them at its start."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if cores is None else set(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Ask every few milliseconds whether a server is ready.

    Raises:
        RuntimeError: It ended, or took too long; the message ends with its last words.
    """
    deadline = time.monotonic() + _START_S
    request = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    connection = Connection(port, timeout_s=30)
    while time.monotonic() < deadline and process.poll() is None:
        try:
            status, _, _ = connection.ask(request)
        except OSError:
            connection.close()
            status = 0
        if status == 200:
            connection.close()
            return
        time.sleep(0.02)
    words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
    raise RuntimeError("the service did not become ready: " + " | ".join(words))


class Watcher:
    """Reads what a server holds, again and again, while its block runs.

    Args:
        server: Whom to watch.
        every_s: Seconds between two looks.

    Attributes:
        seen: When, on this machine's monotonic clock, and what.
    """

    def __init__(self, server: Server, every_s: float = 0.5) -> None:
        self.seen: list[tuple[float, Usage]] = []
        self._server, self._every_s = server, every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self.seen.append((time.monotonic(), self._server.usage()))
            except (FileNotFoundError, ProcessLookupError):
                return  # the server has ended


@dataclass(frozen=True, slots=True)
class Uploads:
    """Drawn tracklets and their bodies.

    Args:
        tracklets: Their frames lie on the disk.
        folder: Their bodies, for `bench.sending`.
    """

    tracklets: tuple[Tracklet, ...]
    folder: Path

    def __len__(self) -> int:
        return len(self.tracklets)


def draw_uploads(
    folder: Path,
    tracklets: int,
    *,
    frames: tuple[int, int] = (15, 40),
    size: tuple[int, int] = (64, 128),
    seed: int = 0,
) -> Uploads:
    """Draw tracklets of JPEG frames and encode them.

    Args:
        folder: New.
        tracklets: How many.
        frames: Fewest and most of a tracklet.
        size: Width and height of a frame, pixels.
        seed: Of the drawing.
    """
    config = SyntheticSet(
        identities=(tracklets + 1) // 2,
        frames_min=frames[0],
        frames_max=frames[1],
        width=size[0],
        height=size[1],
        seed=seed,
    )
    drawn = write_folder(config, folder / "tracklets")[:tracklets]
    encoded = [encode_body(read_local(one.frames)) for one in drawn]
    write_bodies(folder / "bodies", [(one.content_type, one.content) for one in encoded])
    return Uploads(tuple(drawn), folder / "bodies")


class Loads:
    """Starts sending processes against one server; each leaves its files in a folder.

    Args:
        server: Whom to ask.
        uploads: What to send.
        folder: For their files; new folders are made in it.
    """

    def __init__(self, server: Server, uploads: Uploads, folder: Path) -> None:
        self._server, self._uploads, self._folder = server, uploads, folder
        self._started = 0

    def closed(self, kind: str, *, clients: int, requests: int) -> Load:
        """Ask so often, as fast as so many clients get answers."""
        entries = tuple(Entry(0.0, kind, number) for number in range(requests))
        return self._start(clients, entries, is_open=False).wait()

    def saturate(self, kind: str, *, clients: int, seconds: float) -> Load:
        """Ask for so long, as fast as so many clients get answers."""
        return self._start(clients, (), is_open=False, repeat=kind, seconds=seconds).wait()

    def open(self, entries: Sequence[Entry], *, clients: int = 128) -> Sender:
        """Begin to send each entry at its time.

        Args:
            entries: By their times.
            clients: How many may be open at a time; where more would be, those after them are late.
        """
        return self._start(clients, tuple(entries), is_open=True)

    def _start(
        self,
        clients: int,
        entries: tuple[Entry, ...],
        *,
        is_open: bool,
        repeat: str = "",
        seconds: float = 0.0,
    ) -> Sender:
        self._started += 1
        folder = str(self._uploads.folder)
        plan = Plan(self._server.port, folder, clients, entries, is_open, repeat, seconds)
        return Sender(plan, self._folder / f"load-{self._started}")


def measure_capacity(loads: Loads, kind: str, *, clients: int, seconds: float) -> float:
    """Answers a second of a closed loop, which is what the service can do.

    Raises:
        RuntimeError: Nothing was answered.
    """
    load = loads.saturate(kind, clients=clients, seconds=seconds)
    if not load.good():
        raise RuntimeError("expected answers in a closed loop, got none")
    return len(load.good()) / load.elapsed_s


def fill_gallery(
    data_dir: Path, *, tracklets: int, dim: int, model: str, seed: int, most: int = 50
) -> None:
    """Fill a gallery with random unit vectors, identities of 1 to ``most`` tracklets.

    Args:
        data_dir: Of the gallery; no service may run on it.
        tracklets: How many.
        dim: Of the vectors.
        model: Fingerprint that they are to carry.
        seed: Of vectors and identities.
        most: Tracklets of an identity.
    """
    rng = np.random.default_rng(seed)
    identities = np.repeat(
        np.arange(tracklets), rng.integers(1, most, size=tracklets, endpoint=True)
    )[:tracklets]
    now = datetime.now(UTC)
    with EmbeddedGallery(data_dir) as gallery:
        for first in range(0, tracklets, _CHUNK):
            numbers = range(first, min(first + _CHUNK, tracklets))
            vectors = rng.standard_normal((len(numbers), dim), dtype=np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            enrolments = [
                Enrolment(_record(number, int(identities[number]), model, now), vector)
                for number, vector in zip(numbers, vectors, strict=True)
            ]
            gallery.add(enrolments)


def gallery_shape(weights: str) -> tuple[int, str]:
    """Length of an embedding and fingerprint, of weights as ``serving`` takes them."""
    if weights == FREE:
        return FreeEmbedder.dim, FreeEmbedder.model
    checkpoint = untrained_checkpoint() if weights == UNTRAINED else choose_checkpoint(weights)
    return checkpoint.network.dim, checkpoint.fingerprint


def _record(number: int, identity: int, model: str, now: datetime) -> TrackletRecord:
    return TrackletRecord(
        tracklet_id=f"t{number}",
        identity=f"filled-{identity}",
        camera=f"c{number % 6 + 1}",
        frames_received=15,
        frames_used=15,
        model=model,
        created_at=now,
        content=f"{number:064x}",
    )


def percentile(values: Sequence[float], at: float) -> float:
    """A percentile that is one of the values; NaN where there are none."""
    if not values:
        return float("nan")
    return float(np.percentile(values, at, method="inverted_cdf"))


def median(values: Iterable[float]) -> float:
    """The median; NaN where there are no values."""
    listed = list(values)
    return statistics.median(listed) if listed else float("nan")


@dataclass(frozen=True, slots=True)
class Claim:
    """What must hold, whether it did, and what was measured."""

    text: str
    holds: bool
    measured: str


def print_claims(claims: Iterable[Claim]) -> None:
    """Print as `print_table` does what must hold."""
    print_table(
        ("claim", "holds", "measured"),
        [(one.text, "yes" if one.holds else "**no**", one.measured) for one in claims],
    )


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table in Markdown, as docs/performance.md shows them."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that all benches of a server take."""
    parser.add_argument(
        "--weights",
        default="bundled",
        help="a file, bundled, untrained, or free: an embedder that costs nothing",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the server, like QUEUE__MAX_TRACKLETS=64; may be repeated",
    )
    parser.add_argument("--seed", type=int, default=0)


def read_settings(given: Sequence[str]) -> dict[str, str]:
    """Read what ``--set`` was given.

    Raises:
        SystemExit: One is not NAME=VALUE.
    """
    settings = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise SystemExit(f"expected --set NAME=VALUE, got {one!r}")
        settings[name.upper()] = value
    return settings


def describe_machine() -> str:
    """One line for above a table: what was measured on."""
    processor = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    python = ".".join(str(part) for part in sys.version_info[:3])
    cores = len(os.sched_getaffinity(0))
    return f"{datetime.now(UTC):%Y-%m-%d}, {processor}, {cores} cores, Python {python}"
