"""What `make test-deploy` holds a deployment to; the script itself needs a Docker host."""

import re
from pathlib import Path
from typing import Any

import pytest

from deploy import test_deploy as script
from deploy.deployment import DeploymentError, run, wait_for
from deploy.people import Writer, check_same, check_stored, expecting
from service.client import Client, ClientError, LocalTracklet

ROOT = Path(__file__).parent.parent
ANSWERS = [[("p1", 0.5), ("p2", 1.0)], [("p2", 0.25)]]


class Service(Client):
    """A client of nobody: keeps what it is given, and refuses what it is told to.

    Args:
        refused: Ids.
        forgotten: Ids that are acknowledged and not kept.
    """

    def __init__(self, *, refused: str = "", forgotten: str = "") -> None:
        self._refused, self._forgotten = refused, forgotten
        self.kept: set[str] = set()

    def enrol(self, tracklet: LocalTracklet, fields: dict[str, str]) -> tuple[dict[str, Any], bool]:
        assert tracklet.files == ()
        if fields["tracklet_id"] == self._refused:
            raise ClientError("503: not now")
        if fields["tracklet_id"] != self._forgotten:
            self.kept.add(fields["tracklet_id"])
        return {}, True

    def record(self, tracklet_id: str) -> dict[str, Any] | None:
        return {} if tracklet_id in self.kept else None


NOTHING = LocalTracklet("frames", ())


@pytest.mark.parametrize(
    "other",
    [
        [[("p1", 0.5)], [("p2", 0.25)]],
        [[("p2", 0.5), ("p1", 1.0)], [("p2", 0.25)]],
        [[("p1", 0.5), ("p2", 1.001)], [("p2", 0.25)]],
        [[("p1", 0.5), ("p2", 1.0), ("p3", 2.0)], [("p2", 0.25)]],
    ],
    ids=["fewer", "order", "distance", "more"],
)
def test_answers_that_changed_are_noticed(other: list[list[tuple[str, float]]]) -> None:
    check_same(ANSWERS, ANSWERS)

    with pytest.raises(DeploymentError, match="expected the answers"):
        check_same(other, ANSWERS)


def test_only_the_status_that_is_expected_passes() -> None:
    with expecting(507):
        raise ClientError("507: the disk is full")

    with pytest.raises(DeploymentError, match="expected 507, got 503"), expecting(507):
        raise ClientError("503: not ready")
    with pytest.raises(DeploymentError, match="expected 507, got success"), expecting(507):
        pass


def test_an_enrolment_that_was_acknowledged_and_lost_is_noticed() -> None:
    service = Service(refused="w-2", forgotten="w-3")

    with Writer(service, NOTHING, "w") as writer:
        writer.wait_for(4)

    assert writer.failed == 1
    assert "w-2" not in writer.acknowledged
    with pytest.raises(DeploymentError, match=re.escape("not so ['w-3']")):
        check_stored(service, writer.acknowledged)


def test_what_must_be_gone_and_is_there_is_noticed() -> None:
    service = Service()
    service.enrol(NOTHING, {"tracklet_id": "erased"})

    check_stored(service, ["other"], there=False)
    with pytest.raises(DeploymentError, match="expected none to be stored"):
        check_stored(service, ["other", "erased"], there=False)


def test_waiting_ends() -> None:
    with pytest.raises(DeploymentError, match="expected snow within 0 s"):
        wait_for("snow", lambda: False, within_s=0)


def test_a_command_that_fails_says_what_it_printed() -> None:
    with pytest.raises(DeploymentError, match=r"status 3\nwhy"):
        run("sh", "-c", "echo why; exit 3")


def test_the_first_step_that_fails_ends_the_trial(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that cannot be tried does not."""

    def skip(_: Any) -> str:
        raise script.SkippedError("no room")

    def fail(_: Any) -> str:
        raise DeploymentError("lost")

    def never(_: Any) -> str:
        raise AssertionError("a step after the one that failed")

    monkeypatch.setattr(script, "STEPS", (skip, fail, never))

    assert script.try_all(None) is False  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["skipped", "FAILED"]


def test_make_runs_it() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")

    assert re.search(r"(?m)^test-deploy: .*\n\t\$\(BIN\)/python -m deploy\.test_deploy$", makefile)


def test_it_names_no_tool_or_path_of_one_machine() -> None:
    for path in sorted((ROOT / "deploy").rglob("*.py")):
        words = path.read_text(encoding="utf-8")
        assert not re.search(r"/(work|var/tmp|home)/|docker-host", words), path.name
