"""Send a running service what hostile clients send, and see that it stays well.

    .venv/bin/python -m bench.fuzz --requests 100000 --keep found

A real server process with decoder processes, and an embedder that costs nothing. Each request is a
good file of some kind, or a form around it, spoiled (`bench.fuzz_bodies`); its number and the seed
say exactly which. What must hold:

- each is answered, within the deadline, with a status that the API documents and below 500;
- what was refused is a complete problem, and has stored nothing: at the end the gallery holds just
  what was accepted;
- memory of the service's processes does not grow, the process lives and is ready.

Ends with status 1 where one of these does not hold. Requests that broke something are written to
the folder of `--keep`, each as the bytes that were sent.
"""

import argparse
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from bench.fuzz_bodies import Upload, draw_upload
from bench.sending import Connection
from bench.serving import (
    FREE,
    Claim,
    Server,
    Watcher,
    describe_machine,
    print_claims,
    print_table,
    serving,
)

# Below 500, of those that the API documents for uploads.
ALLOWED = frozenset({200, 201, 400, 409, 413, 415, 422})
CLIENTS = 4
TRIES = 3
LATE = frozenset({0, 504})
DEADLINE_S = 20.0
SPARE_S = 5.0  # for what the deadline does not count: sending and answering
SETTINGS = {
    "QUEUE__DEADLINE_S": f"{DEADLINE_S:g}",
    # Small frames are enough to find mistakes; a bomb is one at any size.
    "LIMITS__FRAME_PIXELS": "4000000",
    "LOG_FORMAT": "json",
}
# From the end of the first tenth, when every decoder has seen every kind of file.
GROWTH_BYTES = 200 * 1024**2
_MIB = 1024**2
Source = Callable[[int], Upload]


@dataclass(slots=True)
class Outcome:
    """What came of a run.

    Args:
        statuses: How often each came; 0 where no answer did.
        by_seed: Likewise, for each kind of file.
        stored: Ids of enrolments that were answered with 201, or 200 at a second try.
        listed: Ids that the gallery holds at the end.
        slowest_s: Of all requests.
        bad: Number, status and what was wrong, of each request that broke a claim.
        memory: Bytes of all processes: after the first tenth, at most afterwards, at the end.
        deaths: How often a decoder died.
        is_alive: Whether the process that began still runs, and is ready.
        seconds: It took.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    by_seed: dict[str, Counter[int]] = field(default_factory=dict)
    stored: set[str] = field(default_factory=set)
    listed: set[str] = field(default_factory=set)
    slowest_s: float = 0.0
    bad: list[tuple[int, int, str]] = field(default_factory=list)
    memory: tuple[int, int, int] = (0, 0, 0)
    deaths: int = 0
    is_alive: bool = False
    seconds: float = 0.0

    def claims(self) -> list[Claim]:
        """What must hold, and whether it did."""
        before, most, after = (f"{one / _MIB:.0f} MiB" for one in self.memory)
        lost, extra = self.stored - self.listed, self.listed - self.stored
        return [
            Claim(
                "each answered below 500, as documented, in time",
                not self.bad,
                f"{len(self.bad)} were not; slowest {self.slowest_s:.2f} s",
            ),
            Claim(
                "stored is what was accepted, and nothing else",
                not lost and not extra,
                f"{len(self.stored)} stored, {len(lost)} lost, {len(extra)} without an answer",
            ),
            Claim(
                "memory is bounded",
                self.memory[1] - self.memory[0] <= GROWTH_BYTES,
                f"{before} after a tenth, at most {most}, {after} at the end",
            ),
            Claim("the process lives and is ready", self.is_alive, str(self.is_alive).lower()),
            Claim("no decoder died", self.deaths == 0, f"{self.deaths} did"),
        ]


class Fuzzing:
    """A run against one server.

    Args:
        server: Whom to bother.
        source: Makes request ``number``.
        keep: Where requests that broke something go; nowhere without it.
    """

    def __init__(self, server: Server, source: Source, keep: Path | None = None) -> None:
        self.outcome = Outcome()
        self.done = 0
        self._server, self._source, self._keep = server, source, keep
        self._lock = threading.Lock()

    def run(self, requests: int, clients: int = CLIENTS) -> Outcome:
        """Send so many requests and look at what is left.

        Args:
            requests: How many.
            clients: At a time.
        """
        numbers = iter(range(requests))
        warm, started = max(1, requests // 10), time.monotonic()
        with Watcher(self._server) as watcher, ThreadPoolExecutor(clients) as pool:
            working = [pool.submit(self._work, numbers) for _ in range(clients)]
            while self.done < warm and not all(one.done() for one in working):
                time.sleep(0.05)
            before = self._server.usage().memory
            warm_at = time.monotonic()
            for one in working:
                one.result()
        outcome = self.outcome
        outcome.seconds = time.monotonic() - started
        after = self._server.usage().memory
        seen = [usage.memory for at, usage in watcher.seen if at >= warm_at]
        outcome.memory = (before, max([before, after, *seen]), after)
        outcome.listed = set(_list_gallery(self._server))
        log = self._server.log.read_text(encoding="utf-8", errors="replace")
        outcome.deaths = log.count('"a decoder died"')
        ready, _ = self._server.get("/readyz")
        outcome.is_alive = ready == 200 and self._server.process.poll() is None
        return outcome

    def _work(self, numbers: Iterator[int]) -> None:
        connection = Connection(self._server.port, timeout_s=DEADLINE_S + SPARE_S)
        while True:
            with self._lock:
                number = next(numbers, None)
            if number is None:
                break
            self._send(connection, number)
        connection.close()

    def _send(self, connection: Connection, number: int) -> None:
        upload = self._source(number)
        status, body, seconds, wrong = ask(connection, upload)
        with self._lock:
            self._note(number, upload, status, seconds, wrong)
            if upload.path == "/gallery" and status in (200, 201):
                self.outcome.stored.add(json.loads(body)["tracklet_id"])

    def _note(self, number: int, upload: Upload, status: int, seconds: float, wrong: str) -> None:
        outcome = self.outcome
        self.done += 1
        outcome.statuses[status] += 1
        outcome.by_seed.setdefault(upload.seed, Counter())[status] += 1
        outcome.slowest_s = max(outcome.slowest_s, seconds)
        if not wrong:
            return
        outcome.bad.append((number, status, wrong))
        if self._keep is not None:
            self._keep.mkdir(parents=True, exist_ok=True)
            (self._keep / f"{upload.seed}-{number}.http").write_bytes(upload.request())


def ask(connection: Connection, upload: Upload) -> tuple[int, bytes, float, str]:
    """Send an upload; what is late is sent again, twice.

    A machine that stood still says nothing of a file; one that takes a decoder round in circles
    does so every time.

    Returns:
        Status (0 without an answer), body, seconds, and what is wrong with it (or "").
    """
    status, body, seconds, wrong = 0, b"", 0.0, ""
    for _ in range(TRIES):
        started = time.monotonic()
        try:
            status, headers, body = connection.ask(upload.request())
            wrong = find_fault(status, headers, body)
        except (OSError, ValueError) as error:
            connection.close()
            status, body, wrong = 0, b"", f"no answer: {type(error).__name__}"
        seconds = time.monotonic() - started
        if seconds > DEADLINE_S + SPARE_S:
            wrong = wrong or f"took {seconds:.0f} s"
        elif status not in LATE:
            break
    return status, body, seconds, wrong


def find_fault(status: int, headers: dict[str, str], body: bytes) -> str:
    """What is wrong with an answer; empty where nothing is."""
    if status not in ALLOWED:
        return f"status {status}"
    content = json.loads(body)
    if status < 300:
        return ""
    if headers.get("content-type") != "application/problem+json":
        return "a refusal that is no problem"
    missing = {"type", "title", "status", "detail", "request_id"} - content.keys()
    return f"a problem without {', '.join(sorted(missing))}" if missing else ""


def _list_gallery(server: Server) -> Iterator[str]:
    cursor = ""
    while True:
        _, body = server.get(f"/gallery?limit=1000{cursor}")
        page = json.loads(body)
        yield from (one["tracklet_id"] for one in page["items"])
        if page["next_cursor"] is None:
            return
        cursor = f"&cursor={page['next_cursor']}"


def _show_progress(fuzzing: Fuzzing, requests: int, ended: threading.Event) -> None:
    started = time.monotonic()
    for _ in count():
        if ended.wait(10):
            return
        rate = fuzzing.done / (time.monotonic() - started)
        shown = dict(sorted(fuzzing.outcome.statuses.items()))
        print(f"{fuzzing.done}/{requests}, {rate:.0f}/s, {shown}", flush=True)


def main() -> None:
    """Run, print what was claimed and measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for requests that broke something")
    arguments = parser.parse_args()
    print(f"{describe_machine()}; seed {arguments.seed}, {arguments.requests} requests", flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(
            Path(folder) / "data", Path(folder) / "log", weights=FREE, settings=SETTINGS
        ) as server,
    ):
        fuzzing = Fuzzing(
            server,
            lambda number: draw_upload(arguments.seed, arguments.first + number),
            arguments.keep,
        )
        ended = threading.Event()
        showing = threading.Thread(
            target=_show_progress, args=(fuzzing, arguments.requests, ended), daemon=True
        )
        showing.start()
        outcome = fuzzing.run(arguments.requests)
        ended.set()
    report(outcome)


def report(outcome: Outcome) -> None:
    """Print the tables.

    Raises:
        SystemExit: With status 1, where a claim does not hold.
    """
    columns = sorted(outcome.statuses)
    rows = [
        (name, *(found.get(status, 0) for status in columns))
        for name, found in sorted(outcome.by_seed.items())
    ]
    print_table(["made of", *map(str, columns)], rows)
    print(f"\n{sum(outcome.statuses.values())} requests in {outcome.seconds:.0f} s\n")
    claims = outcome.claims()
    print_claims(claims)
    for number, status, wrong in outcome.bad[:20]:
        print(f"request {number}: {status}, {wrong}")
    raise SystemExit(not all(one.holds for one in claims))


if __name__ == "__main__":
    main()
