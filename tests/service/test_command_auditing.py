"""Commands on a data directory are acts, too: the audit trail tells of them, or they do nothing."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from index.archive import SnapshotError
from index.embedded import EmbeddedGallery
from index.gallery import GalleryError, GalleryUnavailableError
from index.ledger import LedgerError
from model.checkpoint import untrained_checkpoint
from service import command_auditing
from service.audit import files_of
from service.audit_reading import Reading, Sought
from service.cli import app, main
from service.clusters import ClusterError
from service.command_auditing import telling
from service.errors import AuditError, KeysError
from service.settings import InvalidSettingsError
from tests.index.conftest import make_enrolment
from tests.service.processes import ROOT, serving

Line = dict[str, Any]
BY = f"command of user {os.getuid()}"


@pytest.fixture(autouse=True)
def nobody_by_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests."""
    monkeypatch.delenv("SUDO_USER", raising=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed gallery of three tracklets of two people, to be copied."""
    made = tmp_path_factory.mktemp("made")
    model = untrained_checkpoint().fingerprint
    with EmbeddedGallery(made) as gallery:
        gallery.add(
            [
                make_enrolment(name, [row, 1], identity=f"person-{row // 2}", model=model)
                for row, name in enumerate(["first", "second", "third"])
            ]
        )
    return made


@pytest.fixture
def data_dir(made: Path, tmp_path: Path) -> Path:
    """The data directory of a gallery of three tracklets of two people; no trail is there yet."""
    return shutil.copytree(made, tmp_path / "data")


def passerby(*words: str | Path) -> str:
    """What a command prints; its error, where it has one."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def told(data_dir: Path, **sought: Any) -> list[Line]:
    """What the trail says of commands, without what is another each time."""
    lines = Reading(data_dir).lines(Sought(by="command", **sought))
    for line in lines:
        assert line.pop("by") == BY
        assert len(line.pop("id")) == 16
        del line["time"]
        line.pop("user", None)
    return lines


def test_every_command_that_reads_people_out_or_changes_something_is_told(
    data_dir: Path, tmp_path: Path
) -> None:
    to, model = ("--data-dir", data_dir), untrained_checkpoint().fingerprint
    saved, people = tmp_path / "saved", tmp_path / "people"
    passerby("snapshot", saved, *to)
    passerby("export-gallery", people, "--strips", *to)
    passerby("ledger", tmp_path / "ledger.json", *to)
    passerby("reembed", "--weights", "untrained", "--device", "cpu", *to)
    passerby("reembed", "--weights", "untrained", "--abandon", *to)
    passerby("erase-tracklet", "first", *to)
    passerby("restore", saved, "--weights", "untrained", "--replace", *to)
    passerby("import-gallery", people, *to)
    key = json.loads(passerby("keys", "list", "--json", *to) or "[]")
    passerby("keys", "create", "--role", "write", "--label", "gate", *to)
    passerby("keys", "revoke", "gate", *to)
    passerby("check-snapshot", saved)  # looks at nobody's data directory
    passerby("audit", *to)

    lines = told(data_dir)

    about = lines[-1].pop("about_id")
    assert lines[-2].pop("about_id") == about
    assert key == []
    assert lines == [
        {"action": "snapshot", "count": 3, "outcome": "done"},
        {"action": "export-gallery", "strips": True, "count": 3, "outcome": "done"},
        {"action": "ledger", "count": 0, "outcome": "done"},
        {"action": "reembed", "model": model, "count": 3, "outcome": "done"},
        {"action": "abandon-reembedding", "outcome": "done"},
        {"action": "erase-tracklet", "tracklet": lines[5]["tracklet"],
         "identity": "person-0", "outcome": "done"},
        {"action": "restore", "count": 2, "erased": 1, "outcome": "done"},
        {"action": "import-gallery", "count": 0, "erased": 0, "outcome": "done"},
        {"action": "create-key", "about": "gate", "about_role": "write", "outcome": "done"},
        {"action": "revoke-key", "about": "gate", "about_role": "write", "outcome": "done"},
    ]  # fmt: skip


def test_a_calibration_and_a_clustering_are_told(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Found:
        tracklets, threshold = 3, 1.5

    def calibrate(*_: object) -> tuple[Found, None]:
        return Found(), None

    monkeypatch.setattr("service.gallery_cli.calibrate_gallery", calibrate)
    monkeypatch.setattr("service.gallery_cli.report", lambda *_, **__: None)
    monkeypatch.setattr("service.gallery_cli.write_calibration", lambda *_: None)
    to = ("--data-dir", data_dir)
    passerby("calibrate", *to)
    passerby("calibrate", "--no-store", *to)
    passerby("cluster", "--distance", "1", "--output", tmp_path / "groups.json", *to)

    assert told(data_dir) == [
        {"action": "calibrate", "count": 3, "threshold": 1.5, "outcome": "done"},
        {"action": "calibrate", "count": 3, "outcome": "done"},
        {"action": "cluster", "strips": False, "count": 0, "groups": 0, "outcome": "done"},
    ]


def test_a_calibration_of_a_folder_alone_is_nobodys_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="nowhere"):
        passerby("calibrate", "--folder", tmp_path / "nowhere", "--weights", "untrained")

    assert list(tmp_path.iterdir()) == []


REFUSED: Sequence[tuple[Sequence[str], type[Exception]]] = [
    (("snapshot", "{taken}"), SnapshotError),
    (("restore", "{taken}", "--any-model"), SnapshotError),
    (("export-gallery", "{taken}"), GalleryError),
    (("import-gallery", "{taken}"), GalleryError),
    (("ledger", "{taken}/below"), LedgerError),
    (("erase-tracklet", "nobody"), GalleryError),
    (("calibrate",), GalleryError),
    (("cluster",), ClusterError),
    (("reembed", "--weights", "bundled", "--device", "cpu"), GalleryError),
    (("keys", "create", "--role", "read", "--label", "a label"), KeysError),
    (("keys", "revoke", "nobody"), KeysError),
]


@pytest.mark.parametrize(
    ("words", "error"), REFUSED, ids=[" ".join(words[:2]) for words, _ in REFUSED]
)
def test_what_was_refused_is_told_without_its_words(
    data_dir: Path, tmp_path: Path, words: Sequence[str], error: type[Exception]
) -> None:
    """A message may name somebody, or be a key that was taken for a label."""
    taken = tmp_path / "taken"
    taken.write_text("something")

    with pytest.raises(error) as raised:
        passerby(*(word.format(taken=taken) for word in words), "--data-dir", data_dir)

    [line] = told(data_dir)
    assert line["outcome"] == "refused"
    assert line["error"] == raised.type.__name__
    raw = "".join(one.read_text() for one in files_of(data_dir / "audit"))
    assert "nobody" not in raw
    assert "a label" not in raw


def test_a_mistake_of_ours_and_an_interruption_are_told_as_failures(data_dir: Path) -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), telling(data_dir, "snapshot"):
            raise error

    with pytest.raises(KeysError), telling(data_dir, "create-key"):
        raise KeysError("cannot write keys.json") from OSError(errno.ENOSPC, "no room")

    ended = [(one["outcome"], one["error"]) for one in told(data_dir)]
    assert ended == [
        ("failed", "RuntimeError"),
        ("failed", "KeyboardInterrupt"),
        ("failed", "KeysError"),
    ]


KILLED = """
import os, signal, sys
from pathlib import Path
from service.command_auditing import telling

with telling(Path(sys.argv[1]), "restore"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_command_that_was_killed_is_told_to_have_begun(data_dir: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, data_dir], cwd=ROOT, check=False)

    assert done.returncode == -signal.SIGKILL
    assert told(data_dir) == [{"action": "restore"}]
    assert "restore cut off" in passerby("audit", "--data-dir", data_dir)


def test_whom_a_command_was_about_stands_there_as_a_hash(data_dir: Path) -> None:
    passerby("erase-tracklet", "third", "--data-dir", data_dir)

    raw = "".join(one.read_text() for one in files_of(data_dir / "audit"))
    assert "third" not in raw
    assert "person" not in raw
    assert [one["tracklet"] for one in told(data_dir, tracklet="third")] == ["third"]
    assert [one["identity"] for one in told(data_dir, identity="person-1")] == ["person-1"]


def test_who_gave_a_command_cannot_be_taken_for_a_key(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_USER", "ada")
    monkeypatch.setattr("service.command_auditing.os.getuid", lambda: 0)
    with telling(data_dir, "snapshot"):
        pass

    [line] = Reading(data_dir).lines(Sought(by="command"))
    assert not {"key", "key_id", "role"} & line.keys()
    assert (line["by"], line["user"], line["sudo_user"]) == ("command of user 0", "root", "ada")
    assert Reading(data_dir).lines(Sought(label=line["by"])) == []
    with pytest.raises(KeysError, match="expected a label"):
        passerby("keys", "create", "--role", "read", "--label", line["by"], "--data-dir", data_dir)


SECRET = [
    ("snapshot", "{new}"),
    ("export-gallery", "{new}"),
    ("ledger", "{new}"),
    ("cluster", "--output", "{new}", "--distance", "1"),
    ("erase-tracklet", "first"),
    ("reembed", "--weights", "bundled", "--device", "cpu"),
    ("keys", "create", "--role", "admin", "--label", "gate"),
    ("keys", "revoke", "desk"),
]


@pytest.mark.parametrize("words", SECRET, ids=lambda one: " ".join(one[:2]))
@pytest.mark.parametrize("is_full", [True, False])
def test_a_command_does_nothing_where_the_trail_cannot_say_so(
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: Sequence[str],
    *,
    is_full: bool,
) -> None:
    passerby("keys", "create", "--role", "read", "--label", "desk", "--data-dir", data_dir)
    kept = {one: one.read_bytes() for one in data_dir.glob("*.json")}
    if is_full:
        monkeypatch.setattr("service.audit.os", _FullDisk())
    else:
        (data_dir / "audit").rename(tmp_path / "aside")
        (data_dir / "audit").write_text("a file")

    with pytest.raises(AuditError, match="nothing is done that it could not tell of"):
        passerby(*(word.format(new=tmp_path / "new") for word in words), "--data-dir", data_dir)

    assert not (tmp_path / "new").exists()
    assert {one: one.read_bytes() for one in data_dir.glob("*.json")} == kept
    with EmbeddedGallery(data_dir) as gallery:
        assert gallery.counts().tracklets == 3


class _FullDisk:
    """Stands in for the trail's `os`."""

    def write(self, _: int, __: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def test_a_command_that_the_trail_cannot_say_the_end_of_says_that(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The snapshot has filled the disk, say."""
    real = command_auditing.Deed.end

    def end(self: command_auditing.Deed) -> None:
        monkeypatch.setattr("service.audit.os", _FullDisk())
        real(self)

    monkeypatch.setattr(command_auditing.Deed, "end", end)
    with pytest.raises(AuditError, match=r"snapshot is done, but .* the disk is full"):
        passerby("snapshot", tmp_path / "saved", "--data-dir", data_dir)
    monkeypatch.undo()

    assert (tmp_path / "saved").exists()
    assert told(data_dir) == [{"action": "snapshot"}]


def test_commands_tell_nothing_where_the_service_has_no_trail(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASSERBY_AUDIT__ENABLED", "false")
    passerby("snapshot", tmp_path / "saved", "--data-dir", data_dir)
    passerby("keys", "create", "--role", "read", "--label", "gate", "--data-dir", data_dir)

    assert not (data_dir / "audit").exists()


def test_an_odd_setting_of_the_trail_does_not_pass_for_none(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASSERBY_AUDIT__ENABLED", "perhaps")

    with pytest.raises(InvalidSettingsError, match="PASSERBY_AUDIT__ENABLED"):
        passerby("snapshot", tmp_path / "saved", "--data-dir", data_dir)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("words", [one for one, _ in REFUSED], ids=lambda one: " ".join(one[:2]))
def test_nothing_is_made_in_a_directory_that_is_no_data_directory(
    tmp_path: Path, words: Sequence[str], *, is_there: bool
) -> None:
    """A mistyped one; where something was refused, that is."""
    (tmp_path / "taken").write_text("something")
    if is_there:
        (tmp_path / "mine").mkdir()

    with pytest.raises(Exception, match=r"expected|cannot read"):
        passerby(
            *(word.format(taken=tmp_path / "taken") for word in words),
            *("--data-dir", tmp_path / "mine"),
        )

    assert sorted(one.name for one in tmp_path.iterdir()) == (["mine"] * is_there) + ["taken"]
    assert not list(tmp_path.glob("mine/*"))


def test_the_trail_of_a_new_directory_begins_with_what_made_it(
    data_dir: Path, tmp_path: Path
) -> None:
    passerby("snapshot", tmp_path / "saved", "--data-dir", data_dir)
    new = tmp_path / "new"
    passerby("restore", tmp_path / "saved", "--any-model", "--data-dir", new)

    assert told(new) == [{"action": "restore", "count": 3, "erased": 0, "outcome": "done"}]


@pytest.mark.slow
def test_commands_tell_the_trail_beside_a_running_service(tmp_path: Path) -> None:
    settings = {"AUDIT__FILE_BYTES": "65536", "AUDIT__FILES": "99"}
    with serving(tmp_path, settings) as service:
        for number in range(3):
            httpx.get(f"{service.address}/gallery")
            passerby("snapshot", tmp_path / f"{number}", "--data-dir", tmp_path / "data")
        with pytest.raises(GalleryUnavailableError, match="already open"):
            passerby("restore", tmp_path / "0", "--any-model", "--replace", "--data-dir",
                     tmp_path / "data")  # fmt: skip
        httpx.get(f"{service.address}/gallery")
        assert service.readiness() == 200

    acts = [(one["action"], one.get("status", one.get("outcome")))
            for one in Reading(tmp_path / "data").lines(Sought())]  # fmt: skip
    assert acts == [
        *[("list-tracklets", 200), ("snapshot", "done")] * 3,
        ("restore", "refused"),
        ("list-tracklets", 200),
    ]


def test_a_refusal_is_one_line(data_dir: Path, tmp_path: Path) -> None:
    (data_dir / "audit").write_text("a file")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as given:
        words = ["passerby", "snapshot", str(tmp_path / "new"), "--data-dir", str(data_dir)]
        given.setattr("sys.argv", words)
        given.setattr("service.cli._console", Console(file=printed))
        with pytest.raises(SystemExit) as ended:
            main()

    assert ended.value.code == 1
    assert printed.getvalue() == (
        "passerby: cannot open the audit trail: File exists; nothing is done that it could not "
        "tell of\n"
    )


def commands(group: Any) -> Iterator[Any]:
    """All commands, those of groups, too."""
    for one in group.commands.values():
        yield from commands(one) if hasattr(one, "commands") else (one,)


def test_every_command_on_a_data_directory_says_so_and_whether_the_service_may_run() -> None:
    found = [
        one
        for one in commands(typer.main.get_command(app))
        if "--data-dir" in {option for parameter in one.params for option in parameter.opts}
    ]

    assert len(found) >= 12
    for one in found:
        said = " ".join((one.help or "").split())
        assert "data directory" in said, one.name
        assert re.search("service may run|top the service first", said), one.name
        [option] = [parameter for parameter in one.params if "--data-dir" in parameter.opts]
        assert "ata directory" in option.help, one.name
        assert option.envvar == "PASSERBY_DATA_DIR", one.name
