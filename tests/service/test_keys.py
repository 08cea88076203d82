"""Keys on the disk and the commands about them; a service that is not to stand open."""

import io
import json
import os
import re
import stat
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from service import server
from service.audit import Trail, files_of
from service.audit_reading import Reading, Sought
from service.cli import app, main
from service.client import ClientError, read_key
from service.errors import KeysError
from service.keys import KeyRing, create_key, read_keys, revoke_key
from service.keys_cli import _print_lines, _sentence
from service.server import check_exposure, make_first_key
from service.settings import InvalidSettingsError, Settings
from tests.service.processes import eventually, serving


def run(tmp_path: Path, *arguments: str) -> Result:
    """A command about the data directory."""
    return CliRunner().invoke(app, [*arguments, "--data-dir", str(tmp_path)])


def made(tmp_path: Path, role: str = "read", label: str = "gate", *more: str) -> str:
    """A key by the command."""
    done = run(tmp_path, "keys", "create", "--role", role, "--label", label, *more)
    assert done.exit_code == 0, done.stderr
    return done.stdout.strip()


def test_a_key_is_made_listed_and_revoked(tmp_path: Path) -> None:
    secret = made(tmp_path, "write", "gate-2", "--expires", "90")
    listed = json.loads(run(tmp_path, "keys", "list", "--json").stdout)
    revoked = run(tmp_path, "keys", "revoke", "gate-2")
    [after] = json.loads(run(tmp_path, "keys", "list", "--json").stdout)

    assert secret.startswith("passerby_")
    assert len(secret) >= 50
    assert [(one["label"], one["role"], one["state"]) for one in listed] == [
        ("gate-2", "write", "open")
    ]
    assert listed[0]["expires_at"] > listed[0]["created_at"]
    assert revoked.exit_code == 0
    assert after["state"] == "revoked"


def test_a_key_is_shown_once(tmp_path: Path) -> None:
    """Nothing that is kept, listed or told can be made into it again."""
    secret = made(tmp_path)

    shown = run(tmp_path, "keys", "list").output + run(tmp_path, "keys", "list", "--json").output
    shown += run(tmp_path, "audit").output + run(tmp_path, "audit", "--json").output
    kept = "".join(one.read_text() for one in tmp_path.rglob("*") if one.is_file())

    assert "gate" in shown
    assert secret not in shown + kept
    assert secret.removeprefix("passerby_") not in kept


def test_the_same_key_is_never_kept_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a salt of its own."""
    monkeypatch.setattr("service.keys.secrets.token_urlsafe", lambda _: "same")
    for label in "ab":
        create_key(tmp_path, "read", label)

    [one, other] = read_keys(tmp_path)
    assert one.salt != other.salt
    assert one.digest != other.digest


def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    made(tmp_path / "data")

    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "data" / "keys.json").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_makes_belongs_to_the_owner_of_the_data(tmp_path: Path) -> None:
    """Else a service that is not root could neither read its keys nor go on with its trail."""
    os.chown(tmp_path, 10001, 10001)
    made(tmp_path)

    assert {one.stat().st_uid for one in tmp_path.rglob("*")} == {10001}


def refused(tmp_path: Path, *arguments: str) -> str:
    """The one line that a refused command prints."""
    with pytest.MonkeyPatch.context() as given:
        given.setattr("sys.argv", ["passerby", *arguments, "--data-dir", str(tmp_path)])
        printed = io.StringIO()
        given.setattr("service.cli._console", Console(file=printed))
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 1
    return printed.getvalue()


LABELS = ["", "a b", "x" * 65, "ä", "a\nb", "passerby_abcdefgh"]


@pytest.mark.parametrize("label", LABELS)
def test_a_label_is_a_word_and_no_key(tmp_path: Path, label: str) -> None:
    told = refused(tmp_path, "keys", "create", "--role", "read", "--label", label)

    assert told.startswith("passerby: expected a label")
    assert not label or label not in told
    assert read_keys(tmp_path) == ()


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("words", [("list",), ("list", "--json"), ("revoke", "gate")])
def test_a_mistyped_data_directory_is_not_taken_for_one_without_keys(
    tmp_path: Path, words: Sequence[str], *, is_there: bool
) -> None:
    mistyped = tmp_path / "dtaa"
    if is_there:
        mistyped.mkdir()

    told = refused(mistyped, "keys", *words)

    assert told == f"passerby: expected the data directory of a service, got none at {mistyped}\n"
    assert list(tmp_path.rglob("*")) == [mistyped] * is_there


def test_a_service_without_keys_has_an_empty_list(tmp_path: Path) -> None:
    Trail(tmp_path / "audit").close()

    assert run(tmp_path, "keys", "list", "--json").stdout == "[]\n"
    assert "that is not revoked" in refused(tmp_path, "keys", "revoke", "gate")


def test_a_label_has_one_key_that_opens(tmp_path: Path) -> None:
    """The trail says labels; one that is revoked may have a successor."""
    made(tmp_path)
    told = refused(tmp_path, "keys", "create", "--role", "read", "--label", "gate")
    run(tmp_path, "keys", "revoke", "gate")
    made(tmp_path)

    assert "revoke that key first" in told
    assert len({key.key_id for key in read_keys(tmp_path)}) == 2


def test_a_key_that_somebody_names_by_itself_is_not_repeated(tmp_path: Path) -> None:
    secret = made(tmp_path)

    told = refused(tmp_path, "keys", "revoke", secret)

    assert secret not in told
    assert secret not in run(tmp_path, "audit", "--json").output


def test_an_unknown_key_cannot_be_revoked_and_one_only_once(tmp_path: Path) -> None:
    made(tmp_path)
    run(tmp_path, "keys", "revoke", "gate")

    for name in ("gate", "other"):
        with pytest.raises(KeysError, match="that is not revoked"):
            revoke_key(tmp_path, name)


@pytest.mark.parametrize("days", [0, -1, float("nan"), float("inf"), 36501])
def test_a_key_expires_after_some_days_or_never(tmp_path: Path, days: float) -> None:
    with pytest.raises(KeysError, match="expected days"):
        create_key(tmp_path, "read", "a", days)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff", b'{"version": 2, "keys": []}', b'{"version": 1, "keys": [{}]}',
     b'{"version": 1, "keys": 3}', b"[" * 100_000],
)  # fmt: skip
def test_a_damaged_file_of_keys_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    """Neither opened to all nor begun anew: somebody's keys are in it."""
    (tmp_path / "keys.json").write_bytes(content)

    for attempt in (lambda: KeyRing(tmp_path), lambda: create_key(tmp_path, "read", "a")):
        with pytest.raises(KeysError, match=r"keys\.json"):
            attempt()
    assert (tmp_path / "keys.json").read_bytes() == content


def test_keys_made_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: create_key(tmp_path, "read", f"k{n}"), range(16)))

    assert {key.label for key in read_keys(tmp_path)} == {f"k{n}" for n in range(16)}
    assert {one.name for one in tmp_path.iterdir()} == {"keys.json", "keys.lock"}


def test_a_key_that_cannot_be_written_down_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    create_key(tmp_path, "read", "a")
    monkeypatch.setattr("service.keys.os.fsync", fail)

    with pytest.raises(KeysError, match="No space left"):
        create_key(tmp_path, "read", "b")
    assert [key.label for key in read_keys(tmp_path)] == ["a"]


EMPTY = '{"version": 1, "keys": []}'


def test_an_emptied_file_of_keys_is_no_open_door(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It makes no first key either: who can empty it must not be handed one. The log says so."""
    (tmp_path / "keys.json").write_text(EMPTY)

    assert first_keys(Settings(data_dir=tmp_path, first_key=True), capsys) == []
    assert KeyRing(tmp_path).is_closed
    assert (tmp_path / "keys.json").read_text() == EMPTY
    assert "`passerby keys create --role admin --label NAME`" in caplog.text


def test_a_service_whose_last_key_was_taken_opens_to_the_next_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing(tmp_path)
    created, _ = create_key(tmp_path, "admin", "first")
    ring.refresh()
    revoke_key(tmp_path, created.key_id)
    ring.refresh()
    told = caplog.text
    secret = made(tmp_path, "admin", "desk")
    ring.refresh()

    assert told.count("nobody can use this service") == 1
    assert caplog.text == told
    assert ring.find(secret.encode()) is not None


def test_who_has_keys_of_the_settings_is_not_told_that_nobody_can_come_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "keys.json").write_text(EMPTY)

    assert KeyRing(tmp_path, Settings(api_keys=("mine",)).api_keys).is_closed
    assert caplog.text == ""


def test_the_trail_tells_of_keys(tmp_path: Path) -> None:
    made(tmp_path)
    run(tmp_path, "keys", "revoke", "gate")

    told = Reading(tmp_path).lines(Sought())

    by = f"command of user {os.getuid()}"
    assert [
        (one["action"], one["by"], one["about"], one["about_role"], one["outcome"]) for one in told
    ] == [
        ("create-key", by, "gate", "read", "done"), ("revoke-key", by, "gate", "read", "done")
    ]  # fmt: skip


def test_the_audit_command_prints_lines_and_json(tmp_path: Path) -> None:
    trail = Trail(tmp_path / "audit")
    trail.append(
        {"id": "1", "action": "query", "key": "gate", "best_identity": "p1", "status": 200}
    )
    trail.append({"id": "2", "action": "enrol", "key": "desk", "address": "10.0.0.9"})
    trail.close()

    shown = run(tmp_path, "audit").stdout
    asked = run(tmp_path, "audit", "--json", "--identity", "p1", "--label", "gate")
    [line] = [json.loads(one) for one in asked.stdout.splitlines()]

    assert re.search("gate: query 200; found #[0-9a-f]{8}…\n", shown)
    assert "desk: enrol cut off; from 10.0.0.9\n" in shown  # what was begun and has no end
    assert (line["best_identity"], line["status"]) == ("p1", 200)
    for option, value in (
        ("--since", "2999-01-01"),
        ("--action", "merge"),
        ("--until", "2020-01-01"),
    ):
        assert run(tmp_path, "audit", "--json", option, value).stdout == ""


ACTS: Sequence[dict[str, Any]] = [
    {"id": "1", "action": "query", "key": "reception-desk-2", "address": "2001:db8::8a2e:370:7334",
     "best_tracklet": "t1", "best_identity": "p17", "decision": "match", "status": 200},
    {"id": "2", "action": "assign-tracklets", "key": "desk", "identity": "p4", "status": 200,
     "tracklets": [f"t{number}" for number in range(30)]},
    {"action": "erase-expired", "by": "retention", "tracklets": ["t8"], "outcome": "done"},
]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_trail_can_be_read_on_a_terminal_of_any_width(width: int) -> None:
    """Nothing is cut off, words are whole, and the time stands alone at the left."""
    acts = [{"time": "2026-11-22T12:00:00.000Z", **act} for act in ACTS]
    printed = io.StringIO()

    _print_lines(acts, Console(file=printed, width=width, force_terminal=True, color_system=None))

    rows = printed.getvalue().splitlines()
    words = "".join(row[21:].rstrip() + " " for row in rows).split()
    assert max(map(len, rows)) <= width
    assert {row[:21] for row in rows} <= {"2026-11-22 12:00:00  ", " " * 21}
    assert " ".join(words) == " ".join(map(_sentence, ACTS))
    assert "reception-desk-2:" in words
    assert "on p4, t0, t1" in " ".join(words)
    assert "t8 and 21 more" in " ".join(words)


def test_in_a_pipe_an_act_is_a_line_and_a_label_no_picture(tmp_path: Path) -> None:
    trail = Trail(tmp_path / "audit")
    for act in [*ACTS, {"action": "query", "key": ":key:", "status": 200}]:
        trail.append(act)
    trail.close()

    shown = run(tmp_path, "audit").stdout.splitlines()

    assert len(shown) == 4
    assert all(re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d  \S", line) for line in shown)
    assert shown[2].split("  ")[1].startswith("(retention): erase-expired done; on #")
    assert shown[3].endswith("  :key:: query 200")


def test_an_odd_time_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "audit", "--since", "yesterday")

    assert done.exit_code == 2
    assert "expected a time" in done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_a_service_of_this_machine_alone_needs_no_key(host: str) -> None:
    check_exposure(Settings(host=host), KeyRing())


OUTSIDE = ["0.0.0.0", "::", "", "10.0.0.7", "passerby.example", "::ffff:10.0.0.7"]  # noqa: S104


@pytest.mark.parametrize("host", OUTSIDE)
def test_a_service_of_a_network_needs_a_key_or_a_word(host: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettingsError, match="--insecure"):
        check_exposure(Settings(host=host), KeyRing(tmp_path))

    check_exposure(Settings(host=host, insecure=True), KeyRing(tmp_path))
    check_exposure(Settings(host=host, first_key=True), KeyRing(tmp_path))
    create_key(tmp_path, "read", "a")
    check_exposure(Settings(host=host), KeyRing(tmp_path))
    revoke_key(tmp_path, "a")
    check_exposure(Settings(host=host), KeyRing(tmp_path))  # nobody can do anything


def test_serve_refuses_before_it_loads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: Settings) -> None:
        raise AssertionError("it went on")

    monkeypatch.setattr(server, "load_embedder", load)

    with pytest.raises(InvalidSettingsError, match="expected a key"):
        server.run(Settings(host="0.0.0.0", data_dir=tmp_path))  # noqa: S104


def first_keys(settings: Settings, capsys: pytest.CaptureFixture[str]) -> Sequence[str]:
    """The keys that a start prints."""
    ring = KeyRing(settings.data_dir, settings.api_keys)
    make_first_key(settings, ring, None)
    return [word for word in capsys.readouterr().out.split() if word.startswith("passerby_")]


def test_the_trail_says_what_the_first_key_may_do(tmp_path: Path) -> None:
    trail = Trail(tmp_path / "audit")
    make_first_key(Settings(data_dir=tmp_path, first_key=True), KeyRing(tmp_path), trail)

    [file] = files_of(tmp_path / "audit")
    line = json.loads(file.read_text())
    assert (line["by"], line["about_role"], line["outcome"]) == ("first start", "admin", "done")
    assert line["id"]


def test_the_first_key_is_made_and_printed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(data_dir=tmp_path, first_key=True)

    [secret] = first_keys(settings, capsys)
    again = first_keys(settings, capsys)
    revoke_key(tmp_path, "first")
    after = first_keys(settings, capsys)

    assert again == after == []
    assert [(key.label, key.role) for key in read_keys(tmp_path)] == [("first", "admin")]
    found = KeyRing(tmp_path).find(secret.encode())
    assert found is not None
    assert secret not in caplog.text


def test_who_brings_keys_gets_no_first_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {"api_keys": ("mine",), "first_key": True}

    assert first_keys(Settings(data_dir=tmp_path, **given), capsys) == []
    assert first_keys(Settings(data_dir=tmp_path), capsys) == []
    assert not (tmp_path / "keys.json").exists()


@pytest.mark.parametrize("content", ["one two", "one\ntwo\n", "ä", "a\x00b", "", "\n"])
def test_a_key_file_holds_one_key(tmp_path: Path, content: str) -> None:
    """Anything else would be a header of another kind."""
    path = tmp_path / "key"
    path.write_text(content, encoding="utf-8")

    with pytest.raises(ClientError, match="expected one key alone"):
        read_key(path)

    path.write_text("passerby_abc\n", encoding="utf-8")
    assert read_key(path) == "passerby_abc"


def test_a_running_service_follows_the_commands(tmp_path: Path) -> None:
    """From an open service to a closed one, a key that opens, and its end."""
    with serving(tmp_path) as service:

        def status(secret: str) -> int:
            headers = {"Authorization": f"Bearer {secret}"}
            return httpx.get(f"{service.address}/gallery", headers=headers).status_code

        assert status("none") == 200
        secret = made(tmp_path / "data", "read", "gate")
        assert eventually(lambda: status("none") == 401)
        assert status(secret) == 200
        run(tmp_path / "data", "keys", "revoke", "gate")
        assert eventually(lambda: status(secret) == 401)
        assert service.readiness() == 200

    told = [one["action"] for one in Reading(tmp_path / "data").lines(Sought())]
    assert {"create-key", "list-tracklets", "revoke-key"} <= set(told)
    assert secret not in service.log()


@pytest.mark.parametrize("output", ["full", "none"])
def test_a_first_key_that_cannot_be_printed_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    settings = Settings(data_dir=tmp_path, first_key=True)
    # Closed, it tries once more what it could not write.
    with suppress(OSError), Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full if output == "full" else None)
        with pytest.raises(KeysError, match="keys create --role admin"):
            make_first_key(settings, KeyRing(tmp_path), None)
        monkeypatch.undo()

    assert [key.state(datetime.now(UTC)) for key in read_keys(tmp_path)] == ["revoked"]
