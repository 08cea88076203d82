"""Multipart bodies, byte for byte, and clients that go away."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient
from starlette.types import Message

from index.embedded import EmbeddedGallery
from service.app import create_app
from service.settings import LimitSettings, Settings
from tests.service.conftest import (
    FakeEmbedder,
    Start,
    assert_problem,
    assert_refused,
    enrol,
)
from tests.service.making import FORM_TYPE, GOOD, GREEN, form, picture

FRAME = ("frames", "0.jpg", picture())


def test_a_body_written_by_hand_is_read(client: TestClient) -> None:
    body = form([FRAME, FRAME, ("identity", None, b"p1")])

    answer = client.post("/gallery", content=body, headers=FORM_TYPE)

    assert answer.status_code == 201
    assert answer.json()["identity"] == "p1"


def test_a_file_is_a_file_without_its_name(client: TestClient) -> None:
    """Some client libraries leave ``filename`` out."""
    answer = client.post("/gallery", content=form([("frames", None, picture())]), headers=FORM_TYPE)

    assert answer.status_code == 201


@pytest.mark.parametrize("name", ["", None])
def test_a_file_field_that_was_left_blank_is_not_there(
    client: TestClient, name: str | None
) -> None:
    """A page's form sends it with an empty file name, the page of documentation without any."""
    body = form([FRAME, ("archive", name, b""), ("video", name, b"")])

    answer = client.post("/gallery", content=body, headers=FORM_TYPE)

    assert answer.status_code == 201
    assert answer.json()["frames"]["received"] == 1


def test_the_content_type_may_be_written_in_capitals(start: Start) -> None:
    """Media types do not distinguish case, and the bound for other bodies is not for uploads."""
    client = start(limits=LimitSettings(metadata_bytes=16))
    headers = {"Content-Type": "Multipart/Form-Data; boundary=xyz"}

    answer = client.post("/gallery", content=form([FRAME]), headers=headers)

    assert answer.status_code == 201


@pytest.mark.parametrize("cut", [1, 3, 30, 500])
def test_a_body_that_ends_early_is_refused(client: TestClient, cut: int) -> None:
    body = form([FRAME, FRAME])
    # The last line break is optional, so the first cut is one byte into the closing boundary.
    content = body[: len(body) - 2 - cut]

    answer = client.post("/gallery", content=content, headers=FORM_TYPE)

    assert_refused(client, answer, 400, "invalid-request")


@pytest.mark.parametrize(
    "body",
    [b"", b"nothing of the kind", b"--xyz\r\nbroken header\r\n\r\n", b"--xyz", b"--abc\r\n\r\n",
     b'--xyz\r\nContent-Disposition: form-data; filename="a"\r\n\r\nx\r\n--xyz--\r\n',
     b"--xyz\r\n\r\nx\r\n--xyz--\r\n", b"--xyz\r\n" + b"A" * 100_000],
    ids=["empty", "text", "header", "start", "other", "nameless", "headless", "long"],
)  # fmt: skip
def test_a_malformed_body_is_refused(client: TestClient, body: bytes) -> None:
    answer = client.post("/gallery", content=body, headers=FORM_TYPE)

    assert_refused(client, answer, 400, "invalid-request")


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary="])
def test_a_form_without_a_boundary_is_refused(client: TestClient, kind: str) -> None:
    answer = client.post("/gallery", content=form([FRAME]), headers={"Content-Type": kind})

    assert_refused(client, answer, 400, "invalid-request")


@pytest.mark.parametrize("path", ["/gallery", "/query", "/embed"])
@pytest.mark.parametrize(
    "kind", ["application/json", "application/x-www-form-urlencoded", "multipart/mixed", None]
)
def test_a_body_of_another_type_is_refused(client: TestClient, path: str, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}

    answer = client.post(path, content=b'{"frames": []}', headers=headers)

    assert_refused(client, answer, 415, "unsupported-media")


def test_an_unknown_field_is_refused(client: TestClient) -> None:
    answer = client.post("/gallery", files=GOOD, data={"idenity": "p1"})

    body = assert_refused(client, answer, 422, "validation")
    assert "idenity" in body["errors"][0]["pointer"]


@pytest.mark.parametrize("path", ["/query", "/embed"])
@pytest.mark.parametrize("field", ["top_k", "identity"])
def test_fields_where_none_are_read_are_refused(client: TestClient, path: str, field: str) -> None:
    """Else a ``top_k`` sent as a form field would be ignored without a word."""
    answer = client.post(path, files=GOOD, data={field: "3"})

    assert_refused(client, answer, 422, "validation")


def test_a_file_in_an_unknown_field_is_refused(client: TestClient) -> None:
    answer = client.post("/gallery", files=[("image", ("0.jpg", picture()))])

    assert_refused(client, answer, 422, "validation")


def test_a_repeated_field_is_refused(client: TestClient) -> None:
    body = form([FRAME, ("identity", None, b"p1"), ("identity", None, b"p2")])

    answer = client.post("/gallery", content=body, headers=FORM_TYPE)

    assert_refused(client, answer, 422, "validation")


def test_a_field_that_is_not_text_is_refused(client: TestClient) -> None:
    body = form([FRAME, ("identity", None, b"\xff\xfe")])

    answer = client.post("/gallery", content=body, headers=FORM_TYPE)

    assert_refused(client, answer, 422, "validation")


def test_an_answer_to_thousands_of_fields_is_short(client: TestClient) -> None:
    body = form([FRAME, *((f"f{number}", None, b"") for number in range(5000))])

    answer = client.post("/gallery", content=body, headers=FORM_TYPE)

    assert_refused(client, answer, 422, "validation")
    assert len(answer.content) < 10_000


def test_a_request_that_announces_too_much_is_refused(start: Start) -> None:
    client = start(limits=LimitSettings(request_bytes=100_000))
    body = form([FRAME, ("identity", None, bytes(100_000))])

    answer = client.post("/gallery", content=body, headers=FORM_TYPE)

    detail = assert_refused(client, answer, 413, "payload-too-large")["detail"]
    assert "100000" in detail
    assert str(len(body)) in detail  # known before it is read


def test_a_chunked_request_over_the_limit_is_refused(start: Start) -> None:
    client = start(limits=LimitSettings(request_bytes=100_000))

    def chunks() -> Iterator[bytes]:
        body = form([FRAME] * 300)
        assert len(body) > 100_000
        yield from (body[at : at + 4096] for at in range(0, len(body), 4096))

    answer = client.post("/gallery", content=chunks(), headers=FORM_TYPE)

    assert_refused(client, answer, 413, "payload-too-large")


def test_the_default_limit_of_a_request_is_64_mib(client: TestClient) -> None:
    body = form([FRAME, *[("frames", "big.jpg", bytes(14 * 1024 * 1024))] * 5])

    answer = client.post("/gallery", content=body, headers=FORM_TYPE)

    assert_refused(client, answer, 413, "payload-too-large")


def test_many_more_frames_than_the_limit_are_refused(start: Start) -> None:
    client = start(limits=LimitSettings(frames=3))

    answer = client.post("/gallery", content=form([FRAME] * 4), headers=FORM_TYPE)

    assert_refused(client, answer, 413, "too-many-frames")


def scope(path: str, body_type: str) -> dict[str, Any]:
    """What a server hands an ASGI app for a POST."""
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "headers": [(b"content-type", body_type.encode())],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
    }  # fmt: skip


async def drive(app: Any, path: str, body_type: str, messages: list[Message]) -> list[Message]:
    """Send an app these messages, one by one; returns what it sent."""
    sent: list[Message] = []
    waiting = iter(messages)

    async def receive() -> Message:
        for message in waiting:
            return message
        if messages[-1]["type"] == "http.request":
            await asyncio.Event().wait()  # the client waits for its answer
        return messages[-1]

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope(path, body_type), receive, send)
    return sent


@pytest.mark.parametrize("size", [1, 7, 300])
def test_a_body_that_arrives_in_pieces_is_the_same_body(client: TestClient, size: int) -> None:
    body = form([FRAME, ("frames", "1.jpg", picture(GREEN)), ("tracklet_id", None, b"t1")])
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    messages: list[Message] = [
        *({"type": "http.request", "body": piece, "more_body": True} for piece in pieces),
        {"type": "http.request"},
    ]

    sent = asyncio.run(drive(client.app, "/gallery", FORM_TYPE["Content-Type"], messages))
    again = client.post("/gallery", content=body, headers=FORM_TYPE)

    assert sent[0]["status"] == 201
    assert again.status_code == 200  # with other content, it would be 409


@pytest.mark.parametrize("path", ["/gallery", "/query", "/embed"])
def test_a_client_that_hangs_up_in_mid_upload_leaves_nothing(
    client: TestClient, embedder: FakeEmbedder, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    caplog.set_level("INFO")
    body = form([FRAME, FRAME])
    messages: list[Message] = [
        {"type": "http.request", "body": body[:400], "more_body": True},
        {"type": "http.disconnect"},
    ]

    sent = asyncio.run(drive(client.app, path, FORM_TYPE["Content-Type"], messages))

    assert sent == []
    assert embedder.batches == []
    assert "hung up" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert client.get("/gallery").json()["items"] == []
    enrol(client)


def test_a_client_that_hangs_up_gives_its_place_back(start: Start) -> None:
    """Otherwise the service answers 429 for good after a few of them."""
    client = start(limits=LimitSettings(uploads=1))
    messages: list[Message] = [{"type": "http.disconnect"}]

    for _ in range(3):
        asyncio.run(drive(client.app, "/gallery", FORM_TYPE["Content-Type"], messages))

    enrol(client)


@pytest.fixture
def address(embedder: FakeEmbedder, tmp_path: Any) -> Iterator[tuple[str, int]]:
    """A real server on loopback."""
    app = create_app(embedder, EmbeddedGallery(tmp_path / "served"), Settings())
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive()


def ask(address: tuple[str, int], request: bytes) -> bytes:
    """Send bytes over a socket, and read until the server closes."""
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def post(path: str, body: bytes, length: int | None = None) -> bytes:
    """A POST as bytes."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Type: {FORM_TYPE['Content-Type']}\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    ).encode() + body


def test_a_real_client_that_hangs_up_hurts_nobody(
    address: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    body = form([FRAME, FRAME])
    for cut in (10, 400, len(body) - 5):
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(post("/gallery", body[:cut], length=len(body)))

    answer = ask(address, post("/gallery", body))
    listed = ask(address, b"GET /gallery HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 201")
    assert listed.count(b'"tracklet_id"') == 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("path", ["/query?top_k=0", "/gallery"])
def test_a_real_client_that_is_refused_in_mid_upload_sees_why(
    address: tuple[str, int], path: str
) -> None:
    """Not a reset connection, though megabytes of its upload were still on their way."""
    body = form([("image", "0.jpg", b"x"), ("frames", "1.jpg", bytes(8 * 1024 * 1024))])

    answer = ask(address, post(path, body))

    assert answer.startswith(b"HTTP/1.1 422")
    assert b"/problems/validation" in answer


def test_a_form_refused_for_its_fields_still_has_a_request_id(client: TestClient) -> None:
    answer = client.post(
        "/gallery", files=GOOD, data={"camera": "a b"}, headers={"X-Request-ID": "mine"}
    )

    assert assert_problem(answer, 422, "validation")["request_id"] == "mine"
