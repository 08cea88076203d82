"""Connections: who is let in, what a full service still answers, how long one may be silent."""

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.server import ServerState

from service import connections
from service.connections import HEAD_BYTES, OTHER_DESCRIPTORS, Connections, allow_descriptors
from service.hanging_up import while_connected
from service.metrics import Metrics
from service.middleware import RequestMiddleware, SpareMiddleware
from service.settings import LimitSettings
from tests.service.making import GOOD
from tests.service.processes import WAIT_S, Service, eventually, serving

SHORT_S = 0.05
LONG_S = 600.0
HEAD = b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n"
POST = b"POST /query HTTP/1.1\r\nHost: here\r\nContent-Length: 4\r\n\r\n"


class Client:
    """One connection to a server in this loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self) -> bytes:
        """Head and body of the next answer, which announces its length."""
        async with asyncio.timeout(WAIT_S):
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            return head + await self._reader.readexactly(length)

    async def is_closed(self) -> bool:
        """Wait until the server closes it."""
        async with asyncio.timeout(WAIT_S):
            with contextlib.suppress(ConnectionError):
                return await self._reader.read() == b""
            return True

    async def trickle(self) -> None:
        """Send one byte of a header after the other, for ever."""
        while True:
            self._writer.write(b"x")
            await asyncio.sleep(SHORT_S / 5)

    def stop_reading(self) -> None:
        """Take nothing of what comes."""
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    def close(self) -> None:
        self._writer.close()


class Server:
    """A server in this loop, and those connected to it."""

    def __init__(self, port: int, state: ServerState) -> None:
        self._port = port
        self._state = state
        self._clients: list[Client] = []

    async def connect(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self._port))
        self._clients.append(client)
        return client

    def count(self) -> int:
        """How many connections it has."""
        return len(self._state.connections)

    async def close(self) -> None:
        """Close them all, and wait until the server knows."""
        for client in self._clients:
            client.close()
        while self._state.connections or self._state.tasks:
            await asyncio.sleep(0)


async def echo(_: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    await reply(send, body)


async def reply(send: Send, body: bytes = b"") -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def early(_: Scope, __: Receive, send: Send) -> None:
    """Answers without reading."""
    await reply(send)


def bounds(
    count: int = 8,
    metrics: Metrics | None = None,
    *,
    head_s: float = LONG_S,
    body_s: float = LONG_S,
    spare: int = 0,
) -> Connections:
    limits = LimitSettings(connections=count, upload_s=body_s)
    return Connections(limits, metrics or new_metrics(), head_s=head_s, spare=spare)


def new_metrics() -> Metrics:
    return Metrics(version="0", model="m")


@asynccontextmanager
async def listening(app: ASGIApp, under: Connections) -> AsyncIterator[Server]:
    """Serve an app in this loop."""
    config = uvicorn.Config(app, http=under.protocol(), ws="none", log_config=None)
    config.load()
    state = ServerState()

    def make() -> asyncio.Protocol:
        return config.http_protocol_class(config=config, server_state=state, app_state={})  # type: ignore[call-arg]

    loop = asyncio.get_running_loop()
    async with await loop.create_server(make, "127.0.0.1", 0) as listener:
        server = Server(listener.sockets[0].getsockname()[1], state)
        try:
            yield server
        finally:
            await server.close()


def run(
    claim: Callable[[Server], Awaitable[None]],
    app: ASGIApp,
    under: Connections,
) -> None:
    async def serve() -> None:
        async with listening(app, under) as server:
            await claim(server)

    asyncio.run(serve())


def test_a_connection_that_says_nothing_is_closed() -> None:
    async def claim(server: Server) -> None:
        client = await server.connect()

        assert await client.is_closed()

    run(claim, echo, bounds(head_s=SHORT_S))


def test_an_app_that_waits_for_something_else_is_cancelled_when_its_client_hangs_up() -> None:
    ended: list[str] = []

    async def wait(scope: Scope, receive: Receive, _: Send) -> None:
        await receive()
        try:
            async with while_connected(Request(scope)):  # it has nothing to ask but the connection
                ended.append("begun")
                await asyncio.sleep(WAIT_S)
        except ClientDisconnect:
            ended.append("hung up")

    async def claim(server: Server) -> None:
        client = await server.connect()
        await client.send(POST + b"abcd")
        async with asyncio.timeout(WAIT_S):
            while not ended:
                await asyncio.sleep(0.001)
            client.close()
            while len(ended) < 2:
                await asyncio.sleep(0.001)

        assert ended == ["begun", "hung up"]

    run(claim, wait, bounds())


@pytest.mark.parametrize("spare", [0, 2])
def test_thousands_that_ask_for_nothing_keep_nobody_out(
    spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "SILENT_S", 0.0)

    async def claim(server: Server) -> None:
        asking = await server.connect()
        await asking.send(HEAD)
        await asking.answer()
        silent = [await server.connect() for _ in range(50)]
        await silent[-1].send(HEAD[:-2])  # a part of a head is no question

        late = await server.connect()
        await late.send(HEAD)

        assert b" 200 " in await late.answer()
        await asking.send(HEAD)  # who has asked before keeps its place
        assert b" 200 " in await asking.answer()
        assert await silent[0].is_closed()
        assert server.count() <= 3 + spare

    run(claim, echo, bounds(3, spare=spare))


@pytest.mark.parametrize("earlier", [0, 1], ids=["new", "kept-alive"])
def test_a_head_that_never_ends_is_closed(earlier: int) -> None:
    """Uvicorn's clock begins anew with each byte."""

    async def claim(server: Server) -> None:
        client = await server.connect()
        for _ in range(earlier):
            await client.send(HEAD)
            await client.answer()
        await client.send(HEAD[:-2] + b"X: ")
        trickling = asyncio.create_task(client.trickle())

        assert await client.is_closed()
        trickling.cancel()

    run(claim, echo, bounds(head_s=SHORT_S))


def test_a_slow_body_and_a_slow_answer_are_not_silence() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_late(message: Message) -> None:
            await asyncio.sleep(2 * SHORT_S)
            await send(message)

        await echo(scope, receive, send_late)

    async def claim(server: Server) -> None:
        client = await server.connect()
        for _ in range(2):
            await client.send(POST + b"ab")
            await asyncio.sleep(3 * SHORT_S)
            await client.send(b"cd")

            assert (await client.answer()).endswith(b"\r\n\r\nabcd")

    run(claim, slow, bounds(head_s=SHORT_S, body_s=SHORT_S))


def test_who_still_sends_a_body_after_its_answer_has_the_time_of_a_body() -> None:
    async def claim(server: Server) -> None:
        client = await server.connect()
        await client.send(POST)
        await client.answer()
        await client.send(b"ab")
        await asyncio.sleep(3 * SHORT_S)
        await client.send(b"cd" + HEAD)

        assert (await client.answer()).startswith(b"HTTP/1.1 200 ")

    run(claim, early, bounds(head_s=SHORT_S))


def test_a_body_that_goes_on_for_ever_after_its_answer_is_closed() -> None:
    async def claim(server: Server) -> None:
        client = await server.connect()
        await client.send(POST.replace(b"4", b"400000"))
        await client.answer()
        trickling = asyncio.create_task(client.trickle())

        assert await client.is_closed()
        trickling.cancel()

    run(claim, early, bounds(body_s=SHORT_S))


def test_who_does_not_read_its_answer_is_cut_off() -> None:
    """More than the buffers between them hold would stay in memory for as long as it likes."""
    gone = asyncio.Event()

    async def much(_: Scope, __: Receive, send: Send) -> None:
        await reply(send, bytes(64 * 1024 * 1024))
        gone.set()

    async def claim(server: Server) -> None:
        client = await server.connect()
        client.stop_reading()
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")

        async with asyncio.timeout(WAIT_S):
            await gone.wait()
            while server.count():
                await asyncio.sleep(0.01)

    run(claim, much, bounds(body_s=SHORT_S))


def test_a_head_that_is_too_long_is_refused() -> None:
    async def claim(server: Server) -> None:
        client = await server.connect()
        await client.send(HEAD[:-2] + b"X: ")
        for _ in range(8):
            await client.send(bytes([120]) * (HEAD_BYTES // 4))
            await asyncio.sleep(0)

        answer = await client.answer()

        assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert b"/problems/invalid-request" in answer
        assert await client.is_closed()

    run(claim, echo, bounds())


def full(metrics: Metrics) -> tuple[ASGIApp, Connections]:
    """An app as `service.app` wraps it, and room for one connection and a spare one."""
    app = RequestMiddleware(SpareMiddleware(echo, limit=1), metrics)
    return app, bounds(1, metrics, spare=1)


def test_beyond_the_bound_probes_are_answered_once() -> None:
    """The place is free for the next probe."""

    async def claim(server: Server) -> None:
        await server.connect()
        for _ in range(3):
            client = await server.connect()
            await client.send(HEAD)
            answer = await client.answer()

            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" in answer
            assert await client.is_closed()

    run(claim, *full(new_metrics()))


def test_beyond_the_bound_all_else_is_refused_as_any_request_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = new_metrics()
    caplog.set_level(logging.INFO, "passerby.request")

    async def claim(server: Server) -> None:
        await server.connect()
        client = await server.connect()
        await client.send(POST + b"abcd")
        answer = await client.answer()

        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"/problems/overloaded" in answer
        assert b"retry-after: 1\r\n" in answer
        assert b"x-request-id: " in answer
        assert b"connection: close" in answer

    run(claim, *full(metrics))

    [line] = [one for one in caplog.records if one.name == "passerby.request"]
    assert vars(line)["problem"] == "overloaded"
    assert b'passerby_rejected_total{reason="overloaded"} 1.0' in metrics.expose()[0]


def test_beyond_the_spare_ones_a_connection_is_told_so_and_counted() -> None:
    metrics = new_metrics()

    async def claim(server: Server) -> None:
        for _ in range(2):
            await server.connect()
        answer = await (await server.connect()).answer()

        assert answer.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
        assert b"/problems/overloaded" in answer
        for header in (b"retry-after: 1\r\n", b"x-request-id: ", b"connection: close\r\n"):
            assert header in answer.lower()

    run(claim, *full(metrics))

    assert b'passerby_rejected_total{reason="overloaded"} 1.0' in metrics.expose()[0]


def test_a_place_that_is_given_back_is_a_place_for_anybody() -> None:
    async def claim(server: Server) -> None:
        for _ in range(3):
            client = await server.connect()
            await client.send(POST + b"abcd")

            assert (await client.answer()).startswith(b"HTTP/1.1 200 ")
            await server.close()

    run(claim, *full(new_metrics()))


class Transport(asyncio.Transport):
    """Takes what is written."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written = bytes(data)

    def close(self) -> None:
        pass


def test_who_is_turned_away_is_logged_together(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "TELL_S", SHORT_S)

    def told() -> list[int]:
        return [vars(one)["connections"] for one in caplog.records if "turned away" in one.message]

    async def turn_away() -> None:
        full_ones = bounds()
        for count in (3, 1):
            before = len(told())
            for _ in range(count):
                full_ones.turn_away(Transport())
            while len(told()) == before:
                await asyncio.sleep(0.01)

    asyncio.run(turn_away())

    assert told() == [3, 1]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((1024, 4096), [(1000 + OTHER_DESCRIPTORS, 4096)]),
        ((1024, resource.RLIM_INFINITY), [(1000 + OTHER_DESCRIPTORS, resource.RLIM_INFINITY)]),
        ((4096, 4096), []),
        ((256, 1024), [(1024, 1024)]),
    ],
    ids=["raised", "raised-without-end", "enough", "too-few"],
)
def test_as_many_files_may_be_open_as_connections_need(
    limits: tuple[int, int],
    expected: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: set_to.append(both))

    allow_descriptors(1000)

    assert set_to == expected
    assert ("fewer files may be open" in caplog.text) == (limits == (256, 1024))


def connect(service: Service) -> socket.socket:
    host, _, port = service.address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


@pytest.mark.slow
def test_a_service_full_of_silent_connections_is_well_and_frees_itself(tmp_path: Path) -> None:
    with serving(tmp_path, {"LIMITS__CONNECTIONS": "50"}) as service, ExitStack() as silent:
        for _ in range(50):
            silent.enter_context(connect(service))

        probes = [httpx.get(service.address + path) for path in ("/livez", "/readyz", "/metrics")]

        assert [one.status_code for one in probes] == [200, 200, 200]
        assert eventually(lambda: query(service) == 200)


def query(service: Service) -> int:
    return httpx.post(f"{service.address}/query", files=GOOD, timeout=WAIT_S).status_code


@pytest.mark.slow
def test_beyond_the_spare_connections_one_is_told_so(tmp_path: Path) -> None:
    with serving(tmp_path, {"LIMITS__CONNECTIONS": "2"}) as service:
        with ExitStack() as silent:
            for _ in range(2 + connections.SPARE):
                silent.enter_context(connect(service))
            answer = silent.enter_context(connect(service)).recv(2000)

        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 1" in answer.lower()
        assert b"/problems/overloaded" in answer
        assert eventually(lambda: query(service) == 200)
        assert eventually(lambda: "connections were turned away connections=1" in service.log())
