"""The example of a TLS proxy in front of the service, run by nginx where there is one."""

import json
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.errors import NotReadyError, PayloadTooLargeError
from service.problems import KINDS
from service.settings import Settings
from tests.service.making import GOOD, Files, encode, noise
from tests.service.processes import Service, eventually, serving

EXAMPLE = (Path(__file__).parent.parent / "deploy" / "proxy" / "passerby.conf").read_text("utf-8")
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
OPENSSL = shutil.which("openssl")
MIB = 1024**2
# A proxy believes nobody; the service believes the proxy alone.
PROXY, CLIENT, STRANGER = "127.0.0.1", "127.0.0.2", "127.0.0.3"
FORGED = {"X-Forwarded-For": "192.0.2.9", "Forwarded": "for=192.0.2.9"}

pytestmark = pytest.mark.skipif(not (NGINX and OPENSSL), reason="needs nginx and openssl")


def lines_of(directive: str) -> list[str]:
    """The example's lines that set something."""
    return [
        one for one in EXAMPLE.splitlines() if one.split()[:1] == [directive] and one.endswith(";")
    ]


def value_of(directive: str) -> str:
    """What the example says after a directive that it has once."""
    [line] = lines_of(directive)
    return line.strip(" ;").removeprefix(directive).strip()


def rendered(folder: Path, port: int, service: str, **changed: str) -> Path:
    """The example with files, ports and times of a test, in a configuration that includes it.

    Args:
        folder: Of all files.
        port: In the place of 443.
        service: Host and port in the place of the upstream's.
        changed: Other values of directives that are there.
    """
    text = EXAMPLE
    own = {
        "listen": f"{PROXY}:{port} ssl",
        "server": f"{service}",
        "ssl_certificate": str(folder / "cert.pem"),
        "ssl_certificate_key": str(folder / "key.pem"),
        "access_log": f"{folder / 'access.log'} passerby",
        "error_log": f"{folder / 'error.log'} crit",
    }
    for name, value in {**own, **changed}.items():
        [line] = lines_of(name)
        text = text.replace(f"{line}\n", f"{name} {value};\n")
    example, main = folder / "passerby.conf", folder / "nginx.conf"
    example.write_text(text)
    paths = "\n".join(
        f"{name}_temp_path {folder / name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""  # who may read the test's folder
    main.write_text(
        f"{user} daemon off; worker_processes 1; pid {folder / 'nginx.pid'};\n"
        f"error_log {folder / 'main.log'}; events {{ worker_connections 128; }}\n"
        f"http {{\n{paths}\ninclude {example};\n}}\n"
    )
    return main


def make_certificate(folder: Path) -> ssl.SSLContext:
    """Write a self-signed certificate; returns who trusts it and nothing else."""
    subprocess.run(
        [
            *(str(OPENSSL), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=passerby.example"),
            *("-addext", f"subjectAltName=IP:{PROXY}"),
            *("-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    return ssl.create_default_context(cafile=str(folder / "cert.pem"))


@dataclass(frozen=True)
class Proxy:
    """A running nginx.

    Args:
        port: Where it speaks TLS.
        trust: Trusts its certificate.
        folder: Of its files.
    """

    port: int
    trust: ssl.SSLContext
    folder: Path

    def client(self, address: str = CLIENT, *, timeout: float = 30) -> httpx.Client:
        """A client that comes from an address of this machine."""
        transport = httpx.HTTPTransport(verify=self.trust, local_address=address)
        base = f"https://{PROXY}:{self.port}"
        return httpx.Client(base_url=base, transport=transport, timeout=timeout)


def free_port() -> int:
    """A port that nobody uses, for a moment."""
    with socket.socket() as probe:
        probe.bind((PROXY, 0))
        return int(probe.getsockname()[1])


@contextmanager
def proxied(folder: Path, service: str, **changed: str) -> Iterator[Proxy]:
    """Run nginx with the example in front of a service until the end of the block."""
    folder.mkdir()
    trust, port = make_certificate(folder), free_port()
    main = rendered(folder, port, service, **changed)
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen([str(NGINX), "-c", str(main), "-p", str(folder)], stderr=errors)
    try:
        assert eventually(lambda: accepts(port)), (folder / "stderr").read_text()
        yield Proxy(port, trust, folder)
    finally:
        process.terminate()
        process.wait()


def accepts(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex((PROXY, port)) == 0


def host_of(service: Service) -> str:
    """Where it listens, as nginx writes it."""
    return service.address.removeprefix("http://")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that believes the proxy."""
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, {"TRUSTED_PROXIES": PROXY, "LOG_FORMAT": "json"}) as running:
        yield running


@pytest.fixture(scope="module")
def proxy(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy in front of it, with times of two seconds in the place of longer ones."""
    folder = tmp_path_factory.mktemp("proxy") / "nginx"
    with proxied(
        folder, host_of(service), client_header_timeout="2s", client_body_timeout="2s"
    ) as running:
        yield running


def trail(service: Service) -> list[dict[str, Any]]:
    """The lines of the audit trail."""
    lines = (service.folder / "data" / "audit").glob("*.jsonl")
    return [json.loads(one) for path in lines for one in path.read_text().splitlines()]


def address_of(service: Service, request_id: str) -> str:
    """From where a request came, by the trail."""
    [line] = [one for one in trail(service) if one.get("request_id") == request_id]
    return str(line["address"])


def test_nginx_accepts_the_example(tmp_path: Path) -> None:
    make_certificate(tmp_path)
    main = rendered(tmp_path, free_port(), "127.0.0.1:1")

    done = subprocess.run(
        [str(NGINX), "-t", "-c", str(main), "-p", str(tmp_path)], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr


def test_the_examples_bounds_leave_the_last_word_to_the_service() -> None:
    settings = Settings()

    bound = int(value_of("client_max_body_size").removesuffix("m")) * MIB
    assert bound > settings.limits.request_bytes
    assert float(value_of("proxy_read_timeout").rstrip("s")) > settings.queue.deadline_s
    assert value_of("server") == f"{settings.host}:{settings.port}"


def large_upload(bytes_each: int, files: int) -> Files:
    """Bitmaps that are sent as they are, of about so many bytes each."""
    width = 1024
    bitmap = encode(noise(size=(width, bytes_each // (3 * width))), "BMP")
    return [("frames", (f"{number}.bmp", bitmap)) for number in range(files)]


def test_an_upload_of_the_allowed_size_passes(proxy: Proxy) -> None:
    limits = Settings().limits
    upload = large_upload(limits.file_bytes - MIB, 4)
    assert 0.9 < sum(len(one[1][1]) for one in upload) / limits.request_bytes < 1

    with proxy.client(timeout=120) as client:
        answer = client.post("/query", files=upload)

    assert answer.status_code == 200, answer.text
    assert answer.json()["frames"]["received"] == 4


@pytest.mark.parametrize("mebibytes", [66, 80])
def test_a_larger_upload_is_refused_as_the_contract_says(proxy: Proxy, mebibytes: int) -> None:
    """By the service, or far above its bound by nginx in the same words."""
    upload = [("frames", ("1.jpg", bytes(mebibytes * MIB)))]

    with proxy.client(timeout=120) as client:
        answer = client.post("/query", files=upload)

    assert answer.status_code == 413
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    kind = KINDS[PayloadTooLargeError]
    assert (body["type"], body["title"]) == (f"/problems/{kind.slug}", kind.title)
    assert body["request_id"] == answer.headers["x-request-id"]


def test_what_a_client_says_of_its_address_goes_no_further(service: Service, proxy: Proxy) -> None:
    with proxy.client() as client:
        answer = client.post("/query", files=GOOD, headers=FORGED)

    assert answer.status_code == 200
    assert address_of(service, answer.headers["x-request-id"]) == CLIENT


def test_who_passes_by_the_proxy_is_not_believed(service: Service) -> None:
    transport = httpx.HTTPTransport(local_address=STRANGER)

    with httpx.Client(base_url=service.address, transport=transport) as client:
        answer = client.post("/query", files=GOOD, headers=FORGED)

    assert address_of(service, answer.headers["x-request-id"]) == STRANGER


def test_probes_pass_and_metrics_stay_inside(proxy: Proxy) -> None:
    with proxy.client() as client:
        statuses = [client.get(path).status_code for path in ("/livez", "/readyz", "/metrics")]

    assert statuses == [200, 200, 404]


def test_a_request_id_is_the_same_in_answer_log_and_trail(service: Service, proxy: Proxy) -> None:
    with proxy.client() as client:
        given = client.get("/gallery", headers={"X-Request-ID": "from-the-caller"})
        made = client.get("/gallery", headers={"X-Request-ID": 'a"b'})

    assert given.headers["x-request-id"] == "from-the-caller"
    assert made.headers["x-request-id"] != 'a"b'
    lines = (proxy.folder / "access.log").read_text().splitlines()
    for answer in (given, made):
        request_id = answer.headers["x-request-id"]
        assert any(line.endswith(f" {request_id}") for line in lines)
        assert request_id in service.log()
        assert address_of(service, request_id) == CLIENT


def test_the_proxys_log_does_not_say_who_was_looked_for(proxy: Proxy) -> None:
    with proxy.client() as client:
        assert client.get("/identities/somebody-known").status_code == 404

    logs = "".join(path.read_text() for path in proxy.folder.glob("*.log"))
    assert "somebody-known" not in logs


def test_answers_ask_for_tls_from_now_on_and_keep_the_services_headers(proxy: Proxy) -> None:
    with proxy.client() as client:
        headers = client.get("/readyz").headers

    assert headers["strict-transport-security"] == "max-age=31536000"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["server"] == "nginx"


def silent(proxy: Proxy, begun: bytes) -> bytes:
    """What comes of a request that is begun and never finished, until nginx closes."""
    with (
        socket.create_connection((PROXY, proxy.port), timeout=30) as plain,
        proxy.trust.wrap_socket(plain, server_hostname=PROXY) as connection,
    ):
        connection.sendall(begun)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


@pytest.mark.parametrize(
    "begun",
    [
        b"GET /gallery HTTP/1.1\r\nHost: passerby.example\r\nX-Slow:",
        b"POST /query HTTP/1.1\r\nHost: passerby.example\r\nContent-Length: 1000\r\n\r\n--x\r\n",
    ],
    ids=["head", "body"],
)
def test_who_falls_silent_is_cut_off(proxy: Proxy, begun: bytes) -> None:
    answer = silent(proxy, begun)

    assert not answer.startswith(b"HTTP/1.1 2")
    with proxy.client() as client:
        assert client.get("/readyz").status_code == 200


def test_a_service_that_is_away_is_told_of_as_the_contract_does(tmp_path: Path) -> None:
    with (
        proxied(tmp_path / "nginx", f"{PROXY}:{free_port()}") as alone,
        alone.client() as client,
    ):
        answer = client.post("/query", files=GOOD)

    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    kind = KINDS[NotReadyError]
    assert (body["type"], body["title"]) == (f"/problems/{kind.slug}", kind.title)
    assert body["status"] == 503
    assert body["request_id"] == answer.headers["x-request-id"]


def test_a_client_that_speaks_no_tls_gets_nothing(proxy: Proxy) -> None:
    answer = httpx.get(f"http://{PROXY}:{proxy.port}/readyz")

    assert answer.status_code == 400
