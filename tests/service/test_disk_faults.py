"""A disk that is full, refuses or is slow, and a kill, under a real service with traffic.

Whatever happens, what was acknowledged is there afterwards, and nothing else.
"""

import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.making import BLUE, GOOD, GREEN, RED, as_frames, clip_of, encode, noise
from tests.service.processes import (
    ROOT,
    WAIT_S,
    Service,
    eventually,
    gauge,
    is_running,
    serving,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's mounts, limits and /proc"),
]
CLIENTS = 3
MOST = 300  # enrolments of each, far more than the small disk holds
FULL = "store: cannot write the gallery: the disk is full"
# What the store does by itself: where the audit trail cannot be written either, and has no room
# left that was kept for it, nothing is answered at all (tests of the trail).
UNAUDITED = {"AUDIT__ENABLED": "false"}
UPLOAD = as_frames(encode(noise(seed), "JPEG") for seed in range(4))


def post(service: Service, path: str = "/gallery", files: Any = UPLOAD) -> httpx.Response:
    return httpx.post(service.address + path, files=files, timeout=WAIT_S)


def listed(service: Service) -> list[dict[str, Any]]:
    """All records that a client can see, which a search must find, too."""
    items = httpx.get(f"{service.address}/gallery?limit=1000").raise_for_status().json()["items"]
    found: list[dict[str, Any]] = items
    answer = post(service, "/query?group_by=tracklet&top_k=500").json()
    assert answer["searched"] == len(found)
    assert len(answer["matches"]) == min(len(found), 500)
    return found


def same(records: list[dict[str, Any]], others: list[dict[str, Any]]) -> bool:
    """Whether they are the same ones, in whatever order they were acknowledged."""
    one, other = (sorted(all_, key=lambda one: one["tracklet_id"]) for all_ in (records, others))
    return one == other


def unready(service: Service) -> str:
    """What /readyz complains of; empty where it does not."""
    answer = httpx.get(f"{service.address}/readyz", timeout=WAIT_S)
    return "" if answer.is_success else str(answer.json()["detail"])


def enrol_until_refused(service: Service) -> tuple[list[dict[str, Any]], httpx.Response]:
    """One client's traffic: what was acknowledged, and the refusal."""
    acknowledged: list[dict[str, Any]] = []
    for _ in range(MOST):
        answer = post(service)
        if answer.status_code != 201:
            return acknowledged, answer
        acknowledged.append(answer.json())
    raise AssertionError(f"expected a refusal within {MOST} enrolments, got none")


def enrol_together(service: Service) -> tuple[list[dict[str, Any]], list[httpx.Response]]:
    """The traffic of several clients, until each has been refused."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        ends = list(pool.map(enrol_until_refused, [service] * CLIENTS))
    return [record for records, _ in ends for record in records], [answer for _, answer in ends]


def assert_problems(answers: list[httpx.Response], status: int, slug: str, folder: Path) -> None:
    for answer in answers:
        assert (answer.status_code, answer.json()["type"]) == (status, f"/problems/{slug}")
        assert str(folder) not in answer.text


class Disk:
    """A disk of the service's own, in a mount namespace that goes with the block.

    Args:
        folder: Of the service; its data are on the disk.
        how: Arguments of mount.
        with_root: Whether the kernel lets only root mount it, and no user namespace.
    """

    def __init__(self, folder: Path, *how: str, with_root: bool = False) -> None:
        self._data = folder / "data"
        self._how = how
        self._apart = [] if with_root else ["--user", "--map-root-user"]
        self._data.mkdir()

    def __enter__(self) -> "Disk":
        script = 'mount "$@" && echo mounted && exec cat'
        unshare = ["unshare", *self._apart, "--mount"]
        command = [*unshare, "sh", "-c", script, "sh", *self._how, str(self._data)]
        try:
            self._holder = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except FileNotFoundError:
            pytest.skip("needs unshare")
        assert self._holder.stdout
        if self._holder.stdout.readline() != b"mounted\n":
            self._end()
            pytest.skip(f"needs the right to mount {self._how[1]} in a namespace of its own")
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        self._holder.communicate()

    @property
    def within(self) -> list[str]:
        """What a command begins with to see it."""
        user = ["--user", "--preserve-credentials"] if self._apart else []
        enter = ["nsenter", "--target", str(self._holder.pid), *user, "--mount"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(ROOT)]

    def run(self, *command: str) -> None:
        """Run a command there that is told the mount point last."""
        subprocess.run([*self.within, *command, str(self._data)], check=True, capture_output=True)


def test_a_full_disk_refuses_enrolments_alone_until_there_is_room_again(tmp_path: Path) -> None:
    """By 507 and by the probe; nothing is half stored, queries are answered, a kill is survived."""
    with Disk(tmp_path, "-t", "tmpfs", "-o", "size=2m", "tmpfs") as disk:
        with serving(tmp_path, within=disk.within) as service:
            acknowledged, refused = enrol_together(service)
            assert_problems(refused, 507, "storage-full", tmp_path)
            assert eventually(lambda: unready(service) == FULL)
            assert same(listed(service), acknowledged)

        with serving(tmp_path, within=disk.within, readiness=503) as service:
            assert eventually(lambda: unready(service) == FULL)
            assert_problems([post(service)], 507, "storage-full", tmp_path)
            assert same(listed(service), acknowledged)
            disk.run("mount", "-o", "remount,size=64m")
            assert eventually(lambda: not unready(service))
            acknowledged.append(post(service).raise_for_status().json())

        with serving(tmp_path, within=disk.within) as service:
            assert same(listed(service), acknowledged)


def refuse_writes(service: Service, refuse: bool) -> None:
    """Have the kernel fail whatever the running service writes to a file, or no more."""
    _, most = resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE)
    limits = (0 if refuse else most, most)
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_refuses_writes_refuses_enrolments_alone_until_it_takes_them_again(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, UNAUDITED) as service:
        acknowledged = [post(service).json()]
        refuse_writes(service, refuse=True)
        more, refused = enrol_together(service)
        assert not more
        assert_problems(refused, 503, "gallery-unavailable", tmp_path)
        assert eventually(lambda: "store: the gallery's directory cannot" in unready(service))
        assert listed(service) == acknowledged

        refuse_writes(service, refuse=False)
        assert eventually(lambda: not unready(service))
        acknowledged.append(post(service).raise_for_status().json())

    with serving(tmp_path) as service:
        assert listed(service) == acknowledged


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file system of which the kernel can make a disk."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(32 << 20)
    try:
        subprocess.run(["mkfs.ext4", "-q", path], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs mkfs.ext4")
    return path


def test_a_disk_that_turns_read_only_is_told_and_read_until_the_end(
    tmp_path: Path, image: Path
) -> None:
    """As Linux does with a broken one, under open files; mounted again, it has everything."""
    how = ("-t", "ext4", "-o", "loop", str(image))
    with Disk(tmp_path, *how, with_root=True) as disk:
        with serving(tmp_path, UNAUDITED, within=disk.within) as service:
            acknowledged = [post(service).json(), post(service).json()]
            disk.run("mount", "-o", "remount,abort")
            more, refused = enrol_together(service)
            assert not more
            assert_problems(refused, 503, "gallery-unavailable", tmp_path)
            assert eventually(lambda: "Read-only file system" in unready(service))
            assert str(tmp_path) not in unready(service)
            assert same(listed(service), acknowledged)

        disk.run("umount")
        disk.run("mount", *how)
        with serving(tmp_path, within=disk.within) as service:
            acknowledged.append(post(service).raise_for_status().json())
            assert same(listed(service), acknowledged)


def test_a_slow_disk_holds_up_enrolments_and_nothing_else(tmp_path: Path) -> None:
    with serving(tmp_path) as service, ThreadPoolExecutor(CLIENTS) as pool:
        first = post(service).json()
        service.hold("commit")
        enrolling = [pool.submit(post, service) for _ in range(CLIENTS)]
        assert eventually(service.entered)

        [match] = post(service, "/query").json()["matches"]
        assert match["tracklet"] == first
        assert listed(service) == [first]
        assert not unready(service)
        assert not any(one.done() for one in enrolling)
        service.let_go()
        acknowledged = [one.result(WAIT_S).raise_for_status().json() for one in enrolling]

    with serving(tmp_path) as service:
        assert same(listed(service), [first, *acknowledged])


def half_send(service: Service) -> socket.socket:
    """Begin an upload."""
    request = httpx.Request("POST", f"{service.address}/gallery", files=GOOD)
    body = request.read()
    host, _, port = service.address.removeprefix("http://").partition(":")
    client = socket.create_connection((host, int(port)), timeout=WAIT_S)
    lines = [b"POST /gallery HTTP/1.1", *(b": ".join(one) for one in request.headers.raw)]
    client.sendall(b"\r\n".join([*lines, b"", body[: len(body) // 2]]))
    return client


@pytest.fixture
def half_sent() -> Iterator[ExitStack]:
    """Connections that are closed at the end."""
    with ExitStack() as connections:
        yield connections


def test_after_a_kill_among_half_sent_uploads_and_a_queue_it_is_ready_again_and_correct(
    tmp_path: Path, half_sent: ExitStack
) -> None:
    with serving(tmp_path) as service, ThreadPoolExecutor(1 + CLIENTS) as pool:
        acknowledged = [post(service, files=clip_of(one)).json() for one in (RED, GREEN, BLUE)]
        service.hold("embed")
        enrolling = [pool.submit(post, service)]
        assert eventually(service.entered)
        enrolling += [pool.submit(post, service) for _ in range(CLIENTS)]
        assert eventually(lambda: gauge(service, "queue_tracklets") == CLIENTS)
        for _ in range(CLIENTS):
            half_sent.enter_context(half_send(service))
        assert eventually(lambda: gauge(service, "requests_in_flight") == 2 * CLIENTS + 2)
        children = service.children()
        service.send(signal.SIGKILL)
        assert all(isinstance(one.exception(WAIT_S), httpx.TransportError) for one in enrolling)
        assert children
        assert eventually(lambda: not any(map(is_running, children)))
        service.let_go()

    with serving(tmp_path) as service:
        assert listed(service) == acknowledged
        assert gauge(service, "queue_tracklets") == 0
        assert post(service).status_code == 201
