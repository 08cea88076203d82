"""A gallery passes to another model: aside first, then in one step."""

import io
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from starlette.testclient import TestClient

from index.embedded import EmbeddedGallery
from index.store import FILE_NAME
from index.succession import SuccessionError, abandon, standing, take_over
from model.embedder import TrackletEmbedding
from model.frames import Clip, Preprocessing
from service.app import create_app
from service.reembedding import reembed
from service.settings import Settings
from tests.service.conftest import FakeEmbedder, assert_problem, enrol
from tests.service.making import BLUE, GREEN, RED, clip_of


class NextEmbedder(FakeEmbedder):
    """Another model: other numbers, of another length, from frames of another size."""

    dim = 30
    preprocessing = Preprocessing(height=80, width=48)

    def __init__(self) -> None:
        super().__init__("trsa-next")

    def embed(
        self, clips: Sequence[Clip], *, with_attention: bool = False
    ) -> list[TrackletEmbedding]:
        assert all(clip.shape[1:] == (80, 48, 3) for clip in clips)
        made = super().embed(clips, with_attention=with_attention)
        longer = [np.concatenate([3 * one.embedding, np.ones(6, np.float32)]) for one in made]
        return [
            replace(one, embedding=other, frame_distance=0.25)
            for one, other in zip(made, longer, strict=True)
        ]


SETTINGS = Settings(keep_frames=True)
CONSOLE = Console(file=io.StringIO())


@pytest.fixture
def data_dir(tmp_path: Path, embedder: FakeEmbedder) -> Path:
    """A gallery with kept frames: red, green and blue."""
    with running(tmp_path / "data", embedder) as client:
        for tracklet_id, colour in (("red", RED), ("green", GREEN), ("blue", BLUE)):
            enrol(client, clip_of(colour), tracklet_id=tracklet_id, identity=f"p-{tracklet_id}")
    return tmp_path / "data"


class running:  # noqa: N801 reads as a verb
    """The service on a data directory."""

    def __init__(
        self, data_dir: Path, embedder: FakeEmbedder, settings: Settings = SETTINGS
    ) -> None:
        gallery = EmbeddedGallery(data_dir)
        self._client = TestClient(create_app(embedder, gallery, settings))

    def __enter__(self) -> TestClient:
        return self._client.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._client.__exit__(*error)


def nearest(client: TestClient, colour: tuple[int, int, int]) -> str:
    answer = client.post("/query", files=clip_of(colour))
    assert answer.status_code == 200, answer.text
    name: str = answer.json()["matches"][0]["identity"]
    return name


def test_the_next_model_finds_the_same_people(data_dir: Path) -> None:
    following = NextEmbedder()
    with EmbeddedGallery(data_dir) as gallery:
        before = gallery.get("red")

    assert reembed(data_dir, following, CONSOLE)

    with running(data_dir, following) as client:
        assert [nearest(client, one) for one in (RED, GREEN, BLUE)] == [
            "p-red",
            "p-green",
            "p-blue",
        ]
        answer = client.post("/query", files=clip_of(RED)).json()
        assert answer["matches"][0]["distance"] == pytest.approx(0, abs=1e-5)
    with EmbeddedGallery(data_dir) as gallery:
        after = gallery.get("red")
        assert gallery.embedding("red").shape == (30,)
    quality = {**(before.quality or {}), "frame_distance": 0.25}
    assert after == replace(before, model="trsa-next", quality=quality)


def test_a_running_service_answers_with_the_old_model_until_it_stops(
    data_dir: Path, embedder: FakeEmbedder
) -> None:
    following = NextEmbedder()
    with running(data_dir, embedder) as client:
        assert not reembed(data_dir, following, CONSOLE)

        assert nearest(client, GREEN) == "p-green"
        enrol(client, clip_of((250, 250, 0)), tracklet_id="late", identity="p-late")
        client.delete("/gallery/blue")
        client.patch("/gallery/red", json={"identity": "p-renamed"})
        assert client.get("/gallery/late").json()["model"] == "trsa-fake"

    assert reembed(data_dir, following, CONSOLE)
    with running(data_dir, following) as client:
        assert nearest(client, (250, 250, 0)) == "p-late"
        assert nearest(client, RED) == "p-renamed"
        assert client.get("/gallery/blue").status_code == 404


def test_what_is_erased_meanwhile_is_gone_from_what_is_put_aside(
    data_dir: Path, embedder: FakeEmbedder
) -> None:
    with running(data_dir, embedder) as client:
        reembed(data_dir, NextEmbedder(), CONSOLE)
        client.delete("/identities/p-red")

    with closing(sqlite3.connect(data_dir / FILE_NAME)) as connection:
        [count] = connection.execute("SELECT count(*) FROM succeeding_embeddings").fetchone()
    assert count == 2


def test_it_goes_on_where_it_was_interrupted(data_dir: Path) -> None:
    class Interrupted(NextEmbedder):
        def embed(self, clips: Sequence[Clip], *, with_attention: bool = False) -> Any:
            if self.batches:
                raise KeyboardInterrupt
            return super().embed(clips, with_attention=with_attention)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.reembedding._AT_ONCE", 1)
        with pytest.raises(KeyboardInterrupt):
            reembed(data_dir, Interrupted(), CONSOLE)
    assert standing(data_dir, "trsa-next").made == 1
    following = NextEmbedder()

    assert reembed(data_dir, following, CONSOLE)

    assert following.batches == [[1, 1]]


def test_without_frames_it_is_refused_and_nothing_changes(
    tmp_path: Path, embedder: FakeEmbedder
) -> None:
    with running(tmp_path, embedder, Settings()) as client:
        enrol(client, clip_of(RED), identity="p1")

    with pytest.raises(SuccessionError, match=r"got 1 without: PASSERBY_KEEP_FRAMES was off"):
        reembed(tmp_path, NextEmbedder(), CONSOLE)

    with running(tmp_path, embedder) as client:
        assert nearest(client, RED) == "p1"


def test_it_does_not_take_over_halfway(data_dir: Path, embedder: FakeEmbedder) -> None:
    with pytest.raises(SuccessionError, match="got 3 that are not"):
        take_over(data_dir, "trsa-next")

    with running(data_dir, embedder) as client:
        assert nearest(client, RED) == "p-red"


def test_a_second_time_there_is_nothing_to_do(data_dir: Path) -> None:
    reembed(data_dir, NextEmbedder(), CONSOLE)
    again = NextEmbedder()

    assert reembed(data_dir, again, CONSOLE)
    assert again.batches == []


def test_what_was_put_aside_can_be_forgotten(data_dir: Path, embedder: FakeEmbedder) -> None:
    with running(data_dir, embedder):
        reembed(data_dir, NextEmbedder(), CONSOLE)

    abandon(data_dir)

    assert standing(data_dir, "trsa-next").made == 0


def test_the_old_model_is_refused_afterwards(data_dir: Path, embedder: FakeEmbedder) -> None:
    reembed(data_dir, NextEmbedder(), CONSOLE)

    with running(data_dir, embedder) as client:
        refused = client.post("/query", files=clip_of(RED))

    assert_problem(refused, 409, "model-mismatch")


@pytest.fixture(autouse=True)
def let_go(embedder: FakeEmbedder) -> Iterator[None]:
    """Whatever still waits in the embedder."""
    yield
    embedder.gate.set()
