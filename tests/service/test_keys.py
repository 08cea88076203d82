"""Keys on the disk and the commands about them; a service that is not to stand open."""

import io
import json
import os
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
from typer.testing import CliRunner, Result

from service import server
from service.audit import Trail
from service.audit_reading import Reading, Sought
from service.cli import app, main
from service.client import ClientError, read_key
from service.errors import KeysError
from service.keys import KeyRing, create_key, read_keys, revoke_key
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
        given.setattr("service.cli._console.file", printed)
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


def test_an_emptied_file_of_keys_is_no_open_door(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('{"version": 1, "keys": []}')

    assert KeyRing(tmp_path).is_closed


def test_the_trail_tells_of_keys(tmp_path: Path) -> None:
    made(tmp_path)
    run(tmp_path, "keys", "revoke", "gate")

    told = Reading(tmp_path).lines(Sought())

    by = f"command of user {os.getuid()}"
    assert [(one["action"], one["by"], one["about"]) for one in told] == [
        ("create-key", by, "gate"), ("revoke-key", by, "gate")
    ]  # fmt: skip


def test_the_audit_command_prints_a_table_and_json(tmp_path: Path) -> None:
    trail = Trail(tmp_path / "audit")
    trail.append(
        {"id": "1", "action": "query", "key": "gate", "best_identity": "p1", "status": 200}
    )
    trail.append({"id": "2", "action": "enrol", "key": "desk", "address": "10.0.0.9"})
    trail.close()

    table = run(tmp_path, "audit").stdout
    asked = run(tmp_path, "audit", "--json", "--identity", "p1", "--label", "gate")
    [line] = [json.loads(one) for one in asked.stdout.splitlines()]

    assert "query" in table
    assert "cut off" in table  # what was begun and has no end
    assert (line["best_identity"], line["status"]) == ("p1", 200)
    for option, value in (
        ("--since", "2999-01-01"),
        ("--action", "merge"),
        ("--until", "2020-01-01"),
    ):
        assert run(tmp_path, "audit", "--json", option, value).stdout == ""


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
