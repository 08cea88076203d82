"""The only map from errors to HTTP: what each becomes, and the RFC 9457 bodies that say it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import compile_path

from index import archive, exchange, gallery, ledger, succession, vector_storage
from index.calibration import CalibrationError
from model import errors as model_errors
from service import errors
from service.logs import note, request_id

MEDIA_TYPE = "application/problem+json"
STORE_RETRY_S = 5
LISTED_ERRORS = 32  # an answer should not be longer than the request


@dataclass(frozen=True, slots=True)
class Kind:
    """What a client sees of a kind of error.

    Args:
        status: HTTP status.
        slug: Last part of the problem's type.
        title: The same for every occurrence.
    """

    status: int
    slug: str
    title: str


KINDS: Mapping[type[Exception], Kind] = {
    errors.InvalidRequestError: Kind(400, "invalid-request", "The request is not well-formed"),
    gallery.InvalidCursorError: Kind(400, "invalid-cursor", "The page cursor is not one of ours"),
    errors.UnauthenticatedError: Kind(401, "unauthenticated", "A key is needed"),
    errors.ForbiddenError: Kind(403, "forbidden", "The key's role does not suffice"),
    gallery.NotFoundError: Kind(404, "not-found", "There is no such thing"),
    gallery.DuplicateTrackletError: Kind(409, "already-exists", "The tracklet id is taken"),
    gallery.DuplicateIdentityError: Kind(409, "already-exists", "The identity's name is taken"),
    errors.AlreadyExistsError: Kind(409, "already-exists", "The tracklet id is taken"),
    gallery.ModelMismatchError: Kind(409, "model-mismatch", "The gallery is of another model"),
    errors.PayloadTooLargeError: Kind(413, "payload-too-large", "The upload is over a limit"),
    errors.TooManyFramesError: Kind(413, "too-many-frames", "The tracklet has too many frames"),
    errors.UnsupportedMediaError: Kind(415, "unsupported-media", "A file is of another kind"),
    errors.ValidationError: Kind(422, "validation", "A value is not allowed"),
    errors.UndecodableFrameError: Kind(422, "undecodable-frame", "A frame cannot be decoded"),
    errors.NoUsableFramesError: Kind(422, "no-usable-frames", "The upload holds no frame"),
    errors.OverloadedError: Kind(429, "overloaded", "The queue is full"),
    errors.RateLimitedError: Kind(429, "overloaded", "There are too many requests"),
    CalibrationError: Kind(500, "internal-error", "The service made a mistake"),
    gallery.InvalidEmbeddingError: Kind(500, "internal-error", "The service made a mistake"),
    model_errors.InvalidFramesError: Kind(500, "internal-error", "The service made a mistake"),
    errors.NotReadyError: Kind(503, "not-ready", "The service is not ready"),
    errors.AuditUnavailableError: Kind(503, "not-ready", "The service is not ready"),
    errors.WorkerUnavailableError: Kind(503, "worker-unavailable", "The embedding worker failed"),
    gallery.GalleryUnavailableError: Kind(
        503, "gallery-unavailable", "The gallery is out of reach"
    ),
    errors.DeadlineExceededError: Kind(504, "deadline-exceeded", "The request waited too long"),
    gallery.StorageFullError: Kind(507, "storage-full", "The disk is full"),
}
INTERNAL = Kind(500, "internal-error", "The service made a mistake")
# Raised only where no client is: before the service listens, or by a command that trains, evaluates
# or exports; the command prints them.
START_ONLY: frozenset[type[Exception]] = frozenset(
    {
        gallery.DamagedGalleryError,
        gallery.InvalidIndexError,
        vector_storage.StorageMismatchError,
        archive.SnapshotError,
        errors.AuditError,
        errors.KeysError,
        exchange.ExchangeError,
        ledger.LedgerError,
        succession.InUseError,
        succession.SuccessionError,
        model_errors.CheckpointError,
        model_errors.DeviceError,
        model_errors.DatasetError,
        model_errors.EvaluationError,
        model_errors.ExportError,
        model_errors.RecipeError,
        model_errors.TeacherError,
        model_errors.TrainingError,
    }
)
_HTTP = {
    400: Kind(400, "invalid-request", "The request is not well-formed"),
    404: Kind(404, "not-found", "There is no such thing"),
    405: Kind(405, "method-not-allowed", "The method is not allowed here"),
    413: Kind(413, "payload-too-large", "The upload is over a limit"),
}


def problem(
    kind: Kind,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    members: Mapping[str, Any] | None = None,
) -> JSONResponse:
    """An RFC 9457 answer.

    Args:
        kind: Status, slug and title.
        detail: What was expected and what came.
        headers: Further headers.
        members: Further members of the body.
    """
    note(problem=kind.slug)
    body = {
        "type": f"/problems/{kind.slug}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
        "request_id": request_id.get(),
        **(members or {}),
    }
    return JSONResponse(body, kind.status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def internal_problem() -> JSONResponse:
    """The answer to a mistake of ours: the log has it under the request's id."""
    return problem(INTERNAL, "an unexpected error; the log has it under this request id")


async def _on_domain_error(_: Request, error: Exception) -> JSONResponse:
    kind = KINDS[type(error)]
    headers: dict[str, str] = {}
    members: dict[str, Any] = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if isinstance(error, gallery.GalleryUnavailableError):
        retry_after_s = STORE_RETRY_S
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    if isinstance(error, errors.UnauthenticatedError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.ValidationError):
        members["errors"] = [{"pointer": error.pointer, "detail": str(error)}]
    return problem(kind, str(error), headers=headers, members=members)


async def _on_internal_error(_: Request, error: Exception) -> JSONResponse:
    raise error  # the request middleware logs it and answers


async def _on_validation_error(_: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    found = error.errors()
    if any(one["type"] == "json_invalid" for one in found):
        return problem(_HTTP[400], "expected a JSON body, got something else")
    return validation_problem([(one["loc"], one["msg"]) for one in found])


def validation_problem(found: list[tuple[tuple[int | str, ...], str]]) -> JSONResponse:
    """The answer to values that are not allowed; the values themselves are not repeated.

    Args:
        found: For each its place in the request and what was expected.
    """
    listed = [
        {
            "pointer": "/" + "/".join(str(part) for part in place),
            "detail": message.removeprefix("Value error, "),
        }
        for place, message in found[:LISTED_ERRORS]
    ]
    detail = "; ".join(f"{one['pointer']}: {one['detail']}" for one in listed[:3])
    if len(found) > 3:
        detail += f"; and {len(found) - 3} more"
    return problem(KINDS[errors.ValidationError], detail, members={"errors": listed})


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    kind = _HTTP.get(error.status_code)
    if kind is None:
        kind = Kind(error.status_code, f"http-{error.status_code}", str(error.detail))
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods_at(request)))
    return problem(kind, str(error.detail), headers=headers)


def _methods_at(request: Request) -> set[str]:
    """What may be asked of a path; Starlette tells the methods of the first route there alone."""
    path = request.scope["path"]
    return {
        method
        for route in iter_route_contexts(request.app.routes)
        if route.path is not None and compile_path(route.path)[0].match(path)
        for method in route.methods or ()
    }


def install(app: FastAPI) -> None:
    """Make an app answer every error as a problem."""
    for error, kind in KINDS.items():
        app.add_exception_handler(
            error, _on_internal_error if kind.status == 500 else _on_domain_error
        )
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
