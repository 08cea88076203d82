"""A client of the service: what the commands use, and a short example of how to call it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from model.datasets.folder import IMAGE_SUFFIXES, read_tracklet
from service.uploads import content_digest

DEFAULT_SERVER = "http://127.0.0.1:8000"
ATTEMPTS = 6
_TIMEOUT = httpx.Timeout(connect=5, read=180, write=60, pool=None)


class ClientError(Exception):
    """Raised when the service refuses, fails or cannot be reached; the message says why."""


@dataclass(frozen=True, slots=True)
class LocalTracklet:
    """A tracklet on this machine, ready to be sent.

    Args:
        kind: Form field: frames, archive or video.
        files: Name and content of each file, in temporal order.
    """

    kind: str
    files: tuple[tuple[str, bytes], ...]

    @property
    def content(self) -> str:
        """What the service calls the same content; known here for frames and videos only."""
        return content_digest([content for _, content in self.files])


def read_local(path: Path | Sequence[Path]) -> LocalTracklet:
    """Read a folder of frames, a list of frames, one image, one zip or one video.

    Raises:
        DatasetError: The folder holds no frames.
        ClientError: A file cannot be read.
    """
    if isinstance(path, Path) and path.is_dir():
        return _read("frames", read_tracklet(path))
    if not isinstance(path, Path):
        return _read("frames", path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _read("frames", [path])
    return _read("archive" if path.suffix.lower() == ".zip" else "video", [path])


def _read(kind: str, paths: Sequence[Path]) -> LocalTracklet:
    try:
        return LocalTracklet(kind, tuple((path.name, path.read_bytes()) for path in paths))
    except OSError as error:
        raise ClientError(f"could not read {error.filename}: {error.strerror}") from error


class Client:
    """Talks to one server; may be shared by threads.

    Args:
        server: Its address, like ``http://127.0.0.1:8000``.
        key: Sent as a bearer token where the server asks for one.
    """

    def __init__(self, server: str, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=server, headers=headers, timeout=_TIMEOUT)
        self._server = server

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def enrol(self, tracklet: LocalTracklet, fields: dict[str, str]) -> tuple[dict[str, Any], bool]:
        """Enrol a tracklet; returns its record, and False where it was there already.

        Raises:
            ClientError: The service refused or could not be reached.
        """
        answer = self._send("POST", "/gallery", tracklet, data=fields)
        record: dict[str, Any] = answer.json()
        return record, answer.status_code == 201

    def query(self, tracklet: LocalTracklet, parameters: dict[str, Any]) -> dict[str, Any]:
        """Ask who a tracklet shows; returns the answer's body.

        Raises:
            ClientError: The service refused or could not be reached.
        """
        answer: dict[str, Any] = self._send("POST", "/query", tracklet, params=parameters).json()
        return answer

    def record(self, tracklet_id: str) -> dict[str, Any] | None:
        """The record of a stored tracklet, or None.

        Raises:
            ClientError: The service failed or could not be reached.
        """
        answer = self._request("GET", f"/gallery/{tracklet_id}")
        if answer.status_code == 404:
            return None
        record: dict[str, Any] = _checked(answer).json()
        return record

    def strip(self, tracklet_id: str) -> bytes | None:
        """The film strip of a stored tracklet, or None where none is kept.

        Raises:
            ClientError: The service failed or could not be reached.
        """
        answer = self._request("GET", f"/gallery/{tracklet_id}/strip.jpg")
        return None if answer.status_code == 404 else _checked(answer).content

    def assign(self, identity: str, tracklet_ids: Sequence[str]) -> int:
        """Say that stored tracklets show an identity, all or none; returns how many are new to it.

        Raises:
            ClientError: The service refused, failed or could not be reached.
        """
        body = {"tracklet_ids": list(tracklet_ids)}
        answer = _checked(self._request("POST", f"/identities/{identity}/tracklets", json=body))
        changed: int = answer.json()["changed"]
        return changed

    def ready(self) -> bool:
        """Whether the service says that it can do its work."""
        try:
            return self._http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def _send(self, method: str, path: str, tracklet: LocalTracklet, **more: Any) -> httpx.Response:
        files = [(tracklet.kind, (name, content)) for name, content in tracklet.files]
        return _checked(self._request(method, path, files=files, **more))

    def _request(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Send, and again where the service asks for patience."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answer = self._http.request(method, path, **more)
            except httpx.TransportError as error:
                if attempt == ATTEMPTS or not isinstance(error, httpx.ReadError | httpx.WriteError):
                    raise ClientError(f"could not reach {self._server}: {error}") from error
                time.sleep(attempt)
                continue
            if answer.status_code not in (429, 503) or attempt == ATTEMPTS:
                return answer
            wait = answer.headers.get("Retry-After", "1")
            time.sleep(min(int(wait) if wait.isdigit() else 1, 30))
        raise AssertionError("the loop returns or raises")


def read_key(path: Path | None) -> str | None:
    """A key from a file; None where there is no file.

    Raises:
        ClientError: It cannot be read, or is no key: a header cannot carry it.
    """
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ClientError(f"could not read the key file {path}: {reason}") from error
    if not (key.isascii() and key.isprintable() and len(key.split()) == 1):
        # What it holds is not repeated: it may be another secret.
        raise ClientError(f"expected one key alone in the key file {path}, got something else")
    return key


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_success:
        return answer
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = "no further word"
    raise ClientError(f"{answer.status_code}: {detail}")
