"""Log lines: one an event, with the request's id, without people in them."""

import json
import logging
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from service.logs import JsonFormatter, TextFormatter, configure_logging, request_id
from tests.service.conftest import FakeEmbedder, enrol
from tests.service.making import GOOD


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


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "x", "levelname": "INFO", "msg": message})
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


@pytest.mark.parametrize("style", ["json", "text"])
def test_every_logger_writes_in_the_style_that_was_chosen(
    style: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    access = logging.getLogger("uvicorn.access")
    root.handlers.clear()
    try:
        configure_logging("json" if style == "json" else "text")
        logging.getLogger("uvicorn.error").info("hello")
        access.info("one line a request is enough")
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
        access.disabled = False

    [line] = capsys.readouterr().err.splitlines()
    assert "hello" in line
    assert line.startswith("{") == (style == "json")
