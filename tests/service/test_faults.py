"""Ends and hang-ups in each stage of a request, in a real process: nothing is lost or left over."""

import os
import signal
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.service.making import BLUE, GOOD, clip_of
from tests.service.processes import STAGES, WAIT_S, Service, eventually, gauge, is_running, serving

pytestmark = pytest.mark.slow
PATHS = {"decode": "/gallery", "embed": "/gallery", "search": "/query", "store": "/gallery"}


def post(service: Service, path: str = "/gallery", files: object = GOOD) -> httpx.Response:
    return httpx.post(service.address + path, files=files, timeout=WAIT_S)  # type: ignore[arg-type]


def hold_one(service: Service, pool: ThreadPoolExecutor, stage: str) -> "Future[httpx.Response]":
    """A request that waits in a stage."""
    service.hold(stage)
    waiting = pool.submit(post, service, PATHS[stage])
    assert eventually(service.entered)
    return waiting


def stored(service: Service) -> int:
    count = httpx.get(f"{service.address}/info").json()["gallery"]["tracklets"]
    return int(count)


@pytest.mark.parametrize("stage", STAGES)
def test_after_a_kill_in_any_stage_it_is_ready_again_and_correct(
    tmp_path: Path, stage: str
) -> None:
    """What was acknowledged is found; what was under way is not; no decoder outlives its parent."""
    with serving(tmp_path) as service, ThreadPoolExecutor(1) as pool:
        acknowledged = post(service, files=clip_of(BLUE, BLUE)).json()
        children = service.children()
        waiting = hold_one(service, pool, stage)
        service.send(signal.SIGKILL)
        service.process.wait(WAIT_S)
        assert isinstance(waiting.exception(WAIT_S), httpx.TransportError)
        assert children
        assert eventually(lambda: not any(map(is_running, children)))
        service.let_go()

    with serving(tmp_path) as service:
        assert stored(service) == 1
        [match] = post(service, "/query", clip_of(BLUE, BLUE)).json()["matches"]
    assert match["tracklet"] == acknowledged
    assert match["distance"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_sigterm_in_any_stage_lets_it_finish(tmp_path: Path, stage: str) -> None:
    with serving(tmp_path) as service, ThreadPoolExecutor(1) as pool:
        waiting = hold_one(service, pool, stage)
        children = service.children()
        service.send()
        assert eventually(lambda: service.readiness() == 503)
        service.let_go()

        assert waiting.result(WAIT_S).is_success
        assert service.process.wait(WAIT_S) == 0
        assert eventually(lambda: not any(map(is_running, children)))

    with serving(tmp_path) as service:
        assert stored(service) == (0 if stage == "search" else 1)


def test_a_sigterm_in_mid_upload_lets_it_finish(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        request = httpx.Request("POST", f"{service.address}/gallery", files=GOOD)
        body = request.read()
        with connect(service) as client:
            client.sendall(head(request) + body[:100])
            assert eventually(lambda: in_flight(service) == 2)  # it, and who asks
            service.send()
            assert eventually(lambda: service.readiness() == 503)
            client.sendall(body[100:])
            answer = client.recv(100)

        assert answer.startswith(b"HTTP/1.1 201")
        assert service.process.wait(WAIT_S) == 0


def connect(service: Service) -> socket.socket:
    host, _, port = service.address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


def head(request: httpx.Request) -> bytes:
    lines = [b"POST %b HTTP/1.1" % request.url.raw_path]
    return b"\r\n".join([*lines, *(b": ".join(one) for one in request.headers.raw), b"", b""])


def in_flight(service: Service) -> int:
    return gauge(service, "requests_in_flight")


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_hangs_up_in_any_stage_leaves_nothing(tmp_path: Path, stage: str) -> None:
    """No request, no place in the queue, no socket; the service goes on."""
    with serving(tmp_path) as service:
        post(service, "/query")
        before = service.count_descriptors()
        service.hold(stage)
        request = httpx.Request("POST", service.address + PATHS[stage], files=GOOD)
        with connect(service) as client:
            client.sendall(head(request) + request.read())
            assert eventually(service.entered)
        if stage in ("decode", "embed"):  # the store finishes what it has begun
            assert eventually(lambda: in_flight(service) == 1)
        service.let_go()

        assert eventually(lambda: in_flight(service) == 1)
        assert gauge(service, "queue_tracklets") == 0
        assert post(service, "/query").status_code == 200
        # A reader of the store, which is kept, may have come.
        assert eventually(lambda: service.count_descriptors() <= before + 2)


def test_a_client_that_hangs_up_in_the_queue_leaves_it(tmp_path: Path) -> None:
    with serving(tmp_path) as service, ThreadPoolExecutor(1) as pool:
        waiting = hold_one(service, pool, "embed")
        request = httpx.Request("POST", f"{service.address}/query", files=GOOD)
        with connect(service) as client:
            client.sendall(head(request) + request.read())
            assert eventually(lambda: gauge(service, "queue_tracklets") == 1)
        left = eventually(lambda: gauge(service, "queue_tracklets") == 0, 5)
        service.let_go()

        assert left
        assert waiting.result(WAIT_S).is_success


def test_a_store_that_does_not_answer_is_named_and_comes_back(tmp_path: Path) -> None:
    """A probe that would hang with the disk would tell nothing."""
    with serving(tmp_path) as service:
        service.hold("check")
        answer = httpx.get(f"{service.address}/readyz", timeout=WAIT_S)
        again = httpx.get(f"{service.address}/readyz", timeout=WAIT_S)
        alive = httpx.get(f"{service.address}/livez")
        service.let_go()

        assert answer.status_code == again.status_code == 503
        assert "store: expected an answer within 3 s, got none" in answer.json()["detail"]
        assert "worker" not in answer.json()["detail"]
        assert alive.status_code == 200
        assert eventually(lambda: service.readiness() == 200)


def test_a_decoder_that_is_killed_is_replaced(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        [child] = service.children()
        os.kill(child, signal.SIGKILL)

        answer = post(service)

        assert answer.status_code == 201
        assert service.readiness() == 200
        assert service.children() != [child]
