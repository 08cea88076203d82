"""What a running service is made of, and how routes get at it."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, NamedTuple, ParamSpec, TypeVar

import numpy as np
from fastapi import Depends, Request

from index.gallery import (
    Embeddings,
    Filters,
    Gallery,
    GroupBy,
    InvalidEmbeddingError,
    SearchResult,
)
from service.auditing import begin_change
from service.decoding import Decoders
from service.errors import (
    DeadlineExceededError,
    NotReadyError,
    OverloadedError,
    ServiceError,
    ValidationError,
)
from service.hanging_up import while_connected
from service.limits import FILE_FIELDS
from service.logs import note
from service.metrics import Metrics
from service.minimums import check_agreement, check_frames
from service.multipart import read_form
from service.schemas import FrameCounts, QualityBody
from service.settings import Settings
from service.uploads import Decoded, DecodedTracklet, Keep
from service.worker import Embedded, Embedder, EmbeddingWorker

Result = TypeVar("Result")
# Of the fields of a request that brings two uploads.
PAIR_PREFIXES = ("a_", "b_")
Given = ParamSpec("Given")
# So many searches share a call of the index; more threads would only wait.
SEARCHERS = 16
# So many writes wait for the disk together; the gallery does one at a time.
WRITERS = 8


class Slots:
    """Bounds how many are in one stage at a time.

    Args:
        limit: How many.
        what: They are, as a refusal calls them.
    """

    def __init__(self, limit: int, what: str) -> None:
        self._limit = limit
        self._what = what
        self._taken = 0
        self._lock = threading.Lock()

    def refuse_when_full(self) -> None:
        """Return while one is free.

        Raises:
            OverloadedError: All are taken.
        """
        if self._taken >= self._limit:
            raise OverloadedError(
                f"expected fewer than {self._limit} {self._what} at a time, got more"
            )

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold a slot.

        Raises:
            OverloadedError: All are taken.
        """
        with self._lock:
            self.refuse_when_full()
            self._taken += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken -= 1


def _threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads that are all there from the beginning, so that a service that runs does not grow."""
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    together = threading.Barrier(count)
    for _ in range(count):  # each waits for the others, so none is used twice
        pool.submit(together.wait)
    return pool


@dataclass(slots=True)
class Parts:
    """The parts that were handed to the app, and those made of them.

    Args:
        embedder: Makes embeddings; the worker's thread alone calls ``embed``.
        gallery: Stores and ranks them.
        settings: Limits and bounds.
        metrics: What is counted and timed.
        worker: Batches the embedder's work.
        decoders: Make frames of uploads.
        uploads: Bounds uploads in memory.
        searches: Bounds searches that run or wait.
        writes: Bounds changes of the gallery that run or wait.
        searchers: Threads that search.
        writers: Threads that change the gallery: a disk that hangs takes no others.
        stop_at: When all must have ended, in seconds of `time.monotonic`; None while it serves.
        patching: Held from reading a record to writing its change, so that none is lost.
    """

    embedder: Embedder
    gallery: Gallery
    settings: Settings
    metrics: Metrics
    worker: EmbeddingWorker
    decoders: Decoders
    uploads: Slots
    searches: Slots
    writes: Slots
    searchers: ThreadPoolExecutor = field(default_factory=lambda: _threads(SEARCHERS, "searcher"))
    writers: ThreadPoolExecutor = field(default_factory=lambda: _threads(WRITERS, "writer"))
    stop_at: float | None = None
    patching: threading.Lock = field(default_factory=threading.Lock)

    def begin_stopping(self) -> None:
        """Take no new uploads, and say so; those that were accepted go on."""
        if self.stop_at is None:
            self.stop_at = time.monotonic() + self.settings.shutdown_grace_s

    def seconds_left(self) -> float:
        """How long what was accepted may still take."""
        self.begin_stopping()
        return max(0.0, (self.stop_at or 0.0) - time.monotonic())

    def check_not_stopping(self) -> None:
        """Return while new work is taken.

        Raises:
            NotReadyError: It is not, any more.
        """
        if self.stop_at is not None:
            raise NotReadyError("the service is stopping")

    def refuse_when_full(self, last: Slots | None = None) -> None:
        """Return while every stage behind an upload has room: why take what will be refused.

        Args:
            last: Bounds the stage behind the worker, where there is one.

        Raises:
            NotReadyError: The service is stopping.
            OverloadedError: A stage is full.
            WorkerUnavailableError: Nobody embeds.
        """
        self.check_not_stopping()
        self.worker.refuse_when_full(self.settings.queue.deadline_s)
        if last is not None:
            last.refuse_when_full()


@dataclass(slots=True)
class Timing:
    """Where the time of a request went, milliseconds."""

    started: float = field(default_factory=time.perf_counter)
    decode: float = 0.0
    queue: float = 0.0
    embed: float = 0.0
    search: float = 0.0

    def body(self) -> dict[str, float]:
        """As an answer shows it."""
        total = (time.perf_counter() - self.started) * 1000
        stages = {name: getattr(self, name) for name in ("decode", "queue", "embed", "search")}
        return {name: round(value, 3) for name, value in {**stages, "total": total}.items()}


@dataclass(frozen=True, slots=True)
class Upload:
    """A form whose frames are decoded.

    Args:
        fields: Its text fields.
        decoded: Its frames, and what comes with them.
        timing: Running.
        deadline: Until when it has to be embedded, in seconds of the event loop's clock.
    """

    fields: dict[str, str]
    decoded: Decoded
    timing: Timing
    deadline: float

    @property
    def tracklet(self) -> DecodedTracklet:
        """Its frames."""
        return self.decoded.tracklet


async def get_parts(request: Request) -> Parts:
    """The parts of the app that a request came to."""
    # Not a plain function: FastAPI would ask it in a thread, and wait for one behind slow writes.
    parts: Parts = request.app.state.parts
    return parts


PartsDep = Annotated[Parts, Depends(get_parts)]


async def receive(
    request: Request, parts: Parts, *, last: Slots | None = None, keep: Keep = Keep.NOTHING
) -> Upload:
    """Read and decode the tracklet of a request, under the limits.

    Args:
        request: With an unread body.
        parts: Of the service.
        last: Bounds the stage behind the worker, where there is one.
        keep: What is to be stored of it, besides its embedding.

    Raises:
        ServiceError: A stage is full, the service stops, or the upload is refused.
        DeadlineExceededError: Also where no decoder had time for it.
        ClientDisconnect: The client has hung up.
    """
    parts.refuse_when_full(last)
    settings = parts.settings
    with parts.uploads.take():
        form = await read_form(request, settings.limits)
        timing = Timing()
        deadline = asyncio.get_running_loop().time() + settings.queue.deadline_s
        async with while_connected(request), _until(deadline, parts):
            decoded = await parts.decoders.decode(form.files, keep=keep)
        _observe_decoding(parts, timing)
    check_frames(decoded, settings.quality)
    return Upload(form.fields, decoded, timing, deadline)


async def receive_pair(request: Request, parts: Parts) -> tuple[Upload, Upload]:
    """Read and decode the two tracklets of a request, whose fields begin with `PAIR_PREFIXES`.

    Raises:
        ServiceError: See `receive`; the message says of which upload, where it is one's.
        ClientDisconnect: The client has hung up.
    """
    parts.refuse_when_full()
    settings = parts.settings
    fields = [prefix + name for prefix in PAIR_PREFIXES for name in FILE_FIELDS]
    with parts.uploads.take():
        form = await read_form(request, settings.limits, fields)
        _refuse_fields(form.fields, fields)
        timing = Timing()
        deadline = asyncio.get_running_loop().time() + settings.queue.deadline_s
        async with while_connected(request), _until(deadline, parts):
            a, b = await asyncio.gather(
                *(_decode_one_of_two(parts, form.files, prefix) for prefix in PAIR_PREFIXES)
            )
        _observe_decoding(parts, timing)
    return Upload({}, a, timing, deadline), Upload({}, b, timing, deadline)


async def _decode_one_of_two(parts: Parts, files: dict[str, list[bytes]], prefix: str) -> Decoded:
    own = {name: files.get(prefix + name, []) for name in FILE_FIELDS}
    try:
        decoded = await parts.decoders.decode(own)
        check_frames(decoded, parts.settings.quality)
    except ValidationError as error:
        pointer = f"/{prefix}{error.pointer.removeprefix('/')}"
        raise ValidationError(f"upload {prefix[:1]}: {error}", pointer) from error
    except ServiceError as error:
        raise type(error)(f"upload {prefix[:1]}: {error}") from error
    return decoded


def _observe_decoding(parts: Parts, timing: Timing) -> None:
    seconds = time.perf_counter() - timing.started
    timing.decode = seconds * 1000
    note(decode_ms=round(timing.decode, 3))
    parts.metrics.observe_decode(seconds)


@asynccontextmanager
async def _until(deadline: float, parts: Parts) -> AsyncIterator[None]:
    """Go on until a time of the event loop's clock.

    Raises:
        DeadlineExceededError: It has come.
    """
    try:
        async with asyncio.timeout_at(deadline) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceededError(
            f"expected an embedding within {parts.settings.queue.deadline_s:g} s, "
            "the service took longer"
        ) from error


async def receive_bare(request: Request, parts: Parts, *, last: Slots | None = None) -> Upload:
    """Read and decode a tracklet that comes without further fields, see `receive`.

    Raises:
        ServiceError: Likewise, or there are fields: they would be ignored.
    """
    upload = await receive(request, parts, last=last)
    _refuse_fields(upload.fields, FILE_FIELDS)
    return upload


def _refuse_fields(fields: dict[str, str], expected: Sequence[str]) -> None:
    for name, value in fields.items():
        if value:  # an HTML form sends the fields that were left blank as well
            raise ValidationError(
                f"expected {', '.join(expected)} alone in the form, got a field {name!r}",
                f"/{name}",
            )


async def embed(
    request: Request, parts: Parts, upload: Upload, *, with_attention: bool = False
) -> Embedded:
    """Have the worker embed an upload.

    Raises:
        OverloadedError: The queue is full.
        DeadlineExceededError: It took longer than the deadline.
        WorkerUnavailableError: The worker is gone, or failed at it.
        ValidationError: The frames disagree more than they may.
        InvalidEmbeddingError: What it made is not finite; JSON would carry it as null.
        ClientDisconnect: The client has hung up; its tracklet has left the queue.
    """
    [embedded] = await embed_all(request, parts, [upload], with_attention=with_attention)
    return embedded


async def embed_all(
    request: Request, parts: Parts, uploads: Sequence[Upload], *, with_attention: bool = False
) -> list[Embedded]:
    """Have the worker embed the uploads of one request, together; see `embed`."""
    deadline, timing = uploads[0].deadline, uploads[0].timing
    left_s = deadline - asyncio.get_running_loop().time()
    waiting: list[asyncio.Future[Embedded]] = []
    try:
        for one in uploads:
            future = parts.worker.submit(
                one.tracklet.clip, deadline_s=left_s, with_attention=with_attention
            )
            waiting.append(asyncio.wrap_future(future))
        async with while_connected(request), _until(deadline, parts):
            made = await asyncio.gather(*waiting)
    finally:
        for each in waiting:
            each.cancel()  # what is still there, nobody waits for
    for embedded in made:
        if not np.isfinite(embedded.result.embedding).all():
            raise InvalidEmbeddingError("expected a finite embedding, got NaN or infinity")
        check_agreement(embedded.result.frame_distance, parts.settings.quality)
    timing.queue = 1000 * max(one.queue_s for one in made)
    timing.embed = 1000 * max(one.embed_s for one in made)
    note(queue_ms=round(timing.queue, 3), embed_ms=round(timing.embed, 3))
    return made


class Found(NamedTuple):
    """What a search came to.

    Args:
        result: The gallery's answer.
        threshold: Greatest distance that is a match; None while none is set.
    """

    result: SearchResult
    threshold: float | None


async def search(
    parts: Parts,
    timing: Timing,
    embedding: Embeddings,
    *,
    top_k: int,
    group_by: GroupBy,
    filters: Filters,
    max_distance: float | None,
) -> Found:
    """Search the gallery, in a thread; see `index.gallery.Gallery.search`.

    Raises:
        OverloadedError: Too many searches run or wait.
        GalleryError: The gallery refuses or fails.
    """
    with parts.searches.take():
        started = time.perf_counter()

        def work() -> Found:
            result = parts.gallery.search(
                embedding,
                model=parts.embedder.model,
                top_k=top_k,
                group_by=group_by,
                filters=filters,
                max_distance=max_distance,
            )
            return Found(result, threshold_of(parts))

        loop = asyncio.get_running_loop()
        # What is logged there belongs to this request.
        found = await loop.run_in_executor(parts.searchers, copy_context().run, work)
        seconds = time.perf_counter() - started
    timing.search = seconds * 1000
    note(search_ms=round(timing.search, 3))
    parts.metrics.observe_search(seconds)
    return found


def threshold_of(parts: Parts) -> float | None:
    """Greatest distance that is a match: the setting's, or the calibrated one; reads the store."""
    if (chosen := parts.settings.threshold) is not None:
        return chosen
    calibration = parts.gallery.calibration()
    return None if calibration is None else calibration.threshold


async def write(
    parts: Parts, work: Callable[Given, Result], /, *given: Given.args, **named: Given.kwargs
) -> Result:
    """Change the gallery, in a thread that does nothing else.

    Args:
        parts: Of the service.
        work: What to call.
        *given: What with.
        **named: Likewise.

    Raises:
        OverloadedError: Too many changes run or wait.
        AuditUnavailableError: The audit trail cannot tell of it, so nothing is changed.
        GalleryError: The gallery refuses or fails.
    """
    with parts.writes.take():
        await begin_change()
        call = partial(copy_context().run, work, *given, **named)
        return await asyncio.get_running_loop().run_in_executor(parts.writers, call)


async def change(
    parts: Parts, work: Callable[Given, Result], /, *given: Given.args, **named: Given.kwargs
) -> Result:
    """Change the gallery as a request of its own asks for, see `write`.

    Raises:
        NotReadyError: The service is stopping.
        OverloadedError: See `write`.
        GalleryError: Likewise.
    """
    parts.check_not_stopping()
    return await write(parts, work, *given, **named)


def frame_counts(tracklet: DecodedTracklet) -> FrameCounts:
    """The ``frames`` member of an answer."""
    return FrameCounts(received=tracklet.received, used=len(tracklet.positions))


def quality_of(upload: Upload, embedded: Embedded) -> QualityBody:
    """The ``quality`` member of an answer."""
    seen = upload.decoded.quality
    return QualityBody(
        frames=len(upload.tracklet.positions),
        shortest_side=seen.shortest_side,
        sharpness=round(seen.sharpness, 2),
        brightness=round(seen.brightness, 4),
        frame_distance=round(embedded.result.frame_distance, 4),
    )
