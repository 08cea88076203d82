"""What a stranger may send in place of a request, and where a request ends however it comes."""

import asyncio
import json
import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from service import connections
from service.connections import CHUNK_SHARE, HEAD_BYTES, Connections
from service.headers import DATA_POLICY
from service.logs import JsonFormatter
from service.metrics import Metrics
from service.settings import LimitSettings

SMALL = 300  # bytes of a head, so that there are few places to cut
SECRET = b"not-for-the-log"


class Wire(asyncio.Transport):
    """A connection whose other end has read everything."""

    def __init__(self) -> None:
        super().__init__({"peername": ("192.0.2.7", 4711), "sockname": ("192.0.2.1", 80)})
        self.said = b""
        self.is_ended = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.said += bytes(data)

    def write_eof(self) -> None:
        self.is_ended = True

    def close(self) -> None:
        self.is_ended = True

    def is_closing(self) -> bool:
        return self.is_ended

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Heard:
    """An app that answers each request with its body, and what it was asked.

    Attributes:
        requests: Method, path, headers and body of each.
        wire: The connection.
        is_open: Whether it was left open.
        metrics: Of the server.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, list[tuple[bytes, bytes]], bytes]] = []
        self.wire = Wire()
        self.is_open = True
        self.metrics = Metrics(version="0", model="m")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        body: bytes = message.get("body", b"")
        while message.get("more_body", False):
            message = await receive()
            body += message.get("body", b"")
        if message["type"] == "http.request":
            self.requests.append((scope["method"], scope["path"], list(scope["headers"]), body))
        length = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": body})

    def paths(self) -> list[str]:
        return [path for _, path, _, _ in self.requests]

    def bodies(self) -> list[bytes]:
        return [body for *_, body in self.requests]

    def refusal(self) -> dict[str, Any]:
        """The problem at the end of what was said, which ends the connection."""
        head, _, body = self.wire.said.rpartition(b"\r\n\r\n")
        status, *lines = head.rpartition(b"HTTP/1.1 ")[2].decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        problem: dict[str, Any] = json.loads(body)
        assert not self.is_open
        assert status == "400 Bad Request"
        assert headers["content-type"] == "application/problem+json"
        assert headers["connection"] == "close"
        assert headers["x-request-id"] == problem["request_id"]
        assert headers["content-security-policy"] == DATA_POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert problem["type"] == "/problems/invalid-request"
        return problem


def hear(pieces: Sequence[bytes], head_bytes: int = HEAD_BYTES) -> Heard:
    """Give a connection these bytes, each piece on its own."""
    heard = Heard()
    limits = LimitSettings(connections=1)
    under = Connections(limits, heard.metrics, head_bytes=head_bytes, spare=0)

    async def run() -> None:
        config = uvicorn.Config(heard, http=under.protocol(), ws="none", log_config=None)
        config.load()
        state = ServerState()
        protocol: Any = under.protocol()(config=config, server_state=state, app_state={})  # type: ignore[call-arg]
        protocol.connection_made(heard.wire)
        for piece in pieces:
            protocol.data_received(piece)
            await asyncio.sleep(0)
        for _ in range(20):  # steps of the app and its answers
            await asyncio.sleep(0)
        heard.is_open = not heard.wire.is_ended
        protocol.connection_lost(None)
        await asyncio.sleep(0)

    asyncio.run(run())
    return heard


def cut(data: bytes, places: Sequence[int]) -> Iterator[bytes]:
    """The pieces of some bytes that was cut at these places."""
    for begin, end in pairwise([0, *sorted(set(places) - {0, len(data)}), len(data)]):
        yield data[begin:end]


GET = b"GET /a HTTP/1.1\r\nHost: here\r\n\r\n"
POST = b"POST /b HTTP/1.1\r\nHost: here\r\n"
FIXED = POST + b"Content-Length: 8\r\n\r\nab\r\n\r\ncd"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKS = CHUNKED + b"4\r\n\r\n\r\n\r\n2;x=y\r\ncd\r\n0\r\nX: y\r\n\r\n"
LINE = b"GET / HTTP/1.1\r\n"

BROKEN = {
    "nothing-known": b"\x00\x01\x02",
    "a-tls-handshake": bytes.fromhex("16030102000100 01fc0303"),
    "http-2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http-0.9": b"GET /\r\n",
    "http-3.0": b"GET / HTTP/3.0\r\nHost: a\r\n\r\n",
    "rtsp": b"OPTIONS rtsp://a/ RTSP/1.0\r\n\r\n",
    "mail": b"EHLO here\r\n",
    "a-proxy's-preface": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
    "connect": b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "an-unknown-method": b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n",
    "a-small-method": b"get / HTTP/1.1\r\nHost: a\r\n\r\n",
    "no-path": b"GET nowhere HTTP/1.1\r\nHost: a\r\n\r\n",
    "bare-line-feeds": b"GET / HTTP/1.1\nHost: a\n\n",
    "no-host": LINE + b"\r\n",
    "two-hosts": LINE + b"Host: a\r\nHost: b\r\n\r\n",
    "a-host-with-a-path": LINE + b"Host: a/b\r\n\r\n",
    "a-host-with-a-user": LINE + b"Host: u@a\r\n\r\n",
    "a-length-that-is-no-number": POST + b"Content-Length: four\r\n\r\n",
    "a-negative-length": POST + b"Content-Length: -1\r\n\r\n",
    "a-length-with-a-sign": POST + b"Content-Length: +4\r\n\r\nabcd",
    "a-length-that-overflows": POST + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
    "no-length": POST + b"Content-Length: \r\n\r\n",
    "a-list-of-lengths": POST + b"Content-Length: 4, 4\r\n\r\nabcd",
    "two-lengths": POST + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
    "a-length-and-chunks": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
    "chunks-and-a-length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n",
    "another-coding": POST + b"Transfer-Encoding: gzip\r\n\r\n",
    "another-coding-below-chunks": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "a-coding-like-chunks": POST + b"Transfer-Encoding: xchunked\r\n\r\n",
    "chunks-in-chunks": CHUNKED.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "chunks-of-http-1.0": CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "a-nul-in-a-header": LINE + b"Host: a\r\nX: a\x00b\r\n\r\n",
    "a-nul-in-a-header's-name": LINE + b"Host: a\r\nX\x00: a\r\n\r\n",
    "a-nul-in-an-upgrade": LINE + b"Host: a\r\nUpgrade: a\x00b\r\n\r\n",
    "a-bare-carriage-return": LINE + b"Host: a\r\nX: a\rX-API-Key: b\r\n\r\n",
    "a-folded-header": LINE + b"Host: a\r\nX: a\r\n b\r\n\r\n",
    "a-folded-upgrade": LINE + b"Host: a\r\nX: a\r\nUpgrade: b\r\n c\r\n\r\n",
    "a-space-before-a-colon": LINE + b"Host : a\r\n\r\n",
    "no-colon": LINE + b"Host: a\r\nX\r\n\r\n",
    "bytes-in-a-path": b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    "a-chunk-of-no-size": CHUNKED + b"zz\r\n",
    "a-chunk-of-too-much": CHUNKED + b"f" * 17 + b"\r\n",
    "a-chunk-longer-than-its-size": CHUNKED + b"1\r\nabc\r\n",
    "a-chunk-between-line-feeds": CHUNKED + b"4\nabcd\n0\n\n",
    "a-nul-in-a-trailer": CHUNKED + b"0\r\nX: \x00\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN)
def test_what_is_no_request_is_a_problem_and_reaches_no_route(sent: bytes) -> None:
    heard = hear([sent])

    heard.refusal()
    assert heard.requests == []


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN)
def test_nothing_after_what_is_no_request_is_read_as_one(sent: bytes) -> None:
    """What a proxy took for its body would be a request of its own here."""
    heard = hear([sent, GET])

    heard.refusal()
    assert heard.requests == []


def test_a_refusal_has_an_id_in_the_log_and_a_place_in_the_metrics(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    heard = hear([LINE + b"X: " + SECRET + b"\x00\r\n\r\n"])

    [line] = [vars(one) for one in caplog.records if one.name == "passerby.request"]
    assert (line["status"], line["route"]) == (400, "unknown")
    assert line["problem"] == "invalid-request"
    assert line["address"] == "192.0.2.7"
    assert line["reason"] == heard.refusal()["detail"]
    assert b'requests_total{route="unknown",status="400"} 1.0' in heard.metrics.expose()[0]
    assert b"passerby_requests_in_flight 0.0" in heard.metrics.expose()[0]
    assert SECRET.decode() not in caplog.text


def test_the_id_of_a_refusal_is_new_and_in_its_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    caplog.handler.setFormatter(JsonFormatter())

    ids = [hear([b"X-Request-ID: mine\r\n"]).refusal()["request_id"] for _ in range(2)]

    lines = [json.loads(line) for line in caplog.text.splitlines()]
    logged = [line["request_id"] for line in lines if line["logger"] == "passerby.request"]
    assert logged == ids
    assert len({*ids, "mine"}) == 3


@pytest.mark.parametrize(
    ("sent", "told"),
    [("a-tls-handshake", "got a TLS handshake"), ("http-2", "got HTTP/2"), ("connect", "CONNECT"),
     ("two-hosts", "expected one Host header, got 2"), ("another-coding", "but chunked")],
)  # fmt: skip
def test_a_refusal_says_what_came(sent: str, told: str) -> None:
    assert told in hear([BROKEN[sent]]).refusal()["detail"]


def test_what_cannot_be_read_is_answered_after_what_could() -> None:
    """Else the first answer would be taken for the first request's."""
    heard = hear([GET + FIXED + b"\x00"])

    heard.refusal()
    assert heard.paths() == ["/a", "/b"]
    assert [part[:3] for part in heard.wire.said.split(b"HTTP/1.1 ")[1:]] == [
        b"200",
        b"200",
        b"400",
    ]


def test_a_broken_body_behind_another_request_is_answered_after_it() -> None:
    heard = hear([GET + CHUNKED + b"zz\r\n"])

    heard.refusal()
    assert heard.paths() == ["/a"]
    assert heard.wire.said.count(b"HTTP/1.1 ") == 2


def test_an_address_as_for_a_proxy_is_a_path() -> None:
    heard = hear([GET.replace(b"/a", b"HTTP://other.example:80" + path)
                  for path in (b"/a?b=c", b"", b"?b=c")])  # fmt: skip

    assert heard.paths() == ["/a", "/", "/"]


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
@pytest.mark.parametrize("request_", [FIXED, CHUNKS], ids=["fixed", "chunks"])
def test_who_asks_for_another_protocol_is_answered_in_this_one(
    request_: bytes, protocol: bytes
) -> None:
    """Its body is its body: not dropped, and no request of its own."""
    asked = b"\r\nConnection: Upgrade\r\nUPGRADE: " + protocol + b"\r\n"
    head, _, body = request_.replace(b"\r\n", asked, 1).partition(b"\r\n\r\n")

    heard = hear([head + b"\r\n\r\n", body, GET])

    assert heard.bodies() == [*hear([request_]).bodies(), b""]
    assert heard.paths() == ["/b", "/a"]
    assert heard.is_open


def test_a_trailer_is_no_header() -> None:
    heard = hear([CHUNKED + b"1\r\na\r\n0\r\nX-API-Key: k\r\n\r\n"])

    [(_, _, headers, body)] = heard.requests
    assert body == b"a"
    assert [name for name, _ in headers] == [b"host", b"transfer-encoding"]


@pytest.mark.parametrize(
    ("begin", "flood"),
    [(b"", b"1;" + b"x" * 2 * CHUNK_SHARE + b"\r\na\r\n"), (b"1;", b"x"), (b"0\r\n", b"X: y\r\n")],
    ids=["extensions", "one-extension", "trailers"],
)
def test_a_body_that_is_little_but_its_wrapping_is_refused(begin: bytes, flood: bytes) -> None:
    body = b"5\r\nabcde\r\n"

    heard = hear([CHUNKED + body + begin, *[flood] * 500], head_bytes=SMALL)

    assert "chunks" in heard.refusal()["detail"]


def test_a_body_in_chunks_of_single_bytes_is_a_body() -> None:
    heard = hear([CHUNKED, *[b"1\r\nx\r\n"] * 1000, b"0\r\n\r\n"], head_bytes=SMALL)

    assert heard.bodies() == [b"x" * 1000]


def test_a_body_of_empty_lines_is_a_body_and_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each might be its end; to look at all of them would take longer than to send them."""
    monkeypatch.setattr(connections, "LOOKS", 10)
    lines = b"\r\n" * 100

    heard = hear([CHUNKED + b"c8\r\n" + lines + b"\r\n0\r\n\r\n" + GET, GET])

    assert heard.bodies() == [lines]
    assert heard.wire.said.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in heard.wire.said
    assert not heard.is_open


def head_of(size: int, begin: bytes = b"GET /last HTTP/1.1\r\nHost: a\r\nX: ") -> bytes:
    return begin + b"x" * (size - len(begin) - 4) + b"\r\n\r\n"


EARLIER = {"nothing": b"", "empty-lines": b"", "get": GET, "fixed": FIXED, "chunks": CHUNKS}


@pytest.mark.parametrize("earlier", EARLIER)
@given(places=st.lists(st.integers(0, SMALL + len(CHUNKS)), max_size=6), size=st.integers(-2, 2))
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_the_bound_on_a_head_is_the_same_however_it_is_cut(
    earlier: str, places: list[int], size: int
) -> None:
    """Also where it comes in one piece, and in one with the end of an earlier request."""
    blank = b"\r\n\r\n\r\n" if earlier == "empty-lines" else b""  # it belongs to the head

    heard = hear(
        list(cut(EARLIER[earlier] + blank + head_of(SMALL + size - len(blank)), places)), SMALL
    )

    assert ("/last" in heard.paths()) == (size <= 0)
    if size > 0:
        assert heard.refusal()["detail"] == f"expected a head of at most {SMALL} bytes, got more"
    assert len(heard.requests) == (EARLIER[earlier] != b"") + (size <= 0)


@pytest.mark.parametrize("left", range(1, 5))
def test_a_head_right_behind_chunks_that_came_byte_by_byte_is_bounded(left: int) -> None:
    """The end of the chunks is cut in its middle, and comes with the head."""
    singly = [CHUNKS[at : at + 1] for at in range(len(CHUNKS) - left)]

    heard = hear([*singly, CHUNKS[-left:] + head_of(SMALL + 1)], SMALL)

    assert heard.paths() == ["/b"]
    assert "at most 300 bytes" in heard.refusal()["detail"]


@given(
    order=st.lists(st.sampled_from([GET, FIXED, CHUNKS]), min_size=1, max_size=5),
    places=st.lists(st.integers(0, 5 * len(CHUNKS)), max_size=8),
)
@settings(max_examples=200, derandomize=True, database=None, deadline=None)
def test_requests_are_the_same_however_they_are_cut(order: list[bytes], places: list[int]) -> None:
    sent = b"".join(order)

    heard = hear(list(cut(sent, [place for place in places if place < len(sent)])))

    expected = {GET: b"", FIXED: b"ab\r\n\r\ncd", CHUNKS: b"\r\n\r\ncd"}
    assert heard.bodies() == [expected[one] for one in order]
    assert heard.is_open


@given(
    sent=st.lists(
        st.sampled_from([GET, FIXED, CHUNKS, CHUNKED, POST, *BROKEN.values()])
        | st.binary(max_size=20)
        | st.sampled_from([b"\r\n", b"\r", b"\n", b"0\r\n\r\n", b"5\r\n", b"Upgrade: h2c\r\n"]),
        max_size=6,
    ),
    places=st.lists(st.integers(0, 400), max_size=6),
)
@settings(max_examples=300, derandomize=True, database=None, deadline=None)
def test_whatever_comes_is_answered_the_same_however_it_is_cut(
    sent: list[bytes], places: list[int]
) -> None:
    """No bytes end in an error of ours, and what is a request does not depend on the network."""
    whole = b"".join(sent)

    once = hear([whole]) if whole else hear([])
    often = hear(list(cut(whole, [place for place in places if place < len(whole)])))

    assert often.requests == once.requests
    assert often.is_open == once.is_open
