"""The audit trail: what it says, that nothing happens without it, and that it names nobody."""

import errno
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from index.embedded import EmbeddedGallery
from index.gallery import StorageFullError, TrackletRecord
from service import audit as audit_module
from service.app import create_app
from service.audit import Pseudonyms, Trail, files_of
from service.audit_reading import Reading, Sought
from service.cli import app
from service.errors import AuditError, AuditUnavailableError
from service.keys import KeyRing, create_key
from service.settings import Settings
from tests.service.conftest import FakeEmbedder, assert_problem, enrol
from tests.service.making import GOOD, GREEN, clip_of

Line = dict[str, Any]
# The gallery lies beside the trail, as in a data directory: it is what knows the names.
DATA = "gallery"


@pytest.fixture
def trail(tmp_path: Path, gallery: EmbeddedGallery) -> Iterator[Trail]:
    """The trail of a service; the app closes it."""
    del gallery
    opened = Trail(tmp_path / DATA / "audit")
    yield opened
    opened.close()


@pytest.fixture
def audited(
    embedder: FakeEmbedder, gallery: EmbeddedGallery, trail: Trail, tmp_path: Path
) -> Iterator[TestClient]:
    """A client of a service with a trail, with the key "gate" of an admin."""
    _, secret = create_key(tmp_path / DATA, "admin", "gate")
    ring = KeyRing(tmp_path / DATA)
    made = create_app(embedder, gallery, Settings(threshold=5), keys=ring, trail=trail)
    with TestClient(made, headers={"X-API-Key": secret}, client=("10.1.2.3", 4)) as client:
        yield client


def lines(tmp_path: Path, **sought: Any) -> list[Line]:
    """What `passerby audit` reads."""
    return Reading(tmp_path / DATA).lines(Sought(**sought))


def raw(tmp_path: Path) -> str:
    """All that is in the trail's files."""
    return "".join(one.read_text() for one in files_of(tmp_path / DATA / "audit"))


def test_a_search_is_told_with_who_what_whom_when_from_where_and_the_outcome(
    audited: TestClient, tmp_path: Path
) -> None:
    enrol(audited, tracklet_id="t1", identity="p17")
    audited.post("/query", files=GOOD, headers={"X-Request-ID": "r1"})

    [line] = lines(tmp_path, action="query")

    assert len(line.pop("id")) == 16
    assert len(line.pop("key_id")) == 8
    assert datetime.now(UTC) - datetime.fromisoformat(line.pop("time")) < timedelta(minutes=1)
    assert line == {
        "action": "query",
        "key": "gate",
        "role": "admin",
        "address": "10.1.2.3",
        "request_id": "r1",
        "best_tracklet": "t1",
        "best_identity": "p17",
        "count": 1,
        "decision": "match",
        "status": 200,
    }


def test_every_act_is_told(audited: TestClient, tmp_path: Path) -> None:
    enrol(audited, tracklet_id="t1", identity="p1")
    enrol(audited, clip_of(GREEN), tracklet_id="t2")
    audited.get("/gallery", params={"identity": "p1"})
    audited.get("/gallery/t1")
    audited.get("/gallery/t1/strip.jpg")
    audited.get("/gallery/t1/matches")
    audited.patch("/gallery/t2", json={"identity": "p2"})
    audited.get("/identities")
    audited.get("/identities/p2")
    audited.patch("/identities/p2", json={"identity": "p3"})
    audited.post("/identities/p4/tracklets", json={"tracklet_ids": ["t1"]})
    audited.post("/identities/p4/merge", json={"into": "p3"})
    audited.post("/embed", files=GOOD)
    audited.post("/verify", files=[(f"{s}_{n}", f) for s in "ab" for n, f in GOOD])
    audited.delete("/gallery/t2")
    audited.delete("/identities/p3")

    pseudonyms = Pseudonyms(audit_module.read_salt(tmp_path / DATA / "audit"))
    told = [
        [one["action"], *(one.get(f) for f in ("tracklet", "identity", "into")), one["status"]]
        for one in lines(tmp_path)
        if "id" in one
    ]

    def t(number: int) -> str:
        return pseudonyms.of("tracklet", f"t{number}")

    def p(number: int) -> str:
        return pseudonyms.of("identity", f"p{number}")

    assert told == [  # with hashes: in the end the gallery knows nobody any more
        ["enrol", t(1), p(1), None, 201],
        ["enrol", t(2), None, None, 201],
        ["list-tracklets", None, p(1), None, 200],
        ["read-tracklet", t(1), p(1), None, 200],
        ["look-at-tracklet", t(1), None, None, 200],
        ["match-tracklet", t(1), None, None, 200],
        ["change-tracklet", t(2), None, p(2), 200],
        ["list-identities", None, None, None, 200],
        ["read-identity", None, p(2), None, 200],
        ["rename-identity", None, p(2), p(3), 200],
        ["assign-tracklets", None, p(4), None, 200],
        ["merge-identity", None, p(4), p(3), 200],
        ["embed", None, None, None, 200],
        ["verify", None, None, None, 200],
        ["erase-tracklet", t(2), p(3), None, 204],
        ["erase-identity", None, p(3), None, 200],
    ]
    assert lines(tmp_path, action="erase-identity", tracklet="t1")


def test_what_says_nothing_of_anybody_is_left_out(audited: TestClient, tmp_path: Path) -> None:
    for path in ("/livez", "/readyz", "/info", "/metrics", "/docs", "/openapi.json", "/nowhere"):
        audited.get(path)
    audited.get("/gallery", headers={"X-API-Key": "wrong"})

    assert raw(tmp_path) == ""


def test_what_was_refused_is_told_with_its_status(audited: TestClient, tmp_path: Path) -> None:
    """A key that tries what it may not, above all."""
    _, secret = create_key(tmp_path / DATA, "read", "kiosk")
    audited.app.state.keys.refresh()  # type: ignore[attr-defined]

    audited.delete("/identities/p1", headers={"X-API-Key": secret})
    audited.get("/gallery/unknown")
    audited.post("/query", files=[("frames", ("0.jpg", b"no image"))])

    told = [(one["key"], one["action"], one["status"]) for one in lines(tmp_path)]
    assert told == [
        ("kiosk", "erase-identity", 403), ("gate", "read-tracklet", 404), ("gate", "query", 415)
    ]  # fmt: skip


def test_what_a_role_did_not_reach_is_told_with_whom_it_was_about(
    audited: TestClient, tmp_path: Path
) -> None:
    _, secret = create_key(tmp_path / DATA, "read", "reader")
    audited.app.state.keys.refresh()  # type: ignore[attr-defined]
    enrol(audited, tracklet_id="t1", identity="p1")

    for path in ("/gallery/t1", "/identities/p1"):
        assert audited.delete(path, headers={"X-API-Key": secret}).status_code == 403

    assert [one["status"] for one in lines(tmp_path, tracklet="t1", label="reader")] == [403]
    assert [one["status"] for one in lines(tmp_path, identity="p1", label="reader")] == [403]


def test_a_trail_whose_file_was_removed_takes_no_line_and_is_told_of(trail: Trail) -> None:
    trail.append({"action": "query"})
    for one in files_of(trail._directory):
        one.unlink()

    with pytest.raises(AuditUnavailableError, match="was removed"):
        trail.check()
    with pytest.raises(AuditUnavailableError, match="was removed"):
        trail.append({"action": "query"})


def test_what_a_client_calls_itself_is_no_address_and_no_markup(
    audited: TestClient, tmp_path: Path
) -> None:
    """Behind a proxy that is believed, and passes on whatever it got."""
    headers = dict(audited.headers)
    TestClient(audited.app, headers=headers, client=("[/foo]x", 4)).get("/gallery")

    [line] = lines(tmp_path, action="list-tracklets")
    assert line.get("address") is None
    done = CliRunner().invoke(app, ["audit", "--data-dir", str(tmp_path / DATA)])
    assert done.exit_code == 0


def test_no_name_no_image_no_vector_and_no_key_is_in_its_files(
    audited: TestClient, tmp_path: Path
) -> None:
    enrol(audited, tracklet_id="tracklet-1", identity="person-17", metadata='{"gate": "west"}')
    audited.post("/query", files=GOOD)
    audited.get("/gallery/tracklet-1")
    audited.patch("/identities/person-17", json={"identity": "person-18"})
    audited.get("/gallery/..%2f..%2fperson-17")

    content = raw(tmp_path)
    fields = {field for line in content.splitlines() for field in json.loads(line)}

    for secret in ("tracklet-1", "person-1", "west", audited.headers["X-API-Key"]):
        assert secret not in content
    assert fields <= {
        "time", "id", "action", "key", "key_id", "role", "address", "request_id", "tracklet",
        "identity", "into", "best_tracklet", "best_identity", "count", "decision", "status",
    }  # fmt: skip
    assert max(map(len, content.splitlines())) < 600


def test_who_was_erased_is_named_to_nobody_but_found_by_who_knows_the_name(
    audited: TestClient, tmp_path: Path
) -> None:
    """The trail keeps what was done, and an erasure is not undone by it."""
    enrol(audited, tracklet_id="t1", identity="p17")
    audited.post("/query", files=GOOD)
    [before] = lines(tmp_path, action="query")
    audited.delete("/identities/p17")

    [after] = lines(tmp_path, action="query")
    asked = lines(tmp_path, identity="p17")

    assert (before["best_identity"], before["best_tracklet"]) == ("p17", "t1")
    assert re.fullmatch("#[0-9a-f]{32}", after["best_identity"])
    assert re.fullmatch("#[0-9a-f]{32}", after["best_tracklet"])
    assert [one["action"] for one in asked] == ["enrol", "query", "erase-identity"]
    assert asked[1]["best_identity"] == "p17"


def test_another_trail_has_other_hashes(tmp_path: Path) -> None:
    one, other = (Trail(tmp_path / name) for name in "ab")

    assert one.pseudonyms.of("identity", "p") != other.pseudonyms.of("identity", "p")
    assert one.pseudonyms.of("identity", "p") == one.pseudonyms.of("best_identity", "p")
    assert one.pseudonyms.of("identity", "p") != one.pseudonyms.of("tracklet", "p")
    one.close()
    other.close()


def test_files_are_for_their_owner_alone(audited: TestClient, tmp_path: Path) -> None:
    audited.get("/gallery")

    directory = tmp_path / DATA / "audit"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {one.stat().st_mode & 0o777 for one in directory.iterdir()} == {0o600}
    assert (tmp_path / DATA / "keys.json").stat().st_mode & 0o777 == 0o600


class Disk:
    """Stands in for ``os.write`` of the trail, and fails as it is told."""

    def __init__(self) -> None:
        self.error: int | None = None
        self.first_bytes = 0
        self._write = os.write

    def write(self, file: int, content: bytes) -> int:
        if self.error is None:
            return self._write(file, content)
        if self.first_bytes:
            count, self.first_bytes = self.first_bytes, 0
            return self._write(file, content[:count])
        raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The disk of the trail, that of the gallery apart."""
    fake = Disk()
    # The module's own name for it: the gallery and the log go on writing.
    monkeypatch.setattr(audit_module, "os", _Os(fake))
    return fake


class _Os:
    def __init__(self, disk: Disk) -> None:
        self.write = disk.write

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


READS = [("POST", "/query"), ("GET", "/gallery"), ("GET", "/gallery/t1"), ("POST", "/embed"),
         ("GET", "/gallery/t1/strip.jpg"), ("GET", "/gallery/t1/matches")]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "status", "slug"),
    [(errno.ENOSPC, 507, "storage-full"), (errno.EDQUOT, 507, "storage-full"),
     (errno.EIO, 503, "not-ready"), (errno.EROFS, 503, "not-ready")],
)  # fmt: skip
def test_nobody_is_told_of_a_person_where_the_trail_cannot_say_so(
    audited: TestClient, disk: Disk, number: int, status: int, slug: str
) -> None:
    """A full disk must not make searches secret."""
    enrol(audited, tracklet_id="t1", identity="p17")
    disk.error = number

    for method, path in READS:
        answer = audited.request(method, path, files=GOOD if method == "POST" else None)
        detail = assert_problem(answer, status, slug)["detail"]
        assert detail.startswith("cannot write the audit trail: ")
        assert "p17" not in answer.text
    disk.error = None

    assert audited.post("/query", files=GOOD).json()["matches"][0]["identity"] == "p17"


def test_nothing_is_changed_where_the_trail_cannot_say_so(
    audited: TestClient, disk: Disk, tmp_path: Path
) -> None:
    enrol(audited, tracklet_id="t1", identity="p17")
    before = audited.get("/gallery/t1").json()
    disk.error = errno.ENOSPC

    assert_problem(audited.post("/gallery", files=clip_of(GREEN)), 507, "storage-full")
    assert_problem(audited.patch("/gallery/t1", json={"camera": "c9"}), 507, "storage-full")
    assert_problem(audited.delete("/gallery/t1"), 507, "storage-full")
    assert_problem(audited.delete("/identities/p17"), 507, "storage-full")
    disk.error = None

    assert audited.get("/gallery").json()["items"] == [before]
    told = [one["action"] for one in lines(tmp_path)]
    assert told == ["enrol", "read-tracklet", "resume-trail", "list-tracklets"]


def test_a_change_that_was_begun_and_could_not_be_told_of_is_said_to_be_uncertain(
    audited: TestClient, disk: Disk, gallery: EmbeddedGallery, tmp_path: Path, monkeypatch: Any
) -> None:
    """The disk filled up in between: the trail has that it was begun."""
    enrol(audited, tracklet_id="t1", identity="p17")
    real = gallery.remove

    def remove_and_fill(tracklet_id: str) -> TrackletRecord:
        removed = real(tracklet_id)
        disk.error = errno.ENOSPC
        return removed

    monkeypatch.setattr(gallery, "remove", remove_and_fill)
    detail = assert_problem(audited.delete("/gallery/t1"), 507, "storage-full")["detail"]
    disk.error = None

    assert "may be changed or not" in detail
    [line] = lines(tmp_path, action="erase-tracklet", tracklet="t1")
    assert (line["key"], line["tracklet"]) == ("gate", "t1")
    assert "status" not in line


def test_a_line_that_does_not_fit_leaves_no_half(
    audited: TestClient, disk: Disk, tmp_path: Path
) -> None:
    audited.get("/gallery")
    before = raw(tmp_path)
    disk.error, disk.first_bytes = errno.ENOSPC, 20

    assert audited.get("/gallery").status_code == 507
    assert raw(tmp_path) == before


def test_the_probe_is_red_while_the_trail_cannot_be_written_and_green_again_by_itself(
    audited: TestClient, disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    audited.post("/embed", files=GOOD)  # answered by a worker that is warm
    assert audited.get("/readyz").json()["checks"]["audit"] == "ok"
    disk.error = errno.ENOSPC
    for _ in range(3):
        audited.get("/gallery")

    detail = assert_problem(audited.get("/readyz"), 503, "not-ready")["detail"]
    disk.error = None

    assert detail == "audit: cannot write the audit trail: the disk is full"
    assert audited.get("/readyz").status_code == 200
    [*_, line] = lines(tmp_path)
    assert line.keys() == {"time", "action", "since"}
    told = [one.levelno for one in caplog.records if one.name == "service.audit"]
    assert told == [logging.ERROR, logging.WARNING]  # once, not for each request


def test_a_disk_that_hangs_keeps_an_answer_only_so_long(
    audited: TestClient, trail: Trail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "WRITE_S", 0.05)
    with trail._lock:  # as if somebody's write did not end
        answer = audited.get("/gallery")

    assert "within 0.05 s" in assert_problem(answer, 503, "not-ready")["detail"]
    assert answer.headers["retry-after"] == "5"


def test_a_mistake_of_ours_and_a_client_that_hangs_up_are_told(
    audited: TestClient, gallery: EmbeddedGallery, tmp_path: Path, monkeypatch: Any, trail: Trail
) -> None:
    def fail(_: str) -> None:
        raise RuntimeError

    monkeypatch.setattr(gallery, "get", fail)
    assert audited.get("/gallery/t1").status_code == 500
    trail.close()  # when all is written

    assert [one["status"] for one in lines(tmp_path)] == [500]


def filled(directory: Path, count: int, **options: Any) -> Trail:
    """A trail with numbered lines."""
    trail = Trail(directory, **options)
    for number in range(count):
        trail.append({"action": "query", "count": number})
    return trail


def test_files_are_bounded_in_size_and_number(tmp_path: Path) -> None:
    trail = filled(tmp_path / DATA / "audit", 100, file_bytes=500, files=3)
    trail.close()

    files = files_of(tmp_path / DATA / "audit")
    sizes = [one.stat().st_size for one in files]
    (tmp_path / DATA / "keys").mkdir()
    counts = [one["count"] for one in lines(tmp_path)]

    assert len(files) == 3
    assert max(sizes) < 600
    assert counts == list(range(counts[0], 100))  # the newest, without a gap
    assert len(counts) > 10


def test_a_trail_is_taken_up_again(tmp_path: Path) -> None:
    for _ in range(3):
        filled(tmp_path / DATA / "audit", 2).close()

    assert [one["count"] for one in lines(tmp_path)] == [0, 1] * 3
    assert len(files_of(tmp_path / DATA / "audit")) == 1


def test_what_a_loss_of_power_cut_off_hides_no_other_line(tmp_path: Path) -> None:
    filled(tmp_path / DATA / "audit", 2).close()
    [path] = files_of(tmp_path / DATA / "audit")
    path.write_bytes(path.read_bytes()[:-9])

    filled(tmp_path / DATA / "audit", 2).close()
    reading = Reading(tmp_path / DATA)

    assert [one["count"] for one in reading.lines(Sought())] == [0, 0, 1]
    assert reading.damaged == 1


def test_no_room_for_another_file_leaves_the_old_one_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trail = filled(tmp_path / DATA / "audit", 1, file_bytes=500, files=3)

    def fail() -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(trail, "_begin_next", fail)
    for number in range(1, 20):
        trail.append({"action": "query", "count": number})
    trail.close()

    assert [one["count"] for one in lines(tmp_path)] == list(range(20))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's fallocate")
def test_room_is_kept_for_lines_to_come(tmp_path: Path) -> None:
    """So that a disk filled by something else does not end the searches at once."""
    trail = filled(tmp_path / "audit", 3)
    [path] = files_of(tmp_path / "audit")

    taken = path.stat()
    trail.close()

    assert taken.st_size < 1000
    assert taken.st_blocks * 512 > audit_module.RESERVE_BYTES / 2


def test_a_file_without_room_kept_for_it_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trail = filled(tmp_path / DATA / "audit", 1, file_bytes=500, files=3)
    monkeypatch.setattr(audit_module, "reserve", lambda *_: errno.ENOSPC)

    for number in range(1, 20):
        trail.append({"action": "query", "count": number})
    trail.close()

    assert len(files_of(tmp_path / DATA / "audit")) == 1
    assert [one["count"] for one in lines(tmp_path)] == list(range(20))


@pytest.mark.parametrize("salt", [b"", b"ab", b"\xff" * 64, b"zz" * 32])
def test_a_damaged_salt_is_refused(tmp_path: Path, salt: bytes) -> None:
    """Another one would be another trail: nobody could be found in the old one any more."""
    Trail(tmp_path / "audit").close()
    (tmp_path / "audit" / "salt").write_bytes(salt)

    with pytest.raises(AuditError, match="salt"):
        Trail(tmp_path / "audit")


def test_a_trail_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "audit").write_text("a file")

    with pytest.raises(AuditError, match="cannot open the audit trail"):
        Trail(tmp_path / "audit")


def test_a_closed_trail_takes_no_line(tmp_path: Path) -> None:
    trail = Trail(tmp_path / "audit")
    trail.close()

    with pytest.raises(AuditUnavailableError, match="closed"):
        trail.append({"action": "query"})


def test_a_full_disk_at_the_sync_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a system finds out only then that there is no room."""
    trail = filled(tmp_path / "audit", 1)

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as full:
        full.setattr(audit_module, "os", _Failing(fail))
        with pytest.raises(StorageFullError):
            trail.sync()
    trail.close()


class _Failing:
    def __init__(self, fsync: Any) -> None:
        self.fsync = fsync

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def test_lines_are_sought_by_key_time_and_person(tmp_path: Path) -> None:
    trail = Trail(tmp_path / DATA / "audit")
    trail.append({"action": "query", "key": "a", "key_id": "01", "best_identity": "p1"})
    trail.append({"action": "assign-tracklets", "key": "b", "tracklets": ["t1", "t2"]})
    trail.append({"action": "merge-identity", "key": "b", "identity": "p2", "into": "p1"})
    trail.close()
    now = datetime.now(UTC)
    later, earlier = now + timedelta(hours=1), now - timedelta(hours=1)

    def found(**sought: Any) -> list[str]:
        return [one["action"][0] for one in lines(tmp_path, **sought)]

    assert found() == ["q", "a", "m"]
    assert found(label="b") == ["a", "m"]
    assert found(label="01") == ["q"]
    assert found(identity="p1") == ["q", "m"]
    assert found(tracklet="t2") == ["a"]
    assert found(tracklet="p1") == []
    assert found(since=earlier, until=later) == ["q", "a", "m"]
    assert found(since=later) == found(until=earlier) == []
    newest = Reading(tmp_path / DATA).lines(Sought(), last=1)
    assert [one["action"] for one in newest] == ["merge-identity"]


def test_the_newest_act_is_the_last_one_whether_it_was_a_request_or_a_command(
    tmp_path: Path,
) -> None:
    trail = Trail(tmp_path / DATA / "audit")
    trail.append({"id": "1", "action": "snapshot", "by": "command of user 0"})
    trail.append({"id": "1", "action": "snapshot", "by": "command of user 0", "outcome": "done"})
    trail.append({"id": "2", "action": "query", "key": "a", "status": 200})
    trail.close()

    newest = Reading(tmp_path / DATA).lines(Sought(), last=1)

    assert [one["action"] for one in newest] == ["query"]
    assert [one["outcome"] for one in lines(tmp_path, by="command")] == ["done"]


def test_there_is_no_trail_to_read_where_none_was_kept(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="expected an audit trail"):
        Reading(tmp_path)
