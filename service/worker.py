"""The embedding worker: one thread that embeds what many requests ask for, a batch at a time."""

import contextlib
import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from model.embedder import TrackletEmbedding
from model.frames import Clip, Preprocessing
from service.errors import DeadlineExceededError, OverloadedError, WorkerUnavailableError
from service.logs import on_behalf_of, request_id
from service.metrics import Metrics

log = logging.getLogger(__name__)
# A poisoned device fails at everything; one bad tracklet, or two, must not turn the probe red.
FAILURES_UNTIL_UNREADY = 3
# A batch that takes so many times as long as others of its size has got stuck, after STUCK_S at
# the soonest.
STUCK_TIMES = 20.0
STUCK_S = 10.0
# Or after so many seconds, whatever others took, unless somebody wants it later than that: several
# times what 512 frames, the longest tracklet by default, take two cores.
STUCK_MOST_S = 120.0
# So many batches say how long one takes, by their median: a slow one or two change nothing.
PACE_BATCHES = 5
# Seconds for what a device does once, before the first batch.
WARM_UP_S = 300.0
# Seconds without work after which the worker embeds a grey frame to see whether it still can.
CANARY_S = 10.0
CANARY_FAILED_S = 1.0  # likewise, while it cannot
# Seconds of that, or of a batch that is stuck, after which only another process helps.
LOST_S = 30.0
STOPPED = "the embedding worker has stopped"


class Embedder(Protocol):
    """What the service needs of an embedder, like `model.embedder.Embedder`; one thread uses it."""

    @property
    def model(self) -> str:
        """Fingerprint of the checkpoint."""

    @property
    def dim(self) -> int:
        """Length of an embedding."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What its frames must go through."""

    def describe(self) -> dict[str, Any]:
        """The model as a JSON object."""

    def warm_up(self) -> None:
        """Do once what would make the first request slow."""

    def embed(
        self, clips: Sequence[Clip], *, with_attention: bool = False
    ) -> list[TrackletEmbedding]:
        """Embed clips of (T, height, width, 3) uint8, one result each, in order."""


class Pending(Protocol):
    """A batch that a device computes."""

    def result(self) -> list[TrackletEmbedding]:
        """Wait for it: one result for each clip, in order."""


@runtime_checkable
class OverlappingEmbedder(Protocol):
    """An `Embedder` that computes beside its caller, as on a GPU.

    Where ``overlaps`` is true, the worker begins the next batch, which stages its frames, before it
    asks for the result of the one that is computed.
    """

    @property
    def overlaps(self) -> bool:
        """Whether beginning early gains anything."""

    def begin(self, clips: Sequence[Clip], *, with_attention: bool = False) -> Pending:
        """Stage and launch a batch, as for `Embedder.embed`, without waiting for it."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """A finished tracklet.

    Args:
        result: What the network made of it.
        queue_s: Seconds it waited.
        embed_s: Seconds its batch took.
    """

    result: TrackletEmbedding
    queue_s: float
    embed_s: float


@dataclass(frozen=True, slots=True)
class _Moment:
    """A time in seconds by two clocks: the system's, and that of `EmbeddingWorker._running_s`."""

    at: float
    running: float


@dataclass(frozen=True, slots=True)
class _Begun:
    """A batch in the device's hands."""

    batch: "list[_Job]"
    started: _Moment
    pending: Pending


class _Pace:
    """Seconds that one of something takes: the median of the last batches.

    Args:
        guess: Until they say otherwise.
    """

    def __init__(self, guess: float) -> None:
        self._noted = deque([guess], maxlen=PACE_BATCHES)
        self.seconds = guess

    def note(self, seconds: float) -> None:
        """Take one batch into account."""
        self._noted.append(seconds)
        self.seconds = statistics.median_low(self._noted)


@dataclass(slots=True, eq=False)
class _Job:
    clip: Clip
    with_attention: bool
    deadline: float
    submitted: float
    request_id: str | None
    future: "Future[Embedded]" = field(default_factory=Future)


class EmbeddingWorker:
    """Batches clips by their frames and embeds them in a thread of its own.

    Args:
        embedder: Used by the worker's thread alone.
        max_frames: Frames in a batch; a longer tracklet goes alone.
        max_delay_s: How long a batch that is not full waits for company.
        max_tracklets: How many may wait; one more is refused.
        metrics: Where batches and waits are noted.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        max_frames: int,
        max_delay_s: float,
        max_tracklets: int,
        metrics: Metrics | None = None,
    ) -> None:
        self._embedder = embedder
        self._overlapping: OverlappingEmbedder | None = None
        if isinstance(embedder, OverlappingEmbedder) and embedder.overlaps:
            self._overlapping = embedder
        self._metrics = metrics
        self._max_frames = max_frames
        self._max_delay_s = max_delay_s
        self._max_tracklets = max_tracklets
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._warm = False
        self._failures = 0  # in a row
        self._canary_failed_since: float | None = None
        self._canary_due = math.inf  # while tracklets fail, however many come
        self._overdue_at: float | None = None  # of the batch at hand
        self._away_s = 0.0
        self._held: list[_Job] = []  # by the thread, no longer in the queue
        self._died = False
        self._per_tracklet = _Pace(1.0)
        self._per_frame = _Pace(1.0)
        self._thread = threading.Thread(target=self._run, name="embedding-worker", daemon=True)

    def start(self) -> None:
        """Start the thread; it warms the embedder up first."""
        self._thread.start()

    def check(self) -> None:
        """Return when the worker is warm and running.

        Raises:
            WorkerUnavailableError: It is not; the message says why.
        """
        self._check_running()
        if not self._warm:
            raise WorkerUnavailableError("the embedding worker is warming up")
        if self._failures >= FAILURES_UNTIL_UNREADY:
            raise WorkerUnavailableError(
                f"the last {self._failures} tracklets could not be embedded"
            )
        self._check_working()

    def _check_working(self) -> None:
        if (reason := self._why_idle()) is not None:
            raise WorkerUnavailableError(reason)

    def _why_idle(self) -> str | None:
        """What keeps a worker that runs from embedding; None where nothing does.

        Not that the last tracklets failed: it may be theirs. A grey frame, next, tells.
        """
        if self._canary_failed_since is not None:
            return "a grey frame could not be embedded; the log says why"
        return "a batch does not end" if self._is_stuck() else None

    def lost(self) -> str | None:
        """Why this process will embed nothing any more; None while it may.

        Whoever watches the process asks again and again. Meanwhile, where the worker gets stuck or
        fails, what is queued hears so at once: it need not wait for the end.
        """
        with self._changed:  # nobody may join the queue between the two
            if (reason := self._why_idle()) is not None:
                self._fail_waiting(reason)
        if self._died:
            return "the embedding worker has died"
        if self._is_stuck(LOST_S):
            return "a batch does not end"
        since = self._canary_failed_since
        if since is not None and self._running_s() - since >= LOST_S:
            return f"no grey frame could be embedded for {LOST_S:g} s"
        return None

    def forgive(self, seconds: float) -> None:
        """Count time in which this process was paused for nothing: no batch gets stuck by it."""
        self._away_s += seconds

    def _running_s(self) -> float:
        """A clock that stands while the process is paused, once `forgive` has been told."""
        return time.monotonic() - self._away_s

    def abandon(self) -> None:
        """Let whoever waits hear that nothing comes, also of the batch at hand; nobody joins."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        _fail(list(self._held))
        self._fail_waiting()

    def _is_stuck(self, since_s: float = 0.0) -> bool:
        overdue_at = self._overdue_at
        return overdue_at is not None and self._running_s() >= overdue_at + since_s

    def refuse_when_full(self, deadline_s: float = math.inf) -> None:
        """Return while there is room in the queue, and its end will be reached in time.

        Args:
            deadline_s: Seconds from now after which the result is of no use.

        Raises:
            OverloadedError: The queue is full, or too long for the deadline.
            WorkerUnavailableError: Nobody works at the queue, or only in vain.
        """
        self._check_running()
        self._check_working()
        waiting = self.count_waiting()
        wait_s = waiting * self._per_tracklet.seconds
        if waiting < self._max_tracklets and wait_s <= deadline_s:
            return
        expected = f"expected fewer than {self._max_tracklets} tracklets waiting, got {waiting}"
        if waiting < self._max_tracklets:
            expected = f"expected a wait of less than {deadline_s:g} s, got about {wait_s:.0f} s"
        raise OverloadedError(expected, retry_after_s=min(max(math.ceil(wait_s), 1), 60))

    def _check_running(self) -> None:
        if self._closing or not self._thread.is_alive():
            raise WorkerUnavailableError("the embedding worker is not running")

    def count_waiting(self) -> int:
        """How many wait, after those that were cancelled have left."""
        with self._changed:
            if any(job.future.cancelled() for job in self._jobs):
                self._jobs = deque(job for job in self._jobs if not job.future.cancelled())
            return len(self._jobs)

    def submit(
        self, clip: Clip, *, deadline_s: float, with_attention: bool = False
    ) -> "Future[Embedded]":
        """Queue a clip.

        Args:
            clip: (T, height, width, 3) uint8.
            deadline_s: Seconds from now after which nobody wants it any more.
            with_attention: Also return attention maps.

        Returns:
            Its result; cancelling it before its batch starts takes it out of the queue.

        Raises:
            DeadlineExceededError: The deadline has passed already.
            OverloadedError: The queue is full.
            WorkerUnavailableError: Nobody works at the queue, or only in vain.
        """
        if deadline_s < 0:
            raise DeadlineExceededError(
                "the deadline had passed before there was anything to embed"
            )
        with self._changed:
            self.refuse_when_full(deadline_s)
            now = time.monotonic()
            job = _Job(clip, with_attention, now + deadline_s, now, request_id.get())
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def close(self, timeout_s: float | None = None) -> bool:
        """Finish what is queued, then stop. What is left after ``timeout_s`` fails.

        Returns:
            Whether the thread has ended; it has not where a batch takes longer.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        self.abandon()
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._overdue_at = self._running_s() + WARM_UP_S
            self._embedder.warm_up()
            started = self._running_s()
            self._embedder.warm_up()  # again: what happens only once says nothing of a batch
            self._overdue_at = None
            self._per_frame = _Pace(max(self._running_s() - started, 0.0))
            self._warm = True
            self._work()
        except BaseException:
            self._died = True
            with on_behalf_of(job.request_id for job in self._held):
                log.exception("the embedding worker has died")
        finally:
            with self._changed:
                self._closing = True  # before the queue is emptied, so that nobody joins it after
            self._warm = False
            self._overdue_at = None
            self.abandon()

    def _work(self) -> None:
        """Take batch after batch until the end."""
        begun: _Begun | None = None
        while (batch := self._next_batch(wait=begun is None)) is not None or begun:
            self._set_limit([*(batch or []), *(begun.batch if begun else [])])
            if batch and self._overlapping:
                # Staged while the one before is computed.
                next_begun = self._begin(self._overlapping, batch)
                if begun:
                    self._finish(begun)
                begun = next_begun
            elif begun:
                self._finish(begun)
                begun = None
            elif batch:
                self._embed(batch)
            else:
                self._send_canary()
            self._held = begun.batch if begun else []
            self._overdue_at = None

    def _set_limit(self, held: list[_Job]) -> None:
        """Say from when on the thread counts as stuck."""
        self._held = held
        frames = sum(len(job.clip) for job in held) or 1
        limit_s = max(STUCK_S, STUCK_TIMES * frames * self._per_frame.seconds)
        now = time.monotonic()
        wanted_s = max((job.deadline - now for job in held), default=0.0)
        self._overdue_at = self._running_s() + min(limit_s, max(STUCK_MOST_S, wanted_s))

    def _send_canary(self) -> None:
        """Embed a grey frame: whoever asks for nothing must still hear that nothing would come.

        And where tracklets failed, it alone tells whether they or the device were bad, because a
        service whose probe is red is asked no more.
        """
        self._canary_due = time.monotonic() + CANARY_FAILED_S
        try:
            self._embedder.warm_up()
        except Exception:
            if self._canary_failed_since is None:  # once, not every second
                log.exception("the embedding worker cannot embed a grey frame")
                self._canary_failed_since = self._running_s()
            return
        self._failures, self._canary_failed_since = 0, None

    def _is_failing(self) -> bool:
        return self._failures >= FAILURES_UNTIL_UNREADY or self._canary_failed_since is not None

    def _next_batch(self, *, wait: bool) -> list[_Job] | None:
        """What is to be embedded next; an empty batch is a canary's turn, None the end.

        Args:
            wait: For work, and for company; else what is there, which may be an empty batch.
        """
        batch: list[_Job] = []
        if wait and self._is_failing() and time.monotonic() >= self._canary_due:
            return batch  # steady traffic must not keep off what tells whether it is the device
        canary_at = time.monotonic() + (CANARY_FAILED_S if self._is_failing() else CANARY_S)
        frames = 0
        full_at = math.inf
        with self._changed:
            while True:
                while self._jobs and (
                    not batch or frames + len(self._jobs[0].clip) <= self._max_frames
                ):
                    job = self._jobs.popleft()
                    if self._is_wanted(job):
                        batch.append(job)
                        frames += len(job.clip)
                        full_at = min(full_at, time.monotonic() + self._max_delay_s)
                wait_s = full_at - time.monotonic()
                is_full = bool(self._jobs) or frames >= self._max_frames
                if not wait or (batch and (is_full or self._closing or wait_s <= 0)):
                    return batch
                if self._closing:
                    return None
                if not batch and time.monotonic() >= canary_at:
                    return []
                self._changed.wait(wait_s if batch else canary_at - time.monotonic())

    def _is_wanted(self, job: _Job) -> bool:
        if not job.future.set_running_or_notify_cancel():
            return False
        if job.deadline < time.monotonic():
            job.future.set_exception(
                DeadlineExceededError("the queue was longer than the deadline")
            )
            return False
        return True

    def _now(self) -> _Moment:
        return _Moment(time.monotonic(), self._running_s())

    def _embed(self, batch: list[_Job]) -> None:
        started = self._now()
        with on_behalf_of(job.request_id for job in batch):
            try:
                results = self._embedder.embed(
                    [job.clip for job in batch], with_attention=_want_attention(batch)
                )
                _check_count(results, batch)
            except Exception as error:  # noqa: BLE001 logged, and told to whom it concerns
                self._embed_alone(batch, error)
            else:
                self._deliver(batch, results, started)

    def _begin(self, embedder: OverlappingEmbedder, batch: list[_Job]) -> _Begun | None:
        """Launch a batch; None where it failed and everybody has heard."""
        started = self._now()
        with on_behalf_of(job.request_id for job in batch):
            try:
                pending = embedder.begin(
                    [job.clip for job in batch], with_attention=_want_attention(batch)
                )
            except Exception as error:  # noqa: BLE001 likewise
                self._embed_alone(batch, error)
                return None
        return _Begun(batch, started, pending)

    def _finish(self, begun: _Begun) -> None:
        """Wait for a batch that was launched."""
        with on_behalf_of(job.request_id for job in begun.batch):
            try:
                results = begun.pending.result()
                _check_count(results, begun.batch)
            except Exception as error:  # noqa: BLE001 likewise
                self._embed_alone(begun.batch, error)
            else:
                self._deliver(begun.batch, results, begun.started)

    def _embed_alone(self, batch: list[_Job], error: Exception) -> None:
        """Embed one by one what failed together: a bad tracklet must not take others with it."""
        if len(batch) > 1:
            log.warning("a batch of %d failed, trying one by one: %s", len(batch), error)
            for job in batch:
                self._embed([job])
            return
        log.error("a tracklet could not be embedded", exc_info=error)
        failure = WorkerUnavailableError("the tracklet could not be embedded; the log says why")
        failure.__cause__ = error
        self._failures += 1
        if self._failures == FAILURES_UNTIL_UNREADY:
            self._canary_due = time.monotonic() + CANARY_FAILED_S
        _answer(batch[0], failure)

    def _deliver(
        self, batch: list[_Job], results: list[TrackletEmbedding], started: _Moment
    ) -> None:
        self._failures, self._canary_failed_since = 0, None
        ended = self._now()
        seconds = ended.at - started.at
        frames = sum(len(job.clip) for job in batch)
        # Less than nothing where a pause before the batch was told of within it.
        if (running_s := ended.running - started.running) > 0:
            self._per_frame.note(running_s / frames)
            self._per_tracklet.note(running_s / len(batch))
        if self._metrics:
            self._metrics.observe_batch(frames, seconds)
        for job, result in zip(batch, results, strict=True):
            queue_s = started.at - job.submitted
            if self._metrics:
                self._metrics.observe_queue_wait(queue_s)
            _answer(job, Embedded(result, queue_s, seconds))

    def _fail_waiting(self, reason: str = STOPPED) -> None:
        with self._changed:
            jobs, self._jobs = list(self._jobs), deque()
        _fail((job for job in jobs if job.future.set_running_or_notify_cancel()), reason)


def _want_attention(batch: list[_Job]) -> bool:
    return any(job.with_attention for job in batch)


def _check_count(results: Sequence[TrackletEmbedding], batch: list[_Job]) -> None:
    if len(results) != len(batch):
        raise ValueError(f"expected {len(batch)} embeddings, got {len(results)}")


def _fail(jobs: Iterable[_Job], reason: str = STOPPED) -> None:
    for job in jobs:
        _answer(job, WorkerUnavailableError(reason))


def _answer(job: _Job, answer: Embedded | Exception) -> None:
    """Tell who waits; nothing where `EmbeddingWorker.abandon` has done so in another thread."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(answer, Exception):
            job.future.set_exception(answer)
        else:
            job.future.set_result(answer)
