"""Uploads are decoded here, off the event loop and several at a time: by processes, or by threads.

Python runs one thread at a time, and of decoding small frames that is the larger part: on 16 cores,
16 threads decoded fewer tracklets than one, and 16 processes ten times as many.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial

from model.cores import available_cores
from service.decoder_child import ChildDiedError, DecoderChild, not_running
from service.decoder_process import pack_hello, pack_request
from service.errors import UndecodableFrameError, WorkerUnavailableError
from service.limits import FrameLimits, PlainLimits
from service.uploads import Decoded, FrameChoice, Keep, decode_upload

log = logging.getLogger(__name__)
# Seconds that one upload may take a decoder: far more than the largest video within the limits of
# a crop takes, far less than for ever.
DECODE_S = 60.0
ATTEMPTS = 2  # a decoder may die of the machine's lack of memory rather than of its upload
# Seconds in which a decoder that has nothing to do has to answer a probe.
PING_S = 1.0
# Seconds without any answer, while all are at work, after which they count as stuck.
ALL_BUSY_S = 15.0


class Decoders:
    """Decodes uploads of one event loop, several at a time.

    How many wait is bounded by who calls: `service.parts` lets in LIMITS__UPLOADS at a time. Beside
    them, each decoder may be at one whose client has gone, and each process holds a copy of the
    upload that it is at, of LIMITS__REQUEST_BYTES at most.

    The loop itself talks to the processes: a thread for each would fight with it for the
    interpreter's lock, which left a sixth of both cores idle.

    Args:
        choice: Which frames are used, and what they become.
        limits: What an upload may hold.
        processes: How many processes decode; 0 for threads of this one, which start faster, one for
            each core that it may use.
        limit_s: Seconds that one upload may take a process.
    """

    def __init__(
        self,
        choice: FrameChoice,
        limits: FrameLimits,
        *,
        processes: int,
        limit_s: float = DECODE_S,
    ) -> None:
        self._choice = choice
        self._limits = limits
        self._threads: ThreadPoolExecutor | None = None
        self._running = False
        self._closing = threading.Event()
        hello = pack_hello(choice, PlainLimits.of(limits))
        self._children = [
            DecoderChild(hello, choice, limits, limit_s, self._closing) for _ in range(processes)
        ]
        self._idle: list[DecoderChild] = []
        self._waiting: deque[asyncio.Future[DecoderChild]] = deque()

    @property
    def pids(self) -> list[int]:
        """Process ids of the decoders that run."""
        return [pid for child in self._children if (pid := child.pid) is not None]

    def start(self) -> None:
        """Start the processes, all at once, and wait until each can begin.

        Raises:
            WorkerUnavailableError: One cannot be started; those that could be are ended again.
        """
        try:
            for child in self._children:
                child.launch()
            for child in self._children:
                child.greet()
                self._idle.append(child)
        except WorkerUnavailableError:
            self.close()
            raise
        if not self._children:
            self._threads = ThreadPoolExecutor(available_cores(), thread_name_prefix="decoder")
        self._running = True

    def close(self) -> None:
        """End the processes, also in mid-decode, and fail what waits.

        A thread that decodes itself cannot be ended: it finishes what it is at, unheard.
        """
        self._closing.set()
        for child in self._children:
            child.kill()
        # One that is at work is left to who waits for its answer, and sees it end.
        for child in self._idle if self._running else self._children:
            child.end(wait_s=0)
        self._idle = []
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(not_running())
        if self._threads is not None:
            self._threads.shutdown(wait=False)

    async def check(self) -> None:
        """Return while there is who decodes.

        Whoever has nothing to do is asked for an answer; who gives none, or has died, is replaced,
        which may take a second.

        Raises:
            WorkerUnavailableError: There is nobody, nobody has answered for long, or one cannot be
                replaced.
        """
        self._check_running()
        if not self._children:
            return
        idle, self._idle = self._idle, []
        if not idle:
            if (waited_s := min(child.busy_s() for child in self._children)) > ALL_BUSY_S:
                raise WorkerUnavailableError(f"no decoder has answered for {waited_s:.0f} s")
            return
        answers = await asyncio.gather(
            *(self._revive(child) for child in idle), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer

    async def decode(self, files: dict[str, list[bytes]], *, keep: Keep = Keep.NOTHING) -> Decoded:
        """Decode an upload.

        Cancelled before its turn, it is dropped; after that, it ends unheard.

        Args:
            files: File fields of the form.
            keep: What is to be stored of it, besides its embedding.

        Raises:
            ServiceError: The upload is refused; the message says which frame and why.
            UndecodableFrameError: Also where decoders died of it.
            DeadlineExceededError: A decoder took too long at it.
            WorkerUnavailableError: Nobody decodes.
        """
        self._check_running()
        if not self._children:
            return await self._decode_by_thread(files, keep=keep)
        request = pack_request(files, keep)
        child = await self._take()
        # A task of its own: its answer has to be read, whoever still wants it.
        return await asyncio.shield(asyncio.create_task(self._decode_by_child(child, request)))

    def _check_running(self) -> None:
        if not self._running or self._closing.is_set():
            raise not_running()

    async def _take(self) -> "DecoderChild":
        """Wait for a child that has nothing to do."""
        if self._idle:
            return self._idle.pop()
        turn: asyncio.Future[DecoderChild] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came in the very moment
                self._give_back(turn.result())
            raise

    def _give_back(self, child: "DecoderChild") -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(child)
                return
        if self._closing.is_set():
            child.end(wait_s=0)
        else:
            self._idle.append(child)

    async def _revive(self, child: "DecoderChild") -> None:
        """Hear from an idle child, or replace it."""
        try:
            if not await child.answers(PING_S):
                log.warning("a decoder that did not answer is replaced")
                await asyncio.to_thread(child.start)
        finally:
            self._give_back(child)

    async def _decode_by_thread(self, files: dict[str, list[bytes]], *, keep: Keep) -> Decoded:
        # Threads know the request's id by its context.
        work = partial(copy_context().run, self._decode_here, files, keep=keep)
        try:
            decoding = asyncio.get_running_loop().run_in_executor(self._threads, work)
        except RuntimeError as error:  # closed since the line before
            raise not_running() from error
        return await decoding

    def _decode_here(self, files: dict[str, list[bytes]], *, keep: Keep) -> Decoded:
        self._check_running()  # or it has been closed since this was queued
        return decode_upload(files, self._choice, self._limits, keep=keep)

    async def _decode_by_child(self, child: "DecoderChild", request: Sequence[bytes]) -> Decoded:
        try:
            for attempt in range(1, ATTEMPTS + 1):
                self._check_running()
                try:
                    return await child.decode(request)
                except ChildDiedError as error:
                    self._check_running()  # or it was ended by `close`
                    log.warning("a decoder died", extra={"reason": str(error), "attempt": attempt})
        finally:
            self._give_back(child)
        raise UndecodableFrameError(
            "expected frames that can be decoded, got an upload that no decoder survived"
        )
