"""What happens around every request: id, log line, bounds on the body, last resort."""

import asyncio
import contextlib
import logging
import os
import re
import time

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import (
    DeadlineExceededError,
    NotReadyError,
    OverloadedError,
    PayloadTooLargeError,
)
from service.logs import begin_notes, request_id
from service.metrics import UNKNOWN, Metrics
from service.problems import KINDS, internal_problem, problem

log = logging.getLogger("passerby.request")
_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
# Seconds without a byte of a body after which no more is waited for: whoever sends nothing holds a
# place among the uploads as long.
STALL_S = 10.0
DRAIN_S = 5.0
# On a spare connection: so few are there that none may wait long for a slow client.
SPARE_DRAIN_S = 0.5
# Key of the scope's ``state`` that marks a connection beyond the bound on connections.
SPARE_STATE = "spare_connection"
# Key of the scope for the template of a path that is refused before it is routed.
ROUTE_KEY = "passerby.route"
OPEN_PATHS = frozenset({"/livez", "/readyz"})
QUIET_PATHS = OPEN_PATHS | {"/metrics"}  # asked every few seconds
UPLOAD_PATHS = frozenset({"/gallery", "/query", "/embed", "/verify"})
HUNG_UP = 499  # as proxies call it; nobody is there to see it


class RequestMiddleware:
    """Gives each request an id, a log line and a count; answers 500 for what nobody else caught.

    Args:
        app: What is behind it.
        metrics: Of this app; None where nobody will ask.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics | None = None) -> None:
        self._app = app
        self._metrics = metrics or Metrics(version=UNKNOWN, model=UNKNOWN)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        running = _Running(scope, self._metrics)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                others = [one for one in message.get("headers", ()) if one[0] != b"x-request-id"]
                message["headers"] = [*others, (b"x-request-id", running.id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            log.info("the client hung up", extra=running.end(HUNG_UP))
        except asyncio.CancelledError:
            # By uvicorn, which logs what it cancelled as a mistake and answers a plain 500.
            if status != 0:
                log.warning("cut off by the end of the service", extra=running.end(status))
                raise
            answer = _ended_problem()
            log.warning("cut off by the end of the service", extra=running.end(503))
            await answer(scope, receive, send_with_id)
        except Exception:
            answer = internal_problem()
            log.exception("unexpected error", extra=running.end(500))
            if status == 0:
                await answer(scope, receive, send_with_id)
        else:
            quiet = scope["path"] in QUIET_PATHS and status == 200
            level = logging.DEBUG if quiet else logging.INFO
            log.log(level, "request", extra=running.end(status or 500))


def _ended_problem() -> Response:
    """The answer to what did not end within the grace."""
    return problem(
        KINDS[NotReadyError],
        "the service stops before this has ended; what it was about to store may be stored or not",
        headers={"Retry-After": str(NotReadyError.retry_after_s)},
    )


class _Running:
    """A request under way."""

    def __init__(self, scope: Scope, metrics: Metrics) -> None:
        self._scope = scope
        self._metrics = metrics
        self._started = time.perf_counter()
        given = first_header(scope, b"x-request-id")
        self.id = given if _ID.fullmatch(given) else os.urandom(16).hex().encode()
        # Never reset: the task ends with the request, and what the server logs in it belongs to it.
        request_id.set(self.id.decode())
        self._notes = begin_notes()
        metrics.begin_request()

    def end(self, status: int) -> dict[str, object]:
        """Count it.

        Returns:
            The fields of its line.
        """
        seconds = time.perf_counter() - self._started
        scope = self._scope
        # Whoever is refused at the door has not been routed.
        route = getattr(scope.get("route"), "path", None) or scope.get(ROUTE_KEY) or UNKNOWN
        self._metrics.end_request(route, status, seconds)
        reason = self._notes.get("problem")
        if reason is not None and scope["method"] == "POST" and scope["path"] in UPLOAD_PATHS:
            self._metrics.reject(str(reason))
        client = scope.get("client")
        return {
            "method": scope["method"],
            "route": route,
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            # Of nobody else: who guesses keys has to be found.
            **({"address": client[0]} if client and status in (401, 403) else {}),
            **self._notes,
        }


def first_header(scope: Scope, name: bytes) -> bytes:
    """The first header of a name in lower case, as servers write names; empty where none is."""
    for found, value in scope["headers"]:
        if found == name:
            return bytes(value)
    return b""


class BodyLimitMiddleware:
    """Bounds bodies, those that announce their length and those that do not.

    Args:
        app: What is behind it.
        upload_bytes: Of a multipart body at most.
        other_bytes: Of any other body at most.
        limit_s: Seconds that a body may take to arrive, from when it is first asked for.
    """

    def __init__(
        self, app: ASGIApp, *, upload_bytes: int, other_bytes: int, limit_s: float
    ) -> None:
        self._app = app
        self._upload_bytes = upload_bytes
        self._other_bytes = other_bytes
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = first_header(scope, b"content-type").lower().startswith(b"multipart/")
        limit_bytes = self._upload_bytes if is_upload else self._other_bytes
        announced = first_header(scope, b"content-length")
        if announced.isdigit() and int(announced) > limit_bytes:
            detail = f"expected a request of at most {limit_bytes} bytes, got {announced.decode()}"
            await problem(KINDS[PayloadTooLargeError], detail)(scope, receive, send)
            return
        body = _BoundedBody(receive, send, limit_bytes=limit_bytes, limit_s=self._limit_s)
        await self._app(scope, body.receive, body.send)
        if body.is_late:
            detail = f"expected a body within {self._limit_s:g} s, it took longer"
            if body.is_stalled:
                detail = f"expected a body that goes on, got nothing for {STALL_S:g} s"
            await problem(KINDS[DeadlineExceededError], detail)(scope, receive, send)


class _BoundedBody:
    """A request's body on its way.

    Args:
        receive: The server's.
        send: The server's.
        limit_bytes: Of the body at most.
        limit_s: Until its end, seconds.
    """

    is_late = False  # and nothing has been answered
    is_stalled = False  # long before its time was over

    def __init__(self, receive: Receive, send: Send, *, limit_bytes: int, limit_s: float) -> None:
        self._receive = receive
        self._send = send
        self._limit_bytes = limit_bytes
        self._limit_s = limit_s
        self._end: float | None = None  # on the loop's clock
        self._is_whole = self._is_answered = False
        self._received = 0

    async def receive(self) -> Message:
        """The next message, which comes in time (ASGI).

        Raises:
            HTTPException: The body is too long, or takes too long. It is the one error that FastAPI
                lets through while it reads a JSON body.
        """
        message = await self._receive_in_time()
        self._is_whole = not message.get("more_body", False)
        self._received += len(message.get("body", b""))
        if self._received > self._limit_bytes:
            raise HTTPException(
                413, f"expected a request of at most {self._limit_bytes} bytes, got more"
            )
        return message

    async def _receive_in_time(self) -> Message:
        if self._is_whole:  # what comes now is that the client hangs up, at any time
            return await self._receive()
        now = asyncio.get_running_loop().time()
        if self._end is None:
            self._end = now + self._limit_s
        try:
            async with asyncio.timeout_at(min(self._end, now + STALL_S)):
                return await self._receive()
        except TimeoutError as error:
            self.is_late = not self._is_answered
            self.is_stalled = now + STALL_S < self._end
            raise HTTPException(504) from error

    async def send(self, message: Message) -> None:
        """Pass an answer on (ASGI), but what the app makes of a late body."""
        if not self.is_late:
            self._is_answered = True
            await self._send(message)


class SpareMiddleware:
    """Answers probes alone on connections beyond the bound, so that a full service is not ill.

    Whatever it answers is the last answer there: the next probe needs the place.

    Args:
        app: What is behind it.
        limit: The bound on connections, of which the refusal speaks.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http" or not _is_spare(scope):
            await self._app(scope, receive, send)
            return

        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        if scope["path"] in QUIET_PATHS:
            await self._app(scope, receive, send_last)
            return
        error = too_many_connections(self._limit)
        headers = {"Retry-After": str(error.retry_after_s)}
        answer = problem(KINDS[OverloadedError], str(error), headers=headers)
        await answer(scope, receive, send_last)


def _is_spare(scope: Scope) -> bool:
    """Whether a request came on a connection beyond the bound."""
    return SPARE_STATE in scope.get("state", ())


def too_many_connections(limit: int) -> OverloadedError:
    """What one hears who comes beyond the bound on connections."""
    return OverloadedError(f"expected at most {limit} connections at a time, got more")


class DrainMiddleware:
    """Takes what is left of a request before it is answered: who still sends sees no answer.

    Args:
        app: What is behind it.
        limit_bytes: What is taken at most.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        # A client that asked whether to go on sends nothing until somebody reads.
        is_sending = first_header(scope, b"expect").lower() != b"100-continue"

        async def receive_noting() -> Message:
            nonlocal is_sending
            message = await receive()
            is_sending = message.get("more_body", False)
            return message

        async def send_after_all(message: Message) -> None:
            if message["type"] == "http.response.start" and is_sending:
                taken = 0
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SPARE_DRAIN_S if _is_spare(scope) else DRAIN_S):
                        while is_sending and taken <= self._limit_bytes:
                            taken += len((await receive_noting()).get("body", b""))
            await send(message)

        await self._app(scope, receive_noting, send_after_all)


def _has_body(scope: Scope) -> bool:
    for name, value in scope["headers"]:
        if name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
            return True
    return False
