"""The commands against a running server: enrol, enrol again, query, draw."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from PIL import Image
from typer.testing import CliRunner

from index.embedded import EmbeddedGallery
from index.gallery import Filters
from model.checkpoint import load_checkpoint
from model.datasets.folder import read_folder
from model.errors import DatasetError
from service import cli
from service.app import create_app
from service.client import ClientError
from service.settings import Settings
from tests.service.conftest import FakeEmbedder

runner = CliRunner()


class Running:
    """A server in a thread."""

    def __init__(self, embedder: FakeEmbedder, gallery: EmbeddedGallery) -> None:
        app = create_app(embedder, gallery, Settings())
        config = uvicorn.Config(app, port=0, log_config=None, lifespan="on")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def start(self) -> str:
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)


@pytest.fixture
def address(embedder: FakeEmbedder, gallery: EmbeddedGallery) -> Iterator[str]:
    running = Running(embedder, gallery)
    yield running.start()
    running.stop()


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Three people of one colour each, seen by two cameras: identity/camera/frames."""
    root = tmp_path / "people"
    rng = np.random.default_rng(0)
    for number, colour in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200)]):
        for camera in ("c1", "c2"):
            folder = root / f"p{number}" / camera
            folder.mkdir(parents=True)
            for frame in range(3):
                pixels = rng.normal(colour, 10, (64, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{frame}.jpg")
    return root


def passerby(*words: str | Path) -> tuple[int, str]:
    result = runner.invoke(cli.app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_a_folder_is_enrolled_once(address: str, people: Path, gallery: EmbeddedGallery) -> None:
    status, said = passerby("enroll", people, "--server", address)
    again, said_again = passerby("enroll", people, "--server", address)

    assert (status, again) == (0, 0)
    assert "6 enrolled, 0 skipped, 0 failed" in said
    assert "0 enrolled, 6 skipped, 0 failed" in said_again
    assert gallery.get("p2:c1").identity == "p2"
    assert gallery.get("p2:c1").camera == "c1"


def test_a_second_run_finishes_what_the_first_one_left(
    address: str, people: Path, gallery: EmbeddedGallery
) -> None:
    passerby("enroll", people, "--server", address, "--camera", "c1")
    assert gallery.counts().tracklets == 3

    _, said = passerby("enroll", people, "--server", address)

    assert "3 enrolled, 3 skipped, 0 failed" in said


def test_failures_are_listed_with_their_reasons_and_the_rest_is_enrolled(
    address: str, people: Path
) -> None:
    (people / "p1" / "c2" / "1.jpg").write_bytes(b"not an image")
    (people / "p2" / "c2" / "1.jpg").write_bytes(b"")

    status, said = passerby("enroll", people, "--server", address)

    assert status == 1
    assert "4 enrolled, 0 skipped, 2 failed" in said
    assert "failed p1:c2: 415" in said
    assert "failed p2:c2: 422" in said


def test_changed_frames_under_the_same_id_are_a_failure(address: str, people: Path) -> None:
    passerby("enroll", people, "--server", address)
    (people / "p1" / "c2" / "2.jpg").unlink()

    status, said = passerby("enroll", people, "--server", address)

    assert status == 1
    assert "0 enrolled, 5 skipped, 1 failed" in said
    assert "other content" in said


def test_one_tracklet_is_enrolled_with_what_is_said_of_it(
    address: str, people: Path, gallery: EmbeddedGallery
) -> None:
    one = people / "p0" / "c1"

    status, _ = passerby("enroll", one, "--server", address, "--identity", "x", "--camera", "c9")

    [record] = gallery.list(Filters(), limit=10).records
    again, said = passerby("enroll", one, "--server", address, "--identity", "x", "--camera", "c9")
    assert (status, again) == (0, 0)
    assert "0 enrolled, 1 skipped" in said
    assert (record.identity, record.camera, record.frames_received) == ("x", "c9", 3)


def test_another_identity_under_the_same_id_is_a_failure(address: str, people: Path) -> None:
    words = ("enroll", people / "p0" / "c1", "--server", address, "--tracklet-id", "t")
    passerby(*words, "--identity", "x")

    status, said = passerby(*words, "--identity", "y")

    assert status == 1
    assert "failed t: 409" in said


def test_a_picture_that_cannot_be_written_is_a_clear_error(
    address: str, people: Path, tmp_path: Path
) -> None:
    with pytest.raises(ClientError, match="could not write the picture"):
        passerby(
            "query", people / "p1" / "c2", "--server", address, "--picture", tmp_path / "a.xyz"
        )


def test_an_unreachable_server_is_one_line(people: Path) -> None:
    status, said = passerby("enroll", people, "--server", "http://127.0.0.1:9")

    assert status == 1
    assert "6 failed" in said
    assert "could not reach" in said


def test_a_query_prints_a_table_and_draws_a_picture(
    address: str, people: Path, tmp_path: Path
) -> None:
    passerby("enroll", people, "--server", address, "--camera", "c1")
    picture = tmp_path / "answer.png"

    status, said = passerby(
        "query", people / "p1" / "c2", "--server", address, "--picture", picture, "--explain"
    )

    assert status == 0
    assert [said.index(name) for name in ("p1:c1", "p0:c1")] == sorted(
        said.index(name) for name in ("p1:c1", "p0:c1")
    )
    with Image.open(picture) as drawn:
        green = np.asarray(drawn.convert("RGB"))[28 + 2 * 142 + 14 + 64, 300]
    assert green.argmax() == 1  # the first match's strip stands below query and attention


def test_a_query_prints_json_on_request(address: str, people: Path) -> None:
    passerby("enroll", people, "--server", address, "--camera", "c1")

    _, said = passerby("query", people / "p2" / "c2", "--server", address, "--json", "--top-k", "2")

    answer = json.loads(said)
    assert answer["matches"][0]["identity"] == "p2"
    assert len(answer["matches"]) == 2


def test_init_writes_a_checkpoint_with_the_reading_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"

    status, said = passerby("init", "--output", path, "--temperature", "1", "--pool", "mean")

    checkpoint = load_checkpoint(path)
    assert status == 0
    assert checkpoint.fingerprint in said
    assert checkpoint.network.config.temperature == 1
    assert checkpoint.network.config.pool == "mean"


@pytest.mark.parametrize("temperature", ["0", "-1", "warm", "nan"])
def test_init_refuses_a_temperature_that_is_none(tmp_path: Path, temperature: str) -> None:
    status, said = passerby(
        "init", "--output", tmp_path / "net.safetensors", f"--temperature={temperature}"
    )

    assert status == 2
    assert "expected" in said
    assert not (tmp_path / "net.safetensors").exists()


def test_synth_draws_tracklets_that_enroll_reads(tmp_path: Path) -> None:
    status, _ = passerby("synth", tmp_path / "drawn", "--identities", "2")
    again, said = passerby("synth", tmp_path / "other", "--identities", "1")

    assert (status, again) == (0, 0)
    assert len(read_folder(tmp_path / "drawn")) == 4
    assert "2 tracklets" in said


def command(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {n: v for n, v in os.environ.items() if not n.startswith("PASSERBY_")}
    return subprocess.run(
        [sys.executable, "-m", "service.cli", *words],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_expected_errors_are_one_line_and_status_1(tmp_path: Path) -> None:
    serve_anyhow = ("serve", "--weights", "untrained")
    cases = [
        command("serve", PASSERBY_PROT="80"),
        command("serve", "--weights", str(tmp_path / "none.safetensors")),
        command(*serve_anyhow, "--index", "nonsense", "--data-dir", str(tmp_path / "data")),
        command("query", str(tmp_path / "nowhere")),
    ]

    for case, expected in zip(
        cases, ["PASSERBY_PROT", "nothing at", "nonsense", "nowhere"], strict=True
    ):
        assert case.returncode == 1, case.stderr
        assert "Traceback" not in case.stderr
        assert expected in case.stderr


@pytest.mark.slow
def test_the_demo_finds_people_and_stops_cleanly(tmp_path: Path) -> None:
    """Everything at once: draw, serve, enrol, query, print, picture, stop."""
    words = ("demo", "--output", str(tmp_path / "demo"), "--identities", "3")
    done = command(*words, "--weights", "untrained")

    assert done.returncode == 0, done.stderr
    assert "rank-1:" in done.stdout
    assert "by model trsa-" in done.stdout
    assert done.stdout.count("untrained") == 1
    assert "/docs" in done.stdout
    with Image.open(tmp_path / "demo" / "answer.png") as picture:
        assert picture.size[0] > 600


@pytest.mark.slow
def test_the_demo_says_why_the_service_did_not_start(tmp_path: Path) -> None:
    words = ("demo", "--output", str(tmp_path / "demo"), "--identities", "2")
    done = command(*words, "--weights", str(tmp_path / "none.safetensors"))

    assert done.returncode == 1
    assert f"nothing at {tmp_path / 'none.safetensors'}" in done.stdout


def test_the_demo_never_removes_a_folder_that_it_did_not_make(tmp_path: Path) -> None:
    kept = tmp_path / "tracklets" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("precious")

    with pytest.raises(DatasetError, match="empty folder"):
        passerby("demo", "--output", tmp_path)
    assert kept.read_text() == "precious"


@pytest.mark.slow
def test_ctrl_c_in_an_enrolment_leaves_whole_tracklets(
    address: str, people: Path, embedder: FakeEmbedder, gallery: EmbeddedGallery
) -> None:
    """The uploads under way are finished, no more are begun, and the next run does the rest."""
    embedder.gate.clear()
    words = ["enroll", str(people), "--server", address, "--concurrency", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", *words], stderr=subprocess.PIPE, text=True
    )
    assert embedder.entered.wait(60)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)  # the signal is delivered before the upload may end
    embedder.gate.set()
    _, said = process.communicate(timeout=60)

    assert process.returncode == 130, said
    assert "5 not begun" in said
    assert gallery.counts().tracklets == 1
    _, again = passerby("enroll", people, "--server", address)
    assert "5 enrolled, 1 skipped" in again


def test_a_load_test_prints_what_it_found_and_writes_it_down(
    address: str, people: Path, tmp_path: Path, gallery: EmbeddedGallery
) -> None:
    passerby("enroll", people, "--server", address)
    words = ("bench", people, "--server", address, "--duration", "1", "--warmup", "0.2")

    status, said = passerby(*words, "--rate", "10", "--output", tmp_path / "report")

    results = json.loads((tmp_path / "report" / "results.json").read_text())
    [run] = results["runs"]
    assert status == 0, said
    assert (run["sent"], run["answered"]) == (10, 10)
    assert run["timing_ms"]["total"] > 0
    assert results["gallery"]["tracklets"] == gallery.counts().tracklets == 6
    assert "p99" in said
    with Image.open(tmp_path / "report" / "latency.png") as picture:
        assert picture.size[0] > 600


def test_a_load_test_at_several_rates_has_a_row_each(
    address: str, people: Path, tmp_path: Path
) -> None:
    words = ("bench", people, "--server", address, "--duration", "1", "--warmup", "0")

    status, said = passerby(*words, "--rates", "3,6", "--route", "embed", "--output", tmp_path)

    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert status == 0, said
    assert [(run["rate"], run["sent"]) for run in runs] == [(3, 3), (6, 6)]


def test_a_load_test_of_an_empty_gallery_says_so(
    address: str, people: Path, tmp_path: Path
) -> None:
    words = ("bench", people, "--server", address, "--duration", "1", "--warmup", "0")

    _, said = passerby(*words, "--output", tmp_path)

    assert "the gallery is empty" in said


def test_a_load_test_refuses_a_gallery_that_is_too_small(
    address: str, people: Path, tmp_path: Path
) -> None:
    with pytest.raises(ClientError, match="at least 100 tracklets stored, got 0"):
        passerby(
            "bench", people, "--server", address, "--gallery-check", "100", "--output", tmp_path
        )


def test_a_load_test_of_nobody_is_a_clear_error(address: str, people: Path, tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="could not reach http://127"):
        passerby("bench", people, "--server", "http://127.0.0.1:9", "--output", tmp_path)
    with pytest.raises(ClientError, match="could not read"):
        passerby("bench", tmp_path / "nowhere", "--server", address, "--output", tmp_path)


@pytest.mark.parametrize(
    "words",
    [("--rate", "0"), ("--rate", "nan"), ("--rates", "1,x"), ("--rate", "1", "--rates", "1,2")],
)
def test_a_load_test_refuses_a_rate_that_is_none(words: tuple[str, ...], tmp_path: Path) -> None:
    status, said = passerby("bench", "--output", tmp_path, *words)

    assert status == 2
    assert "expected" in said


def test_ctrl_c_in_a_load_test_reports_what_there_is(
    address: str, people: Path, tmp_path: Path, embedder: FakeEmbedder
) -> None:
    def interrupt(_: object) -> None:
        if len(embedder.batches) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    embedder.refuse = interrupt
    words = ("bench", people, "--server", address, "--rate", "10", "--duration", "1000")

    status, said = passerby(*words, "--warmup", "0", "--output", tmp_path)

    [run] = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert status == 130
    assert "stopping" in said
    assert 0 < run["sent"] < 1000
