"""What happens around every request: id, log line, key, bound on the body, last resort."""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Sequence

from pydantic import SecretStr
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import PayloadTooLargeError, UnauthenticatedError
from service.logs import begin_notes, request_id
from service.metrics import UNKNOWN, Metrics
from service.problems import KINDS, internal_problem, problem

log = logging.getLogger("passerby.request")
_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
DRAIN_S = 5.0
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
            log.warning("cut off by the end of the service", extra=running.end(status or 500))
            raise
        except Exception:
            answer = internal_problem()
            log.exception("unexpected error", extra=running.end(500))
            if status == 0:
                await answer(scope, receive, send_with_id)
        else:
            quiet = scope["path"] in QUIET_PATHS and status == 200
            level = logging.DEBUG if quiet else logging.INFO
            log.log(level, "request", extra=running.end(status or 500))


class _Running:
    """A request under way."""

    def __init__(self, scope: Scope, metrics: Metrics) -> None:
        self._scope = scope
        self._metrics = metrics
        self._started = time.perf_counter()
        given = _header(scope, b"x-request-id")
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
        route = getattr(scope.get("route"), "path", UNKNOWN)
        self._metrics.end_request(route, status, seconds)
        reason = self._notes.get("problem")
        if reason is not None and scope["method"] == "POST" and scope["path"] in UPLOAD_PATHS:
            self._metrics.reject(str(reason))
        return {
            "method": scope["method"],
            "route": route,
            "status": status,
            "duration_ms": round(seconds * 1000, 1),
            **self._notes,
        }


def _header(scope: Scope, name: bytes) -> bytes:
    """The first header of a name in lower case, as servers write names; empty where none is."""
    for found, value in scope["headers"]:
        if found == name:
            return bytes(value)
    return b""


class KeyMiddleware:
    """Lets in only who carries one of the keys; the probes are open."""

    def __init__(self, app: ASGIApp, keys: Sequence[SecretStr]) -> None:
        self._app = app
        self._digests = [_digest(key.get_secret_value()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._knows(scope):
            await self._app(scope, receive, send)
            return
        answer = problem(
            KINDS[UnauthenticatedError],
            "expected a known key in Authorization: Bearer or X-API-Key, got none",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await answer(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        scheme, _, token = _header(scope, b"authorization").partition(b" ")
        given = token if scheme.lower() == b"bearer" else _header(scope, b"x-api-key")
        digest = _digest(given.decode("latin-1").strip())
        # All are compared, each in constant time: how long it takes says nothing.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class BodyLimitMiddleware:
    """Bounds bodies, those that announce their length and those that do not.

    Args:
        app: What is behind it.
        upload_bytes: Of a multipart body at most.
        other_bytes: Of any other body at most.
    """

    def __init__(self, app: ASGIApp, *, upload_bytes: int, other_bytes: int) -> None:
        self._app = app
        self._upload_bytes = upload_bytes
        self._other_bytes = other_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_upload = _header(scope, b"content-type").lower().startswith(b"multipart/")
        limit_bytes = self._upload_bytes if is_upload else self._other_bytes
        announced = _header(scope, b"content-length")
        if announced.isdigit() and int(announced) > limit_bytes:
            detail = f"expected a request of at most {limit_bytes} bytes, got {announced.decode()}"
            await problem(KINDS[PayloadTooLargeError], detail)(scope, receive, send)
            return
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit_bytes:
                # The one error that FastAPI lets through while it reads a JSON body.
                raise HTTPException(
                    413, f"expected a request of at most {limit_bytes} bytes, got more"
                )
            return message

        await self._app(scope, receive_bounded, send)


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
        is_sending = _header(scope, b"expect").lower() != b"100-continue"

        async def receive_noting() -> Message:
            nonlocal is_sending
            message = await receive()
            is_sending = message.get("more_body", False)
            return message

        async def send_after_all(message: Message) -> None:
            if message["type"] == "http.response.start" and is_sending:
                taken = 0
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN_S):
                        while is_sending and taken <= self._limit_bytes:
                            taken += len((await receive_noting()).get("body", b""))
            await send(message)

        await self._app(scope, receive_noting, send_after_all)


def _has_body(scope: Scope) -> bool:
    for name, value in scope["headers"]:
        if name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
            return True
    return False
