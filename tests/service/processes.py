"""The real service in a process of its own, with an embedder that does what a folder tells it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent.parent
START_S = 60.0
WAIT_S = 30.0
# The file "hold" names a stage where whoever comes waits; "entered" says that somebody has come.
SERVE = """
import asyncio, sys, time
from pathlib import Path
from index.embedded import EmbeddedGallery
from index.store import Transaction
from service import decoding, server, worker
from service.logs import configure_logging
from service.settings import Settings
from tests.service.conftest import FakeEmbedder

folder = Path(sys.argv[1])

def held(stage, work):
    def wait_and_work(*given, **more):
        if told() == stage:
            (folder / "entered").touch()
            while told() == stage:
                time.sleep(0.01)
        return work(*given, **more)
    return wait_and_work

def held_apart(stage, work):
    async def wait_and_work(*given, **more):
        await asyncio.to_thread(held(stage, lambda: None))
        return await work(*given, **more)
    return wait_and_work

def told():
    try:
        return (folder / "hold").read_text()
    except FileNotFoundError:
        return ""

FakeEmbedder.embed = held("embed", FakeEmbedder.embed)
EmbeddedGallery.search = held("search", EmbeddedGallery.search)
EmbeddedGallery.add = held("store", EmbeddedGallery.add)
Transaction.commit = held("commit", Transaction.commit)
EmbeddedGallery.check = held("check", EmbeddedGallery.check)
decoding.Decoders._decode_by_child = held_apart("decode", decoding.Decoders._decode_by_child)
settings = Settings.load()
configure_logging(settings.log_format)
server.run(settings, FakeEmbedder())
"""
STAGES = ("decode", "embed", "search", "store")


class Service:
    """A running service.

    Args:
        process: It.
        address: Where it listens.
        folder: Of its data, its log and its orders.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", address: str, folder: Path) -> None:
        self.process = process
        self.address = address
        self.folder = folder

    def hold(self, stage: str = "embed") -> None:
        """Have whoever comes to a stage next wait there."""
        (self.folder / "entered").unlink(missing_ok=True)
        aside = self.folder / "aside"
        aside.write_text(stage)
        aside.replace(self.folder / "hold")

    def let_go(self) -> None:
        """End `hold`."""
        (self.folder / "hold").unlink(missing_ok=True)

    def entered(self) -> bool:
        """Whether somebody has come there since `hold`."""
        return (self.folder / "entered").exists()

    def send(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def children(self) -> list[int]:
        """Process ids of its decoders."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for one in tasks for pid in one.read_text().split()]

    def count_descriptors(self) -> int:
        """How many files and sockets it has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def readiness(self) -> int | None:
        """The status of /readyz; None where nobody answers."""
        try:
            return httpx.get(f"{self.address}/readyz", timeout=WAIT_S).status_code
        except httpx.TransportError:
            return None

    def log(self) -> str:
        """What it has logged."""
        return (self.folder / "log").read_text()


def eventually(claim: Callable[[], bool], within_s: float = WAIT_S) -> bool:
    """Whether a claim comes true in time."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if claim():
            return True
        time.sleep(0.01)
    return claim()


def gauge(service: Service, name: str) -> int:
    """The value of one of its metrics, without the prefix."""
    text = httpx.get(f"{service.address}/metrics").text
    [line] = [line for line in text.splitlines() if line.startswith(f"passerby_{name} ")]
    return round(float(line.split()[1]))


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def serving(
    folder: Path,
    settings: Mapping[str, str] | None = None,
    *,
    within: Sequence[str] = (),
    readiness: int = 200,
) -> Iterator[Service]:
    """Run the service until the end of the block; a folder may be used again.

    Args:
        folder: Of its data, its log and its orders.
        settings: Without the prefix.
        within: What its command begins with, to run in a namespace say; it has to end in `exec`.
        readiness: What /readyz is to answer in the end.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"PORT": str(port), "DATA_DIR": str(folder / "data"), "DECODERS": "1"}
    environment = {name: one for name, one in os.environ.items() if "PASSERBY_" not in name}
    environment |= {f"PASSERBY_{name}": one for name, one in (own | dict(settings or {})).items()}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*within, sys.executable, "-c", SERVE, str(folder)],
            env=environment,
            stderr=log,
            cwd=ROOT,
        )
    service = Service(process, f"http://127.0.0.1:{port}", folder)
    try:
        assert eventually(lambda: service.readiness() == readiness, START_S), service.log()
        yield service
    finally:
        process.kill()
        process.wait()
