"""What has had its time is erased by the service itself."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from index.embedded import EmbeddedGallery
from index.gallery import Filters, StorageFullError, TrackletRecord
from service.app import create_app
from service.expiry import sweep
from service.settings import Settings
from tests.service.conftest import FakeEmbedder, Start, assert_problem, enrol
from tests.service.making import GOOD


def in_s(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


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
    gone = enrol(client, expires_at=in_s(-1))
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


def all_of(gallery: EmbeddedGallery) -> list[TrackletRecord]:
    return list(gallery.list(Filters(), limit=100).records)
