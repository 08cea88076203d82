"""Which weights are served: those that come with Passerby, unless somebody asks for others."""

import logging
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient
from typer.testing import CliRunner

from index.embedded import EmbeddedGallery
from model.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    make_checkpoint,
    save_checkpoint,
    untrained_checkpoint,
)
from model.datasets.synthetic import SyntheticSet, write_folder
from model.embedder import Embedder
from model.errors import CheckpointError
from model.evaluation_plan import EvaluationTask
from model.frames import Preprocessing
from model.learner import start_network
from model.network import NetworkConfig
from model.recipe import Recipe
from service import cli
from service.app import create_app
from service.server import choose_checkpoint
from service.settings import Settings

SMALL = NetworkConfig(backbone="conv5", head=16)


@pytest.fixture
def bundled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Checkpoint:
    """A small checkpoint where the real one lies."""
    path = tmp_path / "project" / "weights" / "passerby.safetensors"
    network = untrained_checkpoint(3, SMALL).network
    saved = save_checkpoint(make_checkpoint(network, Preprocessing(64, 32)), path, precision="fp16")
    monkeypatch.setattr("model.checkpoint.BUNDLED_FILE", path)
    return saved


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the bundled file would be, if it were there."""
    path = tmp_path / "project" / "weights" / "passerby.safetensors"
    monkeypatch.setattr("model.checkpoint.BUNDLED_FILE", path)
    return path


def test_the_bundled_weights_are_served_where_nobody_asks_for_others(
    bundled: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = choose_checkpoint(Settings.load().weights)

    assert chosen.fingerprint == bundled.fingerprint
    assert not caplog.records


def test_a_missing_bundled_file_is_an_error_that_says_where_and_what_to_do(gone: Path) -> None:
    """And never a service on untrained weights."""
    with pytest.raises(CheckpointError) as caught:
        choose_checkpoint(Settings.load().weights)

    for expected in (str(gone), "restore the file", "--weights untrained"):
        assert expected in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"version https://example.org/a-pointer/v1\n"])
def test_a_damaged_bundled_file_is_an_error(gone: Path, content: bytes) -> None:
    gone.parent.mkdir(parents=True)
    gone.write_bytes(content)

    with pytest.raises(CheckpointError, match="expected a checkpoint"):
        choose_checkpoint(Settings.load().weights)


@pytest.mark.usefixtures("gone")
def test_untrained_weights_are_served_on_request_and_said_to_be_untrained(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "service.server.untrained_checkpoint", lambda: untrained_checkpoint(0, SMALL)
    )
    monkeypatch.setenv("PASSERBY_WEIGHTS", "untrained")

    chosen = choose_checkpoint(Settings.load().weights)

    assert chosen.provenance == {"weights": "untrained", "seed": 0}
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "untrained" in record.message


@pytest.mark.usefixtures("gone")
def test_a_file_is_served_without_the_bundled_one(tmp_path: Path) -> None:
    saved = save_checkpoint(untrained_checkpoint(5, SMALL), tmp_path / "mine.safetensors")

    chosen = choose_checkpoint(
        Settings.load(["--weights", str(tmp_path / "mine.safetensors")]).weights
    )

    assert chosen.fingerprint == saved.fingerprint


@pytest.mark.usefixtures("gone")
@pytest.mark.parametrize("given", ["./bundled", "bundled.safetensors", "run/bundled", "Bundled"])
def test_only_the_word_itself_means_the_bundled_file(given: str) -> None:
    assert find_checkpoint(given) == Path(given)


def test_info_names_the_bundled_weights(bundled: Checkpoint, gallery: EmbeddedGallery) -> None:
    settings = Settings.load()
    embedder = Embedder(choose_checkpoint(settings.weights), device="cpu")

    with TestClient(create_app(embedder, gallery, settings)) as client:
        told = client.get("/info").json()["model"]

    assert told["fingerprint"] == bundled.fingerprint
    assert told["dim"] == 16


def test_training_begins_with_the_bundled_weights_under_their_word(bundled: Checkpoint) -> None:
    """The recipe keeps the word, so that a run can go on in another checkout."""
    recipe = Recipe("test", start="bundled", network=SMALL)

    network, origin = start_network(recipe, seed=0)

    assert origin["checkpoint"] == bundled.fingerprint
    for name, weights in network.state_dict().items():
        assert torch.equal(weights, bundled.network.state_dict()[name]), name


def test_a_loaded_network_lets_go_of_its_file(bundled: Checkpoint) -> None:
    """One that does not is ended by the system where somebody overwrites the file in place."""
    path = find_checkpoint("bundled")
    loaded = load_checkpoint(path)

    assert str(path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert loaded.fingerprint == bundled.fingerprint


def passerby(*words: str | Path) -> int:
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code


def test_the_bundled_weights_are_evaluated_under_their_word(
    bundled: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What comes of it lies in the working directory, not beside the project's file."""
    tasks: list[EvaluationTask] = []
    monkeypatch.setattr("model.evaluation_console.run_task", lambda task, _: tasks.append(task))
    monkeypatch.chdir(tmp_path)
    write_folder(SyntheticSet(identities=2, height=64, width=32), tmp_path / "people")

    status = passerby("evaluate", "bundled", "--data", "people")

    [task] = tasks
    assert status == 0
    assert task.source == tmp_path / "project" / "weights" / "passerby.safetensors"
    assert task.output.resolve() == tmp_path / "bundled-evaluation"
    assert find_checkpoint("bundled") == task.source
    del bundled


@pytest.mark.parametrize(
    "words", [("export", "bundled", "x.onnx"), ("evaluate", "bundled", "--data", "nowhere")]
)
def test_a_command_says_where_the_bundled_file_is_missing(
    gone: Path, words: tuple[str, ...]
) -> None:
    with pytest.raises(CheckpointError, match="nothing at") as caught:
        passerby(*words)

    assert str(gone) in str(caught.value)
