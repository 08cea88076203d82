"""The real service, killed with SIGKILL in the middle of concurrent enrolments, twenty times."""

import io
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

ROUNDS = 20
CLIENTS = 4
START_S = 120.0


def frames_of(number: int) -> list[bytes]:
    """Two frames that no other number has."""
    rng = np.random.default_rng(number)
    files = []
    for _ in range(2):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 4, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((32, 64)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def upload(number: int) -> list[tuple[str, tuple[str, bytes]]]:
    return [("frames", (f"{i}.png", file)) for i, file in enumerate(frames_of(number))]


def start(data_dir: Path, log: Path) -> tuple["subprocess.Popen[bytes]", str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("PASSERBY_")}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "serve"],
            env={
                **environment,
                "PASSERBY_PORT": str(port),
                "PASSERBY_DATA_DIR": str(data_dir),
            },
            stderr=file,
        )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{address}/readyz").status_code == 200:
                return process, address
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"the service did not start: {log.read_text()[-2000:]}")


@contextmanager
def running(data_dir: Path, log: Path) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    process, address = start(data_dir, log)
    try:
        yield process, address
    finally:
        process.kill()
        process.wait()


class Enrolling:
    """Clients that enrol one tracklet after the other until the service is gone."""

    def __init__(self) -> None:
        self.sent: set[int] = set()
        self.acknowledged: set[int] = set()
        self._lock = threading.Lock()
        self.some_acknowledged = threading.Event()

    def until_gone(self, address: str) -> None:
        threads = [threading.Thread(target=self._client, args=[address]) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        self._threads = threads

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _client(self, address: str) -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            while True:
                with self._lock:
                    number = len(self.sent)
                    self.sent.add(number)
                try:
                    answer = client.post(
                        "/gallery",
                        files=upload(number),
                        data={"tracklet_id": f"t{number}", "identity": f"p{number % 7}"},
                    )
                except httpx.TransportError:
                    return
                if answer.status_code == 503:  # it is going down
                    return
                assert answer.status_code == 201, answer.text
                with self._lock:
                    self.acknowledged.add(number)
                self.some_acknowledged.set()


def stored(address: str) -> set[int]:
    numbers: set[int] = set()
    cursor: str | None = None
    while True:
        parameters = {"limit": "100"} | ({"cursor": cursor} if cursor else {})
        page = httpx.get(f"{address}/gallery", params=parameters).json()
        numbers |= {int(item["tracklet_id"][1:]) for item in page["items"]}
        cursor = page["next_cursor"]
        if cursor is None:
            return numbers


@pytest.mark.slow
def test_what_was_acknowledged_survives_twenty_kills(tmp_path: Path) -> None:
    """Every 201 is there and found at distance 0 by its own frames; nothing was made up."""
    draw = random.Random(0)  # noqa: S311 moments of death, not secrets
    clients = Enrolling()
    log = tmp_path / "log"
    for _ in range(ROUNDS):
        with running(tmp_path / "data", log) as (process, address):
            clients.some_acknowledged.clear()
            clients.until_gone(address)
            assert clients.some_acknowledged.wait(60)
            time.sleep(draw.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            clients.join()

    with running(tmp_path / "data", log) as (process, address):
        numbers = stored(address)
        assert clients.acknowledged <= numbers <= clients.sent
        assert len(numbers) - len(clients.acknowledged) <= ROUNDS * CLIENTS
        assert httpx.get(f"{address}/info").json()["gallery"]["tracklets"] == len(numbers)
        for number in sorted(numbers):
            answer = httpx.post(
                f"{address}/query?group_by=tracklet&top_k=1", files=upload(number), timeout=60
            ).json()
            [match] = answer["matches"]
            assert match["tracklet"]["tracklet_id"] == f"t{number}"
            assert match["distance"] <= 1e-3
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
