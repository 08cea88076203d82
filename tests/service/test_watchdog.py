"""A process that can embed nothing any more: it says so, answers whoever waits, and ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.service.making import GOOD

START_S = 60.0
# The service itself, with an embedder that works until the file TRIGGER is there.
SERVE = """
import sys, time
from pathlib import Path
from service import server, worker
from service.logs import configure_logging
from service.settings import Settings

worker.STUCK_S, worker.STUCK_TIMES, worker.LOST_S, server.WATCH_S = 0.3, 0.0, 0.5, 0.05
worker.CANARY_S = worker.CANARY_FAILED_S = 0.1
embed = server.Embedder.embed
if sys.argv[1] == "takes long":
    worker.STUCK_S = worker.LOST_S = 1.0
how, trigger, LONG_S = sys.argv[1], Path(sys.argv[2]), 0.2

class Ends(BaseException):
    pass

def spoiled(self, clips, **more):
    if trigger.exists():
        if how == "hangs":
            time.sleep(600)
        if how == "takes long":
            Path(str(trigger) + ".begun").touch()
            time.sleep(LONG_S)
            return embed(self, clips, **more)
        raise Ends("no more") if how == "ends" else RuntimeError("the device is poisoned")
    return embed(self, clips, **more)

server.Embedder.embed = spoiled
settings = Settings.load()
configure_logging(settings.log_format)
server.run(settings)
"""


@contextmanager
def serving(folder: Path, how: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"PORT": str(port), "DATA_DIR": str(folder / "data"), "WEIGHTS": "untrained"}
    environment = {name: one for name, one in os.environ.items() if "PASSERBY_" not in name}
    environment |= {f"PASSERBY_{name}": value for name, value in settings.items()}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, how, str(folder / "trigger")], env=environment, stderr=log
        )
    try:
        address = f"http://127.0.0.1:{port}"
        assert eventually_ready(address), (folder / "log").read_text()
        yield process, address
    finally:
        process.kill()
        process.wait()


def eventually_ready(address: str) -> bool:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            if httpx.get(f"{address}/readyz").status_code == 200:
                return True
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("hangs", "a batch does not end"),
        ("ends", "the embedding worker has died"),
        ("fails", "no grey frame could be embedded"),
    ],
)
def test_a_process_that_can_embed_nothing_ends_with_a_reason(
    how: str, reason: str, tmp_path: Path
) -> None:
    with serving(tmp_path, how) as (process, address):
        (tmp_path / "trigger").touch()
        answer = httpx.post(f"{address}/embed", files=GOOD, timeout=30)

        assert answer.status_code == 503
        assert answer.json()["type"] == "/problems/worker-unavailable"
        assert process.wait(30) == 1
    log = (tmp_path / "log").read_text()
    assert "ending with status 1, to be started again" in log
    assert reason in log


@pytest.mark.slow
def test_a_process_that_was_paused_in_mid_batch_goes_on(tmp_path: Path) -> None:
    """For as long as it was away every batch looks stuck, until it has had time to end."""
    with serving(tmp_path, "takes long") as (process, address), ThreadPoolExecutor(1) as sending:
        begun = tmp_path / "trigger.begun"
        (tmp_path / "trigger").touch()
        for _ in range(3):
            begun.unlink(missing_ok=True)
            asked = sending.submit(httpx.post, f"{address}/embed", files=GOOD, timeout=30)
            while not begun.exists():
                time.sleep(0.001)
            process.send_signal(signal.SIGSTOP)
            time.sleep(2.5)  # more than makes a batch stuck and a process lost
            process.send_signal(signal.SIGCONT)

            # Whether it looked stuck first or had ended first is chance.
            assert asked.result().status_code in (200, 503)
            assert eventually_ready(address)
        assert process.poll() is None
        assert httpx.post(f"{address}/embed", files=GOOD, timeout=30).status_code == 200
