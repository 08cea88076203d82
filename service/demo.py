"""`passerby demo`: people drawn, enrolled from one camera and found again in another."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from model.checkpoint import BUNDLED
from model.cli import draw_to
from model.datasets.folder import read_folder
from model.datasets.synthetic import SyntheticSet
from model.datasets.tracklets import Tracklet
from service.client import Client, ClientError, LocalTracklet, read_local
from service.enrolment import enrol_all, plan_folder
from service.picture import draw_answer

ENROLLED, QUERIED = "c1", "c2"
MARK = ".drawn-by-the-demo"
START_S = 120.0
STOP_S = 45.0  # the grace, and an end


@dataclass(frozen=True, slots=True)
class Found:
    """One query and what came back.

    Args:
        tracklet: Who was asked for.
        local: Its frames.
        answer: Body of ``POST /query``.
    """

    tracklet: Tracklet
    local: LocalTracklet
    answer: dict[str, Any]

    @property
    def ranked(self) -> list[str]:
        """Identities, best first."""
        return [match["identity"] for match in self.answer["matches"]]

    @property
    def rank(self) -> int | None:
        """Where the right identity stands, from 1; None where it is missing."""
        identity = self.tracklet.identity
        return self.ranked.index(identity) + 1 if identity in self.ranked else None


@contextmanager
def serving(data_dir: Path, console: Console, weights: str = BUNDLED) -> Iterator[str]:
    """Run the service in a process of its own; yields its address.

    Args:
        data_dir: Of its gallery.
        console: Where to print.
        weights: What to serve, as in the settings.

    Raises:
        ClientError: It did not become ready.
    """
    port = _free_port()
    # A demo of the defaults: what the caller's environment says about a real service stays out.
    environment = {n: v for n, v in os.environ.items() if not n.upper().startswith("PASSERBY_")}
    command = [sys.executable, "-m", "service.cli", "serve"]
    command += ["--port", str(port), "--data-dir", str(data_dir), "--weights", weights]
    # A file, not a pipe: a pipe that nobody reads fills up and stops the service.
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed when it has been read
    process = subprocess.Popen(  # noqa: S603 our own command
        command,
        env=environment,
        stderr=log,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        with console.status("starting the service"):
            _wait_until_ready(process, address)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.seek(0)
        with log:
            for line in log:
                # The last is how a command ends that could not begin.
                if "WARNING" in line or "ERROR" in line or line.startswith("passerby:"):
                    console.print(
                        f"[yellow]the service said:[/] {escape(line.strip())}",
                        highlight=False,
                        soft_wrap=True,
                    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(process: "subprocess.Popen[bytes]", address: str) -> None:
    deadline = time.monotonic() + START_S
    with Client(address) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ClientError(f"the service ended with status {process.returncode}")
            if client.ready():
                return
            time.sleep(0.2)
    raise ClientError(f"the service was not ready within {START_S:g} s")


def run_demo(
    output: Path, identities: int, seed: int, console: Console, weights: str = BUNDLED
) -> float:
    """Draw people, enrol camera 1, query camera 2, print the ranking and write a picture.

    Args:
        output: Folder of the drawn tracklets and the picture. What an earlier demo drew there is
            drawn anew.
        identities: How many people.
        seed: Of the drawing.
        console: Where to print.
        weights: What to serve, as in the settings.

    Returns:
        Rank-1: the share of queries whose first rank is the right identity.

    Raises:
        ClientError: The service failed.
        DatasetError: The folder cannot be used.
    """
    tracklets = output / "tracklets"
    if (tracklets / MARK).exists():  # never remove a folder that somebody else filled
        shutil.rmtree(tracklets)
    draw_to(SyntheticSet(identities=identities, seed=seed), tracklets, console)
    (tracklets / MARK).touch()
    with (
        tempfile.TemporaryDirectory(prefix="passerby-demo-") as data_dir,
        serving(Path(data_dir), console, weights) as address,
        Client(address) as client,
    ):
        _enrol(client, tracklets, console)
        found = _query(client, tracklets, console)
        picture = output / "answer.png"
        _draw_best(client, found, picture)
    rank_1 = sum(one.rank == 1 for one in found) / len(found)
    console.print(_table(found))
    console.print(
        f"rank-1: {rank_1:.0%} of {len(found)} people of camera {QUERIED} came back first "
        f"among the {identities} of camera {ENROLLED} (chance: {1 / identities:.0%}), "
        f"by model {found[0].answer['model']}"
    )
    console.print(f"picture: {picture}")
    console.print(
        "API: http://127.0.0.1:8000/docs while `make serve` runs, and docs/api.md at any time."
    )
    return rank_1


def _enrol(client: Client, tracklets: Path, console: Console) -> None:
    tasks = plan_folder(tracklets, frozenset({ENROLLED}))
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(f"enrolling camera {ENROLLED}", total=len(tasks))
        for outcome in enrol_all(client, tasks, concurrency=2, stop=lambda: False):
            if outcome.state == "failed":
                raise ClientError(f"could not enrol {outcome.task.name}: {outcome.reason}")
            progress.advance(bar)


def _query(client: Client, tracklets: Path, console: Console) -> list[Found]:
    queries = [one for one in read_folder(tracklets) if one.camera == QUERIED]
    found = []
    with Progress(console=console, transient=True) as progress:
        for tracklet in progress.track(queries, description=f"querying camera {QUERIED}"):
            local = read_local(tracklet.frames)
            answer = client.query(local, {"top_k": 500, "explain": "true"})
            found.append(Found(tracklet, local, answer))
    return found


def _draw_best(client: Client, found: list[Found], picture: Path) -> None:
    """Draw the first query that came back right, else the first."""
    shown = next((one for one in found if one.rank == 1), found[0])
    answer = dict(shown.answer)
    answer["matches"] = answer["matches"][:5]
    strips = [client.strip(match["tracklet"]["tracklet_id"]) for match in answer["matches"]]
    draw_answer(
        shown.local, f"{shown.tracklet.identity} in camera {QUERIED}", answer, strips, picture
    )


def _table(found: list[Found]) -> Table:
    table = Table(title=f"Camera {QUERIED} asks camera {ENROLLED}: who is this?")
    for column in ("query", "first", "second", "third", "right one at rank"):
        table.add_column(column)
    for one in found:
        cells = []
        for match in one.answer["matches"][:3]:
            text = f"{match['identity']}  {match['distance']:.2f}"
            right = match["identity"] == one.tracklet.identity
            cells.append(f"[bold green]{text}[/]" if right else text)
        cells += [""] * (3 - len(cells))
        table.add_row(one.tracklet.identity, *cells, str(one.rank or "-"))
    return table
