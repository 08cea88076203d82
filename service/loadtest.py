"""`passerby bench`: how long a running service takes to answer at a given rate of requests."""

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from model.cli import draw_to
from model.datasets.folder import is_image, read_folder
from model.datasets.synthetic import SyntheticSet
from service.client import ClientError, LocalTracklet, read_local
from service.enrolment import plan_folder
from service.loadtest_picture import draw_latency
from service.loadtest_report import (
    beware,
    latency_table,
    summarise,
    timing_table,
    write_results,
)
from service.loadtest_sending import Body, LoadPlan, Run, Sender, encode_body, load_client

DRAWN_PEOPLE = 8  # seen by two cameras each
RESULTS, PICTURE = "results.json", "latency.png"


def run_loadtest(
    server: str,
    path: Path | None,
    plan: LoadPlan,
    *,
    output: Path,
    console: Console,
    key: str | None = None,
    most_tracklets: int = 64,
    least_gallery: int = 0,
) -> bool:
    """Measure a running service, print what was found, and write it down.

    Ctrl-C ends the measuring; what there is until then is reported.

    Args:
        server: Its address.
        path: One tracklet, or a folder of many; drawn ones where None.
        plan: What to send.
        output: Folder for ``results.json`` and ``latency.png``; made if missing.
        console: Where to print.
        key: Sent as a bearer token.
        most_tracklets: How many of a folder are taken, at random.
        least_gallery: How many tracklets the gallery must hold.

    Returns:
        Whether it was measured to the end.

    Raises:
        ClientError: The service cannot be reached, refuses, or holds fewer tracklets; or a file
            cannot be read or written; or no request at all was answered with 200.
        DatasetError: The folder holds no tracklets.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClientError(f"could not make the folder {output}: {error.strerror}") from error
    info = asyncio.run(_ask_first(server, key, plan, least_gallery))
    tracklets = read_tracklets(path, most_tracklets, plan.seed, console)
    bodies = [encode_body(one) for one in tracklets]
    about = _describe(server, info, plan, bodies)
    _introduce(about, console)
    runs = asyncio.run(_measure(server, key, bodies, plan, console))
    summaries = [summarise(run) for run in runs]
    write_results(output / RESULTS, about, runs)
    console.print(latency_table(summaries))
    console.print(timing_table(summaries))
    for line in (line for one in summaries for line in beware(one)):
        console.print(f"[yellow]beware:[/] {line}", highlight=False, soft_wrap=True)
    draw_latency(runs, output / PICTURE)
    console.print(f"written: {output / RESULTS}, {output / PICTURE}", soft_wrap=True)
    stopped = any(run.stopped for run in runs)
    if not stopped and not any(one.answered for one in summaries):
        raise ClientError("expected answers with 200, got none")
    return not stopped


def read_tracklets(
    path: Path | None, most: int, seed: int, console: Console
) -> list[LocalTracklet]:
    """Read one tracklet, or some of a folder of many, or draw some.

    Raises:
        ClientError: A file cannot be read.
        DatasetError: There is nothing at the path, or no tracklets.
    """
    if path is None:
        with tempfile.TemporaryDirectory(prefix="passerby-bench-") as folder:
            drawn = Path(folder) / "tracklets"
            config = SyntheticSet(identities=DRAWN_PEOPLE, frames_min=15, frames_max=40, seed=seed)
            draw_to(config, drawn, console)
            return [read_local(one.frames) for one in read_folder(drawn)]
    if not path.is_dir() or any(is_image(one.name) for one in path.iterdir()):
        return [read_local(path)]
    tasks = plan_folder(path)
    chosen = np.random.default_rng(seed).permutation(len(tasks))[:most]
    return [read_local(tasks[number].source) for number in sorted(chosen)]


async def _ask_first(
    server: str, key: str | None, plan: LoadPlan, least_gallery: int
) -> dict[str, Any]:
    async with load_client(server, key, plan) as client:
        return await check_service(client, least_gallery)


async def _measure(
    server: str, key: str | None, bodies: Sequence[Body], plan: LoadPlan, console: Console
) -> list[Run]:
    runs: list[Run] = []
    async with load_client(server, key, plan) as client, _stopped_by_signal(console) as stop:
        await check_upload(client, plan, bodies[0])
        sender = Sender(client, bodies, plan, stop)
        for rate in plan.rates:
            runs.append(await _offer_shown(sender, plan, rate, console))
            if stop.is_set():
                break
    return runs


@asynccontextmanager
async def _stopped_by_signal(console: Console) -> AsyncIterator[asyncio.Event]:
    """An event that the first Ctrl-C sets; the second one ends the process."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def handle() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)
        console.print("stopping; requests that are open are cut off")

    loop.add_signal_handler(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def check_service(client: httpx.AsyncClient, least_gallery: int) -> dict[str, Any]:
    """See whether the service can be measured: it is there, is ready and lets us in.

    Returns:
        Body of ``GET /info``.

    Raises:
        ClientError: It cannot; the message says why.
    """
    try:
        ready = await client.get("/readyz")
        info = await client.get("/info")
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ClientError(f"could not reach {client.base_url}: {error}") from error
    for answer in (info, ready):  # a missing key is the nearer reason
        if answer.status_code != 200:
            raise ClientError(_explain(answer))
    try:
        found: dict[str, Any] = info.json()
        stored = int(found["gallery"]["tracklets"])
    except (ValueError, KeyError, TypeError) as error:
        raise ClientError(f"expected Passerby at {client.base_url}, got something else") from error
    if stored < least_gallery:
        raise ClientError(f"expected at least {least_gallery} tracklets stored, got {stored}")
    return found


async def check_upload(client: httpx.AsyncClient, plan: LoadPlan, body: Body) -> None:
    """Send one tracklet: what the service refuses once it would refuse each time.

    Raises:
        ClientError: It is refused, or not answered.
    """
    try:
        answer = await client.post(
            f"/{plan.route}", content=body.content, headers={"Content-Type": body.content_type}
        )
    except httpx.TransportError as error:
        raise ClientError(f"could not ask {client.base_url}: {error}") from error
    if answer.status_code not in (200, 429):  # a service that is busy already can be measured
        raise ClientError(_explain(answer))


def _explain(answer: httpx.Response) -> str:
    path = answer.request.url.path
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = "no further word; is that Passerby?"
    hint = "; --key-file names a file with the key" if answer.status_code == 401 else ""
    return f"{path} answered {answer.status_code}: {detail}{hint}"


def _describe(
    server: str, info: dict[str, Any], plan: LoadPlan, bodies: Sequence[Body]
) -> dict[str, Any]:
    """What the figures belong to. No file name, no identity, no password of an address."""
    model = info["model"]
    return {
        "server": str(httpx.URL(server).copy_with(userinfo=b"")),
        "version": info.get("version"),
        "model": {
            name: model[name]
            for name in ("fingerprint", "dim", "device", "precision", "runtime")
            if name in model
        },
        "gallery": info["gallery"],
        "plan": asdict(plan),
        "tracklets": len(bodies),
        "frames": float(np.mean([one.frames for one in bodies])),
        "bytes": float(np.mean([len(one.content) for one in bodies])),
    }


def _introduce(about: dict[str, Any], console: Console) -> None:
    model, plan, stored = about["model"], about["plan"], about["gallery"]["tracklets"]
    console.print(
        f"{escape(about['server'])}: model {model.get('fingerprint')} on {model.get('device')} "
        f"({model.get('precision')}), {stored} tracklets stored; /{plan['route']} with "
        f"{about['tracklets']} tracklets of {about['frames']:.0f} files and "
        f"{about['bytes'] / 1000:.0f} kB on average",
        highlight=False,
        soft_wrap=True,
    )
    if plan["route"] == "query" and stored == 0:
        console.print(
            "[yellow]beware:[/] the gallery is empty, so there is nothing to search; "
            "`passerby enroll` fills it",
            highlight=False,
            soft_wrap=True,
        )


async def _offer_shown(sender: Sender, plan: LoadPlan, rate: float, console: Console) -> Run:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeRemainingColumn(),
    )
    total = plan.warmup_s + plan.duration_s
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(f"{rate:g} a second", total=total, counts="")

        def show(run: Run) -> None:
            progress.update(bar, completed=min(run.elapsed_s, total), counts=_counts(run))

        return await sender.offer(rate, show)


def _counts(run: Run) -> str:
    good = sum(one.status == 200 for one in run.samples)
    refused = sum(one.status == 429 for one in run.samples)
    rest = len(run.samples) - good - refused
    return f"200: {good}, 429: {refused}, other: {rest}, open: {run.open}"
