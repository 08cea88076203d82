"""Start and stop the service: its parts from the settings, the process around them."""

import contextlib
import ipaddress
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import uvicorn

from index.embedded import EmbeddedGallery
from model.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    untrained_checkpoint,
)
from model.cores import available_cores
from model.embedder import Embedder
from service.app import create_app, make_decoders
from service.audit import DIRECTORY, Trail
from service.connections import SPARE, Connections, allow_descriptors
from service.errors import KeysError
from service.keys import Key, KeyRing, create_key, revoke_key
from service.logs import flush_logs
from service.parts import Parts
from service.settings import UNTRAINED, InvalidSettingsError, Settings
from service.tracing import Tracing
from service.worker import Embedder as ServedEmbedder
from service.worker import EmbeddingWorker

log = logging.getLogger(__name__)
WATCH_S = 0.5
AWAY_S = 0.5  # later than it should have come, a look tells that the process was paused
# Seconds in which those who wait for a lost worker are answered.
ABANDONED_GRACE_S = 3.0
# Whole seconds for answers on their way when everything else is over.
CLOSING_S = 2
# Seconds after the grace in which everything has to be closed.
LAST_S = 8.0
FIRST_LABEL = "first"


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
    """Uvicorn that finishes what it accepted, ends with status 0, and at once at a second signal.

    Between the signal and the end it goes on answering: the probe is red, new uploads get 503.

    Args:
        config: Uvicorn's.
        parts: Whose work is finished.
    """

    lost = False  # ended because nothing can be embedded any more

    def __init__(self, config: uvicorn.Config, parts: Parts) -> None:
        super().__init__(config)
        self._parts = parts

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
        del frame
        name = signal.Signals(sig).name
        if self._parts.stop_at is not None:
            log.warning("ending at once", extra={"signal": name})
            flush_logs()
            os._exit(128 + sig)  # as if the signal had ended it; what was acknowledged is stored
        log.info("stopping", extra={"signal": name})
        self._parts.begin_stopping()
        last = threading.Timer(self._parts.seconds_left() + LAST_S, _end_anyway)
        last.daemon = True
        last.start()

    async def on_tick(self, counter: int) -> bool:
        """Whether to close: after a signal, once all is answered or the grace is over."""
        if await super().on_tick(counter):
            return True
        stop_at = self._parts.stop_at
        if stop_at is None:
            return False
        if time.monotonic() >= stop_at:
            log.warning("the grace is over: what is not embedded yet gets 503")
            self._parts.worker.abandon()
            return True
        return not self.server_state.tasks


def _end_anyway() -> None:
    """End a process that does not come to its end: a write may wait for a disk that hangs."""
    log.warning("ending, although something does not end; what was acknowledged is stored")
    flush_logs()
    os._exit(0)


def _watch(worker: EmbeddingWorker, server: _Server) -> None:
    """End the process once its worker is lost, so that whatever supervises it starts another one.

    Nothing within the process helps: a thread that hangs cannot be ended, and a device that failed
    once fails the whole process.
    """
    while (reason := worker.lost()) is None:
        before = time.monotonic()
        time.sleep(WATCH_S)
        away_s = time.monotonic() - before - WATCH_S
        if away_s > AWAY_S:
            log.warning("the process was paused", extra={"seconds": round(away_s, 1)})
            worker.forgive(away_s)
    log.critical("ending with status 1, to be started again: %s", reason)
    server.lost = server.should_exit = True
    try:
        worker.abandon()
        time.sleep(ABANDONED_GRACE_S)
    finally:
        flush_logs()
        os._exit(1)  # a thread that hangs would keep the process for ever


def load_embedder(settings: Settings) -> Embedder:
    """The embedder that the settings ask for.

    Raises:
        ModelError: The weights, the device, the precision or the runtime cannot be had.
    """
    return Embedder(
        choose_checkpoint(settings.weights),
        device=settings.device,
        precision=settings.precision,
        runtime=settings.runtime,
    )


def check_exposure(settings: Settings, keys: KeyRing) -> None:
    """Return where nobody else than this machine can ask without a key, or that is wanted.

    Raises:
        InvalidSettingsError: The service would be open to a network.
    """
    if keys.is_closed or settings.first_key or _is_loopback(settings.host):
        return
    if not settings.insecure:
        raise InvalidSettingsError(
            f"expected a key before listening on {settings.host}, where others can ask, got none: "
            "make one (passerby keys create --role admin --label NAME), have one made "
            "(PASSERBY_FIRST_KEY=true), listen on 127.0.0.1, or say --insecure"
        )
    log.warning("there is no key: whoever reaches this service may read and erase everything")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name, or none, which is every address
        return False


def open_trail(settings: Settings) -> Trail | None:
    """The audit trail that the settings ask for; None where they ask for none.

    Raises:
        AuditError: It cannot be opened.
    """
    audit = settings.audit
    if not audit.enabled:
        return None
    directory = settings.data_dir / DIRECTORY
    return Trail(directory, file_bytes=audit.file_bytes, files=audit.files)


def make_first_key(settings: Settings, keys: KeyRing, trail: Trail | None) -> None:
    """Make a key with role admin where there is none, and print it, once and for all.

    Raises:
        ServiceError: It cannot be kept, or the audit trail cannot tell of it.
    """
    if not settings.first_key or keys.is_closed:
        return

    def tell(key: Key) -> None:
        if trail is not None:
            line = {"id": secrets.token_hex(8), "action": "create-key", "by": "first start"}
            about = {"about": key.label, "about_id": key.key_id, "about_role": key.role}
            trail.append({**line, **about, "outcome": "done"})

    key, secret = create_key(settings.data_dir, "admin", FIRST_LABEL, tell=tell)
    try:
        if sys.stdout is None:
            raise OSError("there is no standard output")
        # Past the log, which is kept and sent around: this is the only time that it can be read.
        heading = "The first key of this service, with role admin; it is shown this once:"
        sys.stdout.write(f"{heading}\n\n    {secret}\n\n")
        sys.stdout.flush()
    except OSError as error:
        revoke_key(settings.data_dir, key.key_id)
        raise KeysError(
            f"cannot print the first key ({error}), so it was revoked; make one with "
            "`passerby keys create --role admin --label NAME`"
        ) from error
    keys.refresh()
    log.info("made the first key and printed it", extra={"key_label": FIRST_LABEL})


def run(settings: Settings, embedder: ServedEmbedder | None = None) -> NoReturn:
    """Serve until a signal, or until nothing can be embedded any more; ends the process.

    Args:
        settings: All of them.
        embedder: Another one than the settings ask for.

    Raises:
        InvalidSettingsError: It would be open to a network, or cannot make the traces asked for.
        ModelError: The weights, the device, the precision or the runtime cannot be had.
        GalleryError: The data directory cannot be used.
        ServiceError: Its keys or its audit trail cannot.
    """
    keys = KeyRing(settings.data_dir, settings.api_keys)
    check_exposure(settings, keys)
    tracing = Tracing.of(settings)
    embedder = embedder or load_embedder(settings)
    cores = available_cores()
    gallery = EmbeddedGallery(
        settings.data_dir, index=settings.index, searches=cores, storage=settings.storage
    )
    trail = open_trail(settings)
    make_first_key(settings, keys, trail)
    # One more than there are cores: none of these is without work while an answer is read.
    processes = cores + 1 if settings.decoders is None else settings.decoders
    counts = gallery.counts()
    described = embedder.describe()
    log.info(
        "starting",
        extra={
            "address": f"http://{settings.host}:{settings.port}",
            "model": embedder.model,
            **{name: described.get(name) for name in ("device", "precision", "runtime")},
            "cores": cores,
            "decoders": processes,
            "keys": "needed" if keys.is_closed else "none",
            "tracklets": counts.tracklets,
            "identities": counts.identities,
        },
    )
    decoders = make_decoders(embedder, settings, processes=processes)
    app = create_app(embedder, gallery, settings, decoders, keys=keys, trail=trail, tracing=tracing)
    parts: Parts = app.state.parts
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Connections(settings.limits, parts.metrics).protocol(),
        ws="none",  # nothing here speaks it, and it would leave the bounds on connections
        log_config=None,
        access_log=False,
        server_header=False,
        # Nobody is believed about who asks but who is named; by itself uvicorn believes this
        # machine, and whomever FORWARDED_ALLOW_IPS names.
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        timeout_graceful_shutdown=CLOSING_S,
    )
    server = _Server(config, parts)
    allow_descriptors(settings.limits.connections + SPARE)
    watched = (parts.worker, server)
    threading.Thread(target=_watch, args=watched, name="watchdog", daemon=True).start()
    server.run()
    flush_logs()
    # Not by returning: a thread that still computes, or waits for a disk that hangs, would be
    # waited for.
    os._exit(1 if server.lost or not server.started else 0)
