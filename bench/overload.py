"""Ten times what the service can do, then clients that hang up: what breaks, and what is left over.

    .venv/bin/python -m bench.overload --output overload.png

1. Overload: queries at a light load, then at ten times the capacity, then at the light load again.
   Each must get 200, or 429 with Retry-After; those that are accepted must be answered within the
   deadline; memory must stay as it is; soon after the end a query must take as long as before.
2. Storm: clients that hang up in the middle of their upload, and others that hang up while they
   wait for their answer. Afterwards the queue must be empty, nothing may be left over in the
   service's processes, and it must be ready and right.

Ends with status 1 where one of these does not hold.
"""

import argparse
import json
import math
import socket
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.sending import Answer, Connection, Entry, Load, Requests
from bench.serving import (
    Claim,
    Loads,
    Server,
    Uploads,
    Usage,
    Watcher,
    add_arguments,
    describe_machine,
    draw_uploads,
    fill_gallery,
    gallery_shape,
    measure_capacity,
    median,
    percentile,
    print_claims,
    read_settings,
    serving,
)
from service.loadtest_picture import BLUE, GRID, INK, ORANGE, RED, dress_axes, label_plainly
from service.loadtest_sending import draw_arrivals
from service.settings import QueueSettings

STORED = 1000
QUEUE = "passerby_queue_tracklets"
LIGHT, LIGHT_S = 0.3, 15.0  # of the capacity, before and after an overload, and how long
WITHIN_S = 5.0  # after the end of an overload, by when a query takes as long as before
AS_BEFORE = 1.5  # times as long
FLAT = 1.05  # memory at the end of an overload, of that at its beginning
# Uploads and queue hold 32 each: so many at a time are all let in.
UPLOAD_WAVE, QUEUE_WAVE = 100, 24
SETTLE_S = 20.0  # for what is left over to go away
IDLE_S = 15.0  # longer than connections without work are kept
STORMS = 4  # a pool of threads that fills up stops growing at some time, a leak never does


@dataclass(frozen=True, slots=True)
class Overload:
    """What was seen.

    Args:
        capacity: Queries a second that a closed loop got.
        load: All answers, those of the light load before and after too.
        begin_s: When the overload began.
        end_s: When it ended.
        seen: What the service held, over time.
    """

    capacity: float
    load: Load
    begin_s: float
    end_s: float
    seen: tuple[tuple[float, Usage], ...]

    def due(self, begin_s: float, end_s: float = math.inf) -> list[Answer]:
        """Answers to what was due in this time."""
        return [one for one in self.load.answers if begin_s <= one.due_s < end_s]


def main() -> None:
    """Print what was claimed and measured; ends with status 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--times", type=float, default=10.0, help="the capacity")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the overload")
    parser.add_argument("--storm", type=int, default=100, help="clients of either kind")
    parser.add_argument("--clients", type=int, default=8, help="of the closed loop")
    parser.add_argument("--capacity-seconds", type=float, default=10.0)
    parser.add_argument("--output", type=Path, help="picture to draw")
    arguments = parser.parse_args()

    settings = read_settings(arguments.set)
    with tempfile.TemporaryDirectory(prefix="bench-overload-") as name:
        folder = Path(name)
        uploads = draw_uploads(folder / "uploads", 16, seed=arguments.seed)
        dim, model = gallery_shape(arguments.weights)
        fill_gallery(folder / "data", tracklets=STORED, dim=dim, model=model, seed=arguments.seed)
        with serving(
            folder / "data", folder / "server.log", weights=arguments.weights, settings=settings
        ) as server:
            loads = Loads(server, uploads, folder / "loads")
            right = embedding(server, uploads)
            found = overload(server, loads, arguments)
            deadline = settings.get("QUEUE__DEADLINE_S", QueueSettings().deadline_s)
            claims = [*judge(found, float(deadline)), *storm(server, uploads, arguments.storm)]
            claims += [still_right(server, uploads, right)]
    report(found, claims, arguments)
    if arguments.output is not None:
        draw(found, arguments.output)
    if not all(claim.holds for claim in claims):
        raise SystemExit(1)


def embedding(server: Server, uploads: Uploads) -> NDArray[np.float32]:
    """The embedding of the first upload, (D,) float32."""
    connection = Connection(server.port)
    status, _, body = connection.ask(Requests(uploads.folder).get("embed", 0))
    connection.close()
    if status != 200:
        raise RuntimeError(f"expected an embedding, got status {status}")
    return np.array(json.loads(body)["embedding"], dtype=np.float32)


def overload(server: Server, loads: Loads, arguments: argparse.Namespace) -> Overload:
    """Measure the capacity, overload the service, and see it recover."""
    clients = arguments.clients
    loads.closed("query", clients=clients, requests=2 * clients)
    capacity = measure_capacity(loads, "query", clients=clients, seconds=arguments.capacity_seconds)
    begin_s, end_s = LIGHT_S, LIGHT_S + arguments.seconds
    times = []
    for offset, share, seconds in (
        (0.0, LIGHT, LIGHT_S),
        (begin_s, arguments.times, arguments.seconds),
        (end_s, LIGHT, LIGHT_S),
    ):
        drawn = draw_arrivals(share * capacity, 0, seconds, arguments.seed)
        times += [offset + one for one in drawn]
    entries = [Entry(due, "query", number) for number, due in enumerate(times)]
    with Watcher(server) as watcher:
        load = loads.open(entries, clients=256).wait()
    seen = tuple((at - load.started, usage) for at, usage in watcher.seen)
    return Overload(capacity, load, begin_s, end_s, seen)


def judge(found: Overload, deadline_s: float) -> list[Claim]:
    """Hold an overload against what was promised."""
    answers = found.load.answers
    usual = [one.latency_s for one in found.due(0, found.begin_s) if one.status == 200]
    later = found.due(found.end_s + WITHIN_S)
    later_s = median(one.latency_s for one in later)
    counts = Counter(one.failure or str(one.status) for one in answers)
    refused = [one for one in answers if one.status == 429]
    silent = sum(not one.retry_after.isdecimal() for one in refused)
    accepted = [one.ended_s - one.sent_s for one in answers if one.status == 200]
    p99 = percentile(accepted, 99)
    memory = [usage.memory for at, usage in found.seen if found.begin_s <= at <= found.end_s]
    quarter = max(len(memory) // 4, 1)
    early, late = median(memory[quarter : 2 * quarter]), median(memory[-quarter:])
    back_s = _back_after(found, AS_BEFORE * percentile(usual, 90))
    is_back = back_s <= WITHIN_S and later_s <= AS_BEFORE * median(usual)
    return [
        Claim(
            "every answer is 200 or 429",
            counts.keys() <= {"200", "429"},
            ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items())),
        ),
        Claim("every 429 says when to come back", silent == 0, f"{silent} did not"),
        Claim(
            f"p99 of the accepted within the deadline of {deadline_s:g} s",
            p99 <= deadline_s,
            f"{p99:.2f} s",
        ),
        Claim(
            "memory is flat",
            late <= FLAT * early,
            f"{early / 1e6:.0f} MB, at the end {late / 1e6:.0f} MB",
        ),
        Claim(
            f"{WITHIN_S:g} s after the end a query takes as long as before",
            is_back and all(one.status == 200 for one in later),
            f"median {later_s:.2f} s, before {median(usual):.2f} s; the first one as quick was due "
            f"{back_s:.1f} s after the end",
        ),
    ]


def _back_after(found: Overload, quick_s: float) -> float:
    """Seconds from the end until the first query was due that took no longer than so."""
    for one in sorted(found.due(found.end_s), key=lambda one: one.due_s):
        if one.status == 200 and one.latency_s <= quick_s:
            return one.due_s - found.end_s
    return math.inf


def storm(server: Server, uploads: Uploads, clients: int) -> list[Claim]:
    """Let clients hang up, and see what is left; again where that is more than before."""
    server.metric(QUEUE)  # its first reader may cost a thread, too
    time.sleep(IDLE_S)
    held = [server.usage()]
    claims = []
    while len(held) <= STORMS:
        early = blow(server, uploads, clients, wave=UPLOAD_WAVE, share=0.6)
        heard = blow(server, uploads, clients, wave=QUEUE_WAVE, share=1.0)
        ended = time.monotonic()
        told = f"answered before they hung up: {early} in mid-upload, {heard} in the queue"
        claims.append(_queue_is_empty(server, ended, told))
        held.append(_settled(server, held[-1], ended))
        if not _holds_more(held[-1], held[-2]):
            break
    names = ("threads", "descriptors", "sockets")
    measured = (f"{name} {' -> '.join(str(getattr(one, name)) for one in held)}" for name in names)
    nothing_left = Claim(
        "no thread, file or socket is left over",
        not _holds_more(held[-1], held[-2]),
        f"before, and after each of {len(held) - 1}: {', '.join(measured)}",
    )
    return [min(claims, key=lambda claim: claim.holds), nothing_left]


def blow(server: Server, uploads: Uploads, clients: int, *, wave: int, share: float) -> int:
    """Let clients hang up when they have sent a share; returns how many had an answer by then."""
    requests = Requests(uploads.folder)
    waits = np.random.default_rng(0).uniform(0.05, 0.5, size=clients)

    def go(number: int) -> bool:
        return hang_up(
            server.port,
            requests.get("query", number),
            share=share,
            wait_s=float(waits[number]),
            is_abrupt=number % 2 == 0,
        )

    answered = 0
    with ThreadPoolExecutor(wave) as pool:
        for first in range(0, clients, wave):
            answered += sum(pool.map(go, range(first, min(first + wave, clients))))
    return answered


def hang_up(port: int, request: bytes, *, share: float, wait_s: float, is_abrupt: bool) -> bool:
    """Send a share of a request, wait, and go.

    Returns:
        Whether an answer had come by then.
    """
    with socket.create_connection(("127.0.0.1", port), 30) as connected:
        if is_abrupt:  # a reset, as of a process that was killed
            linger = struct.pack("ii", 1, 0)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        try:
            connected.sendall(request[: int(share * len(request))])
            connected.settimeout(wait_s)
            return bool(connected.recv(1))
        except (TimeoutError, ConnectionError):
            return False


def _queue_is_empty(server: Server, since: float, told: str) -> Claim:
    waiting = server.metric(QUEUE)
    while waiting and time.monotonic() < since + SETTLE_S:
        time.sleep(0.1)
        waiting = server.metric(QUEUE)
    took = time.monotonic() - since
    if waiting is None:
        return Claim("the queue is empty after the storm", False, f"there is no {QUEUE}")
    measured = f"{waiting:.0f} wait {took:.1f} s after it; {told}"
    return Claim("the queue is empty after the storm", waiting == 0, measured)


def _settled(server: Server, before: Usage, since: float) -> Usage:
    """Wait until no more is held than before, but not for ever."""
    usage = server.usage()
    while _holds_more(usage, before) and time.monotonic() < since + SETTLE_S:
        time.sleep(0.25)
        usage = server.usage()
    return usage


def _holds_more(usage: Usage, before: Usage) -> bool:
    return (
        usage.threads > before.threads
        or usage.descriptors > before.descriptors
        or usage.sockets > before.sockets
    )


def still_right(server: Server, uploads: Uploads, right: NDArray[np.float32]) -> Claim:
    """Whether the service is ready and embeds as it did."""
    status, _ = server.get("/readyz")
    now = embedding(server, uploads)
    error = float(np.linalg.norm(now - right) / np.linalg.norm(right))
    measured = f"/readyz {status}, relative error {error:.1e}"
    return Claim("the service is ready and right", status == 200 and error < 1e-2, measured)


def report(found: Overload, claims: Sequence[Claim], arguments: argparse.Namespace) -> None:
    """Print the tables."""
    during = found.due(found.begin_s, found.end_s)
    lags = [one.sent_s - one.due_s for one in during]
    good = [one for one in found.load.good() if found.begin_s <= one.ended_s < found.end_s]
    seconds = found.end_s - found.begin_s
    print(f"{describe_machine()}, weights {arguments.weights}\n")
    print(
        f"{len(during)} queries in {seconds:g} s, {arguments.times:g} times the capacity of "
        f"{found.capacity:.2f} a second; {len(good) / seconds:.2f} a second were answered with "
        f"200 meanwhile. The client was late by {1000 * percentile(lags, 99):.0f} ms (p99) and "
        f"used {found.load.cpu_s:.1f} s of processor time. Then {arguments.storm} clients hung up "
        "in mid-upload and as many in the queue.\n"
    )
    print_claims(claims)


def draw(found: Overload, path: Path) -> None:
    """Draw memory, latency and answers a second over time."""
    from matplotlib.figure import Figure  # not pyplot, whose figures live in global state

    figure = Figure(figsize=(9, 7.5), layout="constrained")
    memory, latency, answers = figure.subplots(3, 1, sharex=True)
    memory.plot(
        [at for at, _ in found.seen], [usage.memory / 1e6 for _, usage in found.seen], color=BLUE
    )
    memory.set_ylim(0, 1.2 * max(usage.memory for _, usage in found.seen) / 1e6)
    dress_axes(memory, "", "resident memory, MB")
    answers_of = found.load.answers
    groups = (
        ([one for one in answers_of if one.status == 200], BLUE, "200"),
        ([one for one in answers_of if one.status == 429], ORANGE, "429"),
        ([one for one in answers_of if one.status not in (200, 429)], RED, "other"),
    )
    edges = np.arange(0, max(one.ended_s for one in answers_of) + 1)
    for group, colour, label in groups:
        if group:
            times, seconds = [one.due_s for one in group], [one.latency_s for one in group]
            latency.plot(times, seconds, ".", color=colour, markersize=3, label=label)
            counts, _ = np.histogram([one.ended_s for one in group], edges)
            answers.step(edges[:-1], counts, where="post", color=colour, label=label)
    latency.set_yscale("log")
    label_plainly(latency.yaxis)
    dress_axes(latency, "", "latency, s")
    answers.axhline(found.capacity, color=INK, linestyle=":", linewidth=1, label="capacity")
    answers.set_ylim(bottom=0)
    dress_axes(answers, "seconds", "answers a second")
    for axes in (memory, latency, answers):
        axes.axvspan(found.begin_s, found.end_s, color=GRID, alpha=0.5, linewidth=0)
    for axes in (latency, answers):
        axes.legend(frameon=False, labelcolor=INK, fontsize=9, ncols=4, loc="upper right")
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
