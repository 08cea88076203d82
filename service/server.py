"""Start and stop the service: its parts from the settings, the process around them."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import uvicorn

from index.embedded import EmbeddedGallery
from model.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    untrained_checkpoint,
)
from model.embedder import Embedder
from service.app import create_app
from service.settings import UNTRAINED, Settings
from service.worker import EmbeddingWorker

log = logging.getLogger(__name__)
WATCH_S = 0.5
# Seconds in which those who wait for a lost worker are answered.
ABANDONED_GRACE_S = 3.0


def choose_checkpoint(weights: str) -> Checkpoint:
    """The checkpoint that the settings ask for; nothing is downloaded.

    Args:
        weights: A path, ``bundled``, or ``untrained``, which is told as a warning.

    Raises:
        CheckpointError: The file is missing or damaged. That never leads to untrained weights: a
            service that answers and finds nobody is worse than one that does not start.
    """
    if weights == UNTRAINED:
        log.warning(
            "no trained weights, as PASSERBY_WEIGHTS asks: these are untrained and seeded and tell "
            "people apart by rough colours at best"
        )
        return untrained_checkpoint()
    return load_checkpoint(find_checkpoint(weights))


class _Server(uvicorn.Server):
    """Uvicorn that ends with status 0 after a signal, and at once at the second one."""

    lost = False  # ended because nothing can be embedded any more

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals without raising them again when everything is closed."""
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop gracefully; at the second signal without waiting for anybody."""
        if self.should_exit:
            self.force_exit = True
        log.info("stopping", extra={"signal": signal.Signals(sig).name})
        self.should_exit = True
        del frame


def _watch(worker: EmbeddingWorker, server: _Server) -> None:
    """End the process once its worker is lost, so that whatever supervises it starts another one.

    Nothing within the process helps: a thread that hangs cannot be ended, and a device that failed
    once fails the whole process.
    """
    while (reason := worker.lost()) is None:
        time.sleep(WATCH_S)
    log.critical("ending with status 1, to be started again: %s", reason)
    server.lost = server.should_exit = True
    try:
        worker.abandon()
        time.sleep(ABANDONED_GRACE_S)
    finally:
        os._exit(1)  # a thread that hangs would keep the process for ever


def run(settings: Settings) -> None:
    """Serve until a signal, or until nothing can be embedded any more.

    Raises:
        SystemExit: With status 1, in the second case.
        ModelError: The weights, the device or the precision cannot be had.
        GalleryError: The data directory cannot be used.
    """
    embedder = Embedder(
        choose_checkpoint(settings.weights), device=settings.device, precision=settings.precision
    )
    gallery = EmbeddedGallery(settings.data_dir, index=settings.index)
    counts = gallery.counts()
    log.info(
        "starting",
        extra={
            "address": f"http://{settings.host}:{settings.port}",
            "model": embedder.model,
            "device": str(embedder.device),
            "precision": embedder.precision,
            "tracklets": counts.tracklets,
            "identities": counts.identities,
        },
    )
    app = create_app(embedder, gallery, settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_s)),
    )
    server = _Server(config)
    watched = (app.state.parts.worker, server)
    threading.Thread(target=_watch, args=watched, name="watchdog", daemon=True).start()
    server.run()
    if server.lost:
        raise SystemExit(1)
