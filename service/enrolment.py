"""Enrol tracklets through the API: several at a time, skipping what is already there."""

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.datasets.folder import read_folder
from model.errors import DatasetError
from service.client import Client, ClientError, LocalTracklet, read_local


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
        fields = {"tracklet_id": _derive_id(local, task.fields), **task.fields}
        if _is_there(client.record(fields["tracklet_id"]), local, fields):
            return Outcome(task, "skipped")
        # What is there with other content or other fields, the service knows best.
        _, created = client.enrol(local, fields)
    except (ClientError, DatasetError) as error:
        return Outcome(task, "failed", str(error))
    return Outcome(task, "enrolled" if created else "skipped")


def _derive_id(local: LocalTracklet, fields: dict[str, str]) -> str:
    """An id for a tracklet without one, so that sending it twice does not store it twice."""
    names = [fields.get("identity"), fields.get("camera"), local.content[:16]]
    return ":".join(name for name in names if name)


def _is_there(stored: dict[str, Any] | None, local: LocalTracklet, fields: dict[str, str]) -> bool:
    """Whether a record is what would be enrolled, as far as it shows without sending the frames."""
    return (
        stored is not None
        and local.kind != "archive"  # its members' digest is not known here
        and stored["content"] == local.content
        and all(stored[name] == value for name, value in fields.items())
    )
