"""Page cursors: a place in an order, opaque to whoever gets one."""

import base64
import binascii
import re

from index.gallery import InvalidCursorError

_KEY = re.compile(r"[1-9][0-9]{0,17}")
_LISTING = "after-1:"
_IDENTITIES = "identities-after-1:"


def from_key(key: int) -> str:
    """The cursor of a listing's place after a key."""
    return _encode(f"{_LISTING}{key}")


def to_key(cursor: str) -> int:
    """What `from_key` took.

    Raises:
        InvalidCursorError: It did not give this cursor.
    """
    key = _decode(cursor, _LISTING)
    if not _KEY.fullmatch(key):
        raise _refusal(cursor)
    return int(key)


def from_identity(name: str) -> str:
    """The cursor of the place after an identity."""
    return _encode(f"{_IDENTITIES}{name}")


def to_identity(cursor: str) -> str:
    """What `from_identity` took.

    Raises:
        InvalidCursorError: It did not give this cursor.
    """
    return _decode(cursor, _IDENTITIES)


def _encode(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


def _decode(cursor: str, prefix: str) -> str:
    try:
        text = base64.b64decode(cursor, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):  # the latter for what is not ASCII
        text = ""
    if not text.startswith(prefix) or _encode(text) != cursor:
        raise _refusal(cursor)
    return text.removeprefix(prefix)


def _refusal(cursor: str) -> InvalidCursorError:
    return InvalidCursorError(f"expected a cursor from an earlier page, got {cursor!r}")
