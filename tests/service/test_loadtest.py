"""Load at a given rate: what is sent and when, what is counted, and what is refused."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from service.client import ClientError, LocalTracklet
from service.loadtest import check_service, check_upload
from service.loadtest_picture import draw_latency
from service.loadtest_report import Summary, beware, summarise, write_results
from service.loadtest_sending import (
    LoadPlan,
    Run,
    Sample,
    Sender,
    draw_arrivals,
    encode_body,
)
from tests.service.making import GREEN, RED, picture, video

BODY = encode_body(LocalTracklet("frames", (("a.jpg", picture(RED)),)))
Handler = Callable[[httpx.Request], Coroutine[None, None, httpx.Response]]


def offer(
    handler: Handler,
    *,
    stop: asyncio.Event | None = None,
    watch: Callable[[Run], None] = lambda _: None,
    rate: float = 40,
    duration_s: float = 0.2,
    max_open: int = 512,
) -> Run:
    """One run against a server that is a function."""
    plan = LoadPlan(duration_s=duration_s, warmup_s=0, max_open=max_open, timeout_s=30)

    async def run() -> Run:
        transport = httpx.MockTransport(handler)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            sender = Sender(client, [BODY], plan, stop or asyncio.Event())
            return await sender.offer(rate, watch)

    return asyncio.run(run())


async def answer_at_once(_: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"timing_ms": {"decode": 1.5, "total": 2}})


def test_the_service_reads_an_encoded_body_as_the_files_it_was_made_of(client: TestClient) -> None:
    files = (("2.jpg", picture(RED)), ("10.jpg", picture(GREEN)))
    body = encode_body(LocalTracklet("frames", files))

    sent = client.post("/embed", content=body.content, headers={"Content-Type": body.content_type})
    usual = client.post("/embed", files=[("frames", one) for one in files])

    assert sent.status_code == 200
    assert sent.json()["frames"] == {"received": 2, "used": 2}
    assert sent.json()["embedding"] == usual.json()["embedding"]


def test_the_service_reads_an_encoded_video(client: TestClient) -> None:
    body = encode_body(LocalTracklet("video", (("tracklet.mp4", video()),)))

    sent = client.post("/embed", content=body.content, headers={"Content-Type": body.content_type})

    assert sent.json()["frames"]["received"] == 30


def test_an_encoded_body_does_not_say_what_its_files_are_called() -> None:
    """A file's name may be somebody's."""
    body = encode_body(LocalTracklet("frames", (("somebody.jpg", picture(RED)),)))

    assert b"somebody" not in body.content


def test_arrivals_are_as_many_as_the_rate_says_in_either_part() -> None:
    times = draw_arrivals(7, warmup_s=2, duration_s=10, seed=3)

    assert times == sorted(times)
    assert sum(one < 2 for one in times) == 14
    assert sum(2 <= one < 12 for one in times) == 70
    assert len(times) == 84


def test_arrivals_depend_on_their_seed_alone() -> None:
    assert draw_arrivals(5, 1, 10, seed=0) == draw_arrivals(5, 1, 10, seed=0)
    assert draw_arrivals(5, 1, 10, seed=0) != draw_arrivals(5, 1, 10, seed=1)


def test_arrivals_are_not_evenly_spaced() -> None:
    """As many arrive in a second as a Poisson process brings: the variance is the mean."""
    times = draw_arrivals(10, 0, 1000, seed=0)
    counts = np.bincount(np.array(times, dtype=np.int64), minlength=1000)

    assert counts.mean() == 10
    assert counts.var() == pytest.approx(10, rel=0.15)


def test_requests_are_sent_though_none_has_been_answered() -> None:
    """Nobody gets an answer before the last request has arrived."""
    arrived = 0
    all_there = asyncio.Event()

    async def answer_when_all_are_there(_: httpx.Request) -> httpx.Response:
        nonlocal arrived
        arrived += 1
        if arrived == 8:
            all_there.set()
        await all_there.wait()
        return httpx.Response(200, json={})

    run = offer(answer_when_all_are_there)

    assert [one.status for one in run.samples] == [200] * 8


def test_latency_counts_from_when_a_request_was_due() -> None:
    """A stall makes late what is due meanwhile, and that is part of its latency."""

    async def stall_everybody(_: httpx.Request) -> httpx.Response:
        time.sleep(0.1)
        return httpx.Response(200, json={})

    run = offer(stall_everybody)

    assert max(one.lag_s for one in run.samples) > 0.1
    assert all(one.latency_s >= one.lag_s + 0.1 for one in run.samples)


def test_what_would_be_too_many_open_is_not_sent_and_counted() -> None:
    released = asyncio.Event()

    async def hold(_: httpx.Request) -> httpx.Response:
        await released.wait()
        return httpx.Response(200, json={})

    def release(run: Run) -> None:
        if len(run.samples) == 5:
            released.set()

    run = offer(hold, watch=release, max_open=3)

    summary = summarise(run)
    assert (summary.sent, summary.answered, summary.not_sent) == (3, 3, 5)
    assert any("5 requests were not sent" in line for line in beware(summary))


def test_stopping_cuts_off_what_is_open_and_sends_no_more() -> None:
    stop = asyncio.Event()
    arrived = 0

    async def hold(_: httpx.Request) -> httpx.Response:
        nonlocal arrived
        arrived += 1
        if arrived == 3:
            stop.set()
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    run = offer(hold, stop=stop, duration_s=1000)

    assert run.stopped
    assert arrived == 3
    assert [one.outcome for one in run.samples] == ["cut off"] * 3
    assert summarise(run).cut_off == 3


def test_a_failed_connection_is_counted_by_its_kind() -> None:
    async def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no", request=request)

    summary = summarise(offer(refuse))

    assert summary.other == {"ConnectError": 8}
    assert summary.latency_ms == {}


def test_what_the_answers_say_of_themselves_is_kept() -> None:
    summary = summarise(offer(answer_at_once))

    assert summary.timing_ms["decode"] == 1.5
    assert summary.timing_ms["total"] == 2
    assert summary.timing_ms["rest"] == pytest.approx(summary.latency_ms["p50"] - 2, abs=50)


def answered(due_s: float, latency_s: float, status: int = 200) -> Sample:
    return Sample(due_s, "answered", 0.001, latency_s, status)


def some_run(stopped: bool = False) -> Run:
    """Latencies of 1 to 200 ms in the counted part, 9 s each in the warm-up, some refusals."""
    counted = [answered(5 + at / 20, at / 1000) for at in range(1, 201)]
    warm_up = [answered(at, 9.0) for at in range(5)]
    refused = [answered(7, 0.001, 429)] * 3 + [answered(8, 0.001, 503)]
    run = Run(20, 5, 10, [*warm_up, *counted, *refused], stopped=stopped)
    run.elapsed_s = 15.2
    return run


def test_percentiles_are_of_what_was_answered_with_200_after_the_warm_up() -> None:
    summary = summarise(some_run())

    assert summary.latency_ms == pytest.approx({"p50": 100, "p90": 180, "p99": 198, "max": 200})


def test_refusals_and_failures_are_counted_apart() -> None:
    summary = summarise(some_run())

    assert (summary.sent, summary.answered, summary.refused) == (204, 200, 3)
    assert summary.other == {"503": 1}


def test_the_achieved_rate_ends_with_the_last_answer() -> None:
    """The last of 200 was due at 15 s and answered 0.2 s later: 10.2 s after the warm-up."""
    assert summarise(some_run()).achieved == pytest.approx(200 / 10.2)


def test_a_run_that_was_stopped_counts_until_it_was() -> None:
    run = Run(1, 0, 100, [answered(1, 0.5), answered(3, 0.5)], stopped=True)
    run.elapsed_s = 8

    assert summarise(run).achieved == pytest.approx(2 / 8)


@pytest.mark.parametrize(
    ("lag_ms", "told"),
    [(5.0, False), (9.0, False), (30.0, True)],
)
def test_a_sender_that_was_late_says_so(lag_ms: float, told: bool) -> None:
    summary = Summary(
        rate=5,
        sent=200,
        answered=200,
        refused=0,
        other={},
        not_sent=0,
        cut_off=0,
        achieved=5,
        latency_ms={"p50": 100, "p90": 100, "p99": 100, "max": 100},
        timing_ms={},
        lag_ms={"p50": 1, "p99": lag_ms, "max": lag_ms},
    )

    assert any("late" in line for line in beware(summary)) is told


def test_results_hold_every_request_in_the_order_in_which_they_were_due(tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    write_results(path, {"server": "http://service"}, [some_run()])

    written = json.loads(path.read_text())
    [run] = written["runs"]
    assert written["server"] == "http://service"
    assert len(run["samples"]) == 209
    assert [one["due_s"] for one in run["samples"]] == sorted(o["due_s"] for o in run["samples"])


@pytest.mark.parametrize("runs", [1, 3])
def test_a_picture_is_drawn_of_one_rate_and_of_several(tmp_path: Path, runs: int) -> None:
    path = tmp_path / "latency.png"

    draw_latency([some_run()] * runs, path)

    with Image.open(path) as drawn:
        assert drawn.size[0] > 1000


def test_a_picture_of_a_run_without_answers_is_drawn_too(tmp_path: Path) -> None:
    draw_latency([Run(5, 1, 10, [Sample(1, "not sent")])], tmp_path / "one.png")
    draw_latency([Run(5, 1, 10, []), Run(9, 1, 10, [])], tmp_path / "two.svg")

    assert (tmp_path / "one.png").exists()
    assert (tmp_path / "two.svg").exists()


READY = {"/readyz": httpx.Response(200), "/query": httpx.Response(200)}
INFO = {"/info": httpx.Response(200, json={"gallery": {"tracklets": 10}, "model": {}})}


def problem(status: int, detail: str) -> httpx.Response:
    return httpx.Response(status, json={"detail": detail})


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"/info": problem(401, "expected a known key")}, "401.*expected a known key.*--key-file"),
        ({"/readyz": problem(503, "worker: warming up")}, "/readyz answered 503: worker: warming"),
        ({"/readyz": httpx.Response(200, text="hi"), "/info": httpx.Response(404)}, "Passerby?"),
        ({"/info": httpx.Response(200, text="<html>")}, "expected Passerby at http://service"),
        ({"/info": httpx.Response(200, json=[1])}, "expected Passerby at http://service"),
        ({"/query": problem(422, "frame 3 is cut off")}, "/query answered 422: frame 3"),
    ],
)
def test_a_service_that_cannot_be_measured_is_a_clear_error(
    answers: dict[str, httpx.Response], expected: str
) -> None:
    with pytest.raises(ClientError, match=expected):
        check(READY | INFO | answers)


def test_a_gallery_that_is_too_small_is_refused() -> None:
    with pytest.raises(ClientError, match="at least 1000 tracklets stored, got 10"):
        check(READY | INFO, least_gallery=1000)


def test_a_service_that_is_busy_already_may_be_measured() -> None:
    check(READY | INFO | {"/query": httpx.Response(429)})


def check(answers: dict[str, httpx.Response], least_gallery: int = 0) -> None:
    async def handle(request: httpx.Request) -> httpx.Response:
        return answers[request.url.path]

    async def run() -> None:
        transport = httpx.MockTransport(handle)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            await check_service(client, least_gallery)
            await check_upload(client, LoadPlan(), BODY)

    asyncio.run(run())
