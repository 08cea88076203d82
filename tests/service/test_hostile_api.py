"""The API, tried as its own description says, and as it does not; by schemathesis."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from bench.serving import FREE, Server, serving

EXAMPLES = 15  # of each operation, beside those that the description's own corners make
# The description cannot say which bytes are an image, nor that one of three fields is to be sent:
# what is made by it alone may be refused.
NOT_FOR_US = "positive_data_acceptance"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real service, without keys, on loopback."""
    folder = tmp_path_factory.mktemp("api")
    with serving(
        folder / "data", folder / "log", weights=FREE, settings={"DECODERS": "1"}
    ) as running:
        yield running


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None, reason="needs the extra dev: schemathesis"
)
def test_every_answer_is_one_that_the_description_tells_of(server: Server) -> None:
    """No server error, no status, header or body that is not described, in each operation."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run"),
            f"http://127.0.0.1:{server.port}/openapi.json",
            *("--checks", "all", "--exclude-checks", NOT_FOR_US),
            *("--max-examples", str(EXAMPLES), "--seed", "1", "--generation-database", "none"),
            *("--request-timeout", "60", "--no-color"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-6000:]
    assert server.get("/readyz")[0] == 200


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
