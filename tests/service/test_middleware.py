"""What happens around every request: id, key, bound on the body."""

import asyncio
import json
import logging
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import middleware
from service.logs import JsonFormatter
from service.metrics import Metrics
from service.middleware import BodyLimitMiddleware, DrainMiddleware, RequestMiddleware
from service.settings import LimitSettings
from tests.service.conftest import Start, assert_problem, enrol
from tests.service.making import FORM_TYPE, GOOD, form, picture


@pytest.mark.parametrize("path", ["/livez", "/gallery", "/nowhere", "/gallery/unknown"])
def test_the_callers_request_id_comes_back(client: TestClient, path: str) -> None:
    answer = client.get(path, headers={"X-Request-ID": "trace:1.a-B_2"})

    assert answer.headers["x-request-id"] == "trace:1.a-B_2"


def test_each_request_without_an_id_gets_its_own(client: TestClient) -> None:
    ids = {client.get("/livez").headers["x-request-id"] for _ in range(3)}

    assert len(ids) == 3
    assert all(ids)


@pytest.mark.parametrize("hostile", ["", "a b", "x" * 129, "<script>", 'a"b', "a\tb", "ä", "a,b"])
def test_a_hostile_request_id_is_replaced(client: TestClient, hostile: str) -> None:
    answer = client.get("/nowhere", headers=[(b"X-Request-ID", hostile.encode("latin-1"))])

    assert answer.headers["x-request-id"] not in ("", hostile)
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def run_within(
    app: ASGIApp, *, sent: list[Message] | None = None, given: bytes = b"mine"
) -> list[Message]:
    """Run a middleware in this task for a request with the id "mine"; returns what it sent."""
    sent = [] if sent is None else sent

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def run() -> None:
        raw = [(b"x-request-id", given)]
        scope = {"type": "http", "method": "GET", "path": "/here", "headers": raw}
        await app(scope, receive, send)
        logging.getLogger("uvicorn.error").error("ended without completing its answer")

    asyncio.run(run())
    return sent


async def answer_with_an_id(_: Scope, __: Receive, send: Send) -> None:
    headers = [(b"x-request-id", b"another"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body"})


def test_an_answer_has_one_request_id() -> None:
    [start, _] = run_within(RequestMiddleware(answer_with_an_id))

    assert start["headers"] == [(b"content-length", b"0"), (b"x-request-id", b"mine")]


def test_what_the_server_says_of_a_request_afterwards_has_its_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Uvicorn looks, in the same task, at whether the answer was complete."""
    formatter = JsonFormatter()
    caplog.handler.setFormatter(formatter)

    run_within(RequestMiddleware(answer_with_an_id))

    [line] = [one for one in caplog.text.splitlines() if "ended without" in one]
    assert json.loads(line)["request_id"] == "mine"


async def cancelled(_: Scope, __: Receive, ___: Send) -> None:
    raise asyncio.CancelledError


async def cancelled_in_mid_answer(_: Scope, __: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise asyncio.CancelledError


def test_who_is_cut_off_before_an_answer_hears_why(caplog: pytest.LogCaptureFixture) -> None:
    """Uvicorn, which cancels what outlives the grace, would answer a plain 500 and log a fault."""
    metrics = Metrics(version="0", model="m")

    [start, body] = run_within(RequestMiddleware(cancelled, metrics))

    assert start["status"] == 503
    assert dict(start["headers"])[b"retry-after"] == b"2"
    problem = json.loads(body["body"])
    assert (problem["type"], problem["request_id"]) == ("/problems/not-ready", "mine")
    [line] = [one for one in caplog.records if one.name == "passerby.request"]
    assert (line.exc_info, vars(line)["status"]) == (None, 503)
    assert b'passerby_requests_total{route="unknown",status="503"} 1.0' in metrics.expose()[0]


def test_who_is_cut_off_in_the_middle_of_an_answer_hears_nothing_else() -> None:
    """The server closes the connection, so that half an answer does not look like one."""
    sent: list[Message] = []

    with pytest.raises(asyncio.CancelledError):
        run_within(RequestMiddleware(cancelled_in_mid_answer), sent=sent)

    assert [one["type"] for one in sent] == ["http.response.start"]


@given(given_id=st.binary(max_size=200) | st.text("aZ0_.:-", min_size=120).map(str.encode))
@example(given_id=b"a" * 128)
@example(given_id=b"a" * 129)
@example(given_id=b"a\n")
@example(given_id=b'a","status":200')
@settings(derandomize=True, database=None, deadline=None)
def test_no_id_of_a_caller_breaks_a_line_or_a_header(given_id: bytes) -> None:
    """It stands in answers, in the log and in the audit trail as it came, or not at all."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(JsonFormatter().format(record))  # type: ignore[method-assign]
    request_log = logging.getLogger("passerby.request")
    before = request_log.level
    request_log.setLevel(logging.INFO)
    request_log.addHandler(handler)
    try:
        [start, _] = run_within(RequestMiddleware(answer_with_an_id), given=given_id)
    finally:
        request_log.removeHandler(handler)
        request_log.setLevel(before)

    answered = dict(start["headers"])[b"x-request-id"]
    assert re.fullmatch(rb"[A-Za-z0-9_.:-]{1,128}", answered)
    [line] = lines
    assert "\n" not in line
    assert json.loads(line)["request_id"].encode() == answered
    if re.fullmatch(rb"[A-Za-z0-9_.:-]{1,128}", given_id):
        assert answered == given_id


KEYS = ("first-key", "second-key")


WRONG: list[dict[str, str]] = [
    {},
    {"X-API-Key": "wrong"},
    {"X-API-Key": ""},
    {"X-API-Key": "first-key,"},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "Basic first-key"},
]


@pytest.mark.parametrize("headers", WRONG)
@pytest.mark.parametrize("path", ["/gallery", "/info", "/docs", "/openapi.json", "/", "/nowhere"])
def test_without_a_key_nothing_is_open(start: Start, path: str, headers: dict[str, str]) -> None:
    answer = start(api_keys=KEYS).get(path, headers=headers)

    assert_problem(answer, 401, "unauthenticated")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_without_a_key_nothing_is_stored(start: Start) -> None:
    client = start(api_keys=KEYS)

    answer = client.post("/gallery", files=GOOD)

    assert_problem(answer, 401, "unauthenticated")
    items = client.get("/gallery", headers={"X-API-Key": KEYS[0]}).json()["items"]
    assert items == []


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("header", ["X-API-Key: {}", "Authorization: Bearer {}",
                                    "authorization: bearer {}"])  # fmt: skip
def test_each_key_opens_by_either_header(start: Start, key: str, header: str) -> None:
    name, _, value = header.format(key).partition(": ")

    assert start(api_keys=KEYS).get("/gallery", headers={name: value}).status_code == 200


def test_the_probes_are_open(start: Start) -> None:
    client = start(api_keys=KEYS)

    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").status_code in (200, 503)


@pytest.mark.parametrize("path", ["/livez/", "//livez", "/livez/../gallery", "/readyz%2f..%2finfo"])
def test_no_path_sneaks_past_the_key(start: Start, path: str) -> None:
    answer = start(api_keys=KEYS).get(path, follow_redirects=False)

    assert answer.status_code == 401


def test_keys_never_reach_the_log(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = start(api_keys=KEYS)

    client.get("/gallery", headers={"X-API-Key": KEYS[0]})
    client.get("/gallery", headers={"X-API-Key": "wrong-key"})

    # The test's own client logs too, but nothing of headers.
    assert caplog.records
    assert not any(key in caplog.text for key in (*KEYS, "wrong-key"))


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", "a/b"])
def test_a_body_over_the_limit_is_refused_whatever_it_calls_itself(start: Start, kind: str) -> None:
    """A patch that calls itself multipart is no way around the bound."""
    client = start(limits=LimitSettings(request_bytes=300_000))
    enrol(client, tracklet_id="t")
    body = b'{"identity": "' + b"x" * 400_000 + b'"}'

    announced = client.patch("/gallery/t", content=body, headers={"Content-Type": kind})
    chunked = client.patch("/gallery/t", content=iter([body]), headers={"Content-Type": kind})

    assert_problem(announced, 413, "payload-too-large")
    assert_problem(chunked, 413, "payload-too-large")


def send_slowly(app: ASGIApp, kind: str, *messages: Message) -> list[Message]:
    """A change of a record whose client sends these messages and then nothing more."""
    left = list(messages)
    sent: list[Message] = []

    async def receive() -> Message:
        return left.pop(0) if left else await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "PATCH",
        "path": "/gallery/t",
        "query_string": b"",
        "headers": [(b"content-type", kind.encode()), (b"transfer-encoding", b"chunked")],
    }
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 30))
    return sent


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_a_body_that_does_not_come_in_time_is_refused_whatever_it_calls_itself(
    start: Start, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "DRAIN_S", 0.01)
    client = start(limits=LimitSettings(upload_s=0.05))
    piece = {"type": "http.request", "body": b'{"identity": ', "more_body": True}

    [head, body] = send_slowly(client.app, kind, piece, piece)

    assert head["status"] == 504
    problem = json.loads(body["body"])
    assert problem["type"] == "/problems/deadline-exceeded"
    assert problem["detail"] == "expected a body within 0.05 s, it took longer"


def test_a_body_that_stops_is_not_waited_for(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sends nothing would hold a place among the uploads for as long as a body may take."""
    monkeypatch.setattr(middleware, "STALL_S", 0.05)
    monkeypatch.setattr(middleware, "DRAIN_S", 0.01)
    piece = {"type": "http.request", "body": b'{"identity": ', "more_body": True}

    [head, body] = send_slowly(start().app, "application/json", piece)

    assert head["status"] == 504
    detail = json.loads(body["body"])["detail"]
    assert detail == "expected a body that goes on, got nothing for 0.05 s"


def test_a_client_may_wait_for_its_answer_longer_than_its_body_may_take() -> None:
    """The same call that reads the body tells afterwards that a client hangs up."""
    told: list[str] = []

    async def wait_for_the_end(_: Scope, receive: Receive, __: Send) -> None:
        told.append((await receive())["type"])
        told.append((await receive())["type"])

    messages: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await asyncio.sleep(0.1)
            return {"type": "http.disconnect"}
        return messages.pop()

    async def send(_: Message) -> None:
        pass

    bounded = BodyLimitMiddleware(wait_for_the_end, upload_bytes=9, other_bytes=9, limit_s=0.01)
    asyncio.run(bounded({"type": "http", "headers": []}, receive, send))

    assert told == ["http.request", "http.disconnect"]


def drained(headers: list[tuple[bytes, bytes]], messages: list[Message]) -> int:
    """How many messages are left when an app that reads nothing has answered."""
    left = list(messages)

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        return left.pop(0)

    async def send(_: Message) -> None:
        pass

    scope = {"type": "http", "headers": headers}
    asyncio.run(DrainMiddleware(app, limit_bytes=250)(scope, receive, send))
    return len(left)


PIECES: list[Message] = [
    {"type": "http.request", "body": bytes(100), "more_body": number < 5} for number in range(6)
]


@pytest.mark.parametrize(
    ("headers", "messages", "expected"),
    [
        ([(b"content-length", b"200")], PIECES[-2:], 0),
        ([(b"transfer-encoding", b"chunked")], PIECES[-2:], 0),
        ([(b"content-length", b"600")], PIECES, 3),  # no more than its limit
        ([(b"content-length", b"600")], [PIECES[0], {"type": "http.disconnect"}, PIECES[1]], 1),
        ([(b"content-length", b"200"), (b"expect", b"100-continue")], PIECES[-2:], 2),
        ([], PIECES[-2:], 2),
    ],
    ids=["announced", "chunked", "long", "gone", "asks-first", "no-body"],
)
def test_what_is_still_being_sent_is_taken_before_the_answer(
    headers: list[tuple[bytes, bytes]], messages: list[Message], expected: int
) -> None:
    assert drained(headers, messages) == expected


def test_an_upload_to_a_route_that_is_not_there_is_answered(client: TestClient) -> None:
    body = form([("frames", "0.jpg", picture())])

    assert_problem(client.post("/nowhere", content=body, headers=FORM_TYPE), 404, "not-found")


def test_a_path_that_ends_otherwise_is_not_there_and_sends_nobody_elsewhere(start: Start) -> None:
    """A redirect would lead to whatever host the request names."""
    client = start()

    answer = client.get("/gallery/", headers={"Host": "elsewhere.example"}, follow_redirects=False)

    assert_problem(answer, 404, "not-found")
    assert "location" not in answer.headers
