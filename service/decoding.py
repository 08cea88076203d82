"""Uploads are decoded here, off the event loop and several at a time: by processes, or by threads.

Python runs one thread at a time, and of decoding small frames that is the larger part: on 16 cores,
16 threads decoded fewer tracklets than one, and 16 processes ten times as many.
"""

import asyncio
import json
import logging
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
from numpy.typing import NDArray

from service.decoder_process import (
    ANSWER,
    DECODED,
    POSITION,
    READY,
    REFUSED,
    pack_hello,
    pack_request,
    receive,
    receive_into,
    send_all,
)
from service.errors import (
    DeadlineExceededError,
    ServiceError,
    UndecodableFrameError,
    ValidationError,
    WorkerUnavailableError,
)
from service.limits import FrameLimits, PlainLimits
from service.uploads import Decoded, DecodedTracklet, FrameChoice, decode_upload

log = logging.getLogger(__name__)
# Seconds that one upload may take a decoder: far more than the largest video within the limits of
# a crop takes, far less than for ever.
DECODE_S = 60.0
ATTEMPTS = 2  # a decoder may die of the machine's lack of memory rather than of its upload
_TOLD_BYTES = 16 * 1024 * 1024  # of what a decoder says besides a clip
_REFUSALS = {kind.__name__: kind for kind in ServiceError.__subclasses__()}
_ROOT = Path(__file__).parent.parent
# What a new interpreter runs as a decoder.
PROGRAM = ("-m", "service.decoder_process")
# Seconds until it can begin; a fraction of one on a machine that is not overloaded.
START_S = 60.0
_BUFFER_BYTES = 1024 * 1024  # the kernel gives less where it must; a clip then takes more turns
_ENVIRONMENT = {
    # Each decoder is one of as many as there are cores: threads in it would be in the way.
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    # Of glibc: keep what a clip takes for the next one, and do not ask the kernel for it each time,
    # which takes a tenth of a decoder's time. Larger pieces, and what is left of them, go back.
    "MALLOC_MMAP_THRESHOLD_": str(8 * 1024 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(32 * 1024 * 1024),
}


class Decoders:
    """Decodes uploads of one event loop, several at a time.

    How many wait is bounded by who calls: `service.parts` lets in LIMITS__UPLOADS at a time. Beside
    them, each decoder may be at one whose client has gone, and each process holds a copy of the
    upload that it is at, of LIMITS__REQUEST_BYTES at most.

    Args:
        choice: Which frames are used, and what they become.
        limits: What an upload may hold.
        processes: How many processes decode; 0 for threads of this one, which start faster.
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
        self._pool: ThreadPoolExecutor | None = None
        self._closing = threading.Event()
        hello = pack_hello(choice, PlainLimits.of(limits))
        self._children = [
            _Child(hello, choice, limits, limit_s, self._closing) for _ in range(processes)
        ]
        self._idle: SimpleQueue[_Child] = SimpleQueue()

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
                self._idle.put(child)
        except WorkerUnavailableError:
            self.close()
            raise
        # With processes, a thread each: it sends an upload, and waits for the answer.
        self._pool = ThreadPoolExecutor(
            len(self._children) or os.cpu_count() or 1, thread_name_prefix="decoder"
        )

    def close(self) -> None:
        """End the processes, also in mid-decode, and fail what waits.

        A thread that decodes itself cannot be ended: it finishes what it is at, unheard.
        """
        self._closing.set()
        for child in self._children:
            child.kill()
        if self._pool is not None:
            self._pool.shutdown(wait=bool(self._children))
        for child in self._children:
            child.end(wait_s=0)

    def check(self) -> None:
        """Return while there is who decodes. It restarts who has died, which may take a second.

        Raises:
            WorkerUnavailableError: There is nobody, or one cannot be restarted.
        """
        self._running_pool()
        dead = []
        for child in self._take_idle():
            if child.is_running():
                self._idle.put(child)
            else:
                dead.append(child)
        try:
            for child in dead:
                child.start()
        finally:
            for child in dead:
                self._idle.put(child)

    async def decode(self, files: dict[str, list[bytes]], *, with_strip: bool = False) -> Decoded:
        """Decode an upload.

        Cancelled before its turn, it is dropped; after that, it ends unheard.

        Args:
            files: File fields of the form.
            with_strip: Draw the film strip, too.

        Raises:
            ServiceError: The upload is refused; the message says which frame and why.
            UndecodableFrameError: Also where decoders died of it.
            DeadlineExceededError: A decoder took too long at it.
            WorkerUnavailableError: Nobody decodes.
        """
        decode = self._decode_by_child if self._children else self._decode_here
        # Threads know the request's id by its context.
        work = partial(copy_context().run, decode, files, with_strip=with_strip)
        pool = self._running_pool()
        try:
            decoding = asyncio.get_running_loop().run_in_executor(pool, work)
        except RuntimeError as error:  # closed since the line before
            raise WorkerUnavailableError("the decoders are not running") from error
        return await decoding

    def _running_pool(self) -> ThreadPoolExecutor:
        if self._pool is None or self._closing.is_set():
            raise WorkerUnavailableError("the decoders are not running")
        return self._pool

    def _take_idle(self) -> list["_Child"]:
        taken = []
        try:
            while True:
                taken.append(self._idle.get_nowait())
        except Empty:
            return taken

    def _decode_here(self, files: dict[str, list[bytes]], *, with_strip: bool) -> Decoded:
        self._running_pool()  # or it has been closed since this was queued
        return decode_upload(files, self._choice, self._limits, with_strip=with_strip)

    def _decode_by_child(self, files: dict[str, list[bytes]], *, with_strip: bool) -> Decoded:
        request = pack_request(files, with_strip=with_strip)
        child = self._idle.get()
        try:
            for attempt in range(1, ATTEMPTS + 1):
                self._running_pool()
                try:
                    return child.decode(request)
                except _ChildDiedError as error:
                    self._running_pool()  # or it was ended by `close`
                    log.warning("a decoder died", extra={"reason": str(error), "attempt": attempt})
        finally:
            self._idle.put(child)
        raise UndecodableFrameError(
            "expected frames that can be decoded, got an upload that no decoder survived"
        )


class _ChildDiedError(Exception):
    """Raised when a process ended, or answered nonsense, instead of decoding; says how."""


class _Child:
    """A place for one process after the other; one thread at a time uses it.

    Args:
        hello: What each process is told first.
        choice: For the shape of what comes back.
        limits: Likewise.
        limit_s: Seconds that it may take at an upload.
        closing: Set, nothing is started any more.
    """

    def __init__(
        self,
        hello: bytes,
        choice: FrameChoice,
        limits: FrameLimits,
        limit_s: float,
        closing: threading.Event,
    ) -> None:
        self._hello = hello
        self._frame_shape = (choice.preprocessing.height, choice.preprocessing.width, 3)
        self._limits = limits
        self._limit_s = limit_s
        self._closing = closing
        self._lock = threading.Lock()  # held to start and to kill, which `close` does at any time
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """Of its process; None while there is none."""
        return self._process.pid if self._process and self.is_running() else None

    def is_running(self) -> bool:
        """Whether there is a process in it."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start a process and wait until it can begin.

        Raises:
            WorkerUnavailableError: It cannot be started.
        """
        self.launch()
        self.greet()

    def launch(self) -> None:
        """Start a process without waiting for it; raises as `start` does."""
        self.end()
        ours, theirs = socket.socketpair()
        for one in (ours, theirs):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        _bound_waits(ours, START_S)
        with self._lock, theirs, ExitStack() as failing:
            failing.enter_context(ours)
            if self._closing.is_set():
                raise WorkerUnavailableError("the decoders are not running")
            try:
                self._process = _spawn(theirs)
            except OSError as error:
                raise _cannot_start(error.strerror or type(error).__name__) from error
            failing.pop_all()
        self._socket = ours

    def greet(self) -> None:
        """Wait until the process can begin; raises as `start` does."""
        try:
            send_all(self._connection(), [self._hello])
            receive(self._connection(), len(READY))
            _bound_waits(self._connection(), self._limit_s)
            return
        except BlockingIOError:
            self.end(wait_s=0)
            reason = f"it took longer than {START_S:g} s"
        except (EOFError, OSError):
            reason = self.end()
        raise _cannot_start(reason)

    def decode(self, request: Sequence[bytes]) -> Decoded:
        """Have an upload decoded, by a new process where the last one has gone.

        Raises:
            ServiceError: See `Decoders.decode`.
            _ChildDiedError: The process did not survive it.
        """
        if not self.is_running():
            self.start()
        try:
            send_all(self._connection(), request)
            kind, *counts = ANSWER.unpack(receive(self._connection(), ANSWER.size))
            if kind == DECODED:
                return self._receive_decoded(*counts)
            told = self._receive(counts[2], _TOLD_BYTES).tobytes()
        except BlockingIOError as error:
            self.end(wait_s=0)
            raise DeadlineExceededError(
                f"expected an upload that is decoded within {self._limit_s:g} s, it took longer"
            ) from error
        except (EOFError, ConnectionError) as error:
            raise _ChildDiedError(self.end()) from error
        except BaseException:
            self.end(wait_s=0)  # what else it says would pass for the answer to the next upload
            raise
        raise _refusal(told) if kind == REFUSED else RuntimeError(_read_failure(told))

    def _receive_decoded(self, used: int, received: int, length: int, digest: bytes) -> Decoded:
        """Read the rest of an answer: clip, positions and strip."""
        if not 0 < used <= self._limits.frames:
            raise _ChildDiedError(f"it answered {used} frames")
        shape = (used, *self._frame_shape)
        clip_bytes = math.prod(shape)
        strip_at = clip_bytes + used * POSITION.itemsize
        rest = self._receive(length, strip_at + _TOLD_BYTES)
        positions = rest[clip_bytes:strip_at].view(POSITION)
        tracklet = DecodedTracklet(
            rest[:clip_bytes].reshape(shape), tuple(positions.tolist()), received
        )
        return Decoded(tracklet, digest.hex(), rest[strip_at:].tobytes() or None)

    def _receive(self, length: int, limit: int) -> NDArray[np.uint8]:
        if length > limit:
            raise _ChildDiedError(f"it answered {length} bytes")
        content = np.empty(length, dtype=np.uint8)
        receive_into(self._connection(), content.data)
        return content

    def _connection(self) -> socket.socket:
        if self._socket is None:
            raise EOFError("expected a running decoder, got none")
        return self._socket

    def kill(self) -> None:
        """End the process, whatever it is at; whoever waits for its answer sees it end."""
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def end(self, wait_s: float = 1.0) -> str:
        """Leave nothing of the process behind.

        Args:
            wait_s: Seconds in which it may end by itself, so that it is known of what.

        Returns:
            How it ended.
        """
        with self._lock:
            process, self._process = self._process, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if process is None:
            return "never started"
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            process.kill()
        return _describe_end(process.wait())


def _bound_waits(connection: socket.socket, seconds: float) -> None:
    """Let calls fail that wait so long; `settimeout` would make them answer piece by piece."""
    limit = struct.pack("@ll", *divmod(round(seconds * 1e6), 1_000_000))  # a C timeval
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, limit)


def _spawn(connection: socket.socket) -> "subprocess.Popen[bytes]":
    # A new interpreter: this one has threads, and a device's library, that no fork survives.
    command = [sys.executable, "-P", *PROGRAM, str(connection.fileno())]
    kept = {name: value for name, value in os.environ.items() if not _is_setting(name)}
    path = os.pathsep.join([str(_ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return subprocess.Popen(  # noqa: S603 our own command
        command,
        env={**kept, **_ENVIRONMENT, "PYTHONPATH": path},
        pass_fds=[connection.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C in a terminal is for this process alone
    )


def _is_setting(name: str) -> bool:
    """Keys are none of a decoder's business."""
    return name.upper().startswith("PASSERBY_")


def _cannot_start(reason: str) -> WorkerUnavailableError:
    return WorkerUnavailableError(f"a decoder cannot be started: {reason}")


def _describe_end(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:  # a real-time signal has no name
        return f"signal {-status}"


def _refusal(told: bytes) -> ServiceError:
    name, detail, pointer = json.loads(told)
    if name == ValidationError.__name__:
        return ValidationError(detail, pointer)
    kind: type[ServiceError] = _REFUSALS[name]
    return kind(detail)


def _read_failure(told: bytes) -> str:
    return f"a decoder failed:\n{told.decode('utf-8', 'replace')}"
