"""One place for a process that decodes, and the parent's side of what travels to it and back."""

import asyncio
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.clip_memory import ClipMemory, Place
from service.decoder_process import (
    ANSWER,
    BUFFERS,
    DECODED,
    FAILED,
    LENGTH,
    NOWHERE,
    PLACE,
    PLACED,
    POSITION,
    READY,
    REFUSED,
    drop_sent,
    pack_request,
    place_bytes,
    receive,
    send_all,
)
from service.errors import (
    DeadlineExceededError,
    ServiceError,
    ValidationError,
    WorkerUnavailableError,
)
from service.limits import FrameLimits
from service.quality import FrameQuality
from service.uploads import Decoded, DecodedTracklet, FrameChoice

# What a new interpreter runs as a decoder.
PROGRAM = ("-m", "service.decoder_process")
# Seconds until it can begin; a fraction of one on a machine that is not overloaded.
START_S = 60.0
_TOLD_BYTES = 16 * 1024 * 1024  # of what a decoder says besides a clip
_REFUSALS = {kind.__name__: kind for kind in ServiceError.__subclasses__()}
_ROOT = Path(__file__).parent.parent
_BUFFER_BYTES = 1024 * 1024  # the kernel gives less where it must; a clip then takes more turns
_ENVIRONMENT = {
    # Each decoder is one of as many as there are cores: threads in it would be in the way.
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    # Of glibc: keep what a clip takes for the next one, and do not ask the kernel for it each time,
    # which takes a tenth of a decoder's time. Larger pieces, and what is left of them, go back.
    "MALLOC_MMAP_THRESHOLD_": str(8 * 1024 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(32 * 1024 * 1024),
}


class ChildDiedError(Exception):
    """Raised when a process ended, or answered nonsense, instead of decoding; says how."""


class _FailedError(RuntimeError):
    """Raised where a decoder says that it failed in a way no upload explains."""


class DecoderChild:
    """A place for one process after the other; one task at a time uses it.

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
        self._used = choice.used
        self._limits = limits
        self._limit_s = limit_s
        self._closing = closing
        self._lock = threading.Lock()  # held to start and to kill, which `close` does at any time
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._memory = _share_memory(place_bytes(choice))
        self._busy_since: float | None = None

    @property
    def pid(self) -> int | None:
        """Of its process; None while there is none."""
        return self._process.pid if self._process and self.is_running() else None

    def is_running(self) -> bool:
        """Whether there is a process in it."""
        return self._process is not None and self._process.poll() is None

    def busy_s(self) -> float:
        """Seconds since it was asked what it has not answered yet; 0 where it has."""
        return 0.0 if self._busy_since is None else time.monotonic() - self._busy_since

    def start(self) -> None:
        """Start a process and wait until it can begin; it blocks.

        Raises:
            WorkerUnavailableError: It cannot be started.
        """
        self.launch()
        self.greet()

    def launch(self) -> None:
        """Start a process without waiting for it; raises as `start` does."""
        self.end(wait_s=0)
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:  # no descriptor is left
            raise _cannot_start(error.strerror or type(error).__name__) from error
        for one in (ours, theirs):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        _bound_waits(ours, START_S)
        with self._lock, theirs, ExitStack() as failing:
            failing.enter_context(ours)
            if self._closing.is_set():
                raise not_running()
            try:
                self._process = _spawn(theirs, self._memory)
            except OSError as error:
                raise _cannot_start(error.strerror or type(error).__name__) from error
            failing.pop_all()
        self._socket = ours

    def greet(self) -> None:
        """Wait until the process can begin; raises as `start` does."""
        try:
            send_all(self._connection(), [self._hello])
            receive(self._connection(), len(READY))
            self._connection().setblocking(False)
            return
        except BlockingIOError:
            self.end(wait_s=0)
            reason = f"it took longer than {START_S:g} s"
        except (EOFError, OSError):
            reason = self.end()
        raise _cannot_start(reason)

    async def answers(self, within_s: float) -> bool:
        """Whether it refuses an upload of nothing, as who is alive does."""
        if not self.is_running():
            return False
        try:
            async with asyncio.timeout(within_s):
                await self.decode(pack_request({}))
        except ValidationError:
            return True
        except (TimeoutError, ChildDiedError):
            pass
        return False

    async def decode(self, request: Sequence[bytes]) -> Decoded:
        """Have an upload decoded, by a new process where the last one has gone.

        Raises:
            ServiceError: See `Decoders.decode`.
            ChildDiedError: The process did not survive it.
        """
        self._busy_since = time.monotonic()
        place = self._memory.lend() if self._memory else None
        try:
            if not self.is_running():
                await asyncio.to_thread(self.start)
            async with asyncio.timeout(self._limit_s) as limit:
                return await self._ask(request, place)
        except TimeoutError as error:
            await asyncio.to_thread(self.end, 0)
            if not limit.expired():
                raise
            raise DeadlineExceededError(
                f"expected an upload that is decoded within {self._limit_s:g} s, it took longer"
            ) from error
        except (EOFError, ConnectionError) as error:
            raise ChildDiedError(await asyncio.to_thread(self.end)) from error
        except (ServiceError, _FailedError):
            raise
        except BaseException:
            self.end(wait_s=0)  # what else it says would pass for the answer to the next upload
            raise
        finally:
            if place is not None:
                place.give_back()  # the process has answered, or is no more
            self._busy_since = None

    async def _ask(self, request: Sequence[bytes], place: Place | None) -> Decoded:
        connection = self._connection()
        number = NOWHERE if place is None else place.number
        await _send(connection, [PLACE.pack(number), *request])
        reader = _Reader(connection)
        try:
            kind, *counts = ANSWER.unpack((await _read(reader, ANSWER.size)).data)
            if kind == DECODED:
                return await self._read_decoded(reader, None, *counts)
            if kind == PLACED and place is not None:
                return await self._read_decoded(reader, place, *counts)
            if kind not in (REFUSED, FAILED):
                raise ChildDiedError(f"it answered in a way of its own, {kind}")
            told = (await _read(reader, self._bounded(counts[2], _TOLD_BYTES))).tobytes()
        finally:
            reader.close()
        raise _refusal(told) if kind == REFUSED else _FailedError(_read_failure(told))

    async def _read_decoded(
        self,
        reader: "_Reader",
        place: Place | None,
        used: int,
        received: int,
        length: int,
        strip_bytes: int,
        kept: int,
        digest: bytes,
        *quality: Any,
    ) -> Decoded:
        """Read the rest of an answer: clip, positions, strip and kept frames."""
        if not 0 < used <= self._limits.frames:
            raise ChildDiedError(f"it answered {used} frames")
        if place is not None and used > self._used:
            raise ChildDiedError(f"it answered {used} frames in a place for {self._used}")
        shape = (used, *self._frame_shape)
        clip_bytes = math.prod(shape)
        sent_bytes = clip_bytes if place is None else 0
        strip_at = sent_bytes + used * POSITION.itemsize
        frames_at = strip_at + strip_bytes + kept * LENGTH.itemsize
        if kept not in (0, used):
            raise ChildDiedError(f"it answered {kept} kept frames of {used}")
        # What frames are kept of a video is bounded like an upload.
        most = frames_at + (self._limits.request_bytes if kept else 0)
        rest = await _read(reader, self._bounded(length, most))
        positions = rest[sent_bytes:strip_at].view(POSITION)
        seen = FrameQuality(*quality)
        pixels = rest[:clip_bytes] if place is None else place.read(clip_bytes)
        tracklet = DecodedTracklet(
            pixels.reshape(shape), tuple(positions.tolist()), received, seen.shortest_side
        )
        strip = rest[strip_at : strip_at + strip_bytes].tobytes()
        frames = []
        for length in rest[strip_at + strip_bytes : frames_at].view(LENGTH).tolist():
            frames.append(rest[frames_at : frames_at + length].tobytes())
            frames_at += length
        return Decoded(tracklet, digest.hex(), strip or None, seen, tuple(frames))

    def _bounded(self, length: int, limit: int) -> int:
        if length > limit:
            raise ChildDiedError(f"it answered {length} bytes")
        return length

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
        """Leave nothing of the process behind; nobody may be waiting for its answer.

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


async def _send(connection: socket.socket, buffers: Iterable[bytes]) -> None:
    """As `service.decoder_process.send_all`, without keeping the event loop waiting."""
    waiting = [memoryview(buffer) for buffer in buffers if buffer]
    while waiting:
        try:
            sent = connection.sendmsg(waiting[:BUFFERS])
        except BlockingIOError:
            await _writable(connection)
        else:
            drop_sent(waiting, sent)


class _Reader:
    """Reads as `service.decoder_process.receive_into`, likewise, an answer that comes in pieces."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] | None = None
        # For the whole answer: to begin and end listening for each piece takes longer than a piece.
        self._loop.add_reader(connection, self._wake)

    def close(self) -> None:
        """Listen no more."""
        self._loop.remove_reader(self._connection)

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def fill(self, buffer: memoryview) -> None:
        """Fill a buffer.

        Raises:
            EOFError: The other side has gone.
        """
        while buffer:
            try:
                received = self._connection.recv_into(buffer)
            except BlockingIOError:
                self._waiting = self._loop.create_future()
                await self._waiting
                continue
            if not received:
                raise EOFError("expected an answer, got the end of the connection")
            buffer = buffer[received:]


async def _read(reader: _Reader, length: int) -> NDArray[np.uint8]:
    content = np.empty(length, dtype=np.uint8)
    await reader.fill(content.data)
    return content


async def _writable(connection: socket.socket) -> None:
    """Wait until a socket can be written, or has come to its end."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(connection, _tell, ready)
    try:
        await ready
    finally:
        loop.remove_writer(connection)


def _tell(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


def _bound_waits(connection: socket.socket, seconds: float) -> None:
    """Let calls fail that wait so long; `settimeout` would make them answer piece by piece."""
    limit = struct.pack("@ll", *divmod(round(seconds * 1e6), 1_000_000))  # a C timeval
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, limit)


def _share_memory(place_bytes: int) -> ClipMemory | None:
    try:
        return ClipMemory(place_bytes)
    except (AttributeError, OSError):  # no Linux, or no descriptor: clips travel
        return None


def _spawn(connection: socket.socket, memory: ClipMemory | None) -> "subprocess.Popen[bytes]":
    # A new interpreter: this one has threads, and a device's library, that no fork survives.
    passed = [one.fileno() for one in (connection, memory) if one is not None]
    command = [sys.executable, "-P", *PROGRAM, *map(str, passed)]
    kept = {name: value for name, value in os.environ.items() if not _is_setting(name)}
    path = os.pathsep.join([str(_ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return subprocess.Popen(  # noqa: S603 our own command
        command,
        env={**kept, **_ENVIRONMENT, "PYTHONPATH": path},
        pass_fds=passed,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C in a terminal is for this process alone
    )


def _is_setting(name: str) -> bool:
    """Keys are none of a decoder's business."""
    return name.upper().startswith("PASSERBY_")


def not_running() -> WorkerUnavailableError:
    """What whoever asks before the start, or after the end, hears."""
    return WorkerUnavailableError("the decoders are not running")


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
