"""What browsers are told, and who may ask from one."""

import base64
import hashlib
import json
import re
from pathlib import Path

import httpx
import httpx2
import pytest
from starlette.testclient import TestClient

from service.audit import DIRECTORY
from service.headers import DATA_POLICY, policy_of
from tests.service.conftest import Start, assert_problem, enrol
from tests.service.making import GOOD
from tests.service.processes import serving

DESK = "https://desk.example"


@pytest.mark.parametrize("path", ["/gallery", "/livez", "/nothing-here", "/openapi.json", "/"])
def test_an_answer_is_data_and_is_kept_by_nobody(client: TestClient, path: str) -> None:
    headers = client.get(path, follow_redirects=False).headers

    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["content-security-policy"] == DATA_POLICY
    assert headers["cache-control"] == "no-store"


def test_an_answer_without_a_key_has_the_headers_too(start: Start) -> None:
    answer = start(api_keys=["k"]).get("/gallery")

    assert answer.status_code == 401
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_film_strip_is_kept_by_nobody(client: TestClient) -> None:
    record = enrol(client)

    answer = client.get(f"/gallery/{record['tracklet_id']}/strip.jpg")

    assert answer.headers.get_list("cache-control") == ["no-store"]
    assert answer.headers["x-content-type-options"] == "nosniff"


pages = pytest.mark.parametrize("path", ["/docs", "/redoc"])


def policy(answer: httpx2.Response) -> dict[str, str]:
    """Directives of an answer's content security policy."""
    said: str = answer.headers["content-security-policy"]
    return {name: more for name, _, more in (part.partition(" ") for part in said.split("; "))}


@pages
def test_a_page_of_documentation_runs_what_is_in_it_and_ours(client: TestClient, path: str) -> None:
    answer = client.get(path)

    written = [one for one in re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL) if one]
    digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in written]
    said = policy(answer)
    assert set(said["script-src"].split()) == {"'self'", *(f"'sha256-{one}'" for one in digests)}
    assert said["default-src"] == said["frame-ancestors"] == said["form-action"] == "'none'"


@pages
def test_a_page_of_documentation_needs_no_other_host(client: TestClient, path: str) -> None:
    """A network of cameras may have no way to one, and another's script would be let in blindly."""
    answer = client.get(path)

    loaded = re.findall(r"<(?:script|link|img)[^>]* (?:src|href)=\"([^\"]+)\"", answer.text)
    assert len(loaded) >= 2
    for one in loaded:
        file = client.get(one)
        assert file.status_code == 200, one
        assert file.content, one
    assert "//" not in answer.headers["content-security-policy"]
    # A comment may name a site; nothing that is loaded does.
    assert not re.findall(r"(?:src|href|url)\s*[=:]\s*[\"']?(?:https?:)?//", answer.text)


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/docs/swagger-ui-bundle.js", "text/javascript"), ("/docs/swagger-ui.css", "text/css"),
     ("/docs/redoc.standalone.js", "text/javascript"), ("/docs/favicon.png", "image/png")],
)  # fmt: skip
def test_a_file_of_a_page_is_what_it_says(client: TestClient, path: str, kind: str) -> None:
    """By nosniff, a browser runs no script that calls itself something else."""
    headers = client.get(path).headers

    assert headers["content-type"].partition(";")[0] == kind
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "private, max-age=3600"


def test_where_there_are_keys_the_page_asks_for_one_and_lets_one_be_given(start: Start) -> None:
    """A browser shows its dialog for the page, and sends what it got along for the files."""
    client = start(api_keys=["k"])
    browser = {"Accept": "text/html,*/*;q=0.8"}

    asked = client.get("/docs", headers=browser)
    shown = client.get("/docs", headers=browser, auth=("anybody", "k"))
    scripts = [client.get("/docs/swagger-ui-bundle.js", auth=auth) for auth in (None, ("any", "k"))]
    description = client.get("/openapi.json", auth=("any", "k")).json()

    assert asked.headers["www-authenticate"].startswith("Basic ")
    assert shown.status_code == 200
    assert [one.status_code for one in scripts] == [401, 200]
    # What the page's button "Authorize" is made of.
    schemes = description["components"]["securitySchemes"]
    assert {one["type"] for one in schemes.values()} == {"http", "apiKey"}


def test_a_page_without_scripts_may_run_none() -> None:
    said = policy_of("<html><body>hello</body></html>")

    assert "script-src 'none'; " in said


def test_no_other_page_may_ask_where_no_origin_is_named(client: TestClient) -> None:
    asked = {"Origin": DESK, "Access-Control-Request-Method": "POST"}

    preflight = client.options("/query", headers=asked)
    answer = client.get("/gallery", headers={"Origin": DESK})

    assert preflight.status_code == 405
    for one in (preflight, answer):
        assert not [name for name in one.headers if name.startswith("access-control-")]


def test_a_named_origin_may_ask_and_no_other(start: Start) -> None:
    """A browser asks beforehand, without the key that it is going to send."""
    client = start(cors_origins=(DESK,), api_keys=["k"])
    wanted = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-api-key",
    }

    preflight = client.options("/query", headers={**wanted, "Origin": DESK})
    answer = client.post("/query", files=GOOD, headers={"Origin": DESK, "X-API-Key": "k"})
    other = client.options("/query", headers={**wanted, "Origin": "https://other.example"})

    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == DESK
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == DESK
    assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    assert_problem(other, 400, "invalid-request")
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(("trusted", "expected"), [(None, "127.0.0.1"), ("127.0.0.1", "192.0.2.9")])
def test_only_a_named_proxy_is_believed_who_asks(
    tmp_path: Path, trusted: str | None, expected: str
) -> None:
    """Also where uvicorn's own variable names everybody."""
    settings = {} if trusted is None else {"TRUSTED_PROXIES": trusted}
    everybody = ["env", "FORWARDED_ALLOW_IPS=*"]

    with serving(tmp_path, settings, within=everybody) as service:
        said = {"X-Forwarded-For": "192.0.2.9"}
        assert httpx.get(f"{service.address}/gallery", headers=said).status_code == 200

    lines = (tmp_path / "data" / DIRECTORY).glob("*.jsonl")
    [line] = [json.loads(one) for path in lines for one in path.read_text().splitlines()]
    assert line["address"] == expected
