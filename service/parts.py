"""What a running service is made of, and how routes get at it."""

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from fastapi import Depends, Request

from index.gallery import Gallery, InvalidEmbeddingError
from service.errors import DeadlineExceededError, OverloadedError, ValidationError
from service.multipart import FILE_FIELDS, Form, read_form
from service.schemas import FrameCounts
from service.settings import LimitSettings, Settings
from service.strips import film_strip
from service.uploads import DecodedTracklet, FrameChoice, content_digest, decode, unpack
from service.worker import Embedded, Embedder, EmbeddingWorker


class UploadSlots:
    """Bounds how many uploads are in memory at a time."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._lock = threading.Lock()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold a slot.

        Raises:
            OverloadedError: All are taken.
        """
        with self._lock:
            if self._taken >= self._limit:
                raise OverloadedError(
                    f"expected fewer than {self._limit} uploads at a time, got more"
                )
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
        worker: Batches the embedder's work.
        decoders: Threads that decode uploads.
        uploads: Bounds uploads in memory.
        patching: Held from reading a record to writing its change, so that none is lost.
    """

    embedder: Embedder
    gallery: Gallery
    settings: Settings
    worker: EmbeddingWorker
    decoders: ThreadPoolExecutor
    uploads: UploadSlots
    patching: threading.Lock = field(default_factory=threading.Lock)


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
        timing: Running.
    """

    fields: dict[str, str]
    tracklet: DecodedTracklet
    content: str
    timing: Timing


def get_parts(request: Request) -> Parts:
    """The parts of the app that a request came to."""
    parts: Parts = request.app.state.parts
    return parts


PartsDep = Annotated[Parts, Depends(get_parts)]


async def receive(request: Request, parts: Parts) -> Upload:
    """Read and decode the tracklet of a request, under the limits.

    Raises:
        ServiceError: The queue is full, or the upload is refused.
    """
    parts.worker.refuse_when_full()  # before the body: why upload what will be refused
    settings = parts.settings
    with parts.uploads.take():
        form = await _read_in_time(request, settings.limits)
        timing = Timing()
        loop = asyncio.get_running_loop()
        tracklet, content = await loop.run_in_executor(parts.decoders, _decode_form, form, parts)
        timing.decode = (time.perf_counter() - timing.started) * 1000
    return Upload(form.fields, tracklet, content, timing)


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


def _decode_form(form: Form, parts: Parts) -> tuple[DecodedTracklet, str]:
    settings = parts.settings
    kind, files = unpack(form.files, settings.limits)
    choice = FrameChoice(
        settings.frames_per_tracklet, settings.sampling, parts.embedder.preprocessing
    )
    return decode(kind, files, choice, settings.limits), content_digest(files)


async def embed(parts: Parts, upload: Upload, *, with_attention: bool = False) -> Embedded:
    """Have the worker embed an upload.

    Raises:
        OverloadedError: The queue is full.
        DeadlineExceededError: It took longer than the deadline.
        WorkerUnavailableError: The worker is gone, or failed at it.
        InvalidEmbeddingError: What it made is not finite; JSON would carry it as null.
    """
    deadline_s = parts.settings.queue.deadline_s
    future = parts.worker.submit(
        upload.tracklet.clip, deadline_s=deadline_s, with_attention=with_attention
    )
    try:
        embedded = await asyncio.wait_for(asyncio.wrap_future(future), deadline_s)
    except TimeoutError as error:
        raise DeadlineExceededError(
            f"expected an embedding within {deadline_s:g} s, the service took longer"
        ) from error
    if not np.isfinite(embedded.result.embedding).all():
        raise InvalidEmbeddingError("expected a finite embedding, got NaN or infinity")
    upload.timing.queue = embedded.queue_s * 1000
    upload.timing.embed = embedded.embed_s * 1000
    return embedded


async def draw_strip(parts: Parts, upload: Upload) -> bytes | None:
    """The film strip of an upload, where strips are kept."""
    if not parts.settings.thumbnails:
        return None
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(parts.decoders, film_strip, upload.tracklet.clip)


def frame_counts(tracklet: DecodedTracklet) -> FrameCounts:
    """The ``frames`` member of an answer."""
    return FrameCounts(received=tracklet.received, used=len(tracklet.positions))
