"""Load at a given rate, sent whether or not earlier requests have been answered.

A client that waits for an answer before it asks again slows down with the server it measures, and
never sees how long others would have waited (coordinated omission). Here every request has a time,
drawn beforehand; it is sent then, and its latency counts from then.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

import httpx
import numpy as np

from service.client import LocalTracklet

Outcome = Literal["answered", "failed", "not sent", "cut off"]
_WATCH_S = 0.25
STAGES = ("decode", "queue", "embed", "search", "total")


@dataclass(frozen=True, slots=True)
class Body:
    """A tracklet as a multipart body, made once and sent many times.

    Args:
        content_type: With the boundary.
        content: All of it.
        frames: Files in it.
    """

    content_type: str
    content: bytes
    frames: int


def encode_body(tracklet: LocalTracklet) -> Body:
    """Encode a tracklet; its files' names stay here, because they may say who it shows."""
    digest = hashlib.sha256()
    for _, content in tracklet.files:
        digest.update(content)
    boundary = f"passerby-{digest.hexdigest()}"  # no file contains its own digest
    pieces = []
    for position, (_, content) in enumerate(tracklet.files):
        disposition = f'form-data; name="{tracklet.kind}"; filename="{position}"'
        head = f"--{boundary}\r\nContent-Disposition: {disposition}\r\n\r\n"
        pieces += [head.encode(), content, b"\r\n"]
    pieces.append(f"--{boundary}--\r\n".encode())
    content_type = f"multipart/form-data; boundary={boundary}"
    return Body(content_type, b"".join(pieces), len(tracklet.files))


def draw_arrivals(rate: float, warmup_s: float, duration_s: float, seed: int) -> list[float]:
    """Draw when requests are due: as of many clients who know nothing of each other.

    A Poisson process, given how many requests it brings: so the rate is the one asked for, however
    short the run.

    Args:
        rate: Requests a second, positive.
        warmup_s: Seconds at the beginning; may be 0.
        duration_s: Seconds after them; either part gets its share of requests.
        seed: Equal ones give equal times.

    Returns:
        Seconds from the beginning, ascending.
    """
    rng = np.random.default_rng(seed)
    times: list[float] = []
    for begin, length in ((0.0, warmup_s), (warmup_s, duration_s)):
        count = round(rate * length)
        times += sorted((begin + rng.uniform(0, length, count)).tolist())
    return times


@dataclass(frozen=True, slots=True)
class Sample:
    """One request.

    Args:
        due_s: When it was to be sent, seconds from the beginning.
        outcome: "answered", whatever the status; "failed" where no answer came; "not sent" where
            too many were open; "cut off" where the run was ended before its answer.
        lag_s: How much later than ``due_s`` it was sent.
        latency_s: From ``due_s`` to the end of its answer.
        status: Of its answer; 0 without one.
        timing_ms: What the answer said about itself.
        failure: Why no answer came.
    """

    due_s: float
    outcome: Outcome
    lag_s: float = 0.0
    latency_s: float = 0.0
    status: int = 0
    timing_ms: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""


@dataclass(slots=True)
class Run:
    """What one rate brought, also while it goes on.

    Args:
        rate: Requests a second that were offered.
        warmup_s: Seconds at the beginning that do not count.
        duration_s: Seconds after them that do.
        samples: Of all requests that have ended, in the order of their ends.
        open: How many are under way.
        elapsed_s: Since the beginning.
        stopped: Whether it was ended early.
    """

    rate: float
    warmup_s: float
    duration_s: float
    samples: list[Sample] = field(default_factory=list)
    open: int = 0
    elapsed_s: float = 0.0
    stopped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What to send.

    Args:
        route: Path to ask.
        rates: Requests a second, one run each.
        duration_s: Of what counts of a run.
        warmup_s: Before it.
        seed: Of the arrivals.
        max_open: Requests under way at most; one that would be more is not sent, and counted.
        timeout_s: After which an answer is given up.
    """

    route: Literal["query", "embed"] = "query"
    rates: tuple[float, ...] = (5.0,)
    duration_s: float = 60.0
    warmup_s: float = 5.0
    seed: int = 0
    max_open: int = 512
    timeout_s: float = 120.0


class Sender:
    """Offers load to one server.

    Args:
        client: With the server's address and key, see `load_client`.
        bodies: Sent in turn.
        plan: What to send.
        stop: Set, ends what is going on.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        bodies: Sequence[Body],
        plan: LoadPlan,
        stop: asyncio.Event,
    ) -> None:
        self._client = client
        self._bodies = bodies
        self._plan = plan
        self._stop = stop

    async def offer(self, rate: float, watch: Callable[[Run], None] = lambda _: None) -> Run:
        """Send at one rate, then wait for what is still open.

        Args:
            rate: Requests a second.
            watch: Called now and then with the run as it is.
        """
        plan = self._plan
        run = Run(rate, plan.warmup_s, plan.duration_s)
        times = draw_arrivals(rate, plan.warmup_s, plan.duration_s, plan.seed)
        started = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(_watch(run, started, watch))
            open_tasks: set[asyncio.Task[None]] = set()
            for number, due in enumerate(times):
                if await self._stopped_before(started + due):
                    break
                if len(open_tasks) >= plan.max_open:
                    run.samples.append(Sample(due, "not sent"))
                    continue
                body = self._bodies[number % len(self._bodies)]
                task = group.create_task(self._ask(run, body, started, due))
                open_tasks.add(task)
                task.add_done_callback(open_tasks.discard)
            await self._settle(open_tasks)
            watching.cancel()
        run.elapsed_s = asyncio.get_running_loop().time() - started
        run.stopped = self._stop.is_set()
        return run

    async def _stopped_before(self, at: float) -> bool:
        """Wait until a time of the loop's clock; True where the run is ended before."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(at):
                return await self._stop.wait()
        return self._stop.is_set()

    async def _settle(self, open_tasks: set[asyncio.Task[None]]) -> None:
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            while open_tasks and not self._stop.is_set():
                waited = {stopping, *open_tasks}
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        for task in open_tasks:
            task.cancel()

    async def _ask(self, run: Run, body: Body, started: float, due: float) -> None:
        clock = asyncio.get_running_loop().time
        lag = clock() - started - due
        run.open += 1
        try:
            async with asyncio.timeout(self._plan.timeout_s):
                answer = await self._client.post(
                    f"/{self._plan.route}",
                    content=body.content,
                    headers={"Content-Type": body.content_type},
                )
        except TimeoutError:
            run.samples.append(Sample(due, "failed", lag, failure="timeout"))
        except httpx.TransportError as error:
            run.samples.append(Sample(due, "failed", lag, failure=type(error).__name__))
        except asyncio.CancelledError:
            run.samples.append(Sample(due, "cut off", lag))
            raise
        else:
            latency = clock() - started - due
            timing = _timing(answer) if answer.status_code == 200 else {}
            run.samples.append(
                Sample(due, "answered", lag, latency, answer.status_code, timing_ms=timing)
            )
        finally:
            run.open -= 1


def _timing(answer: httpx.Response) -> dict[str, float]:
    told = answer.json().get("timing_ms", {})
    return {name: float(told[name]) for name in STAGES if name in told}


async def _watch(run: Run, started: float, watch: Callable[[Run], None]) -> None:
    while True:
        run.elapsed_s = asyncio.get_running_loop().time() - started
        watch(run)
        await asyncio.sleep(_WATCH_S)


@asynccontextmanager
async def load_client(
    server: str, key: str | None, plan: LoadPlan
) -> AsyncIterator[httpx.AsyncClient]:
    """A client that keeps as many connections as a plan may have requests open."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=plan.max_open, max_keepalive_connections=plan.max_open)
    async with httpx.AsyncClient(
        base_url=server, headers=headers, limits=limits, timeout=httpx.Timeout(plan.timeout_s)
    ) as client:
        yield client
