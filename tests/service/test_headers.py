"""What browsers are told, and who may ask from one."""

import base64
import hashlib
import json
import re
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from service.audit import DIRECTORY
from service.headers import DATA_POLICY, policy_of
from tests.service.conftest import Start, enrol
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


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_a_page_of_documentation_works_under_its_policy(client: TestClient, path: str) -> None:
    """Each script in it is allowed by its digest, each file by its origin; nothing else is."""
    answer = client.get(path)

    policy = dict(
        part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    written = [one for one in re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL) if one]
    origins = re.findall(r"<script[^>]* src=\"(https://[^/]+)/", answer.text)
    assert origins
    assert set(policy["script-src"].split()) == {
        *origins,
        *(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'"
          for one in written),
    }  # fmt: skip
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"


def test_a_page_without_scripts_may_run_none() -> None:
    policy = policy_of("<html><body>hello</body></html>")

    assert "script-src 'none'; " in policy


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
    assert other.status_code == 400
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
