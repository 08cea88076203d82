"""The HTTP application, made from its parts: no globals, and no work at import."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI

from index.gallery import Gallery
from service import problems
from service.access import KeyMiddleware, RoleMiddleware, check_rule, describe_access
from service.audit import Trail
from service.auditing import AuditMiddleware
from service.decoding import Decoders
from service.expiry import sweep
from service.headers import (
    CORS_ANSWER_HEADERS,
    CORS_METHODS,
    CORS_REQUEST_HEADERS,
    CrossOriginMiddleware,
    HeadersMiddleware,
    policy_of,
)
from service.keys import KeyRing
from service.metrics import Metrics
from service.middleware import (
    BodyLimitMiddleware,
    DrainMiddleware,
    RequestMiddleware,
    SpareMiddleware,
)
from service.parts import Parts, Slots
from service.readiness import Readiness
from service.routes import docs as docs_routes
from service.routes import gallery as gallery_routes
from service.routes import identities as identity_routes
from service.routes import metrics as metrics_routes
from service.routes import query as query_routes
from service.routes import status as status_routes
from service.settings import Settings
from service.tracing import Tracing, TracingMiddleware
from service.uploads import FrameChoice
from service.worker import Embedder, EmbeddingWorker

log = logging.getLogger(__name__)
# Frames in one batch, where neither the settings nor the embedder say.
BATCH_FRAMES = 64
_DESCRIPTION = """Finds a person again: enrol tracklets (the frames of one person seen by one
camera), then
ask who a tracklet shows. Identities come back ranked by Euclidean distance."""


def create_app(
    embedder: Embedder,
    gallery: Gallery,
    settings: Settings,
    decoders: Decoders | None = None,
    *,
    keys: KeyRing | None = None,
    trail: Trail | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Make the application.

    Args:
        embedder: Makes embeddings. The app's worker calls it from one thread.
        gallery: Stores and ranks them. The app closes it when it shuts down.
        settings: Limits, bounds and keys.
        decoders: Decode uploads; threads of this process where None. The app starts and closes
            them.
        keys: Who may do what; those of the settings alone where None. The app follows them.
        trail: Where the app tells who did what, and which it closes; nowhere where None.
        tracing: Makes traces, and is closed by the app; nobody where None.

    Returns:
        An ASGI application, ready to be served by one process.
    """
    metrics = Metrics(version=version("passerby"), model=embedder.model)
    parts = Parts(
        embedder=embedder,
        gallery=gallery,
        settings=settings,
        metrics=metrics,
        worker=EmbeddingWorker(
            embedder,
            max_frames=settings.batch.max_frames or _batch_frames(embedder),
            max_delay_s=settings.batch.max_delay_ms / 1000,
            max_tracklets=settings.queue.max_tracklets,
            metrics=metrics,
        ),
        decoders=decoders or make_decoders(embedder, settings, processes=0),
        uploads=Slots(settings.limits.uploads, "uploads"),
        searches=Slots(settings.limits.searches, "searches"),
        writes=Slots(settings.limits.writes, "writes"),
    )
    metrics.watch(
        queue=parts.worker.count_waiting, counts=gallery.counts, data_dir=settings.data_dir
    )
    app = FastAPI(
        title="Passerby",
        version=version("passerby"),
        description=_DESCRIPTION,
        lifespan=_lifespan,
        docs_url=None,  # ours load nothing from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # it would send a client wherever its Host header says
        dependencies=[Depends(check_rule)],
    )
    app.state.parts = parts
    app.state.trail = trail
    app.state.tracing = tracing
    app.state.keys = keys = keys or KeyRing(given=settings.api_keys)
    app.state.readiness = Readiness(parts, trail)
    # Those that have least time first: each is looked for in this order.
    for routes in (query_routes, gallery_routes, identity_routes, status_routes, metrics_routes):
        app.include_router(routes.router)
    app.include_router(docs_routes.router)
    problems.install(app)
    _describe(app, keys)
    # The last one added is the outermost.
    limits = settings.limits
    app.add_middleware(
        BodyLimitMiddleware,
        upload_bytes=limits.request_bytes,
        other_bytes=8 * limits.metadata_bytes,
        limit_s=limits.upload_s,
    )
    app.add_middleware(RoleMiddleware)
    app.add_middleware(AuditMiddleware, trail=trail)
    app.add_middleware(KeyMiddleware, keys=keys, per_minute=settings.rate_limit)
    app.add_middleware(SpareMiddleware, limit=limits.connections)
    app.add_middleware(DrainMiddleware, limit_bytes=limits.request_bytes)
    if settings.cors_origins:
        app.add_middleware(
            CrossOriginMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=CORS_METHODS,
            allow_headers=CORS_REQUEST_HEADERS,
            expose_headers=CORS_ANSWER_HEADERS,
        )
    if tracing is not None:
        app.add_middleware(TracingMiddleware, tracing=tracing)
    app.add_middleware(RequestMiddleware, metrics=metrics)
    policies = {path: policy_of(page) for path, page in docs_routes.page_contents().items()}
    app.add_middleware(HeadersMiddleware, policies=policies)
    return app


def _describe(app: FastAPI, keys: KeyRing) -> None:
    """Have the app's description say who may do what; a first key may come while it runs."""
    describe = app.openapi

    def describe_with_access() -> dict[str, Any]:
        schema = describe()
        describe_access(schema, is_closed=keys.is_closed)
        return schema

    app.openapi = describe_with_access  # type: ignore[method-assign]


def make_decoders(embedder: Embedder, settings: Settings, *, processes: int) -> Decoders:
    """Decoders for what an embedder takes.

    Args:
        embedder: Says what its frames must go through.
        settings: Which frames are used, and what an upload may hold.
        processes: See `service.decoding.Decoders`.
    """
    choice = FrameChoice(settings.frames_per_tracklet, settings.sampling, embedder.preprocessing)
    return Decoders(choice, settings.limits, processes=processes)


def _batch_frames(embedder: Embedder) -> int:
    frames: int = getattr(embedder, "max_frames", BATCH_FRAMES)
    return frames


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Start the worker and the decoders; at the end let them finish, then close the gallery."""
    parts: Parts = app.state.parts
    parts.worker.start()
    await asyncio.to_thread(parts.decoders.start)
    trail: Trail | None = app.state.trail
    keys: KeyRing = app.state.keys
    tasks = [asyncio.create_task(one) for one in (sweep(parts, trail=trail), keys.follow())]
    if trail is not None:
        tasks.append(asyncio.create_task(trail.follow()))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        # Not in the pool of threads that routes use: they may all wait for a disk that hangs.
        await asyncio.to_thread(parts.worker.close, parts.seconds_left())
        parts.decoders.close()
        for pool in (parts.searchers, parts.writers):
            pool.shutdown(wait=False, cancel_futures=True)
        app.state.readiness.close()
        await asyncio.to_thread(parts.gallery.close)
        if trail is not None:
            await asyncio.to_thread(trail.close)
        tracing: Tracing | None = app.state.tracing
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
        log.info("stopped")
