"""The HTTP application, made from its parts: no globals, and no work at import."""

import logging
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from index.gallery import Gallery
from service import problems
from service.middleware import (
    BodyLimitMiddleware,
    DrainMiddleware,
    KeyMiddleware,
    RequestMiddleware,
)
from service.parts import Parts, UploadSlots
from service.routes import gallery as gallery_routes
from service.routes import query as query_routes
from service.routes import status as status_routes
from service.settings import Settings
from service.worker import Embedder, EmbeddingWorker

log = logging.getLogger(__name__)
_DESCRIPTION = """Finds a person again: enrol tracklets (the frames of one person seen by one
camera), then
ask who a tracklet shows. Identities come back ranked by Euclidean distance."""


def create_app(embedder: Embedder, gallery: Gallery, settings: Settings) -> FastAPI:
    """Make the application.

    Args:
        embedder: Makes embeddings. The app's worker calls it from one thread.
        gallery: Stores and ranks them. The app closes it when it shuts down.
        settings: Limits, bounds and keys.

    Returns:
        An ASGI application, ready to be served by one process.
    """
    parts = Parts(
        embedder=embedder,
        gallery=gallery,
        settings=settings,
        worker=EmbeddingWorker(
            embedder,
            max_frames=settings.batch.max_frames,
            max_delay_s=settings.batch.max_delay_ms / 1000,
            max_tracklets=settings.queue.max_tracklets,
        ),
        decoders=ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decoder"),
        uploads=UploadSlots(settings.limits.uploads),
    )
    app = FastAPI(
        title="Passerby", version=version("passerby"), description=_DESCRIPTION, lifespan=_lifespan
    )
    app.state.parts = parts
    for routes in (gallery_routes, query_routes, status_routes):
        app.include_router(routes.router)
    problems.install(app)
    # The last one added is the outermost.
    limits = settings.limits
    app.add_middleware(
        BodyLimitMiddleware,
        upload_bytes=limits.request_bytes,
        other_bytes=8 * limits.metadata_bytes,
    )
    if settings.api_keys:
        app.add_middleware(KeyMiddleware, keys=settings.api_keys)
    app.add_middleware(DrainMiddleware, limit_bytes=limits.request_bytes)
    app.add_middleware(RequestMiddleware)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start the worker; at the end let it finish, then close the gallery."""
    parts: Parts = app.state.parts
    parts.worker.start()
    try:
        yield
    finally:
        await run_in_threadpool(parts.worker.close, parts.settings.shutdown_grace_s)
        parts.decoders.shutdown(cancel_futures=True)
        await run_in_threadpool(parts.gallery.close)
        log.info("stopped")
