"""Whether the service can do its work: every part is asked, and none may keep the probe waiting."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

from index.gallery import GalleryError
from service.audit import Trail
from service.errors import ServiceError
from service.parts import Parts

log = logging.getLogger(__name__)
# Seconds after which a part that has not answered counts as failed. A probe waits longer.
ANSWER_S = 3.0


class Readiness:
    """Asks the parts of a service how they are.

    Args:
        parts: Whom to ask.
        trail: The audit trail, where one is kept.
    """

    def __init__(self, parts: Parts, trail: Trail | None = None) -> None:
        # A thread each, so that none waits for another's.
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="readiness") for _ in range(3)]
        worker, store, auditor = self._threads
        self._questions = {
            "service": _Question(_at_once(parts.check_not_stopping)),
            "worker": _Question(_in_thread(worker, parts.worker.check)),
            "decoders": _Question(parts.decoders.check),
            "store": _Question(_in_thread(store, parts.gallery.check)),
        }
        if trail is not None:
            self._questions["audit"] = _Question(_in_thread(auditor, trail.check))

    async def ask(self) -> dict[str, str]:
        """What each part says: "ok", or what is wrong with it."""
        answers = await asyncio.gather(*(one.ask() for one in self._questions.values()))
        return dict(zip(self._questions, answers, strict=True))

    def close(self) -> None:
        """Ask nobody any more."""
        for one in self._threads:
            one.shutdown(wait=False, cancel_futures=True)


class _Question:
    """One part's check.

    While it has not answered it is not asked again: a disk that hangs must not take a thread for
    each probe.
    """

    def __init__(self, check: Callable[[], Awaitable[None]]) -> None:
        self._check = check
        self._asked: asyncio.Future[None] | None = None

    async def ask(self) -> str:
        if self._asked is None or self._asked.done():
            self._asked = asyncio.ensure_future(self._check())
            self._asked.add_done_callback(_note_seen)
        answer = self._asked
        done, _ = await asyncio.wait((answer,), timeout=ANSWER_S)
        if not done:
            return f"expected an answer within {ANSWER_S:g} s, got none"
        try:
            answer.result()
        except (ServiceError, GalleryError) as error:
            return str(error)
        except Exception:  # whatever it is, the others' answers are told, too
            log.exception("a part could not be asked how it is")
            return "it could not be asked; the log says why"
        return "ok"


def _at_once(check: Callable[[], None]) -> Callable[[], Awaitable[None]]:
    async def asked() -> None:
        check()

    return asked


def _in_thread(
    thread: ThreadPoolExecutor, check: Callable[[], None]
) -> Callable[[], Awaitable[None]]:
    def asked() -> Awaitable[None]:
        in_context = copy_context().run  # so that what it logs names the request
        return asyncio.get_running_loop().run_in_executor(thread, in_context, check)

    return asked


def _note_seen(answer: "asyncio.Future[None]") -> None:
    """What comes too late to be told is no mistake of ours that asyncio should warn of."""
    if not answer.cancelled():
        answer.exception()
