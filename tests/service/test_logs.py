"""Log lines: one an event, with the request's id, without people in them."""

import contextvars
import io
import json
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.testclient import TestClient

from index.embedded import EmbeddedGallery
from service import logs
from service.logs import (
    BATCH_LINES,
    JsonFormatter,
    LineHandler,
    TextFormatter,
    begin_notes,
    configure_logging,
    flush_logs,
    note,
    on_behalf_of,
    request_id,
)
from service.middleware import RequestMiddleware
from service.worker import Embedded, EmbeddingWorker
from tests.service.conftest import FakeEmbedder, enrol
from tests.service.making import GOOD, as_frames


class Lines(logging.Handler):
    """Formats what is logged, where it is logged, as the service would."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(JsonFormatter())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith("http"):  # the tests' own client
            self.lines.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the service logs."""
    handler = Lines()
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler.lines
    root.removeHandler(handler)
    root.setLevel(level)


def test_a_request_is_one_line_with_its_id_and_route(client: TestClient, lines: list[str]) -> None:
    enrol(client, tracklet_id="t")
    lines.clear()

    client.get("/gallery/t", headers={"X-Request-ID": "one"})

    [line] = map(json.loads, lines)
    assert line["request_id"] == "one"
    assert line["route"] == "/gallery/{tracklet_id}"
    assert (line["method"], line["status"]) == ("GET", 200)
    assert line["duration_ms"] >= 0
    assert line["level"] == "info"


def test_probes_that_succeed_are_not_logged(client: TestClient, lines: list[str]) -> None:
    client.get("/livez")

    assert lines == []


def test_an_unknown_route_is_logged_without_its_path(client: TestClient, lines: list[str]) -> None:
    """Paths of strangers would fill the log with whatever they like."""
    client.get("/nowhere/at/all")

    [line] = lines
    assert "nowhere" not in line
    assert json.loads(line)["status"] == 404


def test_a_failed_embedding_is_logged_with_the_id_of_its_request(
    client: TestClient, embedder: FakeEmbedder, lines: list[str]
) -> None:
    """The client is told that the log says why; it must be found there."""

    def fail(_: object) -> None:
        raise RuntimeError("the reason")

    embedder.refuse = fail
    client.post("/gallery", files=GOOD, headers={"X-Request-ID": "find-me"})

    [line] = [one for one in map(json.loads, lines) if one["level"] == "error"]
    assert line["request_id"] == "find-me"
    assert "the reason" in line["exception"]


def test_no_image_and_no_identity_reaches_the_log(
    client: TestClient, embedder: FakeEmbedder, lines: list[str]
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("broken")

    embedder.refuse = fail
    client.post("/gallery", files=GOOD, data={"identity": "jane-doe"})

    assert lines
    assert not any("jane-doe" in line for line in lines)
    assert max(map(len, lines)) < 20_000
    assert not any("JFIF" in line or "\\xff" in line for line in lines)


def record(message: str, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("x", level, "", 0, message, (), None)
    vars(made).update(extra)
    return made


def test_a_json_line_stays_one_line() -> None:
    line = JsonFormatter().format(record("two\nlines", detail="ü\n", what={1, 2}))

    assert "\n" not in line
    assert json.loads(line)["message"] == "two\nlines"
    assert json.loads(line)["detail"] == "ü\n"


def test_a_text_line_shows_its_fields() -> None:
    line = TextFormatter().format(record("request", status=200))

    assert "request status=200" in line


def test_lines_outside_a_request_have_no_id() -> None:
    assert "request_id" not in json.loads(JsonFormatter().format(record("starting")))


def test_lines_inside_a_request_have_its_id() -> None:
    token = request_id.set("r1")
    try:
        line = JsonFormatter().format(record("working"))
    finally:
        request_id.reset(token)

    assert json.loads(line)["request_id"] == "r1"


# Whose line it is.


def test_what_a_request_notes_is_in_its_line(lines: list[str]) -> None:
    app = FastAPI()

    @app.get("/here")
    def work() -> None:  # in a thread, as most routes
        note(decode_ms=6.1, problem="overloaded")

    app.add_middleware(RequestMiddleware)
    TestClient(app).get("/here")

    [line] = map(json.loads, lines)
    assert (line["decode_ms"], line["problem"]) == (6.1, "overloaded")
    assert line["route"] == "/here"


def test_requests_do_not_share_their_notes() -> None:
    first = contextvars.copy_context().run(begin_notes)
    second = contextvars.copy_context().run(begin_notes)

    note(decode_ms=1.0)  # outside any request: nothing happens

    assert first == second == {}


def test_a_note_cannot_take_the_place_of_what_every_line_has() -> None:
    """`logging` would refuse it only when the request has been answered."""
    with pytest.raises(ValueError, match="expected other names"):
        note(process=1)


def in_a_line(**extra: Any) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(JsonFormatter().format(record("working", **extra)))
    return line


def test_a_batchs_line_names_the_requests_of_all_its_tracklets() -> None:
    with on_behalf_of(["a", "b", None, "a"]):
        inside = in_a_line()
        text = TextFormatter().format(record("working"))
        of_one = in_a_line(request_id="b")
    outside = in_a_line()

    assert inside["request_ids"] == ["a", "b"]
    assert "working request_ids=a,b" in text
    assert of_one["request_id"] == "b"
    assert "request_ids" not in of_one
    assert not outside.keys() & {"request_id", "request_ids"}


def test_the_line_of_a_batch_of_one_is_found_like_any_other_of_its_request() -> None:
    with on_behalf_of(["a"]):
        inside = in_a_line()

    assert inside["request_id"] == "a"
    assert "request_ids" not in inside


def test_lines_of_a_thread_pool_have_the_id_of_their_request(lines: list[str]) -> None:
    app = FastAPI()
    log = logging.getLogger("test")

    @app.get("/sync")
    def sync() -> None:
        log.info("in a route")

    @app.get("/async")
    async def asynchronous() -> None:
        await run_in_threadpool(log.info, "in a thread")
        with ThreadPoolExecutor(1) as pool:  # which does not carry it by itself
            pool.submit(contextvars.copy_context().run, log.info, "in another").result()

    app.add_middleware(RequestMiddleware)
    client = TestClient(app)
    client.get("/sync", headers={"X-Request-ID": "one"})
    client.get("/async", headers={"X-Request-ID": "two"})

    found = [(line["message"], line["request_id"]) for line in map(json.loads, lines)]
    assert found == [
        ("in a route", "one"), ("request", "one"),
        ("in a thread", "two"), ("in another", "two"), ("request", "two"),
    ]  # fmt: skip


def test_lines_of_the_gallery_have_the_id_of_their_request(
    client: TestClient, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(*_: object) -> None:
        logging.getLogger("index.store").warning("the write-ahead log could not be emptied")

    monkeypatch.setattr(EmbeddedGallery, "remove", warn)
    client.delete("/gallery/t", headers={"X-Request-ID": "one"})

    [line] = [one for one in map(json.loads, lines) if one["logger"] == "index.store"]
    assert line["request_id"] == "one"


def test_the_line_of_a_query_says_where_its_time_went(client: TestClient, lines: list[str]) -> None:
    client.post("/query", files=GOOD)

    [line] = map(json.loads, lines)
    for stage in ("decode", "queue", "embed", "search"):
        assert 0 <= line[f"{stage}_ms"] <= line["duration_ms"], stage


def test_the_line_of_a_refusal_says_which(client: TestClient, lines: list[str]) -> None:
    client.post("/query", files=as_frames([b"not an image"]))

    [line] = map(json.loads, lines)
    assert (line["status"], line["problem"]) == (415, "unsupported-media")


def test_lines_of_the_network_name_the_requests_of_their_batch(
    embedder: FakeEmbedder, lines: list[str]
) -> None:
    log = logging.getLogger("model.embedder")
    embedder.refuse = lambda _: log.warning("halved")
    embedder.warm_gate.clear()
    worker = EmbeddingWorker(embedder, max_frames=64, max_delay_s=0, max_tracklets=8)
    worker.start()

    def submit(name: str) -> "Future[Embedded]":
        request_id.set(name)
        return worker.submit(np.zeros((3, 64, 32, 3), dtype=np.uint8), deadline_s=20)

    futures = [contextvars.copy_context().run(submit, name) for name in ("a", "b")]
    embedder.warm_gate.set()
    for future in futures:
        future.result(20)
    worker.close()

    found = [json.loads(line) for line in lines]
    assert [line["request_ids"] for line in found] == [["a", "b"]] * 2


# How lines are written.


@pytest.fixture
def configure() -> Iterator[Callable[[str], None]]:
    """Configure logging as the service does, until the end of the test."""
    root = logging.getLogger()
    access = logging.getLogger("uvicorn.access")
    handlers, level, hook = root.handlers[:], root.level, threading.excepthook
    root.handlers.clear()  # or they would be closed

    def run(style: str) -> None:
        configure_logging("json" if style == "json" else "text")

    yield run
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    access.disabled = False
    threading.excepthook = hook
    logging.captureWarnings(False)


@pytest.mark.parametrize("style", ["json", "text"])
def test_every_logger_writes_in_the_style_that_was_chosen(
    style: str, capsys: pytest.CaptureFixture[str], configure: Callable[[str], None]
) -> None:
    configure(style)

    logging.getLogger("uvicorn.error").info("hello")
    logging.getLogger("uvicorn.access").info("one line a request is enough")
    flush_logs()

    [line] = capsys.readouterr().err.splitlines()
    assert "hello" in line
    assert line.startswith("{") == (style == "json")


def test_an_error_that_ends_a_thread_is_one_line(
    capsys: pytest.CaptureFixture[str], configure: Callable[[str], None]
) -> None:
    configure("json")

    def fail() -> None:
        raise RuntimeError("the reason")

    def leave() -> None:
        raise SystemExit

    for target in (fail, leave):
        thread = threading.Thread(target=target, name="a-worker")
        thread.start()
        thread.join()
    flush_logs()

    [line] = map(json.loads, capsys.readouterr().err.splitlines())
    assert line["level"] == "critical"
    assert line["of_thread"] == "a-worker"
    assert "the reason" in line["exception"]


class Pipe:
    """Standard error as a pipe whose reader has stopped.

    Args:
        room: Whether anything goes in before it blocks.
    """

    def __init__(self, *, room: bool) -> None:
        self.reader, writer = os.pipe()
        self.stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115, PTH123 closed below
        self.filling = 0
        os.set_blocking(writer, False)
        while not room:
            try:
                self.filling += os.write(writer, b"." * 4096)
            except BlockingIOError:
                break
        os.set_blocking(writer, True)

    def read(self, until: str) -> list[dict[str, Any]]:
        """Read on, until a line with a word has come, and return the lines."""
        data = b""
        while until.encode() not in data or not data.endswith(b"\n"):
            assert select.select([self.reader], [], [], 20)[0], f"no line says {until!r}"
            data += os.read(self.reader, 1 << 16)
        lines, self.filling = data[self.filling :].splitlines(), 0
        return [json.loads(line) for line in lines]


Piped = Callable[..., tuple[Pipe, LineHandler]]


@pytest.fixture
def piped() -> Iterator[Piped]:
    """A handler whose lines go into a pipe."""
    with ExitStack() as used:

        def make(*, room: bool, waiting_lines: int = 10_000) -> tuple[Pipe, LineHandler]:
            pipe = Pipe(room=room)
            handler = LineHandler(pipe.stream, waiting_lines)
            handler.setFormatter(JsonFormatter())
            used.callback(pipe.stream.close)
            used.callback(handler.close)
            used.callback(os.close, pipe.reader)
            return pipe, handler

        yield make


def test_a_reader_that_has_stopped_holds_nobody_up_and_is_told_what_it_missed(
    piped: Piped,
) -> None:
    pipe, handler = piped(room=False, waiting_lines=10)

    for number in range(1000):  # returns, though not one line can be written
        handler.handle(record("line", number=number))
    handler.handle(record("the last one", logging.ERROR))
    found = pipe.read(until="the last one")
    handler.handle(record("goes on"))
    found += pipe.read(until="goes on")

    numbers = [line["number"] for line in found if line["message"] == "line"]
    assert numbers == sorted(numbers)
    assert 10 <= len(numbers) <= 10 + BATCH_LINES
    told = [line for line in found if "dropped" in str(line["message"])]
    assert {line["level"] for line in told} == {"warning"}
    assert sum(line["lines"] for line in told) + len(numbers) == 1000


def test_whoever_waits_for_a_reader_that_has_stopped_waits_no_longer_than_the_bound(
    piped: Piped, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "FLUSH_S", 0.05)
    pipe, handler = piped(room=False)
    handler.handle(record("line"))

    handler.flush()

    assert pipe.read(until="line")


def test_a_pipe_that_somebody_made_non_blocking_gets_every_line(piped: Piped) -> None:
    pipe, handler = piped(room=True)
    os.set_blocking(pipe.stream.fileno(), False)

    for number in range(2000):
        handler.handle(record("x" * 100, number=number))
    handler.handle(record("the last one"))
    found = pipe.read(until="the last one")

    assert [line.get("number") for line in found] == [*range(2000), None]


def test_a_line_that_cannot_be_made_does_not_break_who_logs_it(
    piped: Piped, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, handler = piped(room=True)

    handler.handle(logging.LogRecord("x", 20, "", 0, "expected %d", ("a number",), None))
    handler.handle(record("still here"))

    assert [line["message"] for line in pipe.read(until="still here")] == ["still here"]
    assert "Logging error" in capsys.readouterr().err


def test_lines_after_the_end_are_written_where_they_are_logged() -> None:
    stream = io.StringIO()
    handler = LineHandler(stream)
    handler.close()

    handler.handle(record("late"))

    assert stream.getvalue() == "late\n"


def test_a_handler_that_is_closed_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    handler = LineHandler(io.StringIO())
    [writer] = set(threading.enumerate()) - before

    handler.close()

    writer.join(20)
    assert not writer.is_alive()


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_without_anywhere_to_write_nothing_happens(stream: io.StringIO | None) -> None:
    handler = LineHandler(stream)
    if stream is not None:
        stream.close()

    handler.handle(record("to nobody"))
    handler.close()


ENDS = {
    "as usual": "pass",
    "at once": "flush_logs(); os._exit(0)",
    "in a fork": "os.wait() if os.fork() else log.critical('from the fork')",
}


def lines_of(program: str) -> list[dict[str, Any]]:
    """What a process of its own logs, where logging is configured as the service does."""
    start = """
import logging, os, warnings
from service.logs import configure_logging, flush_logs
configure_logging("json")
log = logging.getLogger("test")
"""
    process = subprocess.run(
        [sys.executable, "-c", start + program], stderr=subprocess.PIPE, timeout=60, check=True
    )
    return [json.loads(line) for line in process.stderr.splitlines()]


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_the_last_lines_of_a_process_are_not_lost(end: str) -> None:
    found = lines_of(f"""
for number in range(500):
    log.info("line %d", number)
log.critical("the last one")
{end}
""")

    messages = [line["message"] for line in found if line["message"] != "from the fork"]
    assert messages == [*(f"line {number}" for number in range(500)), "the last one"]
    assert ("fork" in end) == any(line["message"] == "from the fork" for line in found)


def test_a_warning_of_python_is_a_line_too() -> None:
    [line] = lines_of("warnings.warn('old and slow')")

    assert line["level"] == "warning"
    assert "old and slow" in line["message"]


def test_a_process_whose_log_nobody_reads_still_ends_well() -> None:
    program = """
import logging
from service import logs
logs.FLUSH_S = 0.1
logs.configure_logging("json")
for _ in range(5000):
    logging.getLogger("test").info("x" * 100)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)

    assert process.wait(60) == 0
    process.communicate()
