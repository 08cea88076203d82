"""The image and the compose files: what they must say, and that they do what they say."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from rich.console import Console

from model.checkpoint import BUNDLED_FILE
from model.cli import draw_to
from model.datasets.folder import read_folder
from model.datasets.synthetic import SyntheticSet
from service.client import Client, ClientError, read_local
from service.enrolment import enrol_all, plan_folder
from service.settings import Settings, known_names

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
# What the image decides, and what names a file of the container: those come with a mount.
NOT_PASSED_IN = {"HOST", "PORT", "DATA_DIR", "WEIGHTS", "API_KEYS_FILE"}


def compose(name: str) -> dict[str, Any]:
    """A compose file as YAML reads it."""
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return content


def instructions() -> list[str]:
    """What makes the image, in order, each on one line: not the stage that lists what is in it."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE))
    lines = [line.strip() for line in joined.splitlines() if line.strip()]
    stages = [i for i, line in enumerate(lines) if line.startswith("FROM")]
    assert lines[stages[-1]] == "FROM dependencies"
    return lines[: stages[1]] + lines[stages[-1] + 1 :]


def position(matches: Callable[[str], bool]) -> int:
    """Where the one instruction that matches stands."""
    [found] = [i for i, line in enumerate(instructions()) if matches(line)]
    return found


SERVICE = compose("docker-compose.yml")["services"]["passerby"]
GPU_SERVICE = compose("docker-compose.gpu.yml")["services"]["passerby"]


def test_dependencies_have_a_layer_below_the_code() -> None:
    """A change of the code must not install torch again."""
    dependencies = position(lambda line: "--requirement requirements.lock" in line)
    code = position(lambda line: line.startswith("COPY . "))
    package = position(lambda line: "--no-deps" in line)

    assert dependencies < code < package


def test_every_file_that_is_installed_is_held_to_a_hash() -> None:
    installs = [line for line in instructions() if "pip install" in line]

    assert len(installs) == 2
    assert "--require-hashes --requirement requirements.lock" in installs[0]
    assert "--no-deps" in installs[1]
    assert all("--no-cache-dir" in line for line in installs)


def pins(name: str) -> dict[str, str]:
    """Versions by normal name, of a lock or of the constraints."""
    found = re.findall(r"(?m)^([A-Za-z0-9_.-]+)==([^ \n;]+)", (ROOT / name).read_text("utf-8"))
    return {re.sub(r"[-_.]+", "-", one).lower(): version for one, version in found}


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_the_image_gets_the_versions_that_are_tested(variant: str) -> None:
    locked, tested = pins(f"requirements/{variant}.lock"), pins("constraints.txt")

    # Of the machine's kind, or of the variant: nothing that the tests run on.
    others = locked.keys() - tested.keys() - {"setuptools", "colorama", "faiss-gpu"}
    assert {one for one in others if not one.startswith("nvidia-")} == set()
    assert {one: locked[one] for one in locked.keys() & tested.keys()} == {
        one: tested[one] for one in locked.keys() & tested.keys()
    }


@pytest.mark.parametrize("variant", ["cpu", "gpu", "sbom"])
def test_everything_in_a_lock_has_a_hash(variant: str) -> None:
    text = (ROOT / "requirements" / f"{variant}.lock").read_text(encoding="utf-8")
    entries = re.split(r"(?m)^(?=[A-Za-z0-9])", text)[1:]

    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_a_lock_has_every_dependency(variant: str) -> None:
    """`make lock` writes them again after a change."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {"cpu": ["cpu", "openvino", "otel"], "gpu": ["gpu", "otel"]}[variant]
    wanted = project["dependencies"] + [
        one for name in extras for one in project["optional-dependencies"][name]
    ]

    locked = pins(f"requirements/{variant}.lock")

    for one in wanted:
        requirement = Requirement(one)
        assert locked[re.sub(r"[-_.]+", "-", requirement.name).lower()] in requirement.specifier


def test_image_says_what_it_is_and_what_is_in_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = instructions()

    assert f"ARG VERSION={project['version']}" in lines
    assert 'image.version="$VERSION"' in lines[position(lambda line: line.startswith("LABEL"))]
    assert "COPY --from=materials /sbom.cdx.json /usr/share/passerby/sbom.cdx.json" in lines


def test_labels_that_change_come_after_the_layers_that_take_long() -> None:
    assert position(lambda line: line.startswith("ARG REVISION")) > position(
        lambda line: line.startswith("COPY . ")
    )


def test_compose_locks_the_service_in() -> None:
    assert SERVICE["read_only"] is True
    assert SERVICE["cap_drop"] == ["ALL"]
    assert SERVICE["security_opt"] == ["no-new-privileges:true"]
    assert SERVICE["mem_limit"] == SERVICE["memswap_limit"]
    assert SERVICE["pids_limit"] > 0
    [tmp] = SERVICE["tmpfs"]
    assert tmp.startswith("/tmp:size=")  # noqa: S108 the container's
    assert {"noexec", "nosuid", "nodev"} <= set(tmp.split(","))


def test_image_runs_as_a_numbered_user_that_is_not_root() -> None:
    """And becomes it after the last thing that needs root."""
    user = position(lambda line: line.startswith("USER "))
    last_run = max(i for i, line in enumerate(instructions()) if line.startswith(("RUN", "COPY")))

    [uid, gid] = instructions()[user].removeprefix("USER ").split(":")
    assert int(uid) > 0
    assert int(gid) > 0
    assert user > last_run


def lines_of(name: str) -> list[str]:
    """A file's lines that say something."""
    return [
        line
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]


def test_image_gets_the_bundled_weights_and_no_others() -> None:
    """Somebody's own checkpoints lie in the same folder."""
    let_through = [line for line in lines_of(".dockerignore") if line.startswith("!weights")]

    assert "*" in lines_of(".dockerignore")
    assert let_through == [f"!{BUNDLED_FILE.relative_to(ROOT)}"]


def test_image_lets_its_user_read_what_a_strict_umask_made() -> None:
    """COPY keeps modes, and a checkout under umask 077 is for its owner alone."""
    install = instructions()[position(lambda line: "--no-deps" in line)]

    assert "find . ! -perm -o=r -exec chmod a+rX {} +" in install


def test_git_keeps_the_bundled_weights_and_no_others() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    others = BUNDLED_FILE.with_name("mine.safetensors")

    kept, ignored = (
        subprocess.run(
            ["git", "check-ignore", "--quiet", "--no-index", str(path)], cwd=ROOT, check=False
        )
        for path in (BUNDLED_FILE, others)
    )

    assert (kept.returncode, ignored.returncode) == (1, 0)


def test_image_starts_the_service_without_a_shell() -> None:
    """A shell as process 1 would keep SIGTERM from the service."""
    assert 'ENTRYPOINT ["passerby", "serve"]' in instructions()
    assert "STOPSIGNAL SIGTERM" in instructions()
    assert "VOLUME /data" in instructions()


def test_image_is_checked_as_compose_checks_it() -> None:
    healthcheck = instructions()[position(lambda line: line.startswith("HEALTHCHECK"))]
    options = dict(re.findall(r"--([a-z-]+)=(\S+)", healthcheck))
    command: list[str] = yaml.safe_load(healthcheck.split(" CMD ")[1])

    assert "/readyz" in command[-1]
    assert SERVICE["healthcheck"] == {
        "test": ["CMD", *command],
        "retries": int(options.pop("retries")),
        **{name.replace("-", "_"): value for name, value in options.items()},
    }


def test_image_is_told_only_settings_that_exist() -> None:
    """An unknown PASSERBY_ variable stops the start."""
    assert set(re.findall(r"PASSERBY_[A-Z_]+", "\n".join(instructions()))) <= known_names()


def test_compose_passes_on_every_setting_that_is_not_the_images() -> None:
    expected = known_names() - {f"PASSERBY_{name}" for name in NOT_PASSED_IN}

    assert set(SERVICE["environment"]) == expected
    assert set(GPU_SERVICE["environment"]) <= expected


def test_compose_keeps_the_data_in_a_named_volume() -> None:
    assert SERVICE["volumes"] == ["passerby-data:/data"]
    assert "passerby-data" in compose("docker-compose.yml")["volumes"]


def test_compose_restarts_what_has_died() -> None:
    assert SERVICE["restart"] == "unless-stopped"


def test_compose_waits_for_a_graceful_stop() -> None:
    """What was accepted gets the grace, and answers on their way a few seconds more."""
    seconds = float(SERVICE["stop_grace_period"].removesuffix("s"))

    assert seconds >= Settings.model_fields["shutdown_grace_s"].default + 10


def test_compose_publishes_to_this_machine_alone() -> None:
    """Others come in when the operator has the first key."""
    assert SERVICE["ports"] == ["${PUBLISH:-127.0.0.1:8000}:8000"]


def test_gpu_override_reserves_a_gpu_and_builds_for_it() -> None:
    [device] = GPU_SERVICE["deploy"]["resources"]["reservations"]["devices"]

    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert GPU_SERVICE["build"]["args"] == {"INDEX": "gpu"}
    assert GPU_SERVICE["image"] != SERVICE["image"]


def documented_settings() -> dict[str, str]:
    """Names and defaults in the settings table of the operations page."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    return dict(re.findall(r"(?m)^\| `(PASSERBY_\w+)` \| ([^|]+) \|", page))


def test_operations_page_names_exactly_the_settings_that_exist() -> None:
    assert set(documented_settings()) == known_names()


def real_settings() -> dict[str, str]:
    """Names and defaults of the settings, written as the operations page writes them."""
    real = {name: "none" for name in known_names() if name.endswith("_FILE")}
    for name, value in Settings.model_construct().model_dump().items():
        for child, default in value.items() if isinstance(value, dict) else [("", value)]:
            text = str(default).lower() if isinstance(default, bool) else f"{default!s}"
            text = f"{default:g}" if isinstance(default, float) else text
            is_none = default is None or default == ()
            key = "PASSERBY_" + "__".join(part for part in (name, child) if part).upper()
            real[key] = "none" if is_none else f"`{text}`"
    return real


def test_operations_page_gives_the_real_defaults() -> None:
    """And so names exactly the settings that exist."""
    assert documented_settings() == real_settings()


@cache
def compose_command() -> tuple[str, ...] | None:
    """Compose v2 where there is one, else the older command."""
    with contextlib.suppress(OSError):
        if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
            return ("docker", "compose")
    return ("docker-compose",) if shutil.which("docker-compose") else None


def why_not_docker() -> str | None:
    """Why nothing can be tried with Docker here."""
    try:
        info = subprocess.run(["docker", "info"], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no Docker engine answers: {error}"
    if info.returncode:
        return "no Docker engine answers `docker info`"
    return None if compose_command() else "neither `docker compose` nor `docker-compose` is here"


class Deployment:
    """The compose file under a project name and a port of its own.

    Args:
        no_settings: An empty file, read in place of the checkout's .env: the defaults are on trial.
    """

    def __init__(self, no_settings: Path) -> None:
        self._no_settings = no_settings
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._publish = f"127.0.0.1:{probe.getsockname()[1]}"
        self._name = f"passerby-test-{os.getpid()}"
        self.address = f"http://{self._publish}"

    def compose(self, *arguments: str) -> str:
        """Run a compose command; what it prints comes back."""
        environment = {n: v for n, v in os.environ.items() if not n.startswith("PASSERBY_")}
        done = subprocess.run(
            [
                *(compose_command() or ()),
                *(
                    "--env-file",
                    str(self._no_settings),
                    "-f",
                    "docker-compose.yml",
                    "-p",
                    self._name,
                ),
                *arguments,
            ],
            cwd=ROOT,
            env={**environment, "PUBLISH": self._publish},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=3600,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    def start(self, client: Client) -> None:
        """Start it and wait until it is ready."""
        self.compose("up", "-d")
        deadline = time.monotonic() + 180
        while not client.ready():
            assert time.monotonic() < deadline, self.compose("logs")[-4000:]
            time.sleep(1)

    def printed_keys(self) -> list[str]:
        """The keys that this container has printed."""
        return re.findall(r"passerby_[\w-]{40,}", self.compose("logs", "passerby"))


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """Built and not yet started; removed with its data at the end."""
    if reason := why_not_docker():
        pytest.skip(reason)
    no_settings = tmp_path / "empty.env"
    no_settings.touch()
    built = Deployment(no_settings)
    try:
        built.compose("build")
        yield built
    finally:
        built.compose("down", "-v")


@pytest.mark.docker
@pytest.mark.slow
def test_gallery_survives_its_container(deployment: Deployment, tmp_path: Path) -> None:
    """Build, start, enrol and ask with the printed key; a new container answers the same."""
    people = tmp_path / "people"
    draw_to(SyntheticSet(identities=3), people, Console(quiet=True))
    tasks = plan_folder(people, frozenset({"c1"}))
    asked = next(one for one in read_folder(people) if one.camera == "c2")
    local = read_local(asked.frames)
    with Client(deployment.address) as anybody:
        deployment.start(anybody)
        [key] = deployment.printed_keys()
        with pytest.raises(ClientError, match="401"):
            anybody.query(local, {})
    with Client(deployment.address, key) as client:
        outcomes = list(enrol_all(client, tasks, concurrency=1, stop=lambda: False))
        before = client.query(local, {})
        uid = deployment.compose("exec", "-T", "passerby", "id", "-u").split()[-1]

        deployment.compose("down")
        deployment.start(client)
        after = client.query(local, {})
        printed = deployment.printed_keys()

    assert [outcome.state for outcome in outcomes] == ["enrolled"] * 3
    assert uid != "0"
    assert printed == []  # once, and never again
    assert after["searched"] == 3
    assert after["matches"] == before["matches"]
