"""A whole service in process, on a fake embedder and a gallery in a temporary directory."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from starlette.testclient import TestClient

from index.embedded import EmbeddedGallery
from index.gallery import Gallery
from model.embedder import TrackletEmbedding
from model.frames import Clip, Preprocessing
from service.app import create_app
from service.settings import Settings
from tests.service.making import GOOD, Files, mean_colours

MODEL = "trsa-fake"


class FakeEmbedder:
    """A `service.worker.Embedder` without a network: an embedding is mean colours.

    Args:
        model: Fingerprint.

    Attributes:
        gate: Cleared, holds up ``embed`` until it is set.
        entered: Set whenever ``embed`` has begun.
        warm_gate: The same for ``warm_up``.
        batches: Frames of each clip of each call.
        clips: Every clip that came.
        refuse: Called with each clip; may raise.
    """

    dim = 24
    preprocessing = Preprocessing(height=64, width=32)

    def __init__(self, model: str = MODEL) -> None:
        self.model = model
        self.gate, self.entered, self.warm_gate = (threading.Event() for _ in range(3))
        self.gate.set()
        self.warm_gate.set()
        self.batches: list[list[int]] = []
        self.clips: list[Clip] = []
        self.refuse: Callable[[Clip], None] = lambda _: None

    def describe(self) -> dict[str, Any]:
        return {"fingerprint": self.model, "dim": self.dim}

    def warm_up(self) -> None:
        assert self.warm_gate.wait(20)

    def embed(
        self, clips: Sequence[Clip], *, with_attention: bool = False
    ) -> list[TrackletEmbedding]:
        self.entered.set()
        assert self.gate.wait(20)
        self.batches.append([len(clip) for clip in clips])
        self.clips += clips
        for clip in clips:
            self.refuse(clip)
        maps = [np.full((len(clip), 16, 8), 1 / 128, dtype=np.float32) for clip in clips]
        return [
            TrackletEmbedding(mean_colours(clip), attention if with_attention else None)
            for clip, attention in zip(clips, maps, strict=True)
        ]


Start = Callable[..., TestClient]


@pytest.fixture
def embedder() -> Iterator[FakeEmbedder]:
    """A fake embedder; whatever still waits in it is let go at the end."""
    fake = FakeEmbedder()
    yield fake
    fake.gate.set()
    fake.warm_gate.set()


@pytest.fixture
def gallery(tmp_path: Path) -> Iterator[EmbeddedGallery]:
    """An empty gallery."""
    with EmbeddedGallery(tmp_path / "gallery") as opened:
        yield opened


@pytest.fixture
def start(embedder: FakeEmbedder, gallery: EmbeddedGallery) -> Iterator[Start]:
    """Run the app with other settings, or with another gallery."""
    with ExitStack() as running:

        def run(*, store: Gallery | None = None, **settings: Any) -> TestClient:
            app = create_app(embedder, store or gallery, Settings(**settings))
            # Let go of what a failed test left at the gate before the app waits for it.
            client = running.enter_context(TestClient(app))
            running.callback(embedder.warm_gate.set)
            running.callback(embedder.gate.set)
            return client

        yield run


@pytest.fixture
def client(start: Start) -> TestClient:
    """A client of a running service with the default settings."""
    return start()


def assert_problem(answer: httpx2.Response, status: int, slug: str) -> dict[str, Any]:
    """The answer is a complete RFC 9457 problem of this kind; returns its body."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["type"] == f"/problems/{slug}"
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == answer.headers["x-request-id"]
    if slug == "validation":
        assert all({"pointer", "detail"} <= one.keys() for one in body["errors"])
        assert body["errors"]
    assert "Traceback" not in answer.text
    assert str(Path(__file__).parent) not in answer.text
    return body


def assert_refused(
    client: TestClient, answer: httpx2.Response, status: int, slug: str
) -> dict[str, Any]:
    """The answer is this problem, nothing was stored, and the next good request succeeds."""
    body = assert_problem(answer, status, slug)
    assert client.get("/gallery").json() == {"items": [], "next_cursor": None}
    assert client.post("/gallery", files=GOOD).status_code == 201
    return body


def enrol(client: TestClient, files: Files | None = None, **fields: str) -> dict[str, Any]:
    """Enrol a tracklet; returns its record."""
    answer = client.post("/gallery", files=files or GOOD, data=fields)
    assert answer.status_code == 201, answer.text
    record: dict[str, Any] = answer.json()
    return record
