"""A device without memory, through the worker and the service: smaller batches, or the truth."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from index.embedded import EmbeddedGallery
from model.checkpoint import Checkpoint, make_checkpoint, untrained_checkpoint
from model.embedder import Embedder
from model.frames import Preprocessing
from model.network import NetworkConfig
from service.app import create_app
from service.settings import Settings
from tests.service.conftest import assert_problem
from tests.service.making import BLUE, GREEN, RED, clip_of
from tests.service.processes import eventually

FOUR = clip_of(RED, GREEN, BLUE, RED)
NO_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """A small network, with weights of chance."""
    network = untrained_checkpoint(seed=0, config=NetworkConfig(backbone="conv5")).network
    return make_checkpoint(network, Preprocessing(height=64, width=32))


class Device:
    """A real embedder whose device has room for so many frames at once.

    Args:
        checkpoint: Its model.

    Attributes:
        room: For how many.
        tried: How many frames each forward pass had, whether or not there was room.
        warmed: Likewise, how many it was to be warmed up for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.embedder = Embedder(checkpoint, device="cpu", runtime="torch", max_frames=4)
        self.room = 4
        self.tried: list[int] = []
        self.warmed: list[int] = []
        self._embed = self.embedder._network.embed_frames
        self.embedder._network.embed_frames = self._forward  # type: ignore[method-assign]
        self.embedder._runtime.warm_up = self._warm_up  # type: ignore[method-assign]

    def _forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.tried.append(len(frames))
        self._claim(len(frames))
        return self._embed(frames)

    def _warm_up(self, max_frames: int) -> None:
        self.warmed.append(max_frames)
        self._claim(max_frames)

    def _claim(self, frames: int) -> None:
        if frames > self.room:
            raise NO_MEMORY


Serve = Callable[[], TestClient]


@pytest.fixture
def device(checkpoint: Checkpoint) -> Device:
    return Device(checkpoint)


@pytest.fixture
def serve(device: Device, gallery: EmbeddedGallery, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start the service on the device; a grey frame is tried often where something fails."""
    monkeypatch.setattr("service.worker.CANARY_FAILED_S", 0.05)
    with ExitStack() as running:

        def start() -> TestClient:
            app = create_app(device.embedder, gallery, Settings())
            return running.enter_context(TestClient(app))

        yield start


@pytest.fixture
def client(serve: Serve) -> TestClient:
    """A client of the service, which is ready."""
    client = serve()
    assert eventually(lambda: ready(client))
    return client


def ready(client: TestClient) -> bool:
    return client.get("/readyz").is_success


def test_memory_that_does_not_suffice_costs_no_request_and_is_remembered(
    client: TestClient, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    expected = client.post("/embed", files=FOUR).json()["embedding"]
    device.room = 2
    device.tried.clear()

    answers = [client.post("/embed", files=FOUR) for _ in range(2)]
    device.room = 4  # nobody asks again for what failed once
    answers.append(client.post("/embed", files=FOUR))

    assert device.tried == [4, 2, 2, 2, 2, 2, 2]
    assert caplog.text.count("cpu has no memory for 4 frames at once, going on with 2") == 1
    for answer in answers:
        assert answer.status_code == 200
        assert np.allclose(answer.json()["embedding"], expected, atol=1e-4)
    assert ready(client)


def test_memory_that_is_gone_is_told_and_the_service_comes_back_with_it(
    client: TestClient, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.room = 0

    for number in (1, 2, 3):
        assert_problem(client.post("/gallery", files=FOUR), 503, "worker-unavailable")
        assert ready(client) is (number < 3)
    detail = assert_problem(client.get("/readyz"), 503, "not-ready")["detail"]
    device.room = 4

    assert detail.startswith("worker: ")
    assert "can't allocate memory" not in detail  # that is for the log
    assert "can't allocate memory" in caplog.text
    assert eventually(lambda: ready(client))
    assert client.get("/gallery").json()["items"] == []
    assert client.post("/gallery", files=FOUR).status_code == 201


def test_a_device_that_has_no_memory_for_the_largest_batch_warms_up_for_less(
    serve: Serve, device: Device
) -> None:
    device.room = 1
    client = serve()

    assert eventually(lambda: ready(client))

    assert device.warmed[:3] == [4, 2, 1]
    assert client.post("/embed", files=FOUR).status_code == 200
    assert max(device.tried) == 1


def test_a_device_that_has_no_memory_for_a_warm_up_is_lost_and_that_is_told(
    serve: Serve, device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    """Red from the beginning, so that whatever supervises the process may start another one."""
    device.room = 0
    client = serve()
    worker = client.app.state.parts.worker  # type: ignore[attr-defined]

    assert eventually(lambda: worker.lost() is not None)

    detail = assert_problem(client.get("/readyz"), 503, "not-ready")["detail"]
    assert "worker: the embedding worker is not running" in detail
    assert "can't allocate memory" in caplog.text
    assert_problem(client.post("/embed", files=FOUR), 503, "worker-unavailable")
