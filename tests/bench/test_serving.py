"""What the benches of the service share: load, what a process holds, galleries, verdicts."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from bench import overload, soak
from bench.sending import Answer, Connection, Entry, Load, Plan, Requests, Sender, write_bodies
from bench.served import REST, FreeEmbedder, piece_of
from bench.serving import (
    Usage,
    descendants,
    fill_gallery,
    percentile,
    print_table,
    read_settings,
    usage_of,
)
from index.embedded import EmbeddedGallery
from index.gallery import Filters
from model.frames import Clip
from service.app import create_app
from service.client import LocalTracklet
from service.loadtest_sending import encode_body
from service.settings import Settings
from tests.service.conftest import FakeEmbedder
from tests.service.making import GREEN, RED, picture


@pytest.fixture
def bodies(tmp_path: Path) -> Path:
    """Two tracklets as `bench.sending` takes them."""
    folder = tmp_path / "bodies"
    encoded = [
        encode_body(LocalTracklet("frames", (("1.jpg", picture(one)), ("2.jpg", picture(one)))))
        for one in (RED, GREEN)
    ]
    write_bodies(folder, [(one.content_type, one.content) for one in encoded])
    return folder


class Answering(BaseHTTPRequestHandler):
    """Answers every third upload with 429, the others with a timing, and deletions with 204."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    asked: list[str]
    uploads = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            Answering.asked.append(self.path)
            Answering.uploads += 1
            number = Answering.uploads
        if number % 3 == 0:
            self.reply(429, b"{}", {"Retry-After": "2"})
        else:
            self.reply(200, json.dumps({"timing_ms": {"embed": 5.0}}).encode(), {})

    def do_DELETE(self) -> None:
        with self.lock:
            Answering.asked.append(self.path)
        self.reply(204, b"", {})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 the base's name
        pass


@pytest.fixture
def answering() -> Iterator[int]:
    """Port of a server that answers at once."""
    Answering.asked, Answering.uploads = [], 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def send(plan: Plan, tmp_path: Path) -> Load:
    sender = Sender(plan, tmp_path / "load")
    try:
        return sender.wait()
    finally:
        sender.stop()


def test_a_closed_loop_sends_each_entry_once(answering: int, bodies: Path, tmp_path: Path) -> None:
    entries = tuple(Entry(0.0, "query", number) for number in range(12))

    load = send(Plan(answering, str(bodies), 3, entries, is_open=False), tmp_path)

    assert Answering.asked == ["/query"] * 12
    assert Counter(one.status for one in load.answers) == {200: 8, 429: 4}
    assert len(load.good()) == 8
    assert {one.retry_after for one in load.answers if one.status == 429} == {"2"}
    assert all(one.timing_ms == {"embed": 5.0} for one in load.good())
    assert load.cpu_s > 0


def test_an_open_loop_sends_nothing_before_its_time(
    answering: int, bodies: Path, tmp_path: Path
) -> None:
    entries = tuple(Entry(0.05 * number, "embed", number) for number in range(8))

    load = send(Plan(answering, str(bodies), 2, entries, is_open=True), tmp_path)

    assert sorted(one.due_s for one in load.answers) == [entry.due_s for entry in entries]
    assert all(one.sent_s >= one.due_s for one in load.answers)
    assert all(one.latency_s == one.ended_s - one.due_s for one in load.answers)


def test_saturation_ends_after_its_time(answering: int, bodies: Path, tmp_path: Path) -> None:
    plan = Plan(answering, str(bodies), 2, (), is_open=False, repeat="embed", seconds=0.5)

    load = send(plan, tmp_path)

    assert len(load.answers) == len(Answering.asked) > 2


def test_a_server_that_is_not_there_is_an_answer_without_status(
    bodies: Path, tmp_path: Path
) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        plan = Plan(
            taken.getsockname()[1], str(bodies), 1, (Entry(0.0, "delete", 1),), is_open=False
        )

        [answer] = send(plan, tmp_path).answers

    assert (answer.status, answer.failure) == (0, "ConnectionRefusedError")


def test_a_connection_that_was_closed_meanwhile_is_opened_again() -> None:
    """The server answers once a connection; a client that keeps it must not fail at the next."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def serve() -> None:
            for number in range(2):
                with listening.accept()[0] as accepted:
                    accepted.recv(1000)
                    accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number)

        thread = threading.Thread(target=serve)
        thread.start()
        connection = Connection(listening.getsockname()[1])
        first = connection.ask(b"GET / HTTP/1.1\r\n\r\n")
        second = connection.ask(b"GET / HTTP/1.1\r\n\r\n")
        connection.close()
        thread.join()

    assert (first[2], second[2]) == (b"0", b"1")


def test_an_answer_that_ends_in_the_middle_is_a_failure() -> None:
    """It must not be asked for again: that would hide that it failed."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def serve() -> None:
            with listening.accept()[0] as accepted:
                accepted.recv(1000)
                accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n0")
                accepted.recv(1000)
                accepted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n0")

        thread = threading.Thread(target=serve)
        thread.start()
        connection = Connection(listening.getsockname()[1])
        connection.ask(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            connection.ask(b"GET / HTTP/1.1\r\n\r\n")
        connection.close()
        thread.join()


@contextmanager
def service(tmp_path: Path) -> Iterator[TestClient]:
    with EmbeddedGallery(tmp_path / "gallery") as gallery:
        app = create_app(FakeEmbedder(), gallery, Settings())
        with TestClient(app) as client:
            yield client


def ask(client: TestClient, request: bytes) -> int:
    """Send the bytes of a request through the test client; returns the status."""
    head, _, body = request.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    method, path, _ = first.split(" ")
    headers = dict(line.split(": ", 1) for line in lines)
    assert int(headers.pop("Content-Length")) == len(body)
    return client.request(method, path, content=body, headers=headers).status_code


def test_the_service_answers_each_kind_of_request_as_the_soak_expects(
    bodies: Path, tmp_path: Path
) -> None:
    requests = Requests(bodies)
    with service(tmp_path) as client:
        found = {
            kind: {ask(client, requests.get(kind, number)) for number in range(6)}
            for kind in ("enrol", "query", "delete", "bad")
        }

    assert all(found[kind] <= soak.EXPECTED[kind] for kind in found), found


def test_an_unknown_kind_of_request_is_refused(bodies: Path) -> None:
    with pytest.raises(ValueError, match="expected query, embed, enrol, delete or bad, got 'x'"):
        Requests(bodies).get("x", 0)


def test_usage_counts_the_threads_of_children() -> None:
    """Of a process of its own: here, threads of other tests may come to their end meanwhile."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as parent:
        while not descendants(parent.pid):
            time.sleep(0.001)

        counted = usage_of(parent.pid).threads
        parent.communicate(b"\n")

    assert counted == 2


def test_usage_sees_an_open_socket_and_a_child() -> None:
    before = usage_of(os.getpid())
    with (
        socket.socket(),
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child,
    ):
        during = usage_of(os.getpid())
        children = descendants(os.getpid())
        child.communicate(b"\n")

    assert child.pid in children
    assert during.sockets == before.sockets + 1
    assert len(during.children_rss) == len(before.children_rss) + 1
    assert during.memory > during.rss > 0


def test_usage_counts_the_processor_time_of_children_that_have_ended() -> None:
    before = usage_of(os.getpid()).cpu_s
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)

    assert usage_of(os.getpid()).cpu_s - before > 0.25


def test_a_filled_gallery_holds_unit_vectors_of_identities_of_1_to_50(tmp_path: Path) -> None:
    fill_gallery(tmp_path / "data", tracklets=600, dim=16, model="trsa-x", seed=0)

    with EmbeddedGallery(tmp_path / "data") as gallery:
        records = gallery.list(Filters(), limit=1000).records
        lengths = [np.linalg.norm(gallery.embedding(one.tracklet_id)) for one in records[:20]]
        model = gallery.model
    sizes = Counter(one.identity for one in records)
    assert model == "trsa-x"
    assert len(records) == 600
    assert lengths == pytest.approx([1.0] * 20, abs=1e-5)
    assert max(sizes.values()) <= 50
    assert len(sizes) > 600 / 50


def test_the_free_embedder_averages_pixels_over_frames() -> None:
    rng = np.random.default_rng(0)
    clip: Clip = rng.integers(0, 256, (3, 128, 64, 3), dtype=np.uint8)

    [result] = FreeEmbedder().embed([clip], with_attention=True)

    slow = [
        sum(int(clip[frame, row, column, channel]) for frame in range(3)) / 3
        for row in range(4, 128, 8)
        for column in range(8, 64, 16)
        for channel in range(3)
    ]
    assert result.embedding.shape == (FreeEmbedder.dim,)
    assert result.embedding == pytest.approx(slow, rel=1e-6)
    assert result.attention is not None
    assert result.attention.sum(axis=(1, 2)) == pytest.approx([1, 1, 1])


def test_the_service_runs_with_the_free_embedder(bodies: Path, tmp_path: Path) -> None:
    with EmbeddedGallery(tmp_path / "gallery") as gallery:
        app = create_app(FreeEmbedder(), gallery, Settings())
        with TestClient(app) as client:
            statuses = [ask(client, Requests(bodies).get(kind, 0)) for kind in ("enrol", "query")]

    assert statuses == [201, 200]


def test_a_stack_belongs_to_its_innermost_known_piece() -> None:
    seen = []

    class Told(dict[str, int]):
        def items(self) -> object:  # type: ignore[override]
            seen.append(piece_of(sys._getframe()))
            return super().items()

    json.dumps(Told(a=1), indent=1)  # the encoder of Python, which asks for items

    assert seen == ["JSON and bodies"]
    assert piece_of(None) == REST


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([3.0, 1.0, 2.0, 10.0], 50) == 2
    assert percentile([3.0, 1.0, 2.0, 10.0], 99) == 10
    assert np.isnan(percentile([], 50))


def test_a_table_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", "b"), [(1, "x")])

    assert capsys.readouterr().out == "| a | b |\n|---|---|\n| 1 | x |\n"


def test_settings_are_read_by_name() -> None:
    given = ["queue__max_tracklets=64", "RUNTIME=torch"]

    assert read_settings(given) == {"QUEUE__MAX_TRACKLETS": "64", "RUNTIME": "torch"}
    with pytest.raises(SystemExit, match="expected --set NAME=VALUE, got 'x'"):
        read_settings(["x"])


def test_the_slope_and_its_error_are_those_of_a_least_squares_line() -> None:
    rng = np.random.default_rng(0)
    times = np.arange(50.0)
    values = 3 * times + rng.normal(0, 2, 50)

    slope, error = soak.slope_of(times.tolist(), values.tolist())

    (expected, _), covariance = np.polyfit(times, values, 1, cov=True)
    assert slope == pytest.approx(expected)
    assert error == pytest.approx(np.sqrt(covariance[0, 0]))


def test_the_soak_deletes_each_tracklet_once_and_long_after_its_enrolment() -> None:
    entries = soak.mix(rate=20, seconds=100, seed=0)

    enrolled: list[int] = []
    deleted: list[int] = []
    for entry in entries:
        if entry.kind == "enrol":
            enrolled.append(entry.number)
        elif entry.kind == "delete":
            deleted.append(entry.number)
            assert entry.number in enrolled[: -soak.KEPT]
    assert len(entries) == 2000
    assert len(set(enrolled)) == len(enrolled)
    assert len(set(deleted)) == len(deleted) > 300
    assert Counter(one.kind for one in entries)["query"] == pytest.approx(1000, rel=0.1)


def usage(memory: int, threads: int = 10, descriptors: int = 20) -> Usage:
    return Usage(memory, (), threads, descriptors, 5, 0.0)


def answer(due_s: float, latency_s: float, status: int = 200, retry_after: str = "") -> Answer:
    return Answer(due_s, due_s, due_s + latency_s, "query", status, retry_after)


def quiet_and_loud(*more: Answer) -> list[Answer]:
    """15 s of light load, 20 s of overload, 15 s of light load again, all as it should be."""
    light = [answer(at, 0.2) for at in range(15)] + [answer(36 + at, 0.2) for at in range(14)]
    loud = [answer(15 + at, 5.0) for at in range(20)]
    refused = [answer(15 + at, 0.01, 429, "3") for at in range(20)]
    return [*light, *loud, *refused, *more]


def verdict(answers: list[Answer], grown: float = 1.0) -> list[bool]:
    seen = tuple((float(at), usage(int(1e9 * grown ** (at / 50)))) for at in range(50))
    load = Load(tuple(answers), 0.0, 50.0, 0.0)
    found = overload.Overload(4.0, load, begin_s=15, end_s=35, seen=seen)
    return [claim.holds for claim in overload.judge(found, deadline_s=60)]


def test_an_overload_as_it_should_be_passes() -> None:
    assert verdict(quiet_and_loud()) == [True] * 5


@pytest.mark.parametrize(
    ("more", "grown", "failed"),
    [
        (answer(20, 1.0, 503), 1.0, 0),
        (Answer(20, 20, 21, "query", 0, failure="ConnectionResetError"), 1.0, 0),
        (answer(20, 0.1, 429, ""), 1.0, 1),
        (answer(20, 61.0), 1.0, 2),
        (answer(20, 1.0), 2.0, 3),
    ],
)
def test_an_overload_fails_where_a_claim_does_not_hold(
    more: Answer, grown: float, failed: int
) -> None:
    expected = [at != failed for at in range(5)]

    assert verdict(quiet_and_loud(more), grown) == expected


def test_an_overload_fails_where_queries_stay_slow() -> None:
    slow = [one if one.due_s < 35 else answer(one.due_s, 2.0) for one in quiet_and_loud()]

    assert verdict(slow) == [True] * 4 + [False]


def test_an_overload_fails_where_queries_are_slow_for_too_long() -> None:
    late = [one if not 35 <= one.due_s < 41 else answer(one.due_s, 2.0) for one in quiet_and_loud()]

    assert verdict(late) == [True] * 4 + [False]


def soaked(answers: list[Answer], after: Usage, growth_mb_hour: float = 0.0) -> list[bool]:
    seen = [
        (float(at), usage(int(1e9 + 1e6 * growth_mb_hour * at / 3600), threads=after.threads))
        for at in range(600)
    ]
    seen[:300] = [(at, usage(one.memory)) for at, one in seen[:300]]
    load = Load(tuple(answers), 0.0, 600.0, 0.0)
    return [claim.holds for claim in soak.judge(load, seen, [usage(0), after])]


def test_a_soak_as_it_should_be_passes() -> None:
    assert soaked([answer(1, 0.1)], usage(0)) == [True] * 5


@pytest.mark.parametrize(
    ("answers", "after", "growth", "failed"),
    [
        ([answer(1, 0.1, 500)], usage(0), 0.0, 0),
        ([answer(1, 0.1, 404)], usage(0), 0.0, 1),
        ([answer(1, 0.1)], usage(0), 100.0, 2),
        ([answer(1, 0.1)], usage(0, descriptors=21), 0.0, 3),
        ([answer(1, 0.1)], usage(0, threads=11), 0.0, 4),
    ],
)
def test_a_soak_fails_where_a_claim_does_not_hold(
    answers: list[Answer], after: Usage, growth: float, failed: int
) -> None:
    expected = [at != failed for at in range(5)]

    assert soaked(answers, after, growth) == expected


def test_a_client_that_hangs_up_says_whether_it_had_an_answer(answering: int, bodies: Path) -> None:
    request = Requests(bodies).get("embed", 0)

    whole = overload.hang_up(answering, request, share=1.0, wait_s=10, is_abrupt=False)
    half = overload.hang_up(answering, request, share=0.5, wait_s=0.05, is_abrupt=True)

    assert (whole, half) == (True, False)
