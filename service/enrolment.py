"""Enrol tracklets through the API: several at a time, skipping what is already there."""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.datasets.folder import read_folder
from model.errors import DatasetError
from service.client import Client, ClientError, read_local


@dataclass(frozen=True, slots=True)
class Task:
    """One tracklet to enrol.

    Args:
        source: Frames in order, or one folder, zip or video.
        fields: Form fields.
    """

    source: Path | tuple[Path, ...]
    fields: dict[str, str]

    @property
    def name(self) -> str:
        """What people call it."""
        return self.fields.get("tracklet_id") or str(self.source)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a task.

    Args:
        task: Which.
        state: "enrolled", "skipped" because it is there already, or "failed".
        reason: Why it failed.
    """

    task: Task
    state: Literal["enrolled", "skipped", "failed"]
    reason: str = ""


def plan_folder(root: Path, cameras: frozenset[str] | None = None) -> list[Task]:
    """One task per tracklet of an ``identity/camera/[tracklet/]frames`` folder.

    Its id is made of its folders' names, so that a second run finds what the first one did.

    Raises:
        DatasetError: The folder has another layout, or nothing of the cameras asked for.
    """
    tasks = []
    for tracklet in read_folder(root):
        if cameras is not None and tracklet.camera not in cameras:
            continue
        names = [tracklet.identity, tracklet.camera, tracklet.name]
        fields = {
            "tracklet_id": ":".join(name for name in names if name),
            "identity": tracklet.identity,
            "camera": tracklet.camera,
        }
        tasks.append(Task(tracklet.frames, fields))
    if not tasks:
        raise DatasetError(
            f"expected tracklets of camera {sorted(cameras or ())} in {root}, got none"
        )
    return tasks


def enrol_all(
    client: Client, tasks: list[Task], *, concurrency: int, stop: Callable[[], bool]
) -> Iterator[Outcome]:
    """Enrol tracklets, several at a time; yields outcomes as they come.

    Args:
        client: Where to.
        tasks: What; read from disk only when its turn comes.
        concurrency: How many at a time.
        stop: Asked before each new one; after a yes, those under way are finished and none begun.
    """
    waiting = iter(tasks)
    running: set[Future[Outcome]] = set()
    with ThreadPoolExecutor(concurrency, thread_name_prefix="enrol") as pool:
        while True:
            while len(running) < concurrency and not stop():
                task = next(waiting, None)
                if task is None:
                    break
                running.add(pool.submit(enrol_one, client, task))
            if not running:
                return
            done, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def enrol_one(client: Client, task: Task) -> Outcome:
    """Enrol one tracklet unless it is there already with the same content."""
    try:
        local = read_local(task.source)
        if tracklet_id := task.fields.get("tracklet_id"):
            stored = client.record(tracklet_id)
            if stored is not None and local.kind != "archive":
                if stored["content"] == local.content:
                    return Outcome(task, "skipped")
                return Outcome(task, "failed", f"409: {tracklet_id} is there with other content")
        client.enrol(local, task.fields)
    except (ClientError, DatasetError) as error:
        return Outcome(task, "failed", str(error))
    return Outcome(task, "enrolled")
