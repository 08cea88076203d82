"""The connections of a server: how many there may be, and how long they may be silent."""

import asyncio
import enum
import http
import logging
import resource
import time
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from service.errors import InvalidRequestError, OverloadedError
from service.hanging_up import HANG_UP_STATE, HangUp
from service.logs import request_id
from service.metrics import Metrics
from service.middleware import SPARE_STATE, too_many_connections
from service.problems import KINDS, Kind, problem
from service.settings import LimitSettings

log = logging.getLogger(__name__)
# Seconds until a request's head has to be complete: from the connection on, or from the first byte
# after an answer. Until that byte, uvicorn's own 5 s count.
HEAD_S = 10.0
HEAD_BYTES = 64 * 1024  # browsers send 2 KiB, proxies allow 8 to 64
# Connections beyond the bound that are still let in, so that a full service can say that it is
# well. As many are on their way to a refusal at the same time, or a probe finds no room.
SPARE = 32
# Seconds after which a connection that has asked for nothing yet makes room for another one, where
# there is no other room. Thousands that say nothing cost no more than that.
SILENT_S = 1.0
# Seconds between two lines about connections that were turned away.
TELL_S = 1.0
# The store, its readers, decoders, libraries: descriptors that are no connections.
OTHER_DESCRIPTORS = 512


class _Place(enum.Enum):
    """What a connection was let in for."""

    REGULAR = enum.auto()
    SPARE = enum.auto()  # for one answer: to a probe, or that there is no room


class Connections:
    """Counts the connections of one server, and decides who is let in.

    Those beyond the bound are let in for one answer (`service.middleware.SpareMiddleware`); those
    beyond these hear 429 and are closed. Uvicorn's own bound answers 503 to everybody, which says
    that the service is broken.

    Args:
        limits: ``connections`` at a time; ``upload_s`` for a body that goes on after its answer.
        metrics: Count who was turned away.
        head_s: Seconds until the head of a request has to be complete.
        spare: Connections beyond the bound.
    """

    def __init__(
        self,
        limits: LimitSettings,
        metrics: Metrics,
        *,
        head_s: float = HEAD_S,
        spare: int = SPARE,
    ) -> None:
        self._limits = limits
        self._metrics = metrics
        self._free = {_Place.REGULAR: limits.connections, _Place.SPARE: spare}
        self._silent: dict[_BoundedProtocol, float] = {}  # since when, the oldest first
        self._turned_away = 0
        self.head_s = head_s

    @property
    def body_s(self) -> float:
        """Seconds that a client may go on sending a body whose answer it has."""
        return self._limits.upload_s

    def protocol(self, base: type[asyncio.Protocol] = AutoHTTPProtocol) -> type[asyncio.Protocol]:
        """One of uvicorn's protocols under these bounds."""
        return type("BoundedProtocol", (_BoundedProtocol, base), {"bounds": self})

    def enter(self, protocol: "_BoundedProtocol") -> _Place | None:
        """Take a place, from who has been silent for long where none is free; None for none."""
        if not self._free[_Place.REGULAR]:
            self._make_room()
        for place in _Place:
            if self._free[place] > 0:
                self._free[place] -= 1
                self._silent[protocol] = time.monotonic()
                return place
        return None

    def _make_room(self) -> None:
        oldest = next(iter(self._silent), None)
        if oldest is not None and time.monotonic() - self._silent[oldest] > SILENT_S:
            oldest.give_way()

    def heard(self, protocol: "_BoundedProtocol") -> None:
        """Know that a connection has asked for something."""
        self._silent.pop(protocol, None)

    def leave(self, place: _Place) -> None:
        """Give a place back."""
        self._free[place] += 1

    def turn_away(self, transport: asyncio.Transport) -> None:
        """Answer 429 to a connection without a place, and close it."""
        error = too_many_connections(self._limits.connections)
        headers = {"Retry-After": str(error.retry_after_s)}
        transport.write(_raw_problem(KINDS[OverloadedError], str(error), headers))
        transport.close()
        self._metrics.reject(KINDS[OverloadedError].slug)
        if self._turned_away == 0:
            asyncio.get_running_loop().call_later(TELL_S, self._tell)
        self._turned_away += 1

    def _tell(self) -> None:
        log.warning("connections were turned away", extra={"connections": self._turned_away})
        self._turned_away = 0


class _BoundedProtocol(asyncio.Protocol):
    """What uvicorn's protocols lack, to be mixed into one of them: a place, and a clock for heads.

    Uvicorn closes a connection that says nothing after an answer, but neither one that never said
    anything nor one whose head never ends.
    """

    bounds: ClassVar[Connections]
    # Uvicorn's.
    app_state: dict[str, Any]  # a copy of it becomes the ``state`` of each request's scope
    cycle: Any  # the last request with a complete head
    transport: asyncio.Transport

    _place: _Place | None = None
    _hang_up: HangUp
    _clock: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None  # while an answer waits for its client
    _last_cycle: Any = None  # as `cycle` was when the last bytes had been read
    # Bytes since the head at hand began; None outside a head. Only httptools needs to be told: h11
    # has a bound of its own.
    _head_bytes: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Let a connection in, or turn it away (asyncio)."""
        self._hang_up = HangUp()
        self._place = self.bounds.enter(self)
        if self._place is None:
            self.transport = transport
            self.bounds.turn_away(transport)
            return
        spare = {SPARE_STATE: True} if self._place is _Place.SPARE else {}
        self.app_state = {**self.app_state, HANG_UP_STATE: self._hang_up, **spare}
        super().connection_made(transport)
        self._start_clock(self.bounds.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back (asyncio)."""
        self._stop_clock()
        self._stop_waiting()
        self._leave()
        super().connection_lost(exc)
        self._hang_up.happen()

    def give_way(self) -> None:
        """Make room at once; nothing was asked for."""
        self._leave()
        self.transport.abort()

    def _leave(self) -> None:
        self.bounds.heard(self)
        if self._place is not None:
            self.bounds.leave(self._place)
            self._place = None

    def pause_writing(self) -> None:
        """Wait for a client to read, but not for ever (asyncio)."""
        super().pause_writing()
        # As long as it may take to send: who does not read holds his answer in our memory.
        loop = asyncio.get_running_loop()
        self._unread = loop.call_later(self.bounds.body_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on, now that it has read (asyncio)."""
        self._stop_waiting()
        super().resume_writing()

    def _stop_waiting(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def data_received(self, data: bytes) -> None:
        """Read on, and see whether a head has ended or begun (asyncio)."""
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._refuse_head()
                return
        super().data_received(data)
        if self.cycle is not self._last_cycle:
            self._last_cycle = self.cycle
            self.bounds.heard(self)
            self._stop_clock()
        elif self._clock is None and self._is_idle():
            # Not a head where the answer came before the end of the body: who still sends that has
            # as long for it as for any body.
            in_body = self.cycle is not None and self.cycle.more_body
            self._start_clock(self.bounds.body_s if in_body else self.bounds.head_s)

    def on_message_begin(self) -> None:
        """Begin a head (httptools)."""
        self._head_bytes = 0
        super().on_message_begin()  # type: ignore[misc]

    def on_headers_complete(self) -> None:
        """End a head (httptools)."""
        self._head_bytes = None
        super().on_headers_complete()  # type: ignore[misc]

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _refuse_head(self) -> None:
        if self._is_idle():  # else it would come in the middle of another answer
            detail = f"expected a head of at most {HEAD_BYTES} bytes, got more"
            self.transport.write(_raw_problem(KINDS[InvalidRequestError], detail))
        self.transport.close()

    def _start_clock(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._clock = loop.call_later(seconds, self._close_if_idle)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _close_if_idle(self) -> None:
        self._clock = None
        if self._is_idle():  # h11 may have read a waiting head without new bytes
            self.transport.close()


def _raw_problem(kind: Kind, detail: str, headers: Mapping[str, str] | None = None) -> bytes:
    """An answer with an id of its own, as bytes, where no request has reached the app."""
    name = uuid.uuid4().hex
    token = request_id.set(name)
    own = {"X-Request-ID": name, "Connection": "close"}
    answer = problem(kind, detail, headers={**(headers or {}), **own})
    request_id.reset(token)
    status = f"HTTP/1.1 {kind.status} {http.HTTPStatus(kind.status).phrase}".encode()
    return b"\r\n".join(
        [status, *(b": ".join(one) for one in answer.raw_headers), b"", bytes(answer.body)]
    )


def allow_descriptors(connections: int) -> None:
    """Raise the process's bound on open files to what so many connections need.

    Many systems begin with 1024, which is less than the default number of connections takes. At
    that bound nobody would be let in, probes included.

    Args:
        connections: At a time, those beyond the bound included.
    """
    wanted = connections + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning(
            "fewer files may be open (ulimit -n) than so many connections may need",
            extra={"connections": connections, "allowed": allowed, "wanted": wanted},
        )
