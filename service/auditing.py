"""What a request tells the audit trail, and when: before its answer, and before a change."""

import asyncio
import ipaddress
import logging
import secrets
from collections.abc import Mapping
from contextvars import ContextVar

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from index.gallery import StorageFullError
from service.access import SCOPE_KEY, Access
from service.audit import Trail
from service.errors import AuditUnavailableError
from service.logs import request_id
from service.middleware import HUNG_UP
from service.problems import KINDS, problem

log = logging.getLogger(__name__)
# Refused before anything was done, as often as somebody asks: the log counts these.
UNTOLD = frozenset({429})
CUT_OFF = 503


class _Deed:
    """One request that the trail tells of.

    Args:
        trail: Where.
        scope: Of the request.
        access: Who asks, and for what.
    """

    def __init__(self, trail: Trail, scope: Scope, access: Access) -> None:
        self.trail = trail
        self.has_begun = False  # to change something
        self._scope = scope
        self._access = access
        self._id = secrets.token_hex(8)
        self._about: dict[str, object] = {}

    def tell(self, about: Mapping[str, object]) -> None:
        """Remember of whom or what the line is."""
        self._about.update(about)

    async def begin(self) -> None:
        """Write that something is about to be changed, once."""
        if not self.has_begun:
            await self.trail.write(self.line(None))
            self.has_begun = True

    def line(self, status: int | None) -> dict[str, object]:
        """Its line; without a status while nobody knows how it ends."""
        key = self._access.key
        client = self._scope.get("client")
        path = self._access.about
        return {
            "id": self._id,
            "action": self._access.rule.action,
            "key": None if key is None else key.label,
            "key_id": None if key is None else key.key_id,
            "role": None if key is None else key.role,
            "address": None if client is None else _address(client[0]),
            "request_id": request_id.get(),
            "tracklet": path.get("tracklet_id"),
            "identity": path.get("identity"),
            **self._about,
            "status": status,
        }


def _address(told: str) -> str | None:
    """An address; a proxy may pass on whatever its client called itself."""
    try:
        return str(ipaddress.ip_address(told))
    except ValueError:
        return None


_deed: ContextVar[_Deed | None] = ContextVar("deed", default=None)


def tell(**about: str | int | list[str] | None) -> None:
    """Add to what the audit trail says of the request at hand; elsewhere nothing happens.

    Args:
        about: Fields of its line. Those of `service.audit.NAMES` are hashed; others must say
            nothing of a person.
    """
    deed = _deed.get()
    if deed is not None:
        deed.tell(about)


async def begin_change() -> None:
    """Tell the audit trail that the request at hand is about to change the gallery.

    Raises:
        StorageFullError: The trail cannot be written, so nothing must be changed.
        AuditUnavailableError: Likewise.
    """
    deed = _deed.get()
    if deed is not None:
        await deed.begin()


class AuditMiddleware:
    """Holds an answer back until the trail tells of it; without that, there is another answer.

    Args:
        app: What is behind it.
        trail: Where to tell; None for nowhere.
    """

    def __init__(self, app: ASGIApp, trail: Trail | None) -> None:
        self._app = app
        self._trail = trail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        access: Access | None = scope.get(SCOPE_KEY)
        if self._trail is None or access is None or access.rule.action is None:
            await self._app(scope, receive, send)
            return
        await _Audited(_Deed(self._trail, scope, access), scope, receive, send).run(self._app)


class _Audited:
    """A request on its way."""

    _is_told = False
    _is_withheld = False

    def __init__(self, deed: _Deed, scope: Scope, receive: Receive, send: Send) -> None:
        self._deed = deed
        self._scope, self._receive, self._send = scope, receive, send

    async def run(self, app: ASGIApp) -> None:
        """Have an app answer it."""
        token = _deed.set(self._deed)
        try:
            await app(self._scope, self._receive, self._send_once_told)
        except asyncio.CancelledError:
            self._tell_later(CUT_OFF)  # who is cancelled must not wait
            raise
        except ClientDisconnect:
            self._tell_later(HUNG_UP)
            raise
        except Exception:
            self._tell_later(500)  # whoever answers has nothing to say but that
            raise
        finally:
            _deed.reset(token)

    def _tell_later(self, status: int) -> None:
        if not self._is_told:
            self._is_told = True
            self._deed.trail.write_later(self._deed.line(status))

    async def _send_once_told(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._is_told:
            self._is_told = True
            status = message["status"]
            if status not in UNTOLD or self._deed.has_begun:
                try:
                    await self._deed.trail.write(self._deed.line(status))
                except (StorageFullError, AuditUnavailableError) as error:
                    self._is_withheld = True
                    await self._refuse(error)
        if not self._is_withheld:
            await self._send(message)

    async def _refuse(self, error: StorageFullError | AuditUnavailableError) -> None:
        """Answer that there is no answer that nobody would know of."""
        detail = str(error)
        if self._deed.has_begun:
            detail += "; what was to be changed may be changed or not"
        retry_after_s = getattr(error, "retry_after_s", None)
        headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        answer = problem(KINDS[type(error)], detail, headers=headers)
        await answer(self._scope, self._receive, self._send)
