"""The end of the service: what was accepted is finished, what comes is refused, the status is 0."""

import signal
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.service.making import GOOD
from tests.service.processes import WAIT_S, Service, eventually, serving

pytestmark = pytest.mark.slow


def post(service: Service, path: str = "/gallery") -> httpx.Response:
    return httpx.post(service.address + path, files=GOOD, timeout=WAIT_S)


def occupy(service: Service, pool: ThreadPoolExecutor) -> "Future[httpx.Response]":
    """An enrolment in the embedder's hands."""
    service.hold()
    enrolling = pool.submit(post, service)
    assert eventually(service.entered)
    return enrolling


def test_what_was_accepted_is_answered_and_what_comes_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path) as service, ThreadPoolExecutor(2) as pool:
        enrolling = occupy(service, pool)
        waiting = pool.submit(post, service, "/query")
        counted = httpx.get(f"{service.address}/metrics")
        assert eventually(lambda: "queue_tracklets 1.0" in _metrics(service)), counted.text

        service.send()
        assert eventually(lambda: service.readiness() == 503)
        refused = post(service)
        probe = httpx.get(f"{service.address}/readyz").json()
        service.let_go()

        assert enrolling.result(WAIT_S).status_code == 201
        assert waiting.result(WAIT_S).status_code == 200
        assert service.process.wait(WAIT_S) == 0
    assert refused.status_code == 503
    assert refused.json()["type"] == "/problems/not-ready"
    assert refused.headers["retry-after"].isdigit()
    assert "service: the service is stopping" in probe["detail"]
    assert "Traceback" not in service.log()


def _metrics(service: Service) -> str:
    return httpx.get(f"{service.address}/metrics").text


def test_what_was_acknowledged_at_the_end_is_there_afterwards(tmp_path: Path) -> None:
    with serving(tmp_path) as service, ThreadPoolExecutor(1) as pool:
        enrolling = occupy(service, pool)
        service.send()
        service.let_go()
        record = enrolling.result(WAIT_S).json()
        assert service.process.wait(WAIT_S) == 0

    with serving(tmp_path) as service:
        stored = httpx.get(f"{service.address}/gallery/{record['tracklet_id']}")

    assert stored.json() == record


def test_a_service_without_work_ends_at_the_first_signal(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        service.send(signal.SIGINT)

        assert service.process.wait(10) == 0
    assert "stopped" in service.log()


def test_after_the_grace_who_waits_hears_that_nothing_comes(tmp_path: Path) -> None:
    settings = {"SHUTDOWN_GRACE_S": "0.5"}
    with serving(tmp_path, settings) as service, ThreadPoolExecutor(1) as pool:
        enrolling = occupy(service, pool)
        service.send()

        answer = enrolling.result(WAIT_S)

        assert answer.status_code == 503
        assert answer.json()["type"] == "/problems/worker-unavailable"
        assert service.process.wait(WAIT_S) == 0
    assert "the grace is over" in service.log()


@pytest.mark.parametrize(("stage", "path"), [("search", "/query"), ("store", "/gallery")])
def test_what_outlives_the_grace_hears_that_the_service_stops(
    tmp_path: Path, stage: str, path: str
) -> None:
    with (
        serving(tmp_path, {"SHUTDOWN_GRACE_S": "0.5"}) as service,
        ThreadPoolExecutor(1) as pool,
    ):
        service.hold(stage)
        asking = pool.submit(post, service, path)
        assert eventually(service.entered)
        service.send()

        answer = asking.result(WAIT_S)

        assert answer.status_code == 503
        assert answer.json()["type"] == "/problems/not-ready"
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
        assert answer.headers["retry-after"].isdigit()
        assert service.process.wait(WAIT_S) == 0
    assert "cut off by the end of the service" in service.log()
    assert "Traceback" not in service.log()


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with serving(tmp_path) as service, ThreadPoolExecutor(1) as pool:
        enrolling = occupy(service, pool)
        service.send()
        assert eventually(lambda: service.readiness() == 503)
        service.send()

        assert service.process.wait(5) == 128 + signal.SIGTERM
        assert isinstance(enrolling.exception(WAIT_S), httpx.TransportError)
    assert "ending at once" in service.log()


def test_a_write_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    with serving(tmp_path, {"SHUTDOWN_GRACE_S": "0.5"}) as service, ThreadPoolExecutor(1) as pool:
        service.hold("commit")
        pool.submit(post, service)
        assert eventually(service.entered)
        service.send()

        assert service.process.wait(WAIT_S) == 0
    assert "although something does not end" in service.log()
