"""What has had its time is erased by the service itself."""

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from index.embedded import EmbeddedGallery
from index.gallery import Filters, StorageFullError, TrackletRecord
from service.app import create_app
from service.audit import Trail, files_of
from service.audit_reading import Reading, Sought
from service.expiry import sweep
from service.parts import Parts
from service.settings import Settings
from tests.service.conftest import FakeEmbedder, Start, assert_problem, enrol
from tests.service.making import GOOD
from tests.service.processes import eventually


def in_s(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def enrol_overdue(client: TestClient, gallery: EmbeddedGallery, **fields: str) -> dict[str, Any]:
    """Enrol what has had its time meanwhile; nobody may ask for that at once."""
    record = enrol(client, GOOD, **fields)
    gallery.update(record["tracklet_id"], {"expires_at": datetime.now(UTC) - timedelta(seconds=1)})
    return record


def test_a_tracklet_says_when_it_is_erased_and_that_may_be_changed(start: Start) -> None:
    client = start()
    record = enrol(client, expires_at="2126-01-01T00:00:00+02:00")
    path = f"/gallery/{record['tracklet_id']}"

    assert record["expires_at"] == "2125-12-31T22:00:00Z"
    assert client.patch(path, json={"expires_at": None}).json()["expires_at"] is None
    assert_problem(client.patch(path, json={"expires_at": "soon"}), 422, "validation")


def test_the_same_upload_with_the_same_expiry_is_the_same_enrolment(start: Start) -> None:
    client = start()
    given = {"tracklet_id": "t", "expires_at": "2126-01-01T00:00:00Z"}
    assert client.post("/gallery", files=GOOD, data=given).status_code == 201

    assert client.post("/gallery", files=GOOD, data=given).status_code == 200
    other = client.post("/gallery", files=GOOD, data={"tracklet_id": "t"})
    assert_problem(other, 409, "already-exists")


def test_what_is_due_is_erased_also_what_became_due_while_nobody_ran(
    embedder: FakeEmbedder, gallery: EmbeddedGallery, start: Start
) -> None:
    client = start()
    gone = enrol_overdue(client, gallery)
    kept = enrol(client, expires_at=in_s(3600))
    parts = create_app(embedder, gallery, Settings()).state.parts

    async def sweep_once() -> None:
        task = asyncio.create_task(sweep(parts, every_s=3600))
        while any(one.tracklet_id == gone["tracklet_id"] for one in all_of(gallery)):
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(sweep_once(), 20))

    assert [one.tracklet_id for one in all_of(gallery)] == [kept["tracklet_id"]]


def test_a_retention_erases_what_is_older(
    embedder: FakeEmbedder, gallery: EmbeddedGallery, start: Start
) -> None:
    enrol(start())
    parts = create_app(embedder, gallery, Settings(retention_days=1e-9)).state.parts

    async def sweep_until_empty() -> None:
        task = asyncio.create_task(sweep(parts, every_s=0.01))
        while all_of(gallery):
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(sweep_until_empty(), 20))


@pytest.mark.parametrize(
    "error",
    [
        StorageFullError("cannot write the gallery: the disk is full"),
        MemoryError(),
        OSError(24, ""),
    ],
    ids=["full", "memory", "descriptors"],
)
def test_a_sweep_that_fails_is_told_once_and_tried_again(
    embedder: FakeEmbedder,
    gallery: EmbeddedGallery,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    parts = create_app(embedder, gallery, Settings()).state.parts
    tries = 0

    def fail(*_: object) -> tuple[str, ...]:
        nonlocal tries
        tries += 1
        raise error

    monkeypatch.setattr(gallery, "expire", fail)

    async def sweep_thrice() -> None:
        task = asyncio.create_task(sweep(parts, every_s=0.0))
        while tries < 3:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(sweep_thrice(), 20))

    assert caplog.text.count("could not be erased") == 1


def swept(parts: Parts, trail: Trail, *, until: Callable[[], bool]) -> None:
    """Sweep until a claim is true."""

    async def run() -> None:
        task = asyncio.create_task(sweep(parts, every_s=0.01, trail=trail))
        while not until():
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.fixture
def trail(tmp_path: Path, gallery: EmbeddedGallery) -> Iterator[Trail]:
    """The trail beside the gallery."""
    del gallery
    opened = Trail(tmp_path / "gallery" / "audit")
    yield opened
    opened.close()


def erased_lines(tmp_path: Path, **sought: Any) -> list[dict[str, Any]]:
    return Reading(tmp_path / "gallery").lines(Sought(by="retention", **sought))


def test_the_trail_tells_what_retention_has_erased_and_names_nobody(
    embedder: FakeEmbedder, gallery: EmbeddedGallery, start: Start, trail: Trail, tmp_path: Path
) -> None:
    client = start()
    for name in ("gone-1", "gone-2"):
        enrol_overdue(client, gallery, tracklet_id=name)
    enrol(client, tracklet_id="kept")
    parts = create_app(embedder, gallery, Settings()).state.parts

    swept(parts, trail, until=lambda: bool(erased_lines(tmp_path)))

    [line] = erased_lines(tmp_path)
    del line["time"], line["tracklets"]
    assert line == {"action": "erase-expired", "by": "retention", "count": 2, "outcome": "done"}
    assert len(erased_lines(tmp_path, tracklet="gone-2")) == 1
    assert erased_lines(tmp_path, tracklet="kept") == []
    [path] = files_of(tmp_path / "gallery" / "audit")
    assert "gone" not in path.read_text()


def test_many_that_are_erased_at_once_are_several_lines(
    embedder: FakeEmbedder, gallery: EmbeddedGallery, trail: Trail, tmp_path: Path, monkeypatch: Any
) -> None:
    """None of which is longer than whoever reads the trail takes."""
    batches = [tuple(f"{'t' * 120}{number}" for number in range(2500)), ()]
    monkeypatch.setattr(gallery, "expire", lambda *_: batches.pop(0))
    parts = create_app(embedder, gallery, Settings()).state.parts

    swept(parts, trail, until=lambda: not batches)

    assert [one["count"] for one in erased_lines(tmp_path)] == [1000, 1000, 500]


def test_a_trail_that_cannot_be_written_keeps_nobody_and_is_told_later(
    embedder: FakeEmbedder,
    gallery: EmbeddedGallery,
    start: Start,
    trail: Trail,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever was promised to be forgotten by now is forgotten."""
    enrol_overdue(start(), gallery, tracklet_id="gone")
    parts = create_app(embedder, gallery, Settings()).state.parts

    def fail(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    def is_told() -> bool:
        if all_of(gallery):
            return False
        monkeypatch.undo()  # there is room again
        return bool(erased_lines(tmp_path, tracklet="gone"))

    monkeypatch.setattr(trail, "_append", fail)
    swept(parts, trail, until=is_told)

    assert [one["count"] for one in erased_lines(tmp_path)] == [1]


def test_a_running_service_tells_the_trail_what_has_expired(
    embedder: FakeEmbedder, gallery: EmbeddedGallery, tmp_path: Path
) -> None:
    """What became due while nobody ran goes, and is told, when it starts."""
    with TestClient(create_app(embedder, gallery, Settings())) as client:
        enrol(client, tracklet_id="gone")
    again = EmbeddedGallery(tmp_path / "gallery")
    again.update("gone", {"expires_at": datetime(2020, 1, 1, tzinfo=UTC)})
    trail = Trail(tmp_path / "gallery" / "audit")

    with TestClient(create_app(embedder, again, Settings(), trail=trail)):
        assert eventually(lambda: len(erased_lines(tmp_path, tracklet="gone")) == 1)


def all_of(gallery: EmbeddedGallery) -> list[TrackletRecord]:
    return list(gallery.list(Filters(), limit=100).records)
