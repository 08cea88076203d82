"""The API, tried as its own description says, and as it does not; by schemathesis."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from bench.serving import FREE, Server, serving
from service.keys import ROLES, create_key

EXAMPLES = 15  # of each operation, beside those that the description's own corners make
FEW = 4
ACCEPTANCE = "positive_data_acceptance"
# What of a request's rules the description cannot say, so that what is made by it may be refused.
UNSAID = {
    "POST /gallery": "which bytes are an image, and that one of three fields is sent",
    "POST /query": "likewise",
    "POST /embed": "likewise",
    "POST /verify": "likewise, for each of two",
    "GET /gallery": "which cursors are ours",
    "GET /identities": "likewise",
    "PATCH /gallery/{tracklet_id}": "what time is to come, and that an end follows a start",
    "POST /identities/{identity}/merge": "that the body names another identity than the path",
}
needs_schemathesis = pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="needs the extra dev: schemathesis"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real service, without keys, on loopback."""
    folder = tmp_path_factory.mktemp("api")
    with serving(
        folder / "data", folder / "log", weights=FREE, settings={"DECODERS": "1"}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, str]]]:
    """Likewise with a key of each role; and those, by their roles."""
    folder = tmp_path_factory.mktemp("closed-api")
    keys: dict[str, str] = {role: create_key(folder / "data", role, role)[1] for role in ROLES}
    with serving(
        folder / "data", folder / "log", weights=FREE, settings={"DECODERS": "1"}
    ) as running:
        yield running, keys


def try_out(server: Server, *how: str) -> None:
    """Send what the description allows and what it does not; each answer must be as described."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run"),
            f"http://127.0.0.1:{server.port}/openapi.json",
            *("--seed", "1", "--generation-database", "none"),
            *("--request-timeout", "60", "--no-color", *how),
        ],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-6000:]
    assert server.get("/readyz")[0] == 200


@pytest.mark.slow
@needs_schemathesis
def test_every_answer_is_one_that_the_description_tells_of(server: Server) -> None:
    """No server error, no status, header or body that is not described, in each operation."""
    checks = ("--checks", "all", "--exclude-checks", ACCEPTANCE)

    try_out(server, *checks, "--max-examples", str(EXAMPLES))


@pytest.mark.slow
@needs_schemathesis
@pytest.mark.parametrize("role", ROLES)
def test_the_same_with_a_key_of_each_role(closed: tuple[Server, dict[str, str]], role: str) -> None:
    """And without one nothing is answered that needs one."""
    server, keys = closed
    checks = ("--checks", "all", "--exclude-checks", ACCEPTANCE)

    # By X-API-Key it would take its own wrong Authorization beside that for one that is accepted.
    key = ("-H", f"Authorization: Bearer {keys[role]}")
    try_out(server, *checks, "--max-examples", str(FEW), *key)


@pytest.mark.slow
@needs_schemathesis
def test_what_the_description_allows_is_accepted_where_it_can_say_so(server: Server) -> None:
    described = json.loads(server.get("/openapi.json")[1])["paths"]
    operations = {f"{method.upper()} {path}" for path in described for method in described[path]}
    assert UNSAID.keys() < operations

    others = [part for name in sorted(UNSAID) for part in ("--exclude-name", name)]
    try_out(server, "--checks", ACCEPTANCE, "--max-examples", str(EXAMPLES), *others)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/gallery/t", "DELETE, GET, PATCH"),
        ("/identities/p", "DELETE, GET, PATCH"),
        ("/query", "POST"),
        ("/gallery", "GET, POST"),
    ],
)
def test_a_method_that_is_not_allowed_is_told_all_that_are(
    client: TestClient, path: str, expected: str
) -> None:
    answer = client.put(path)

    assert answer.status_code == 405
    assert answer.headers["allow"] == expected
