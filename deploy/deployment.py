"""A deployment of one checkout under a Compose project of its own."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.client import Client

SERVICE = "passerby"
READY_S = 300.0
COMMAND_S = 3600.0
POLL_S = 0.5
TOLD = 2000  # characters of what a command or a container has printed last


class DeploymentError(Exception):
    """Raised when a command fails, or something does not become what it has to; says which."""


def run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command; what it prints comes back, standard error included.

    Raises:
        DeploymentError: It ends with another status than 0, or not within an hour.
    """
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeploymentError(f"{' '.join(command[:4])}: {error}") from error
    if done.returncode:
        words = " ".join(command)
        raise DeploymentError(f"{words}: status {done.returncode}\n{done.stdout[-TOLD:]}")
    return done.stdout


def compose_command() -> tuple[str, ...]:
    """Compose v2 where there is one, else the older command.

    Raises:
        DeploymentError: There is neither, or no engine answers.
    """
    run("docker", "info")
    with suppress(DeploymentError):
        run("docker", "compose", "version")
        return ("docker", "compose")
    if shutil.which("docker-compose"):
        return ("docker-compose",)
    raise DeploymentError("neither `docker compose` nor `docker-compose` is here")


def wait_for(what: str, claim: Callable[[], bool], within_s: float = READY_S) -> None:
    """Wait until a claim comes true.

    Raises:
        DeploymentError: It does not in time.
    """
    deadline = time.monotonic() + within_s
    while not claim():
        if time.monotonic() > deadline:
            raise DeploymentError(f"expected {what} within {within_s:g} s, got nothing of the kind")
        time.sleep(POLL_S)


@dataclass(frozen=True, slots=True)
class Checkout:
    """A version to deploy.

    Args:
        path: Its files.
        image: What its image is called; nobody else's name.
        revision: Which commit.
    """

    path: Path
    image: str
    revision: str


class Deployment:
    """Containers, volume and network of one project; may pass from one checkout to another.

    Args:
        name: Of the project.
        checkout: Whose compose file and image.
        folder: For what is laid over the compose file.
        volume: How the volume is made, as Compose wants it; None for an ordinary one.
    """

    def __init__(
        self, name: str, checkout: Checkout, folder: Path, volume: dict[str, Any] | None = None
    ) -> None:
        self.name = name
        self._compose = compose_command()
        self._folder = folder
        self._volume = volume
        # Read in place of the checkout's .env: the defaults are on trial.
        self._no_settings = folder / "empty.env"
        self._no_settings.touch()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._publish = f"127.0.0.1:{probe.getsockname()[1]}"
        self.address = f"http://{self._publish}"
        self.key: str | None = None
        self._used: list[Checkout] = []
        self.use(checkout)

    def use(self, checkout: Checkout) -> None:
        """Run another version from the next command on."""
        self._checkout = checkout
        self._used.append(checkout)
        laid_over: dict[str, Any] = {"services": {SERVICE: {"image": checkout.image}}}
        if self._volume is not None:
            laid_over["volumes"] = {"passerby-data": self._volume}
        # JSON is YAML. Names of images are ours alone: nobody's passerby:cpu is overwritten.
        self._override = self._folder / f"{self.name}-{checkout.revision}.json"
        self._override.write_text(json.dumps(laid_over), encoding="utf-8")

    def compose(self, *arguments: str) -> str:
        """Run a compose command; what it prints comes back.

        Raises:
            DeploymentError: It fails.
        """
        environment = {n: v for n, v in os.environ.items() if not n.startswith("PASSERBY_")}
        files = ("-f", "docker-compose.yml", "-f", str(self._override))
        return run(
            *self._compose,
            *("--env-file", str(self._no_settings), *files, "-p", self.name),
            *arguments,
            cwd=self._checkout.path,
            env={
                **environment,
                "PUBLISH": self._publish,
                "REVISION": self._checkout.revision,
                # Compose v1 warns of orphans; of none that is ours.
                "COMPOSE_IGNORE_ORPHANS": "true",
            },
        )

    def inside(self, *command: str) -> str:
        """Run a command in the running container.

        Raises:
            DeploymentError: It fails.
        """
        return self.compose("exec", "-T", SERVICE, *command)

    def start(self) -> float:
        """Have it run and be ready; remembers the key that it prints.

        Returns:
            Seconds from the command to ready.

        Raises:
            DeploymentError: It does not become ready.
        """
        began = time.monotonic()
        self.compose("up", "-d")
        self.wait_until_ready()
        seconds = time.monotonic() - began
        if printed := self.printed_keys():
            self.key = printed[-1]
        return seconds

    def wait_until_ready(self) -> None:
        """Return as soon as it is.

        Raises:
            DeploymentError: It is not in time; the message ends with what it has logged.
        """
        try:
            with self.client() as client:
                wait_for("the service to be ready", client.ready)
        except DeploymentError as error:
            raise DeploymentError(f"{error}\n{self.log()[-TOLD:]}") from error

    def client(self) -> Client:
        """A client with the key, where there is one."""
        return Client(self.address, self.key)

    def printed_keys(self) -> list[str]:
        """The keys that this container has printed."""
        return re.findall(r"passerby_[\w-]{40,}", self.log())

    def log(self) -> str:
        """What this container has printed."""
        return self.compose("logs", SERVICE)

    def state(self) -> dict[str, Any]:
        """What the engine says of the container: ``RestartCount``, ``State`` and so on.

        Raises:
            DeploymentError: There is none, or no engine that would say it.
        """
        containers = self.compose("ps", "-a", "-q", SERVICE).split()
        if len(containers) != 1:
            raise DeploymentError(f"expected one container of {self.name}, got {len(containers)}")
        [state] = json.loads(run("docker", "inspect", *containers))
        found: dict[str, Any] = state
        return found

    def remove(self) -> None:
        """Take it down, with its data: all that any version's compose file has made."""
        for checkout in dict.fromkeys(self._used):
            self.use(checkout)
            self.compose("down", "--volumes", "--timeout", "10")
