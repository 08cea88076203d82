"""Erases what has had its time, every few seconds for as long as the service runs.

What was erased is told to the audit trail. Where that cannot be written, erasing goes on, unlike
what people ask for: somebody was promised to be forgotten by now. It is told once it can be.
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from index.gallery import GalleryError, StorageFullError
from service.audit import IDS_A_LINE, Trail
from service.errors import AuditUnavailableError
from service.parts import Parts

log = logging.getLogger(__name__)
# Well within the minute to which retention is exact.
SWEEP_S = 15.0


async def sweep(parts: Parts, every_s: float = SWEEP_S, *, trail: Trail | None = None) -> None:
    """Erase what is due, at once and then again and again; ends by being cancelled.

    Args:
        parts: Of the service.
        every_s: Seconds from one sweep to the next.
        trail: The audit trail, where one is kept.
    """
    erase = _eraser(parts, trail)
    failing = False
    while True:
        try:
            # Not bounded as what clients ask for is: it is asked for once at a time.
            erased = await asyncio.get_running_loop().run_in_executor(parts.writers, erase)
        except Exception as error:
            if not failing:  # once, not every few seconds: the probe says it, too
                known = isinstance(error, GalleryError)
                log.warning("what has expired could not be erased: %s", error, exc_info=not known)
            failing = True
        else:
            failing = False
            if erased:
                log.info("erased what has expired", extra={"tracklets": erased})
        await asyncio.sleep(every_s)


def _eraser(parts: Parts, trail: Trail | None) -> Callable[[], int]:
    """What one sweep does, in one thread: to be cancelled must not come between deed and line."""
    days = parts.settings.retention_days
    retention = None if days is None else timedelta(days=days)
    untold: list[str] = []

    def erase() -> int:
        try:
            erased = parts.gallery.expire(datetime.now(UTC), retention)
            untold.extend(erased)
        finally:
            if trail is None:
                untold.clear()
            else:
                _tell(trail, untold)
        return len(erased)

    return erase


def _tell(trail: Trail, untold: list[str]) -> None:
    """Tell the trail of tracklets that were erased; those that it cannot tell of stay in the list.

    Args:
        trail: Which.
        untold: Their ids.
    """
    while untold:
        some = untold[:IDS_A_LINE]
        line = {"action": "erase-expired", "by": "retention", "tracklets": some}
        try:
            trail.append({**line, "count": len(some), "outcome": "done"})
        except (StorageFullError, AuditUnavailableError):
            return  # the trail has logged it
        del untold[: len(some)]
