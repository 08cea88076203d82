"""Heads of requests: whole, within bounds, and as RFC 9112 wants them, before anybody acts on them.

The parser behind this reads a request byte by byte, acts on what it has, and lets through some of
what the standard has a server refuse: two hosts, a coding that it does not know, trailers that look
like headers.
"""

import re
from collections.abc import Sequence

from service.errors import InvalidRequestError

END = b"\r\n\r\n"
_BLANK_LINES = re.compile(rb"(?:\r\n)*")
# The parser knows which methods there are. HTTP/0.9 and 2 would come through it, and so would RTSP.
_REQUEST_LINE = re.compile(rb"[A-Z-]+ [^ \r\n]+ HTTP/1\.[01]\r\n")
_HTTP_2 = b"PRI * HTTP/2"
_TLS_HANDSHAKE = 0x16
_UPGRADE = re.compile(rb"\r\nupgrade:[\t\x20-\x7e\x80-\xff]*(?=\r\n)", re.IGNORECASE)
_SCHEME_AND_HOST = re.compile(rb"https?://[^/?#]*", re.IGNORECASE)
# RFC 3986, section 3.2.2, without what only a resolver could tell; a host may be empty.
_HOST = re.compile(rb"(?:\[[0-9A-Za-z.:%_~-]+\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(?::[0-9]*)?")


class HeadReader:
    """Holds the bytes of a head back until it is whole, however it is cut into pieces.

    Args:
        limit_bytes: Of a head, its last empty line and empty lines before it included.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held = bytearray()
        self._has_line = False

    def take(self, data: bytes, at: int = 0) -> tuple[bytes, int]:
        """Take the next bytes of a connection.

        Args:
            data: As they came.
            at: Where to begin in them. They are not copied but for the head, or thousands of small
                requests in one piece would be copied thousands of times.

        Returns:
            The head, empty until it is whole; and where what comes after it begins.

        Raises:
            InvalidRequestError: The head is too long, or has begun as none does.
        """
        known = len(self._held)
        buffer: bytes | bytearray = data
        start = at
        if known:
            self._held += memoryview(data)[at : at + self._limit_bytes + 1]
            buffer, start = self._held, 0
        begin = _BLANK_LINES.match(buffer, start).end()  # type: ignore[union-attr]  # may be empty
        end = buffer.find(END, max(begin, start + known - len(END) + 1))
        self._check_line(buffer, begin)
        size = (len(buffer) if end < 0 else end + len(END)) - start
        if size > self._limit_bytes or (end < 0 and size == self._limit_bytes):
            raise InvalidRequestError(
                f"expected a head of at most {self._limit_bytes} bytes, got more"
            )
        if end < 0:
            self._held = self._held or bytearray(memoryview(data)[at:])
            return b"", len(data)
        head = bytes(buffer[begin : start + size])
        self._held.clear()
        self._has_line = False
        return head, at + size - known

    def _check_line(self, held: bytes | bytearray, begin: int) -> None:
        """Refuse another protocol at once: its client would wait for an answer in it."""
        if self._has_line or begin == len(held):
            return
        first = held[begin]
        if first == _TLS_HANDSHAKE:
            raise InvalidRequestError("expected HTTP, got a TLS handshake: this port has no TLS")
        is_line_end = first == ord("\r") and begin + 1 == len(held)
        if not (ord("A") <= first <= ord("Z") or is_line_end):
            raise InvalidRequestError("expected a request of HTTP/1.1, got something else")
        if held.find(b"\n", begin) < 0:
            return
        if held.startswith(_HTTP_2, begin):
            raise InvalidRequestError("expected HTTP/1.1, got HTTP/2")
        if _REQUEST_LINE.match(held, begin) is None:
            raise InvalidRequestError("expected a request line of HTTP/1.0 or 1.1, got none")
        if held.startswith(b"CONNECT ", begin):
            raise InvalidRequestError("expected a request to this service, got CONNECT: no proxy")
        self._has_line = True


def without_upgrade(head: bytes) -> bytes:
    """A head that asks for no other protocol, which a server may ignore (RFC 9110, section 7.8).

    The parser would take the body for the first bytes of the other protocol, which is how a request
    is smuggled past a proxy; and Java's client asks for HTTP/2 with each upload.

    Args:
        head: Whole. What is no header by that name stays, for the parser to refuse.
    """
    return _UPGRADE.sub(b"", head)


def origin_form(target: bytes) -> bytes:
    """The path and query of a request target (RFC 9112, section 3.2).

    Args:
        target: As it came: a path, ``*``, or an address as one would send it to a proxy.
    """
    if (found := _SCHEME_AND_HOST.match(target)) is None:
        return target
    rest = target[found.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest


def check_framing(version: str, headers: Sequence[tuple[bytes, bytes]]) -> int | None:
    """See where a request is to go and where its body ends (RFC 9112, sections 3.2 and 6.1).

    Args:
        version: Of HTTP, like ``1.1``.
        headers: Names in lower case and values, of which the parser has refused two lengths, and a
            length beside a coding.

    Returns:
        Bytes of the body; None where it comes in chunks.

    Raises:
        InvalidRequestError: It has no host or several, or another coding than chunks.
    """
    hosts = [value for name, value in headers if name == b"host"]
    is_old = version == "1.0"
    if len(hosts) > 1 or (not hosts and not is_old):
        raise InvalidRequestError(f"expected one Host header, got {len(hosts)}")
    if any(_HOST.fullmatch(host) is None for host in hosts):
        raise InvalidRequestError("expected a name or an address in Host, got something else")
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and (is_old or codings != [b"chunked"]):
        raise InvalidRequestError("expected no Transfer-Encoding but chunked, of HTTP/1.1")
    if codings:
        return None
    lengths = [value for name, value in headers if name == b"content-length"]
    return int(lengths[0]) if lengths else 0
