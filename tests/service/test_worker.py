"""The embedding worker: batches, bounds, deadlines, failures and the end."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import pytest
from starlette.testclient import TestClient

from index.embedded import EmbeddedGallery
from index.gallery import GalleryUnavailableError
from model.embedder import TrackletEmbedding
from model.frames import Clip
from service.app import create_app
from service.errors import DeadlineExceededError, OverloadedError, WorkerUnavailableError
from service.settings import BatchSettings, LimitSettings, QueueSettings, Settings
from service.worker import Embedded, EmbeddingWorker
from tests.service.conftest import FakeEmbedder, Start, assert_problem
from tests.service.making import BLUE, GOOD, GREEN, RED, clip_of, mean_colours

WAIT_S = 20.0


def clip(frames: int = 3, level: int = 0) -> Clip:
    return np.full((frames, 64, 32, 3), level, dtype=np.uint8)


@pytest.fixture
def worker(embedder: FakeEmbedder) -> Iterator[EmbeddingWorker]:
    """A running worker: batches of 10 frames, a queue of 4."""
    made = EmbeddingWorker(embedder, max_frames=10, max_delay_s=0, max_tracklets=4)
    made.start()
    yield made
    embedder.gate.set()
    made.close(WAIT_S)


def occupy(worker: EmbeddingWorker, embedder: FakeEmbedder) -> "Future[Embedded]":
    """Have the worker wait at the gate with a tracklet in its hands."""
    embedder.gate.clear()
    embedder.entered.clear()
    future = worker.submit(clip(), deadline_s=WAIT_S)
    assert embedder.entered.wait(WAIT_S)
    return future


def test_what_waits_together_is_embedded_together(
    worker: EmbeddingWorker, embedder: FakeEmbedder
) -> None:
    occupy(worker, embedder)
    waiting = [worker.submit(clip(3, level), deadline_s=WAIT_S) for level in (10, 20, 30)]
    embedder.gate.set()

    results = [future.result(WAIT_S).result.embedding for future in waiting]

    assert embedder.batches == [[3], [3, 3, 3]]
    for level, embedding in zip((10, 20, 30), results, strict=True):
        assert np.array_equal(embedding, mean_colours(clip(3, level)))


def test_a_batch_is_capped_by_its_frames(worker: EmbeddingWorker, embedder: FakeEmbedder) -> None:
    occupy(worker, embedder)
    waiting = [worker.submit(clip(frames), deadline_s=WAIT_S) for frames in (6, 4, 5, 15)]
    embedder.gate.set()

    for future in waiting:
        future.result(WAIT_S)

    assert embedder.batches == [[3], [6, 4], [5], [15]]


def test_a_full_queue_refuses_and_says_when_to_come_back(
    worker: EmbeddingWorker, embedder: FakeEmbedder
) -> None:
    occupy(worker, embedder)
    for _ in range(4):
        worker.submit(clip(), deadline_s=WAIT_S)

    with pytest.raises(OverloadedError) as refused:
        worker.submit(clip(), deadline_s=WAIT_S)

    assert 1 <= (refused.value.retry_after_s or 0) <= 60


def test_who_would_wait_longer_than_the_deadline_is_refused_at_once(
    worker: EmbeddingWorker, embedder: FakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes to a queue that is too long should hear it now, and not at the deadline."""
    occupy(worker, embedder)
    monkeypatch.setattr(worker._per_tracklet, "seconds", 7.0)
    worker.submit(clip(), deadline_s=WAIT_S)
    worker.submit(clip(), deadline_s=WAIT_S)

    with pytest.raises(OverloadedError, match="a wait of less than 10 s, got about 14 s") as told:
        worker.submit(clip(), deadline_s=10)

    assert told.value.retry_after_s == 14
    worker.submit(clip(), deadline_s=WAIT_S)


def test_who_is_cancelled_makes_room(worker: EmbeddingWorker, embedder: FakeEmbedder) -> None:
    """Even while the worker is busy: those who gave up must not keep others out."""
    occupy(worker, embedder)
    waiting = [worker.submit(clip(4 + number), deadline_s=WAIT_S) for number in range(4)]
    assert all(future.cancel() for future in waiting[:3])

    worker.refuse_when_full()
    last = worker.submit(clip(2), deadline_s=WAIT_S)
    embedder.gate.set()
    last.result(WAIT_S)

    assert embedder.batches == [[3], [7, 2]]


def test_who_waited_too_long_is_not_embedded(
    worker: EmbeddingWorker, embedder: FakeEmbedder
) -> None:
    occupy(worker, embedder)
    late = worker.submit(clip(5), deadline_s=0)
    good = worker.submit(clip(2), deadline_s=WAIT_S)
    embedder.gate.set()

    with pytest.raises(DeadlineExceededError):
        late.result(WAIT_S)
    good.result(WAIT_S)

    assert embedder.batches == [[3], [2]]


def test_one_bad_tracklet_fails_alone(worker: EmbeddingWorker, embedder: FakeEmbedder) -> None:
    def refuse(one: Clip) -> None:
        if one.max() == 66:
            raise RuntimeError("CUDA says no")

    embedder.refuse = refuse
    occupy(worker, embedder)
    waiting = [worker.submit(clip(2, level), deadline_s=WAIT_S) for level in (65, 66, 67)]
    embedder.gate.set()

    with pytest.raises(WorkerUnavailableError):
        waiting[1].result(WAIT_S)
    for place, level in ((0, 65), (2, 67)):
        embedding = waiting[place].result(WAIT_S).result.embedding
        assert np.array_equal(embedding, mean_colours(clip(2, level)))


def test_a_wrong_number_of_answers_is_nobodys_embedding(
    worker: EmbeddingWorker, embedder: FakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedder, "embed", lambda *_, **__: [])

    with pytest.raises(WorkerUnavailableError):
        worker.submit(clip(), deadline_s=WAIT_S).result(WAIT_S)
    worker.refuse_when_full()  # it still works


def test_attention_is_made_for_those_who_asked(worker: EmbeddingWorker) -> None:
    asked = worker.submit(clip(), deadline_s=WAIT_S, with_attention=True).result(WAIT_S)
    other = worker.submit(clip(), deadline_s=WAIT_S).result(WAIT_S)

    assert asked.result.attention is not None
    assert other.result.attention is None


def test_what_is_queued_is_finished_before_the_end(
    worker: EmbeddingWorker, embedder: FakeEmbedder
) -> None:
    waiting = [occupy(worker, embedder), *(worker.submit(clip(9), deadline_s=WAIT_S) for _ in "ab")]
    ending = threading.Thread(target=worker.close, args=(WAIT_S,))
    ending.start()
    embedder.gate.set()
    ending.join(WAIT_S)

    assert all(future.done() for future in waiting)
    assert [future.exception() for future in waiting] == [None] * 3
    with pytest.raises(WorkerUnavailableError):
        worker.submit(clip(), deadline_s=WAIT_S)


def test_what_cannot_be_finished_in_time_fails(
    worker: EmbeddingWorker, embedder: FakeEmbedder
) -> None:
    occupy(worker, embedder)
    waiting = worker.submit(clip(9), deadline_s=WAIT_S)

    worker.close(0)

    with pytest.raises(WorkerUnavailableError):
        waiting.result(WAIT_S)


def test_closing_twice_or_before_the_start_does_nothing(embedder: FakeEmbedder) -> None:
    made = EmbeddingWorker(embedder, max_frames=1, max_delay_s=0, max_tracklets=1)

    made.close(0)
    made.close(0)

    with pytest.raises(WorkerUnavailableError):
        made.submit(clip(), deadline_s=1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whoever_was_being_embedded_hears_of_the_workers_death(
    worker: EmbeddingWorker, embedder: FakeEmbedder
) -> None:
    def die(_: Clip) -> None:
        raise SystemExit

    embedder.refuse = die
    futures = [occupy(worker, embedder), worker.submit(clip(), deadline_s=WAIT_S)]
    embedder.gate.set()

    for future in futures:
        with pytest.raises(WorkerUnavailableError):
            future.result(WAIT_S)
    with pytest.raises(WorkerUnavailableError):
        worker.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_joins_the_queue_of_a_dying_worker(
    worker: EmbeddingWorker, embedder: FakeEmbedder
) -> None:
    """The callback runs in the worker's thread, which is alive but will never look again."""

    def die(_: Clip) -> None:
        raise SystemExit

    embedder.refuse = die
    refused: list[bool] = []
    tried = threading.Event()

    def join(_: object) -> None:
        try:
            worker.submit(clip(), deadline_s=WAIT_S)
        except WorkerUnavailableError:
            refused.append(True)
        tried.set()

    future = occupy(worker, embedder)
    future.add_done_callback(join)
    embedder.gate.set()
    assert tried.wait(WAIT_S)

    assert refused == [True]


def in_background(client: TestClient, pool: ThreadPoolExecutor, path: str, **given: Any) -> Any:
    """A request of which the answer is asked for later."""
    return pool.submit(client.post, path, **{"files": GOOD, **given})


def test_requests_at_once_share_a_forward_pass(start: Start, embedder: FakeEmbedder) -> None:
    client = start(batch=BatchSettings(max_delay_ms=1000, max_frames=9))
    with ThreadPoolExecutor(3) as pool:
        waiting = [
            in_background(client, pool, "/embed", files=clip_of(colour, colour, colour))
            for colour in (RED, GREEN, BLUE)
        ]
        answers = [one.result() for one in waiting]

    strongest = [int(np.argmax(answer.json()["embedding"][:3])) for answer in answers]
    assert embedder.batches == [[3, 3, 3]]
    assert strongest == [0, 1, 2]


def fill(client: TestClient, embedder: FakeEmbedder, pool: ThreadPoolExecutor, path: str) -> Any:
    """One request in the worker's hands."""
    embedder.gate.clear()
    embedder.entered.clear()
    running = in_background(client, pool, path)
    assert embedder.entered.wait(WAIT_S)
    return running


@pytest.mark.parametrize("path", ["/gallery", "/query", "/embed"])
def test_a_full_service_answers_429_and_then_recovers(
    start: Start, embedder: FakeEmbedder, path: str
) -> None:
    client = start(queue=QueueSettings(max_tracklets=1), limits=LimitSettings(uploads=64))
    worker = client.app.state.parts.worker  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as pool:
        running = fill(client, embedder, pool, path)
        worker.submit(clip(), deadline_s=WAIT_S)

        refused: httpx2.Response = client.post(path, files=GOOD)
        probe = client.get("/readyz")
        embedder.gate.set()
        assert running.result().is_success

    assert_problem(refused, 429, "overloaded")
    assert refused.headers["retry-after"].isdigit()
    assert probe.status_code == 200  # busy is not broken
    assert client.post("/query", files=GOOD).status_code == 200


def test_a_request_that_waits_too_long_is_answered_504(
    start: Start, embedder: FakeEmbedder
) -> None:
    client = start(queue=QueueSettings(deadline_s=0.05))
    embedder.gate.clear()

    answer = client.post("/gallery", files=GOOD)
    embedder.gate.set()

    assert_problem(answer, 504, "deadline-exceeded")
    assert client.get("/gallery").json()["items"] == []


def test_who_gave_up_makes_room_for_others(start: Start, embedder: FakeEmbedder) -> None:
    """The queue is of one place, and who held it ran into its deadline."""
    client = start(queue=QueueSettings(max_tracklets=1, deadline_s=0.05))
    embedder.gate.clear()

    statuses = [client.post("/embed", files=GOOD).status_code for _ in range(4)]
    embedder.gate.set()

    assert statuses == [504] * 4


def test_a_failing_tracklet_does_not_fail_its_neighbours(
    start: Start, embedder: FakeEmbedder
) -> None:
    def refuse(one: Clip) -> None:
        if one[..., 2].mean() > 150:  # the blue one
            raise RuntimeError("no")

    embedder.refuse = refuse
    client = start(batch=BatchSettings(max_delay_ms=1000, max_frames=9))
    with ThreadPoolExecutor(3) as pool:
        waiting = [
            in_background(client, pool, "/gallery", files=clip_of(colour, colour, colour))
            for colour in (RED, GREEN, BLUE)
        ]
        answers = [one.result() for one in waiting]

    assert [answer.status_code for answer in answers] == [201, 201, 503]
    assert embedder.batches[0] == [3, 3, 3]
    assert_problem(answers[2], 503, "worker-unavailable")
    assert len(client.get("/gallery").json()["items"]) == 2


def test_the_end_of_the_service_waits_for_the_worker_and_closes_the_gallery(
    embedder: FakeEmbedder, gallery: EmbeddedGallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(embedder, gallery, Settings())
    worker: EmbeddingWorker = app.state.parts.worker
    close = worker.close

    def close_and_go_on(timeout_s: float | None) -> None:
        embedder.gate.set()
        close(timeout_s)

    monkeypatch.setattr(worker, "close", close_and_go_on)
    with TestClient(app):
        waiting = [occupy(worker, embedder), worker.submit(clip(), deadline_s=WAIT_S)]

    assert [future.exception(0) for future in waiting] == [None, None]
    with pytest.raises(GalleryUnavailableError):
        gallery.check()


def test_a_worker_that_fails_at_everything_says_so_until_it_succeeds(
    worker: EmbeddingWorker, embedder: FakeEmbedder
) -> None:
    """A probe must not stay green over a device that fails at every batch."""

    def refuse(_: Clip) -> None:
        raise RuntimeError("the device is poisoned")

    worker.submit(clip(), deadline_s=WAIT_S).result(WAIT_S)
    embedder.refuse = refuse
    for expected in (False, False, True):
        with pytest.raises(WorkerUnavailableError):
            worker.submit(clip(), deadline_s=WAIT_S).result(WAIT_S)
        assert says_unready(worker) is expected

    embedder.refuse = lambda _: None
    assert eventually(lambda: not says_unready(worker))
    worker.submit(clip(), deadline_s=WAIT_S).result(WAIT_S)


def test_a_batch_that_does_not_end_turns_the_probe_red(
    worker: EmbeddingWorker, embedder: FakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    future = occupy(worker, embedder)
    assert not says_unready(worker)
    monkeypatch.setattr("service.worker.STUCK_S", 0.0)
    monkeypatch.setattr("service.worker.STUCK_TIMES", 0.0)
    embedder.gate.set()
    future.result(WAIT_S)
    future = occupy(worker, embedder)

    assert says_unready(worker)

    embedder.gate.set()
    future.result(WAIT_S)
    assert eventually(lambda: not says_unready(worker))


def test_a_warm_up_that_does_not_end_is_lost(
    embedder: FakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.worker.WARM_UP_S", 0.0)
    monkeypatch.setattr("service.worker.LOST_S", 0.0)
    embedder.warm_gate.clear()
    worker = EmbeddingWorker(embedder, max_frames=10, max_delay_s=0, max_tracklets=4)
    worker.start()

    assert eventually(lambda: worker.lost() is not None)
    assert says_unready(worker)

    embedder.warm_gate.set()
    assert eventually(lambda: worker.lost() is None and not says_unready(worker))
    worker.close(WAIT_S)


def test_a_device_that_fails_while_nobody_asks_turns_the_probe_red_and_back(
    embedder: FakeEmbedder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.worker.CANARY_S", 0.01)
    monkeypatch.setattr("service.worker.CANARY_FAILED_S", 0.01)
    worker = EmbeddingWorker(embedder, max_frames=10, max_delay_s=0, max_tracklets=4)
    worker.start()
    assert eventually(lambda: not says_unready(worker))
    working = embedder.warm_up

    def fail() -> None:
        raise RuntimeError("the device is poisoned")

    monkeypatch.setattr(embedder, "warm_up", fail)
    assert eventually(lambda: says_unready(worker))
    assert "the device is poisoned" in caplog.text

    monkeypatch.setattr(embedder, "warm_up", working)
    assert eventually(lambda: not says_unready(worker))
    worker.close(WAIT_S)


def test_bad_tracklets_do_not_keep_the_probe_red(
    embedder: FakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends no more because it is red would never see it green again."""
    monkeypatch.setattr("service.worker.CANARY_FAILED_S", 0.3)
    worker = EmbeddingWorker(embedder, max_frames=10, max_delay_s=0, max_tracklets=4)
    worker.start()

    def refuse(_: Clip) -> None:
        raise RuntimeError("nobody can embed this")

    embedder.refuse = refuse
    for _ in range(3):
        with pytest.raises(WorkerUnavailableError):
            worker.submit(clip(), deadline_s=WAIT_S).result(WAIT_S)
    assert says_unready(worker)

    assert eventually(lambda: not says_unready(worker))
    worker.close(WAIT_S)


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether something comes to hold within reason."""
    end = time.monotonic() + WAIT_S
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    return holds()


def says_unready(worker: EmbeddingWorker) -> bool:
    try:
        worker.check()
    except WorkerUnavailableError:
        return True
    return False


class Overlapping(FakeEmbedder):
    """A device beside its caller: `begin` returns at once, `result` waits for the gate."""

    overlaps = True

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.fail_at: str | None = None

    def begin(self, clips: Sequence[Clip], *, with_attention: bool = False) -> "PendingClips":
        self.events.append(f"begin {len(clips)}")
        if self.fail_at == "begin" and len(clips) > 1:
            raise RuntimeError("no room")
        return PendingClips(self, clips, with_attention)


class PendingClips:
    def __init__(self, embedder: Overlapping, clips: Sequence[Clip], with_attention: bool) -> None:
        self._embedder, self._clips, self._with_attention = embedder, clips, with_attention

    def result(self) -> list[TrackletEmbedding]:
        if self._embedder.fail_at == "result" and len(self._clips) > 1:
            raise RuntimeError("no room")
        results = self._embedder.embed(self._clips, with_attention=self._with_attention)
        self._embedder.events.append(f"result {len(self._clips)}")
        return results


@pytest.fixture
def overlapping() -> Iterator[Overlapping]:
    made = Overlapping()
    yield made
    made.gate.set()


@pytest.fixture
def beside(overlapping: Overlapping) -> Iterator[EmbeddingWorker]:
    """A running worker of a device that computes beside it."""
    made = EmbeddingWorker(overlapping, max_frames=6, max_delay_s=0, max_tracklets=9)
    made.start()
    yield made
    overlapping.gate.set()
    made.close(WAIT_S)


def test_the_next_batch_is_begun_while_one_is_computed(
    beside: EmbeddingWorker, overlapping: Overlapping
) -> None:
    occupy(beside, overlapping)
    waiting = [beside.submit(clip(3, level), deadline_s=WAIT_S) for level in range(10, 60, 10)]
    overlapping.gate.set()

    results = [future.result(WAIT_S).result.embedding for future in waiting]

    for level, embedding in zip(range(10, 60, 10), results, strict=True):
        assert np.array_equal(embedding, mean_colours(clip(3, level)))
    begun = [at for at, event in enumerate(overlapping.events) if event.startswith("begin")]
    assert overlapping.events[begun[1] :][:3] == ["begin 2", "begin 2", "result 2"]


@pytest.mark.parametrize("where", ["begin", "result"])
def test_a_batch_that_fails_beside_its_caller_is_tried_one_by_one(
    beside: EmbeddingWorker, overlapping: Overlapping, where: str
) -> None:
    overlapping.fail_at = where
    first = occupy(beside, overlapping)
    waiting = [beside.submit(clip(3, level), deadline_s=WAIT_S) for level in range(10, 60, 10)]
    overlapping.gate.set()

    results = [future.result(WAIT_S).result.embedding for future in waiting]

    assert first.exception(WAIT_S) is None
    for level, embedding in zip(range(10, 60, 10), results, strict=True):
        assert np.array_equal(embedding, mean_colours(clip(3, level)))


def test_a_begun_batch_is_answered_without_waiting_for_another(
    beside: EmbeddingWorker, overlapping: Overlapping
) -> None:
    embedded = beside.submit(clip(3, 50), deadline_s=WAIT_S).result(WAIT_S)

    assert np.array_equal(embedded.result.embedding, mean_colours(clip(3, 50)))
    assert overlapping.events == ["begin 1", "result 1"]


def test_both_batches_hear_of_the_end_of_a_device_that_hangs(
    beside: EmbeddingWorker, overlapping: Overlapping
) -> None:
    futures = [occupy(beside, overlapping), beside.submit(clip(3), deadline_s=WAIT_S)]

    beside.abandon()

    for future in futures:
        with pytest.raises(WorkerUnavailableError):
            future.result(WAIT_S)


def test_steady_traffic_does_not_hide_a_device_that_fails(
    embedder: FakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grey frame is embedded between failing tracklets, too: so the end comes."""
    monkeypatch.setattr("service.worker.CANARY_FAILED_S", 0.05)
    monkeypatch.setattr("service.worker.LOST_S", 0.0)
    worker = EmbeddingWorker(embedder, max_frames=3, max_delay_s=0, max_tracklets=4)
    worker.start()
    assert eventually(lambda: not says_unready(worker))

    def fail(*_: object) -> None:
        raise RuntimeError("the device is poisoned")

    monkeypatch.setattr(embedder, "warm_up", fail)
    embedder.refuse = fail

    def ask_on() -> bool:
        with contextlib.suppress(WorkerUnavailableError):  # refused, where it is red already
            assert worker.submit(clip(), deadline_s=WAIT_S).exception(WAIT_S) is not None
        return worker.lost() is not None

    end = time.monotonic() + WAIT_S
    while not ask_on() and time.monotonic() < end:
        pass
    assert worker.lost() is not None
    worker.close(WAIT_S)


def test_the_first_batches_are_not_given_the_time_of_the_warm_up(embedder: FakeEmbedder) -> None:
    """What a device does once takes long, and a batch that hangs must show within seconds."""
    begun: list[float] = []

    def warm_up() -> None:
        if not begun:
            time.sleep(0.5)
        begun.append(time.monotonic())

    embedder.warm_up = warm_up  # type: ignore[method-assign]
    worker = EmbeddingWorker(embedder, max_frames=10, max_delay_s=0, max_tracklets=4)
    worker.start()
    assert eventually(lambda: not says_unready(worker))

    assert worker._per_frame.seconds < 0.1
    worker.close(WAIT_S)


def slow(embedder: FakeEmbedder, clock: list[float], seconds: float) -> None:
    """Have each clip take so long by a clock that the test holds."""

    def take(_: Clip) -> None:
        clock[0] += seconds

    embedder.refuse = take


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The worker's time, seconds."""
    held = [1000.0]

    class Time:
        @staticmethod
        def monotonic() -> float:
            return held[0]

    monkeypatch.setattr("service.worker.time", Time)
    return held


def embed_some(worker: EmbeddingWorker, count: int, frames: int = 3) -> None:
    for _ in range(count):
        worker.submit(clip(frames), deadline_s=WAIT_S).result(WAIT_S)


def limit_s(
    worker: EmbeddingWorker, embedder: FakeEmbedder, clock: list[float], frames: int
) -> float:
    """Seconds after which a batch counts as stuck; by the way it takes no time."""
    slow(embedder, clock, 0.0)
    embedder.gate.clear()
    embedder.entered.clear()
    future = worker.submit(clip(frames), deadline_s=WAIT_S)
    assert embedder.entered.wait(WAIT_S)
    overdue_at = worker._overdue_at
    embedder.gate.set()
    future.result(WAIT_S)
    assert overdue_at is not None
    return overdue_at - clock[0]


def test_a_slow_batch_does_not_hide_one_that_hangs_later(
    clock: list[float], worker: EmbeddingWorker, embedder: FakeEmbedder
) -> None:
    slow(embedder, clock, 0.03)
    embed_some(worker, 5)
    slow(embedder, clock, 9.0)
    embed_some(worker, 1, frames=1)

    assert limit_s(worker, embedder, clock, 15) == pytest.approx(10)


def test_a_pause_in_mid_batch_is_not_taken_for_its_pace(
    clock: list[float], worker: EmbeddingWorker, embedder: FakeEmbedder
) -> None:
    def pause(_: Clip) -> None:
        clock[0] += 40.03
        worker.forgive(40.0)

    embedder.refuse = pause
    embed_some(worker, 5)

    assert worker._per_tracklet.seconds == pytest.approx(0.03)
    assert worker._per_frame.seconds == pytest.approx(0.01)


def test_a_long_batch_is_given_the_time_of_its_frames_up_to_a_bound(
    clock: list[float], worker: EmbeddingWorker, embedder: FakeEmbedder
) -> None:
    slow(embedder, clock, 0.3)
    embed_some(worker, 5)

    assert limit_s(worker, embedder, clock, 50) == pytest.approx(20 * 50 * 0.1)
    assert limit_s(worker, embedder, clock, 500) == pytest.approx(120)


def test_the_wait_is_told_by_what_batches_took(
    clock: list[float], worker: EmbeddingWorker, embedder: FakeEmbedder
) -> None:
    slow(embedder, clock, 4.0)
    embed_some(worker, 5)
    occupy(worker, embedder)
    for _ in range(3):
        worker.submit(clip(), deadline_s=WAIT_S)

    with pytest.raises(OverloadedError, match="a wait of less than 10 s, got about 12 s"):
        worker.submit(clip(), deadline_s=10)
    embedder.gate.set()


def test_a_batch_that_is_full_waits_for_nobody(embedder: FakeEmbedder) -> None:
    worker = EmbeddingWorker(embedder, max_frames=3, max_delay_s=1000, max_tracklets=4)
    worker.start()

    worker.submit(clip(3), deadline_s=WAIT_S).result(WAIT_S)
    worker.close(WAIT_S)


def test_a_batch_that_is_not_full_waits_for_company(embedder: FakeEmbedder) -> None:
    worker = EmbeddingWorker(embedder, max_frames=6, max_delay_s=1000, max_tracklets=4)
    worker.start()

    waiting = [worker.submit(clip(3), deadline_s=WAIT_S) for _ in range(2)]
    for one in waiting:
        one.result(WAIT_S)
    worker.close(WAIT_S)

    assert embedder.batches == [[3, 3]]


def test_who_is_queued_behind_a_batch_that_hangs_hears_so_and_nobody_may_join(
    clock: list[float], worker: EmbeddingWorker, embedder: FakeEmbedder
) -> None:
    held = occupy(worker, embedder)
    queued = worker.submit(clip(), deadline_s=WAIT_S)
    clock[0] += 11

    assert worker.lost() is None
    assert "a batch does not end" in str(queued.exception(0))
    assert not held.done()
    for ask in (worker.refuse_when_full, lambda: worker.submit(clip(), deadline_s=WAIT_S)):
        with pytest.raises(WorkerUnavailableError, match="a batch does not end"):
            ask()

    embedder.gate.set()
    held.result(WAIT_S)
    assert eventually(lambda: not says_unready(worker))
    worker.submit(clip(), deadline_s=WAIT_S).result(WAIT_S)
