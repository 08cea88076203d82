"""Every route has a rule, every rule is kept, and nobody gets past it."""

import base64
import hmac
import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import iter_route_contexts
from pydantic import SecretStr
from starlette.testclient import TestClient

from index.embedded import EmbeddedGallery
from service import keys as keys_module
from service.access import RULES, Rule, find_rule
from service.app import create_app
from service.audit import Trail
from service.errors import KeysError
from service.keys import ROLES, KeyRing, create_key, includes, read_keys, revoke_key
from service.settings import Settings
from tests.service.conftest import FakeEmbedder, Start, assert_problem, enrol
from tests.service.making import GOOD, GREEN, clip_of

PAIR = [(f"{side}_{name}", file) for side in "ab" for name, file in GOOD]
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/gallery"): {"files": clip_of(GREEN)},
    ("POST", "/query"): {"files": GOOD},
    ("POST", "/embed"): {"files": GOOD},
    ("POST", "/verify"): {"files": PAIR},
    ("PATCH", "/gallery/{tracklet_id}"): {"json": {}},
    ("PATCH", "/identities/{identity}"): {"json": {"identity": "p2"}},
    ("POST", "/identities/{identity}/merge"): {"json": {"into": "p2"}},
    ("POST", "/identities/{identity}/tracklets"): {"json": {"tracklet_ids": ["t"]}},
}


def routes_of(app: FastAPI) -> set[tuple[str, str]]:
    """Method and template of everything that the app answers, HEAD apart, which follows GET."""
    found = set()
    for route in iter_route_contexts(app.routes):
        assert route.path is not None, f"{route} has no path, and so no rule"
        # What has no methods (a mount, a web socket) would need a rule of another kind.
        found |= {(method, route.path) for method in (route.methods or {"ANY"}) - {"HEAD"}}
    return found


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data directory without a key."""
    return tmp_path / "data"


@pytest.fixture
def secrets(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A key of each role, and some that open nothing."""
    made: dict[str, str] = {role: create_key(data_dir, role, role)[1] for role in ROLES}
    made["revoked"] = create_key(data_dir, "admin", "gone")[1]
    revoke_key(data_dir, "gone")
    with monkeypatch.context() as past:
        past.setattr(keys_module, "datetime", LongAgo)
        made["expired"] = create_key(data_dir, "admin", "late", expires_days=1)[1]
    return made | {"wrong": "passerby_wrong", "none": ""}


class LongAgo(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> "LongAgo":
        return cls(2026, 1, 1, tzinfo=tz)


@pytest.fixture
def closed(
    embedder: FakeEmbedder, gallery: EmbeddedGallery, data_dir: Path, secrets: dict[str, str]
) -> Iterator[TestClient]:
    """A client without a key, of a service with keys and a tracklet ``t`` of ``p1``."""
    del secrets
    app = create_app(embedder, gallery, Settings(), keys=KeyRing(data_dir))
    with TestClient(app) as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"} if secret else {}


def ask(client: TestClient, route: tuple[str, str], headers: dict[str, str]) -> Any:
    """Send a request that the route would do something for."""
    method, template = route
    path = template.replace("{tracklet_id}", "t").replace("{identity}", "p1")
    return client.request(
        method, path, headers=headers, follow_redirects=False, **BODIES.get(route, {})
    )


def test_every_route_has_a_rule_and_every_rule_a_route(client: TestClient) -> None:
    """A new route cannot ship without somebody choosing who may use it."""
    app = client.app
    assert isinstance(app, FastAPI)

    assert routes_of(app) == set(RULES)


def test_only_the_probes_are_open() -> None:
    assert {path for (_, path), rule in RULES.items() if rule.role is None} == {
        "/livez", "/readyz"
    }  # fmt: skip


def test_what_concerns_people_is_in_the_trail_and_nothing_else() -> None:
    told = {path for (_, path), rule in RULES.items() if rule.action is not None}

    assert told == {p for _, p in RULES if re.match(r"/(gallery|identities|query|verify|embed)", p)}
    actions = [rule.action for rule in RULES.values() if rule.action is not None]
    assert len(actions) == len(set(actions))


@pytest.mark.parametrize("route", sorted(RULES), ids=" ".join)
def test_every_route_by_every_key(
    closed: TestClient, secrets: dict[str, str], route: tuple[str, str]
) -> None:
    """The table: no key, a wrong, an expired, a revoked one; roles that are and are not enough."""
    needed = RULES[route].role

    for name, secret in secrets.items():
        if needed is not None and name in ROLES:
            enrol_once(closed, secrets["admin"])
        answer = ask(closed, route, bearer(secret))

        if needed is None:
            assert answer.status_code in (200, 503), name  # open, whether well or not
        elif name not in ROLES:
            assert_problem(answer, 401, "unauthenticated")
            assert answer.headers["www-authenticate"] == "Bearer"
        elif includes(name, needed):
            assert answer.status_code in (200, 201, 204, 307, 404, 409), (name, answer.text)
        else:
            detail = assert_problem(answer, 403, "forbidden")["detail"]
            assert detail == f"expected a key with role {needed}, got one with {name}"


def enrol_once(client: TestClient, secret: str) -> None:
    """Have ``t`` show ``p1``, for what may have erased or renamed it."""
    fields = {"tracklet_id": "t", "identity": "p1"}
    client.post("/gallery", files=GOOD, data=fields, headers=bearer(secret))
    client.patch("/gallery/t", json={"identity": "p1"}, headers=bearer(secret))


def test_what_is_refused_changes_nothing(closed: TestClient, secrets: dict[str, str]) -> None:
    enrol_once(closed, secrets["admin"])
    before = closed.get("/gallery", headers=bearer(secrets["read"])).json()

    for route, rule in RULES.items():
        for name, secret in secrets.items():
            if rule.role is not None and (name not in ROLES or not includes(name, rule.role)):
                assert ask(closed, route, bearer(secret)).status_code in (401, 403)

    assert closed.get("/gallery", headers=bearer(secrets["read"])).json() == before


@pytest.mark.parametrize(
    ("name", "told"),
    [("none", "got none"), ("wrong", "got an unknown one"), ("revoked", "got one that was revoked"),
     ("expired", "got one that has expired")],
)  # fmt: skip
def test_who_is_refused_hears_why(
    closed: TestClient, secrets: dict[str, str], name: str, told: str
) -> None:
    answer = closed.get("/info", headers=bearer(secrets[name]))

    assert assert_problem(answer, 401, "unauthenticated")["detail"].endswith(told)


def test_a_key_made_and_revoked_while_the_service_runs_counts(
    embedder: FakeEmbedder, gallery: EmbeddedGallery, data_dir: Path
) -> None:
    """And the first one closes the service, which nothing opens again."""
    ring = KeyRing(data_dir)
    with TestClient(create_app(embedder, gallery, Settings(), keys=ring)) as client:
        assert client.get("/info").status_code == 200
        _, secret = create_key(data_dir, "read", "late")
        ring.refresh()
        assert client.get("/info").status_code == 401
        assert client.get("/info", headers=bearer(secret)).status_code == 200
        revoke_key(data_dir, "late")
        ring.refresh()
        assert client.get("/info", headers=bearer(secret)).status_code == 401
        assert client.get("/info").status_code == 401


def test_a_file_that_is_lost_or_damaged_leaves_the_keys_as_they_were(data_dir: Path) -> None:
    _, secret = create_key(data_dir, "read", "a")
    ring = KeyRing(data_dir)

    (data_dir / "keys.json").write_text("{}")
    with pytest.raises(KeysError, match="damaged"):
        ring.refresh()
    (data_dir / "keys.json").unlink()
    with pytest.raises(KeysError, match="got none"):
        ring.refresh()

    assert ring.is_closed
    assert ring.find(secret.encode()) is not None


def test_keys_of_the_settings_are_admins_unless_they_say_a_role(start: Start) -> None:
    client = start(api_keys=("one", "read:two", "write:three"))

    def statuses(secret: str) -> list[int]:
        requests = (("GET", "/info"), ("DELETE", "/gallery/x"), ("DELETE", "/identities/x"))
        return [client.request(*one, headers=bearer(secret)).status_code for one in requests]

    assert statuses("one") == [200, 404, 404]
    assert statuses("three") == [200, 404, 403]
    assert statuses("two") == [200, 403, 403]
    assert statuses("read:two") == [401, 401, 401]


@pytest.mark.parametrize("text", ["read:", "admin:"])
def test_a_role_without_a_key_is_refused(text: str) -> None:
    """An empty key would be carried by everybody."""
    with pytest.raises(KeysError, match="settings-1"):
        KeyRing(given=[SecretStr(text)])


@pytest.mark.parametrize("place", [0, 2, None])
def test_every_key_is_compared_whichever_it_is(
    data_dir: Path, place: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long an answer takes must not say how near a guess came."""
    made = [create_key(data_dir, "read", f"k{number}")[1] for number in range(3)]
    ring = KeyRing(data_dir)
    compared = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    found = ring.find(b"guess" if place is None else made[place].encode())

    assert compared == [key.digest for key in read_keys(data_dir)]
    assert (found is None) == (place is None)


ODD_HEADERS = [
    {"X-API-Key": "{}"},
    {"X-API-Key": " {} "},
    {"Authorization": "bearer {}"},
    {"Authorization": "Bearer   {}"},
]


@pytest.mark.parametrize("headers", ODD_HEADERS)
def test_a_key_may_come_in_either_header(
    closed: TestClient, secrets: dict[str, str], headers: dict[str, str]
) -> None:
    filled = {name: value.format(secrets["read"]) for name, value in headers.items()}

    assert closed.get("/info", headers=filled).status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/"])
def test_a_browser_is_asked_for_a_key(
    closed: TestClient, secrets: dict[str, str], path: str
) -> None:
    asked = closed.get(path, headers={"Accept": "text/html,*/*"})
    token = base64.b64encode(f"anybody:{secrets['read']}".encode()).decode()
    answer = closed.get(path, headers={"Authorization": f"Basic {token}"}, follow_redirects=False)

    assert_problem(asked, 401, "unauthenticated")
    assert asked.headers["www-authenticate"].startswith("Basic realm=")
    assert answer.status_code in (200, 307)


@pytest.mark.parametrize("path", ["/gallery", "/info", "/metrics", "/gallery/t/strip.jpg"])
def test_what_a_browser_sends_by_itself_opens_no_data(
    closed: TestClient, secrets: dict[str, str], path: str
) -> None:
    """Else a page of somebody else could have a browser erase people."""
    token = base64.b64encode(f"anybody:{secrets['admin']}".encode()).decode()

    answer = closed.get(path, headers={"Authorization": f"Basic {token}", "Accept": "text/html"})

    assert_problem(answer, 401, "unauthenticated")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "token", ["", "!", "////", "bm8tY29sb24=", base64.b64encode(b"a:").decode()]
)
def test_a_broken_basic_header_opens_nothing(closed: TestClient, token: str) -> None:
    assert closed.get("/docs", headers={"Authorization": f"Basic {token}"}).status_code == 401


HOSTILE_PATHS = [
    "/gallery/../livez", "/livez/../gallery", "/livez%2f..%2fgallery", "/gallery/%2e%2e%2flivez",
    "/livez%0a", "/readyz%00", "//livez", "/LIVEZ", "/livez;x", "/gallery/t%2fstrip.jpg",
    "/gallery/%2e%2e", "/identities/..%2f..%2fetc%2fpasswd", "/%2e%2e/keys.json", "/keys.json",
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "DELETE", "OPTIONS", "HEAD", "TRACE"])
def test_no_path_and_no_method_sneaks_past_the_key(closed: TestClient, method: str) -> None:
    for path in HOSTILE_PATHS:
        answer = closed.request(method, path, follow_redirects=False)

        # What a client resolves by itself may end at an open probe.
        is_probe = answer.request.url.raw_path in (b"/livez", b"/readyz")
        assert answer.status_code == 401 or is_probe, path


def test_ids_that_climb_are_none(
    closed: TestClient, secrets: dict[str, str], data_dir: Path
) -> None:
    for path in HOSTILE_PATHS:
        for method in ("PATCH", "DELETE"):
            answer = closed.request(method, path, headers=bearer(secrets["admin"]))

            assert answer.status_code in (404, 405, 422), path
            assert "digest" not in answer.text
            assert str(data_dir) not in answer.text


@pytest.mark.parametrize(
    "value", ["x\r\nX-Injected: 1", "x\nSet-Cookie: a=b", "x\x00y", "ä", "x" * 60_000]
)
def test_a_hostile_header_comes_back_in_none(closed: TestClient, value: str) -> None:
    for name in (b"X-API-Key", b"Authorization", b"X-Request-ID", b"X-Forwarded-For"):
        answer = closed.get("/info", headers=[(name, value.encode("latin-1"))])

        assert answer.status_code == 401
        assert "x-injected" not in answer.headers
        assert "set-cookie" not in answer.headers
        assert value not in answer.text


def test_a_route_without_a_rule_is_shut_also_to_an_admin(
    embedder: FakeEmbedder, gallery: EmbeddedGallery, data_dir: Path
) -> None:
    """Where the test above would be left out."""
    _, secret = create_key(data_dir, "admin", "a")
    app = create_app(embedder, gallery, Settings(), keys=KeyRing(data_dir))
    router = APIRouter()

    @app.get("/new")
    @router.get("/newer")
    def new() -> str:
        raise AssertionError("nobody may come here")

    app.include_router(router)
    with TestClient(app) as client:
        for path in ("/new", "/newer"):
            assert_problem(client.get(path, headers=bearer(secret)), 403, "forbidden")


def test_rules_are_found_by_the_whole_path() -> None:
    assert find_rule("GET", "/gallery/t/strip.jpg")[0] == "/gallery/{tracklet_id}/strip.jpg"
    assert find_rule("HEAD", "/docs") == ("/docs", RULES["GET", "/docs"])
    for path in ("/gallery/t/x", "/gallery/", "/livez\n", "/gallery/{tracklet_id}/y", "/livez/"):
        assert find_rule("GET", path) == (None, Rule("read")), path
    assert find_rule("GET", "/gallery/{tracklet_id}")[0] == "/gallery/{tracklet_id}"


@pytest.mark.parametrize(("per_minute", "wait"), [(2, "30"), (3, "20"), (7, "9")])
def test_a_key_that_asks_too_often_waits_and_the_others_do_not(
    start: Start, per_minute: int, wait: str
) -> None:
    client = start(api_keys=("one", "two"), rate_limit=per_minute)

    answers = [client.get("/identities", headers=bearer("one")) for _ in range(per_minute + 1)]
    other = client.get("/identities", headers=bearer("two"))
    probe = client.get("/livez")

    assert [one.status_code for one in answers] == [200] * per_minute + [429]
    assert_problem(answers[-1], 429, "overloaded")
    assert answers[-1].headers["retry-after"] == wait
    assert other.status_code == probe.status_code == 200


def test_an_unknown_key_takes_nothing_from_the_others(start: Start) -> None:
    client = start(api_keys=("one",), rate_limit=1)

    for _ in range(3):
        assert client.get("/identities", headers=bearer("guess")).status_code == 401
    assert client.get("/identities", headers=bearer("one")).status_code == 200


def test_without_keys_all_count_as_one(start: Start) -> None:
    client = start(rate_limit=1)

    assert [client.get("/identities").status_code for _ in range(2)] == [200, 429]


def test_the_description_says_who_may_do_what(
    closed: TestClient, secrets: dict[str, str], client: TestClient
) -> None:
    schema = closed.get("/openapi.json", headers=bearer(secrets["read"])).json()
    again = closed.get("/openapi.json", headers=bearer(secrets["read"])).json()

    assert schema == again
    assert schema["components"]["securitySchemes"].keys() == {"bearer", "header"}
    for (method, path), rule in RULES.items():
        operation = schema["paths"].get(path, {}).get(method.lower())
        if operation is None:
            assert rule.is_page
        elif rule.role is None:
            assert "security" not in operation
        else:
            assert operation["security"] == [{"bearer": []}, {"header": []}]
            assert operation["description"].endswith(f"Needs a key with role {rule.role}.")
            assert {"401", "429"} <= operation["responses"].keys()
            assert ("403" in operation["responses"]) == (rule.role != "read")
    opened = client.get("/openapi.json").json()
    assert "securitySchemes" not in opened.get("components", {})


def test_a_key_shows_nowhere(
    embedder: FakeEmbedder,
    gallery: EmbeddedGallery,
    data_dir: Path,
    secrets: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither one that opens nor one that does not: people send those of other services, too."""
    caplog.set_level(logging.DEBUG)
    trail = Trail(data_dir / "audit")
    app = create_app(embedder, gallery, Settings(), keys=KeyRing(data_dir), trail=trail)
    answers: list[Any] = []
    with TestClient(app) as client:
        for secret in (*secrets.values(), "another-services-key"):
            for route in RULES:
                by_either = (bearer(secret), {"X-API-Key": secret})
                answers.append(ask(client, route, by_either[len(answers) % 2]))

    seen = caplog.text + "".join(capsys.readouterr())
    seen += "".join(f"{one.headers} {one.text}" for one in answers)
    seen += "".join(path.read_text() for path in data_dir.rglob("*.json*"))
    seen += json.dumps([vars(one) for one in caplog.records], default=str)
    for secret in (*filter(None, secrets.values()), "another-services-key"):
        assert secret not in seen
    assert datetime.now(UTC).isoformat()[:10] in seen


def test_the_log_says_whose_key_it_was(
    closed: TestClient, secrets: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    closed.get("/info", headers=bearer(secrets["write"]))

    [line] = [one for one in caplog.records if one.name == "passerby.request"]
    assert vars(line)["key_label"] == "write"


def test_an_enrolment_needs_more_than_to_read(closed: TestClient, secrets: dict[str, str]) -> None:
    closed.headers.update(bearer(secrets["write"]))
    enrol(closed, tracklet_id="t9")
    closed.headers.update(bearer(secrets["read"]))

    assert closed.get("/gallery/t9").status_code == 200
    assert_problem(closed.post("/gallery", files=GOOD), 403, "forbidden")


def test_who_is_refused_at_the_door_is_in_the_log_with_route_and_address(
    closed: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody who guesses keys has to be found; nobody else's address is kept there."""
    caplog.set_level(logging.INFO, "passerby.request")

    closed.get("/gallery/t", headers=bearer("passerby_wrong"))
    closed.get("/livez")

    line = caplog.records[0]
    assert (line.route, line.status, line.address) == ("/gallery/{tracklet_id}", 401, "testclient")  # type: ignore[attr-defined]
    assert not any(hasattr(one, "address") for one in caplog.records[1:])


def test_a_key_that_asks_too_often_does_not_count_as_an_overload(start: Start) -> None:
    client = start(api_keys=("one",), rate_limit=1)
    headers = bearer("one")

    statuses = [client.post("/query", files=GOOD, headers=headers).status_code for _ in range(3)]

    assert statuses[1:] == [429, 429]
    told = client.app.state.parts.metrics.expose()[0].decode()  # type: ignore[attr-defined]
    assert 'passerby_rejected_total{reason="overloaded"} 0.0' in told
    assert 'passerby_requests_total{route="/query",status="429"} 2.0' in told
