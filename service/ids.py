"""Tracklet ids for those who bring none: sortable by time, as ULIDs are."""

import secrets
import time

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_tracklet_id() -> str:
    """48 bits of milliseconds and 80 random bits in 26 letters of Crockford's base 32."""
    number = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))
