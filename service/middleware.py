"""What happens around every request: id, log line, key, bound on the body, last resort."""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import PayloadTooLargeError, UnauthenticatedError
from service.logs import request_id
from service.problems import KINDS, internal_problem, problem

log = logging.getLogger("passerby.request")
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
DRAIN_S = 5.0
OPEN_PATHS = frozenset({"/livez", "/readyz"})


class RequestMiddleware:
    """Gives each request an id and a log line, and answers 500 for what nobody else caught."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        current = given if _ID.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(current)
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = current
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            log.info("the client hung up", extra=_line(scope, 499, started))
        except Exception:
            log.exception("unexpected error", extra=_line(scope, 500, started))
            if status == 0:
                await internal_problem()(scope, receive, send_with_id)
        else:
            quiet = scope["path"] in OPEN_PATHS and status == 200
            level = logging.DEBUG if quiet else logging.INFO
            log.log(level, "request", extra=_line(scope, status, started))
        finally:
            request_id.reset(token)


def _line(scope: Scope, status: int, started: float) -> dict[str, object]:
    route = scope.get("route")
    return {
        "method": scope["method"],
        "route": getattr(route, "path", "unknown"),
        "status": status,
        "duration_ms": round((time.perf_counter() - started) * 1000, 1),
    }


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
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(given.strip())
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
        headers = Headers(scope=scope)
        is_upload = headers.get("content-type", "").lower().startswith("multipart/")
        limit_bytes = self._upload_bytes if is_upload else self._other_bytes
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit_bytes:
            detail = f"expected a request of at most {limit_bytes} bytes, got {announced}"
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
        if scope["type"] != "http" or not _has_body(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        # A client that asked whether to go on sends nothing until somebody reads.
        is_sending = Headers(scope=scope).get("expect", "").lower() != "100-continue"

        async def receive_noting() -> Message:
            nonlocal is_sending
            message = await receive()
            is_sending = message.get("more_body", False)
            return message

        async def send_after_all(message: Message) -> None:
            if message["type"] == "http.response.start":
                taken = 0
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN_S):
                        while is_sending and taken <= self._limit_bytes:
                            taken += len((await receive_noting()).get("body", b""))
            await send(message)

        await self._app(scope, receive_noting, send_after_all)


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
