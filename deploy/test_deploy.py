"""Try the deployment on a Docker host, from a fresh clone to an upgrade: `make test-deploy`.

Each step prints a line with its time and verdict. The first that fails ends it, with status 1. What
was started is taken down in any case; nothing that runs already is touched, but for the engine,
and for that somebody has to say how.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import httpx

from deploy.deployment import (
    SERVICE,
    Checkout,
    Deployment,
    DeploymentError,
    compose_command,
    run,
    wait_for,
)
from deploy.people import (
    Answers,
    People,
    ask,
    check_same,
    check_stored,
    disturb,
    enrol_people,
    expecting,
)
from service.client import Client, ClientError

ROOT = Path(__file__).parent.parent
# The image of 8 GB, and what pip downloads beside it.
GPU_BUILD_GB = 14.0
SMALL_VOLUME = "48m"
MOST_WHILE_FULL = 100
DATA = ("--data-dir", "/data")
BEFORE_UPGRADE = "/data/before.passerby"
LEDGER = "/data/ledger.json"


class SkippedError(Exception):
    """Raised when a step cannot be tried here; says why."""


@dataclass
class Trial:
    """What the steps share.

    Args:
        options: Of the command line.
        folder: For all that is made here.
        name: What every project and image of this run begins with.
        closing: What is taken down in the end.
    """

    options: argparse.Namespace
    folder: Path
    name: str
    closing: ExitStack
    people: People = field(init=False)
    new: Checkout = field(init=False)
    old: Checkout = field(init=False)
    main: Deployment = field(init=False)
    moved: Deployment = field(init=False)
    before: Answers = field(init=False)

    def deploy(
        self, name: str, checkout: Checkout, volume: dict[str, Any] | None = None
    ) -> Deployment:
        """A deployment that is removed in the end."""
        made = Deployment(f"{self.name}-{name}", checkout, self.folder, volume)
        self.closing.callback(made.remove)
        return made


# The steps, in their order.


def draw(trial: Trial) -> str:
    """Draw people who do not exist."""
    trial.people = People.draw(trial.folder / "people")
    return f"{len(trial.people.names)} people, two cameras"


def clone(trial: Trial) -> str:
    """Make a fresh clone, and the commit before it beside it."""
    path = trial.folder / "passerby"
    run("git", "clone", "--quiet", "--no-local", str(ROOT), str(path))
    revision = run("git", "rev-parse", "--short=12", "HEAD", cwd=path).strip()
    previous = trial.options.previous or "HEAD~1"
    if trial.options.uncommitted:
        lay_over(path)
        previous = trial.options.previous or "HEAD"
        revision += "-uncommitted"
    old = run("git", "rev-parse", "--short=12", previous, cwd=path).strip()
    run("git", "worktree", "add", "--quiet", "--detach", "../previous", old, cwd=path)
    trial.new = Checkout(path, f"{trial.name}:new", revision)
    trial.old = Checkout(path.with_name("previous"), f"{trial.name}:old", old)
    for checkout in (trial.new, trial.old):
        trial.closing.callback(forget_image, checkout.image)
    return f"{revision}, and {old} to upgrade from"


def lay_over(path: Path) -> None:
    """Bring to a clone what is not committed: all that git does not ignore."""
    for name in listed("--cached", "--others", "--exclude-standard"):
        source, target = ROOT / name, path / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        else:
            target.unlink(missing_ok=True)


def listed(*which: str) -> list[str]:
    """Files of this checkout as git names them."""
    return [name for name in run("git", "ls-files", "-z", *which, cwd=ROOT).split("\0") if name]


def forget_image(image: str) -> None:
    """Take an image's name away; layers that the next build can use stay."""
    subprocess.run(["docker", "image", "rm", "--no-prune", image], capture_output=True, check=False)


def size_of(image: str) -> str:
    """How large an image is, in words."""
    size = int(run("docker", "image", "inspect", "--format", "{{.Size}}", image))
    return f"image of {size / 1e9:.2f} GB"


def build_cpu(trial: Trial) -> str:
    """Build the variant for a CPU, as Compose does."""
    trial.main = trial.deploy("main", trial.new)
    trial.main.compose("build")
    return size_of(trial.new.image)


def build_gpu(trial: Trial) -> str:
    """Build the variant for a GPU where the disk has room, and load its libraries."""
    root = Path(run("docker", "info", "--format", "{{.DockerRootDir}}").strip())
    free = shutil.disk_usage(root if root.is_dir() else trial.folder).free / 1e9
    needed = GPU_BUILD_GB + trial.options.keep_free_gb
    if free < needed:
        kept = f"{trial.options.keep_free_gb:g} GB of it to be left"
        raise SkippedError(f"expected {needed:g} GB of free disk, {kept}, got {free:.0f} GB")
    image = f"{trial.name}:gpu"
    trial.closing.callback(forget_image, image)
    run("docker", "build", "--tag", image, "--build-arg", "INDEX=gpu", ".", cwd=trial.new.path)
    # What the service says of itself needs a GPU; its parts can be loaded without.
    program = "import faiss, torch, service.cli; print(torch.version.cuda)"
    cuda = run("docker", "run", "--rm", "--entrypoint", "python", image, "-c", program)
    return f"{size_of(image)}, CUDA {cuda.split()[-1]}"


def start_first(trial: Trial) -> str:
    """Go from the command to ready, with a key that is printed once."""
    seconds = trial.main.start()
    keys = trial.main.printed_keys()
    if len(keys) != 1:
        raise DeploymentError(f"expected one printed key, got {len(keys)}")
    with Client(trial.main.address) as nobody, expecting(401):
        nobody.record("somebody")
    return f"ready {seconds:.1f} s after `up`; one key printed, and none gets in without"


def enrol_and_ask(trial: Trial) -> str:
    """Find people with that key; a new container answers the same, and prints no other key."""
    people, main = trial.people, trial.main
    enrol_people(main, people)
    answers = ask(main, people)
    main.compose("down")
    main.start()
    if main.printed_keys():
        raise DeploymentError("expected no second key, got one printed")
    check_same(ask(main, people), answers)
    if main.inside("id", "-u").split()[-1] == "0":
        raise DeploymentError("expected another user than root, got 0")
    firsts = [matches[0][0] for matches in answers]
    right = sum(map(str.__eq__, firsts, people.names))
    return f"{right} of {len(firsts)} found first; a new container answers the same"


def kill_process(trial: Trial) -> str:
    """Kill the container's process in the middle of enrolments."""
    main = trial.main
    restarts = main.state()["RestartCount"]

    def kill() -> None:
        # From inside: what `docker kill` ends, Docker does not start again. The first child of the
        # init is the service. What kills it is killed in turn, so its status says nothing.
        with suppress(DeploymentError):
            main.inside("sh", "-c", "set -- $(cat /proc/1/task/1/children); kill -9 $1")
        wait_for("a restart", lambda: main.state()["RestartCount"] > restarts)

    return disturb(main, trial.people, "killed", kill)


def restart_engine(trial: Trial) -> str:
    """Restart the engine in the middle of enrolments."""
    command = trial.options.restart_engine
    if not command:
        raise SkippedError("nobody said how, as RESTART_ENGINE='systemctl restart docker'")
    own = trial.main.state()["Id"]
    others = [one for one in run("docker", "ps", "-q", "--no-trunc").split() if one != own]
    if others:
        raise SkippedError(f"{len(others)} containers of others run here")
    before = trial.main.state()["State"]["StartedAt"]

    def is_anew() -> bool:
        try:
            state = trial.main.state()["State"]
        except DeploymentError:  # the engine is not back, or not all of it
            return False
        return bool(state["Running"]) and state["StartedAt"] != before

    def restart() -> None:
        subprocess.run(shlex.split(command), check=True, stdout=subprocess.DEVNULL)
        wait_for("the container to be started again", is_anew)

    return disturb(trial.main, trial.people, "engine", restart)


def fill_volume(trial: Trial) -> str:
    """Fill the volume: 507, and nothing is lost; make room, and it goes on."""
    mount = {"type": "tmpfs", "device": "tmpfs", "o": f"size={SMALL_VOLUME},uid=10001,mode=0700"}
    small = trial.deploy("small", trial.new, {"driver": "local", "driver_opts": mount})
    small.start()
    enrol_people(small, trial.people)
    answers = ask(small, trial.people)
    # dd ends with an error: it is to find no more room.
    small.inside("sh", "-c", "dd if=/dev/zero of=/data/filler bs=4k 2>&1; test -s /data/filler")
    with small.client() as client:
        stored, refused = enrol_until_full(client, trial.people)
        wait_for("readiness to tell", lambda: not client.ready())
        check_same(ask(small, trial.people), answers)

        small.inside("rm", "/data/filler")
        wait_for("readiness to come back", client.ready)
        check_stored(client, [refused], there=False)
        client.enrol(trial.people.asked[0], {"tracklet_id": refused})
        check_stored(client, [*trial.people.names, *stored, refused])
    small.remove()
    return f"{SMALL_VOLUME}: 507 to changes and answers to queries; all there, and on with room"


def enrol_until_full(client: Client, people: People) -> tuple[list[str], str]:
    """Enrol until it is refused with 507: the log's old pages may hold some yet.

    Returns:
        What was acknowledged, and what was refused.
    """
    stored: list[str] = []
    for number in range(MOST_WHILE_FULL):
        tracklet_id = f"full-{number}"
        try:
            client.enrol(people.asked[0], {"tracklet_id": tracklet_id})
        except ClientError as error:
            if not str(error).startswith("507:"):
                raise DeploymentError(f"expected 507, got {error}") from error
            return stored, tracklet_id
        stored.append(tracklet_id)
    raise DeploymentError(f"expected 507 on a full volume, got {len(stored)} enrolments")


def upgrade(trial: Trial) -> str:
    """Fill a volume by the previous version, then run this one on it."""
    trial.main.remove()
    moved = trial.moved = trial.deploy("moved", trial.old)
    moved.compose("build")
    moved.start()
    enrol_people(moved, trial.people)
    trial.before = ask(moved, trial.people)
    moved.inside("passerby", "snapshot", BEFORE_UPGRADE, *DATA)

    moved.use(trial.new)
    moved.compose("build")
    seconds = moved.start()
    check_same(ask(moved, trial.people), trial.before)
    return f"all found; ready {seconds:.1f} s after `up`"


def roll_back(trial: Trial) -> str:
    """Go back to the previous version and its snapshot; who was erased since stays erased."""
    moved, people = trial.moved, trial.people
    erased = people.names[0]
    with moved.client() as client:
        client.enrol(people.asked[1], {"tracklet_id": "later"})
    headers = {"X-API-Key": moved.key or "none is asked for"}
    httpx.delete(f"{moved.address}/identities/{erased}", headers=headers).raise_for_status()
    moved.inside("passerby", "ledger", LEDGER, *DATA)
    moved.compose("down")

    moved.use(trial.old)
    verdict = try_older(moved)
    ledger = ("--lose-ledger", "--ledger", LEDGER)
    command = ("restore", BEFORE_UPGRADE, *DATA, "--replace", *ledger)
    moved.compose("run", "--rm", "-T", "--entrypoint", "passerby", SERVICE, *command)
    moved.start()
    with moved.client() as client:
        check_stored(client, list(people.names[1:]))
        check_stored(client, [erased, "later"], there=False)
    kept = [[one for one in matches if one[0] != erased] for matches in trial.before]
    check_same(ask(moved, people), kept)
    return f"the older version {verdict}; the snapshot is back, who was erased is not"


def try_older(moved: Deployment) -> str:
    """Start the older version on the newer one's data: it runs, or says why it does not."""
    moved.compose("up", "-d")
    words = "newer Passerby"
    with moved.client() as client:
        wait_for("it to run or to refuse", lambda: client.ready() or words in moved.log())
    refused = words in moved.log()
    moved.compose("down")
    return "refused the newer data" if refused else "read the data as they were"


STEPS: tuple[Callable[[Trial], str], ...] = (
    draw,
    clone,
    build_cpu,
    start_first,
    enrol_and_ask,
    kill_process,
    restart_engine,
    fill_volume,
    upgrade,
    roll_back,
    build_gpu,
)


def tell(verdict: str, step: Callable[[Trial], str], seconds: float, what: str) -> None:
    """Print a step's line."""
    print(f"{verdict:<8}{seconds:>8.1f} s  {step.__name__:<15} {what}", flush=True)


def try_all(trial: Trial) -> bool:
    """Try the steps; False as soon as one fails."""
    for step in STEPS:
        began = time.monotonic()
        try:
            what, verdict = step(trial), "ok"
        except SkippedError as reason:
            what, verdict = str(reason), "skipped"
        except (
            DeploymentError,
            ClientError,
            httpx.HTTPError,
            subprocess.CalledProcessError,
        ) as error:
            what, verdict = str(error), "FAILED"
        tell(verdict, step, time.monotonic() - began, what)
        if verdict == "FAILED":
            return False
    return True


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--uncommitted",
        action="store_true",
        help="lay what is not committed over the clone, and upgrade from HEAD",
    )
    parser.add_argument("--previous", help="the commit to upgrade from (HEAD~1)")
    parser.add_argument(
        "--restart-engine",
        default=os.environ.get("RESTART_ENGINE", ""),
        help="command that restarts the engine; without it, that step is skipped",
    )
    parser.add_argument(
        "--keep-free-gb",
        type=float,
        default=20.0,
        help="disk that a build for a GPU has to leave (20)",
    )
    return parser.parse_args()


def end(number: int, _: FrameType | None) -> NoReturn:
    """Leave by way of what takes everything down."""
    raise SystemExit(128 + number)


def main() -> int:
    """Try everything."""
    options = read_options()
    signal.signal(signal.SIGTERM, end)
    try:
        compose_command()
    except DeploymentError as error:
        print(f"FAILED  to find Docker: {error}")
        return 1
    try:
        with ExitStack() as closing:
            temporary = tempfile.TemporaryDirectory(prefix="passerby-deploy-")
            folder = Path(closing.enter_context(temporary))
            trial = Trial(options, folder, f"passerby-deploy-{os.getpid()}", closing)
            return 0 if try_all(trial) else 1
    except DeploymentError as error:
        print(f"FAILED  to take everything down: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
