"""What may be kept as JSON: what can be written as UTF-8, and read again by anybody."""

import math
import re
from typing import Any

MAX_DEPTH = 32
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_json(value: Any, depth: int = 0) -> None:
    """Refuse what could not be answered as JSON in UTF-8 again, or only by a deep recursion.

    Args:
        value: As the json module reads it.
        depth: How many levels are above it.

    Raises:
        ValueError: It is deeper than `MAX_DEPTH`, or holds NaN, infinity or half a character.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"expected at most {MAX_DEPTH} levels, got more")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected finite numbers, got NaN or infinity")
    if isinstance(value, str) and _SURROGATE.search(value):
        raise ValueError("expected Unicode text, got half of a surrogate pair")
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for child in value:
            check_json(child, depth + 1)
