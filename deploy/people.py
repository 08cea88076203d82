"""Drawn people who are enrolled and asked for, and what has to be true of them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from deploy.deployment import Deployment, DeploymentError
from model.cli import draw_to
from model.datasets.folder import read_folder
from model.datasets.synthetic import SyntheticSet
from service.client import Client, ClientError, LocalTracklet, read_local

PEOPLE = 4
BEFORE = 4  # enrolments that are acknowledged before something is disturbed
AFTER = 3  # and when it is ready again
WAIT_S = 180.0
AGAIN_S = 0.2

Answers = list[list[tuple[str, float]]]
"""Of each query the identities and distances, nearest first."""


@dataclass(frozen=True, slots=True)
class People:
    """Drawn people as two cameras saw them, in the same order.

    Args:
        names: Their identities.
        stored: Their tracklets for the gallery.
        asked: Those from the other camera.
    """

    names: tuple[str, ...]
    stored: tuple[LocalTracklet, ...]
    asked: tuple[LocalTracklet, ...]

    @classmethod
    def draw(cls, folder: Path) -> Self:
        """Draw them; the same every time."""
        draw_to(SyntheticSet(identities=PEOPLE), folder, Console(quiet=True))
        found = sorted(read_folder(folder), key=lambda one: one.identity)
        cameras = (
            [one for one in found if one.camera == "c1"],
            [one for one in found if one.camera == "c2"],
        )
        stored, asked = (tuple(read_local(one.frames) for one in camera) for camera in cameras)
        return cls(tuple(one.identity for one in cameras[0]), stored, asked)


def enrol_people(deployment: Deployment, people: People) -> None:
    """Enrol everybody from camera c1, with ids of their names.

    Raises:
        ClientError: Somebody is refused.
    """
    with deployment.client() as client:
        for name, tracklet in zip(people.names, people.stored, strict=True):
            client.enrol(tracklet, {"tracklet_id": name, "identity": name, "camera": "c1"})


def ask(deployment: Deployment, people: People) -> Answers:
    """Ask for everybody among what camera c1 saw.

    Raises:
        ClientError: The service refuses.
    """
    with deployment.client() as client:
        bodies = [client.query(one, {"camera": "c1"}) for one in people.asked]
    return [[(one["identity"], one["distance"]) for one in body["matches"]] for body in bodies]


def check_same(found: Answers, wanted: Answers) -> None:
    """Return where two rounds of questions had the same answers, to 1e-4 of a distance.

    Raises:
        DeploymentError: They had not.
    """
    pairs = [
        (one, other)
        for ones, others in zip(found, wanted, strict=True)
        for one, other in zip(ones, others, strict=False)
    ]
    is_same = [len(one) for one in found] == [len(one) for one in wanted] and all(
        one[0] == other[0] and abs(one[1] - other[1]) < 1e-4 for one, other in pairs
    )
    if not is_same:
        raise DeploymentError(f"expected the answers {wanted}, got {found}")


def check_stored(client: Client, tracklet_ids: list[str], *, there: bool = True) -> None:
    """Return where all of some tracklets are stored, or none of them.

    Raises:
        DeploymentError: It is otherwise with one.
    """
    wrong = [one for one in tracklet_ids if (client.record(one) is not None) != there]
    if wrong:
        raise DeploymentError(f"expected {'all' if there else 'none'} to be stored, not so {wrong}")


@contextmanager
def expecting(status: int) -> Iterator[None]:
    """Pass where the block is refused with a status.

    Raises:
        DeploymentError: It is not, or with another one.
    """
    try:
        yield
    except ClientError as error:
        if not str(error).startswith(f"{status}:"):
            raise DeploymentError(f"expected {status}, got {error}") from error
        return
    raise DeploymentError(f"expected {status}, got success")


class Writer:
    """Enrols one tracklet again and again under new ids, whatever happens to the service.

    Args:
        client: Of the service.
        tracklet: What is enrolled; without identity or camera.
        prefix: What the ids begin with.
    """

    def __init__(self, client: Client, tracklet: LocalTracklet, prefix: str) -> None:
        self._client = client
        self._tracklet = tracklet
        self._prefix = prefix
        self._acknowledged: list[str] = []
        self._failed = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(WAIT_S)

    @property
    def acknowledged(self) -> list[str]:
        """The ids that were answered with success so far."""
        with self._changed:
            return list(self._acknowledged)

    @property
    def failed(self) -> int:
        """How many were not."""
        with self._changed:
            return self._failed

    def wait_for(self, more: int) -> None:
        """Wait until so many more have been acknowledged.

        Raises:
            DeploymentError: They are not in time.
        """
        with self._changed:
            wanted = len(self._acknowledged) + more
            if not self._changed.wait_for(lambda: len(self._acknowledged) >= wanted, WAIT_S):
                raise DeploymentError(f"expected {more} more enrolments within {WAIT_S:g} s")

    def _write(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            tracklet_id = f"{self._prefix}-{number}"
            try:
                self._client.enrol(self._tracklet, {"tracklet_id": tracklet_id})
            except ClientError:
                with self._changed:
                    self._failed += 1
                self._stop.wait(AGAIN_S)
                continue
            with self._changed:
                self._acknowledged.append(tracklet_id)
                self._changed.notify_all()


def disturb(deployment: Deployment, people: People, prefix: str, happen: Callable[[], Any]) -> str:
    """Let something happen in the middle of enrolments; what was acknowledged is there afterwards.

    Args:
        deployment: Of these people, enrolled already.
        people: They.
        prefix: Of the ids that are used.
        happen: What does; returns when the service has ended and been started again.

    Returns:
        What came of it, in words.

    Raises:
        DeploymentError: Something is lost, or it does not become ready again.
    """
    answers = ask(deployment, people)
    with deployment.client() as client:
        with Writer(client, people.asked[0], prefix) as writer:
            writer.wait_for(BEFORE)
            happen()
            deployment.wait_until_ready()
            writer.wait_for(AFTER)
        check_stored(client, writer.acknowledged)
    check_same(ask(deployment, people), answers)
    count = len(writer.acknowledged)
    return f"{count} of {count} acknowledged are there, {writer.failed} were not acknowledged"
