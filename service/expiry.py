"""Erases what has had its time, every few seconds for as long as the service runs."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta

from index.gallery import GalleryError
from service.parts import Parts

log = logging.getLogger(__name__)
# Well within the minute to which retention is exact.
SWEEP_S = 15.0


async def sweep(parts: Parts, every_s: float = SWEEP_S) -> None:
    """Erase what is due, at once and then again and again; ends by being cancelled."""
    days = parts.settings.retention_days
    retention = None if days is None else timedelta(days=days)
    failing = False
    while True:
        try:
            # Not bounded as what clients ask for is: it is asked for once at a time.
            erased = await asyncio.get_running_loop().run_in_executor(
                parts.writers, parts.gallery.expire, datetime.now(UTC), retention
            )
        except Exception as error:
            if not failing:  # once, not every few seconds: the probe says it, too
                known = isinstance(error, GalleryError)
                log.warning("what has expired could not be erased: %s", error, exc_info=not known)
            failing = True
        else:
            failing = False
            if erased:
                log.info("erased what has expired", extra={"tracklets": len(erased)})
        await asyncio.sleep(every_s)
