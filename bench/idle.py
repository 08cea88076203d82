"""Thousands of connections that ask for nothing: who is answered meanwhile, and when they are gone.

    .venv/bin/python -m bench.idle --connections 10000

In four rounds, as many connections as asked for are opened at once: such that never send a byte,
that send half of a head, that keep quiet after an answer, and that send a thousandth of the upload
that they announced. Others go on asking meanwhile: for /livez on a new connection each time, and
for queries on a new one and on one that is kept. The service must go on answering, and let
go of the idle ones in time. It runs with its own bound on connections;
`--set LIMITS__CONNECTIONS=12000` lets all of them in.

Ends with status 1 where one of these does not hold.
"""

import argparse
import multiprocessing
import resource
import selectors
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

from bench.sending import Connection, Requests
from bench.serving import (
    Claim,
    Server,
    Uploads,
    Usage,
    add_arguments,
    describe_machine,
    draw_uploads,
    fill_gallery,
    gallery_shape,
    median,
    percentile,
    print_claims,
    print_table,
    read_settings,
    serving,
)
from service.settings import LimitSettings

STORED = 1000
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
_UPLOAD = (
    b"POST /query HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n"
    b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
)
KINDS: Mapping[str, bytes] = {
    "never a byte": b"",
    "half a head": LIVEZ[:-10],
    "quiet after an answer": LIVEZ,
    "half a body": _UPLOAD + b"--b\r\nContent-Disposition: form-data; name=" + bytes(1000),
}
PENDING = 512  # connections that wait for the handshake at a time
PAUSE_S = 0.05  # between two questions of those who ask
BEFORE_S, SETTLE_S = 5.0, 2.0
# By when all are let go: a head has 10 s, a connection that is kept 5 s, and a body that comes to
# a full service is taken for 5 s, with what it takes to close ten thousand of them.
WITHIN_S = 25.0
# Half a body holds a place among the uploads until nothing has come for 10 s, and until its sender
# has been let go.
OUT_S = 20.0
PROBE_OUT_S = 5.0  # while thousands come at once; who probes asks again before it acts
FLAT = 1.3  # memory of the process at the end of all rounds, of that after the first


@dataclass(frozen=True, slots=True)
class Held:
    """What became of the idle connections of a round.

    Args:
        opened_s: From the first to the last one.
        held_s: How long each was open.
        statuses: First status that each got; 0 for those that got none.
    """

    opened_s: float
    held_s: tuple[float, ...]
    statuses: Counter[int]


@dataclass(slots=True)
class Asked:
    """What somebody who asked got.

    Args:
        latency_s: Of each answer.
        statuses: How many of each; 0 where none came.
        out_s: Longest time without a 200.
    """

    latency_s: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    out_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Round:
    """One kind of idle connections, and those who asked meanwhile.

    Args:
        kind: One of `KINDS`; "none" for the time before.
        held: What became of them.
        asked: By what was asked for, and how.
        most: What the service held when it had most descriptors.
        after: What it held when they were gone.
    """

    kind: str
    held: Held
    asked: Mapping[str, Asked]
    most: Usage
    after: Usage


def hold(port: int, opening: bytes, count: int, source: str, pipe: Pipe) -> None:
    """Open connections, send each an opening, and wait until the server has closed them all.

    Args:
        port: Of the server, on loopback.
        opening: What each sends.
        count: How many.
        source: The address that they come from: each has 28,000 ports.
        pipe: Takes the `Held`.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < count + 64:
        raise SystemExit(f"expected a bound of {count + 64} open files, got {hard} (ulimit -Hn)")
    pipe.send(_Holder(port, opening, source).run(count))


class _Holder:
    def __init__(self, port: int, opening: bytes, source: str) -> None:
        self._port, self._opening, self._source = port, opening, source
        self._selector = selectors.DefaultSelector()
        self._opened: dict[socket.socket, float] = {}
        self._status: dict[socket.socket, int] = {}
        self._pending = 0
        self._held_s: list[float] = []
        self._statuses: Counter[int] = Counter()

    def run(self, count: int) -> Held:
        begun = last = time.monotonic()
        left = count
        while left or self._opened:
            while left and self._pending < PENDING:
                self._open()
                left -= 1
                last = time.monotonic()
            for key, _ in self._selector.select(0.1):
                act = self._begin if key.events == selectors.EVENT_WRITE else self._read
                act(key.data)
        return Held(last - begun, tuple(self._held_s), self._statuses)

    def _open(self) -> None:
        connecting = socket.socket()
        connecting.setblocking(False)
        connecting.bind((self._source, 0))
        self._opened[connecting] = time.monotonic()
        self._pending += 1
        connecting.connect_ex(("127.0.0.1", self._port))
        self._selector.register(connecting, selectors.EVENT_WRITE, connecting)

    def _begin(self, connected: socket.socket) -> None:
        self._pending -= 1
        self._selector.modify(connected, selectors.EVENT_READ, connected)
        try:
            connected.send(self._opening)
        except OSError:
            self._end(connected)

    def _read(self, connected: socket.socket) -> None:
        try:
            received = connected.recv(65536)
        except OSError:
            received = b""
        if not received:
            self._end(connected)
        elif connected not in self._status:
            self._status[connected] = int(received[9:12])

    def _end(self, connected: socket.socket) -> None:
        self._selector.unregister(connected)
        connected.close()
        self._held_s.append(time.monotonic() - self._opened.pop(connected))
        self._statuses[self._status.pop(connected, 0)] += 1


class Asker:
    """Asks again and again while its block runs.

    Args:
        port: Of the server.
        request: Makes the bytes of the next one.
        is_kept: Whether a connection serves for many.
        pause_s: Between an answer and the next question.

    Attributes:
        asked: What came of it.
    """

    def __init__(
        self, port: int, request: Callable[[], bytes], *, is_kept: bool, pause_s: float = PAUSE_S
    ) -> None:
        self.asked = Asked()
        self._connection = Connection(port, timeout_s=60)
        self._request, self._is_kept, self._pause_s = request, is_kept, pause_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> Asked:
        """Ask no more; returns what came of it."""
        self._ended.set()
        self._thread.join()
        self._connection.close()
        return self.asked

    def _ask(self) -> None:
        good = time.monotonic()
        while not self._ended.wait(self._pause_s):
            begun = time.monotonic()
            try:
                status, _, _ = self._connection.ask(self._request())
            except OSError:
                status = 0
            self.asked.latency_s.append(time.monotonic() - begun)
            self.asked.statuses[status] += 1
            self.asked.out_s = max(self.asked.out_s, time.monotonic() - good)
            if status == 200:
                good = time.monotonic()
            if not self._is_kept:
                self._connection.close()


def askers(server: Server, uploads: Uploads) -> dict[str, Asker]:
    """Those who ask while others are idle."""
    requests = Requests(uploads.folder)
    numbers = iter(range(10**9))

    def query() -> bytes:
        return requests.get("query", next(numbers))

    return {
        "/livez": Asker(server.port, lambda: LIVEZ, is_kept=False),
        "query": Asker(server.port, query, is_kept=False),
        "query, kept": Asker(server.port, query, is_kept=True),
    }


def measure(server: Server, uploads: Uploads, kind: str, count: int, number: int) -> Round:
    """Hold connections of a kind while others ask.

    Args:
        server: Whom to ask.
        uploads: Of the queries.
        kind: One of `KINDS`, or "none".
        count: How many.
        number: Of the round; its connections come from an address of their own.
    """
    asking = askers(server, uploads)
    for one in asking.values():
        one.start()
    if kind == "none":
        time.sleep(BEFORE_S)
        held, seen = Held(0.0, (), Counter()), [server.usage()]
    else:
        held, seen = _hold_apart(server, KINDS[kind], count, f"127.0.0.{2 + number}")
    asked = {name: one.stop() for name, one in asking.items()}
    time.sleep(SETTLE_S)
    most = max(seen, key=lambda one: one.descriptors)
    return Round(kind, held, asked, most, server.usage())


def _hold_apart(
    server: Server, opening: bytes, count: int, source: str
) -> tuple[Held, list[Usage]]:
    """Hold connections in a process of its own, so that those who ask wait for the service alone.

    Raises:
        RuntimeError: The process ended without a word.
    """
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=hold, args=(server.port, opening, count, source, writer))
    process.start()
    writer.close()
    seen = [server.usage()]
    while not reader.poll(0.25):
        seen.append(server.usage())
    try:
        held: Held = reader.recv()
    except EOFError as error:
        raise RuntimeError("expected what became of the connections, got nothing") from error
    process.join()
    return held, seen


def judge(rounds: Sequence[Round], within_s: float) -> list[Claim]:
    """See what must hold.

    Args:
        rounds: The first without idle connections.
        within_s: By when all must be let go.
    """
    before, *others = rounds
    probes = sum((one.asked["/livez"].statuses for one in rounds), Counter[int]())
    kinds = ("query", "query, kept")
    queries = sum((one.asked[kind].statuses for one in rounds for kind in kinds), Counter[int]())
    probe_s = max(one.asked["/livez"].out_s for one in rounds)
    out_s = max(asked.out_s for one in rounds for asked in one.asked.values())
    longest = max(max(one.held.held_s, default=0.0) for one in rounds)
    extra = max(one.after.sockets for one in others) - before.after.sockets
    early, late = others[0].after.rss, others[-1].after.rss
    return [
        Claim("/livez hears 200 or 429", probes.keys() <= {200, 429}, _told(probes)),
        Claim(
            f"/livez is not kept out for {PROBE_OUT_S:g} s",
            probe_s < PROBE_OUT_S,
            f"{probe_s:.1f} s",
        ),
        Claim("a query hears 200 or 429", queries.keys() <= {200, 429}, _told(queries)),
        Claim(f"nobody is kept out for {OUT_S:g} s", out_s < OUT_S, f"{out_s:.1f} s"),
        Claim(f"all are let go within {within_s:g} s", longest <= within_s, f"{longest:.1f} s"),
        Claim("no socket is left over", extra <= 0, f"{extra} more"),
        Claim(
            "memory is let go or used again",
            late <= FLAT * early,
            f"{early >> 20}, {late >> 20} MiB",
        ),
    ]


def _told(statuses: Counter[int]) -> str:
    return ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))


def report(rounds: Sequence[Round]) -> None:
    """Print a table of the rounds."""

    def times(asked: Asked) -> str:
        values = [1000 * one for one in asked.latency_s]
        return f"{median(values):.0f} / {percentile(values, 99):.0f}"

    columns = ("idle", "first status", "open, s", "/livez, ms", "query, ms", "kept, ms",
               "descriptors", "memory, MiB")  # fmt: skip
    rows = []
    for one in rounds:
        held_s = one.held.held_s
        rows.append(
            (
                one.kind,
                _told(one.held.statuses) or "-",
                f"{median(held_s):.1f} / {max(held_s):.1f}" if held_s else "-",
                *(times(asked) for asked in (one.asked[name] for name in one.asked)),
                f"{one.most.descriptors} / {one.after.descriptors}",
                f"{one.most.rss >> 20} / {one.after.rss >> 20}",
            )
        )
    print_table(columns, rows)
    print("\nOpen: median / longest. Times: p50 / p99. The last two: at most / afterwards.\n")


def main() -> None:
    """Print what was measured and claimed; ends with status 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--connections", type=int, default=10_000, help="of each kind")
    parser.add_argument("--within", type=float, default=WITHIN_S, help="seconds, all are let go")
    arguments = parser.parse_args()

    settings = read_settings(arguments.set)
    bound = settings.get("LIMITS__CONNECTIONS", LimitSettings().connections)
    with tempfile.TemporaryDirectory(prefix="bench-idle-") as name:
        folder = Path(name)
        uploads = draw_uploads(folder / "uploads", 16, seed=arguments.seed)
        dim, model = gallery_shape(arguments.weights)
        fill_gallery(folder / "data", tracklets=STORED, dim=dim, model=model, seed=arguments.seed)
        with serving(
            folder / "data", folder / "server.log", weights=arguments.weights, settings=settings
        ) as server:
            rounds = [
                measure(server, uploads, kind, arguments.connections, number)
                for number, kind in enumerate(("none", *KINDS))
            ]
    print(
        f"{describe_machine()}, weights {arguments.weights}\n\n"
        f"{arguments.connections} connections of each kind, the bound is {bound}.\n"
    )
    report(rounds)
    claims = judge(rounds, arguments.within)
    print_claims(claims)
    if not all(one.holds for one in claims):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
