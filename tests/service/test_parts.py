"""What routes share: an upload that never ends must not keep its place."""

import asyncio
import threading
import time
from collections.abc import MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from index.embedded import EmbeddedGallery
from service.app import create_app
from service.errors import OverloadedError
from service.parts import Parts, Slots
from service.settings import LimitSettings, QueueSettings, Settings
from tests.service.conftest import FakeEmbedder, Start, assert_problem
from tests.service.making import GOOD


def test_an_upload_that_stops_arriving_is_given_up(
    embedder: FakeEmbedder, gallery: EmbeddedGallery
) -> None:
    """It gets 504, and its place is free for the next."""
    settings = Settings(limits=LimitSettings(uploads=1, upload_s=0.2))
    app = create_app(embedder, gallery, settings)
    sent: list[MutableMapping[str, Any]] = []
    headers = [(b"content-type", b"multipart/form-data; boundary=q"), (b"expect", b"100-continue")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/query",
        "query_string": b"",
        "headers": headers,
    }

    async def never() -> MutableMapping[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def keep(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def ask_twice() -> None:
        async with app.router.lifespan_context(app):
            await app(dict(scope), never, keep)
            await app(dict(scope), never, keep)

    asyncio.run(ask_twice())

    assert [one["status"] for one in sent if one["type"] == "http.response.start"] == [504, 504]


class HangingUp:
    """A client that sends a whole upload and hangs up when it is told to."""

    def __init__(self, path: str) -> None:
        request = httpx2.Request("POST", f"http://service{path}", files=GOOD)
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
        }
        self.sent: list[MutableMapping[str, Any]] = []
        self.gone = asyncio.Event()
        self._body: bytes | None = request.read()

    async def receive(self) -> MutableMapping[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("path", ["/gallery", "/query", "/embed"])
def test_who_hangs_up_in_the_queue_leaves_it(
    embedder: FakeEmbedder, gallery: EmbeddedGallery, path: str
) -> None:
    """Its tracklet makes room at once, and never comes to the embedder."""
    app = create_app(embedder, gallery, Settings(queue=QueueSettings(max_tracklets=1)))
    parts: Parts = app.state.parts

    async def until(claim: Any) -> None:
        async with asyncio.timeout(20):
            while not claim():
                await asyncio.sleep(0.005)

    async def ask() -> None:
        embedder.gate.clear()
        async with app.router.lifespan_context(app):
            first, second = HangingUp("/embed"), HangingUp(path)
            running = asyncio.ensure_future(app(first.scope, first.receive, first.send))
            await until(embedder.entered.is_set)
            waiting = asyncio.ensure_future(app(second.scope, second.receive, second.send))
            await until(lambda: parts.worker.count_waiting() == 1)

            second.gone.set()
            await asyncio.wait_for(waiting, 20)

            assert parts.worker.count_waiting() == 0
            assert second.sent == []
            embedder.gate.set()
            await asyncio.wait_for(running, 20)

    asyncio.run(ask())

    assert embedder.batches == [[3]]


def test_who_hangs_up_while_it_is_decoded_is_not_embedded(
    embedder: FakeEmbedder, gallery: EmbeddedGallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(embedder, gallery, Settings())
    parts: Parts = app.state.parts
    decode, begun, go_on = parts.decoders.decode, threading.Event(), threading.Event()

    async def slow(*given: Any, **more: Any) -> Any:
        begun.set()
        while not go_on.is_set():
            await asyncio.sleep(0.005)
        return await decode(*given, **more)

    monkeypatch.setattr(parts.decoders, "decode", slow)

    async def ask() -> None:
        async with app.router.lifespan_context(app):
            client = HangingUp("/gallery")
            asking = asyncio.ensure_future(app(client.scope, client.receive, client.send))
            while not begun.is_set():
                await asyncio.sleep(0.005)
            client.gone.set()
            await asyncio.wait_for(asking, 20)
            go_on.set()
            with parts.uploads.take():  # its place is free
                assert client.sent == []

    asyncio.run(ask())

    assert embedder.batches == []


def test_slots_refuse_one_more_until_one_is_free() -> None:
    slots = Slots(1, "searches")

    with slots.take():
        with pytest.raises(OverloadedError, match="fewer than 1 searches at a time"):
            slots.refuse_when_full()
        with pytest.raises(OverloadedError), slots.take():
            pass

    slots.refuse_when_full()


def test_an_upload_is_refused_early_while_too_many_searches_wait(
    start: Start, embedder: FakeEmbedder
) -> None:
    client = start(limits=LimitSettings(searches=1))
    parts: Parts = client.app.state.parts  # type: ignore[attr-defined]

    with parts.searches.take():
        refused = client.post("/query", files=GOOD)

    assert_problem(refused, 429, "overloaded")
    assert embedder.batches == []
    assert client.post("/query", files=GOOD).status_code == 200


def test_too_many_changes_at_a_time_are_refused_and_queries_are_not(start: Start) -> None:
    client = start(limits=LimitSettings(writes=1))
    parts: Parts = client.app.state.parts  # type: ignore[attr-defined]
    record = client.post("/gallery", files=GOOD).json()
    path = f"/gallery/{record['tracklet_id']}"

    with parts.writes.take():
        for refused in (
            client.post("/gallery", files=GOOD),
            client.patch(path, json={"identity": "p1"}),
            client.delete(path),
        ):
            assert_problem(refused, 429, "overloaded")
            assert refused.headers["retry-after"].isdigit()
        assert client.post("/query", files=GOOD).status_code == 200

    assert client.get(path).json() == record
    assert client.delete(path).status_code == 204


def test_changes_that_wait_for_the_disk_hold_up_nothing_else(
    start: Start, gallery: EmbeddedGallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than the pool of threads that routes share has."""
    client = start()
    record = client.post("/gallery", files=GOOD).json()
    path = f"/gallery/{record['tracklet_id']}"
    waiting, go_on = threading.Semaphore(0), threading.Event()
    update = gallery.update

    def slow(*given: Any) -> Any:
        waiting.release()
        assert go_on.wait(20)
        return update(*given)

    monkeypatch.setattr(gallery, "update", slow)
    with ThreadPoolExecutor(50) as pool:
        changing = [pool.submit(client.patch, path, json={"camera": "c1"}) for _ in range(50)]
        try:
            assert waiting.acquire(timeout=20)
            for open_path in ("/gallery", "/metrics", "/info"):
                assert client.get(open_path).status_code == 200
        finally:
            go_on.set()
        assert {one.result(20).status_code for one in changing} == {200}


def test_waiting_for_a_decoder_counts_towards_the_deadline(
    start: Start, embedder: FakeEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start(queue=QueueSettings(deadline_s=0.1))
    parts: Parts = client.app.state.parts  # type: ignore[attr-defined]

    async def never(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(parts.decoders, "decode", never)

    assert_problem(client.post("/embed", files=GOOD), 504, "deadline-exceeded")
    assert embedder.batches == []


def test_a_deadline_that_has_passed_before_the_queue_is_504(
    start: Start, gallery: EmbeddedGallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start(queue=QueueSettings(deadline_s=0.2))
    get = gallery.get

    def slow(tracklet_id: str) -> Any:
        time.sleep(0.3)
        return get(tracklet_id)

    monkeypatch.setattr(gallery, "get", slow)

    answer = client.post("/gallery", files=GOOD, data={"tracklet_id": "t"})

    assert_problem(answer, 504, "deadline-exceeded")


def test_a_refused_pair_leaves_nothing_in_the_queue(start: Start, embedder: FakeEmbedder) -> None:
    client = start(queue=QueueSettings(max_tracklets=1))
    parts: Parts = client.app.state.parts  # type: ignore[attr-defined]
    pair = [(f"{prefix}{name}", file) for prefix in ("a_", "b_") for name, file in GOOD]
    embedder.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        at_work = pool.submit(client.post, "/embed", files=GOOD)
        assert embedder.entered.wait(20)

        refused = client.post("/verify", files=pair)

        assert_problem(refused, 429, "overloaded")
        assert parts.worker.count_waiting() == 0
        embedder.gate.set()
        assert at_work.result(20).status_code == 200


def test_a_service_that_stops_changes_nothing_more(start: Start) -> None:
    client = start()
    record = client.post("/gallery", files=GOOD, data={"identity": "p1"}).json()
    parts: Parts = client.app.state.parts  # type: ignore[attr-defined]
    path = f"/gallery/{record['tracklet_id']}"

    parts.begin_stopping()

    for answer in (
        client.patch(path, json={"camera": "c9"}),
        client.delete(path),
        client.patch("/identities/p1", json={"identity": "p2"}),
        client.delete("/identities/p1"),
        client.get(f"{path}/matches"),
    ):
        assert_problem(answer, 503, "not-ready")
    assert client.get(path).json() == record


def test_a_check_that_fails_oddly_is_named_beside_the_others(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start()
    client.post("/embed", files=GOOD)
    readiness = client.app.state.readiness  # type: ignore[attr-defined]

    async def fail() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(readiness._questions["store"], "_check", fail)

    detail = assert_problem(client.get("/readyz"), 503, "not-ready")["detail"]

    assert detail == "store: it could not be asked; the log says why"
