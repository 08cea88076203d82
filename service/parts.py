"""What a running service is made of, and how routes get at it."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, TypeVar

import numpy as np
from fastapi import Depends, Request
from starlette.requests import ClientDisconnect

from index.gallery import Filters, Gallery, GroupBy, InvalidEmbeddingError, SearchResult
from service.decoding import Decoders
from service.errors import (
    DeadlineExceededError,
    NotReadyError,
    OverloadedError,
    ValidationError,
)
from service.limits import FILE_FIELDS
from service.logs import note
from service.metrics import Metrics
from service.multipart import Form, read_form
from service.schemas import FrameCounts
from service.settings import LimitSettings, Settings
from service.uploads import DecodedTracklet
from service.worker import Embedded, Embedder, EmbeddingWorker

Result = TypeVar("Result")
# So many searches share a call of the index; more threads would only wait.
SEARCHERS = 16
# A server that tells of a client again and again without news must not keep the loop busy.
_ASK_AGAIN_S = 0.05


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
        searchers: Threads that search.
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
    searchers: ThreadPoolExecutor = field(
        default_factory=partial(ThreadPoolExecutor, SEARCHERS, thread_name_prefix="searcher")
    )
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

    def refuse_when_full(self) -> None:
        """Return while every stage behind an upload has room: why take what will be refused.

        Raises:
            NotReadyError: The service is stopping.
            OverloadedError: A stage is full.
            WorkerUnavailableError: Nobody embeds.
        """
        self.check_not_stopping()
        self.worker.refuse_when_full(self.settings.queue.deadline_s)
        self.searches.refuse_when_full()


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
        tracklet: Its frames.
        content: Digest of its files.
        strip: Its film strip, where one was asked for.
        timing: Running.
    """

    fields: dict[str, str]
    tracklet: DecodedTracklet
    content: str
    strip: bytes | None
    timing: Timing


async def get_parts(request: Request) -> Parts:
    """The parts of the app that a request came to."""
    # Not a plain function: FastAPI would ask it in a thread, and wait for one behind slow writes.
    parts: Parts = request.app.state.parts
    return parts


PartsDep = Annotated[Parts, Depends(get_parts)]


async def receive(request: Request, parts: Parts, *, with_strip: bool = False) -> Upload:
    """Read and decode the tracklet of a request, under the limits.

    Raises:
        ServiceError: A stage is full, the service stops, or the upload is refused.
        ClientDisconnect: The client has hung up.
    """
    parts.refuse_when_full()
    settings = parts.settings
    with parts.uploads.take():
        form = await _read_in_time(request, settings.limits)
        timing = Timing()
        decoding = parts.decoders.decode(form.files, with_strip=with_strip)
        tracklet, content, strip = await while_connected(request, decoding)
        seconds = time.perf_counter() - timing.started
    timing.decode = seconds * 1000
    note(decode_ms=round(timing.decode, 3))
    parts.metrics.observe_decode(seconds)
    return Upload(form.fields, tracklet, content, strip, timing)


async def while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """Await something for as long as there is somebody to tell.

    Args:
        request: With its body read.
        work: Cancelled when the client hangs up.

    Raises:
        ClientDisconnect: It has.
    """
    working = asyncio.ensure_future(work)
    hanging_up = asyncio.ensure_future(_hang_up(request))
    hanging_up.add_done_callback(lambda _: working.cancel())
    try:
        return await working
    except asyncio.CancelledError:
        if hanging_up.done():
            raise ClientDisconnect from None
        raise  # whoever awaits this was cancelled
    finally:
        working.cancel()
        hanging_up.cancel()


async def _hang_up(request: Request) -> None:
    """Return when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        await asyncio.sleep(_ASK_AGAIN_S)


async def _read_in_time(request: Request, limits: LimitSettings) -> Form:
    """Read a form; a client that stops sending must not keep its place for ever."""
    try:
        async with asyncio.timeout(limits.upload_s):
            return await read_form(request, limits)
    except TimeoutError as error:
        raise DeadlineExceededError(
            f"expected an upload within {limits.upload_s:g} s, it took longer"
        ) from error


async def receive_bare(request: Request, parts: Parts) -> Upload:
    """Read and decode a tracklet that comes without further fields.

    Raises:
        ServiceError: Likewise, or there are fields: they would be ignored.
    """
    upload = await receive(request, parts)
    for name, value in upload.fields.items():
        if value:  # an HTML form sends the fields that were left blank as well
            raise ValidationError(
                f"expected {', '.join(FILE_FIELDS)} alone in the form, got a field {name!r}",
                f"/{name}",
            )
    return upload


async def embed(
    request: Request, parts: Parts, upload: Upload, *, with_attention: bool = False
) -> Embedded:
    """Have the worker embed an upload.

    Raises:
        OverloadedError: The queue is full.
        DeadlineExceededError: It took longer than the deadline.
        WorkerUnavailableError: The worker is gone, or failed at it.
        InvalidEmbeddingError: What it made is not finite; JSON would carry it as null.
        ClientDisconnect: The client has hung up; its tracklet has left the queue.
    """
    deadline_s = parts.settings.queue.deadline_s
    future = parts.worker.submit(
        upload.tracklet.clip, deadline_s=deadline_s, with_attention=with_attention
    )
    try:
        embedding = asyncio.wait_for(asyncio.wrap_future(future), deadline_s)
        embedded = await while_connected(request, embedding)
    except TimeoutError as error:
        raise DeadlineExceededError(
            f"expected an embedding within {deadline_s:g} s, the service took longer"
        ) from error
    if not np.isfinite(embedded.result.embedding).all():
        raise InvalidEmbeddingError("expected a finite embedding, got NaN or infinity")
    upload.timing.queue = embedded.queue_s * 1000
    upload.timing.embed = embedded.embed_s * 1000
    note(queue_ms=round(upload.timing.queue, 3), embed_ms=round(upload.timing.embed, 3))
    return embedded


async def search(
    parts: Parts,
    upload: Upload,
    embedded: Embedded,
    *,
    top_k: int,
    group_by: GroupBy,
    filters: Filters,
    max_distance: float | None,
) -> SearchResult:
    """Search the gallery for an upload, in a thread; see `index.gallery.Gallery.search`.

    Raises:
        OverloadedError: Too many searches run or wait.
        GalleryError: The gallery refuses or fails.
    """
    with parts.searches.take():
        started = time.perf_counter()
        work = partial(
            parts.gallery.search,
            embedded.result.embedding,
            model=parts.embedder.model,
            top_k=top_k,
            group_by=group_by,
            filters=filters,
            max_distance=max_distance,
        )
        loop = asyncio.get_running_loop()
        # What is logged there belongs to this request.
        found = await loop.run_in_executor(parts.searchers, copy_context().run, work)
        seconds = time.perf_counter() - started
    upload.timing.search = seconds * 1000
    note(search_ms=round(upload.timing.search, 3))
    parts.metrics.observe_search(seconds)
    return found


def frame_counts(tracklet: DecodedTracklet) -> FrameCounts:
    """The ``frames`` member of an answer."""
    return FrameCounts(received=tracklet.received, used=len(tracklet.positions))
