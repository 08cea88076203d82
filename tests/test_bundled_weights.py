"""The checkpoint that comes with Passerby: that it is there, what it is, and what it gives away."""

import io
import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from bench.load import in_a_process
from index.embedded import EmbeddedGallery
from model.checkpoint import BUNDLED_FILE, Checkpoint, load_checkpoint, without_people
from model.embedder import Embedder
from service.app import create_app
from service.server import choose_checkpoint
from service.settings import Settings

ROOT = Path(__file__).parent.parent
LIMIT_BYTES = 48_000_000


@pytest.fixture(scope="module")
def bundled() -> Checkpoint:
    """The file itself; where it is missing, every test here fails."""
    return load_checkpoint(BUNDLED_FILE)


@pytest.fixture(scope="module")
def header() -> dict[str, Any]:
    """The file's own header, read without the code that writes it."""
    with BUNDLED_FILE.open("rb") as file:
        [length] = struct.unpack("<Q", file.read(8))
        content: dict[str, Any] = json.loads(file.read(length))
    return content


def texts(value: object) -> Iterator[str]:
    """Every string in a JSON value, names included."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield str(name)
            yield from texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from texts(one)
    elif isinstance(value, str):
        yield value


def starts(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What each training began with, the last training first."""
    found = []
    start = provenance.get("start")
    while isinstance(start, Mapping):
        found.append(start)
        start = start.get("start")
    return found


def test_the_bundled_file_is_there_and_small_enough_to_be_committed() -> None:
    assert BUNDLED_FILE == ROOT / "weights" / "passerby.safetensors"
    assert BUNDLED_FILE.is_file(), "the weights that ship are missing"
    assert BUNDLED_FILE.stat().st_size < LIMIT_BYTES


def test_its_weights_are_half_precision(header: Mapping[str, Any]) -> None:
    """All but the counters of the batch normalisations."""
    kinds = {name: one["dtype"] for name, one in header.items() if name != "__metadata__"}

    assert kinds
    assert {kind for name, kind in kinds.items() if "num_batches_tracked" not in name} == {"F16"}


def test_its_fingerprint_is_the_one_of_the_model_card(bundled: Checkpoint) -> None:
    card = (ROOT / "docs" / "model-card.md").read_text(encoding="utf-8")

    assert bundled.fingerprint in re.findall(r"trsa-[0-9a-f]{12}", card)


def test_it_is_served_where_nobody_asks_for_others_and_info_names_it(
    bundled: Checkpoint, tmp_path: Path
) -> None:
    settings = Settings.load()
    embedder = Embedder(choose_checkpoint(settings.weights), device="cpu")

    with (
        EmbeddedGallery(tmp_path) as gallery,
        TestClient(create_app(embedder, gallery, settings)) as client,
    ):
        told = client.get("/info").json()["model"]

    assert told["fingerprint"] == bundled.fingerprint
    assert told["provenance"] == without_people(bundled.provenance)


def test_its_answers_explain_themselves_as_the_contract_says(tmp_path: Path) -> None:
    settings = Settings.load()
    embedder = Embedder(choose_checkpoint(settings.weights), device="cpu")
    drawn = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 64, 3), np.uint8))
    content = io.BytesIO()
    drawn.save(content, "PNG")
    files = [("frames", ("1.png", content.getvalue()))] * 2

    with (
        EmbeddedGallery(tmp_path) as gallery,
        TestClient(create_app(embedder, gallery, settings)) as client,
    ):
        answer = client.post("/query", files=files, params={"explain": "true"}).json()

    maps = np.array([one["map"] for one in answer["attention"]])
    assert maps.shape == (2, 16, 8)
    assert maps.sum(axis=(1, 2)) == pytest.approx(np.ones(2))


def test_its_training_began_with_random_weights(bundled: Checkpoint) -> None:
    """The licence of ImageNet's weights forbids what these are for."""
    begun = starts(bundled.provenance)

    assert begun
    assert begun[-1].get("weights") == "random"
    assert not any("backbone" in start for start in begun)  # a ResNet-50 from elsewhere
    assert not any("imagenet" in text.lower() for text in texts(bundled.provenance))


def test_it_names_what_it_was_trained_on(bundled: Checkpoint) -> None:
    """So that `passerby evaluate` refuses to test it on them."""
    trained = bundled.provenance["data"]

    assert trained["fingerprint"]
    assert trained["train_identities"]


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("/home/somebody/run", True),
        ("file:///srv/x", True),
        ("from ../shared/ward", True),
        ("~/run", True),
        ("C:\\runs", True),
        ("ward/person_0001", False),
        ("rank-1 and/or mAP", False),
        ("teacher.xml", False),
    ],
)
def test_the_search_for_paths_finds_them(text: str, is_one: bool) -> None:
    assert bool(PATH.search(text)) == is_one


# One that begins at the root, at somebody's home or a folder up; a stroke within words is none.
PATH = re.compile(r"(?<![\w.-])(/|~/|\.\./|[A-Za-z]:[\\/])")


def test_it_gives_away_no_path_of_the_machine_that_made_it(header: Mapping[str, Any]) -> None:
    """`/info` shows where its weights come from to everybody with a key."""
    metadata = header["__metadata__"]
    told = [*texts(json.loads(metadata["provenance"])), *metadata.keys()]

    assert not [text for text in told if PATH.search(text)]


@pytest.mark.slow
def test_loading_it_takes_no_more_memory_than_its_weights_twice() -> None:
    loading, *_ = in_a_process(BUNDLED_FILE)

    assert 1 <= loading.peak <= 2
    assert loading.kept <= 1.25
