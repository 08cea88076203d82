"""Whether the service can do its work: every part is asked, and none may keep the probe waiting."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from index.gallery import GalleryError
from service.errors import ServiceError
from service.parts import Parts

# Seconds after which a part that has not answered counts as failed. A probe waits longer.
ANSWER_S = 3.0


class Readiness:
    """Asks the parts of a service how they are.

    Args:
        parts: Whom to ask.
    """

    def __init__(self, parts: Parts) -> None:
        self._service = _Question(parts.check_not_stopping)
        self._asked = {
            "worker": _Question(parts.worker.check),
            "decoders": _Question(parts.decoders.check),
            "store": _Question(parts.gallery.check),
        }

    async def ask(self) -> dict[str, str]:
        """What each part says: "ok", or what is wrong with it."""
        questions = {"service": self._service, **self._asked}
        answers = await asyncio.gather(*(one.ask() for one in questions.values()))
        return dict(zip(questions, answers, strict=True))

    def close(self) -> None:
        """Ask nobody any more."""
        for one in (self._service, *self._asked.values()):
            one.close()


class _Question:
    """One part's check, asked by one thread.

    While it has not answered it is not asked again: a disk that hangs must not take a thread for
    each probe.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="readiness")
        self._asked: Future[None] | None = None

    async def ask(self) -> str:
        if self._asked is None or self._asked.done():
            self._asked = self._thread.submit(self._check)
        answer = asyncio.wrap_future(self._asked)
        answer.add_done_callback(_note_seen)
        done, _ = await asyncio.wait((answer,), timeout=ANSWER_S)
        if not done:
            return f"expected an answer within {ANSWER_S:g} s, got none"
        try:
            answer.result()
        except (ServiceError, GalleryError) as error:
            return str(error)
        return "ok"

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def _note_seen(answer: "asyncio.Future[None]") -> None:
    """What comes too late to be told is no mistake of ours that asyncio should warn of."""
    if not answer.cancelled():
        answer.exception()
