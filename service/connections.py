"""The connections of a server: how many there may be, and how long they may be silent."""

import asyncio
import contextlib
import enum
import http
import logging
import resource
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import InvalidRequestError, OverloadedError, ServiceError
from service.hanging_up import HANG_UP_STATE, HangUp
from service.headers import DATA_POLICY, HEADERS
from service.heads import END, HeadReader, check_framing, origin_form, without_upgrade
from service.logs import request_id
from service.metrics import UNKNOWN, Metrics
from service.middleware import SPARE_STATE, too_many_connections
from service.problems import KINDS, Kind, problem
from service.settings import LimitSettings

log = logging.getLogger(__name__)
request_log = logging.getLogger("passerby.request")  # one line for each answer
# Seconds until a request's head has to be complete: from the connection on, or from the first byte
# after an answer. Until that byte, uvicorn's own 5 s count.
HEAD_S = 10.0
HEAD_BYTES = 64 * 1024  # browsers send 2 KiB, proxies allow 8 to 64
# Bytes of sizes, extensions and line ends that each byte of a body in chunks may come with, beyond
# as many as a head has: a client that sends single bytes needs five.
CHUNK_SHARE = 8
# Empty lines in a body in chunks at which it is looked whether it has ended. A body with more is
# the last one of its connection, and nobody has to know where it ends.
LOOKS = 2048
# Seconds in which one whose request was not read may go on sending, until he sees why.
LINGER_S = 1.0
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
        head_bytes: Of the head of a request at most.
        spare: Connections beyond the bound.
    """

    def __init__(
        self,
        limits: LimitSettings,
        metrics: Metrics,
        *,
        head_s: float = HEAD_S,
        head_bytes: int = HEAD_BYTES,
        spare: int = SPARE,
    ) -> None:
        self._limits = limits
        self._metrics = metrics
        self._free = {_Place.REGULAR: limits.connections, _Place.SPARE: spare}
        self._silent: dict[_BoundedProtocol, float] = {}  # since when, the oldest first
        self._turned_away = 0
        self.head_s = head_s
        self.head_bytes = head_bytes

    @property
    def body_s(self) -> float:
        """Seconds that a client may go on sending a body whose answer it has."""
        return self._limits.upload_s

    def protocol(self) -> type[asyncio.Protocol]:
        """Uvicorn's protocol under these bounds."""
        return type("BoundedProtocol", (_BoundedProtocol,), {"bounds": self})

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

    def turn_away(
        self, transport: asyncio.Transport, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        """Answer 429 to a connection without a place, and close it.

        Args:
            transport: Of the connection.
            headers: Of each answer of the server.
        """
        error = too_many_connections(self._limits.connections)
        more = {"Retry-After": str(error.retry_after_s)}
        with _new_id():
            transport.write(_raw_problem(KINDS[OverloadedError], str(error), headers, more))
        transport.close()
        self._metrics.reject(KINDS[OverloadedError].slug)
        if self._turned_away == 0:
            asyncio.get_running_loop().call_later(TELL_S, self._tell)
        self._turned_away += 1

    def refuse(
        self,
        error: ServiceError,
        client: tuple[str, int] | None,
        headers: Iterable[tuple[bytes, bytes]],
    ) -> bytes:
        """Count and log bytes that are no request.

        Args:
            error: Why they are not; nothing of them is in it.
            client: Who sent them.
            headers: Of each answer of the server.

        Returns:
            The answer.
        """
        kind = KINDS[type(error)]
        self._metrics.begin_request()
        self._metrics.end_request(UNKNOWN, kind.status, 0.0)
        with _new_id():
            fields = {"route": UNKNOWN, "status": kind.status, "problem": kind.slug}
            # Whoever takes this port for another kind of service has to be found.
            address = {"address": client[0]} if client else {}
            request_log.info("request", extra={**fields, **address, "reason": str(error)})
            return _raw_problem(kind, str(error), headers)

    def _tell(self) -> None:
        log.warning("connections were turned away", extra={"connections": self._turned_away})
        self._turned_away = 0


class _BoundedProtocol(HttpToolsProtocol):
    """What uvicorn's protocol lacks: a place, a clock for heads, and an answer to broken ones.

    Uvicorn closes a connection that says nothing after an answer, but neither one that never said
    anything nor one whose head never ends. The bytes are cut where heads and bodies end, so that
    each bound is exact however they came.
    """

    bounds: ClassVar[Connections]

    _place: _Place | None = None
    _hang_up: HangUp
    _clock: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None  # while an answer waits for its client
    _last_cycle: Any = None  # as `cycle` was when the last bytes had been read
    _heads: HeadReader
    _in_head = True  # or before one
    _left: int | None = 0  # bytes of a body that announced its length; None for one in chunks
    _tail = b""  # the last bytes of a body in chunks
    _overhead = 0
    _looks = 0
    _is_last = False  # this request
    _is_deaf = False  # after what cannot be read, nothing can
    _last_words: ServiceError | None = None  # when what came before has been answered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Let a connection in, or turn it away (asyncio)."""
        self._hang_up = HangUp()
        self._heads = HeadReader(self.bounds.head_bytes)
        self._place = self.bounds.enter(self)
        if self._place is None:
            self._is_deaf = True
            self.transport = transport
            self.bounds.turn_away(transport, self.server_state.default_headers)
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
        self._unset_keepalive_if_required()
        at = 0
        while at < len(data) and not self._is_deaf:
            at = self._read(data, at)
        if self.cycle is not self._last_cycle:
            self._last_cycle = self.cycle
            self.bounds.heard(self)
            self._stop_clock()
        elif self._clock is None and self._is_idle():
            # Not a head where the answer came before the end of the body: who still sends that has
            # as long for it as for any body.
            in_body = self.cycle is not None and self.cycle.more_body
            self._start_clock(self.bounds.body_s if in_body else self.bounds.head_s)

    def _read(self, data: bytes, at: int) -> int:
        """Have the parser read as far as a head or a body goes; returns where that is."""
        try:
            if self._in_head:
                head, end = self._heads.take(data, at)
                if head:
                    self.parser.feed_data(without_upgrade(head))
                return end
            end = self._chunks_end(data, at) if self._left is None else at + self._left
            piece = data[at:end]
            self.parser.feed_data(piece)
            if self._left is None and not self._in_head:
                self._count_chunks(piece)
            elif not piece:  # cannot be, and must not go on for ever
                raise InvalidRequestError("expected the end of a body, got more")
            return end
        except (ServiceError, HttpParserError, HttpParserUpgrade) as error:
            self._refuse(_broken(error))
            return len(data)

    def _chunks_end(self, data: bytes, at: int) -> int:
        """Where a body in chunks may end at the earliest: as heads do, with an empty line."""
        if self._is_last:
            return len(data)
        start = (self._tail + data[at : at + 3]).find(END)
        end = at + start + len(END) - len(self._tail)
        if start < 0:
            start = data.find(END, at)
            end = start + len(END)
        if start < 0:
            return len(data)
        self._looks += 1
        if self._looks > LOOKS:
            self._is_last = True
            self.cycle.keep_alive = False
            return len(data)
        return end

    def _count_chunks(self, piece: bytes) -> None:
        """Bound what a body in chunks is wrapped in: sizes, extensions, trailers (RFC 9112, 7.1).

        Raises:
            InvalidRequestError: It is much more than the body.
        """
        self._tail = (self._tail + piece[-3:])[-3:]
        self._overhead = max(0, self._overhead + len(piece))
        if self._overhead > self.bounds.head_bytes:
            raise InvalidRequestError("expected chunks of a body, got little else than their sizes")

    def on_headers_complete(self) -> None:
        """End a head, or refuse it (httptools)."""
        self._left = check_framing(self.parser.get_http_version(), self.headers)
        if self._is_last:
            raise InvalidRequestError("expected no request behind one with so many empty lines")
        self._tail, self._overhead, self._looks = b"", 0, 0
        self.url = origin_form(self.url)
        super().on_headers_complete()
        self._in_head = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, but not one that comes after the body (httptools)."""
        if self._in_head:  # trailers would add to what was decided by (RFC 9110, section 6.5.1)
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Take a part of a body (httptools)."""
        if self._left is not None:
            self._left -= len(body)
        else:
            self._overhead -= (1 + CHUNK_SHARE) * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request (httptools)."""
        self._in_head = True
        self._is_deaf = self._is_last
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """End an answer (uvicorn); what could not be read comes after all that could."""
        was_last = not self.pipeline
        super().on_response_complete()
        if was_last and self._last_words is not None:
            self._say_last(self._last_words)

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _refuse(self, error: ServiceError) -> None:
        """Answer what is no request, in its turn, as the last thing here."""
        self._is_deaf = True
        broken = None if self._in_head else self.cycle  # a request that the app has, or is to get
        if broken is None:
            is_next = self._is_idle()
        elif broken.response_started:
            self.transport.close()
            return
        else:
            broken.disconnected = True
            broken.message_event.set()
            is_next = not (self.pipeline and self.pipeline[0][0] is broken)
            if not is_next:
                self.pipeline.popleft()
        if is_next:
            self._say_last(error)
        else:
            self._last_words = error

    def _say_last(self, error: ServiceError) -> None:
        if self.transport.is_closing():
            return
        answer = self.bounds.refuse(error, self.client, self.server_state.default_headers)
        self.transport.write(answer)
        # What still comes is taken, for a while: closed on unread bytes, a client sees no answer.
        self.transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, self.transport.close)

    def _start_clock(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._clock = loop.call_later(seconds, self._close_if_idle)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _close_if_idle(self) -> None:
        self._clock = None
        if self._is_idle():
            self.transport.close()


def _broken(error: Exception) -> ServiceError:
    """What is told of bytes that were not read: whoever refused them knew, or the parser did."""
    # The parser wraps what is raised in a callback.
    for one in (error, error.__context__):
        if isinstance(one, ServiceError):
            return one
    by_us = error.__context__ if isinstance(error, HttpParserCallbackError) else None
    if by_us is not None and not isinstance(by_us, HttpParserError):
        raise error  # a mistake in a callback
    return InvalidRequestError("expected a request as RFC 9112 describes it, got a broken one")


def _raw_problem(
    kind: Kind,
    detail: str,
    headers: Iterable[tuple[bytes, bytes]],
    own: Mapping[str, str] | None = None,
) -> bytes:
    """An answer as bytes, where no request has reached the app: the last one of a connection.

    Args:
        kind: Of problem.
        detail: What was expected and what came.
        headers: Of each answer of the server.
        own: Further headers of this one.
    """
    secure = {**HEADERS, "Content-Security-Policy": DATA_POLICY}
    name = str(request_id.get())
    more = {**(own or {}), **secure, "X-Request-ID": name, "Connection": "close"}
    answer = problem(kind, detail, headers=more)
    status = f"HTTP/1.1 {kind.status} {http.HTTPStatus(kind.status).phrase}".encode()
    lines = (b": ".join(one) for one in (*headers, *answer.raw_headers))
    return b"\r\n".join([status, *lines, b"", bytes(answer.body)])


@contextlib.contextmanager
def _new_id() -> Iterator[None]:
    """Give what is no request an id, for its answer and its log line."""
    token = request_id.set(uuid.uuid4().hex)
    try:
        yield
    finally:
        request_id.reset(token)


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
