"""Structured logs: one line an event, JSON or text, with the request's id."""

import json
import logging
import os
import select
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Any, Literal, TextIO

log = logging.getLogger(__name__)
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_request_ids: ContextVar[tuple[str, ...]] = ContextVar("request_ids", default=())
_notes: ContextVar[dict[str, object] | None] = ContextVar("notes", default=None)
_listener: ContextVar[Callable[[Mapping[str, object]], None] | None] = ContextVar(
    "listener", default=None
)

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
# Lines that wait for a reader who has stopped reading, a few MB; warnings and errors find as much
# room again.
WAITING_LINES = 8192
BATCH_LINES = 256  # written at a time
FLUSH_S = 2.0  # that the end of the process waits for a reader


def begin_notes() -> dict[str, object]:
    """Begin the notes of a request, for the line that is written at its end."""
    notes: dict[str, object] = {}
    _notes.set(notes)
    return notes


def note(**fields: object) -> None:
    """Add fields to the line that is written at the end of the request at hand.

    Outside a request, as in the worker's thread, nothing happens.

    Args:
        fields: Numbers and words; no identity, no file name.

    Raises:
        ValueError: A field has the name of one that every line has.
    """
    if not _STANDARD.isdisjoint(fields):
        raise ValueError(f"expected other names than a line's own, got {sorted(fields)}")
    notes = _notes.get()
    if notes is not None:
        notes.update(fields)
    if (listener := _listener.get()) is not None:
        listener(fields)


def listen_to_notes(listener: Callable[[Mapping[str, object]], None]) -> None:
    """Have somebody hear what is noted of the request at hand from now on, when it is noted."""
    _listener.set(listener)


@contextmanager
def on_behalf_of(ids: Iterable[str | None]) -> Iterator[None]:
    """Give every line of a block the ids of the requests that it works for.

    For threads that serve several requests at a time; what a request runs in a thread pool has its
    id already.

    Args:
        ids: Of each tracklet's request; None for one without.
    """
    known = tuple(dict.fromkeys(one for one in ids if one is not None))
    alone = request_id.set(known[0] if len(known) == 1 else None)
    together = _request_ids.set(known)
    try:
        yield
    finally:
        _request_ids.reset(together)
        request_id.reset(alone)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    if "request_id" in fields:
        return fields
    if (current := request_id.get()) is not None:
        fields["request_id"] = current
    elif ids := _request_ids.get():
        fields["request_ids"] = list(ids)
    return fields


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, then what was passed as ``extra``."""

    # Made once: it takes as long as a line.
    _encode = json.JSONEncoder(default=str, ensure_ascii=False).encode

    def format(self, record: logging.LogRecord) -> str:
        """Write a record as one line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return self._encode(line)


class TextFormatter(logging.Formatter):
    """``time LEVEL message key=value ...`` for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record as one line, a traceback below it."""
        time = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S.%f")[:-3]
        fields = "".join(f" {name}={_plain(value)}" for name, value in _fields(record).items())
        line = f"{time} {record.levelname:<7} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _plain(value: object) -> object:
    return ",".join(map(str, value)) if isinstance(value, list) else value


class LineHandler(logging.Handler):
    """Writes lines from a thread of its own, in the order they came.

    Whoever reads them may stop, like a terminal that is paused or a collector that hangs; written
    where they are logged, the lines would then stop the event loop, and the probes with it. Here
    they wait, and what is over the bound is dropped, counted and told.

    A line is made where it is logged: there the request's id is known. A queue and no lock is
    between the two sides, because a signal's handler may log in the middle of a line.

    Args:
        stream: Where to; None, as where standard error is closed, for nowhere.
        waiting_lines: How many lines wait at most; twice as many from warnings upwards.
    """

    def __init__(self, stream: TextIO | None, waiting_lines: int = WAITING_LINES) -> None:
        super().__init__()
        self._stream = stream
        self._descriptor = _descriptor(stream)
        self._waiting_lines = waiting_lines
        self._queue: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._dropped = 0  # ever
        self._told = 0  # of them
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record's line, or drop it."""
        limit = self._waiting_lines * (2 if record.levelno >= logging.WARNING else 1)
        if self._queue.qsize() >= limit:
            self._dropped += 1  # one thread at a time: the caller holds this handler's lock
            return
        try:
            line = self.format(record) + "\n"
        except Exception:  # noqa: BLE001 as of any handler: a broken line must not break who logs it
            self.handleError(record)
            return
        if self._closed or not self._thread.is_alive():  # at the end, or in a fork
            self._write(line)
        else:
            self._queue.put(line)

    def flush(self) -> None:
        """Return when all that was logged is written, or after 2 s without a reader."""
        if self._thread.is_alive():
            written = threading.Event()
            self._queue.put(written)
            written.wait(FLUSH_S)

    def close(self) -> None:
        """Write what waits; lines that come later are written where they are logged."""
        if not self._closed:
            self._closed = True
            self.flush()
        super().close()

    def _run(self) -> None:
        while not (self._closed and self._queue.empty()):
            batch = [self._queue.get()]
            while not self._queue.empty() and len(batch) < BATCH_LINES:
                batch.append(self._queue.get())
            self._write("".join(one for one in batch if isinstance(one, str)))
            self._tell_dropped()
            for one in batch:
                if isinstance(one, threading.Event):
                    one.set()

    def _tell_dropped(self) -> None:
        dropped = self._dropped
        if dropped == self._told:
            return
        record = logging.makeLogRecord(
            {
                "name": __name__,
                "levelno": logging.WARNING,
                "levelname": "WARNING",
                "msg": "log lines were dropped, because nobody read them fast enough",
                "lines": dropped - self._told,
            }
        )
        self._told = dropped
        self._write(self.format(record) + "\n")

    def _write(self, text: str) -> None:
        try:
            if self._descriptor is not None:
                _write_all(self._descriptor, text.encode("utf-8", "backslashreplace"))
            elif self._stream is not None:
                self._stream.write(text)
                self._stream.flush()
        except (OSError, ValueError):  # closed: there is nobody left to tell
            return


def _descriptor(stream: TextIO | None) -> int | None:
    """To write past Python's buffer: a thread stuck in that would abort the interpreter's end."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):  # of a test's, in memory
        return None


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:  # somebody who shares the pipe has made it non-blocking
            select.select([], [descriptor], [])


def configure_logging(style: Literal["json", "text"], level: int = logging.INFO) -> None:
    """Send every log line of the process to standard error in one style."""
    handler = LineHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    # Our middleware writes one line a request, with its id; uvicorn's would repeat it.
    logging.getLogger("uvicorn.access").disabled = True
    # What Python would print past the log, over several lines.
    logging.captureWarnings(True)
    threading.excepthook = _log_thread_error


def flush_logs() -> None:
    """Return when all lines are written, or after 2 s; for an end that skips Python's own."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def _log_thread_error(error: threading.ExceptHookArgs) -> None:
    if error.exc_value is None or isinstance(error.exc_value, SystemExit):
        return
    log.critical(
        "a thread has ended by an error",
        exc_info=error.exc_value,
        extra={"of_thread": error.thread.name if error.thread else "unknown"},
    )
