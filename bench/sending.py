"""Cheap load from a process of its own: plain sockets, requests made beforehand, a thread each.

The client of a benchmark shares the processors with the server it measures, so it has to cost
little, and says what it cost. Closed loop: each client asks again once it has its answer, which
finds out what the service can do. Open loop: every request has its time, and its latency counts
from then.

Only the standard library: the process that sends starts at once and stays small.
"""

import argparse
import json
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TextIO

_BODIES = "bodies.json"
_TIMEOUT_S = 180.0
_AT_ONCE_S = 0.1


@dataclass(frozen=True, slots=True)
class Entry:
    """One request to be sent.

    Args:
        due_s: When, seconds from the beginning; a closed loop sends as soon as it can.
        kind: query, embed, enrol, delete or bad.
        number: Which body; of "enrol" and "delete" also the tracklet's id.
    """

    due_s: float
    kind: str
    number: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request; times are seconds from the beginning.

    Args:
        due_s: When it was to be sent.
        sent_s: When it was.
        ended_s: When its answer was complete.
        kind: As of its entry.
        status: 0 where no answer came.
        retry_after: That header, or "".
        timing_ms: What the answer said about itself.
        failure: Why no answer came.
    """

    due_s: float
    sent_s: float
    ended_s: float
    kind: str
    status: int
    retry_after: str = ""
    timing_ms: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""

    @property
    def latency_s(self) -> float:
        """From the time that it was due."""
        return self.ended_s - self.due_s


@dataclass(frozen=True, slots=True)
class Load:
    """All answers of a load.

    Args:
        answers: In the order in which they came.
        started: Beginning, on this machine's monotonic clock.
        elapsed_s: Until the last answer.
        cpu_s: Processor time that sending took.
    """

    answers: tuple[Answer, ...]
    started: float
    elapsed_s: float
    cpu_s: float

    def good(self) -> list[Answer]:
        """Those with 200 or 201."""
        return [one for one in self.answers if one.status in (200, 201)]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sending process has to do.

    Args:
        port: Of the server, on loopback.
        folder: Of the bodies, see `write_bodies`.
        clients: Threads, so the most requests at a time.
        entries: What to send; a closed loop takes them as fast as it can.
        is_open: Whether each waits for its time.
        repeat: Kind of requests without end, instead of entries.
        seconds: After which none of those is begun any more.
    """

    port: int
    folder: str
    clients: int
    entries: tuple[Entry, ...]
    is_open: bool
    repeat: str = ""
    seconds: float = 0.0


def write_bodies(folder: Path, bodies: Sequence[tuple[str, bytes]]) -> None:
    """Write bodies for `Requests`: content type with its boundary, content."""
    folder.mkdir(parents=True)
    for number, (_, content) in enumerate(bodies):
        (folder / f"{number}.body").write_bytes(content)
    (folder / _BODIES).write_text(json.dumps([kind for kind, _ in bodies]), encoding="utf-8")


class Requests:
    """Makes requests out of bodies; what needs no change is made once.

    Args:
        folder: From `write_bodies`.
    """

    def __init__(self, folder: Path) -> None:
        self._types: list[str] = json.loads((folder / _BODIES).read_text(encoding="utf-8"))
        self._bodies = [(folder / f"{n}.body").read_bytes() for n in range(len(self._types))]
        self._made: dict[tuple[str, int], bytes] = {}

    def get(self, kind: str, number: int) -> bytes:
        """All bytes of a request.

        Raises:
            ValueError: The kind is unknown.
        """
        if kind == "delete":
            return _head("DELETE", f"/gallery/load-{number}")
        if kind == "enrol":
            return self._enrol(number)
        if kind == "bad":
            return self._bad(number)
        if kind not in ("query", "embed"):
            raise ValueError(f"expected query, embed, enrol, delete or bad, got {kind!r}")
        key = (kind, number % len(self._bodies))
        if key not in self._made:
            content_type, body = self._types[key[1]], self._bodies[key[1]]
            self._made[key] = _head("POST", f"/{kind}", content_type, len(body)) + body
        return self._made[key]

    def _enrol(self, number: int) -> bytes:
        content_type, body = self._pick(number)
        boundary = content_type.partition("boundary=")[2]
        fields = {"tracklet_id": f"load-{number}", "identity": f"p{number % 50}"}
        parts = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        ).encode()
        return _head("POST", "/gallery", content_type, len(parts) + len(body)) + parts + body

    def _bad(self, number: int) -> bytes:
        """Uploads that are wrong in one way or another; each gets a status of 400 to 499."""
        content_type, body = self._pick(number)
        boundary = content_type.partition("boundary=")[2]
        first = f'--{boundary}\r\nContent-Disposition: form-data; name="%s"\r\n\r\n'
        end = f"\r\n--{boundary}--\r\n".encode()
        cut_off = body[: body.find(b"\xff\xd9") - 20] + end
        ways = (
            (content_type, cut_off),
            (content_type, (first % "frames").encode() + b"no image" + end),
            (content_type, (first % "archive").encode() + b"PK\x03\x04 no zip" + end),
            (content_type, (first % "video").encode() + bytes(1000) + end),
            (content_type, body[: len(body) // 2]),  # without a closing boundary
            ("text/plain", b"hello"),
        )
        kind, content = ways[number % len(ways)]
        return _head("POST", "/gallery", kind, len(content)) + content

    def _pick(self, number: int) -> tuple[str, bytes]:
        at = number % len(self._bodies)
        return self._types[at], self._bodies[at]


def _head(method: str, path: str, content_type: str = "", length: int = 0) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}"]
    lines += [f"Content-Type: {content_type}"] if content_type else []
    return "\r\n".join([*lines, "", ""]).encode()


class Connection:
    """A connection that stays open from one request to the next.

    Args:
        port: Of the server, on loopback.
        timeout_s: Without a byte, after which an answer is given up.
    """

    def __init__(self, port: int, timeout_s: float = _TIMEOUT_S) -> None:
        self._port, self._timeout_s = port, timeout_s
        self._socket: socket.socket | None = None

    def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send a request; returns status, headers by small name, and body.

        Raises:
            OSError: No answer came, or not all of one.
        """
        if self._socket is not None and not _is_closed(self._socket):
            asked = time.monotonic()
            try:
                return self._exchange(self._socket, request)
            except _NoAnswerError:
                # It was closed just now, for lack of work. What fails later than that, or in the
                # middle of an answer, is a failure.
                if time.monotonic() > asked + _AT_ONCE_S:
                    raise
        self.close()
        self._socket = socket.create_connection(("127.0.0.1", self._port), self._timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._exchange(self._socket, request)

    def _exchange(
        self, connected: socket.socket, request: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        try:
            connected.sendall(request)
            received = _some(connected)
        except ConnectionError as error:
            raise _NoAnswerError(str(error)) from error
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += _some(connected)
        first, *lines = received[:end].decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (one.partition(":") for one in lines)
        }
        body = bytearray(received[end + 4 :])
        while len(body) < int(headers.get("content-length", "0")):
            body += _some(connected)
        if headers.get("connection", "").lower() == "close":
            self.close()
        return int(first.split(" ")[1]), headers, bytes(body)

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class _NoAnswerError(ConnectionError):
    """Raised when a connection ended before the first byte of an answer."""


def _is_closed(connected: socket.socket) -> bool:
    """Whether the server has hung up: only then is there something to read before a request."""
    return bool(select.select([connected], [], [], 0)[0])


def _some(connected: socket.socket) -> bytes:
    received = connected.recv(65536)
    if not received:
        raise ConnectionResetError("the server hung up")
    return received


class _Sending:
    """What the threads of a sending process share."""

    def __init__(self, plan: Plan, out: TextIO) -> None:
        self._plan, self._out = plan, out
        self._requests = Requests(Path(plan.folder))
        endless = (Entry(0.0, plan.repeat, number) for number in count())
        self._next = endless if plan.repeat else iter(plan.entries)
        self._lock = threading.Lock()
        self.started = time.monotonic()

    def work(self) -> None:
        """Send one entry after the other until none is left."""
        connection = Connection(self._plan.port)
        while (entry := self._take()) is not None:
            request = self._requests.get(entry.kind, entry.number)
            if self._plan.is_open:
                time.sleep(max(0.0, entry.due_s - self._now()))
            answer = self._ask(connection, entry, request)
            line = json.dumps(asdict(answer))
            with self._lock:
                self._out.write(line + "\n")
                self._out.flush()
        connection.close()

    def _take(self) -> Entry | None:
        with self._lock:
            if self._plan.repeat and self._now() >= self._plan.seconds:
                return None
            return next(self._next, None)

    def _now(self) -> float:
        return time.monotonic() - self.started

    def _ask(self, connection: Connection, entry: Entry, request: bytes) -> Answer:
        sent = self._now()
        due = entry.due_s if self._plan.is_open else sent
        try:
            status, headers, body = connection.ask(request)
        except OSError as error:
            connection.close()
            return Answer(due, sent, self._now(), entry.kind, 0, failure=type(error).__name__)
        ended = self._now()
        retry_after = headers.get("retry-after", "")
        is_timed = status == 200 and b'"timing_ms"' in body
        timing = json.loads(body)["timing_ms"] if is_timed else {}
        return Answer(due, sent, ended, entry.kind, status, retry_after, timing)


class Sender:
    """A sending process that has been started.

    Args:
        plan: What it does.
        folder: For its files; made.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._path = folder / "answers.jsonl"
        (folder / "plan.json").write_text(json.dumps(asdict(plan)), encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.sending", str(folder)],
            cwd=Path(__file__).parent.parent,
        )

    def is_running(self) -> bool:
        """Whether it still sends, or waits for answers."""
        return self._process.poll() is None

    def wait(self) -> Load:
        """Wait for its end.

        Raises:
            CalledProcessError: It failed.
        """
        if status := self._process.wait():
            raise subprocess.CalledProcessError(status, "bench.sending")
        return self.so_far()

    def so_far(self) -> Load:
        """The answers until now."""
        answers, about = [], {"started": 0.0, "elapsed_s": 0.0, "cpu_s": 0.0}
        for line in _complete_lines(self._path):
            if "due_s" in line:
                answers.append(Answer(**line))
            else:
                about |= line
        return Load(tuple(answers), about["started"], about["elapsed_s"], about["cpu_s"])

    def stop(self) -> None:
        """End it where it still runs."""
        if self.is_running():
            self._process.kill()
        self._process.wait()


def _complete_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def main() -> None:
    """Send what the plan in a folder says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    given = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    given["entries"] = tuple(Entry(**one) for one in given["entries"])
    plan = Plan(**given)
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as out:
        sending = _Sending(plan, out)
        cpu = time.process_time()
        out.write(json.dumps({"started": sending.started}) + "\n")
        threads = [threading.Thread(target=sending.work) for _ in range(plan.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.monotonic() - sending.started
        used = time.process_time() - cpu
        out.write(json.dumps({"elapsed_s": elapsed, "cpu_s": used}) + "\n")


if __name__ == "__main__":
    main()
